"""The operators on a GPU: the launchers through the public functions. Skipped without one."""

import pytest
import torch

import afd_fast
from afd_fast.reference.noise import normal_noise
from tests.test_ops_nft import run, widened

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


def make(shape, dtype, seed=0):
    g = torch.Generator(device="cuda").manual_seed(seed)
    n = lambda: torch.randn(shape, device="cuda", generator=g).to(dtype)
    inputs = {k: n() for k in ("v", "x0", "noise", "v_old", "v_ref")}
    inputs["v"].requires_grad_()
    rest = lambda: torch.rand(shape[0], device="cuda", generator=g)
    return inputs | {"r": rest(), "t": 0.1 + 0.8 * rest()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", ["afd", "diffusionnft", "astrolabe", "gardo"])
@pytest.mark.parametrize("shape", [(3, 1), (2, 4097), (5, 16, 64, 64), (2, 21, 16, 30, 52)])
def test_loss(shape, recipe, dtype):
    inputs = make(shape, dtype)
    inputs["x_t"] = afd_fast.forward_noise(inputs["x0"], inputs["t"], noise=inputs.pop("noise"))
    for scale in (1.0, 3.0):
        (loss, grad), (exact_loss, exact) = (
            run(inputs, scale, recipe=recipe),
            run(widened(inputs), scale, recipe=recipe),
        )
        assert abs(loss - exact_loss) <= 1e-5 * abs(exact_loss)
        tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert (grad.double() - exact).abs().max() <= (0.51 * torch.finfo(dtype).eps + 5e-6) * exact.abs().max() + tiny


@pytest.mark.parametrize("seed", [0, -5, 2**62 + 1])
def test_noise_bits_equal_the_cpu(seed):
    zero, one = torch.zeros(2, 3, 5001, device="cuda"), torch.ones(2, device="cuda")
    assert torch.equal(afd_fast.forward_noise(zero, one, seed=seed).cpu(), normal_noise((2, 3, 5001), seed))


def test_seed_frames_masks_and_packed():
    inputs = make((2, 6, 4, 30), torch.float32)
    noise = normal_noise((2, 6, 4, 30), 7).cuda()
    extra = dict(t=torch.rand(2, 4, device="cuda") * 0.8 + 0.1, frame_dim=2, recipe="astrolabe",
                 element_mask=torch.rand(2, 1, 4, 30, device="cuda") > 0.3)  # fmt: skip
    a, b = run(inputs | extra | {"noise": noise}), run(inputs | extra | {"noise": None, "seed": 7})
    torch.testing.assert_close(a, b)
    packed = make((900, 13), torch.float32)
    change = dict(r=torch.rand(3, device="cuda"), t=torch.rand(3, device="cuda") * 0.8 + 0.1,
                  cu_seqlens=torch.tensor([0, 300, 301, 900], device="cuda"), recipe="diffusionnft")  # fmt: skip
    (loss, grad), (exact_loss, exact) = run(packed | change), run(widened(packed | change))
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), exact, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("recipe", ["afd", "diffusionnft"])
def test_no_synchronisation_and_deterministic(recipe):
    inputs = make((4, 50_000), torch.bfloat16)
    run(inputs, recipe=recipe)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [run(inputs, recipe=recipe) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0]))


def test_compile_fullgraph():
    inputs = make((4, 5000), torch.bfloat16)
    expected = run(inputs)
    step = torch.compile(lambda i: afd_fast.nft_loss(**i), fullgraph=True)
    loss = step(inputs)
    torch.testing.assert_close(loss.detach(), expected[0])
    torch.testing.assert_close(torch.autograd.grad(loss, inputs["v"])[0], expected[1])


def test_more_than_two_to_the_31_elements():
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GB")
    n = (1 << 31) + 4099
    x0 = torch.zeros(1, n, dtype=torch.bfloat16, device="cuda")
    x0[0, -1] = 2.0
    out = torch.full_like(x0, float("nan"))
    v = torch.zeros_like(x0)
    v[0, -1] = 1.0
    with torch.no_grad():
        afd_fast.nft_loss(v, x0, torch.ones(1, device="cuda"), 0.5, noise=torch.zeros_like(x0), out=out)
    assert abs(out[0, -1].item() - 0.6) < 2e-3 and not out[0, :-1].any()  # 2 beta (2r - 1)(v - (eps - x0)), to bf16


def test_wrong_device():
    inputs = make((2, 8), torch.float32)
    with pytest.raises(ValueError, match="x0 is on cpu"):
        run(inputs | {"x0": inputs["x0"].cpu()})

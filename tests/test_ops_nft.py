"""nft_loss and forward_noise as operators: dispatch, compile, layouts, sizes, out=, grad_output."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from afd_kernels.layout import Row, Slot, Source, Total
from torch.utils._python_dispatch import TorchDispatchMode

import afd_fast
from afd_fast.ops import layout, native, nft
from afd_fast.ops import nft_operators as ops
from afd_fast.ops._register import is_wide
from afd_fast.ops.noise import wrap_seed

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["as installed", "reference"]


def make(shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    n = lambda: torch.randn(*shape, generator=g).to(dtype)
    inputs = {k: n() for k in ("v", "x0", "noise", "v_old", "v_ref")}
    inputs["v"].requires_grad_()
    return inputs | {"r": torch.rand(shape[0], generator=g), "t": 0.1 + 0.8 * torch.rand(shape[0], generator=g)}


def run(inputs, scale=1.0, **kwargs):
    loss = afd_fast.nft_loss(**inputs | kwargs)
    return loss.detach(), torch.autograd.grad(loss * scale, inputs["v"])[0]


def widened(inputs):
    wide = {
        k: x.detach().double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for k, x in inputs.items()
    }
    wide["v"].requires_grad_()
    return wide


def error(a, exact):
    return (a.double() - exact.double()).abs().max().item() if exact.numel() else 0.0


def bound(exact, dtype):
    """One rounding of the result, and float32's accumulated rounding of the inputs' scale."""
    top = exact.abs().max().item() if exact.numel() else 0.0
    return torch.finfo(dtype).eps * top + 2e-6 * top + 1e-7


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr("afd_fast.ops.native.library", lambda: None)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 7, 16, 4093, 4096, 4097, 8191])
@pytest.mark.parametrize(
    "recipe,source", [("afd", "noise"), ("afd", "seed"), ("diffusionnft", "x_t"), ("astrolabe", "seed")]
)
def test_sizes(backend, dtype, size, recipe, source):
    inputs = make((3, size), dtype)
    noise = inputs.pop("noise")
    inputs |= {"seed": 7} if source == "seed" else {source: noise}
    wide = widened(inputs)
    if source == "seed" and recipe == "astrolabe":  # the network's rounded x_t is part of the input
        wide["x_t"] = afd_fast.forward_noise(inputs["x0"], inputs["t"], seed=wide.pop("seed")).double()
    (loss, grad), (exact_loss, exact) = run(inputs, recipe=recipe), run(wide, recipe=recipe)
    assert abs(loss - exact_loss) <= 2e-5 * abs(exact_loss)
    assert grad.dtype == dtype and error(grad, exact) <= bound(exact, dtype)


@pytest.mark.parametrize("recipe", ["afd", "diffusionnft"])
def test_empty_batch(backend, recipe):
    loss, grad = run(make((0, 5)), recipe=recipe)
    assert loss == 0 and grad.shape == (0, 5)


@pytest.mark.parametrize("recipe", ["afd", "diffusionnft"])
@pytest.mark.parametrize("source", ["noise", "seed"])
@pytest.mark.parametrize(
    "frame_dim,t_shape", [(1, (2, 6)), (2, (2, 3)), (None, (2, 1, 3, 1, 1)), (None, (1, 6, 3, 1, 5))]
)
def test_per_frame_t(backend, recipe, source, frame_dim, t_shape):
    inputs = make((2, 6, 3, 4, 5)) | {"t": 0.1 + 0.8 * torch.rand(t_shape), "frame_dim": frame_dim}
    if source == "seed":
        inputs |= {"noise": None, "seed": -3}
    inputs["sigma"] = 0.1 + 0.8 * torch.rand(2)  # one value per sample, where t has several
    (loss, grad), (exact_loss, exact) = run(inputs, recipe=recipe), run(widened(inputs), recipe=recipe)
    assert abs(loss - exact_loss) <= 1e-5 * abs(exact_loss) and error(grad, exact) <= bound(exact, torch.float32)
    x_t = afd_fast.forward_noise(
        inputs["x0"], inputs["t"], noise=inputs["noise"], seed=inputs.get("seed"), frame_dim=frame_dim
    )
    exact = afd_fast.reference.flow.forward_noise(
        inputs["x0"].double(), inputs["t"].double(), noise=None if source == "seed" else inputs["noise"].double(),
        seed=inputs.get("seed"), frame_dim=frame_dim,
    )  # fmt: skip
    assert error(x_t, exact) < 1e-6


def test_layouts(backend):
    """Permuted, batch-strided, expanded and sliced inputs; a dense permutation is walked in memory order, uncopied."""
    inputs = make((2, 3, 4, 5))
    expected_loss, expected = run(inputs, recipe="diffusionnft")
    for change in (
        lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        lambda x: torch.stack([x, x], 1)[:, 0],
        lambda x: torch.cat([x, x], -1)[..., :5],
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        moved = {k: change(x.detach()) if x.ndim == 4 else x for k, x in inputs.items()}
        moved["v"].requires_grad_()
        loss, grad = run(moved, recipe="diffusionnft")
        torch.testing.assert_close(loss, expected_loss)
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-8)
    one = inputs | {"v_ref": inputs["v_ref"][:1].expand(2, 3, 4, 5)}
    torch.testing.assert_close(run(one)[1], run(inputs | {"v_ref": one["v_ref"].contiguous()})[1])
    assert layout.memory_order(inputs["v"].permute(0, 2, 3, 1)) is not None
    assert layout.memory_order(torch.empty(2, 6, 4)[:, ::2]) is None


@pytest.mark.parametrize("recipe", ["afd", "diffusionnft"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_grad_output_enters_before_rounding(backend, recipe, dtype):
    inputs = make((2, 40), dtype)
    wide = widened(inputs)
    for scale in (1.0, 3.0, 1 / 7, 65536.0):
        grad, exact = run(inputs, scale, recipe=recipe)[1], run(wide, recipe=recipe)[1] * scale
        assert error(grad, exact) <= bound(exact, dtype) * (1 if dtype != torch.bfloat16 else 0.51)


@pytest.mark.parametrize("recipe", ["afd", "diffusionnft"])
def test_two_backwards_do_not_share_memory(backend, recipe):
    inputs = make((2, 40))
    loss = afd_fast.nft_loss(**inputs, recipe=recipe)
    once = torch.autograd.grad(loss, inputs["v"], retain_graph=True)[0]
    kept = once.clone()
    twice = torch.autograd.grad(2 * loss, inputs["v"], retain_graph=True)[0]
    torch.testing.assert_close(twice, 2 * kept)
    assert torch.equal(once, kept)


@pytest.mark.parametrize("recipe", ["afd", "diffusionnft"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_out(backend, recipe, dtype):
    inputs = make((2, 5000), dtype)
    expected = run(inputs, recipe=recipe)[1]
    out = torch.full((2, 5000), float("nan"), dtype=dtype)
    loss = afd_fast.nft_loss(**inputs, recipe=recipe, out=out)
    assert torch.equal(out, expected)  # already there, for grad_output 1
    (grad,) = torch.autograd.grad(loss, inputs["v"])
    assert grad.data_ptr() == out.data_ptr()
    with torch.no_grad():  # no graph needed
        out.fill_(float("nan"))
        afd_fast.nft_loss(**inputs, recipe=recipe, out=out)
    assert torch.equal(out, expected)
    loss = afd_fast.nft_loss(**inputs, recipe=recipe, out=out)
    assert torch.equal(torch.autograd.grad(3 * loss, inputs["v"])[0], run(inputs, 3.0, recipe=recipe)[1])


ALIASES = {
    "an input": lambda i: i["noise"],
    "v": lambda i: i["v"].detach(),
    "part of an input": lambda i: i["x0"].view(-1).as_strided((2, 70), (70, 1)),
    "one sample over another": lambda i: torch.empty(70).expand(2, 70),
    "overlapping samples": lambda i: torch.empty(140).as_strided((2, 70), (35, 1)),
    "gaps in a sample": lambda i: torch.empty(2, 140)[:, ::2],
}


@pytest.mark.parametrize("alias", ALIASES)
def test_out_that_could_be_wrong_is_refused(backend, alias):
    inputs = make((2, 70))
    with pytest.raises(ValueError, match="out must"):
        afd_fast.nft_loss(**inputs, out=ALIASES[alias](inputs))


def test_out_of_packed_samples_has_no_gaps(backend):
    inputs = make((6, 70)) | {"r": torch.rand(2), "t": 0.5, "cu_seqlens": torch.tensor([0, 2, 6])}
    with pytest.raises(ValueError, match="out must have v's memory layout"):
        afd_fast.nft_loss(**inputs, out=torch.empty(6, 140)[:, :70])


def test_one_buffer_for_two_losses_is_noticed(backend):
    inputs, out = make((2, 70)), torch.empty(2, 70)
    first, second = (afd_fast.nft_loss(**inputs, out=out) for _ in range(2))
    second.backward()
    with pytest.raises(RuntimeError, match="out= buffer was written after the forward pass"):
        first.backward()
    if inputs["v"].grad.data_ptr() == out.data_ptr():  # handed over as the leaf's gradient
        with pytest.raises(ValueError, match=r"shares memory with an input or v\.grad"):
            afd_fast.nft_loss(**inputs, out=out)


@pytest.mark.parametrize("recipe", ["afd", "diffusionnft", "astrolabe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_dtype_changes_nothing(backend, default_dtype, recipe, dtype):
    """The C++ library wrote float32 into buffers of the default dtype: out of bounds for a half type."""
    inputs = make((3, 4100), dtype)
    seeded = {name: x for name, x in inputs.items() if name != "noise"} | {"seed": 5}

    def results():
        stats = afd_fast.nft_loss(**inputs, recipe=recipe, return_stats=True)[1]
        noised = afd_fast.forward_noise(inputs["x0"], inputs["t"], seed=5)
        tracked = afd_fast.forward_noise(inputs["x0"].clone().requires_grad_(), inputs["t"], seed=5).detach()
        r = afd_fast.reward_to_r(torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float32))
        return [*run(inputs, recipe=recipe), *run(seeded, recipe=recipe), *stats, noised, tracked, r]

    expected = results()
    default_dtype()
    for found, want in zip(results(), expected):
        assert found.dtype == want.dtype and torch.equal(found, want)


@pytest.mark.parametrize("offsets", [[0, 2, 100_000], [0, -5_000_000, 6], [0, 6, 2]])
def test_bad_offsets_are_refused_inside_a_compiled_call(offsets):
    """While tracing no value can be read, so the operator itself looks."""
    inputs = make((6, 70))
    inputs |= {"r": torch.rand(2), "t": 0.5, "cu_seqlens": torch.tensor(offsets)}
    compiled = torch.compile(afd_fast.nft_loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 6"):
        compiled(**inputs, recipe="diffusionnft").backward()


@pytest.mark.parametrize("masked", [False, True])
def test_deterministic_for_any_number_of_threads(masked):
    """With up to as many threads as samples each has a sample, sums and gradient, with more each has tiles."""
    inputs, threads = make((3, 50_000)), torch.get_num_threads()
    masks = dict(element_mask=inputs["noise"] > 0, sample_mask=torch.tensor([1.0, 0.0, 2.0])) if masked else {}
    results = []
    for n in (1, 2, 3, 5):
        torch.set_num_threads(n)
        results.append(run(inputs, recipe="diffusionnft", **masks))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0]))


def _inputs(dtype=torch.float32, recipe="diffusionnft", **change):
    i = make((2, 30), dtype)
    values = dict(
        v=i["v"].detach(), x0=i["x0"], r=i["r"], t=i["t"][:, None].contiguous(), noise=i["noise"], seed=None, x_t=None,
        v_old=i["v_old"], v_ref=i["v_ref"], sigma=None, sample_mask=None, ref_mask=None, element_mask=None,
        each=None, policy_weight=None, prior_weight=None, cu_seqlens=None, inner=30, recipe=afd_fast.nft_recipe(recipe).key, stats=True,
    )  # fmt: skip
    return ops.Inputs(**values | change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype):
    i, tests = _inputs(dtype), ("test_schema", "test_faketensor", "test_autograd_registration")
    if dtype == torch.float64:
        i = i._replace(t=i.t.double())
    check = lambda op, args: torch.library.opcheck(op, args, test_utils=tests)
    _, _, rows = ops.loss(*i)
    one = torch.ones(2, dtype=rows.dtype)
    check(torch.ops.afd_fast.nft_loss.default, tuple(i))
    check(torch.ops.afd_fast.nft_loss.default, tuple(i._replace(noise=None, seed=3, v_old=None, v_ref=None)))
    dense = i._replace(each=torch.rand_like(i.v, dtype=rows.dtype), policy_weight=i.r, element_mask=i.v.abs())
    check(torch.ops.afd_fast.nft_loss.default, tuple(dense))
    check(torch.ops.afd_fast.nft_loss_with_grad.default, (*i, torch.empty_like(i.v)))
    check(torch.ops.afd_fast.nft_loss_backward.default, (one, rows, *i))
    check(torch.ops.afd_fast.nft_loss_redo.default, (3 * one, rows, *i, torch.empty_like(i.v)))
    for noise, seed in ((i.noise, None), (None, 3)):
        check(torch.ops.afd_fast.forward_noise.default, (i.x0, i.t, noise, seed, 30))


@pytest.mark.parametrize("recipe", ["afd", "diffusionnft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile_fullgraph(recipe, dtype):
    inputs = make((2, 3, 50), dtype)
    expected = run(inputs, 2.0, recipe=recipe)
    seeded = inputs | {"noise": None, "seed": 5}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(inputs):
        x_t = afd_fast.forward_noise(inputs["x0"], inputs["t"], seed=5)
        loss, stats = afd_fast.nft_loss(**inputs, recipe=recipe, return_stats=True)
        return loss, stats.signal, x_t

    loss, _, x_t = step(inputs)
    (grad,) = torch.autograd.grad(2 * loss, inputs["v"])
    torch.testing.assert_close(loss.detach(), expected[0], rtol=1e-6, atol=0)  # stats add sums in another order
    torch.testing.assert_close(grad, expected[1], rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-8)
    assert torch.equal(x_t, afd_fast.forward_noise(inputs["x0"], inputs["t"], seed=5))
    assert step(seeded)[0].isfinite()


@pytest.mark.skipif(
    torch.__version__ < "2.7", reason="PyTorch 2.6 cannot trace a dataclass that was made in the function"
)
def test_a_recipe_is_made_inside_a_compiled_function():
    inputs = make((2, 3, 50), torch.float32)
    make_recipe = lambda: afd_fast.nft_recipe("diffusionnft", beta=0.3)
    compiled = torch.compile(fullgraph=True, backend="aot_eager")(
        lambda i: afd_fast.nft_loss(**i, recipe=make_recipe())
    )
    assert torch.equal(compiled(inputs), afd_fast.nft_loss(**inputs, recipe=make_recipe()))


def test_only_v_gets_a_gradient_and_double_backward_says_no():
    inputs = make((2, 8))
    inputs |= {k: inputs[k].clone().requires_grad_() for k in ("x0", "v_old", "v_ref", "r")}
    loss = afd_fast.nft_loss(**inputs)
    (grad,) = torch.autograd.grad(loss, inputs["v"], create_graph=True)
    torch.testing.assert_close(grad, run(inputs)[1])
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.sum(), inputs["v"])
    afd_fast.nft_loss(**inputs).backward()
    assert inputs["v"].grad is not None and all(inputs[k].grad is None for k in ("x0", "v_old", "v_ref"))


def test_checkpointing_and_accumulation():
    inputs = make((2, 30))
    expected = run(inputs)[1]
    f = lambda v: afd_fast.nft_loss(**inputs | {"v": 1.0 * v})
    for scale in (0.5, 0.5):
        (scale * torch.utils.checkpoint.checkpoint(f, inputs["v"], use_reentrant=False)).backward()
    torch.testing.assert_close(inputs["v"].grad, expected)


def test_module_and_backends():
    inputs = make((2, 8))
    assert torch.equal(afd_fast.NFTLoss("gardo")(**inputs), afd_fast.nft_loss(**inputs, recipe="gardo"))
    table = afd_fast.ops.backends()
    assert set(table) == {"nft_loss", "forward_noise", "bt_loss"}
    assert ("C++ for" in table["nft_loss"]) == (native.library() is not None)


def test_float64_rewards_do_not_change_the_implementation():
    i = _inputs(torch.bfloat16)
    assert not is_wide(i._replace(r=i.r.double())) and is_wide(_inputs(torch.float64))
    one, rows = torch.ones((), dtype=torch.float64), torch.zeros(len(Row), 2)
    assert not is_wide((one, rows, *i)) and is_wide((one, rows.double(), *i))


@pytest.mark.parametrize("enum", [Slot, Row, Total, Source], ids=lambda e: e.__name__)
def test_cpp_has_the_same_names_in_the_same_order(enum):
    header = (Path(__file__).parents[1] / "kernels/csrc/afd_core.h").read_text()
    names = re.findall(r"\w+", re.search(rf"enum Afd{enum.__name__} {{(.*?)}}", header, re.S)[1])
    names = [n.split("_", 1)[1].replace("XT", "X_T") for n in names if n not in ("AFD_SLOTS", "AFD_ROWS")]
    assert names == [member.name for member in enum] and list(enum) == list(range(len(enum)))


def test_rows_are_fields_of_the_stats():
    totals = {"policy_loss", "prior_loss", "signal", "r_mean"}
    assert set(ops.STATISTICS) | totals == set(afd_fast.NFTStats._fields) and len(totals) == len(Total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "change",
    [{}, {"v_old": None}, {"v_ref": None}, {"element_mask": torch.rand(3, 9001) > 0.5}],
    ids=lambda c: ",".join(c),
)
def test_statistics_equal_float64(backend, dtype, change):
    """Also the maxima, over tiles, tails and masks; and a NaN, which a maximum could lose."""
    inputs = make((3, 9001), dtype) | change
    inputs["x_t"] = inputs.pop("noise")
    stats = [afd_fast.nft_loss(**i, recipe="diffusionnft", return_stats=True)[1] for i in (inputs, widened(inputs))]
    for name, found, exact in zip(stats[0]._fields, *stats):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6, msg=lambda m: f"{name}: {m}")  # noqa: B023
    bad = inputs["x0"].clone()
    bad[1, 17] = float("nan")
    _, s = afd_fast.nft_loss(**inputs | {"x0": bad, "element_mask": None}, recipe="diffusionnft", return_stats=True)
    assert s.x0_square_max.isnan().tolist() == s.x0_square.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_clean_space_is_the_written_out_formula(backend, dtype):
    """Predictions of x0: no noise, and t plays no part."""
    inputs = make((3, 5001), dtype)
    del inputs["noise"]
    recipe = afd_fast.nft_recipe("astrolabe", space="clean", ref_space="v", ref_coef=0.3)
    w = widened(inputs)
    pos, neg = (((1 - k) * w["v_old"] + k * w["v"] - w["x0"]).square().mean(1) for k in (0.1, -0.1))
    exact = (w["r"] * pos + (1 - w["r"]) * neg).mean() + 0.3 * (w["v"] - w["v_ref"]).square().mean()
    (exact_grad,) = torch.autograd.grad(exact, w["v"])
    for t in (inputs["t"], 1.0, 0.0):
        loss, grad = run(inputs | {"t": t}, recipe=recipe)
        assert abs(loss - exact) <= (1e-12 if dtype == torch.float64 else 1e-6) * exact
        assert error(grad, exact_grad) <= bound(exact_grad, dtype)


@pytest.mark.skipif(native.library() is None, reason="the C++ library is not built")
def test_float16_is_native_and_rounds_exactly():
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).view(1, -1)
    assert native.serves(every)
    copied = afd_fast.forward_noise(every, torch.zeros(1), noise=torch.zeros_like(every))
    finite = every.isfinite()
    assert torch.equal(copied[finite], every[finite]) and copied[every.isnan()].isnan().all()
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (1, 1 << 18), generator=g).to(torch.int32).view(torch.float32)
    ties = ((torch.arange(1 << 18) << 12) + (90 << 23)).to(torch.int32).view(torch.float32).view(1, -1)  # 2^-37 .. 2^91
    for x in (bits, ties, -ties):
        found = afd_fast.forward_noise(torch.zeros_like(x, dtype=torch.float16), torch.ones(1), noise=x)
        real = ~x.isnan()
        assert torch.equal(found[real], x.half()[real]) and found[~real].isnan().all()


@pytest.mark.skipif(native.library() is None, reason="the C++ library is not built")
def test_float16_instructions_round_as_the_portable_code():
    """A mask takes the code for any type, which converts by integer arithmetic; without one, F16C does where it is there."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    v = every[every.isfinite()].view(2, -1)
    recipe = afd_fast.nft_recipe("diffusionnft", weighting="none", sample_reduction="sum", ref_coef=0.5)
    inputs = dict(v=v.clone().requires_grad_(), x0=v.roll(1, 1), v_old=v.roll(7, 1), v_ref=v.roll(333, 1),
                  r=torch.tensor([0.9, 0.2]), t=torch.tensor([0.3, 0.8]), noise=v.flip(1), recipe=recipe)  # fmt: skip
    kinds = set()
    for scale in (1.0, 2.0**-14, 2.0**-34):
        loss, grad = run(inputs, scale)
        portable_loss, portable = run(inputs, scale, element_mask=torch.ones_like(v, dtype=torch.bool))
        assert torch.equal(grad, portable)
        torch.testing.assert_close(loss, portable_loss, rtol=1e-6, atol=0)
        small = (grad != 0) & (grad.abs() < 2**-14)
        kinds |= {name for name, some in (("inf", grad.isinf()), ("subnormal", small), ("0", grad == 0)) if some.any()}
    assert kinds == {"inf", "subnormal", "0"}


@pytest.mark.parametrize("recipe", ["afd", "astrolabe", "diffusionnft"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_last_grad_output_is_written_ahead(backend, recipe, dtype, monkeypatch):
    """With a loss scale that stays, backward sweeps no more; the numbers are those of a sweep for it."""
    swept, sweep = [], ops._gradient if backend == "reference" or dtype == torch.float64 else native.nft_gradient
    owner = ops if sweep is ops._gradient else native
    monkeypatch.setattr(owner, sweep.__name__, lambda *args: (swept.append(args), sweep(*args))[1])
    monkeypatch.setattr(nft._NFTLoss, "expected", 1.0)
    inputs, grads, counts = make((2, 5000), dtype), [], []
    for scale in (8.0, 8.0, 3.0, 3.0, 1.0):
        swept.clear()
        grads.append(run(inputs, scale, recipe=recipe)[1])
        counts.append(len(swept))
    ahead = int(owner is ops)  # the reference computes the gradient in forward by the same function
    assert [n - ahead for n in counts] == [1, 0, 1, 0, 1]
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[2], grads[3])
    torch.testing.assert_close(grads[0], 8 * grads[4])
    run(inputs, 8.0, recipe=recipe)
    out = torch.empty_like(inputs["v"], requires_grad=False)
    afd_fast.nft_loss(**inputs, recipe=recipe, out=out)
    assert torch.equal(out, grads[4])  # a lent buffer gets the gradient for grad_output 1


def test_seed_wraps_to_64_bits():
    assert wrap_seed(2**64 - 1) == -1 and wrap_seed(2**63) == -(2**63) and wrap_seed(5) == 5
    x0, t = torch.zeros(1, 64), torch.ones(1)
    assert torch.equal(afd_fast.forward_noise(x0, t, seed=2**64 - 1), afd_fast.forward_noise(x0, t, seed=-1))


@pytest.mark.skipif(native.library() is None, reason="the C++ library is not built")
def test_the_sanitizers_report_nothing():
    """`python tests/fuzz_native.py --seconds 300`, for a few seconds."""
    command = [sys.executable, Path(__file__).parent / "fuzz_native.py", "--seconds", "8"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "no report" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]


def test_the_backward_fills_nothing():
    """The statistics have no gradient, and none of zeros is made for them."""

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function._schema.name)
            return function(*args, **(kwargs or {}))

    names = []
    v = torch.randn(2, 8).requires_grad_()
    loss = afd_fast.nft_loss(v, torch.randn(2, 8), torch.rand(2), 0.5, noise=torch.randn(2, 8), v_ref=torch.randn(2, 8))
    with Names():
        loss.backward(torch.ones(()))
    assert v.grad.abs().sum() > 0 and names and not [n for n in names if "zero" in n or "fill" in n]

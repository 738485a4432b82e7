"""The loss against the public trainers, against autograd, and against bad input. float64 unless said otherwise."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import afd_fast
from afd_fast.ops import native
from afd_fast.reference import nft as reference
from afd_fast.reference.nft import RECIPES

GOLDEN = Path(__file__).parent / "golden/nft"


def make(shape=(3, 4, 5, 6), dtype=torch.float64, seed=0, zero_advantage=False):
    """v near v_old near v*, as in training; r spread over [0, 1]."""
    g = torch.Generator().manual_seed(seed)
    n = lambda scale=1.0: scale * torch.randn(*shape, dtype=torch.float64, generator=g)
    x0, noise = n(), n()
    v_old = noise - x0 + n(0.3)
    v, v_ref = v_old + n(0.05), v_old + n(0.05)
    r = torch.full((shape[0],), 0.5) if zero_advantage else torch.rand(shape[0], generator=g)
    t = 0.1 + 0.8 * torch.rand(shape[0], dtype=torch.float64, generator=g)
    low = lambda x: x.to(dtype)
    return {"v": low(v).requires_grad_(), "x0": low(x0), "r": r.double(), "t": t, "noise": low(noise),
            "v_old": low(v_old), "v_ref": low(v_ref)}  # fmt: skip


def run(inputs, **kwargs):
    """(loss, gradient) of the public function."""
    loss = afd_fast.nft_loss(**inputs | kwargs)
    return loss.detach(), torch.autograd.grad(loss, inputs["v"])[0]


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300)).item()


@pytest.mark.parametrize("name", ["afd", "astrolabe", "diffusionnft"])
def test_public_trainers(name):
    data = np.load(GOLDEN / f"{name}.npz")
    beta = json.loads(str(data["meta"]))["beta"]
    for case in data["cases"]:
        get = lambda f: torch.from_numpy(data[f"{case}.{f}"]) if f"{case}.{f}" in data else None  # noqa: B023
        v = get("v_theta").requires_grad_()
        loss = afd_fast.nft_loss(
            v, get("x0"), get("r"), get("t"), noise=get("noise"), x_t=get("xt"), v_old=get("v_old"), v_ref=get("v_ref"),
            sigma=get("sigma"), recipe=afd_fast.nft_recipe(name, beta=beta),
        )  # fmt: skip
        (grad,) = torch.autograd.grad(loss, v)
        assert abs(loss.item() - get("loss").item()) <= 1e-9 * abs(get("loss").item()), case
        assert (grad - get("grad")).norm() <= 1e-9 * get("grad").norm(), case


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("options", [{}, {"v_old": None}, {"v_ref": None}, {"masks": True}], ids=str)
def test_closed_form_equals_autograd(name, options):
    inputs = make()
    if options.pop("masks", False):
        inputs |= {"sample_mask": torch.tensor([True, False, True]), "ref_mask": torch.tensor([False, True, True]),
                   "element_mask": torch.rand(3, 1, 5, 6, generator=torch.Generator().manual_seed(1)) > 0.3}  # fmt: skip
    inputs |= options
    loss = reference.nft_loss(**inputs, recipe=name)
    (expected,) = torch.autograd.grad(loss, inputs["v"])
    value, grad = run(inputs, recipe=name)
    assert relative(value, loss.detach()) < 1e-14 and relative(grad, expected) < 1e-12
    assert expected.norm() > 0


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("zero_advantage", [False, True])
@pytest.mark.parametrize("backend", ["as installed", "reference"])
def test_bf16_gradient_within_two_permille(name, zero_advantage, backend, monkeypatch):
    """Rounding the exact gradient once costs 0.17 %; the trainers' own bf16 is 1-10 % off, 54-68 % at zero advantage."""
    if backend == "reference":
        monkeypatch.setattr("afd_fast.ops.native.library", lambda: None)
    inputs = make((4, 16, 9, 20, 13), torch.bfloat16, zero_advantage=zero_advantage)
    x_t = afd_fast.forward_noise(inputs["x0"], inputs["t"], noise=inputs.pop("noise"))
    inputs["x_t"] = x_t
    wide = {k: x.detach().double() if isinstance(x, torch.Tensor) else x for k, x in inputs.items()}
    wide["v"].requires_grad_()
    loss, grad = run(inputs, recipe=name)
    exact_loss, exact = run(wide, recipe=name)
    assert grad.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert relative(grad, exact) <= 2e-3
    assert relative(loss, exact_loss) <= 1e-5


def test_value_is_flat_and_gradient_signed_without_v_old():
    inputs = make() | {"v_old": None, "v_ref": None}
    low, high = run(inputs | {"r": torch.zeros(3)}), run(inputs | {"r": torch.ones(3)})
    torch.testing.assert_close(low[0], high[0])
    torch.testing.assert_close(low[1], -high[1])
    half = {"r": torch.full((3,), 0.5)}
    assert run(inputs | half)[1].abs().max() < 1e-15
    if native.library():  # the kernels leave no rounding noise: exactly nothing
        low = make(dtype=torch.float32) | {"v_old": None, "v_ref": None} | half
        assert run(low)[1].abs().max() == 0


def test_gradcheck():
    for recipe, source in (("afd", "noise"), ("diffusionnft", "noise"), ("astrolabe", "x_t")):
        inputs = make((2, 3, 4))
        noise = inputs.pop("noise")
        inputs[source] = noise if source == "noise" else afd_fast.forward_noise(inputs["x0"], inputs["t"], noise=noise)
        v = inputs.pop("v")
        # the adaptive weights are detached: differentiate with them frozen, as every trainer does
        recipe = afd_fast.nft_recipe(recipe, weighting="none")
        assert torch.autograd.gradcheck(lambda v: afd_fast.nft_loss(v=v, **inputs, recipe=recipe), (v,))  # noqa: B023


def test_stats():
    inputs = make()
    loss, s = afd_fast.nft_loss(**inputs, recipe="diffusionnft", return_stats=True)
    r, k = inputs["r"], 5.0
    policy = (k * (r * s.pos_loss + (1 - r) * s.neg_loss)).mean()
    torch.testing.assert_close(s.policy_loss, policy)
    torch.testing.assert_close(loss.detach(), s.policy_loss + 1e-4 * s.prior_loss)
    torch.testing.assert_close(s.prior_loss, s.prior.mean())
    torch.testing.assert_close(s.signal, ((2 * r - 1) * (s.pos_loss + s.neg_loss) / 2).mean())
    flat = {n: inputs[n].detach().flatten(1) for n in ("v", "v_old", "v_ref")}
    torch.testing.assert_close(s.v_norm, flat["v"].norm(dim=1))
    torch.testing.assert_close(s.v_ref_norm, flat["v_ref"].norm(dim=1))
    torch.testing.assert_close(s.old_deviation, (flat["v"] - flat["v_old"]).square().mean(1))
    flat["x0"] = inputs["x0"].flatten(1)
    torch.testing.assert_close(s.old_deviation_max, (flat["v"] - flat["v_old"]).square().amax(1))
    torch.testing.assert_close(s.old_prior, (flat["v_old"] - flat["v_ref"]).square().mean(1))
    torch.testing.assert_close(s.x0_square, flat["x0"].square().mean(1))
    torch.testing.assert_close(s.x0_square_max, flat["x0"].square().amax(1))
    torch.testing.assert_close(s.r_mean, r.mean())
    assert not any(x.requires_grad for x in s)


@pytest.mark.parametrize("recipe", ["afd", "diffusionnft"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_masked_and_packed_samples_equal_separate_ones(recipe, dtype):
    lengths, width = [7, 0, 300, 1], 19
    inputs = make((sum(lengths), width), dtype)
    r, t = torch.rand(4), torch.rand(4) * 0.8 + 0.1
    cu = torch.tensor([0, *lengths]).cumsum(0)
    packed, grad = run(inputs | {"r": r, "t": t, "cu_seqlens": cu}, recipe=recipe)
    padded = {k: x.detach() for k, x in inputs.items() if k not in ("r", "t")}
    mask = torch.zeros(4, 300, 1, dtype=torch.bool)
    for k, x in padded.items():
        padded[k] = torch.full((4, 300, width), float("nan"), dtype=dtype)  # what is masked may be anything
        for b, n in enumerate(lengths):
            padded[k][b, :n] = x[cu[b] : cu[b + 1]]
            mask[b, :n] = True
    padded["v"].requires_grad_()
    loss, padded_grad = run(padded | {"r": r, "t": t, "element_mask": mask}, recipe=recipe)
    assert relative(packed, loss) < (1e-14 if dtype == torch.float64 else 1e-6)
    back = torch.cat([padded_grad[b, :n] for b, n in enumerate(lengths)])
    assert relative(grad, back) < (1e-13 if dtype == torch.float64 else 1e-3)
    assert (padded_grad[~mask.expand(4, 300, width)] == 0).all()


BAD = [
    ({"r": torch.tensor([0.1, 0.2, 1.5])}, ValueError, r"r must lie in \[0, 1\]"),
    ({"r": torch.tensor([0.1, float("nan"), 0.5])}, ValueError, r"r must lie in \[0, 1\]"),
    ({"r": torch.rand(3, 1)}, ValueError, "lose the credit"),
    ({"r": torch.rand(2)}, ValueError, r"r must be \[B\]"),
    ({"r": torch.ones(3, dtype=torch.long)}, TypeError, "r must be a floating-point tensor"),
    ({"v": torch.ones(3, 4, 5, 6, dtype=torch.long)}, TypeError, "v must be a floating-point tensor"),
    ({"x0": torch.rand(3, 4, 5)}, ValueError, "x0 must have v's shape"),
    ({"noise": torch.rand(3, 4, 5, 1)}, ValueError, "noise must have v's shape"),
    ({"v_old": torch.rand(1, 4, 5, 6)}, ValueError, "v_old must have v's shape"),
    ({"t": torch.tensor([0.5, 1.5, 0.5])}, ValueError, r"t must lie in \[0, 1\]"),
    ({"t": -0.1}, ValueError, r"t must lie in \[0, 1\]"),
    ({"t": torch.rand(2)}, ValueError, "t has 2 values for a batch of 3"),
    ({"t": torch.rand(3, 5)}, ValueError, "frame_dim"),
    ({"t": torch.rand(3, 5), "frame_dim": 1}, ValueError, "t must be"),
    ({"seed": 1}, ValueError, "exactly one of noise"),
    ({"noise": None}, ValueError, "noised state is missing"),
    (
        {"recipe": afd_fast.nft_recipe("astrolabe", space="clean", ref_space="v")},
        ValueError,
        "leave noise=, seed= and x_t= out",
    ),
    ({"noise": None, "seed": 1.5}, TypeError, "seed must be an integer"),
    ({"noise": None, "x_t": torch.rand(3, 4, 5, 6), "t": 0.0}, ValueError, "cannot recover the noise"),
    ({"sample_mask": torch.ones(3, 1)}, ValueError, "sample_mask must be"),
    ({"element_mask": torch.ones(3, 4)}, ValueError, "element_mask"),
    ({"cu_seqlens": torch.tensor([0, 2])}, ValueError, "cu_seqlens must rise"),
    ({"cu_seqlens": torch.tensor([0, 2, 3, 3]), "noise": None, "seed": 1}, ValueError, "no seed="),
    ({"out": torch.empty(3, 4)}, ValueError, "out must be like v"),
    ({"recipe": "dffusionnft"}, ValueError, "did you mean 'diffusionnft'"),
    ({"v": torch.full((3, 4, 5, 6), float("nan")), "check_nan": True}, ValueError, r"v has NaN in samples \[0, 1, 2\]"),
    ({"x0": torch.rand(3, 4, 5, 6, device="meta")}, ValueError, "x0 is on meta"),
]


@pytest.mark.parametrize("change,error,message", BAD, ids=lambda x: str(x)[:40] if isinstance(x, str) else "")
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        afd_fast.nft_loss(**make() | change)


@pytest.mark.parametrize("overrides,message", [
    ({"betta": 1.0}, "did you mean 'beta'"), ({"beta": 0.0}, "beta must be positive"), ({"space": "x"}, 'space must be "v" or "x0" or "clean"'),
    ({"space": "clean", "ref_space": "x0"}, 'takes ref_space="v"'),
    ({"adv_clip": (1, 5)}, "adv_clip must span zero"), ({"ref_coef": -1.0}, "ref_coef"),
    ({"beta": math.nan}, "beta"), ({"beta": math.inf}, "beta"), ({"ref_coef": math.nan}, "ref_coef"),
    ({"weight_floor": math.nan}, "weight_floor"), ({"adv_clip": math.inf}, "adv_clip"), ({"adv_clip": math.nan}, "adv_clip"),
])  # fmt: skip
def test_bad_recipe(overrides, message):
    with pytest.raises(ValueError, match=message):
        afd_fast.nft_recipe("afd", **overrides)


def test_recipe_key_round_trip():
    for recipe in (*RECIPES.values(), afd_fast.nft_recipe("cosmos_rl", adv_clip=(-3.0, 4.0))):
        assert reference.recipe_from_key(recipe.key) == recipe


@pytest.mark.parametrize("recipe", ["afd", "diffusionnft", "astrolabe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_of_inference_mode(recipe, dtype):
    """Rollouts and the frozen networks' velocities are often made under it."""
    inputs = make(dtype=dtype)
    loss, grad = run(inputs, recipe=recipe)
    with torch.inference_mode():
        made = {k: x.clone() for k, x in inputs.items() if k != "v"}
    assert made["x0"].is_inference()
    again, same = run({"v": inputs["v"]} | made, recipe=recipe)
    assert torch.equal(loss, again) and torch.equal(grad, same)
    terms = afd_fast.nft_terms(inputs["v"], recipe=recipe, **made)
    assert torch.autograd.grad(terms.policy, inputs["v"])[0].norm() > 0


def test_numbers_of_other_libraries_are_settings():
    usual = afd_fast.nft_recipe("diffusionnft", beta=0.5, ref_coef=0.25, adv_clip=4.0)
    for number in (np.float32, np.float64, np.float16, torch.tensor):
        assert (
            afd_fast.nft_recipe("diffusionnft", beta=number(0.5), ref_coef=number(0.25), adv_clip=number(4.0)) == usual
        )
    inputs = make()
    noise = inputs.pop("noise")
    for t in (np.float32(0.25), np.float64(0.25), torch.tensor(0.25)):
        assert run(inputs | {"t": t, "noise": noise})[0] == run(inputs | {"t": 0.25, "noise": noise})[0]
    assert run(inputs | {"seed": np.int64(7)})[0] == run(inputs | {"seed": 7})[0]
    advantage = torch.tensor([1.0, -3.0])
    assert torch.equal(afd_fast.reward_to_r(advantage, clip=np.float32(5)), afd_fast.reward_to_r(advantage, clip=5))
    for bad in (torch.ones(2), np.ones(2), "0.5", None):
        with pytest.raises(ValueError, match="beta must be a finite number, got"):
            afd_fast.nft_recipe("diffusionnft", beta=bad)


def test_dtensors_are_named(tmp_path):
    """FSDP2 hands out shards; a sample's sums need all of it."""
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    inputs = make()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for name in ("v", "x0", "v_old"):
            spread = distribute_tensor(inputs[name].detach(), mesh, [Replicate()])
            with pytest.raises(TypeError, match=rf"{name} is a DTensor.*{name}\.to_local\(\)"):
                afd_fast.nft_loss(**inputs | {name: spread})
    finally:
        dist.destroy_process_group()

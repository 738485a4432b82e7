"""`afd_fast.dropin` without the trainers' files: every function against the formula that the trainers share, in float64, with
their shapes, masks and settings. Inside the files themselves: test_trainers.py."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from afd_fast import dropin, forward_noise, nft_loss, reward_to_r

SHAPE, BETA, KL, CLIP = (3, 4, 5, 6), 0.2, 1e-2, 3.0
DIMS = (1, 2, 3)


@pytest.fixture
def d():
    """What a trainer has when its loss block begins."""
    g = torch.Generator().manual_seed(0)
    n = lambda scale=1.0: scale * torch.randn(*SHAPE, dtype=torch.float64, generator=g)
    d = SimpleNamespace(x0=n(), noise=n(), t=torch.tensor([0.75, 0.3, 0.6], dtype=torch.float64).view(3, 1, 1, 1))
    d.old = d.noise - d.x0 + n(0.3)
    d.v, d.ref = (d.old + n(0.05)).requires_grad_(), d.old + n(0.05)
    d.xt = (1 - d.t) * d.x0 + d.t * d.noise
    d.r = reward_to_r(torch.tensor([1.7, -2.9, 0.4], dtype=torch.float64), clip=CLIP)
    d.mask = torch.tensor([True, False, True])
    d.nft = (d.v, d.old, d.ref, d.x0, d.xt, d.t)
    return d


def written_out(d, adaptive=True, keep=None, chosen=None, clip=CLIP):
    """(policy, prior, numbers) with the branches, weights and means as the trainers have them."""
    every = torch.ones(3, dtype=torch.float64)
    keep = every if keep is None else keep.double()
    chosen = keep if chosen is None else keep * chosen
    energies = []
    for branch in (BETA * d.v + (1 - BETA) * d.old, (1 + BETA) * d.old - BETA * d.v):
        error = d.xt - d.t * branch - d.x0
        w = error.detach().abs().mean(DIMS, keepdim=True).clip(min=1e-5) if adaptive else 1.0
        energies.append((error**2 / w).mean(DIMS))
    each = (d.r * energies[0] + (1 - d.r) * energies[1]) / BETA
    kl, old_kl = ((d.v - d.ref) ** 2).mean(DIMS), ((d.old - d.ref) ** 2).mean(DIMS)
    drift, square = (d.v - d.old) ** 2, d.x0**2
    unweighted = (each * keep).sum() / keep.sum().clamp(min=1)
    numbers = dict(x0=square.mean(), x0_max=square.max(), drift=drift.mean(), drift_max=drift.max(), kl_all=kl.mean(),
                   old_kl=(old_kl * keep).sum() / keep.sum().clamp(min=1), unweighted=unweighted,
                   positive=energies[0].mean(), negative=energies[1].mean())  # fmt: skip
    return clip * unweighted, (kl * chosen).sum() / chosen.sum().clamp(min=1), numbers


def same(d, found, policy, prior, terms):
    loss, logged = found
    total = policy + KL * prior
    assert abs(loss - total) <= 1e-9 * abs(total)
    (g,), (e,) = (torch.autograd.grad(x, d.v, allow_unused=True) for x in (loss, total))
    assert (g - e).norm() <= 1e-9 * e.norm()
    numbers = terms | {"total": total, "policy": policy, "kl": prior}
    for name, ours in NAMES.items():
        if name in logged:
            torch.testing.assert_close(logged[name].detach(), numbers[ours].detach(), rtol=1e-9, atol=1e-12)
    assert logged and not any(x.requires_grad for name, x in logged.items() if name != "total_loss")


NAMES = dict(x0_norm="x0", x0_norm_max="x0_max", old_deviate="drift", old_deviate_max="drift_max", policy_loss="total",
             unweighted_policy_loss="unweighted", kl_div_loss="kl", old_kl_div="old_kl", total_loss="total")  # fmt: skip
SETTINGS = dict(beta=BETA, kl_beta=KL, adv_clip_max=CLIP)


def test_diffusionnft(d):
    same(d, dropin.diffusionnft(*d.nft, d.r, **SETTINGS), *written_out(d))


@pytest.mark.parametrize("call", [dropin.diffusionnft, dropin.gardo, dropin.edit_r1])
def test_the_true_policy_loss_is_an_option(d, call):
    masks = () if call is dropin.diffusionnft else (torch.ones(3),)
    policy, prior, _ = written_out(d)
    for true, expected in ((False, policy + KL * prior), (True, policy)):
        _, terms = call(*d.nft, d.r, *masks, **SETTINGS, true_policy_loss=true)
        torch.testing.assert_close(terms["policy_loss"], expected.detach(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("kept", [[1, 0, 1], [0, 0, 0], [1, 1, 1]])
def test_masks_of_edit_r1_and_gardo(d, kept):
    kept = torch.tensor(kept)
    same(d, dropin.edit_r1(*d.nft, d.r, kept.float(), **SETTINGS), *written_out(d, keep=kept))
    _, terms = dropin.edit_r1(*d.nft, d.r, kept.float(), **SETTINGS)
    assert terms["kl_div"] == terms["kl_div_loss"]
    chosen = kept if kept.any() else torch.ones(3)
    policy, prior, numbers = written_out(d, chosen=chosen)
    found = dropin.gardo(*d.nft, d.r, (kept - 0.5)[:, None], **SETTINGS)  # [B, 1]
    same(d, found, policy, prior, numbers)
    torch.testing.assert_close(found[1]["kl_div"], numbers["kl_all"].detach())


def test_one_r_per_sample_in_every_shape(d):
    settings = dict(nft_beta=BETA, kl_beta=KL)
    for r in (d.r, d.r[:, None], d.r.view(3, 1, 1, 1)):
        found = dropin.cosmos_rl(*d.nft, r, **settings, advantage_high=CLIP)
        same(d, found, *written_out(d))
        loss, terms = dropin.flow_factory(*d.nft, r, **settings, adv_clip_range=[-1.0, CLIP])
        policy, prior, numbers = written_out(d)
        same(d, (loss, {"total_loss": terms["loss"]}), policy, prior, numbers)
        torch.testing.assert_close(terms["policy_loss"], policy.detach(), rtol=1e-9, atol=0)
        assert terms["kl_div"].shape == (3,) and found[1]["kl_loss_contrib"] == terms["kl_loss"] / KL
    with pytest.raises(ValueError, match=r"r must have one value per sample.*got \(3, 3\)"):
        dropin.cosmos_rl(*d.nft, d.r.expand(3, 3), **settings, advantage_high=CLIP)
    with pytest.raises(TypeError, match="r must be a floating-point tensor, got float"):
        dropin.fastvideo(*d.nft, 0.5, **settings, adv_clip_max=CLIP)


def test_fastvideo_keeps_the_graph_of_its_loss(d):
    loss, losses = dropin.fastvideo(*d.nft, d.r, nft_beta=BETA, kl_beta=KL, adv_clip_max=CLIP)
    assert losses["total_loss"] is loss and [n for n, x in losses.items() if x.requires_grad] == ["total_loss"]
    policy, prior, numbers = written_out(d)
    torch.testing.assert_close(losses["policy_loss"], policy.detach(), rtol=1e-9, atol=0)
    same(d, (loss, {n: x for n, x in losses.items() if n != "policy_loss"}), policy, prior, numbers)


def test_verl_omni_averages_its_rewards_and_takes_every_t(d):
    for t in (d.t, d.t.expand(SHAPE)):
        found = dropin.verl_omni(
            *d.nft[:-1], t, torch.stack([d.r - 0.01, d.r + 0.01], 1), mix_beta=BETA, ref_kl_coef=KL, adv_clip_max=CLIP,
            adaptive_weight_min=1e-5,
        )  # fmt: skip
        same(d, found, *written_out(d))
        assert found[1]["actor/reward_prob_mean"] == pytest.approx(d.r.mean())


@pytest.mark.parametrize("adaptive", [True, False])
def test_unirl_has_no_prior(d, adaptive):
    loss, terms = dropin.unirl(
        d.v, d.old, d.x0, d.xt, d.t, d.r, 3 * d.r, beta=BETA, adv_clip_max=CLIP, use_adaptive_weight=adaptive
    )
    policy, _, numbers = written_out(d, adaptive=adaptive)
    same(d, (loss, terms | {"policy_loss": loss.detach()}), policy, 0 * policy, numbers)
    assert dropin.floats(terms)["policy_loss"] == pytest.approx(numbers["unweighted"].item(), rel=1e-9)
    assert terms["advantage_std"] == (3 * d.r).std() and terms["t_value"] == 0.75


@pytest.mark.parametrize("std", [None, [0.1, 0.0, 0.2], [0.0, 0.0, 0.0]])
def test_astrolabe_predicts_x0(d, std):
    std = None if std is None else torch.tensor(std)
    loss, terms = dropin.astrolabe(d.v, d.old, d.ref, d.x0, d.r, std, beta=BETA, kl_beta=KL)
    pos, neg = (((1 - k) * d.old + k * d.v - d.x0).square().mean(DIMS) for k in (BETA, -BETA))
    chosen = torch.ones(3) if std is None else (std > 0).float()
    kl = (((d.v - d.ref) ** 2).mean(DIMS) * chosen).sum() / chosen.sum().clamp(min=1)
    same(d, (loss, {"total_loss": terms["total_loss"]}), (d.r * pos + (1 - d.r) * neg).mean(), kl, {})
    assert ("kl_div" in terms) == (std is not None) and terms["kl_loss"] == pytest.approx(kl.item(), abs=1e-15)


ALGORITHM = dict(
    nft_loss_form="mse", nft_target_space="x0", nft_beta=BETA, adv_clip_max=CLIP, nft_weight_mode="adaptive"
)


@pytest.mark.parametrize("change,message", [
    ({"nft_loss_form": "dpo"}, "nft_loss_form='dpo' is not served here"), ({"nft_clip_ratio": 0.1}, "nft_clip_ratio=0.1"),
    ({"nft_weight_mode": "inv_t2"}, "nft_weight_mode='inv_t2'"), ({"nft_target_space": "xnext"}, "nft_target_space='xnext'"),
    ({"nft_weight_scale": [1.0, 2.0]}, "one number is served"), ({"noise_level": 0.7}, "a noise level above 0"),
    ({"loss_mask": torch.ones(3, 2)}, r"loss_mask must have one value per sample or one per frame \(4\), got 2"),
])  # fmt: skip
def test_rlinf_refuses_what_it_does_not_compute(d, change, message):
    args = {"loss_mask": torch.ones(3, 1), "noise_level": 0.0}
    args |= {k: change[k] for k in args if k in change}
    algorithm = ALGORITHM | {k: x for k, x in change.items() if k not in args}
    with pytest.raises(ValueError, match=message):
        dropin.rlinf(d.v, d.old, d.x0, d.xt, d.t, d.r, args["loss_mask"], algorithm, noise_level=args["noise_level"])


def test_rlinf_per_sample_is_the_shared_formula(d):
    policy, _, _ = written_out(d, keep=d.mask)
    loss, _ = dropin.rlinf(d.v, d.old, d.x0, d.xt, d.t, d.r, d.mask, ALGORITHM | {"nft_gather_type": "chunk_level"})
    torch.testing.assert_close(loss, policy, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", [n for n in dropin.__all__ if n != "floats"])
def test_signatures_are_real(name):
    signature = inspect.signature(getattr(dropin, name))
    assert all(p.annotation is not p.empty and p.kind != p.VAR_KEYWORD for p in signature.parameters.values())
    assert "Args:" in getattr(dropin, name).__doc__


def test_floats_of_nothing():
    assert dropin.floats({}) == {}


def test_noise_from_a_seed_needs_no_noise_tensor(d):
    """The last step of a drop-in: neither noise nor x_t is kept for the loss."""
    x0, v, old = d.x0.bfloat16(), d.v.detach().bfloat16(), d.old.bfloat16()
    x_t = forward_noise(x0, d.t, seed=11)  # goes into the network
    kept = nft_loss(v, x0, d.r, d.t, x_t=x_t, v_old=old, recipe="diffusionnft")
    regenerated = nft_loss(v, x0, d.r, d.t, seed=11, v_old=old, recipe="diffusionnft")
    torch.testing.assert_close(regenerated, kept, rtol=1e-6, atol=0)


COMPILED = {
    "diffusionnft": lambda d: dropin.diffusionnft(*d.nft, d.r, beta=BETA, kl_beta=KL, adv_clip_max=CLIP),
    "edit_r1": lambda d: dropin.edit_r1(*d.nft, d.r, d.mask, beta=BETA, kl_beta=KL, adv_clip_max=CLIP),
    "unirl": lambda d: dropin.unirl(
        d.v, d.old, d.x0, d.xt, d.t, d.r, d.r, beta=BETA, adv_clip_max=CLIP, use_adaptive_weight=False
    ),
    "rlinf": lambda d: dropin.rlinf(
        d.v,
        d.old,
        d.x0,
        d.xt,
        d.t,
        d.r,
        d.mask,
        {"nft_target_space": "x0", "nft_loss_form": "mse"},
        noise_level=torch.zeros(3),
    ),
}


@pytest.mark.parametrize("trainer", COMPILED)
def test_inside_a_compiled_step(d, trainer):
    """Trainers compile their step; the graph may break at the call."""
    call = COMPILED[trainer]
    step = torch.compile(lambda: (lambda loss, terms: (2 * loss, terms))(*call(d)), backend="aot_eager")
    (loss, terms), (expected, numbers) = step(), call(d)
    torch.testing.assert_close(loss, 2 * expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms, numbers, rtol=1e-12, atol=1e-15)
    (grad,), (exact,) = (torch.autograd.grad(x, d.v) for x in (loss, 2 * expected))
    torch.testing.assert_close(grad, exact, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name,change,message", [
    ("diffusionnft", {"old_prediction": None}, "diffusionnft: old_prediction must be a floating-point tensor, got NoneType"),
    ("diffusionnft", {"ref_forward_prediction": None}, "diffusionnft: ref_forward_prediction must be a floating-point tensor"),
    ("gardo", {"forward_prediction": [1.0]}, "gardo: forward_prediction must be a floating-point tensor, got a list"),
    ("gardo", {"kl_beta": None}, "gardo: kl_beta must be a number, got None"),
    ("diffusionnft", {"beta": "0.1"}, "diffusionnft: beta must be a number, got '0.1'"),
    ("verl_omni", {"reward_prob": None}, "verl_omni: reward_prob must be a floating-point tensor, got NoneType"),
    ("verl_omni", {"reward_prob": torch.ones(3, 1).int()}, r"reward_prob must be .* got torch.int32: give reward_prob.float\(\)"),
    ("unirl", {"adv": [1.0, 2.0, 3.0]}, "unirl: adv must be a floating-point tensor, got a list: give torch.tensor"),
    ("unirl", {"adv": torch.tensor([1, 2, 3])}, r"unirl: adv must be .* got torch.int64: give adv.float\(\)"),
    ("unirl", {"new_pred": torch.ones(3, 2, 4).int()}, "unirl: new_pred must be a floating-point tensor, got torch.int32"),
    ("flow_factory", {"ref_v_pred": torch.ones(3, 2, 4).int()}, "flow_factory: ref_v_pred must be a floating-point tensor"),
    ("edit_r1", {"valid_mask": np.ones(3)}, r"edit_r1: valid_mask must be a tensor, got a NumPy array: give torch.from_numpy"),
    ("astrolabe", {"ref_pred_x0": None}, "astrolabe: ref_pred_x0 must be a floating-point tensor"),
    ("flow_factory", {"adv_clip_range": 5.0}, r"flow_factory: adv_clip_range must be \(low, high\), got 5.0"),
    ("flow_factory", {"adv_clip_range": (5.0,)}, "adv_clip_range must be"),
    ("rlinf", {"algorithm": None}, "rlinf: algorithm must be a mapping .* got a NoneType"),
    ("rlinf", {"noise_level": None}, "noise_level a tensor or a number, got a NoneType"),
    ("rlinf", {"advantages": [0.5, 0.5, 0.5]}, "rlinf: advantages must be a floating-point tensor, got a list"),
])  # fmt: skip
def test_wrong_arguments_have_the_trainers_names(d, name, change, message):
    """A prediction of the old or the reference policy that is None would leave out its part of the loss in silence."""
    call = getattr(dropin, name)
    known = {
        "x0": d.x0, "xt": d.xt, "x_t": d.xt, "r": d.r, "adv": d.r, "advantages": d.r, "reward_prob": d.r, "reward_std": d.r,
        "loss_mask": d.mask, "valid_mask": d.mask, "algorithm": {}, "adv_clip_range": (-CLIP, CLIP), "use_adaptive_weight": True,
    }  # fmt: skip
    required = [p for p in inspect.signature(call).parameters.values() if p.default is p.empty]
    given = {p.name: known.get(p.name, 0.1 if p.annotation is float else d.x0) for p in required}
    with pytest.raises((TypeError, ValueError), match=message):
        call(**given | change)

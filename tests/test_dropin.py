"""Nine public trainers: the lines each one replaces (its arithmetic, in float64) and the one call that replaces them.

Latents have the trainer's own shape. Line numbers and commits: docs/nft.md. `rows` are what the trainer has at that
point of its loop: predictions, x0, noise, timesteps in 0..1000, advantages.
"""

from types import SimpleNamespace

import pytest
import torch

from afd_fast import forward_noise, nft_loss, nft_recipe, reward_to_r

SD3, TOKENS, WAN_BCF, WAN_BFC = (2, 16, 64, 64), (2, 1024, 64), (1, 16, 21, 60, 104), (1, 21, 16, 60, 104)


def rows(shape, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    n = lambda scale=1.0: (scale * torch.randn(*shape, dtype=torch.float64, generator=g)).to(dtype)
    d = SimpleNamespace(x0=n(), noise=n())
    d.old = (d.noise - d.x0 + n(0.3)).to(dtype)
    d.v, d.ref = (d.old + n(0.05)).to(dtype).requires_grad_(), (d.old + n(0.05)).to(dtype)
    d.timesteps = torch.tensor([750.0, 300.0], dtype=torch.float64)[: shape[0]]
    d.adv = torch.tensor([1.7, -3.9], dtype=torch.float64)[: shape[0]]
    d.mask = torch.tensor([True, False])[: shape[0]]
    d.t = (d.timesteps / 1000).to(torch.promote_types(dtype, torch.float32))
    d.per = lambda x: x.view(-1, *[1] * (len(shape) - 1))
    d.xt = ((1 - d.per(d.t)) * d.x0 + d.per(d.t) * d.noise).to(dtype)
    d.sigma = 0.97 * d.t  # Astrolabe's scheduler table
    return d


def eager(d, *, r, beta, t=None, weights=True, joint=False, clip=5.0, kl=1e-4, mask=None, ref_mask=None):
    """What eight of the trainers do, with their differences as arguments."""
    dims, t = tuple(range(1, d.v.ndim)), d.per(d.t) if t is None else t
    positive, negative = beta * d.v + (1 - beta) * d.old, (1.0 + beta) * d.old - beta * d.v
    losses = []
    for branch in (positive, negative):
        x0_hat = d.xt - t * branch
        with torch.no_grad():
            w = (x0_hat.double() - d.x0.double()).abs().mean(dims, keepdim=True).clip(min=1e-5) if weights else 1.0
        losses.append(((x0_hat - d.x0) ** 2 / w).mean(dims))
    if joint:
        per = (r * losses[0] + (1.0 - r) * losses[1]) / beta
    else:
        per = r * losses[0] / beta + (1.0 - r) * losses[1] / beta
    per_kl = ((d.v - d.ref) ** 2).mean(dims)
    if mask is None:
        policy = (per * clip).mean()
    else:
        policy = (per * mask * clip).sum() / mask.sum()
        per_kl = per_kl * mask
    if mask is not None or ref_mask is not None:
        chosen = mask if ref_mask is None else (ref_mask if ref_mask.any() else torch.ones_like(ref_mask))
        return policy + kl * (per_kl * chosen).sum() / chosen.sum()
    return policy + kl * per_kl.mean()


def astrolabe_eager(d, beta, kl):
    """scripts/train_nft_wan.py:949-969: the branches are mixed in x0 space."""
    s = d.per(d.sigma)
    x0, x0_old, x0_ref = ((d.xt - s * p).to(p.dtype) for p in (d.v, d.old, d.ref))
    r = (d.adv.clamp(-5, 5) / 5 / 2.0 + 0.5).clamp(0, 1)
    dims = tuple(range(1, d.v.ndim))
    pos = ((beta * x0 + (1 - beta) * x0_old - d.x0) ** 2).mean(dims)
    neg = (((1 + beta) * x0_old - beta * x0 - d.x0) ** 2).mean(dims)
    return (r * pos + (1 - r) * neg).mean() + kl * ((x0 - x0_ref) ** 2).mean()


def r_of(d, clip=5.0):
    low, high = (-clip, clip) if isinstance(clip, float) else clip
    return ((d.adv.clamp(low, high) / high) / 2.0 + 0.5).clamp(0, 1)


TRAINERS = {  # name: (shape, the trainer's lines, the call)
    "diffusionnft": (SD3, lambda d: eager(d, r=r_of(d), beta=1.0),
        lambda d: nft_loss(d.v, d.x0, reward_to_r(d.adv), d.timesteps / 1000, x_t=d.xt, v_old=d.old, v_ref=d.ref,
                           recipe=nft_recipe("diffusionnft", beta=1.0, ref_coef=1e-4))),
    "astrolabe": (WAN_BFC, lambda d: astrolabe_eager(d, 0.1, 1e-4),
        lambda d: nft_loss(d.v, d.x0, reward_to_r(d.adv), d.timesteps / 1000, sigma=d.sigma, x_t=d.xt, v_old=d.old,
                           v_ref=d.ref, recipe=nft_recipe("astrolabe", beta=0.1, ref_coef=1e-4))),
    "verl_omni": (TOKENS, lambda d: eager(d, r=r_of(d), beta=0.1, t=d.per(d.t).expand(d.v.shape)),
        lambda d: nft_loss(d.v, d.x0, reward_to_r(d.adv), d.per(d.t).expand(d.v.shape), x_t=d.xt, v_old=d.old,
                           v_ref=d.ref, recipe=nft_recipe("verl_omni", beta=0.1, ref_coef=1e-4))),
    "fastvideo": (WAN_BCF, lambda d: eager(d, r=r_of(d), beta=0.1),
        lambda d: nft_loss(d.v, d.x0, reward_to_r(d.adv), d.timesteps / 1000, x_t=d.xt, v_old=d.old, v_ref=d.ref,
                           recipe=nft_recipe("fastvideo", beta=0.1, ref_coef=1e-4))),
    "flow_factory": (SD3, lambda d: eager(d, r=r_of(d), beta=1.0, joint=True, kl=0.0),
        lambda d: nft_loss(d.v, d.x0, reward_to_r(d.adv), d.timesteps / 1000, x_t=d.xt, v_old=d.old,
                           recipe=nft_recipe("flow_factory", beta=1.0))),
    "cosmos_rl": (SD3, lambda d: eager(d, r=r_of(d, (-2.0, 4.0)), beta=1.0, clip=4.0),
        lambda d: nft_loss(d.v, d.x0, reward_to_r(d.adv, clip=(-2.0, 4.0)), d.timesteps / 1000, x_t=d.xt, v_old=d.old,
                           v_ref=d.ref, recipe=nft_recipe("cosmos_rl", adv_clip=(-2.0, 4.0)))),
    "edit_r1": (TOKENS, lambda d: eager(d, r=r_of(d), beta=1.0, mask=d.mask.double()),
        lambda d: nft_loss(d.v, d.x0, reward_to_r(d.adv), d.timesteps / 1000, x_t=d.xt, v_old=d.old, v_ref=d.ref,
                           sample_mask=d.mask, recipe="edit_r1")),
    "gardo": (SD3, lambda d: eager(d, r=r_of(d), beta=1.0, kl=0.04, ref_mask=d.mask),
        lambda d: nft_loss(d.v, d.x0, reward_to_r(d.adv), d.timesteps / 1000, x_t=d.xt, v_old=d.old, v_ref=d.ref,
                           ref_mask=d.mask, recipe=nft_recipe("gardo", ref_coef=0.04))),
    "unirl": (SD3, lambda d: eager(d, r=r_of(d), beta=1.0, t=0.6, kl=1e-4),
        lambda d: nft_loss(d.v, d.x0, reward_to_r(d.adv), 0.6, x_t=d.xt, v_old=d.old, v_ref=d.ref, recipe="unirl")),
}  # fmt: skip


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_call_equals_the_lines_it_replaces(trainer):
    shape, lines, call = TRAINERS[trainer]
    d = rows(shape)
    expected, loss = lines(d), call(d)
    assert abs(loss.item() - expected.item()) <= 1e-9 * abs(expected.item())
    (g,), (e,) = torch.autograd.grad(loss, d.v), torch.autograd.grad(expected, d.v)
    assert (g - e).norm() <= 1e-9 * e.norm()


@pytest.mark.parametrize("trainer", TRAINERS)
def test_in_bfloat16_the_call_is_closer_to_float64_than_the_lines(trainer):
    shape, lines, call = TRAINERS[trainer]
    d = rows(shape, torch.bfloat16)
    wide = SimpleNamespace(**{k: x.detach().double() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x
                              for k, x in vars(d).items()})  # fmt: skip
    wide.v.requires_grad_()
    (exact,) = torch.autograd.grad(lines(wide), wide.v)
    error = lambda f: ((torch.autograd.grad(f(d), d.v)[0].double() - exact).norm() / exact.norm()).item()
    fused, theirs = error(call), error(lines)
    print(f"{trainer}: gradient error {fused:.2e}, the trainer's lines {theirs:.2e}")
    assert fused <= 2e-3 and fused < theirs


def test_noise_from_a_seed_needs_no_noise_tensor():
    """The last step of a drop-in: neither noise nor x_t is kept for the loss."""
    d = rows(SD3, torch.bfloat16)
    x_t = forward_noise(d.x0, d.t, seed=11)  # goes into the network
    kept = nft_loss(d.v, d.x0, reward_to_r(d.adv), d.t, x_t=x_t, v_old=d.old, recipe="diffusionnft")
    regenerated = nft_loss(d.v, d.x0, reward_to_r(d.adv), d.t, seed=11, v_old=d.old, recipe="diffusionnft")
    torch.testing.assert_close(regenerated, kept, rtol=1e-6, atol=0)

"""The NFT + prior loss (AFD Eq. 4-5; DiffusionNFT, arXiv 2509.16117) and its closed-form gradient.

With v+ = (1 - beta) v_old + beta v and v- = (1 + beta) v_old - beta v, errors e+- in velocity space
(v+- - v*) or in x0 space ((x_t - sigma v+-) - x0), per-sample weights W+- = max(mean |e+-|, floor), detached
(or 1), a scale c and a divisor d:

    L = reduce_B c/d [ r mean(e+^2) / W+ + (1 - r) mean(e-^2) / W- ] + ref_coef * reduce_B rho ||v - v_ref||^2

Ten public trainers and the paper are this with other constants (`RECIPES`). With v_old = stop-grad(v), the
paper's reading, the *value* does not depend on r; the gradient is 2 beta (2r - 1)(v - v*) + 2 lambda r (v - v_ref).

Legend: B samples; a sample is every axis but the first; s sums or averages it (`sample_reduction`).
"""

from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import NamedTuple

import torch
from torch import Tensor

from afd_fast.reference.flow import check_t, expand_t, resolve_noise


@dataclass(frozen=True)
class NFTRecipe:
    """Which of the published losses. Fields are the constants of the formula in the module docstring.

    beta: interpolation. ref_coef: weight of the prior. adv_clip: the clip of the advantages, a number or
    (low, high); `scale="adv_clip"` multiplies the loss by its upper end. space: "v" or "x0" errors.
    weighting: "adaptive" (W) or "none" (1). weight_floor: lower bound of W. divide_by_beta: d = beta or 1.
    sample_reduction / batch_reduction: "mean" or "sum". ref_space: the prior's space. ref_weight: rho is
    "r", or "uniform" (1). ref_empty: what an all-False ref_mask means: "all" samples or "zero" prior.
    """

    name: str = "afd"
    beta: float = 0.1
    ref_coef: float = 1e-4
    adv_clip: float | tuple[float, float] = 5.0
    space: str = "v"
    weighting: str = "none"
    weight_floor: float = 1e-5
    divide_by_beta: bool = False
    scale: str = "none"
    sample_reduction: str = "sum"
    batch_reduction: str = "sum"
    ref_space: str = "v"
    ref_weight: str = "r"
    ref_empty: str = "zero"

    def __post_init__(self):
        choices = {
            "space": ("v", "x0"), "weighting": ("adaptive", "none"), "scale": ("adv_clip", "none"),
            "sample_reduction": ("mean", "sum"), "batch_reduction": ("mean", "sum"),
            "ref_space": ("v", "x0"), "ref_weight": ("r", "uniform"), "ref_empty": ("all", "zero"),
        }  # fmt: skip
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be one of {allowed}, got {getattr(self, field)!r}")
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}: at 0 the loss has no gradient")
        if self.ref_coef < 0 or self.weight_floor <= 0:
            raise ValueError(f"ref_coef >= 0 and weight_floor > 0 are needed, got {self.ref_coef}, {self.weight_floor}")
        low, high = self.clip_range
        if not low < 0 < high:
            raise ValueError(f"adv_clip must span zero, got {self.adv_clip}")

    @property
    def clip_range(self) -> tuple[float, float]:
        """(low, high) of the advantages."""
        return (-self.adv_clip, self.adv_clip) if isinstance(self.adv_clip, (int, float)) else tuple(self.adv_clip)

    @property
    def factor(self) -> float:
        """c / d."""
        return (self.clip_range[1] if self.scale == "adv_clip" else 1.0) / (self.beta if self.divide_by_beta else 1.0)


_NFT = NFTRecipe(
    "diffusionnft", beta=1.0, space="x0", weighting="adaptive", divide_by_beta=True, scale="adv_clip",
    sample_reduction="mean", batch_reduction="mean", ref_weight="uniform",
)  # fmt: skip
# Source of every line: research on the public trainers, commits in CHANGELOG.md.
RECIPES = {
    recipe.name: recipe
    for recipe in (
        NFTRecipe("afd"),  # arXiv 2605.26105, Eq. 4-5 and Table 3
        replace(
            _NFT, name="astrolabe", beta=0.1, weighting="none", divide_by_beta=False, scale="none", ref_space="x0"
        ),  # scripts/train_nft_wan.py:949-969
        _NFT,  # NVlabs/DiffusionNFT scripts/train_nft_sd3.py:934-970
        replace(_NFT, name="cosmos_rl"),  # nft_trainer.py:589-650
        replace(_NFT, name="fastvideo", beta=0.1),  # train/methods/rl/diffusion_nft.py:720-741
        replace(_NFT, name="verl_omni", beta=0.5),  # trainer/diffusion/diffusion_algos.py:819-846
        replace(_NFT, name="flow_factory"),  # trainers/nft.py:409-443
        replace(_NFT, name="edit_r1"),  # train_nft_qwen_image_edit.py:1145-1198
        replace(_NFT, name="gardo", ref_coef=0.04, ref_empty="all"),  # train_sd3_nft_gardo.py:1012-1060
        replace(_NFT, name="unirl"),  # algorithms/diffusionnft.py:343-379
    )
}


def nft_recipe(name: str, **overrides) -> NFTRecipe:
    """A named recipe with some fields replaced. Unknown names and fields are errors with the nearest match."""
    if name not in RECIPES:
        near = get_close_matches(name, RECIPES, 1)
        raise ValueError(
            f"unknown recipe {name!r}" + (f", did you mean {near[0]!r}?" if near else "") + f" Known: {', '.join(RECIPES)}"
        )
    known = [f.name for f in fields(NFTRecipe) if f.name != "name"]
    for key in overrides:
        if key not in known:
            near = get_close_matches(key, known, 1)
            raise ValueError(f"NFTRecipe has no field {key!r}" + (f", did you mean {near[0]!r}?" if near else f": {known}"))
    return replace(RECIPES[name], **overrides)


class NFTStats(NamedTuple):
    """Detached numbers of one call; [B] tensors unless said otherwise."""

    policy_loss: Tensor  # scalar, without the prior
    prior_loss: Tensor  # scalar, before ref_coef
    pos_loss: Tensor  # s(e+^2) / W+
    neg_loss: Tensor  # s(e-^2) / W-
    weight_pos: Tensor  # W+
    weight_neg: Tensor  # W-
    prior: Tensor  # s((v - v_ref)^2) in the recipe's ref_space, 0 without v_ref
    old_deviation: Tensor  # mean (v - v_old)^2
    signal: Tensor  # scalar, mean of (2r - 1) (pos + neg) / 2: moves where the loss value is flat in r
    v_norm: Tensor  # ||v||_2
    v_ref_norm: Tensor  # ||v_ref||_2, 0 without v_ref


class _Prepared(NamedTuple):
    """Inputs in the working dtype, broadcast-ready."""

    v: Tensor
    x0: Tensor
    v_old: Tensor
    v_ref: Tensor | None
    target: Tensor  # v* in v space, x_t in x0 space
    sigma: Tensor | None  # velocity -> x0 coefficient, broadcastable; None where neither loss nor prior needs it
    r: Tensor  # [B]
    sample_weight: Tensor  # [B], the batch reduction's weights
    ref_weight: Tensor  # [B], rho times the batch reduction's weights


def _check(v, x0, r, optional, r_name="r"):
    for name, tensor in (("v", v), ("x0", x0), *optional.items()):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {getattr(tensor, 'dtype', type(tensor).__name__)}")
        if tensor.shape != v.shape:
            raise ValueError(f"{name} must have v's shape {tuple(v.shape)}, got {tuple(tensor.shape)}")
        if tensor.device != v.device:
            raise ValueError(f"{name} is on {tensor.device}, v on {v.device}")
    if v.ndim < 1:
        raise ValueError("v must have a batch axis")
    if not isinstance(r, Tensor) or not r.is_floating_point():
        raise TypeError(f"{r_name} must be a floating-point tensor [B], got {getattr(r, 'dtype', type(r).__name__)}")
    if r.ndim != 1 or r.shape[0] != v.shape[0]:
        raise ValueError(
            f"{r_name} must be [B] = ({v.shape[0]},), got {tuple(r.shape)}: a [B, 1] r broadcasts to [B, B] and loses the credit"
        )
    if r.device != v.device:
        raise ValueError(f"{r_name} is on {r.device}, v on {v.device}")
    if r.device.type == "cpu" and r.numel() and not bool(((r >= 0) & (r <= 1)).all()):
        raise ValueError(f"{r_name} must lie in [0, 1] (use reward_to_r), got {r.min():g} .. {r.max():g}")


def _mask(mask: Tensor | None, like: Tensor, name: str) -> Tensor:
    if mask is None:
        return torch.ones_like(like)
    if mask.shape != like.shape:
        raise ValueError(f"{name} must be [B] = {tuple(like.shape)}, got {tuple(mask.shape)}")
    return mask.to(like.dtype)


def prepare(v, x0, r, t, *, noise, seed, x_t, v_old, v_ref, sigma, sample_mask, ref_mask, frame_dim, recipe) -> _Prepared:
    """Validate the public arguments and bring them to the working dtype (float64 stays, else float32)."""
    _check(v, x0, r, {"x_t": x_t, "v_old": v_old, "v_ref": v_ref})
    work = torch.promote_types(v.dtype, torch.float32)
    t = expand_t(t, x0, frame_dim)
    check_t(t)
    t = t.to(work)
    if x_t is None or noise is not None or seed is not None:
        eps = resolve_noise(x0, noise, seed).to(work)
    else:
        eps = None
    clean = x0.to(work)
    if recipe.space == "x0" or recipe.ref_space == "x0":
        sigma = t if sigma is None else expand_t(sigma, x0, frame_dim).to(work)
    if recipe.space == "v":
        if eps is None and t.device.type == "cpu" and bool((t <= 0).any()):
            raise ValueError("a velocity-space recipe cannot recover the noise from x_t at t = 0: give noise= or seed=")
        target = eps - clean if eps is not None else (x_t.to(work) - clean) / t
    elif x_t is not None:
        target = x_t.to(work)
    else:  # rounded as the network saw it
        target = ((1 - t) * clean + t * eps).to(x0.dtype).to(work)
    r = r.to(work)
    valid = _mask(sample_mask, r, "sample_mask")
    per_sample = valid / (valid.sum().clamp(min=1) if recipe.batch_reduction == "mean" else 1)
    chosen = valid * _mask(ref_mask, r, "ref_mask")
    if recipe.ref_empty == "all":
        chosen = torch.where(chosen.sum() > 0, chosen, valid)
    rho = chosen / (chosen.sum().clamp(min=1) if recipe.batch_reduction == "mean" else 1)
    if recipe.ref_weight == "r":
        rho = rho * r
    old = v.detach() if v_old is None else v_old.detach()
    ref = None if v_ref is None else v_ref.detach().to(work)
    return _Prepared(v.to(work), clean, old.to(work), ref, target, sigma, r, per_sample, rho)


def _reduce(x: Tensor, recipe: NFTRecipe) -> Tensor:
    x = x.reshape(x.shape[0], -1)
    return x.mean(1) if recipe.sample_reduction == "mean" else x.sum(1)


def _branches(p: _Prepared, recipe: NFTRecipe) -> tuple[Tensor, Tensor]:
    """(e+, e-)."""
    beta = recipe.beta
    positive = beta * p.v + (1 - beta) * p.v_old
    negative = (1.0 + beta) * p.v_old - beta * p.v
    if recipe.space == "v":
        return positive - p.target, negative - p.target
    return (p.target - p.sigma * positive) - p.x0, (p.target - p.sigma * negative) - p.x0


def _weight(e: Tensor, recipe: NFTRecipe) -> Tensor:
    """W [B], detached."""
    if recipe.weighting == "none":
        return e.new_ones(e.shape[0])
    return e.detach().abs().reshape(e.shape[0], -1).mean(1).clamp(min=recipe.weight_floor)


def nft_loss(
    v: Tensor,
    x0: Tensor,
    r: Tensor,
    t: Tensor | float,
    *,
    noise: Tensor | None = None,
    seed: int | None = None,
    x_t: Tensor | None = None,
    v_old: Tensor | None = None,
    v_ref: Tensor | None = None,
    sigma: Tensor | float | None = None,
    sample_mask: Tensor | None = None,
    ref_mask: Tensor | None = None,
    frame_dim: int | None = None,
    recipe: str | NFTRecipe = "afd",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, NFTStats]:
    """The NFT + prior loss of a flow-matching student on its own rollouts (AFD Eq. 4-5). Only v gets a gradient.

    Args:
        v: [B, ...] the student's velocity at x_t.
        x0: [B, ...] the rollouts.
        r: [B] optimality in [0, 1] (`reward_to_r`).
        t: noise level in [0, 1]; a number, [B], or [B, F] with frame_dim.
        noise / seed / x_t: where the noised state came from: eps itself, the seed of `forward_noise`, or x_t.
            x0-space recipes need one of the three, velocity-space recipes noise or seed (or x_t with t > 0).
        v_old: velocity of the data-collecting policy; None is stop-grad(v), the paper's reading.
        v_ref: velocity of the frozen initial student; None leaves the prior out.
        sigma: velocity -> x0 coefficient where it is not t (Astrolabe's scheduler table).
        sample_mask: [B] samples that count; ref_mask: [B] samples in the prior.
        frame_dim: axis of x0 that t's second axis runs over.
        recipe: a name of `RECIPES` or an `NFTRecipe`.
        return_stats: also return `NFTStats`.

    Returns: a scalar in float32 (float64 for float64 v).
    Raises: TypeError, ValueError as `NFTRecipe`, `forward_noise`, and for r outside [0, 1] or not [B].
    """
    if isinstance(recipe, str):
        recipe = nft_recipe(recipe)
    p = prepare(
        v, x0, r, t, noise=noise, seed=seed, x_t=x_t, v_old=v_old, v_ref=v_ref, sigma=sigma,
        sample_mask=sample_mask, ref_mask=ref_mask, frame_dim=frame_dim, recipe=recipe,
    )  # fmt: skip
    e_pos, e_neg = _branches(p, recipe)
    w_pos, w_neg = _weight(e_pos, recipe), _weight(e_neg, recipe)
    pos, neg = _reduce(e_pos.square(), recipe) / w_pos, _reduce(e_neg.square(), recipe) / w_neg
    per_sample = recipe.factor * (p.r * pos + (1.0 - p.r) * neg)
    policy = (p.sample_weight * per_sample).sum()
    prior_each, prior = torch.zeros_like(p.r), torch.zeros_like(policy)
    if p.v_ref is not None:
        gap = p.v - p.v_ref if recipe.ref_space == "v" else p.sigma * (p.v - p.v_ref)
        prior_each = _reduce(gap.square(), recipe)
        prior = (p.ref_weight * prior_each).sum()
    loss = policy + recipe.ref_coef * prior
    if not return_stats:
        return loss
    with torch.no_grad():
        flat = lambda x: x.reshape(x.shape[0], -1)
        stats = NFTStats(
            policy, prior, pos, neg, w_pos, w_neg, prior_each,
            flat(p.v - p.v_old).square().mean(1), ((2 * p.r - 1) * (pos + neg) / 2).mean(),
            flat(p.v).norm(dim=1), torch.zeros_like(p.r) if p.v_ref is None else flat(p.v_ref).norm(dim=1),
        )  # fmt: skip
    return loss, NFTStats(*(x.detach() for x in stats))


def nft_grad(v: Tensor, x0: Tensor, r: Tensor, t: Tensor | float, *, recipe: str | NFTRecipe = "afd", **inputs) -> Tensor:
    """d nft_loss / d v in closed form, in the working dtype; arguments as `nft_loss`."""
    recipe = nft_recipe(recipe) if isinstance(recipe, str) else recipe
    names = ("noise", "seed", "x_t", "v_old", "v_ref", "sigma", "sample_mask", "ref_mask", "frame_dim")
    p = prepare(v.detach(), x0, r, t, recipe=recipe, **{n: inputs.get(n) for n in names})
    per_sample = lambda x: x.view(-1, *[1] * (v.ndim - 1))
    e_pos, e_neg = _branches(p, recipe)
    sign = 1.0 if recipe.space == "v" else -p.sigma
    count = v[0].numel() if recipe.sample_reduction == "mean" else 1
    scale = 2 * recipe.beta * recipe.factor / count * p.sample_weight
    grad = sign * (
        per_sample(scale * p.r / _weight(e_pos, recipe)) * e_pos
        - per_sample(scale * (1 - p.r) / _weight(e_neg, recipe)) * e_neg
    )
    if p.v_ref is not None:
        gap = p.v - p.v_ref if recipe.ref_space == "v" else p.sigma**2 * (p.v - p.v_ref)
        grad = grad + per_sample(2 * recipe.ref_coef / count * p.ref_weight) * gap
    return grad

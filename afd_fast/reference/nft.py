"""The NFT + prior loss (AFD Eq. 4-5; DiffusionNFT, arXiv 2509.16117) and its closed-form gradient.

With v+ = (1 - beta) v_old + beta v and v- = (1 + beta) v_old - beta v, errors e+- in velocity space
(v+- - v*) or in x0 space ((x_t - sigma v+-) - x0), per-sample weights W+- = max(mean |e+-|, floor), detached
(or 1), a scale c and a divisor d:

    L = reduce_B c/d [ r mean(e+^2) / W+ + (1 - r) mean(e-^2) / W- ] + ref_coef * reduce_B rho ||v - v_ref||^2

Public trainers and the paper are this with other constants (`RECIPES`). With v_old = stop-grad(v), the
paper's reading, the *value* does not depend on r; the gradient is 2 beta (2r - 1)(v - v*) + 2 lambda r (v - v_ref).
Legend: B samples; a sample is every axis but the first; s sums or averages it (`sample_reduction`).
"""

import functools
import json
from dataclasses import asdict, dataclass, fields, replace
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
        # the recipe as text, what an operator's schema can carry; made here so that a compiled graph only reads it
        object.__setattr__(self, "key", json.dumps(asdict(self) | {"factor": self.factor}))

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
# Commits of the public trainers: CHANGELOG.md.
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
            f"unknown recipe {name!r}"
            + (f", did you mean {near[0]!r}?" if near else "")
            + f" Known: {', '.join(RECIPES)}"
        )
    if not overrides:
        return RECIPES[name]
    known = [f.name for f in fields(NFTRecipe) if f.name != "name"]
    for key in overrides:
        if key not in known:
            near = get_close_matches(key, known, 1)
            raise ValueError(
                f"NFTRecipe has no field {key!r}" + (f", did you mean {near[0]!r}?" if near else f": {known}")
            )
    return replace(RECIPES[name], **overrides)


@functools.lru_cache(256)
def recipe_from_key(key: str) -> NFTRecipe:
    """Inverse of `NFTRecipe.key`."""
    found = json.loads(key)
    clip = found["adv_clip"]
    del found["factor"]
    return NFTRecipe(**found | {"adv_clip": tuple(clip) if isinstance(clip, list) else clip})


class NFTStats(NamedTuple):
    """Detached numbers of one call; [B] tensors unless said otherwise."""

    policy_loss: Tensor  # scalar, without the prior
    prior_loss: Tensor  # scalar, before ref_coef
    pos_loss: Tensor  # s(e+^2) / W+; with an element mask everything counts the kept elements only
    neg_loss: Tensor  # s(e-^2) / W-
    weight_pos: Tensor  # W+
    weight_neg: Tensor  # W-
    prior: Tensor  # s((v - v_ref)^2) in the recipe's ref_space, 0 without v_ref
    old_deviation: Tensor  # mean (v - v_old)^2
    signal: Tensor  # scalar, mean of (2r - 1) (pos + neg) / 2: moves where the loss value is flat in r
    v_norm: Tensor  # ||v||_2
    v_ref_norm: Tensor  # ||v_ref||_2, 0 without v_ref


class _Prepared(NamedTuple):
    """Inputs in the working dtype, broadcast-ready; elements outside the mask are zero everywhere."""

    v: Tensor
    x0: Tensor
    v_old: Tensor
    v_ref: Tensor | None
    target: Tensor  # v* in v space, x_t in x0 space
    sigma: Tensor | None  # velocity -> x0 coefficient, broadcastable; None where neither loss nor prior needs it
    r: Tensor  # [B]
    sample_weight: Tensor  # [B], the batch reduction's weights
    ref_weight: Tensor  # [B], rho times the batch reduction's weights
    count: Tensor  # [B], elements that count, at least 1
    rows: Tensor | None  # [T] sample of each packed row; None when the first axis is the batch

    def spread(self, x: Tensor) -> Tensor:
        """[B] -> broadcastable against v."""
        return (x if self.rows is None else x[self.rows]).view(-1, *[1] * (self.v.ndim - 1))

    def sum(self, x: Tensor) -> Tensor:
        """Like v -> [B]."""
        x = x.reshape(x.shape[0], x[0].numel() if len(x) else 0).sum(1)
        return x if self.rows is None else torch.zeros_like(self.r).index_add(0, self.rows, x)


def readable(x: Tensor) -> bool:
    """Whether values may be looked at for an error message: on the CPU (no device sync), outside a trace."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and x.numel() > 0


def check_nft(v, x0, r, tensors: dict, masks: dict, cu_seqlens=None, check_nan=False) -> None:
    """Every error of bad `nft_loss` input that needs no arithmetic. tensors: like v; masks: [B]; None is skipped."""
    given = {name: x for name, x in ({"v": v, "x0": x0} | tensors).items() if x is not None}
    for name, x in given.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.shape != v.shape:
            raise ValueError(f"{name} must have v's shape {tuple(v.shape)}, got {tuple(x.shape)}")
        if x.device != v.device:
            raise ValueError(f"{name} is on {x.device}, v on {v.device}")
    if v.ndim < 1:
        raise ValueError("v must have a batch axis")
    if not isinstance(r, Tensor) or not r.is_floating_point():
        raise TypeError(f"r must be a floating-point tensor [B], got {getattr(r, 'dtype', type(r).__name__)}")
    batch = v.shape[0]
    if cu_seqlens is not None:
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError("cu_seqlens must be an int32 or int64 tensor [B + 1]")
        if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
            raise ValueError(f"cu_seqlens must be [B + 1], got {tuple(cu_seqlens.shape)}")
        if cu_seqlens.device != v.device:
            raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, v on {v.device}")
        if readable(cu_seqlens):
            steps = cu_seqlens.diff()
            if int(cu_seqlens[0]) or int(cu_seqlens[-1]) != batch or bool((steps < 0).any()):
                raise ValueError(f"cu_seqlens must rise from 0 to {batch} = the rows of v, got {cu_seqlens.tolist()}")
        batch = len(cu_seqlens) - 1
    if r.ndim != 1 or r.shape[0] != batch:
        raise ValueError(
            f"r must be [B] = ({batch},), got {tuple(r.shape)}: a [B, 1] r broadcasts to [B, B] and loses the credit"
        )
    for name, x in ({"r": r} | masks).items():
        if x is not None and x.shape != r.shape:
            raise ValueError(f"{name} must be [B] = ({batch},), got {tuple(x.shape)}")
        if x is not None and x.device != v.device:
            raise ValueError(f"{name} is on {x.device}, v on {v.device}")
    if readable(r) and not bool(((r >= 0) & (r <= 1)).all()):
        raise ValueError(f"r must lie in [0, 1] (use reward_to_r), got {r.min():g} .. {r.max():g}")
    if check_nan:
        for name, x in (given | {"r": r}).items():
            bad = x.detach().reshape(x.shape[0], -1).isnan().any(1).nonzero().flatten().tolist()
            if bad:
                raise ValueError(f"{name} has NaN in {'rows' if cu_seqlens is not None else 'samples'} {bad}")


def choose_source(noise, seed: int | None, x_t, recipe: NFTRecipe) -> tuple:
    """(noise, seed, x_t) with the one that the recipe's target is built from, the others None."""
    if noise is not None and seed is not None:
        raise ValueError("give exactly one of noise= (a tensor) and seed= (an integer)")
    if noise is None and seed is None and x_t is None:
        raise ValueError("the noised state is missing: give noise=, seed= or x_t=")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"seed must be an integer, got {type(seed).__name__}")
    if x_t is not None and (recipe.space == "x0" or (noise is None and seed is None)):
        return None, None, x_t
    return noise, seed, None


def check_target(t: Tensor, x_t: Tensor | None, recipe: NFTRecipe) -> None:
    """ValueError where x_t / t is asked for at t = 0."""
    if recipe.space == "v" and x_t is not None and readable(t) and bool((t <= 0).any()):
        raise ValueError("a velocity-space recipe cannot recover the noise from x_t at t = 0: give noise= or seed=")


def prepare(
    v, x0, r, t, *, noise=None, seed=None, x_t=None, v_old=None, v_ref=None, sigma=None, sample_mask=None,
    ref_mask=None, frame_dim=None, recipe, element_mask=None, cu_seqlens=None, check_nan=False,
) -> _Prepared:  # fmt: skip
    """Validate the public arguments and bring them to the working dtype (float64 stays, else float32)."""
    check_nft(
        v, x0, r, {"noise": noise, "x_t": x_t, "v_old": v_old, "v_ref": v_ref},
        {"sample_mask": sample_mask, "ref_mask": ref_mask}, cu_seqlens, check_nan,
    )  # fmt: skip
    noise, seed, x_t = choose_source(noise, seed, x_t, recipe)
    work = torch.promote_types(v.dtype, torch.float32)
    rows, shape = None, x0.shape
    if cu_seqlens is not None:
        t, sigma, rows = packed_rows(t, sigma, x0, cu_seqlens, seed, frame_dim)
    t = expand_t(t, x0, frame_dim)
    check_t(t)
    t = t.to(work)
    check_target(t, x_t, recipe)
    if recipe.space == "x0" or recipe.ref_space == "x0":
        sigma = t if sigma is None else expand_t(sigma, x0, frame_dim).to(work)
    else:
        sigma = None
    clean = x0.to(work)
    eps = None if x_t is not None else resolve_noise(x0, noise, seed).to(work)
    if recipe.space == "v":
        target = eps - clean if x_t is None else (x_t.to(work) - clean) / t
    elif x_t is not None:
        target = x_t.to(work)
    else:  # rounded as the network saw it
        target = ((1 - t) * clean + t * eps).to(x0.dtype).to(work)
    old = (v if v_old is None else v_old).detach().to(work)
    ref = None if v_ref is None else v_ref.detach().to(work)
    r = r.to(work)
    wide = v.to(work)
    count = torch.full_like(r, x0[0].numel() if len(x0) else 0)
    if rows is not None:
        count = cu_seqlens.diff().to(work) * count[:1]
    if element_mask is not None:
        keep = expand_mask(element_mask, x0)
        wide, clean, old, target = (torch.where(keep, x, 0) for x in (wide, clean, old, target))
        ref = None if ref is None else torch.where(keep, ref, 0)
        count = keep.expand(shape).reshape(shape[0], -1).sum(1).to(work)
        count = count if rows is None else torch.zeros_like(r).index_add(0, rows, count)
    valid = torch.ones_like(r) if sample_mask is None else sample_mask.to(work)
    chosen = valid if ref_mask is None else valid * ref_mask.to(work)
    if recipe.ref_empty == "all":
        chosen = torch.where(chosen.sum() > 0, chosen, valid)
    mean = recipe.batch_reduction == "mean"
    rho = chosen / (chosen.sum().clamp(min=1) if mean else 1)
    weight = valid / (valid.sum().clamp(min=1) if mean else 1)
    rho = rho * r if recipe.ref_weight == "r" else rho
    return _Prepared(wide, clean, old, ref, target, sigma, r, weight, rho, count.clamp(min=1), rows)


def expand_mask(mask: Tensor, like: Tensor) -> Tensor:
    """element_mask as a boolean view of like's shape."""
    if mask.device != like.device:
        raise ValueError(f"element_mask is on {mask.device}, v on {like.device}")
    if mask.ndim != like.ndim or any(a not in (1, b) for a, b in zip(mask.shape, like.shape)):
        raise ValueError(
            f"element_mask {tuple(mask.shape)} must have as many axes as v {tuple(like.shape)} and broadcast"
        )
    return (mask != 0).expand(like.shape)


def packed_rows(t, sigma, x0: Tensor, cu_seqlens: Tensor, seed, frame_dim):
    """t and sigma per row of packed samples, and the sample [T] of each row."""
    if seed is not None or frame_dim is not None:
        raise ValueError(
            "packed samples (cu_seqlens=) take noise= or x_t=, and one t per sample: no seed=, no frame_dim="
        )
    batch = len(cu_seqlens) - 1
    rows = torch.repeat_interleave(torch.arange(batch, device=x0.device), cu_seqlens.diff(), output_size=x0.shape[0])
    spread = []
    for name, x in (("t", t), ("sigma", sigma)):
        if isinstance(x, Tensor) and x.ndim:
            if x.shape != (batch,):
                raise ValueError(f"{name} must be a number or [B] = ({batch},) with cu_seqlens=, got {tuple(x.shape)}")
            x = x[rows]
        spread.append(x)
    return (*spread, rows)


def _branches(p: _Prepared, recipe: NFTRecipe) -> tuple[Tensor, Tensor]:
    """(e+, e-)."""
    beta = recipe.beta
    positive = beta * p.v + (1 - beta) * p.v_old
    negative = (1.0 + beta) * p.v_old - beta * p.v
    if recipe.space == "v":
        return positive - p.target, negative - p.target
    return (p.target - p.sigma * positive) - p.x0, (p.target - p.sigma * negative) - p.x0


def _weight(e: Tensor, p: _Prepared, recipe: NFTRecipe) -> Tensor:
    """W [B], detached."""
    if recipe.weighting == "none":
        return torch.ones_like(p.r)
    return (p.sum(e.detach().abs()) / p.count).clamp(min=recipe.weight_floor)


def nft_loss(
    v: Tensor,
    x0: Tensor,
    r: Tensor,
    t: Tensor | float,
    *,
    recipe: str | NFTRecipe = "afd",
    return_stats: bool = False,
    **inputs,
) -> Tensor | tuple[Tensor, NFTStats]:
    """The loss in plain PyTorch, differentiable in v; arguments as the operator `afd_fast.nft_loss`."""
    recipe = nft_recipe(recipe) if isinstance(recipe, str) else recipe
    p = prepare(v, x0, r, t, recipe=recipe, **inputs)
    size = p.count if recipe.sample_reduction == "mean" else 1
    e_pos, e_neg = _branches(p, recipe)
    w_pos, w_neg = _weight(e_pos, p, recipe), _weight(e_neg, p, recipe)
    pos, neg = p.sum(e_pos.square()) / size / w_pos, p.sum(e_neg.square()) / size / w_neg
    per_sample = recipe.factor * (p.r * pos + (1.0 - p.r) * neg)
    policy = (p.sample_weight * per_sample).sum()
    prior_each, prior = torch.zeros_like(p.r), torch.zeros_like(policy)
    if p.v_ref is not None:
        gap = p.v - p.v_ref if recipe.ref_space == "v" else p.sigma * (p.v - p.v_ref)
        prior_each = p.sum(gap.square()) / size
        prior = (p.ref_weight * prior_each).sum()
    loss = policy + recipe.ref_coef * prior
    if not return_stats:
        return loss
    with torch.no_grad():
        signal = (2 * p.r - 1) * (pos + neg) / 2
        stats = NFTStats(
            policy, prior, pos, neg, w_pos, w_neg, prior_each, p.sum((p.v - p.v_old).square()) / p.count,
            signal.mean() if len(signal) else signal.sum(), p.sum(p.v.square()).sqrt(),
            torch.zeros_like(p.r) if p.v_ref is None else p.sum(p.v_ref.square()).sqrt(),
        )  # fmt: skip
    return loss, NFTStats(*(x.detach() for x in stats))


def nft_grad(
    v: Tensor, x0: Tensor, r: Tensor, t: Tensor | float, *, recipe: str | NFTRecipe = "afd", **inputs
) -> Tensor:
    """d nft_loss / d v in closed form, in the working dtype; arguments as `nft_loss`."""
    recipe = nft_recipe(recipe) if isinstance(recipe, str) else recipe
    p = prepare(v.detach(), x0, r, t, recipe=recipe, **inputs)
    size = p.count if recipe.sample_reduction == "mean" else 1
    scale = 2 * recipe.beta * recipe.factor / size * p.sample_weight
    e_pos, e_neg = _branches(p, recipe)
    sign = 1.0 if recipe.space == "v" else -p.sigma
    grad = sign * (
        p.spread(scale * p.r / _weight(e_pos, p, recipe)) * e_pos
        - p.spread(scale * (1 - p.r) / _weight(e_neg, p, recipe)) * e_neg
    )
    if p.v_ref is not None:
        gap = p.v - p.v_ref if recipe.ref_space == "v" else p.sigma**2 * (p.v - p.v_ref)
        grad = grad + p.spread(2 * recipe.ref_coef / size * p.ref_weight) * gap
    return grad

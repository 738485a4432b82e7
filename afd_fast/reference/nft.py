"""The NFT + prior loss (AFD Eq. 4-5; DiffusionNFT, arXiv 2509.16117) and its closed-form gradient.

With v+ = (1 - beta) v_old + beta v and v- = (1 + beta) v_old - beta v, errors e+- in velocity space
(v+- - v*) or in x0 space ((x_t - sigma v+-) - x0), weights per sample W+- = max(mean |e+-|, floor), detached
(or 1), a scale c and a divisor d:

    L = reduce_B c/d [ r mean(e+^2) / W+ + (1 - r) mean(e-^2) / W- ] + ref_coef * reduce_B rho ||v - v_ref||^2

Public trainers and the paper are this with other constants (`RECIPES`). With v_old = stop-grad(v), the
paper's reading, the *value* does not depend on r; the gradient is 2 beta (2r - 1)(v - v*) + 2 ref_coef r (v - v_ref).
Legend: B samples; a sample is every axis but the first; s sums or averages it (`sample_reduction`).
"""

from typing import Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from afd_fast.reference.flow import check_level, check_sigma, check_t, expand_t, resolve_noise
from afd_fast.reference.recipes import (
    RECIPES,
    NFTRecipe,
    RecipeFields,
    RecipeName,
    as_recipe,
    nft_recipe,
    recipe_from_key,
)
from afd_fast.reference.transforms import readable, under_vmap, within

__all__ = ["RECIPES", "NFTInputs", "NFTRecipe", "NFTStats", "RecipeFields", "RecipeName", "nft_grad", "nft_loss",
           "nft_recipe", "recipe_from_key"]  # fmt: skip


class NFTInputs(TypedDict, total=False):
    """The optional inputs of `nft_loss`; meanings and shapes at `afd_fast.nft_loss`."""

    noise: Tensor | None
    seed: int | None
    x_t: Tensor | None
    v_old: Tensor | None
    v_ref: Tensor | None
    sigma: Tensor | float | None
    sample_mask: Tensor | None
    ref_mask: Tensor | None
    element_mask: Tensor | None
    cu_seqlens: Tensor | None
    frame_dim: int | None
    check_nan: bool


class NFTStats(NamedTuple):
    """Detached numbers of one call; tensors [B] except where a scalar is named."""

    policy_loss: Tensor  # scalar, without the prior
    prior_loss: Tensor  # scalar, before ref_coef
    pos_loss: Tensor  # s(e+^2) / W+; with an element mask, over the kept elements only
    neg_loss: Tensor  # s(e-^2) / W-
    weight_pos: Tensor  # W+
    weight_neg: Tensor  # W-
    prior: Tensor  # s((v - v_ref)^2) in the recipe's ref_space, 0 without v_ref
    old_deviation: Tensor  # mean (v - v_old)^2
    signal: Tensor  # scalar, mean of (2r - 1) (pos + neg) / 2: moves where the loss value is flat in r
    v_norm: Tensor  # ||v||_2
    v_ref_norm: Tensor  # ||v_ref||_2, 0 without v_ref
    old_deviation_max: Tensor  # max (v - v_old)^2
    old_prior: Tensor  # mean (v_old - v_ref)^2, 0 without v_ref
    x0_square: Tensor  # mean x0^2, which trainers log as x0_norm
    x0_square_max: Tensor  # max x0^2
    r_mean: Tensor  # scalar, mean r


class _Prepared(NamedTuple):
    """Inputs in the working dtype, broadcast-ready; elements outside the mask are zero everywhere."""

    v: Tensor
    x0: Tensor
    v_old: Tensor
    v_ref: Tensor | None
    target: Tensor  # v* in v space, x_t in x0 space
    sigma: Tensor  # velocity -> x0 coefficient, broadcastable; t where neither loss nor prior uses it
    r: Tensor  # [B]
    sample_weight: Tensor  # [B], the batch reduction's weights
    ref_weight: Tensor  # [B], rho times the batch reduction's weights
    elements: Tensor  # [B], elements that count, at least 1
    rows: Tensor | None  # [T] sample of each packed row; None when the first axis is the batch

    def spread(self, x: Tensor) -> Tensor:
        """[B] -> broadcastable against v."""
        return (x if self.rows is None else x[self.rows]).view(-1, *[1] * (self.v.ndim - 1))

    def sum(self, x: Tensor) -> Tensor:
        """Like v -> [B]."""
        x = x.reshape(x.shape[0], x[0].numel() if len(x) else 0).sum(1)
        return x if self.rows is None else torch.zeros_like(self.r).index_add(0, self.rows, x)

    def max(self, x: Tensor) -> Tensor:
        """Like v, nowhere negative -> [B]."""
        x = x.reshape(x.shape[0], -1).amax(1) if x.numel() else x.new_zeros(x.shape[0])
        return x if self.rows is None else torch.zeros_like(self.r).index_reduce(0, self.rows, x, "amax")


def _check_like_v(v: Tensor, given: dict[str, Tensor]) -> None:
    for name, x in given.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.shape != v.shape:
            raise ValueError(f"{name} must have v's shape {tuple(v.shape)}, got {tuple(x.shape)}")
        if x.device != v.device:
            raise ValueError(f"{name} is on {x.device}, v on {v.device}")
    if v.ndim < 1:
        raise ValueError("v must have a batch axis")


def _check_packing(v: Tensor, cu_seqlens: Tensor) -> None:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError("cu_seqlens must be an int32 or int64 tensor [B + 1]")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens must be [B + 1], got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != v.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, v on {v.device}")
    if readable(cu_seqlens):
        check_offsets(v, cu_seqlens)


def check_offsets(v: Tensor, cu_seqlens: Tensor) -> None:
    """ValueError unless cu_seqlens rises from 0 to the rows of v. Reads values."""
    rows = v.shape[0]
    outside = (cu_seqlens < 0) | (cu_seqlens > rows)  # before diff, which could overflow
    if int(cu_seqlens[0]) or int(cu_seqlens[-1]) != rows or bool(outside.any()) or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(f"cu_seqlens must rise from 0 to {rows} = the rows of v, got {cu_seqlens.tolist()}")


def check_nft(v: Tensor, x0: Tensor, r: Tensor, inputs: NFTInputs) -> None:
    """TypeError or ValueError for every bad input of `nft_loss` that is found without arithmetic."""
    like_v = {"noise": inputs.get("noise"), "x_t": inputs.get("x_t"), "v_old": inputs.get("v_old"),
              "v_ref": inputs.get("v_ref")}  # fmt: skip
    given = {"v": v, "x0": x0} | {name: x for name, x in like_v.items() if x is not None}
    _check_like_v(v, given)
    if not isinstance(r, Tensor) or not r.is_floating_point():
        raise TypeError(f"r must be a floating-point tensor [B], got {getattr(r, 'dtype', type(r).__name__)}")
    batch, cu_seqlens = v.shape[0], inputs.get("cu_seqlens")
    if cu_seqlens is not None:
        _check_packing(v, cu_seqlens)
        batch = len(cu_seqlens) - 1
    if r.ndim != 1 or r.shape[0] != batch:
        raise ValueError(
            f"r must be [B] = ({batch},), got {tuple(r.shape)}: a [B, 1] r broadcasts to [B, B] and loses the credit"
        )
    for name, x in (("r", r), ("sample_mask", inputs.get("sample_mask")), ("ref_mask", inputs.get("ref_mask"))):
        if x is not None and (not isinstance(x, Tensor) or x.shape != r.shape):
            raise ValueError(f"{name} must be [B] = ({batch},), got {getattr(x, 'shape', type(x).__name__)}")
        if x is not None and x.device != v.device:
            raise ValueError(f"{name} is on {x.device}, v on {v.device}")
    if readable(r) and not within(r, 0, 1):
        raise ValueError(f"r must lie in [0, 1] (use reward_to_r), got {r.min():g} .. {r.max():g}")
    if inputs.get("check_nan"):
        _check_nan(given | {"r": r}, "samples" if cu_seqlens is None else "rows")


def _check_nan(given: dict[str, Tensor], unit: str) -> None:
    if under_vmap():
        raise ValueError("check_nan=True reads values, which torch.func.vmap hides: check before the vmap")
    for name, x in given.items():
        bad = x.detach().reshape(x.shape[0], -1).isnan().any(1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"{name} has NaN in {unit} {bad}")


class NoisedState(NamedTuple):
    """Where the recipe's target comes from: one of the three, the others None."""

    noise: Tensor | None
    seed: int | None
    x_t: Tensor | None


def choose_source(noise: Tensor | None, seed: int | None, x_t: Tensor | None, recipe: NFTRecipe) -> NoisedState:
    """The one input that the recipe's target is built from."""
    if noise is not None and seed is not None:
        raise ValueError("give exactly one of noise= (a tensor) and seed= (an integer)")
    if noise is None and seed is None and x_t is None:
        raise ValueError("the noised state is missing: give noise=, seed= or x_t=")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"seed must be an integer, got {type(seed).__name__}")
    if x_t is not None and (recipe.space == "x0" or (noise is None and seed is None)):
        return NoisedState(None, None, x_t)
    return NoisedState(noise, seed, None)


def check_target(t: Tensor, x_t: Tensor | None, recipe: NFTRecipe) -> None:
    """ValueError where the target needs x_t / t at t = 0."""
    if recipe.space == "v" and x_t is not None and readable(t) and bool((t <= 0).any()):
        raise ValueError("a velocity-space recipe cannot recover the noise from x_t at t = 0: give noise= or seed=")


def _target(x0: Tensor, t: Tensor, source: NoisedState, recipe: NFTRecipe) -> Tensor:
    """v* in v space, x_t in x0 space, in t's dtype."""
    clean, x_t = x0.to(t.dtype), source.x_t
    if x_t is not None:
        return (x_t.to(t.dtype) - clean) / t if recipe.space == "v" else x_t.to(t.dtype)
    eps = resolve_noise(x0, source.noise, source.seed).to(t.dtype)
    if recipe.space == "v":
        return eps - clean
    return ((1 - t) * clean + t * eps).to(x0.dtype).to(t.dtype)  # rounded as the network saw it


class _Weights(NamedTuple):
    sample: Tensor  # [B]
    ref: Tensor  # [B]


def _batch_weights(r: Tensor, inputs: NFTInputs, recipe: NFTRecipe) -> _Weights:
    """The weights of the batch reduction, and rho times them; r in the working dtype."""
    sample_mask, ref_mask = inputs.get("sample_mask"), inputs.get("ref_mask")
    valid = torch.ones_like(r) if sample_mask is None else sample_mask.to(r.dtype)
    chosen = valid if ref_mask is None else valid * ref_mask.to(r.dtype)
    if recipe.ref_empty == "all":
        chosen = torch.where(chosen.sum() > 0, chosen, valid)
    mean = recipe.batch_reduction == "mean"
    rho = chosen / (chosen.sum().clamp(min=1) if mean else 1)
    weight = valid / (valid.sum().clamp(min=1) if mean else 1)
    return _Weights(weight, rho * r if recipe.ref_weight == "r" else rho)


def prepare(v: Tensor, x0: Tensor, r: Tensor, t: Tensor | float, recipe: NFTRecipe, inputs: NFTInputs) -> _Prepared:
    """Validate the public arguments and bring them to the working dtype (float64 stays, else float32)."""
    check_nft(v, x0, r, inputs)
    source = choose_source(inputs.get("noise"), inputs.get("seed"), inputs.get("x_t"), recipe)
    work = torch.promote_types(v.dtype, torch.float32)
    frame_dim, cu_seqlens = inputs.get("frame_dim"), inputs.get("cu_seqlens")
    sigma = inputs.get("sigma") if "x0" in (recipe.space, recipe.ref_space) else None
    rows = None
    if cu_seqlens is not None:
        check_packed(t, sigma, cu_seqlens, source.seed, frame_dim)
        batch = torch.arange(len(cu_seqlens) - 1, device=x0.device)
        rows = torch.repeat_interleave(batch, cu_seqlens.diff(), output_size=x0.shape[0])
        t = t[rows] if isinstance(t, Tensor) and t.ndim else t
        sigma = sigma[rows] if isinstance(sigma, Tensor) and sigma.ndim else sigma
    t = expand_t(t, x0, frame_dim)
    check_t(t)
    t = t.to(work)
    check_target(t, source.x_t, recipe)
    coefficient = t
    if sigma is not None:
        coefficient = expand_t(sigma, x0, frame_dim, "sigma").to(work)
        check_sigma(coefficient)
    target = _target(x0, t, source, recipe)
    v_old, v_ref = inputs.get("v_old"), inputs.get("v_ref")
    wide, clean, old = v.to(work), x0.to(work), (v if v_old is None else v_old).detach().to(work)
    ref = None if v_ref is None else v_ref.detach().to(work)
    r = r.to(work)
    elements = torch.full_like(r, x0[0].numel() if len(x0) else 0)
    if cu_seqlens is not None:
        elements = cu_seqlens.diff().to(work) * elements[:1]
    if (element_mask := inputs.get("element_mask")) is not None:
        keep = expand_mask(element_mask, x0)
        wide, clean, old, target = (torch.where(keep, x, 0) for x in (wide, clean, old, target))
        ref = None if ref is None else torch.where(keep, ref, 0)
        elements = keep.reshape(len(x0), -1).sum(1).to(work)
        elements = elements if rows is None else torch.zeros_like(r).index_add(0, rows, elements)
    weights = _batch_weights(r, inputs, recipe)
    return _Prepared(wide, clean, old, ref, target, coefficient, r, *weights, elements.clamp(min=1), rows)


def expand_mask(mask: Tensor, like: Tensor) -> Tensor:
    """element_mask as a boolean view of like's shape."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"element_mask must be a tensor, got {type(mask).__name__}")
    if mask.device != like.device:
        raise ValueError(f"element_mask is on {mask.device}, v on {like.device}")
    if mask.ndim != like.ndim or any(a not in (1, b) for a, b in zip(mask.shape, like.shape)):
        raise ValueError(
            f"element_mask {tuple(mask.shape)} must have as many axes as v {tuple(like.shape)} and broadcast"
        )
    return (mask != 0).expand(like.shape)


def check_packed(
    t: Tensor | float, sigma: Tensor | float | None, cu_seqlens: Tensor, seed: int | None, frame_dim: int | None
) -> None:
    """ValueError for what packed samples do not take."""
    if seed is not None or frame_dim is not None:
        raise ValueError(
            "packed samples (cu_seqlens=) take noise= or x_t=, and one t per sample: no seed=, no frame_dim="
        )
    batch = len(cu_seqlens) - 1
    for name, x in (("t", t), ("sigma", sigma)):
        check_level(name, x)
        if isinstance(x, Tensor) and x.ndim and x.shape != (batch,):
            raise ValueError(f"{name} must be a number or [B] = ({batch},) with cu_seqlens=, got {tuple(x.shape)}")


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
    return (p.sum(e.detach().abs()) / p.elements).clamp(min=recipe.weight_floor)


@overload
def nft_loss(
    v: Tensor, x0: Tensor, r: Tensor, t: Tensor | float, *, recipe: RecipeName | NFTRecipe = ...,
    return_stats: Literal[False] = ..., **inputs: Unpack[NFTInputs],
) -> Tensor: ...  # fmt: skip
@overload
def nft_loss(
    v: Tensor, x0: Tensor, r: Tensor, t: Tensor | float, *, recipe: RecipeName | NFTRecipe = ...,
    return_stats: Literal[True], **inputs: Unpack[NFTInputs],
) -> tuple[Tensor, NFTStats]: ...  # fmt: skip
@overload
def nft_loss(
    v: Tensor, x0: Tensor, r: Tensor, t: Tensor | float, *, recipe: RecipeName | NFTRecipe = ...,
    return_stats: bool, **inputs: Unpack[NFTInputs],
) -> Tensor | tuple[Tensor, NFTStats]: ...  # fmt: skip
def nft_loss(
    v: Tensor,
    x0: Tensor,
    r: Tensor,
    t: Tensor | float,
    *,
    recipe: RecipeName | NFTRecipe = "afd",
    return_stats: bool = False,
    **inputs: Unpack[NFTInputs],
) -> Tensor | tuple[Tensor, NFTStats]:
    """The loss in plain PyTorch, differentiable in v as often as wanted; arguments as `afd_fast.nft_loss`."""
    recipe = as_recipe(recipe)
    p = prepare(v, x0, r, t, recipe, inputs)
    size = p.elements if recipe.sample_reduction == "mean" else 1
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
        signal, drift, nothing = (2 * p.r - 1) * (pos + neg) / 2, (p.v - p.v_old).square(), torch.zeros_like(p.r)
        average = lambda x: x.mean() if len(x) else x.sum()
        stats = NFTStats(
            policy_loss=policy, prior_loss=prior, pos_loss=pos, neg_loss=neg, weight_pos=w_pos, weight_neg=w_neg,
            prior=prior_each, old_deviation=p.sum(drift) / p.elements, signal=average(signal),
            v_norm=p.sum(p.v.square()).sqrt(),
            v_ref_norm=nothing if p.v_ref is None else p.sum(p.v_ref.square()).sqrt(), old_deviation_max=p.max(drift),
            old_prior=nothing if p.v_ref is None else p.sum((p.v_old - p.v_ref).square()) / p.elements,
            x0_square=p.sum(p.x0.square()) / p.elements, x0_square_max=p.max(p.x0.square()), r_mean=average(p.r),
        )  # fmt: skip
    return loss, NFTStats(*(x.detach() for x in stats))


def nft_grad(
    v: Tensor, x0: Tensor, r: Tensor, t: Tensor | float, *, recipe: RecipeName | NFTRecipe = "afd",
    **inputs: Unpack[NFTInputs],
) -> Tensor:  # fmt: skip
    """d nft_loss / d v in closed form, in the working dtype; arguments as `nft_loss`."""
    recipe = as_recipe(recipe)
    p = prepare(v.detach(), x0, r, t, recipe, inputs)
    size = p.elements if recipe.sample_reduction == "mean" else 1
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

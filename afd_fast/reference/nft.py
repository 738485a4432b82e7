"""The NFT + prior loss (AFD Eq. 4-5; DiffusionNFT, arXiv 2509.16117) and its closed-form gradient.

With v+ = (1 - beta) v_old + beta v and v- = (1 + beta) v_old - beta v, errors e+- in velocity space
(v+- - v*) or in x0 space ((x_t - sigma v+-) - x0), weights per sample W+- = max(mean |e+-|, floor), detached
(or 1), a scale c and a divisor d:

    L = reduce_B c/d [ r mean(e+^2) / W+ + (1 - r) mean(e-^2) / W- ] + ref_coef * reduce_B rho ||v - v_ref||^2

Public trainers and the paper are this with other constants (`RECIPES`). With v_old = stop-grad(v), the
paper's reading, the *value* does not depend on r; the gradient is 2 beta (2r - 1)(v - v*) + 2 ref_coef r (v - v_ref).
Legend: B samples; a sample is every axis but the first; s sums or averages it (`sample_reduction`).
"""

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from afd_fast.reference.flow import check_sigma, check_t, expand_t, resolve_noise
from afd_fast.reference.nft_inputs import (
    NFTInputs,
    NoisedState,
    check_nft,
    check_packed,
    check_target,
    choose_source,
    expand_mask,
)
from afd_fast.reference.recipes import (
    RECIPES,
    NFTRecipe,
    RecipeFields,
    RecipeName,
    as_recipe,
    nft_recipe,
    recipe_from_key,
)

__all__ = ["RECIPES", "NFTInputs", "NFTRecipe", "NFTStats", "RecipeFields", "RecipeName", "nft_grad", "nft_loss",
           "nft_recipe", "recipe_from_key"]  # fmt: skip


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
        signal = (2 * p.r - 1) * (pos + neg) / 2
        stats = NFTStats(
            policy, prior, pos, neg, w_pos, w_neg, prior_each, p.sum((p.v - p.v_old).square()) / p.elements,
            signal.mean() if len(signal) else signal.sum(), p.sum(p.v.square()).sqrt(),
            torch.zeros_like(p.r) if p.v_ref is None else p.sum(p.v_ref.square()).sqrt(),
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

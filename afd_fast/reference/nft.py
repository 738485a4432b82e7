"""The NFT + prior loss (AFD Eq. 4-5; DiffusionNFT, arXiv 2509.16117) and its closed-form gradient.

With v+ = (1 - beta) v_old + beta v and v- = (1 + beta) v_old - beta v, errors e+- in velocity space
(v+- - v*) or in x0 space ((x_t - sigma v+-) - x0), weights per sample W+- = max(mean |e+-|, floor), detached
(or 1), a scale c and a divisor d:

    L = reduce_B c/d [ r mean(e+^2) / W+ + (1 - r) mean(e-^2) / W- ] + ref_coef * reduce_B rho ||v - v_ref||^2

Public trainers and the paper are this with other constants (`RECIPES`). With v_old = stop-grad(v), the
paper's reading, the *value* does not depend on r; the gradient is 2 beta (2r - 1)(v - v*) + 2 ref_coef r (v - v_ref).
What else the field uses is a field of the recipe (`NFTRecipe`: form, drift_clip, weight_grad, ...) or an input: an r per
element stands inside s(), masks may be weights, and policy_weight and prior_weight multiply the terms of a sample.
Legend: B samples; a sample is every axis but the first; s sums or averages it (`sample_reduction`).
"""

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn.functional import softplus
from typing_extensions import Unpack

from afd_fast.reference.nft_inputs import NFTInputs, Prepared, one_where_zero, prepare
from afd_fast.reference.recipes import (
    RECIPES,
    NFTRecipe,
    RecipeFields,
    RecipeName,
    as_recipe,
    nft_recipe,
    recipe_from_key,
)

__all__ = ["RECIPES", "NFTInputs", "NFTRecipe", "NFTStats", "NFTTerms", "RecipeFields", "RecipeName", "nft_grad", "nft_loss",
           "nft_recipe", "nft_terms", "recipe_from_key"]  # fmt: skip


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


class NFTTerms(NamedTuple):
    """The two halves of the loss, both differentiable in v: loss = policy + recipe.ref_coef * prior."""

    policy: Tensor  # scalar
    prior: Tensor  # scalar, before ref_coef; 0 without v_ref
    stats: NFTStats | None


def _branches(v: Tensor, p: Prepared, recipe: NFTRecipe) -> tuple[Tensor, Tensor]:
    """(e+, e-)."""
    beta = recipe.beta
    positive = beta * v + (1 - beta) * p.v_old
    negative = (1.0 + beta) * p.v_old - beta * v
    if recipe.space != "x0":
        return positive - p.target, negative - p.target
    return (p.target - p.sigma * positive) - p.x0, (p.target - p.sigma * negative) - p.x0


def _adaptive(e_pos: Tensor, e_neg: Tensor, p: Prepared, recipe: NFTRecipe) -> tuple[Tensor, Tensor]:
    """(W+, W-) [B]."""
    if recipe.weighting == "none":
        return torch.ones_like(p.r), torch.ones_like(p.r)
    w_pos, w_neg = (
        (p.sum((e if recipe.weight_grad else e.detach()).abs()) / p.elements).clamp(min=recipe.weight_floor)
        for e in (e_pos, e_neg)
    )
    return w_pos, w_pos if recipe.shared_weight else w_neg


class _Drift(NamedTuple):
    """v - v_old under the recipe's limit."""

    scale: Tensor  # [B], 1 within the limit
    clipped: Tensor  # [B], bool
    norm: Tensor  # [B], 1 where it is 0


def _drift(p: Prepared, recipe: NFTRecipe) -> _Drift:
    assert recipe.drift_clip is not None
    limit = torch.full_like(p.r, recipe.drift_clip)
    if recipe.drift_limit == "ratio":
        limit = limit * p.plain_sum(p.v_old.square()).sqrt()
    square = p.plain_sum((p.v - p.v_old).square())
    norm = one_where_zero(square).sqrt()
    clipped = (square > 0) & (norm > limit)
    return _Drift(torch.where(clipped, limit / norm, 1), clipped, norm)


class _Policy(NamedTuple):
    """The policy half of the loss, sample by sample."""

    loss: Tensor  # [B]
    e_pos: Tensor  # like v
    e_neg: Tensor
    w_pos: Tensor  # [B]
    w_neg: Tensor
    energies: tuple[Tensor, Tensor]  # [B], s(e+-^2) / W+-; with an r per element s(r e+^2) / W+, s((1 - r) e-^2) / W-
    at_limit: Tensor | None  # [B], samples whose loss is the constant one at the limit of drift_clip_by="max"


def _energies(
    e_pos: Tensor, e_neg: Tensor, w: tuple[Tensor, Tensor], p: Prepared, recipe: NFTRecipe
) -> tuple[Tensor, Tensor]:
    pos, neg = e_pos.square(), e_neg.square()
    if p.r_each is not None:
        pos, neg = p.r_each * pos, (1 - p.r_each) * neg
    size = p.elements if recipe.sample_reduction == "mean" else 1
    return p.sum(pos) / size / w[0], p.sum(neg) / size / w[1]


def _form(energies: tuple[Tensor, Tensor], p: Prepared, recipe: NFTRecipe) -> Tensor:
    pos, neg = energies
    if p.r_each is not None:
        return recipe.factor * (pos + neg)
    if recipe.form == "dpo":
        return recipe.factor * softplus(recipe.dpo_beta * (2 * p.r - 1) * (pos - neg) / 2)
    return recipe.factor * (p.r * pos + (1.0 - p.r) * neg)


def _policy_terms(p: Prepared, recipe: NFTRecipe) -> _Policy:
    mixed, drift = p.v, None
    if recipe.drift_clip is not None:
        drift = _drift(p, recipe)
        limit = torch.where(p.spread(drift.clipped), p.v_old + p.spread(drift.scale) * (p.v - p.v_old), p.v)
        mixed = limit if recipe.drift_clip_by == "project" else p.v
    e_pos, e_neg = _branches(mixed, p, recipe)
    w = _adaptive(e_pos, e_neg, p, recipe)
    energies = _energies(e_pos, e_neg, w, p, recipe)
    loss, at_limit = _form(energies, p, recipe), None
    if drift is not None and recipe.drift_clip_by == "max":
        frozen = (w[0].detach(), w[1].detach())
        most = _form(_energies(*_branches(limit.detach(), p, recipe), frozen, p, recipe), p, recipe)
        at_limit = drift.clipped & (most > loss)
        loss = torch.where(at_limit, most, loss)
    return _Policy(loss, e_pos, e_neg, *w, energies, at_limit)


def nft_terms(
    v: Tensor, x0: Tensor, r: Tensor, t: Tensor | float, *, recipe: RecipeName | NFTRecipe = "afd",
    return_stats: bool = False, **inputs: Unpack[NFTInputs],
) -> NFTTerms:  # fmt: skip
    """The two halves of `nft_loss` in plain PyTorch; arguments as `afd_fast.nft_terms`."""
    recipe = as_recipe(recipe)
    p = prepare(v, x0, r, t, recipe, inputs)
    size = p.elements if recipe.sample_reduction == "mean" else 1
    each = _policy_terms(p, recipe)
    policy = (p.sample_weight * each.loss).sum()
    prior_each, prior = torch.zeros_like(p.r), torch.zeros_like(policy)
    if p.v_ref is not None:
        gap = (p.v - p.v_ref if recipe.ref_space == "v" else p.sigma * (p.v - p.v_ref)).square()
        prior_each = p.sum(gap) / size
        by_r = recipe.ref_weight == "r"
        weighted = p.r * prior_each if by_r else prior_each
        if by_r and p.r_each is not None:
            weighted = p.sum(p.r_each * gap) / size
        prior = (p.ref_weight * weighted).sum()
    if not return_stats:
        return NFTTerms(policy, prior, None)
    with torch.no_grad():
        pos, neg = each.energies
        signal = (2 * p.r - 1) * (pos + neg) / 2
        if p.r_each is not None:  # the mean of (2 r - 1) (e+^2 / W+ + e-^2 / W-) / 2
            pos, neg = p.sum(each.e_pos.square()) / size / each.w_pos, p.sum(each.e_neg.square()) / size / each.w_neg
            signal = each.energies[0] - pos / 2 + neg / 2 - each.energies[1]
        drift, nothing = (p.v - p.v_old).square(), torch.zeros_like(p.r)
        average = lambda x: x.mean() if len(x) else x.sum()
        stats = NFTStats(
            policy_loss=policy, prior_loss=prior, pos_loss=pos, neg_loss=neg, weight_pos=each.w_pos, weight_neg=each.w_neg,
            prior=prior_each, old_deviation=p.sum(drift) / p.elements, signal=average(signal),
            v_norm=p.plain_sum(p.v.square()).sqrt(),
            v_ref_norm=nothing if p.v_ref is None else p.plain_sum(p.v_ref.square()).sqrt(), old_deviation_max=p.max(drift),
            old_prior=nothing if p.v_ref is None else p.sum((p.v_old - p.v_ref).square()) / p.elements,
            x0_square=p.sum(p.x0.square()) / p.elements, x0_square_max=p.max(p.x0.square()), r_mean=average(p.r),
        )  # fmt: skip
    return NFTTerms(policy, prior, NFTStats(*(x.detach() for x in stats)))


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
    policy, prior, stats = nft_terms(v, x0, r, t, recipe=recipe, return_stats=return_stats, **inputs)
    loss = policy + recipe.ref_coef * prior
    return loss if stats is None else (loss, stats)


def nft_grad(
    v: Tensor, x0: Tensor, r: Tensor, t: Tensor | float, *, recipe: RecipeName | NFTRecipe = "afd",
    scales: tuple[float, float] = (1.0, 1.0), **inputs: Unpack[NFTInputs],
) -> Tensor:  # fmt: skip
    """d nft_loss / d v in closed form, in the working dtype, with policy and prior times `scales`; arguments as `nft_loss`."""
    recipe = as_recipe(recipe)
    p = prepare(v.detach(), x0, r, t, recipe, inputs)
    policy = _policy_terms(p, recipe)
    size = p.elements if recipe.sample_reduction == "mean" else 1
    scale = scales[0] * recipe.factor * p.sample_weight
    if policy.at_limit is not None:
        scale = torch.where(policy.at_limit, 0, scale)
    pos, neg = policy.energies
    c_pos, c_neg = p.r, 1 - p.r  # d policy / d E+-, without the factor
    if p.r_each is not None:
        c_pos, c_neg = torch.ones_like(p.r), torch.ones_like(p.r)  # r is inside E+-
    elif recipe.form == "dpo":
        y = recipe.dpo_beta * (2 * p.r - 1) / 2
        c_pos = y * torch.sigmoid(y * (pos - neg))
        c_neg = -c_pos
    grad = torch.zeros_like(p.v)
    r_pos, r_neg = (1, 1) if p.r_each is None else (p.r_each, 1 - p.r_each)
    for sign, c, e, w, each in (
        (1, c_pos, policy.e_pos, policy.w_pos, r_pos),
        (-1, c_neg, policy.e_neg, policy.w_neg, r_neg),
    ):
        grad = grad + sign * p.spread(2 * scale * c / size / w) * each * e
    if recipe.weight_grad:  # d E / d W = -E / W, and d W / d e = sign(e) / elements above the floor
        down_pos, down_neg = c_pos * pos / policy.w_pos, c_neg * neg / policy.w_neg
        if recipe.shared_weight:
            down_pos, down_neg = down_pos + down_neg, torch.zeros_like(down_neg)
        for sign, down, e, w in ((1, down_pos, policy.e_pos, policy.w_pos), (-1, down_neg, policy.e_neg, policy.w_neg)):
            above = torch.where(w > recipe.weight_floor, scale * down / p.elements, 0)
            grad = grad - sign * p.spread(above) * e.sign()
    grad = recipe.beta * (-p.sigma if recipe.space == "x0" else 1.0) * grad
    if p.weights is not None:
        grad = p.weights * grad
    if recipe.drift_clip is not None and recipe.drift_clip_by == "project":
        drift, gap = _drift(p, recipe), p.v - p.v_old
        along = torch.where(drift.clipped, p.plain_sum(grad * gap) / drift.norm.square(), 0)
        grad = p.spread(drift.scale) * (grad - p.spread(along) * gap)
    if p.v_ref is not None:
        gap = p.v - p.v_ref if recipe.ref_space == "v" else p.sigma**2 * (p.v - p.v_ref)
        by_r = p.r_each if p.r_each is not None else p.spread(p.r)
        gap = by_r * gap if recipe.ref_weight == "r" else gap
        gap = gap if p.weights is None else p.weights * gap
        grad = grad + p.spread(scales[1] * 2 * recipe.ref_coef / size * p.ref_weight) * gap
    return grad

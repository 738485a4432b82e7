"""What the trainers log, from the statistics of one sweep.

Legend: B samples.
"""

import functools

import torch
from torch import Tensor
from typing_extensions import Unpack

from afd_fast.ops import NFTStats
from afd_fast.reference.recipes import NFTRecipe, RecipeFields, RecipeName, nft_recipe

Terms = dict[str, Tensor]  # the trainer's name -> a detached scalar, on the device of the loss


@functools.lru_cache(64)
def recipe(name: RecipeName, **settings: Unpack[RecipeFields]) -> NFTRecipe:
    """`nft_recipe`, made once per choice of settings."""
    return nft_recipe(name, **settings)


def per_sample(name: str, x: Tensor, v: Tensor) -> Tensor:
    """[B], [B, 1] or [B, 1, ...] -> [B]. ValueError for several values per sample."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor [B], got {type(x).__name__}")
    if x.ndim < 1 or x.shape[0] != v.shape[0] or x.numel() != v.shape[0]:
        raise ValueError(
            f"{name} must have one value per sample, [B] = ({v.shape[0]},) or [B, 1, ...], got {tuple(x.shape)}"
        )
    return x.detach().reshape(-1)


def measured(loss: Tensor, stats: NFTStats, scale: float, mask: Tensor | None = None) -> Terms:
    """Every number that a trainer logs, under one name each; scale: what multiplies the policy loss.

    mask [B]: samples that the mean of `old_kl` runs over, as the trainer's KL; the others run over all.
    """
    policy, prior = stats.policy_loss, stats.prior_loss
    averages = (stats.x0_square, stats.old_deviation, stats.prior, stats.old_prior, stats.pos_loss, stats.neg_loss)
    x0, drift, prior_all, old_kl, positive, negative = torch.stack(averages).mean(1).unbind()
    x0_max, drift_max = torch.stack([stats.x0_square_max, stats.old_deviation_max]).amax(1).unbind()
    if mask is not None:
        old_kl = (stats.old_prior * mask).sum() / mask.sum().clamp(min=1)
    return {
        "total": loss.detach(), "policy": policy, "unweighted": policy / scale, "kl": prior, "kl_all": prior_all,
        "old_kl": old_kl, "x0": x0, "x0_max": x0_max, "drift": drift, "drift_max": drift_max, "positive": positive,
        "negative": negative, "r": stats.r_mean,
    }  # fmt: skip


def renamed(found: Terms, **names: str) -> Terms:
    """The chosen numbers under the trainer's names: keyword = name of `measured`."""
    return {theirs: found[ours] for theirs, ours in names.items()}


def floats(terms: Terms) -> dict[str, float]:
    """The terms as Python numbers, with one synchronisation of a GPU for all of them."""
    values = torch.stack([x.detach().double() for x in terms.values()]).tolist() if terms else []
    return dict(zip(terms, values))

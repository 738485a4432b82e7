"""What the trainers log, from the statistics of one sweep.

Legend: B samples.
"""

import functools
import inspect
import numbers
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from afd_kernels.layout import Row
from torch import Tensor
from typing_extensions import Unpack

from afd_fast.ops.nft_operators import STATISTICS, Sums
from afd_fast.reference.flow import check_float, kind_of
from afd_fast.reference.recipes import NFTRecipe, RecipeFields, RecipeName, nft_recipe

P = ParamSpec("P")
Result = TypeVar("Result")
PRIOR, OLD_PRIOR = int(Row.PRIOR), int(Row.OLD_PRIOR)  # torch.compile takes no IntEnum as an index
# masks, and levels and deviations that are only compared or converted
ANY_DTYPE = {"t_expanded", "sigma_broadcast", "t_exp", "t_bc", "valid_mask", "loss_mask", "reward_std"}
Terms = dict[str, Tensor]  # the trainer's name -> a detached scalar, on the device of the loss


_kept_recipe = functools.lru_cache(64)(nft_recipe)


def recipe(name: RecipeName, **settings: Unpack[RecipeFields]) -> NFTRecipe:
    """`nft_recipe`, made once per choice of settings."""
    if torch.compiler.is_compiling():  # which warns of caches, and makes it once anyway
        return nft_recipe(name, **settings)
    return _kept_recipe(name, **settings)


def checked(function: Callable[P, Result]) -> Callable[P, Result]:
    """The function, with a TypeError for an argument that is no tensor, of no floating-point dtype or no number, under the
    trainer's name for it."""
    kinds = {name: parameter.annotation for name, parameter in inspect.signature(function).parameters.items()}
    names = tuple(kinds)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Result:
        for name, x in (*zip(names, args), *kwargs.items()):
            kind = kinds.get(name)
            if kind is Tensor and name in ANY_DTYPE and not isinstance(x, Tensor):
                raise TypeError(f"{function.__name__}: {name} must be a tensor, got {kind_of(name, x)}")
            if (kind is Tensor or (kind == Tensor | None and x is not None)) and name not in ANY_DTYPE:
                check_float(name, x, f"{function.__name__}: ")
            if kind is float and not isinstance(x, (float, numbers.Real, Tensor)):
                raise TypeError(f"{function.__name__}: {name} must be a number, got {x!r}")
        return function(*args, **kwargs)

    return call


def per_sample(name: str, x: Tensor, v: Tensor) -> Tensor:
    """[B], [B, 1] or [B, 1, ...] -> [B]. ValueError for several values per sample."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor [B], got {kind_of(name, x)}")
    if x.ndim < 1 or x.shape[0] != v.shape[0] or x.numel() != v.shape[0]:
        raise ValueError(
            f"{name} must have one value per sample, [B] = ({v.shape[0]},) or [B, 1, ...], got {tuple(x.shape)}"
        )
    return x.detach().reshape(-1)


def measured(sums: Sums, scale: float, mask: Tensor | None = None) -> Terms:
    """Every number that a trainer logs, under one name each; scale: what multiplies the policy loss.

    mask [B]: samples that the mean of `old_kl` runs over, as the trainer's KL; the others run over all.
    """
    loss, totals, rows = sums
    policy, prior, _, r = totals.unbind()
    average, most = (dict(zip(STATISTICS, x.unbind())) for x in (rows.mean(1), rows.amax(1)))
    old_kl = average["old_prior"]
    if mask is not None:
        old_kl = (rows[OLD_PRIOR] * mask).sum() / mask.sum().clamp(min=1)
    return {
        "total": loss.detach(), "policy": policy, "unweighted": policy / scale, "kl": prior, "kl_all": average["prior"],
        "kl_each": rows[PRIOR], "old_kl": old_kl, "x0": average["x0_square"], "x0_max": most["x0_square_max"],
        "drift": average["old_deviation"], "drift_max": most["old_deviation_max"], "positive": average["pos_loss"],
        "negative": average["neg_loss"], "r": r,
    }  # fmt: skip


def renamed(found: Terms, **names: str) -> Terms:
    """The chosen numbers under the trainer's names: keyword = name of `measured`."""
    return {theirs: found[ours] for theirs, ours in names.items()}


def floats(terms: Terms) -> dict[str, float]:
    """The terms as Python numbers, with one synchronisation of a GPU for all of them."""
    values = torch.stack([x.detach().double() for x in terms.values()]).tolist() if terms else []
    return dict(zip(terms, values))

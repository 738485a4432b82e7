"""What the trainers log, from the statistics of one sweep.

Legend: B samples.
"""

import functools
import inspect
import numbers
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

import torch
from afd_kernels.layout import Row
from torch import Tensor
from typing_extensions import Unpack

from afd_fast.ops.nft_operators import Sums
from afd_fast.reference.flow import check_float, kind_of
from afd_fast.reference.recipes import NFTRecipe, RecipeFields, RecipeName, nft_recipe

P = ParamSpec("P")
Result = TypeVar("Result")
PRIOR, OLD_PRIOR = int(Row.PRIOR), int(Row.OLD_PRIOR)  # torch.compile takes no IntEnum as an index
AVERAGES = {  # over the samples
    "positive": int(Row.POS_LOSS), "negative": int(Row.NEG_LOSS), "kl_all": PRIOR, "old_kl": OLD_PRIOR, "drift": int(Row.OLD_DEVIATION),
    "x0": int(Row.X0_SQUARE),
}  # fmt: skip
MAXIMA = {"drift_max": int(Row.OLD_DEVIATION_MAX), "x0_max": int(Row.X0_SQUARE_MAX)}
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


def logged(sums: Sums, scale: float, names: Mapping[str, str], mask: Tensor | None = None) -> Terms:
    """The numbers that a trainer logs, from the results of one sweep; names: the trainer's name -> one of ours.

    scale: what multiplies the policy loss. mask [B]: samples that the mean of `old_kl` runs over, as the trainer's KL; the others
    run over all.
    """
    loss, totals, rows = sums
    policy, prior, _, r = totals.unbind()
    ours = {
        "total": loss.detach(), "policy": policy, "unweighted": policy / scale, "kl": prior, "kl_each": rows[PRIOR], "r": r,
    }  # fmt: skip
    wanted = list(names.values())
    for over_samples, rows_of in ((rows.mean, AVERAGES), (rows.amax, MAXIMA)):
        found = {name: row for name, row in rows_of.items() if name in wanted}
        if found:
            values = over_samples(1)
            ours |= {name: values[row] for name, row in found.items()}
    if mask is not None and "old_kl" in wanted:
        ours["old_kl"] = (rows[OLD_PRIOR] * mask).sum() / mask.sum().clamp(min=1)
    return {theirs: ours[name] for theirs, name in names.items()}


def floats(terms: Terms) -> dict[str, float]:
    """The terms as Python numbers, with one synchronisation of a GPU for all of them."""
    values = torch.stack([x.detach().double() for x in terms.values()]).tolist() if terms else []
    return dict(zip(terms, values))

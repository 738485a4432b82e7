"""What `nft_loss` takes besides v, x0, r and t, and every check of it that needs no arithmetic.

Legend: B samples, F frames.
"""

from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from afd_fast.reference.flow import check_level
from afd_fast.reference.recipes import NFTRecipe
from afd_fast.reference.transforms import readable, under_vmap, within


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

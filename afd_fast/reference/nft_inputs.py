"""What `nft_loss` takes besides v, x0, r and t, and its checks, and all of it in the working dtype.

Legend: B samples, F frames.
"""

import numbers
from difflib import get_close_matches
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from afd_fast.errors import field_types, in_words
from afd_fast.reference.flow import check_float, check_level, check_sigma, check_t, expand_t, kind_of, resolve_noise
from afd_fast.reference.recipes import NFTRecipe, RecipeFields
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
    policy_weight: Tensor | None
    prior_weight: Tensor | None
    cu_seqlens: Tensor | None
    frame_dim: int | None
    check_nan: bool


def _check_like_v(v: Tensor, given: dict[str, Tensor]) -> None:
    for name, x in given.items():
        check_float(name, x)
        if hasattr(x, "to_local"):
            raise TypeError(
                f"{name} is a DTensor: the sums of a sample need all of it on one rank. Shard the batch axis and pass "
                f"{name}.to_local()"
            )
        if x.shape != v.shape:
            raise ValueError(f"{name} must have v's shape {tuple(v.shape)}, got {tuple(x.shape)}")
        if x.device != v.device:
            raise ValueError(f"{name} is on {x.device}, v on {v.device}")
    if v.ndim < 1:
        raise ValueError("v must have a batch axis")


def _check_packing(v: Tensor, cu_seqlens: Tensor) -> None:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be an int32 or int64 tensor [B + 1], got {kind_of('cu_seqlens', cu_seqlens)}")
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


_NAMES = frozenset(NFTInputs.__annotations__)


def no_such_input(name: str) -> TypeError:
    """The error for an argument that the loss does not take."""
    near = get_close_matches(name, NFTInputs.__annotations__, 1)
    where = f", did you mean {near[0]}=?" if near else f"; it takes {', '.join(NFTInputs.__annotations__)}"
    if name in RecipeFields.__annotations__:
        kind = in_words(field_types(NFTRecipe)[name])
        where = f': it is a field of the recipe, recipe=afd_fast.nft_recipe("afd", {name}=...), {kind}'
    return TypeError(f"nft_loss takes no {name}={where}")


def check_nft(v: Tensor, x0: Tensor, r: Tensor, inputs: NFTInputs) -> None:
    """TypeError or ValueError for every bad input of `nft_loss` that is found without arithmetic."""
    for name in inputs:  # a set's own comparison is more than torch.compile of PyTorch 2.6 traces
        if name not in _NAMES:
            raise no_such_input(name)
    like_v = {"noise": inputs.get("noise"), "x_t": inputs.get("x_t"), "v_old": inputs.get("v_old"),
              "v_ref": inputs.get("v_ref")}  # fmt: skip
    given = {"v": v, "x0": x0, **{name: x for name, x in like_v.items() if x is not None}}
    _check_like_v(v, given)
    check_float("r", r)
    if r.device != v.device:
        raise ValueError(f"r is on {r.device}, v on {v.device}")
    batch, cu_seqlens = v.shape[0], inputs.get("cu_seqlens")
    if cu_seqlens is not None:
        _check_packing(v, cu_seqlens)
        batch = len(cu_seqlens) - 1
    expand_r(r, v, inputs.get("frame_dim"), cu_seqlens)
    if readable(r, bool(inputs.get("check_nan"))) and not within(r, 0, 1):
        raise ValueError(f"r must lie in [0, 1] (use reward_to_r), got {r.min():g} .. {r.max():g}")
    for name, x in (("sample_mask", inputs.get("sample_mask")), ("ref_mask", inputs.get("ref_mask")),
                    ("policy_weight", inputs.get("policy_weight")), ("prior_weight", inputs.get("prior_weight"))):  # fmt: skip
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor [B], got {kind_of(name, x)}")
        if x is not None and x.shape != (batch,):
            raise ValueError(f"{name} must be [B] = ({batch},), got {tuple(x.shape)}")
        if x is not None and x.device != v.device:
            raise ValueError(f"{name} is on {x.device}, v on {v.device}")
        if x is not None:
            _check_weight(name, x)
    if inputs.get("check_nan"):
        _check_nan({**given, "r": r}, "samples" if cu_seqlens is None else "rows")


def _check_weight(name: str, x: Tensor) -> None:
    """ValueError for weights that are negative or not finite; no check where values cannot be read."""
    if x.is_floating_point() and readable(x) and not within(x, 0, torch.finfo(x.dtype).max):
        raise ValueError(f"{name} must be finite and at least 0, got {x.min():g} .. {x.max():g}")


def expand_r(r: Tensor, v: Tensor, frame_dim: int | None, cu_seqlens: Tensor | None) -> Tensor:
    """r as [B], or with as many axes as v where it differs inside a sample. ValueError for other shapes."""
    batch = v.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    if r.ndim == 1 and r.shape[0] == batch:
        return r
    if r.ndim == v.ndim and all(a in (1, b) for a, b in zip(r.shape, v.shape)):
        per_sample = cu_seqlens is None and r.shape[0] == batch and r[:1].numel() == 1
        return r.reshape(batch) if per_sample else r
    if r.ndim == 2 and frame_dim is not None and tuple(r.shape) == (batch, v.shape[frame_dim % v.ndim]):
        shape = [1] * v.ndim
        shape[0], shape[frame_dim % v.ndim] = r.shape
        return r.view(shape)
    raise ValueError(
        f"r must be [B] = ({batch},), [B, F] with frame_dim=, or have as many axes as v {tuple(v.shape)} and broadcast, got "
        f"{tuple(r.shape)}: a [B, 1] r would broadcast to [B, B] and lose the credit"
    )


def check_recipe(recipe: NFTRecipe, r: Tensor, inputs: NFTInputs) -> None:
    """ValueError for a recipe that these inputs do not fit."""
    if recipe.drift_clip is not None and inputs.get("v_old") is None:
        raise ValueError("drift_clip limits v - v_old, which is 0 without v_old=: give v_old=, or leave out drift_clip")
    if r.ndim > 1 and r[:1].numel() > 1 and recipe.form == "dpo":
        raise ValueError(
            'form="dpo" compares the energies of whole samples: give r [B], or make what shares an r a sample (reshape, or '
            "cu_seqlens=)"
        )


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
    """The one input that the recipe's target is built from; none for predictions of x0."""
    if recipe.space == "clean":
        if noise is not None or seed is not None or x_t is not None:
            raise ValueError('space="clean" compares predictions of x0 with x0: leave noise=, seed= and x_t= out')
        return NoisedState(None, None, None)
    if noise is not None and seed is not None:
        raise ValueError("give exactly one of noise= (a tensor) and seed= (an integer)")
    if noise is None and seed is None and x_t is None:
        raise ValueError("the noised state is missing: give noise=, seed= or x_t=")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, numbers.Integral)):
        raise TypeError(f"seed must be an integer, got {type(seed).__name__}")
    if x_t is not None and (recipe.space == "x0" or (noise is None and seed is None)):
        return NoisedState(None, None, x_t)
    return NoisedState(noise, seed, None)


def check_target(t: Tensor, x_t: Tensor | None, recipe: NFTRecipe) -> None:
    """ValueError where the target needs x_t / t at t = 0."""
    if recipe.space == "v" and x_t is not None and readable(t) and bool((t <= 0).any()):
        raise ValueError("a velocity-space recipe cannot recover the noise from x_t at t = 0: give noise= or seed=")


def as_weights(mask: Tensor) -> Tensor:
    """The mask itself where it is floating point, then it holds weights; else booleans."""
    return mask if mask.is_floating_point() or mask.dtype == torch.bool else mask != 0


def expand_mask(mask: Tensor, like: Tensor) -> Tensor:
    """element_mask as a view of like's shape: weights where it is floating point, else booleans."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"element_mask must be a tensor, got {kind_of('element_mask', mask)}")
    if mask.device != like.device:
        raise ValueError(f"element_mask is on {mask.device}, v on {like.device}")
    if mask.ndim != like.ndim or any(a not in (1, b) for a, b in zip(mask.shape, like.shape)):
        raise ValueError(
            f"element_mask {tuple(mask.shape)} must have as many axes as v {tuple(like.shape)} and broadcast"
        )
    _check_weight("element_mask", mask)
    return as_weights(mask).expand(like.shape)


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


def sums(x: Tensor, rows: Tensor | None, samples: int) -> Tensor:
    """x [B, ...], or packed [T, ...] with the sample of each row, -> [samples]."""
    x = x.reshape(x.shape[0], x[0].numel() if len(x) else 0).sum(1)
    return x if rows is None else x.new_zeros(samples).index_add(0, rows, x)


class Prepared(NamedTuple):
    """Inputs in the working dtype, broadcast-ready; elements that do not count are zero everywhere."""

    v: Tensor
    x0: Tensor
    v_old: Tensor
    v_ref: Tensor | None
    target: Tensor  # v* in v space, x_t in x0 space, x0 in clean space
    sigma: Tensor  # velocity -> x0 coefficient, broadcastable; t where neither loss nor prior uses it
    r: Tensor  # [B]; where r is given per element: the samples' means
    r_each: Tensor | None  # r per element, broadcastable against v; None where it is [B]
    sample_weight: Tensor  # [B], policy_weight times the batch reduction's weights
    ref_weight: Tensor  # [B], rho times prior_weight times the batch reduction's weights
    weights: Tensor | None  # like v, the weight of each element; None where each is 0 or 1
    elements: Tensor  # [B], elements that count, or their weights' sum; 1 where that is 0
    rows: Tensor | None  # [T] sample of each packed row; None when the first axis is the batch

    def spread(self, x: Tensor) -> Tensor:
        """[B] -> broadcastable against v."""
        return (x if self.rows is None else x[self.rows]).view(-1, *[1] * (self.v.ndim - 1))

    def plain_sum(self, x: Tensor) -> Tensor:
        """Like v -> [B]."""
        return sums(x, self.rows, len(self.r))

    def max(self, x: Tensor) -> Tensor:
        """Like v, nowhere negative -> [B]."""
        x = x.reshape(x.shape[0], -1).amax(1) if x.numel() else x.new_zeros(x.shape[0])
        return x if self.rows is None else torch.zeros_like(self.r).scatter_reduce(0, self.rows, x, "amax")

    def sum(self, x: Tensor) -> Tensor:
        """Like v -> [B], weighted."""
        return self.plain_sum(x if self.weights is None else self.weights * x)


def _target(x0: Tensor, t: Tensor, source: NoisedState, recipe: NFTRecipe) -> Tensor:
    """v* in v space, x_t in x0 space, x0 in clean space, in t's dtype."""
    clean, x_t = x0.to(t.dtype), source.x_t
    if recipe.space == "clean":
        return clean
    if x_t is not None:
        return (x_t.to(t.dtype) - clean) / t if recipe.space == "v" else x_t.to(t.dtype)
    eps = resolve_noise(x0, source.noise, source.seed).to(t.dtype)
    if recipe.space == "v":
        return eps - clean
    return ((1 - t) * clean + t * eps).to(x0.dtype).to(t.dtype)  # rounded as the network saw it


def one_where_zero(x: Tensor) -> Tensor:
    """A divisor."""
    return torch.where(x > 0, x, 1)


class _Weights(NamedTuple):
    sample: Tensor  # [B]
    ref: Tensor  # [B]


def _batch_weights(r: Tensor, elements: Tensor, inputs: NFTInputs, recipe: NFTRecipe) -> _Weights:
    """What each sample's loss and prior are multiplied with before they are summed; r in the working dtype."""
    sample_mask, ref_mask = inputs.get("sample_mask"), inputs.get("ref_mask")
    valid = torch.ones_like(r) if sample_mask is None else as_weights(sample_mask).to(r.dtype)
    chosen = valid if ref_mask is None else valid * as_weights(ref_mask).to(r.dtype)
    if recipe.ref_empty == "all":
        chosen = torch.where(chosen.sum() > 0, chosen, valid)
    mean = recipe.batch_reduction == "mean"
    weight = valid / (one_where_zero(valid.sum()) if mean else 1)
    if recipe.ref_reduction == "batch":
        size = elements if recipe.sample_reduction == "mean" else 1
        rho = chosen * size / one_where_zero((chosen * elements).sum())
    else:
        rho = chosen / (one_where_zero(chosen.sum()) if mean else 1)
    if (policy_weight := inputs.get("policy_weight")) is not None:
        weight = weight * policy_weight.to(r.dtype)
    if (prior_weight := inputs.get("prior_weight")) is not None:
        rho = rho * prior_weight.to(r.dtype)
    return _Weights(weight, rho)


def prepare(v: Tensor, x0: Tensor, r: Tensor, t: Tensor | float, recipe: NFTRecipe, inputs: NFTInputs) -> Prepared:
    """Validate the public arguments and bring them to the working dtype (float64 stays, else float32)."""
    check_nft(v, x0, r, inputs)
    check_recipe(recipe, r, inputs)
    source = choose_source(inputs.get("noise"), inputs.get("seed"), inputs.get("x_t"), recipe)
    work = torch.promote_types(v.dtype, torch.float32)
    frame_dim, cu_seqlens = inputs.get("frame_dim"), inputs.get("cu_seqlens")
    sigma = inputs.get("sigma") if "x0" in (recipe.space, recipe.ref_space) else None
    rows = None
    samples = len(x0)
    if cu_seqlens is not None:
        check_packed(t, sigma, cu_seqlens, source.seed, frame_dim)
        samples = len(cu_seqlens) - 1
        batch = torch.arange(samples, device=x0.device)
        rows = torch.repeat_interleave(batch, cu_seqlens.diff(), output_size=x0.shape[0])
        t = t[rows] if isinstance(t, Tensor) and t.ndim else t
        sigma = sigma[rows] if isinstance(sigma, Tensor) and sigma.ndim else sigma
    t = expand_t(t, x0, frame_dim)
    check_t(t, bool(inputs.get("check_nan")))
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
    r = expand_r(r.detach(), v, frame_dim, cu_seqlens).to(work)
    elements = torch.full((samples,), x0[0].numel() if len(x0) else 0, dtype=work, device=x0.device)
    if cu_seqlens is not None:
        elements = cu_seqlens.diff().to(work) * elements[:1]
    weights = None
    if (element_mask := inputs.get("element_mask")) is not None:
        mask = expand_mask(element_mask, x0)
        keep = mask != 0  # what does not count may be NaN
        wide, clean, old, target = (torch.where(keep, x, 0) for x in (wide, clean, old, target))
        ref = None if ref is None else torch.where(keep, ref, 0)
        r = torch.where(keep, r, 0) if r.ndim > 1 else r
        weights = mask.to(work) if mask.is_floating_point() else None
        elements = sums(keep if weights is None else weights, rows, samples).to(work)
    divisor, dense = one_where_zero(elements), r if r.ndim > 1 else None
    if dense is not None:
        each = dense.expand(wide.shape)
        r = sums(each if weights is None else weights * each, rows, samples) / divisor
    batch_weights = _batch_weights(r, elements, inputs, recipe)
    return Prepared(wide, clean, old, ref, target, coefficient, r, dense, *batch_weights, weights, divisor, rows)

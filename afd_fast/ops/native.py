"""The C++ CPU library (kernels/csrc/afd_cpu.cpp), called through ctypes on data_ptr; float32, bfloat16 and float16.

setup.py builds it where CMake and a C++ compiler are found. Without it, and for other dtypes, the operators run the
PyTorch reference; `afd_fast.ops.backends()` tells which.
"""

import ctypes
import functools
import warnings
from pathlib import Path

import afd_kernels
import torch
from afd_kernels.layout import TILE, Row, Slot, Source, Total, contiguous_rows
from torch import Tensor

from afd_fast.ops.inputs import Inputs
from afd_fast.reference.nft_inputs import check_offsets
from afd_fast.reference.recipes import recipe_from_key

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ROWS = len(Row)
NAME = "libafd_cpu.so"


class _Call(ctypes.Structure):
    """AfdCall of kernels/csrc/afd_core.h, field by field."""

    _fields_ = (
        [(n, ctypes.c_void_p) for n in (
            "v", "x0", "y", "v_old", "v_ref", "grad", "mask", "weight", "each", "t", "sigma", "cu", "r", "valid", "chosen",
            "policy_weight", "prior_weight", "rows", "loss", "totals", "sums", "part",
        )]
        + [(n, ctypes.c_int64) for n in (
            "v_stride", "x0_stride", "y_stride", "old_stride", "ref_stride", "grad_stride", "mask_stride",
            "samples", "count", "frames", "inner", "tiles", "seed",
        )]
        + [(n, ctypes.c_int32) for n in (
            "v_type", "x0_type", "y_type", "old_type", "ref_type", "grad_type", "source", "x0_space", "ref_x0",
            "adaptive", "sample_mean", "batch_mean", "ref_by_r", "empty_all", "stats", "threads", "shared", "dpo", "ref_batch",
        )]
        + [(n, ctypes.c_double) for n in ("ref_coef", "factor", "floor", "dpo_beta")]
        + [(n, ctypes.c_float) for n in ("beta", "scale", "prior_scale")]
    )  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library next to the Triton kernels; None where it was not built, or, with a warning, cannot be loaded."""
    path = next((p for p in (Path(place) / NAME for place in afd_kernels.__path__) if p.exists()), None)
    if path is None:
        return None
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        said = f"afd_fast runs PyTorch code on the CPU: its C++ library cannot be loaded ({error})"
        warnings.warn(said, RuntimeWarning, stacklevel=3)
        return None
    if lib.afd_abi() != ctypes.sizeof(_Call):
        raise ImportError(f"{path} was built from other sources: reinstall with `pip install -e .`")
    return lib


def _loaded() -> ctypes.CDLL:
    lib = library()
    assert lib is not None, "`serves` comes first"
    return lib


def serves(*tensors: Tensor | None) -> bool:
    """Whether the library handles these tensors: it is built, all of a type in `TYPES`, on the CPU."""
    given = [x for x in tensors if x is not None]
    fits = all(x.dtype in TYPES and x.device.type == "cpu" for x in given)
    return fits and given[0].numel() > 0 and library() is not None


class _Filled:
    """A _Call and the tensors that its pointers need alive."""

    def __init__(self, call: _Call) -> None:
        self.c = call
        self.alive: list[Tensor] = []

    def point(self, field: str, x: Tensor | None, dtype: torch.dtype) -> None:
        if x is not None:
            x = (x if x.dtype == dtype else x.to(dtype)).contiguous()
            self.alive.append(x)
            setattr(self.c, field, x.data_ptr())

    def rows(self, field: str, stem: str, x: Tensor | None, contiguous: bool = False) -> None:
        if x is not None:
            if not x.is_contiguous():
                x = x.contiguous() if contiguous else contiguous_rows(x)
            self.alive.append(x)
            setattr(self.c, field, x.data_ptr())
            setattr(self.c, stem + "_stride", x.stride(0))
            setattr(self.c, stem + "_type", TYPES[x.dtype])


def forward_noise(x0: Tensor, t: Tensor, noise: Tensor | None, seed: int | None, inner: int) -> Tensor:
    """x_t like x0; t [B, F], element n of a sample belongs to frame (n // inner) % F."""
    _check_sizes(x0.shape, noise)
    _check_levels(x0.shape[0], inner, t)
    out = torch.empty(x0.shape, dtype=x0.dtype)
    f = _Filled(_Call())
    f.rows("x0", "x0", x0)
    f.rows("y", "y", noise)
    f.rows("grad", "grad", out)
    f.point("t", t, torch.float32)
    f.c.samples, f.c.count, f.c.frames, f.c.inner = x0.shape[0], x0[0].numel(), t.shape[1], inner
    f.c.seed, f.c.source = seed or 0, Source.SEED if noise is None else Source.NOISE
    f.c.threads = torch.get_num_threads()
    _loaded().afd_forward_noise(ctypes.byref(f.c))
    return out


def _check_sizes(shape: torch.Size, *tensors: Tensor | None) -> None:
    for x in tensors:
        if x is not None and x.shape != shape:
            raise ValueError(
                f"expected tensors of shape {tuple(shape)}, got {[tuple(x.shape) for x in tensors if x is not None]}"
            )


def _check_levels(samples: int, inner: int, t: Tensor, sigma: Tensor | None = None) -> None:
    if t.ndim != 2 or t.shape[0] != samples or not t.shape[1] or inner < 1:
        raise ValueError(f"expected t [{samples}, frames] and inner >= 1, got {tuple(t.shape)} and {inner}")
    _check_sizes(t.shape, sigma)


def _check(i: Inputs, grad: Tensor | None) -> None:
    """ValueError for what would read or write outside a tensor. `nft_loss` refuses it too, but values only where it can
    read them: a traced call comes here unchecked, and so does a direct call of the operator."""
    samples = i.v.shape[0]
    if i.cu_seqlens is not None:
        check_offsets(i.v, i.cu_seqlens)
        samples = len(i.cu_seqlens) - 1
    _check_sizes(i.v.shape, i.x0, i.noise, i.x_t, i.v_old, i.v_ref, i.element_mask, i.each, grad)
    _check_sizes(torch.Size([samples]), i.r, i.sample_mask, i.ref_mask, i.policy_weight, i.prior_weight)
    _check_levels(samples, i.inner, i.t, i.sigma)
    missing = i.noise is None and i.x_t is None and (i.seed is None or i.cu_seqlens is not None)
    if missing and i.source is not Source.CLEAN:
        raise ValueError("expected noise or x_t, or a seed for samples that are not packed")


@functools.lru_cache(256)
def _constants(key: str) -> _Call:
    """What a recipe says of a call; scale 1."""
    c, recipe = _Call(), recipe_from_key(key)
    c.x0_space, c.ref_x0, c.adaptive = recipe.space == "x0", recipe.ref_space == "x0", recipe.weighting == "adaptive"
    c.sample_mean, c.batch_mean = recipe.sample_reduction == "mean", recipe.batch_reduction == "mean"
    c.ref_by_r, c.empty_all = recipe.ref_weight == "r", recipe.ref_empty == "all"
    c.ref_coef, c.factor, c.floor, c.beta = recipe.ref_coef, recipe.factor, recipe.weight_floor, recipe.beta
    c.shared, c.dpo, c.dpo_beta = recipe.shared_weight, recipe.form == "dpo", recipe.dpo_beta
    c.ref_batch = recipe.ref_reduction == "batch"
    c.scale, c.prior_scale = 1.0, 1.0
    return c


def _fill(i: Inputs, grad: Tensor | None) -> _Filled:
    """The call of one operator; scale 1."""
    _check(i, grad)
    f, source, packed = _Filled(_Call.from_buffer_copy(_constants(i.recipe))), i.source, i.cu_seqlens is not None
    c, y = f.c, i.x0 if source is Source.CLEAN else i.noise if i.x_t is None else i.x_t
    for field, stem, x in (("v", "v", i.v), ("x0", "x0", i.x0), ("y", "y", y), ("v_old", "old", i.v_old),
                           ("v_ref", "ref", i.v_ref), ("grad", "grad", grad)):  # fmt: skip
        if x is not None:
            f.rows(field, stem, x, packed)
    c.mask_stride = i.v[0].numel()
    if i.element_mask is not None and i.element_mask.is_floating_point():
        f.point("weight", i.element_mask, torch.float32)
    else:
        f.point("mask", i.element_mask, torch.uint8)
    for field, x in (("t", i.t), ("sigma", i.sigma), ("r", i.r), ("valid", i.sample_mask), ("chosen", i.ref_mask),
                     ("each", i.each), ("policy_weight", i.policy_weight), ("prior_weight", i.prior_weight)):  # fmt: skip
        if x is not None:
            f.point(field, x, torch.float32)
    f.point("cu", i.cu_seqlens, torch.int64)
    c.samples, c.count, c.frames = i.r.shape[0], c.mask_stride, i.t.shape[1]
    c.inner = c.count * i.v.shape[0] if packed else i.inner
    c.seed, c.source = i.seed or 0, source
    c.stats, c.threads = i.stats, torch.get_num_threads()
    return f


def nft_loss(i: Inputs, grad: Tensor | None, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, totals, rows), and the gradient for grad_output = scale into `grad`."""
    f = _fill(i, grad)
    f.c.scale = f.c.prior_scale = scale
    samples = i.r.shape[0]
    f32 = torch.float32  # whatever the default dtype is: the library writes 4 bytes per value
    loss, totals = torch.empty((), dtype=f32), torch.empty(len(Total), dtype=f32)
    rows = torch.zeros(ROWS, samples, dtype=f32)
    tiles = i.v.numel() // TILE + samples if i.cu_seqlens is not None else samples * -(-i.v[0].numel() // TILE)
    for field, x in (("loss", loss), ("totals", totals), ("rows", rows)):
        f.point(field, x, f32)
    f.point("sums", torch.empty(len(Slot), samples, dtype=torch.float64), torch.float64)
    f.point("part", torch.empty(tiles, len(Slot), dtype=torch.float64), torch.float64)
    _loaded().afd_nft_loss(ctypes.byref(f.c))
    return loss, totals, rows


def nft_gradient(grad_output: Tensor, rows: Tensor, i: Inputs, grad: Tensor) -> None:
    """The gradient times grad_output [2], of policy and prior, into `grad`."""
    _check_sizes(torch.Size([ROWS, i.r.shape[0]]), rows)
    f = _fill(i, grad)
    f.point("rows", rows, torch.float32)
    f.c.scale, f.c.prior_scale = grad_output.tolist()
    _loaded().afd_nft_gradient(ctypes.byref(f.c))

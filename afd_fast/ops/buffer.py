"""The buffer that a caller may lend for the gradient (out=), and what makes it one.

Legend: B samples.
"""

from collections.abc import Iterable

import torch
from afd_kernels.layout import rows_contiguous
from torch import Tensor

from afd_fast.reference.flow import kind_of
from afd_fast.reference.transforms import under_func


def check_out(out: Tensor | None, v: Tensor, inputs: Iterable[object]) -> None:
    """ValueError for a buffer that could give a wrong gradient."""
    if out is None:
        return
    if torch.compiler.is_compiling() or under_func():
        raise ValueError(
            "out= is for eager calls: torch.compile and torch.func plan their memory themselves. Leave it out"
        )
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor like v, got {kind_of('out', out)}")
    if out.shape != v.shape or out.dtype != v.dtype or out.device != v.device:
        raise ValueError(
            f"out must be like v: {tuple(v.shape)} {v.dtype} on {v.device}, got {tuple(out.shape)} {out.dtype}"
        )
    held = v.grad if v.is_leaf else None
    if out.requires_grad or any(isinstance(x, Tensor) and _overlap(out, x) for x in (v, held, *inputs)):
        raise ValueError(
            "out must be a separate buffer without requires_grad: it shares memory with an input or v.grad"
        )


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the memory from the first to the last element of a and b meets."""
    if not (a.numel() and b.numel()) or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    (a_first, a_end), (b_first, b_end) = _span(a), _span(b)
    return a_first < b_end and b_first < a_end


def _span(x: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and of the one after the last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.itemsize


def is_own(out: Tensor) -> bool:
    """Whether every sample is contiguous and no two overlap."""
    return rows_contiguous(out) and (out.shape[0] < 2 or out.stride(0) >= out[0].numel())

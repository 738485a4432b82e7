"""Views that let a kernel walk tensors in memory order, and noise levels in the one layout kernels read.

Legend: B samples, F frames; n = position of an element inside its sample; its frame is (n // inner) % F.
"""

import torch
from torch import Tensor

from afd_fast.reference.flow import expand_t


def rows_contiguous(x: Tensor) -> bool:
    """Whether every sample x[b] is contiguous; the stride between samples is free."""
    expected = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:])):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def memory_order(x: Tensor) -> list[int] | None:
    """The permutation of axes 1.. after which every sample is contiguous, or None where there is none to apply."""
    if rows_contiguous(x):
        return None
    order = [0, *sorted(range(1, x.ndim), key=lambda d: -x.stride(d))]
    return order if rows_contiguous(x.permute(order)) else None


def frame_table(t: Tensor | float, like: Tensor, frame_dim: int | None, order: list[int] | None) -> tuple[Tensor, int]:
    """(t as [B, F] contiguous, inner) for `like` walked in `order`; like's dtype or float32, whichever is wider.

    F is 1 for one level a sample; a t that varies along several axes becomes one value an element.
    """
    batch = like.shape[0]
    count = like[0].numel() if batch else 0
    if not isinstance(t, Tensor):
        return like.new_full((batch, 1), float(t), dtype=torch.promote_types(like.dtype, torch.float32)), max(count, 1)
    t = expand_t(t, like, frame_dim)
    if t.ndim == 0:
        return t.expand(batch, 1).contiguous(), max(count, 1)
    if order is not None:
        t, like = t.permute(order), like.permute(order)
    axes = [d for d in range(1, t.ndim) if t.shape[d] != 1]
    if len(axes) > 1:
        return t.expand(like.shape).reshape(batch, count).contiguous(), 1
    frames = t.shape[axes[0]] if axes else 1
    inner = like[0].numel() if batch and not axes else 1
    for size in like.shape[axes[0] + 1 :] if axes else ():
        inner *= size
    return t.reshape(t.shape[0], frames).expand(batch, frames).contiguous(), max(inner, 1)


def same_table(a: Tensor, a_inner: int, b: Tensor, b_inner: int, count: int) -> tuple[Tensor, Tensor, int]:
    """Two frame tables brought to one F and one inner."""
    if a.shape[1] == b.shape[1] and (a.shape[1] == 1 or a_inner == b_inner):
        return a, b, a_inner
    if a.shape[1] == 1:
        return a.expand(b.shape).contiguous(), b, b_inner
    if b.shape[1] == 1:
        return a, b.expand(a.shape).contiguous(), a_inner
    full = lambda x, inner: x.repeat_interleave(inner, 1).repeat(1, count // (x.shape[1] * inner))
    return full(a, a_inner), full(b, b_inner), 1

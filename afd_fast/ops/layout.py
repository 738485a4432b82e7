"""Views that let a kernel walk tensors in memory order, and noise levels in the one layout kernels read.

Legend: B samples, F frames, w the working dtype (float32, float64 for float64); n = position of an element inside its
sample; its frame is (n // inner) % F.
"""

import math
from typing import NamedTuple

import torch
from afd_kernels.layout import rows_contiguous
from torch import Tensor

from afd_fast.reference.flow import check_frame_dim, check_level, expand_t


def memory_order(x: Tensor) -> list[int] | None:
    """The permutation of axes 1.. after which every sample is contiguous; None where it is not needed or not found."""
    if rows_contiguous(x):
        return None
    strides = x.stride()
    order = [0, *sorted(range(1, x.ndim), key=lambda axis: -strides[axis])]
    return order if rows_contiguous(x.permute(order)) else None


class FrameTable(NamedTuple):
    """A noise level per frame: that of element n is t[:, (n // inner) % F]."""

    t: Tensor  # [B, F] contiguous, float32 or float64
    inner: int

    def spread(self, count: int) -> Tensor:
        """One value per element [B, count]."""
        return self.t.repeat_interleave(self.inner, 1).repeat(1, count // (self.t.shape[1] * self.inner))


def frame_table(
    t: Tensor | float, like: Tensor, frame_dim: int | None, order: list[int] | None, name: str = "t"
) -> FrameTable:
    """The table of t for `like` walked in `order`, in like's dtype or float32, whichever is wider.

    F is 1 for one level per sample; a t that varies along several axes becomes one value per element.
    """
    batch = like.shape[0]
    count = like[0].numel() if batch else 0
    if not isinstance(t, Tensor):  # expand_t checks a tensor
        check_level(name, t)
        check_frame_dim(frame_dim, like.ndim)
        full = like.new_full((batch, 1), float(t), dtype=torch.promote_types(like.dtype, torch.float32))
        return FrameTable(full, max(count, 1))
    t = expand_t(t, like, frame_dim, name)
    if t.ndim == 0:
        return FrameTable(t.expand(batch, 1).contiguous(), max(count, 1))
    if order is not None:
        t, like = t.permute(order), like.permute(order)
    axes = [d for d in range(1, t.ndim) if t.shape[d] != 1]
    if len(axes) > 1:
        return FrameTable(t.expand(like.shape).reshape(batch, count).contiguous(), 1)
    frames = t.shape[axes[0]] if axes else 1
    inner = count if not axes else math.prod(like.shape[axes[0] + 1 :])
    return FrameTable(t.reshape(t.shape[0], frames).expand(batch, frames).contiguous(), max(inner, 1))


def same_table(a: FrameTable, b: FrameTable, count: int) -> tuple[FrameTable, FrameTable]:
    """Two tables of samples with `count` elements, brought to one F and one inner."""
    if a.t.shape[1] == b.t.shape[1] and (a.t.shape[1] == 1 or a.inner == b.inner):
        return a, FrameTable(b.t, a.inner)
    if a.t.shape[1] == 1:
        return FrameTable(a.t.expand(b.t.shape).contiguous(), b.inner), b
    if b.t.shape[1] == 1:
        return a, FrameTable(b.t.expand(a.t.shape).contiguous(), a.inner)
    return FrameTable(a.spread(count), 1), FrameTable(b.spread(count), 1)


class Walk(NamedTuple):
    """How the kernels go through the elements."""

    v: Tensor
    frame_dim: int | None
    order: list[int] | None  # of v's axes
    cu_seqlens: Tensor | None


def _per_sample(x: Tensor | float, walk: Walk, samples: int) -> Tensor:
    """One value per packed sample [B, 1], w."""
    wide = torch.promote_types(walk.v.dtype, torch.float32)
    if isinstance(x, Tensor):
        return x.to(walk.v.device, wide).reshape(-1, 1).expand(samples, 1).contiguous()
    return walk.v.new_full((samples, 1), float(x), dtype=wide)


def noise_levels(t: Tensor | float, sigma: Tensor | float | None, walk: Walk) -> tuple[FrameTable, Tensor | None]:
    """The table of t, and sigma [B, F] with the same F and inner, or None for t."""
    if walk.cu_seqlens is not None:
        samples = len(walk.cu_seqlens) - 1
        table = FrameTable(_per_sample(t, walk, samples), 1)
        return table, None if sigma is None else _per_sample(sigma, walk, samples)
    table = frame_table(t, walk.v, walk.frame_dim, walk.order)
    if sigma is None:
        return table, None
    other = frame_table(sigma, walk.v, walk.frame_dim, walk.order, "sigma")
    table, other = same_table(table, other, walk.v[0].numel() if len(walk.v) else 0)
    return table, other.t

"""What every launcher needs."""

import contextlib

import torch
from torch import Tensor

from afd_kernels.layout import TILE, contiguous_rows

WARPS = 4  # 8 elements per thread in each quarter of the tile: 128-bit accesses for 16-bit types
PROGRAMS = 2**31 - 1


def rows(x: Tensor | None, fallback: Tensor) -> tuple[Tensor, int]:
    """(tensor whose samples are contiguous, elements between samples); the fallback, stride 0, where x is None."""
    if x is None:
        return fallback, 0
    x = contiguous_rows(x)
    return x, x.stride(0)


def on(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device; make it x's where it is another one."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def check_size(programs: int, period: int) -> None:
    """ValueError for a call that one launch cannot address."""
    if programs > PROGRAMS or period > PROGRAMS - TILE:
        raise ValueError(
            f"{programs} tiles, {period} elements in a period of t: one launch takes at most 2**31 - 1 of either. "
            "Split the batch"
        )

"""What every launcher needs."""

import contextlib

import torch
from torch import Tensor

TILE = 4096  # elements of a program, and of a noise tile: 1024 Philox counters with four outputs each
WARPS = 4  # 8 elements a thread in each quarter of the tile: 128-bit accesses for 16-bit types
PROGRAMS = 2**31 - 1


def rows(x: Tensor | None, fallback: Tensor) -> tuple[Tensor, int]:
    """(tensor whose samples are contiguous, elements between samples); a stand-in where there is none."""
    if x is None:
        return fallback, 0
    expected = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:])):
        if size != 1 and stride != expected:
            x = x.contiguous()
            break
        expected *= size
    return x, x.stride(0)


def on(x: Tensor):
    """Launch on x's device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def check_size(programs: int, period: int) -> None:
    """ValueError for what one launch cannot address."""
    if programs > PROGRAMS or period > PROGRAMS - TILE:
        raise ValueError(f"{programs} tiles, {period} elements in a period of t: more than 2**31 - 1 in one launch")

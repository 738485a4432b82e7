"""What every launcher needs."""

import contextlib
import os
from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from afd_kernels.layout import TILE, contiguous_rows

WARPS = 4  # 8 elements per thread in each quarter of the tile: 128-bit accesses for 16-bit types
PROGRAMS = 2**31 - 1
MOST = 4096  # launches that are remembered
KNOWN = (3, 3) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 7) and torch.version.hip is None

knobs = getattr(triton, "knobs", None)  # from Triton 3.4 on
# what launches have alike -> what runs the compiled kernel, and its constexprs
_found: dict[tuple, tuple[Callable, tuple]] = {}


def _triton_settings(kernel) -> tuple | None:
    """What Triton reads at every launch and compiles by; None for a launch that has to be Triton's."""
    if not KNOWN or type(kernel) is not JITFunction or kernel.pre_run_hooks:
        return None
    if knobs is None:
        return (os.environ.get("TRITON_DEBUG"),)
    if getattr(knobs.runtime, "add_stages_inspection_hook", None) is not None:
        return None
    return knobs.runtime.debug, getattr(knobs.compilation, "instrumentation_mode", None)


def launch(
    kernel, grid: tuple[int, ...], tensors: Sequence[Tensor], numbers: tuple[int | float, ...], **constants
) -> None:
    """kernel[grid](*tensors, *numbers, **constants), where `constants` has every constexpr and Triton's options.

    Triton's look-up takes about as long as the rest of a launcher. So a launch that equals an earlier one in all but the tensors'
    addresses runs the kernel that Triton found for that one: the addresses then agree modulo 16, and Triton 3.3 to 3.7 compile by
    no more for an NVIDIA GPU. A name has one type in all launches, as 1 is True. No tensor is kept. A seed, which kernels are
    not specialised by, is the first number and may be another.
    """
    settings = _triton_settings(kernel)
    if settings is None:
        kernel[grid](*tensors, *numbers, **constants)
        return
    fixed = numbers[1:] if "seed" in kernel.do_not_specialize else numbers
    like = (
        kernel.fn, driver.active.get_current_device(), settings, grid, fixed, *[x.dtype for x in tensors],
        *[x.data_ptr() & 15 for x in tensors], *constants, *constants.values(),
    )  # fmt: skip
    found = _found.get(like)
    if found is not None:
        run, constexprs = found
        run(*tensors, *numbers, *constexprs)
        return
    compiled = kernel[grid](*tensors, *numbers, **constants)
    if not isinstance(compiled, CompiledKernel):
        return
    if len(_found) >= MOST:
        _found.clear()
    names = kernel.arg_names[len(tensors) + len(numbers) :]
    _found[like] = compiled[(*grid, 1, 1)[:3]], tuple(constants[name] for name in names)


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

"""Declare an operator once; PyTorch's dispatcher picks the implementation from the tensors' device."""

import functools
import importlib.metadata
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

OLDEST_TRITON = (3, 3)  # 3.2, which PyTorch 2.6 brings, has no tuples as arguments of a function

Implementation = Callable[..., Any]  # takes the schema's arguments by position


def operator(
    schema: str, *, cpu: Implementation, cuda: str, fake: Implementation, float64_kernel: bool = False
) -> Implementation:
    """Register `schema` with a CPU function, a launcher "module:function" of afd_kernels and a shape function.

    float64_kernel: whether the launcher takes float64. Where it does not, and where Triton is too old for the kernels, CUDA
    tensors run the CPU function: for them, that is plain PyTorch. Returns the callable operator.
    """
    name, signature = schema.split("(", 1)
    qualified = f"afd_fast::{name}"

    def launch(*args: Any) -> Any:
        plain = (not float64_kernel and is_wide(args)) or not triton_compiles()
        return cpu(*args) if plain else launcher(cuda)(*args)

    torch.library.define(qualified, "(" + signature)
    torch.library.impl(qualified, "CPU", cpu)
    torch.library.impl(qualified, "CUDA", launch)
    torch.library.register_fake(qualified, fake)
    return getattr(torch.ops.afd_fast, name).default


def old_triton() -> str | None:
    """The version of an installed Triton that cannot compile the kernels, else None."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None  # the launcher's import names what is missing
    return version if tuple(map(int, version.split(".")[:2])) < OLDEST_TRITON else None


@functools.cache
def triton_compiles() -> bool:
    """Whether CUDA tensors may go to the kernels; a Triton that is too old is named in one warning."""
    version = old_triton()
    if version is not None:
        oldest = ".".join(map(str, OLDEST_TRITON))
        warnings.warn(
            f"afd_fast runs PyTorch code on CUDA: its kernels need Triton {oldest} or later, and {version} is installed. "
            "PyTorch 2.7 and later bring one that is new enough",
            RuntimeWarning,
            stacklevel=3,
        )
    return version is None


def is_wide(args: Sequence[object]) -> bool:
    """Whether the first tensor that is not a scalar is float64: the student's velocity, x0, or a result of them."""
    return next(x for x in args if isinstance(x, torch.Tensor) and x.ndim).dtype == torch.float64


@functools.cache
def launcher(path: str) -> Implementation:
    """Import a Triton launcher the first time a CUDA tensor needs it."""
    module, function = path.split(":")
    return getattr(importlib.import_module(f"afd_kernels.{module}"), function)

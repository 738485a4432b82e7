"""Declare an operator once; PyTorch's dispatcher picks the implementation from the tensors' device."""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

Implementation = Callable[..., Any]  # takes the schema's arguments by position


def operator(
    schema: str, *, cpu: Implementation, cuda: str, fake: Implementation, float64_kernel: bool = False
) -> Implementation:
    """Register `schema` with a CPU function, a launcher "module:function" of afd_kernels and a shape function.

    float64_kernel: whether the launcher takes float64. Where it does not, float64 runs the CPU function on any device:
    that is plain PyTorch. Returns the callable operator.
    """
    name, signature = schema.split("(", 1)
    qualified = f"afd_fast::{name}"

    def launch(*args: Any) -> Any:
        return cpu(*args) if not float64_kernel and is_wide(args) else launcher(cuda)(*args)

    torch.library.define(qualified, "(" + signature)
    torch.library.impl(qualified, "CPU", cpu)
    torch.library.impl(qualified, "CUDA", launch)
    torch.library.register_fake(qualified, fake)
    return getattr(torch.ops.afd_fast, name).default


def is_wide(args: Sequence[object]) -> bool:
    """Whether the first tensor that is not a scalar is float64: the student's velocity, x0, or a result of them."""
    return next(x for x in args if isinstance(x, torch.Tensor) and x.ndim).dtype == torch.float64


@functools.cache
def launcher(path: str) -> Implementation:
    """Import a Triton launcher the first time a CUDA tensor needs it."""
    module, function = path.split(":")
    return getattr(importlib.import_module(f"afd_kernels.{module}"), function)

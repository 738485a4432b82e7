"""Declare an operator once; PyTorch's dispatcher picks the implementation from the tensors' device."""

import functools
import importlib

import torch


def operator(schema: str, *, cpu, cuda: str, fake):
    """Register `schema` with a CPU function, a launcher "module:function" of afd_kernels and a shape function.

    float64 takes the CPU function on any device: it is plain PyTorch there. Returns the callable operator.
    """
    name, signature = schema.split("(", 1)
    qualified = f"afd_fast::{name}"

    def launch(*args):
        return cpu(*args) if is_wide(args) else launcher(cuda)(*args)

    torch.library.define(qualified, "(" + signature)
    torch.library.impl(qualified, "CPU", cpu)
    torch.library.impl(qualified, "CUDA", launch)
    torch.library.register_fake(qualified, fake)
    return getattr(torch.ops.afd_fast, name).default


def is_wide(args) -> bool:
    """Whether the first tensor that is not a scalar is float64: the student's velocity, x0, or what came of them."""
    return next(x for x in args if isinstance(x, torch.Tensor) and x.ndim).dtype == torch.float64


@functools.cache
def launcher(path: str):
    """Import a Triton launcher the first time a CUDA tensor needs it."""
    module, function = path.split(":")
    return getattr(importlib.import_module(f"afd_kernels.{module}"), function)

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
        wide = any(isinstance(x, torch.Tensor) and x.ndim and x.dtype == torch.float64 for x in args[:4])
        return cpu(*args) if wide else launcher(cuda)(*args)

    torch.library.define(qualified, "(" + signature)
    torch.library.impl(qualified, "CPU", cpu)
    torch.library.impl(qualified, "CUDA", launch)
    torch.library.register_fake(qualified, fake)
    return getattr(torch.ops.afd_fast, name).default


@functools.cache
def launcher(path: str):
    """Import a Triton launcher the first time a CUDA tensor needs it."""
    module, function = path.split(":")
    return getattr(importlib.import_module(f"afd_kernels.{module}"), function)

"""Who watches a call: autograd, torch.compile or a transform of torch.func; and when a check may read values."""

import os

import torch
from torch import Tensor
from torch._C import _functorch


def under_func() -> bool:
    """Whether a transform of torch.func (grad, vjp, jvp, vmap, ...) is active, inside torch.compile too."""
    return torch._C._are_functorch_transforms_active()


def under_vmap() -> bool:
    """Whether torch.func.vmap is among the active transforms."""
    if torch.compiler.is_compiling():
        return False
    # the stub leaves out the None that comes where no transform is active
    stack: list[_functorch.CInterpreter] | None = _functorch.get_interpreter_stack()
    return stack is not None and any(transform.key() == _functorch.TransformType.Vmap for transform in stack)


def is_tracked(*inputs: object) -> bool:
    """Whether derivatives or batching rules are needed: then plain PyTorch runs, which has both."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return True
    return under_func()


BLOCKING = os.environ.get("CUDA_LAUNCH_BLOCKING") == "1"  # whoever asks for it looks for an error, and waits anyway


def readable(x: Tensor, wait: bool = False) -> bool:
    """Whether a check may read values: on the CPU, elsewhere where it may wait for the device; outside a trace and vmap."""
    free = wait or BLOCKING or x.device.type == "cpu"
    return free and not torch.compiler.is_compiling() and x.numel() > 0 and not under_vmap()


def within(x: Tensor, low: float, high: float) -> bool:
    """Whether every element lies in [low, high]; NaN does not. x is readable."""
    least, most = torch.aminmax(x.detach())
    return least.item() >= low and most.item() <= high  # as numbers: a fifth of the time of comparing tensors

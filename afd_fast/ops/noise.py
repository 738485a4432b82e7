"""forward_noise as an operator: x_t = (1 - t) x0 + t eps with eps read or regenerated from a seed."""

import math

import torch
from torch import Tensor

from afd_fast.ops import native
from afd_fast.ops._register import operator
from afd_fast.ops.layout import frame_table, memory_order
from afd_fast.reference import flow
from afd_fast.reference.transforms import is_tracked


def wrap_seed(seed: int | None) -> int | None:
    """Any integer -> the int64 with the same low 64 bits."""
    return None if seed is None else (int(seed) + (1 << 63)) % (1 << 64) - (1 << 63)


def _cpu(x0: Tensor, t: Tensor, noise: Tensor | None, seed: int | None, inner: int) -> Tensor:
    if native.serves(x0, noise):
        return native.forward_noise(x0, t, noise, seed, inner)
    if x0.numel() == 0:
        return torch.empty_like(x0)
    count, frames = x0[0].numel(), t.shape[1]
    shape = (x0.shape[0], count // (frames * inner), frames, inner)
    table = t.view(-1, 1, frames, 1)
    noise = None if noise is None else noise.reshape(shape)
    return flow.forward_noise(x0.reshape(shape), table, noise=noise, seed=seed).view(x0.shape)


def _fake(x0: Tensor, *_: object) -> Tensor:
    return torch.empty(x0.shape, dtype=x0.dtype, device=x0.device)


_forward_noise = operator(
    "forward_noise(Tensor x0, Tensor t, Tensor? noise, int? seed, SymInt inner) -> Tensor",
    cpu=_cpu,
    cuda="noise:forward_noise",
    fake=_fake,
)


def _normals(x0: Tensor, seed: int | None) -> Tensor:
    """The float32 normals of a seed in x0's shape: what forward_noise makes of zeros at t = 1."""
    zeros = torch.zeros(x0.shape, dtype=torch.float32, device=x0.device)
    ones = torch.ones(x0.shape[0], 1, dtype=torch.float32, device=x0.device)
    return _forward_noise(zeros, ones, None, wrap_seed(seed), max(math.prod(x0.shape[1:]), 1))


def forward_noise(
    x0: Tensor, t: Tensor | float, *, noise: Tensor | None = None, seed: int | None = None, frame_dim: int | None = None
) -> Tensor:
    """x_t = (1 - t) x0 + t eps (AFD Eq. 3), computed in float32 (float64 for float64), rounded once to x0's dtype.

    Args:
        x0: [B, ...] clean samples, floating point.
        t: noise level in [0, 1]; a number, [B], or [B, F] with `frame_dim`.
        noise: eps with x0's shape; or
        seed: integer from which the Philox noise of `afd_fast.reference.noise` is regenerated: the same bits on
            every device, and the same that `nft_loss(seed=...)` uses.
        frame_dim: axis of x0 that t's second axis runs over (2 for [B, C, F, H, W]).

    Where x0, t or noise requires grad, and inside a transform of torch.func, plain PyTorch computes the same values; so
    every derivative and vmap work. With seed=, each entry of vmap's mapped axis gets the same noise.
    Raises: TypeError for integer tensors; ValueError for shapes, devices, t outside [0, 1] (checked where t is on
    the CPU), and unless exactly one of noise and seed is given.
    """
    flow.check_float("x0", x0)
    if x0.ndim == 0:
        raise ValueError("x0 must have a batch axis")
    flow.check_noise(x0, noise, seed)
    if is_tracked(x0, t, noise):
        noise = _normals(x0, seed) if noise is None else noise
        return flow.forward_noise(x0, t, noise=noise, frame_dim=frame_dim)
    order = None if seed is not None else memory_order(x0)
    table, inner = frame_table(t, x0, frame_dim, order)
    flow.check_t(table)
    if order is None or noise is None:
        return _forward_noise(x0, table, noise, wrap_seed(seed), inner)
    back = sorted(range(x0.ndim), key=order.__getitem__)
    return _forward_noise(x0.permute(order), table, noise.permute(order), None, inner).permute(back)

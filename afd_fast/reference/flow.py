"""Rectified flow: noising, targets, conversions and schedules (AFD Eq. 3; Self-Forcing's FlowMatchScheduler).

x_t = (1 - t) x0 + t eps, target velocity v* = eps - x0, so x0 = x_t - t v and eps = x_t + (1 - t) v.
Legend: B samples, F frames.
"""

import numbers

import numpy as np
import torch
from torch import Tensor

from afd_fast.reference.noise import normal_noise
from afd_fast.reference.transforms import readable, within


def kind_of(name: str, x: object) -> str:
    """What was given as `name` where a tensor of real numbers was expected, as an error says it, with the way to one."""
    if isinstance(x, Tensor):
        return str(x.dtype)
    if isinstance(x, np.ndarray):
        return f"a NumPy array: give torch.from_numpy({name})"
    return f"a list: give torch.tensor({name})" if isinstance(x, list) else type(x).__name__


def check_float(name: str, x: object, who: str = "") -> None:
    """TypeError, which begins with `who`, unless x is a floating-point tensor."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        way = f": give {name}.float()" if isinstance(x, Tensor) and not x.is_complex() else ""
        raise TypeError(f"{who}{name} must be a floating-point tensor, got {kind_of(name, x)}{way}")


def check_level(name: str, t: Tensor | float | None) -> None:
    """TypeError unless t is a real number or tensor, or None."""
    known = isinstance(t, (Tensor, numbers.Real, torch.SymFloat, type(None)))
    if not known or (isinstance(t, Tensor) and t.is_complex()):
        raise TypeError(f"{name} must be a number or a real tensor, got {kind_of(name, t)}")


def check_frame_dim(frame_dim: int | None, ndim: int) -> None:
    """TypeError or ValueError unless frame_dim is None or one of the axes after the batch's."""
    if frame_dim is None:
        return
    if isinstance(frame_dim, bool) or not isinstance(frame_dim, int):
        raise TypeError(f"frame_dim must be an integer, got {type(frame_dim).__name__}")
    if not -ndim < frame_dim < ndim or not frame_dim:
        raise ValueError(f"frame_dim must be an axis after the batch's, 1 .. {ndim - 1}, got {frame_dim}")


def expand_t(t: Tensor | float, like: Tensor, frame_dim: int | None = None, name: str = "t") -> Tensor:
    """Broadcast t (a number, [B], [B, F] with `frame_dim`, or already like.ndim axes) against `like`.

    frame_dim: the axis of `like` that t's second axis runs over (2 for [B, C, F, H, W]). name: of t in errors.
    Half-precision tensors are noised with t in float32. Raises ValueError on any other shape, TypeError for no number.
    """
    check_level(name, t)
    check_frame_dim(frame_dim, like.ndim)
    t = torch.as_tensor(t, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    batch = like.shape[0] if like.ndim else 1
    if t.ndim == 0:
        return t
    if t.ndim == like.ndim and t.ndim > 1 and frame_dim is None:
        if any(a not in (1, b) for a, b in zip(t.shape, like.shape)):
            raise ValueError(f"{name} of shape {tuple(t.shape)} does not broadcast against {tuple(like.shape)}")
        return t
    if t.ndim == 1:
        if t.shape[0] not in (1, batch):
            raise ValueError(f"{name} has {t.shape[0]} values for a batch of {batch}")
        return t.view(-1, *[1] * (like.ndim - 1))
    if t.ndim == 2 and frame_dim is not None:
        axis = frame_dim % like.ndim
        if tuple(t.shape) != (batch, like.shape[axis]):
            raise ValueError(
                f"{name} must be [batch, frames] = {(batch, like.shape[axis])} for frame_dim={frame_dim}, got {tuple(t.shape)}"
            )
        shape = [1] * like.ndim
        shape[0], shape[axis] = t.shape
        return t.view(shape)
    raise ValueError(
        f"{name} of shape {tuple(t.shape)} does not fit {tuple(like.shape)}: give a number, [B], or [B, F] with frame_dim="
    )


def check_t(t: Tensor, wait: bool = False) -> None:
    """ValueError when any t lies outside [0, 1]; no check where values cannot be read (a GPU without `wait`, a trace, vmap)."""
    if readable(t, wait) and not within(t, 0, 1):
        raise ValueError(f"t must lie in [0, 1] (divide network timesteps by 1000), got {t.min():g} .. {t.max():g}")


def check_sigma(sigma: Tensor) -> None:
    """ValueError for a sigma that is negative or not finite; no check where values cannot be read."""
    if readable(sigma) and not within(sigma, 0, torch.finfo(sigma.dtype).max):
        raise ValueError(f"sigma must be finite and at least 0, got {sigma.min():g} .. {sigma.max():g}")


def check_noise(x0: Tensor, noise: Tensor | None, seed: int | None) -> None:
    """ValueError or TypeError unless exactly one of noise (like x0) and seed (an integer) is given."""
    if (noise is None) == (seed is None):
        raise ValueError("give exactly one of noise= (a tensor) and seed= (an integer)")
    if noise is None:
        if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
            raise TypeError(f"seed must be an integer, got {type(seed).__name__}")
        return
    check_float("noise", noise)
    if noise.shape != x0.shape:
        raise ValueError(f"noise must have x0's shape {tuple(x0.shape)}, got {tuple(noise.shape)}")
    if noise.device != x0.device:
        raise ValueError(f"noise is on {noise.device}, x0 on {x0.device}")


def resolve_noise(x0: Tensor, noise: Tensor | None, seed: int | None) -> Tensor:
    """The noise tensor itself, or the counter-based one of `seed`; exactly one must be given."""
    check_noise(x0, noise, seed)
    if noise is not None:
        return noise
    assert seed is not None  # as checked
    return normal_noise(x0.shape, int(seed), device=x0.device)


def forward_noise(
    x0: Tensor, t: Tensor | float, *, noise: Tensor | None = None, seed: int | None = None, frame_dim: int | None = None
) -> Tensor:
    """x_t = (1 - t) x0 + t eps (Eq. 3), computed in at least float32 and rounded once to x0's dtype.

    Args:
        x0: [B, ...] clean samples, floating point.
        t: noise level in [0, 1]; a number, [B], or [B, F] with `frame_dim`.
        noise: eps with x0's shape; or
        seed: integer from which the Philox noise of `afd_fast.reference.noise` is regenerated.
        frame_dim: axis of x0 that t's second axis runs over.

    Raises: TypeError for integer tensors; ValueError for shapes, devices, t outside [0, 1], and unless
    exactly one of noise and seed is given.
    """
    check_float("x0", x0)
    eps = resolve_noise(x0, noise, seed)
    t = expand_t(t, x0, frame_dim)
    check_t(t)
    wide = torch.promote_types(x0.dtype, torch.float32)
    return ((1 - t) * x0.to(wide) + t * eps.to(wide)).to(x0.dtype)


def x0_from_velocity(x_t: Tensor, v: Tensor, sigma: Tensor | float) -> Tensor:
    """x0 = x_t - sigma v."""
    return x_t - sigma * v


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """shift * s / (1 + (shift - 1) s): SD3's timestep shift, as in Wan's FlowMatchScheduler."""
    return shift * sigma / (1 + (shift - 1) * sigma)

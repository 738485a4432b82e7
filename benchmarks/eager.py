"""The arithmetic that `nft_loss` replaces, eagerly, as the trainers have it (docs/nft.md has files and lines)."""

import torch
from torch import Tensor


def diffusionnft(v: Tensor, x0: Tensor, r: Tensor, t: Tensor, *, x_t: Tensor, v_old: Tensor, v_ref: Tensor) -> Tensor:
    """NVlabs/DiffusionNFT scripts/train_nft_sd3.py:934-970, without its metrics."""
    dims = tuple(range(1, v.ndim))
    t = t.view(-1, *[1] * (v.ndim - 1))
    losses = []
    for branch in (v, 2.0 * v_old - v):  # beta = 1
        x0_hat = x_t - t * branch
        with torch.no_grad():
            w = (x0_hat.double() - x0.double()).abs().mean(dims, keepdim=True).clip(min=1e-5)
        losses.append(((x0_hat - x0) ** 2 / w).mean(dims))
    policy = ((r * losses[0] + (1.0 - r) * losses[1]) * 5.0).mean()
    return policy + 1e-4 * ((v - v_ref) ** 2).mean(dims).mean()


def afd(v: Tensor, x0: Tensor, r: Tensor, t: Tensor, *, noise: Tensor, v_ref: Tensor) -> Tensor:
    """AFD Eq. 4-5 written as it reads."""
    dims = tuple(range(1, v.ndim))
    old, target = v.detach(), noise - x0
    positive, negative = 0.9 * old + 0.1 * v, 1.1 * old - 0.1 * v
    policy = r * ((positive - target) ** 2).sum(dims) + (1 - r) * ((negative - target) ** 2).sum(dims)
    return policy.sum() + 1e-4 * (r * ((v - v_ref) ** 2).sum(dims)).sum()


def add_noise(x0: Tensor, t: Tensor) -> Tensor:
    """Every trainer: randn_like, then the line through x0 and the noise."""
    t = t.view(-1, *[1] * (x0.ndim - 1))
    return ((1 - t) * x0 + t * torch.randn_like(x0)).to(x0.dtype)

"""The norm of Wan's video VAE, as diffusers' `WanRMS_norm` computes it, and the frames a causal convolution sees.

Legend: B samples, C channels, F frames, H x W pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PAST = 2  # frames before the first one that a causal convolution of width 3 reads


def norm_silu(x: Tensor, weight: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """SiLU(x / |x| sqrt(C) weight), |x| over the channels, behind the frames before it: what the next causal
    convolution reads, and the last frames of that, which its next call needs.

    x: [B, C, F, H, W]; weight: [C]; past: [B, C, 2, H, W] of the call before, None for zeros, which is how a video
    starts. Returns [B, C, 2 + F, H, W] and [B, C, 2, H, W]. Each step is rounded to x's dtype, as diffusers does.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = F.normalize(wide, dim=1).to(x.dtype) * x.shape[1] ** 0.5 * weight[:, None, None, None]
    return with_past(F.silu(y), past)


def with_past(x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x behind the frames before it, and the last two frames of that. Shapes as `norm_silu`."""
    x = F.pad(x, (0, 0, 0, 0, PAST, 0)) if past is None else torch.cat([past, x], 2)
    return x, x[:, :, -PAST:].clone()

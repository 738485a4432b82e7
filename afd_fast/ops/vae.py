"""The fused operator of Wan's VAE: `norm_silu`. On CUDA one Triton kernel (kernels/afd_kernels/vae.py), elsewhere, and
where a gradient is wanted, the reference.

Legend: B samples, C channels, F frames, H x W pixels.
"""

import torch
from torch import Tensor

from afd_fast.ops._register import operator
from afd_fast.reference import vae as reference
from afd_fast.reference.transforms import is_tracked


def _fake(x: Tensor, weight: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
    def frames(count: int) -> Tensor:
        shape = (*x.shape[:2], count, *x.shape[3:])
        last = x.stride(1) == 1
        form = torch.channels_last_3d if last else torch.contiguous_format
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)

    return frames(x.shape[2] + reference.PAST), frames(reference.PAST)


_norm_silu = operator(
    "norm_silu(Tensor x, Tensor weight, Tensor? past) -> (Tensor, Tensor)",
    cpu=reference.norm_silu,
    cuda="vae:norm_silu",
    fake=_fake,
)


def norm_silu(x: Tensor, weight: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """SiLU of the normalised frames [B, C, 2 + F, H, W] behind `past` [B, C, 2, H, W], and the last two of them. See the
    reference. Raises ValueError for shapes."""
    if x.ndim != 5 or weight.shape != x.shape[1:2]:
        raise ValueError(
            f"norm_silu: got x {list(x.shape)}, weight {list(weight.shape)}; expected [B, C, F, H, W], [C]"
        )
    if past is not None and past.shape != (*x.shape[:2], reference.PAST, *x.shape[3:]):
        raise ValueError(f"norm_silu: got past {list(past.shape)}, expected [B, C, 2, H, W] for x {list(x.shape)}")
    if is_tracked(x, weight, past):
        return reference.norm_silu(x, weight, past)
    return _norm_silu(x, weight, past)

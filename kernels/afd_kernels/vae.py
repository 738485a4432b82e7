"""Triton kernel of Wan's VAE: RMS norm over the channels and SiLU, written behind the frames of the call before.

A tile is a few neighbouring pixels of one frame with all their channels; every tensor is read and written once.
Arithmetic in float32, rounded to the tensors' dtype where diffusers rounds. Any layout whose pixels have one stride is
read in place; accesses are wide where channels are innermost (channels_last_3d), which is how the decoder runs.

Legend: B samples, C channels, F frames, H x W pixels, P pixels per tile; i_ index, o_ offset, m_ mask.
"""

import torch
import triton
import triton.language as tl

from afd_kernels._launch import launch, on

TILE = 4096  # elements, padding of the channels included


@triton.jit
def norm_silu_kernel(
    X, WEIGHT, PAST, OUT, KEPT,
    C, pixels, x_b, x_f, x_p, x_c, past_b, past_f, past_p, past_c, out_b, out_f, out_p, out_c, kept_b, kept_f, kept_c,
    frames, scale,
    HAS_PAST: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (tile, frame of OUT, sample). Frames 0 and 1 copy PAST, the last two go to KEPT too."""
    i_f = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    dtype: tl.constexpr = X.dtype.element_ty
    o_p = tl.program_id(0) * P + tl.arange(0, P)
    o_c = tl.arange(0, BLOCK)
    m = (o_p < pixels)[:, None] & (o_c < C)[None, :]
    if i_f < 2:
        y = tl.zeros((P, BLOCK), dtype)
        if HAS_PAST:
            PAST += i_b * past_b + i_f * past_f
            y = tl.load(PAST + o_p.to(tl.int64)[:, None] * past_p + o_c[None, :] * past_c, m, 0.0)
    else:
        X += i_b * x_b + (i_f - 2).to(tl.int64) * x_f
        x = tl.load(X + o_p.to(tl.int64)[:, None] * x_p + o_c[None, :] * x_c, m, 0.0).to(tl.float32)
        norm = tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)
        y = (x * (1 / norm)[:, None]).to(dtype).to(tl.float32)
        y = (y * scale).to(dtype).to(tl.float32)
        y = (y * tl.load(WEIGHT + o_c, o_c < C, 0.0).to(tl.float32)[None, :]).to(dtype).to(tl.float32)
        root = tl.rsqrt(1 + tl.exp(-y))  # a division costs eight instructions more
        y = (y * (root * root)).to(dtype)
    o = o_p.to(tl.int64)[:, None] * out_p + o_c[None, :] * out_c
    tl.store(OUT + i_b * out_b + i_f.to(tl.int64) * out_f + o, y, m)
    if i_f >= frames:
        o = o_p.to(tl.int64)[:, None] * out_p + o_c[None, :] * kept_c
        tl.store(KEPT + i_b * kept_b + (i_f - frames).to(tl.int64) * kept_f + o, y, m)


def _pixels(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it, whose pixels have one stride."""
    return x if x.stride(3) == x.shape[4] * x.stride(4) or x.shape[3] == 1 else x.contiguous()


def norm_silu(x, weight, past):
    """Launcher of the operator of this name. The outputs have x's layout."""
    form = torch.channels_last_3d if x.stride(1) == 1 else torch.contiguous_format
    x = _pixels(x)
    batch, channels, frames, height, width = x.shape

    def new(count):
        shape = (batch, channels, count, height, width)
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)

    out, kept = new(frames + 2), new(2)
    past_ = x if past is None else _pixels(past)
    if kept.numel():
        block = triton.next_power_of_2(channels)
        tile = max(TILE // block, 1)
        strides = [(a.stride(0), a.stride(2), a.stride(4), a.stride(1)) for a in (x, past_, out)]
        with on(x):
            launch(
                norm_silu_kernel, (triton.cdiv(height * width, tile), frames + 2, batch),
                (x, weight, past_, out, kept),
                (channels, height * width, *strides[0], *strides[1], *strides[2], kept.stride(0), kept.stride(2),
                 kept.stride(1), frames, channels**0.5),
                HAS_PAST=past is not None, P=tile, BLOCK=block, num_warps=4,
            )  # fmt: skip
    return out, kept

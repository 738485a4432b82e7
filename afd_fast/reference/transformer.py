"""The equations of Wan's transformer block: norms with modulation, RMSNorm + 3-D RoPE, who attends to whom.

Sources: Wan2.1 `wan/modules/model.py`, Self-Forcing `wan/modules/causal_model.py` (lines refer to 33593df).
`official_rounding=True` rounds every intermediate to the tensors' dtype, as those files do in bfloat16;
False keeps float32 inside and rounds once at the store. In float32 and float64 the two agree to rounding.

Legend: B samples, F frames, N tokens per frame, L = F N tokens, D width, H heads, d = D / H.
"""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROPE_THETA = 10000.0


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, official_rounding: bool = True) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; officially rounded before the weight (model.py:70-86)."""
    wide = _wide(x)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return y.to(x.dtype) * weight if official_rounding else (y * _wide(weight)).to(x.dtype)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x (1 + scale) + shift. x: [B, L, D]; scale, shift: [B|1, F|1, D], one row for all N tokens of a frame."""
    return (x.unflatten(1, (scale.shape[1], -1)) * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)


def norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6, official_rounding: bool = True
) -> Tensor:
    """LayerNorm without affine, then `modulate` (causal_model.py:306-310). Shapes as there; returns [B, L, D]."""
    if official_rounding:
        return modulate(F.layer_norm(x, x.shape[-1:], eps=eps), scale, shift)
    return modulate(F.layer_norm(_wide(x), x.shape[-1:], eps=eps), _wide(scale), _wide(shift)).to(x.dtype)


def residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-6,
    official_rounding: bool = True,
) -> tuple[Tensor, Tensor]:
    """The residual stream and the next sub-layer's input: x' = x + gate y and LayerNorm(x') with either an
    affine (weight, bias [D]) or a modulation (scale, shift [B|1, F|1, D]); causal_model.py:312-335.

    x, y: [B, L, D]; gate: [B|1, F|1, D] or None for 1. Returns (x', normed), both [B, L, D].
    x' is rounded to x's dtype before it is normalised in either mode: it is what the next layer reads.
    """
    dtype = x.dtype
    if not official_rounding:
        x, y = _wide(x), _wide(y)
        gate, weight, bias, scale, shift = (None if a is None else _wide(a) for a in (gate, weight, bias, scale, shift))
    if gate is not None:
        y = (y.unflatten(1, (gate.shape[1], -1)) * gate[:, :, None]).flatten(1, 2)
    x = (x + y).to(dtype)
    normed = F.layer_norm(x if official_rounding else _wide(x), x.shape[-1:], weight, bias, eps)
    if scale is not None and shift is not None:
        normed = modulate(normed, scale, shift)
    return x, normed.to(dtype)


class RopeTables(NamedTuple):
    """The rotations of L tokens."""

    cos: Tensor  # [L, d / 2]
    sin: Tensor  # [L, d / 2]


def rope_tables(
    head_dim: int, frames: tuple[int, int], height: int, width: int, *, dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> RopeTables:  # fmt: skip
    """Cosines and sines [L, d / 2] of 3-D RoPE for frames [first, end) of height x width tokens.

    The d / 2 complex pairs are split in time, height, width = d/2 - 2 (d // 6), d // 6, d // 6 (for d = 128:
    22, 21, 21), each with separate geometric frequencies (causal_model.py:27-55, 482-487). Angles in float64;
    positions are absolute and not bounded by a table (Wan's has 1024 entries).
    """
    third = head_dim // 6
    parts = []
    for pairs, positions in (
        (head_dim // 2 - 2 * third, torch.arange(*frames)),
        (third, torch.arange(height)),
        (third, torch.arange(width)),
    ):
        frequency = ROPE_THETA ** -(torch.arange(pairs, dtype=torch.float64) / max(pairs, 1))
        parts.append(torch.outer(positions.double(), frequency))
    count = frames[1] - frames[0]
    angle = torch.cat(
        [
            parts[0][:, None, None].expand(count, height, width, -1),
            parts[1][None, :, None].expand(count, height, width, -1),
            parts[2][None, None, :].expand(count, height, width, -1),
        ],
        -1,
    ).flatten(0, 2)
    return RopeTables(angle.cos().to(device, dtype), angle.sin().to(device, dtype))


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[2i], x[2i+1]). x: [B, L, H, d]; cos, sin: [L, d / 2], the precision of the arithmetic."""
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-6,
    official_rounding: bool = True,
) -> tuple[Tensor, Tensor]:
    """RMSNorm over the full width, before the split in heads, then RoPE. q, k: [B, L, D] -> [B, L, H, d]."""

    def one(x: Tensor, weight: Tensor) -> Tensor:
        wide = x if official_rounding else _wide(x)
        normed = rms_norm(wide, weight if official_rounding else _wide(weight), eps=eps)
        return apply_rope(normed.unflatten(-1, (-1, 2 * cos.shape[-1])), cos, sin).to(x.dtype)

    return one(q, weight_q), one(k, weight_k)


def residual_norm_backward(
    x: Tensor, grad_x: Tensor | None, grad_normed: Tensor, gate: Tensor | None, weight: Tensor | None,
    scale: Tensor | None, *, eps: float = 1e-6, official_rounding: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of `residual_norm`'s x and y, [B, L, D] each, from those of its results; x is its x'. Computed in float32
    and rounded once. Without a scale or a weight the norm has none."""
    wide = _wide(x)
    centred = wide - wide.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normed, g = centred * rstd, _wide(grad_normed)
    if weight is not None:
        g = g * _wide(weight)
    if scale is not None:
        factor = _wide(1 + scale if official_rounding else 1 + _wide(scale))
        g = (g.unflatten(1, (scale.shape[1], -1)) * factor[:, :, None]).flatten(1, 2)
    g = rstd * (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True))
    if grad_x is not None:
        g = g + _wide(grad_x)
    if gate is None:
        return g.to(x.dtype), g.to(x.dtype)
    return g.to(x.dtype), (g.unflatten(1, (gate.shape[1], -1)) * _wide(gate)[:, :, None]).flatten(1, 2).to(x.dtype)


def rms_norm_backward(x: Tensor, grad: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    """The gradient of `rms_norm`'s x, in float32 and rounded once."""
    wide, g = _wide(x), _wide(grad) * _wide(weight)
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (r * (g - wide * (r * r * (g * wide).mean(-1, keepdim=True)))).to(x.dtype)


def qk_norm_rope_backward(
    q: Tensor, k: Tensor, grad_q: Tensor, grad_k: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor,
    *, eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of `qk_norm_rope`'s q and k [B, L, D] from those of its results [B, L, H, d]: turned back, then the norm's."""

    def one(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
        turned = apply_rope(_wide(grad), cos, -sin).flatten(2)
        return rms_norm_backward(x, turned, weight, eps=eps)

    return one(q, grad_q, weight_q), one(k, grad_k, weight_k)


def ring_slot(frame: int, window: int | None, sink: int) -> int:
    """Cache slot of an absolute frame: sink frames stay, the others rotate through the remaining slots."""
    if window is None or frame < sink:
        return frame
    return sink + (frame - sink) % (window - sink)


def visible_frames(end: int, window: int | None = None, sink: int = 0) -> list[tuple[int, int]]:
    """Frame ranges that a block ending before frame `end` attends to, itself included, ascending:
    everything, or the first `sink` frames and the latest window - sink (causal_model.py:202-222, 539)."""
    if window is None or end <= window:
        return [(0, end)]
    recent = (end - (window - sink), end)
    return [(0, sink), recent] if sink else [recent]


def split_blocks(
    frames: int, chunk: int | tuple[int, ...], independent_first_frame: bool = False
) -> list[tuple[int, int]]:
    """Frame ranges of the blocks that are generated together: `chunk` frames each (a first block of one frame with
    `independent_first_frame`), or the sizes of a tuple. Raises ValueError when they do not fill `frames`."""
    if isinstance(chunk, int):
        first = 1 if independent_first_frame else 0
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        if frames < 1 or (frames - first) % chunk:
            note = " after the independent first" if first else ""
            few = first + max((frames - first) // chunk, 1) * chunk
            raise ValueError(f"{frames} frames do not divide into chunks of {chunk}{note}: {few} or {few + chunk} do")
        sizes = (1,) * first + (chunk,) * ((frames - first) // chunk)
    else:
        sizes = tuple(chunk)
        if sum(sizes) != frames or min(sizes, default=0) < 1:
            raise ValueError(f"block sizes {sizes} do not add up to {frames} frames")
    starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return list(itertools.pairwise(starts))


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d)) v and its log-sum-exp. q: [B, Lq, H, d]; k, v: [B, Lk, H, d]; returns
    ([B, Lq, H, d], [B, H, Lq]). The definition, quadratic in memory."""
    scores = torch.einsum("bqhd,bkhd->bhqk", _wide(q), _wide(k)) * q.shape[-1] ** -0.5
    lse = scores.logsumexp(-1)
    return torch.einsum("bhqk,bkhd->bqhd", (scores - lse[..., None]).exp(), _wide(v)).to(q.dtype), lse

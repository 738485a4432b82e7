"""Fused operators of Wan's block: `norm_modulate`, `residual_norm`, `rms_norm`, `qk_norm_rope`, `qk_norm_rope_write`.

On CUDA each is one Triton kernel (kernels/afd_kernels/transformer.py), on CPU the reference. They are forward
operators for the rollout: where a gradient is wanted, and inside a transform of torch.func, the public function runs
the reference itself, which autograd differentiates and torch.compile fuses.

Legend: B samples, F frames, N tokens per frame, L = F N tokens, D width, H heads, d = D / H.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from afd_fast.ops._register import Implementation, operator
from afd_fast.reference import transformer as reference
from afd_fast.reference.transforms import is_tracked


def _operator(schema: str, cpu: Implementation, fake: Implementation) -> Implementation:
    """The launcher has the operator's name; it takes float64 too."""
    name = schema.split("(", 1)[0]
    return operator(schema, cpu=cpu, cuda=f"transformer:{name}", fake=fake, float64_kernel=True)


def _check_rows(name: str, x: Tensor, *rows: Tensor | None) -> None:
    for row in rows:
        if row is None:
            continue
        if row.ndim != 3 or row.shape[0] not in (1, x.shape[0]) or row.shape[2] != x.shape[2]:
            raise ValueError(
                f"{name}: modulation {tuple(row.shape)} does not fit x {tuple(x.shape)}, expected [B|1, F|1, D]"
            )
        if x.shape[1] % row.shape[1]:
            raise ValueError(f"{name}: {x.shape[1]} tokens do not divide into {row.shape[1]} frames")


def _heads(q: Tensor, cos: Tensor) -> tuple[int, ...]:
    return (*q.shape[:2], q.shape[2] // (2 * cos.shape[1]), 2 * cos.shape[1])


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _norm_modulate_cpu(x: Tensor, scale: Tensor, shift: Tensor, eps: float, official: bool) -> Tensor:
    return reference.norm_modulate(x, scale, shift, eps=eps, official_rounding=official)


def _norm_modulate_fake(x: Tensor, *_: Any) -> Tensor:
    return _like(x)


def _residual_norm_cpu(*args: Any) -> tuple[Tensor, Tensor]:
    x, y, gate, weight, bias, scale, shift, eps, official = args
    return reference.residual_norm(
        x, y, gate, weight=weight, bias=bias, scale=scale, shift=shift, eps=eps, official_rounding=official
    )


def _residual_norm_fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like(x), _like(x)


def _rms_norm_cpu(x: Tensor, weight: Tensor, eps: float, official: bool) -> Tensor:
    return reference.rms_norm(x, weight, eps=eps, official_rounding=official)


def _rms_norm_fake(x: Tensor, *_: Any) -> Tensor:
    return _like(x)


def _qk_norm_rope_cpu(*args: Any) -> tuple[Tensor, Tensor]:
    *tensors, eps, official = args
    return reference.qk_norm_rope(*tensors, eps=eps, official_rounding=official)


def _qk_norm_rope_fake(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(_heads(q, cos)), k.new_empty(_heads(k, cos))


def _slot_runs(frames: int, start_frame: int, window: int, sink: int) -> list[tuple[slice, slice]]:
    """(frames of the block, slots of the cache) per run of neighbouring slots: one run, two when the ring wraps."""
    slots = [reference.ring_slot(start_frame + f, window or None, sink) for f in range(frames)]
    cuts = [0, *(f for f in range(1, frames) if slots[f] != slots[f - 1] + 1), *([frames] if frames else [])]
    return [(slice(a, b), slice(slots[a], slots[b - 1] + 1)) for a, b in itertools.pairwise(cuts)]


def _write_cpu(*args: Any) -> Tensor:
    q, k, v, wq, wk, cos, sin, k_cache, v_cache, tokens, start_frame, window, sink, eps, official = args
    q, k = reference.qk_norm_rope(q, k, wq, wk, cos, sin, eps=eps, official_rounding=official)
    for frames, slots in _slot_runs(k.shape[1] // tokens, start_frame, window, sink):
        source = slice(frames.start * tokens, frames.stop * tokens)
        target = slice(slots.start * tokens, slots.stop * tokens)
        k_cache[:, target] = k[:, source]
        v_cache[:, target] = v.view(k.shape)[:, source]
    return q


def _write_fake(q: Tensor, k: Tensor, v: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, *_: Any) -> Tensor:
    return q.new_empty(_heads(q, cos))


_norm_modulate = _operator(
    "norm_modulate(Tensor x, Tensor scale, Tensor shift, float eps, bool official) -> Tensor",
    _norm_modulate_cpu,
    _norm_modulate_fake,
)
_residual_norm = _operator(
    "residual_norm(Tensor x, Tensor y, Tensor? gate, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, "
    "float eps, bool official) -> (Tensor, Tensor)",
    _residual_norm_cpu,
    _residual_norm_fake,
)
_rms_norm = _operator(
    "rms_norm(Tensor x, Tensor weight, float eps, bool official) -> Tensor", _rms_norm_cpu, _rms_norm_fake
)
_qk_norm_rope = _operator(
    "qk_norm_rope(Tensor q, Tensor k, Tensor weight_q, Tensor weight_k, Tensor cos, Tensor sin, float eps, "
    "bool official) -> (Tensor, Tensor)",
    _qk_norm_rope_cpu,
    _qk_norm_rope_fake,
)
_qk_norm_rope_write = _operator(
    "qk_norm_rope_write(Tensor q, Tensor k, Tensor v, Tensor weight_q, Tensor weight_k, Tensor cos, Tensor sin, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, int tokens, int start_frame, int window, int sink, float eps, "
    "bool official) -> Tensor",
    _write_cpu,
    _write_fake,
)


def norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6, official_rounding: bool = True
) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift. x: [B, L, D]; scale, shift: [B|1, F|1, D]. See the reference."""
    _check_rows("norm_modulate", x, scale, shift)
    if is_tracked(x, scale, shift):
        return reference.norm_modulate(x, scale, shift, eps=eps, official_rounding=official_rounding)
    return _norm_modulate(x, scale, shift, eps, official_rounding)


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
    """x' = x + gate y and its LayerNorm with an affine or a modulation, in one pass. See the reference.

    Raises ValueError unless exactly one of (weight, bias) and (scale, shift) is given, and for shapes.
    """
    if (
        ((weight is None) != (bias is None))
        or ((scale is None) != (shift is None))
        or (weight is None) == (scale is None)
    ):
        raise ValueError("residual_norm needs either weight and bias or scale and shift")
    if x.shape != y.shape:
        raise ValueError(f"residual_norm: x {tuple(x.shape)} and y {tuple(y.shape)} differ")
    _check_rows("residual_norm", x, gate, scale, shift)
    if is_tracked(x, y, gate, weight, bias, scale, shift):
        return _residual_norm_cpu(x, y, gate, weight, bias, scale, shift, eps, official_rounding)
    return _residual_norm(x, y, gate, weight, bias, scale, shift, eps, official_rounding)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, official_rounding: bool = True) -> Tensor:
    """x / rms(x) * weight over the last axis. See the reference."""
    if is_tracked(x, weight):
        return reference.rms_norm(x, weight, eps=eps, official_rounding=official_rounding)
    return _rms_norm(x, weight, eps, official_rounding)


def qk_norm_rope(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor,
    *, eps: float = 1e-6, official_rounding: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """RMSNorm and RoPE of q and k [B, L, D] -> [B, L, H, d]. cos, sin: [L, d / 2]. See the reference."""
    if is_tracked(q, k, weight_q, weight_k):
        return reference.qk_norm_rope(q, k, weight_q, weight_k, cos, sin, eps=eps, official_rounding=official_rounding)
    return _qk_norm_rope(q, k, weight_q, weight_k, cos, sin, eps, official_rounding)


def qk_norm_rope_write(
    q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor,
    k_cache: Tensor, v_cache: Tensor,
    *, tokens: int, start_frame: int, window: int | None = None, sink: int = 0,
    eps: float = 1e-6, official_rounding: bool = True,
) -> Tensor:  # fmt: skip
    """`qk_norm_rope`, with keys and values written straight into the cache; returns the roped queries [B, L, H, d].

    q, k, v: [B, L, D], L = F tokens; k_cache, v_cache: [B, slots * tokens, H, d], last two axes contiguous.
    Frame f goes to slot `ring_slot(f, window, sink)`. No gradient: call it under no_grad.
    """
    if is_tracked(q, k, v):
        raise RuntimeError(
            "qk_norm_rope_write writes in place and has no gradient: call it under torch.no_grad(), outside torch.func"
        )
    return _qk_norm_rope_write(
        q, k, v, weight_q, weight_k, cos, sin, k_cache, v_cache,
        tokens, start_frame, window or 0, sink, eps, official_rounding,
    )  # fmt: skip

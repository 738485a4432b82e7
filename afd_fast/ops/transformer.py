"""Fused operators of Wan's block: `norm_modulate`, `residual_norm`, `rms_norm`, `qk_norm_rope`, `qk_norm_rope_write`.

On CUDA each is one Triton kernel (kernels/afd_kernels/transformer.py), on CPU the reference. Where a gradient is wanted
the public function runs the reference itself on the CPU and inside a transform of torch.func. On CUDA the gradient of
the activations is one kernel too; those of weights and modulations are sums over what it gives.

Legend: B samples, F frames, N tokens per frame, L = F N tokens, D width, H heads, d = D / H.
"""

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from afd_fast.ops._register import Implementation, operator
from afd_fast.reference import transformer as reference
from afd_fast.reference.transforms import is_tracked, under_func


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


def _residual_norm_backward_cpu(*args: Any) -> tuple[Tensor, Tensor]:
    x, grad_x, grad_out, gate, weight, scale, eps, official = args
    dx, dy = reference.residual_norm_backward(
        x, grad_x, grad_out, gate, weight, scale, eps=eps, official_rounding=official
    )
    return dx, dy if gate is not None else x.new_empty(0)


def _residual_norm_backward_fake(x: Tensor, dx: Any, do: Any, gate: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return _like(x), _like(x) if gate is not None else x.new_empty(0)


def _rms_norm_backward_cpu(x: Tensor, grad: Tensor, weight: Tensor, eps: float) -> Tensor:
    return reference.rms_norm_backward(x, grad, weight, eps=eps)


def _qk_norm_rope_backward_cpu(*args: Any) -> tuple[Tensor, Tensor]:
    *tensors, eps = args
    return reference.qk_norm_rope_backward(*tensors, eps=eps)


def _qk_norm_rope_backward_fake(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like(q), _like(k)


_residual_norm_backward = _operator(
    "residual_norm_backward(Tensor x, Tensor? grad_x, Tensor grad_normed, Tensor? gate, Tensor? weight, Tensor? scale, "
    "float eps, bool official) -> (Tensor, Tensor)",
    _residual_norm_backward_cpu,
    _residual_norm_backward_fake,
)
_rms_norm_backward = _operator(
    "rms_norm_backward(Tensor x, Tensor grad, Tensor weight, float eps) -> Tensor",
    _rms_norm_backward_cpu,
    _rms_norm_fake,
)
_qk_norm_rope_backward = _operator(
    "qk_norm_rope_backward(Tensor q, Tensor k, Tensor grad_q, Tensor grad_k, Tensor weight_q, Tensor weight_k, "
    "Tensor cos, Tensor sin, float eps) -> (Tensor, Tensor)",
    _qk_norm_rope_backward_cpu,
    _qk_norm_rope_backward_fake,
)


def _summed(a: Tensor, row: Tensor) -> Tensor:
    """a [B, L, D], summed in at least float32 to the shape of a weight [D] or a modulation [B|1, F|1, D], in its dtype."""
    wide = torch.promote_types(a.dtype, torch.float32)
    if row.ndim == 1:
        return a.sum((0, 1), dtype=wide).to(row.dtype)
    return a.unflatten(1, (row.shape[1], -1)).sum(2, dtype=wide).sum_to_size(row.shape).to(row.dtype)


def _normed(x: Tensor, eps: float, official: bool) -> Tensor:
    """LayerNorm(x) alone, as it is rounded before a modulation."""
    zero = torch.zeros(1, 1, x.shape[-1], dtype=x.dtype, device=x.device)
    return _norm_modulate(x, zero, zero, eps, official)


def _rms_normed(x: Tensor, eps: float, official: bool) -> Tensor:
    return _rms_norm(x, torch.ones(x.shape[-1], dtype=x.dtype, device=x.device), eps, official)


class ResidualNorm(torch.autograd.Function):
    """`residual_norm` with its gradients."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        _, y, gate, weight, bias, scale, shift, *ctx.settings = args
        stream, normed = _residual_norm(*args)
        needs = ctx.needs_input_grad
        ctx.save_for_backward(stream, y if needs[2] else None, gate, weight, bias, scale, shift)
        ctx.set_materialize_grads(False)
        return stream, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor | None, grad_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        x, y, gate, weight, bias, scale, shift = ctx.saved_tensors
        if grad_normed is None:
            grad_normed = torch.zeros_like(x)
        dx, dy = _residual_norm_backward(x, grad_x, grad_normed, gate, weight, scale, *ctx.settings)
        of_gate, *of_rows = ctx.needs_input_grad[2:7]  # weight, bias, scale, shift
        factors = grad_normed * _normed(x, *ctx.settings) if of_rows[0] or of_rows[2] else grad_normed
        rows = zip((factors, grad_normed) * 2, (weight, bias, scale, shift), of_rows)
        sums = (_summed(a, row) if wanted else None for a, row, wanted in rows)
        return dx, dx if gate is None else dy, _summed(dx * y, gate) if of_gate else None, *sums, None, None


class NormModulate(torch.autograd.Function):
    """`norm_modulate` with its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, *settings: Any) -> Tensor:
        ctx.settings = settings
        ctx.save_for_backward(x, scale, shift)
        return _norm_modulate(x, scale, shift, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift = ctx.saved_tensors
        _, of_scale, of_shift, *_ = ctx.needs_input_grad
        dx = _residual_norm_backward(x, None, grad, None, None, scale, *ctx.settings)[0]
        ds = _summed(grad * _normed(x, *ctx.settings), scale) if of_scale else None
        return dx, ds, _summed(grad, shift) if of_shift else None, None, None


class RMSNorm(torch.autograd.Function):
    """`rms_norm` with its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, official: bool) -> Tensor:
        ctx.settings = eps, official
        ctx.save_for_backward(x, weight)
        return _rms_norm(x, weight, eps, official)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dw = None
        if ctx.needs_input_grad[1]:
            dw = _summed((grad * _rms_normed(x, *ctx.settings)).reshape(1, -1, x.shape[-1]), weight)
        return _rms_norm_backward(x, grad, weight, ctx.settings[0]), dw, None, None


class QKNormRope(torch.autograd.Function):
    """`qk_norm_rope` with its gradients."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *tensors, eps, official = args
        ctx.settings = eps, official
        ctx.save_for_backward(*tensors)
        return _qk_norm_rope(*args)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        q, k, wq, wk, cos, sin = ctx.saved_tensors
        weights: list[Tensor | None] = [None, None]
        for i, (x, grad, weight) in enumerate(((q, grad_q, wq), (k, grad_k, wk))):
            if ctx.needs_input_grad[2 + i]:
                turned = reference.apply_rope(grad, cos, -sin).flatten(2)
                weights[i] = _summed(turned * _rms_normed(x, *ctx.settings), weight)
        dq, dk = _qk_norm_rope_backward(q, k, grad_q, grad_k, wq, wk, cos, sin, ctx.settings[0])
        return dq, dk, *weights, *(None,) * 4


def _fused(x: Tensor) -> bool:
    """Whether the gradient is a kernel's: on CUDA, and on the meta device, which stands in for it."""
    return x.device.type != "cpu" and not under_func()


def norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6, official_rounding: bool = True
) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift. x: [B, L, D]; scale, shift: [B|1, F|1, D]. See the reference."""
    _check_rows("norm_modulate", x, scale, shift)
    if is_tracked(x, scale, shift):
        if _fused(x):
            return NormModulate.apply(x, scale, shift, eps, official_rounding)
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
        if _fused(x):
            return ResidualNorm.apply(x, y, gate, weight, bias, scale, shift, eps, official_rounding)
        return _residual_norm_cpu(x, y, gate, weight, bias, scale, shift, eps, official_rounding)
    return _residual_norm(x, y, gate, weight, bias, scale, shift, eps, official_rounding)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, official_rounding: bool = True) -> Tensor:
    """x / rms(x) * weight over the last axis. See the reference."""
    if is_tracked(x, weight):
        if _fused(x):
            return RMSNorm.apply(x, weight, eps, official_rounding)
        return reference.rms_norm(x, weight, eps=eps, official_rounding=official_rounding)
    return _rms_norm(x, weight, eps, official_rounding)


def qk_norm_rope(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor,
    *, eps: float = 1e-6, official_rounding: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """RMSNorm and RoPE of q and k [B, L, D] -> [B, L, H, d]. cos, sin: [L, d / 2]. See the reference."""
    if is_tracked(q, k, weight_q, weight_k):
        if _fused(q):
            return QKNormRope.apply(q, k, weight_q, weight_k, cos, sin, eps, official_rounding)
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

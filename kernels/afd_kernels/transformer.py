"""Triton kernels of Wan's block: residual + gate + LayerNorm + modulation, RMSNorm, RMSNorm + RoPE + cache write.

One program handles one token's row; every tensor is read and written once. Arithmetic in float32 (float64 for
float64 tensors). OFFICIAL rounds each intermediate to the tensors' dtype, as the official bfloat16 code does.
A row of modulation (scale, shift, gate [B|1, F|1, D]) is found through strides that are 0 for size 1.

Legend: B samples, L tokens per sample, N tokens per frame, D width, d head width; i_ index, o_ offset, m_ mask.
"""

import torch
import triton
import triton.language as tl

from afd_kernels._launch import launch, on


@triton.jit
def _sample_token(L):
    """(sample, token) of this program's row; divided in 32 bits, which is enough, and returned in 64."""
    row = tl.program_id(0)
    return (row // L).to(tl.int64), (row % L).to(tl.int64)


@triton.jit
def _round(x, dtype: tl.constexpr, official: tl.constexpr):
    """Through the storage dtype and back, when the official roundings are wanted."""
    if official:
        x = x.to(dtype).to(x.dtype)
    return x


@triton.jit(do_not_specialize=["L", "gate_n", "scale_n"])
def residual_norm_kernel(
    X, Y, GATE, WEIGHT, BIAS, SCALE, SHIFT, X_OUT, OUT,
    L, D, x_b, x_l, y_b, y_l, gate_b, gate_f, gate_n, scale_b, scale_f, scale_n, shift_b, shift_f, eps,
    HAS_Y: tl.constexpr, HAS_GATE: tl.constexpr, AFFINE: tl.constexpr, OFFICIAL: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x' = x + gate y (HAS_Y), then LayerNorm(x') with weight and bias (AFFINE) or (1 + scale), shift."""
    row = tl.program_id(0).to(tl.int64)
    i_b, i_l = _sample_token(L)
    o = tl.arange(0, BLOCK)
    m = o < D
    dtype: tl.constexpr = X.dtype.element_ty
    x = tl.load(X + i_b * x_b + i_l * x_l + o, m, 0.0).to(WIDE)
    if HAS_Y:
        y = tl.load(Y + i_b * y_b + i_l * y_l + o, m, 0.0).to(WIDE)
        if HAS_GATE:
            gate = tl.load(GATE + i_b * gate_b + (i_l.to(tl.int32) // gate_n) * gate_f + o, m, 0.0).to(WIDE)
            y = _round(y * gate, dtype, OFFICIAL)
        x = (x + y).to(dtype)
        tl.store(X_OUT + row * D + o, x, m)
        x = x.to(WIDE)
    mean = tl.sum(x, 0) / D
    centred = tl.where(m, x - mean, 0.0)
    normed = centred * (1 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps))
    if AFFINE:
        out = normed * tl.load(WEIGHT + o, m, 0.0).to(WIDE) + tl.load(BIAS + o, m, 0.0).to(WIDE)
    else:
        i_f = i_l.to(tl.int32) // scale_n
        scale = tl.load(SCALE + i_b * scale_b + i_f * scale_f + o, m, 0.0).to(WIDE)
        shift = tl.load(SHIFT + i_b * shift_b + i_f * shift_f + o, m, 0.0).to(WIDE)
        normed = _round(normed, dtype, OFFICIAL) * _round(1 + scale, dtype, OFFICIAL)
        out = _round(normed, dtype, OFFICIAL) + shift
    tl.store(OUT + row * D + o, out.to(dtype), m)


@triton.jit
def _rms_row(X, WEIGHT, D, eps, OFFICIAL: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """x / rms(x) * weight of the row at X, in the wide type."""
    o = tl.arange(0, BLOCK)
    m = o < D
    dtype: tl.constexpr = X.dtype.element_ty
    x = tl.load(X + o, m, 0.0).to(WIDE)
    normed = x * (1 / tl.sqrt(tl.sum(x * x, 0) / D + eps))
    return _round(_round(normed, dtype, OFFICIAL) * tl.load(WEIGHT + o, m, 0.0).to(WIDE), dtype, OFFICIAL)


@triton.jit(do_not_specialize=["L"])
def rms_norm_kernel(
    X, WEIGHT, OUT, L, D, x_b, x_l, eps, OFFICIAL: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """One row of x / rms(x) * weight."""
    row = tl.program_id(0).to(tl.int64)
    i_b, i_l = _sample_token(L)
    out = _rms_row(X + i_b * x_b + i_l * x_l, WEIGHT, D, eps, OFFICIAL, WIDE, BLOCK)
    o = tl.arange(0, BLOCK)
    tl.store(OUT + row * D + o, out.to(OUT.dtype.element_ty), o < D)


@triton.jit
def _rope_row(
    X, WEIGHT, COS, SIN, OUT, D, eps,
    HALF: tl.constexpr, OFFICIAL: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """RMSNorm of the row at X, pairs (2i, 2i + 1) rotated by COS, SIN [d / 2] of this token, stored at OUT."""
    even, odd = tl.split(tl.reshape(_rms_row(X, WEIGHT, D, eps, OFFICIAL, WIDE, BLOCK), (BLOCK // 2, 2)))
    o = tl.arange(0, BLOCK // 2)
    m = o < D // 2  # not 2 * o < D, whose steps the compiler cannot see to be contiguous
    cos = tl.load(COS + o % HALF, m, 0.0)
    sin = tl.load(SIN + o % HALF, m, 0.0)
    out = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (BLOCK,))
    o = tl.arange(0, BLOCK)
    tl.store(OUT + o, out.to(OUT.dtype.element_ty), o < D)


@triton.jit(do_not_specialize=["L", "tokens", "start_frame", "window", "sink"])
def qk_norm_rope_kernel(
    Q, K, V, WEIGHT_Q, WEIGHT_K, COS, SIN, Q_OUT, K_OUT, V_OUT,
    L, D, q_b, q_l, k_b, k_l, v_b, v_l, ko_b, ko_l, vo_b, vo_l, tokens, start_frame, window, sink, eps,
    HALF: tl.constexpr, OFFICIAL: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, role): role 0 normalises and ropes q, 1 the same for k into its cache slot, 2 copies v there."""
    row = tl.program_id(0).to(tl.int64)
    role = tl.program_id(1)
    i_b, i_l = _sample_token(L)
    i_t = i_l.to(tl.int32)
    frame = start_frame + i_t // tokens
    slot = frame
    if (window > 0) & (frame >= sink):
        slot = sink + (frame - sink) % tl.maximum(window - sink, 1)
    target = slot.to(tl.int64) * tokens + i_t % tokens
    COS += i_l * HALF
    SIN += i_l * HALF
    if role == 0:
        _rope_row(Q + i_b * q_b + i_l * q_l, WEIGHT_Q, COS, SIN, Q_OUT + row * D, D, eps, HALF, OFFICIAL, WIDE, BLOCK)
    elif role == 1:
        K_ROW = K_OUT + i_b * ko_b + target * ko_l
        _rope_row(K + i_b * k_b + i_l * k_l, WEIGHT_K, COS, SIN, K_ROW, D, eps, HALF, OFFICIAL, WIDE, BLOCK)
    else:
        o = tl.arange(0, BLOCK)
        v = tl.load(V + i_b * v_b + i_l * v_l + o, o < D)
        tl.store(V_OUT + i_b * vo_b + target * vo_l + o, v, o < D)


@triton.jit(do_not_specialize=["L", "gate_n", "scale_n"])
def residual_norm_backward_kernel(
    X, GRAD_X, GRAD_OUT, GATE, SCALE, X_GRAD, Y_GRAD,
    L, D, x_b, x_l, gx_b, gx_l, go_b, go_l, gate_b, gate_f, gate_n, scale_b, scale_f, scale_n, eps,
    HAS_X: tl.constexpr, HAS_GATE: tl.constexpr, AFFINE: tl.constexpr, OFFICIAL: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of x and y, from x' and the gradients of x' (HAS_X) and of its norm; SCALE is the affine's weight for AFFINE."""
    row = tl.program_id(0).to(tl.int64)
    i_b, i_l = _sample_token(L)
    i_t = i_l.to(tl.int32)
    o = tl.arange(0, BLOCK)
    m = o < D
    dtype: tl.constexpr = X.dtype.element_ty
    x = tl.load(X + i_b * x_b + i_l * x_l + o, m, 0.0).to(WIDE)
    centred = tl.where(m, x - tl.sum(x, 0) / D, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
    normed = centred * rstd
    factor = tl.load(SCALE + i_b * scale_b + (i_t // scale_n) * scale_f + o, m, 0.0).to(WIDE)
    if not AFFINE:
        factor = _round(1 + factor, dtype, OFFICIAL)
    g = tl.load(GRAD_OUT + i_b * go_b + i_l * go_l + o, m, 0.0).to(WIDE) * factor
    g = rstd * (g - tl.sum(g, 0) / D - normed * (tl.sum(g * normed, 0) / D))
    if HAS_X:
        g += tl.load(GRAD_X + i_b * gx_b + i_l * gx_l + o, m, 0.0).to(WIDE)
    tl.store(X_GRAD + row * D + o, g.to(dtype), m)
    if HAS_GATE:
        gate = tl.load(GATE + i_b * gate_b + (i_t // gate_n) * gate_f + o, m, 0.0).to(WIDE)
        tl.store(Y_GRAD + row * D + o, (g * gate).to(dtype), m)


@triton.jit
def _rms_backward_row(X, g, WEIGHT, OUT, D, eps, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of x, stored at OUT, from g of x / rms(x) * weight."""
    o = tl.arange(0, BLOCK)
    m = o < D
    x = tl.load(X + o, m, 0.0).to(WIDE)
    g = g * tl.load(WEIGHT + o, m, 0.0).to(WIDE)
    r = 1 / tl.sqrt(tl.sum(x * x, 0) / D + eps)
    g = r * (g - x * (r * r * (tl.sum(g * x, 0) / D)))
    tl.store(OUT + o, g.to(OUT.dtype.element_ty), m)


@triton.jit(do_not_specialize=["L"])
def rms_norm_backward_kernel(
    X, GRAD, WEIGHT, OUT, L, D, x_b, x_l, g_b, g_l, eps, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    i_b, i_l = _sample_token(L)
    o = tl.arange(0, BLOCK)
    g = tl.load(GRAD + i_b * g_b + i_l * g_l + o, o < D, 0.0).to(WIDE)
    _rms_backward_row(X + i_b * x_b + i_l * x_l, g, WEIGHT, OUT + row * D, D, eps, WIDE, BLOCK)


@triton.jit
def _turned_back(GRAD, COS, SIN, D, HALF: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The row of gradients at GRAD with the rotation taken out."""
    o = tl.arange(0, BLOCK)
    even, odd = tl.split(tl.reshape(tl.load(GRAD + o, o < D, 0.0).to(WIDE), (BLOCK // 2, 2)))
    o = tl.arange(0, BLOCK // 2)
    cos = tl.load(COS + o % HALF, o < D // 2, 0.0)
    sin = tl.load(SIN + o % HALF, o < D // 2, 0.0)
    return tl.reshape(tl.join(even * cos + odd * sin, odd * cos - even * sin), (BLOCK,))


@triton.jit(do_not_specialize=["L"])
def qk_norm_rope_backward_kernel(
    Q, K, GRAD_Q, GRAD_K, WEIGHT_Q, WEIGHT_K, COS, SIN, Q_OUT, K_OUT,
    L, D, q_b, q_l, k_b, k_l, gq_b, gq_l, gk_b, gk_l, eps, HALF: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, role): role 0 for q, 1 for k."""
    row = tl.program_id(0).to(tl.int64)
    i_b, i_l = _sample_token(L)
    COS += i_l * HALF
    SIN += i_l * HALF
    if tl.program_id(1) == 0:
        g = _turned_back(GRAD_Q + i_b * gq_b + i_l * gq_l, COS, SIN, D, HALF, WIDE, BLOCK)
        _rms_backward_row(Q + i_b * q_b + i_l * q_l, g, WEIGHT_Q, Q_OUT + row * D, D, eps, WIDE, BLOCK)
    else:
        g = _turned_back(GRAD_K + i_b * gk_b + i_l * gk_l, COS, SIN, D, HALF, WIDE, BLOCK)
        _rms_backward_row(K + i_b * k_b + i_l * k_l, g, WEIGHT_K, K_OUT + row * D, D, eps, WIDE, BLOCK)


def _sizes(x: torch.Tensor) -> dict:
    block = triton.next_power_of_2(x.shape[-1])
    wide = tl.float64 if x.dtype == torch.float64 else tl.float32
    return {"WIDE": wide, "BLOCK": max(block, 2), "num_warps": 4 if block <= 2048 else 8}


def _settings(x: torch.Tensor, official: bool) -> dict:
    return {"OFFICIAL": official, **_sizes(x)}


def _last_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _modulation(x: torch.Tensor, row: torch.Tensor | None):
    """(tensor, batch stride, frame stride, tokens per frame) of [B|1, F|1, D]."""
    if row is None:
        return x, 0, 0, 1
    row = _last_contiguous(row)
    return row, row.stride(0) * (row.shape[0] > 1), row.stride(1) * (row.shape[1] > 1), x.shape[1] // row.shape[1]


def _launch_norm(x, y, gate, weight, bias, scale, shift, eps, official):
    x, batch, length, width = _last_contiguous(x), *x.shape
    y_ = x if y is None else _last_contiguous(y)
    x_out = None if y is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return x_out, out
    gate_, gate_b, gate_f, gate_n = _modulation(x, gate)
    scale_, scale_b, scale_f, scale_n = _modulation(x, scale)
    shift_, shift_b, shift_f, shift_n = _modulation(x, shift)
    if scale_n != shift_n:
        raise ValueError(
            f"scale {tuple(scale.shape)} and shift {tuple(shift.shape)} must have the same number of frames"
        )
    with on(x):
        launch(
            residual_norm_kernel, (batch * length,),
            (x, y_, gate_, x if weight is None else weight, x if bias is None else bias, scale_, shift_,
             out if x_out is None else x_out, out),
            (length, width, x.stride(0), x.stride(1), y_.stride(0), y_.stride(1), gate_b, gate_f, gate_n,
             scale_b, scale_f, scale_n, shift_b, shift_f, eps),
            HAS_Y=y is not None, HAS_GATE=gate is not None, AFFINE=weight is not None, **_settings(x, official),
        )  # fmt: skip
    return x_out, out


def norm_modulate(x, scale, shift, eps, official):
    """Launcher of the operator of this name."""
    return _launch_norm(x, None, None, None, None, scale, shift, eps, official)[1]


def residual_norm(x, y, gate, weight, bias, scale, shift, eps, official):
    """Launcher of the operator of this name."""
    return _launch_norm(x, y, gate, weight, bias, scale, shift, eps, official)


def rms_norm(x, weight, eps, official):
    """Launcher of the operator of this name; any leading axes."""
    flat = _last_contiguous(x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1]))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        batch, length, width = flat.shape
        with on(x):
            launch(
                rms_norm_kernel, (batch * length,), (flat, weight, out), (length, width, flat.stride(0), flat.stride(1), eps),
                **_settings(x, official),
            )  # fmt: skip
    return out


def _launch_rope(q, k, v, weight_q, weight_k, cos, sin, k_out, v_out, tokens, start_frame, window, sink, eps, official):
    batch, length, width = q.shape
    half = cos.shape[1]
    q, k, cos, sin = _last_contiguous(q), _last_contiguous(k), cos.contiguous(), sin.contiguous()
    roles, v = (2, k) if v is None else (3, _last_contiguous(v))
    q_out = torch.empty((batch, length, width // (2 * half), 2 * half), dtype=q.dtype, device=q.device)
    for cache in (k_out, v_out):
        if cache.stride(-1) != 1 or cache.stride(-2) != 2 * half:
            raise ValueError(f"the cache's last two axes must be contiguous, got strides {cache.stride()}")
    if q_out.numel():
        with on(q):
            launch(
                qk_norm_rope_kernel, (batch * length, roles),
                (q, k, v, weight_q, weight_k, cos, sin, q_out, k_out, v_out),
                (length, width, q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
                 k_out.stride(0), k_out.stride(1), v_out.stride(0), v_out.stride(1), tokens, start_frame, window, sink, eps),
                HALF=half, **_settings(q, official),
            )  # fmt: skip
    return q_out


def qk_norm_rope(q, k, weight_q, weight_k, cos, sin, eps, official):
    """Launcher of the operator of this name."""
    half = cos.shape[1]
    k_out = torch.empty((*k.shape[:2], k.shape[2] // (2 * half), 2 * half), dtype=k.dtype, device=k.device)
    length = max(k.shape[1], 1)
    q_out = _launch_rope(q, k, None, weight_q, weight_k, cos, sin, k_out, k_out, length, 0, 0, 0, eps, official)
    return q_out, k_out


def qk_norm_rope_write(
    q, k, v, weight_q, weight_k, cos, sin, k_cache, v_cache, tokens, start_frame, window, sink, eps, official
):
    """Launcher of the operator of this name."""
    return _launch_rope(
        q, k, v, weight_q, weight_k, cos, sin, k_cache, v_cache, tokens, start_frame, window, sink, eps, official
    )


def residual_norm_backward(x, grad_x, grad_out, gate, weight, scale, eps, official):
    """Launcher of the operator of this name. Without a gate the second result is empty: it would equal the first."""
    x, grad_out = _last_contiguous(x), _last_contiguous(grad_out)
    grad_x_ = x if grad_x is None else _last_contiguous(grad_x)
    batch, length, width = x.shape
    x_grad = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y_grad = torch.empty(x.shape if gate is not None else (0,), dtype=x.dtype, device=x.device)
    if x_grad.numel():
        gate_, gate_b, gate_f, gate_n = _modulation(x, gate)
        scale_, scale_b, scale_f, scale_n = (weight, 0, 0, 1) if scale is None else _modulation(x, scale)
        with on(x):
            launch(
                residual_norm_backward_kernel, (batch * length,),
                (x, grad_x_, grad_out, gate_, scale_, x_grad, y_grad),
                (length, width, x.stride(0), x.stride(1), grad_x_.stride(0), grad_x_.stride(1), grad_out.stride(0),
                 grad_out.stride(1), gate_b, gate_f, gate_n, scale_b, scale_f, scale_n, eps),
                HAS_X=grad_x is not None, HAS_GATE=gate is not None, AFFINE=scale is None, **_settings(x, official),
            )  # fmt: skip
    return x_grad, y_grad


def rms_norm_backward(x, grad, weight, eps):
    """Launcher of the operator of this name; any leading axes."""
    flat, g = (_last_contiguous(a if a.ndim == 3 else a.reshape(1, -1, a.shape[-1])) for a in (x, grad))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        batch, length, width = flat.shape
        with on(x):
            launch(
                rms_norm_backward_kernel, (batch * length,),
                (flat, g, weight, out),
                (length, width, flat.stride(0), flat.stride(1), g.stride(0), g.stride(1), eps), **_sizes(x),
            )  # fmt: skip
    return out


def qk_norm_rope_backward(q, k, grad_q, grad_k, weight_q, weight_k, cos, sin, eps):
    """Launcher of the operator of this name."""
    batch, length, width = q.shape
    q, k, gq, gk = (_last_contiguous(a) for a in (q, k, grad_q.flatten(2), grad_k.flatten(2)))
    outs = [torch.empty(a.shape, dtype=a.dtype, device=a.device) for a in (q, k)]
    if q.numel():
        strides = [n for a in (q, k, gq, gk) for n in (a.stride(0), a.stride(1))]
        with on(q):
            launch(
                qk_norm_rope_backward_kernel, (batch * length, 2),
                (q, k, gq, gk, weight_q, weight_k, cos.contiguous(), sin.contiguous(), *outs), (length, width, *strides, eps),
                HALF=cos.shape[1], **_sizes(q),
            )  # fmt: skip
    return tuple(outs)

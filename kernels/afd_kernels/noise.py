"""Counter-based normal noise and x_t = (1 - t) x0 + t eps.

Philox4x32-10, counter (tile * 1024 + q, sample, 0, 0), key = seed; output k of a counter is element k * 1024 + q of
its 4096-element tile (neighbouring threads hold neighbouring elements of each quarter). Box-Muller uses IEEE
float32 + - * and a correctly rounded square root only, and the kernels are compiled without FMA contraction, so the
bits equal those of the PyTorch and C++ versions. tl.randn would cost a stack frame and twice the instructions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from afd_kernels._launch import WARPS, check_size, on, rows
from afd_kernels.layout import TILE


@triton.jit
def box_muller(a, b):
    """Two uint32 -> two normals."""
    u = a.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # (0, 1]
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    z = f * f
    p = 7.0376836292e-2 * f + -1.1514610310e-1  # Cephes logf
    p = p * f + 1.1676998740e-1
    p = p * f + -1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f + -1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f + -2.4999993993e-1
    p = p * f + 3.3333331174e-1
    e = exponent.to(tl.float32)
    y = p * f * z + e * -2.12194440e-4 - 0.5 * z
    log_u = (f + y) + e * 0.693359375
    s = -2.0 * log_u
    radius = tl.sqrt_rn(tl.where(s > 0.0, s, 0.0))
    word = b.to(tl.uint32, bitcast=True)
    quadrant = tl.add(word, 0x20000000, sanitize_overflow=False) >> 30  # the nearest quarter turn
    rest = tl.sub(word, quadrant << 30, sanitize_overflow=False).to(tl.int32, bitcast=True)
    x = rest.to(tl.float32) * 1.4629180792671596e-09  # radians in [-pi/4, pi/4]
    x2 = x * x
    sine = ((-1.9515295891e-4 * x2 + 8.3321608736e-3) * x2 + -1.6666654611e-1) * x2 * x + x
    cosine = (2.443315711809948e-5 * x2 + -1.388731625493765e-3) * x2 + 4.166664568298827e-2
    cosine = cosine * x2 * x2 + (1.0 - 0.5 * x2)
    odd = (quadrant & 1) != 0
    first = tl.where(odd, sine, cosine)
    second = tl.where(odd, cosine, sine)
    first = tl.where(((quadrant + 1) & 2) != 0, -first, first)
    second = tl.where((quadrant & 2) != 0, -second, second)
    return radius * first, radius * second


@triton.jit
def normal4(seed, tile, sample, q):
    """The four quarters of a noise tile at lanes q."""
    c0 = (tile * 1024 + q).to(tl.uint32)
    zero = c0 * 0
    a, b, c, d = tl.philox(seed, c0, zero + sample.to(tl.uint32), zero, zero, 10)
    e0, e1 = box_muller(a, b)
    e2, e3 = box_muller(c, d)
    return e0, e1, e2, e3


@triton.jit
def level(table, start, inner, frames, n, m, PER_FRAME: tl.constexpr):
    """t or sigma of the elements n of a tile; start: the tile's first element modulo the period of the frames."""
    if PER_FRAME:
        frame = ((start + n).to(tl.uint32) // inner.to(tl.uint32)) % frames.to(tl.uint32)  # a third cheaper unsigned
        return tl.load(table + frame, mask=m, other=1.0)
    else:
        return tl.load(table)


@triton.jit
def _noised(x0, y, out, table, e, n, left, start, inner, frames, SEED: tl.constexpr, PER_FRAME: tl.constexpr):
    m = n < left
    t = level(table, start, inner, frames, n, m, PER_FRAME)
    if SEED:
        eps = e
    else:
        eps = tl.load(y + n, mask=m, other=0.0).to(tl.float32)
    clean = tl.load(x0 + n, mask=m, other=0.0).to(tl.float32)
    x_t = (1.0 - t) * clean + t * eps
    tl.store(out + n, x_t.to(out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["seed"])
def forward_noise_kernel(
    x0_ptr, y_ptr, out_ptr, t_ptr, seed: tl.int64, count: tl.int64, x0_stride: tl.int64, y_stride: tl.int64,
    tiles: tl.int32, frames: tl.int32, inner: tl.int32, SEED: tl.constexpr, PER_FRAME: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    sample = (pid // tiles).to(tl.int64)
    tile = pid % tiles
    first = tile.to(tl.int64) * 4096
    left = count - first
    period = inner * frames
    start = 0
    if PER_FRAME:
        start = (first % period).to(tl.int32)
    x0 = x0_ptr + sample * x0_stride + first
    y = y_ptr + sample * y_stride + first
    out = out_ptr + sample * count + first
    table = t_ptr + sample * frames
    q = tl.arange(0, 1024)
    e0, e1, e2, e3 = 0.0, 0.0, 0.0, 0.0
    if SEED:
        e0, e1, e2, e3 = normal4(seed, tile, sample, q)
    _noised(x0, y, out, table, e0, q, left, start, inner, frames, SEED, PER_FRAME)
    _noised(x0, y, out, table, e1, q + 1024, left, start, inner, frames, SEED, PER_FRAME)
    _noised(x0, y, out, table, e2, q + 2048, left, start, inner, frames, SEED, PER_FRAME)
    _noised(x0, y, out, table, e3, q + 3072, left, start, inner, frames, SEED, PER_FRAME)


def forward_noise(x0: Tensor, t: Tensor, noise: Tensor | None, seed: int | None, inner: int) -> Tensor:
    """x0 [B, ...], t [B, F] float32; element n of a sample belongs to frame (n // inner) % F."""
    out = torch.empty(x0.shape, dtype=x0.dtype, device=x0.device)
    if x0.numel() == 0:
        return out
    count, frames = x0[0].numel(), t.shape[1]
    tiles = triton.cdiv(count, TILE)
    check_size(tiles * x0.shape[0], inner * frames)
    x0, x0_stride = rows(x0, x0)
    y, y_stride = rows(noise, x0)
    with on(x0):
        forward_noise_kernel[(tiles * x0.shape[0],)](
            x0, y, out, t, seed or 0, count, x0_stride, y_stride, tiles, frames, inner,
            SEED=noise is None, PER_FRAME=frames > 1, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return out

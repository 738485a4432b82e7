"""Counter-based normal noise and x_t = (1 - t) x0 + t eps.

Philox4x32-10, counter (tile * 1024 + q, sample, 0, 0), key = seed; output k of a counter is element k * 1024 + q of
its 4096-element tile (neighbouring threads hold neighbouring elements of each quarter). The bits equal those of the
PyTorch and C++ versions: Box-Muller from IEEE float32 + - * and a correctly rounded square root, compiled without
contraction. tl.fma stands only where the product is exact, so that one rounding is the two of the reference, and in
the square root. The kernels are bound by instructions, not by memory: test_compiles.py counts them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from afd_kernels._launch import WARPS, check_size, launch, on, rows
from afd_kernels.layout import TILE, Frames

ONE = tl.constexpr(Frames.ONE.value)
LONG = tl.constexpr(Frames.LONG.value)


@triton.jit
def widen(x):
    """x as float32. A bfloat16 by a shift: one instruction an element, where the conversion is one and a half."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def product(a, b: tl.constexpr):
    """(high, low) word of a times b. Written as a 64-bit product, LLVM makes two multiplications of most of them."""
    p = tl.inline_asm_elementwise("mul.wide.u32 $0, $1, $2;", "=l,r,r", [a, b], dtype=tl.uint64, is_pure=True, pack=1)
    return (p >> 32).to(tl.uint32), p.to(tl.uint32)


@triton.jit
def philox(c0, c1, seed):
    """Philox4x32-10 of the counters (c0, c1, 0, 0)."""
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    high, c3 = product(c0, 0xD2511F53)  # the other product of the first round is zero
    c0, c1, c2 = c1 ^ k0, c1 * 0, high ^ k1
    for _ in tl.static_range(9):
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
        h0, l0 = product(c0, 0xD2511F53)
        h1, l1 = product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
    return c0, c1, c2, c3


@triton.jit
def root(x):
    """Square root of x >= 0 that is 0 or normal: the instructions of sqrt.rn.f32 without its branches."""
    y = tl.rsqrt(tl.maximum(x, 1e-30))  # finite at 0
    r = x * y
    return tl.fma(tl.fma(-1.0 * r, r, x), 0.5 * y, r)


@triton.jit
def box_muller(a, b):
    """Two uint32 -> two normals. reference/noise.py with its powers of two moved into the constants, which rounds alike.

    With g = -2 f, p is P(f) / 4 times a power of -2 at every step, and -2 log u comes out without a product by -2.
    The sign of the second normal sits on the radius.
    """
    u = tl.fma(a.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)  # (0, 1]
    bits = u.to(tl.int32, bitcast=True)
    high = (bits - 0x3F3504F3) & -0x800000  # the exponent times 2^23
    g = tl.fma((bits - high).to(tl.float32, bitcast=True), -2.0, 2.0)  # -2 f
    z = g * g
    p = 7.0376836292e-2 / 1024 * g + 1.1514610310e-1 / 512  # Cephes logf
    p = p * g + 1.1676998740e-1 / 256
    p = p * g + 1.2420140846e-1 / 128
    p = p * g + 1.4249322787e-1 / 64
    p = p * g + 1.6668057665e-1 / 32
    p = p * g + 2.0000714765e-1 / 16
    p = p * g + 2.4999993993e-1 / 8
    p = p * g + 3.3333331174e-1 / 4
    e = high.to(tl.float32)
    y = p * g * z + e * (2.12194440e-4 / 4194304)
    radius = root(tl.fma(e, -0.693359375 / 4194304, g + tl.fma(z, 0.25, y)))
    turns = tl.add(b, 0x20000000, sanitize_overflow=False)  # its high two bits: the nearest quarter turn
    x = (b << 2).to(tl.int32, bitcast=True).to(tl.float32) * (1.4629180792671596e-09 / 4)  # radians in [-pi/4, pi/4]
    x2 = x * x
    sine = ((-1.9515295891e-4 * x2 + 8.3321608736e-3) * x2 + -1.6666654611e-1) * x2 * x + x
    cosine = (2.443315711809948e-5 * x2 + -1.388731625493765e-3) * x2 + 4.166664568298827e-2
    cosine = cosine * x2 * x2 + tl.fma(x2, -0.5, 1.0)
    odd = (turns & 0x40000000) != 0
    radius = (radius.to(tl.uint32, bitcast=True) ^ (turns & 0x80000000)).to(tl.float32, bitcast=True)
    return radius * tl.where(odd, -1.0 * sine, cosine), radius * tl.where(odd, cosine, sine)


@triton.jit
def normal4(seed, tile, sample, q, loaded):
    """The four quarters of a noise tile at lanes q, in the layout of `loaded`, a float32 tensor that comes from memory."""
    # A zero that only LLVM sees through: without it the noise is made in another layout and goes through shared memory.
    zero = ((loaded.to(tl.int32, bitcast=True) & 1) << 1) & 1
    a, b, c, d = philox((tile * 1024 + q + zero).to(tl.uint32), sample.to(tl.uint32), seed)
    e0, e1 = box_muller(a, b)
    e2, e3 = box_muller(c, d)
    return e0, e1, e2, e3


@triton.jit
def first_frame(tile, inner, frames, FRAMES: tl.constexpr):
    """(frame, elements since its start) of a tile's first element. SHORT: frame 0 of a period."""
    if FRAMES == ONE:
        return 0, 0
    elif FRAMES == LONG:  # in units of 8 elements: no 64-bit division
        start = tile.to(tl.uint32) * 512
        size = (inner >> 3).to(tl.uint32)
        frame = start // size
        return (frame % frames.to(tl.uint32)).to(tl.int32), ((start - frame * size) << 3).to(tl.int32)
    else:
        return 0, ((tile.to(tl.int64) * 4096) % (inner * frames)).to(tl.int32)


@triton.jit
def next_quarter(frame, since, inner, frames, FRAMES: tl.constexpr):
    """The same of the element 1024 further on."""
    if FRAMES == ONE:
        return frame, since
    since += 1024
    if FRAMES == LONG:
        over = since >= inner
        frame += over.to(tl.int32)
        return tl.where(frame == frames, 0, frame), tl.where(over, since - inner, since)
    else:
        return frame, since


@triton.jit
def level(table, frame, since, inner, frames, q, m, FRAMES: tl.constexpr):
    """t or sigma of a quarter, whose first element is `since` elements into `frame`. ONE: `table` is the value."""
    if FRAMES == ONE:
        return table
    elif FRAMES == LONG:  # a border at most, on a multiple of 8 elements
        following = tl.where(frame + 1 == frames, 0, frame + 1)
        return tl.where((q >> 3) < ((inner - since) >> 3), tl.load(table + frame), tl.load(table + following))
    else:
        n = ((since + q).to(tl.uint32) // inner.to(tl.uint32)) % frames.to(tl.uint32)  # a third cheaper unsigned
        return tl.load(table + n, mask=m, other=1.0)


@triton.jit
def _noised(clean, y, out, table, e, frame, since, n, left, q, inner, frames, SEED: tl.constexpr, FRAMES: tl.constexpr):
    m = n < left
    t = level(table, frame, since, inner, frames, q, m, FRAMES)
    if SEED:
        eps = e
    else:
        eps = widen(tl.load(y + n, mask=m, other=0.0))
    x_t = (1.0 - t) * clean + t * eps
    tl.store(out + n, x_t.to(out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["seed"])
def forward_noise_kernel(
    x0_ptr, y_ptr, out_ptr, t_ptr, seed: tl.int64, count: tl.int64, x0_stride: tl.int64, y_stride: tl.int64,
    tiles: tl.int32, frames: tl.int32, inner: tl.int32, SEED: tl.constexpr, FRAMES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    sample = (pid // tiles).to(tl.int64)
    tile = pid % tiles
    first = tile.to(tl.int64) * 4096
    left = count - first
    x0 = x0_ptr + sample * x0_stride + first
    y = y_ptr + sample * y_stride + first
    out = out_ptr + sample * count + first
    table = t_ptr + sample * frames
    if FRAMES == ONE:
        table = tl.load(table)
    q = tl.arange(0, 1024)
    clean = widen(tl.load(x0 + q, mask=q < left, other=0.0))
    e0, e1, e2, e3 = 0.0, 0.0, 0.0, 0.0
    if SEED:
        e0, e1, e2, e3 = normal4(seed, tile, sample, q, clean)
    frame, since = first_frame(tile, inner, frames, FRAMES)
    _noised(clean, y, out, table, e0, frame, since, q, left, q, inner, frames, SEED, FRAMES)
    for k in tl.static_range(1, 4):
        n = q + k * 1024
        e = e1 if k == 1 else e2 if k == 2 else e3
        frame, since = next_quarter(frame, since, inner, frames, FRAMES)
        clean = widen(tl.load(x0 + n, mask=n < left, other=0.0))
        _noised(clean, y, out, table, e, frame, since, n, left, q, inner, frames, SEED, FRAMES)


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
        launch(
            forward_noise_kernel, (tiles * x0.shape[0],),
            (x0, y, out, t), (seed or 0, count, x0_stride, y_stride, tiles, frames, inner),
            SEED=noise is None, FRAMES=Frames.of(frames, inner, tiles).value, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return out

"""Counter-based normal noise: element i of sample b is a function of (seed, b, i) alone.

Philox4x32-10 (Salmon et al., SC'11) with counter (tile * 1024 + q, sample, offset) and key = seed; the four
outputs of a counter are the elements k * 1024 + q of its 4096-element tile. Normals by Box-Muller built from
IEEE float32 +, -, * and a correctly rounded square root only, so that C++, Triton and CUDA reproduce the
bits. torch.sqrt in float32 is not rounded correctly on every CPU, hence the detour through float64.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

QUARTER = 1024  # a tile is four of these
MASK = 0xFFFFFFFF


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, key: int, rounds: int = 10) -> tuple[Tensor, ...]:
    """Philox4x32 on int64 tensors that hold uint32 values."""
    k0, k1 = key & MASK, (key >> 32) & MASK
    for _ in range(rounds):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wrap modulo 2**64; the high words come out right
        c0, c2 = ((p1 >> 32) ^ c1 ^ k0) & MASK, ((p0 >> 32) ^ c3 ^ k1) & MASK
        c1, c3 = p1 & MASK, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def _f(value: float) -> float:
    """The float32 nearest to value, as Python's float."""
    return float(np.float32(value))


# log(1 + f) - f + f^2 / 2 = f^3 P(f) (Cephes logf), highest power first
LOG = [7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
       -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1]  # fmt: skip


def box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two uint32 words (in int64) -> two float32 normals."""
    u = a.float() * _f(2.3283064365386963e-10) + _f(1.1641532182693481e-10)  # (0, 1]
    bits = u.view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    z = f * f
    p = torch.full_like(f, _f(LOG[0]))
    for coefficient in LOG[1:]:
        p = p * f + _f(coefficient)
    e = exponent.float()
    y = p * f * z + e * _f(-2.12194440e-4) - z * 0.5
    log_u = (f + y) + e * _f(0.693359375)
    s = log_u * -2.0
    radius = torch.where(s > 0.0, s, torch.zeros_like(s)).double().sqrt().float()
    quadrant = ((b + 0x20000000) & MASK) >> 30
    rest = b - (quadrant << 30)
    rest = torch.where(rest >= 1 << 31, rest - (1 << 32), rest)  # only quadrant 0 wraps
    x = rest.float() * _f(1.4629180792671596e-09)
    x2 = x * x
    sine = ((x2 * _f(-1.9515295891e-4) + _f(8.3321608736e-3)) * x2 + _f(-1.6666654611e-1)) * x2 * x + x
    cosine = (x2 * _f(2.443315711809948e-5) + _f(-1.388731625493765e-3)) * x2 + _f(4.166664568298827e-2)
    cosine = cosine * x2 * x2 + (1.0 - x2 * 0.5)
    odd = (quadrant & 1) != 0
    first, second = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    first = torch.where(((quadrant + 1) & 2) != 0, -first, first)
    second = torch.where((quadrant & 2) != 0, -second, second)
    return radius * first, radius * second


def _word(like: Tensor, value: int) -> Tensor:
    """A counter word with the same value everywhere."""
    return torch.full_like(like, value & MASK)


def normal_noise(
    shape: Sequence[int], seed: int, *, offset: int = 0, device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """Standard normals of `shape` [B, ...]. A word of the counter is the sample, so a batch can be split freely."""
    batch, count = shape[0], int(np.prod(shape[1:], dtype=np.int64))
    tiles = -(-count // (4 * QUARTER))
    out = torch.empty(batch, tiles, 4, QUARTER, dtype=dtype, device=device)
    for sample in range(batch):
        for tile in range(0, tiles, 64):  # bounded memory: the integer temporaries are 8 bytes wide
            n = min(64, tiles - tile)
            c0 = torch.arange(tile * QUARTER, (tile + n) * QUARTER, dtype=torch.int64, device=device)
            words = philox(c0, _word(c0, sample), _word(c0, offset), _word(c0, offset >> 32), seed)
            for k in (0, 2):
                pair = box_muller(words[k], words[k + 1])
                for j in (0, 1):
                    out[sample, tile : tile + n, k + j] = pair[j].view(n, QUARTER).to(dtype)
    return out.view(batch, -1)[:, :count].reshape(tuple(shape))

"""The end of nft.py's sums: tiles -> samples -> loss, statistics and the gradient's coefficients, in float64.

Two launches of a few programs, in a fixed order; slots and rows as in nft.py.
"""

import triton
import triton.language as tl


@triton.jit
def reduce_kernel(
    part_ptr, sums_ptr, cu_ptr, count: tl.int64, programs: tl.int64, samples: tl.int32, tiles: tl.int32, SUMS: tl.constexpr,
    PACKED: tl.constexpr, CU_BLOCK: tl.constexpr,
):  # fmt: skip
    """sums[slot, sample] = sum of part[slot, tiles of the sample], float64."""
    sample = tl.program_id(0)
    slot = tl.program_id(1)
    if (SUMS >> slot) & 1:
        if PACKED:
            o = tl.arange(0, CU_BLOCK)
            start = tl.load(cu_ptr + o, mask=o < samples, other=0).to(tl.int64)
            stop = tl.load(cu_ptr + o + 1, mask=o < samples, other=0).to(tl.int64)
            each = ((stop - start) * count + 4095) // 4096
            first = tl.sum(tl.where(o < sample, each, 0))
            size = tl.sum(tl.where(o == sample, each, 0))
        else:
            first = sample.to(tl.int64) * tiles
            size = tiles.to(tl.int64)
        n = tl.arange(0, 1024)
        total = tl.zeros((1024,), tl.float64)
        part = part_ptr + slot * programs + first
        for i in range(0, size, 1024):
            total += tl.load(part + i + n, mask=i + n < size, other=0.0).to(tl.float64)
        tl.store(sums_ptr + slot * samples + sample, tl.sum(total))


@triton.jit
def _row(rows_ptr, samples, k: tl.constexpr, o, m, x):
    tl.store(rows_ptr + k * samples + o, x.to(tl.float32), mask=m)


@triton.jit
def finish_kernel(
    sums_ptr, r_ptr, valid_ptr, chosen_ptr, cu_ptr, loss_ptr, totals_ptr, rows_ptr, count: tl.int64,
    samples: tl.int32, beta: tl.float32, ref_coef: tl.float32, factor: tl.float32, floor: tl.float32, ADAPTIVE: tl.constexpr, SAMPLE_MEAN: tl.constexpr, BATCH_MEAN: tl.constexpr,
    BY_R: tl.constexpr, EMPTY_ALL: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_CHOSEN: tl.constexpr, HAS_MASK: tl.constexpr, SUMS: tl.constexpr,
    STATS: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The per-sample sums -> loss, totals and rows, in float64. SUMS: the slots that are known so far."""
    o = tl.arange(0, BLOCK)
    m = o < samples
    r = tl.load(r_ptr + o, mask=m, other=0.5).to(tl.float64)
    valid = m.to(tl.float64)
    if HAS_VALID:
        valid = tl.load(valid_ptr + o, mask=m, other=0).to(tl.float64)
    chosen = valid
    if HAS_CHOSEN:
        chosen = chosen * tl.load(chosen_ptr + o, mask=m, other=0).to(tl.float64)
    if EMPTY_ALL:
        chosen = tl.where(tl.sum(chosen) > 0, chosen, valid)
    weight = valid
    rho = chosen
    if BATCH_MEAN:
        weight = valid / tl.maximum(tl.sum(valid), 1.0)
        rho = chosen / tl.maximum(tl.sum(chosen), 1.0)
    if BY_R:
        rho = rho * r
    kept = tl.zeros((BLOCK,), tl.float64) + count
    if PACKED:
        start = tl.load(cu_ptr + o, mask=m, other=0).to(tl.int64)
        kept = ((tl.load(cu_ptr + o + 1, mask=m, other=0).to(tl.int64) - start) * count).to(tl.float64)
    if HAS_MASK:
        kept = tl.zeros((BLOCK,), tl.float64)
        if (SUMS >> 5) & 1:
            kept = tl.load(sums_ptr + 5 * samples + o, mask=m, other=0.0)
    kept = tl.maximum(kept, 1.0)
    size = kept * 0.0 + 1.0
    if SAMPLE_MEAN:
        size = kept
    w_pos = kept * 0.0 + 1.0
    w_neg = w_pos
    gap = kept * 0.0  # W+ - W-
    if ADAPTIVE:
        raw = tl.load(sums_ptr + o, mask=m, other=0.0) / kept
        w_pos = tl.maximum(raw, floor)
        w_neg = w_pos
        if HAS_OLD:
            other = raw - tl.load(sums_ptr + samples + o, mask=m, other=0.0) / kept
            w_neg = tl.maximum(other, floor)
            gap = w_pos - w_neg
    k = 2.0 * beta * factor / size * weight
    pair = w_pos * w_neg
    _row(rows_ptr, samples, 8, o, m, k * ((2.0 * r - 1.0) * (w_pos + w_neg) - gap) / (2.0 * pair))
    _row(rows_ptr, samples, 9, o, m, k * ((w_pos + w_neg) - (2.0 * r - 1.0) * gap) / (2.0 * pair))
    _row(rows_ptr, samples, 10, o, m, 2.0 * ref_coef / size * rho)
    if (SUMS >> 2) & 1:
        pos = tl.load(sums_ptr + 2 * samples + o, mask=m, other=0.0) / size / w_pos
        neg = pos
        if HAS_OLD:
            neg = tl.load(sums_ptr + 3 * samples + o, mask=m, other=0.0) / size / w_neg
        prior = kept * 0.0
        if HAS_REF:
            if (SUMS >> 4) & 1:
                prior = tl.load(sums_ptr + 4 * samples + o, mask=m, other=0.0) / size
        zero = kept * 0.0
        policy = tl.sum(tl.where(m, weight * factor * (r * pos + (1.0 - r) * neg), 0.0))
        total = tl.sum(tl.where(m, rho * prior, 0.0))
        tl.store(loss_ptr, (policy + ref_coef * total).to(tl.float32))
        tl.store(totals_ptr, policy.to(tl.float32))
        tl.store(totals_ptr + 1, total.to(tl.float32))
        signal = tl.sum(tl.where(m, (2.0 * r - 1.0) * (pos + neg) / 2.0, 0.0)) / samples
        tl.store(totals_ptr + 2, signal.to(tl.float32))
        _row(rows_ptr, samples, 0, o, m, pos)
        _row(rows_ptr, samples, 1, o, m, neg)
        _row(rows_ptr, samples, 2, o, m, w_pos)
        _row(rows_ptr, samples, 3, o, m, w_neg)
        _row(rows_ptr, samples, 4, o, m, prior)
        deviation = zero
        norm = zero
        ref_norm = zero
        if STATS:
            norm = tl.sqrt(tl.load(sums_ptr + 7 * samples + o, mask=m, other=0.0))
            if HAS_OLD:
                deviation = tl.load(sums_ptr + 6 * samples + o, mask=m, other=0.0) / kept
            if HAS_REF:
                ref_norm = tl.sqrt(tl.load(sums_ptr + 8 * samples + o, mask=m, other=0.0))
        _row(rows_ptr, samples, 5, o, m, deviation)
        _row(rows_ptr, samples, 6, o, m, norm)
        _row(rows_ptr, samples, 7, o, m, ref_norm)

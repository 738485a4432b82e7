"""The end of nft.py's sums: tiles -> samples -> loss, statistics and the gradient's coefficients, in float64.

Two launches of a few programs, in a fixed order; slots and rows as in layout.py.
"""

import triton
import triton.language as tl

from afd_kernels.layout import MAXIMA, Row, Slot, Total

# A kernel reads globals only as constexpr. S_: a slot of the sums, R_: a row, T_: a total.
S_SIZE = tl.constexpr(Slot.SIZE.value)
S_SIZE_GAP = tl.constexpr(Slot.SIZE_GAP.value)
S_POS = tl.constexpr(Slot.POS.value)
S_NEG = tl.constexpr(Slot.NEG.value)
S_PRIOR = tl.constexpr(Slot.PRIOR.value)
S_KEPT = tl.constexpr(Slot.KEPT.value)
S_DRIFT = tl.constexpr(Slot.DRIFT.value)
S_V = tl.constexpr(Slot.V.value)
S_REF = tl.constexpr(Slot.REF.value)
S_X0 = tl.constexpr(Slot.X0.value)
S_OLD_REF = tl.constexpr(Slot.OLD_REF.value)
S_R_POS = tl.constexpr(Slot.R_POS.value)
S_R_NEG = tl.constexpr(Slot.R_NEG.value)
S_R_PRIOR = tl.constexpr(Slot.R_PRIOR.value)
S_R = tl.constexpr(Slot.R.value)
S_X0_MAX = tl.constexpr(Slot.X0_MAX.value)
S_DRIFT_MAX = tl.constexpr(Slot.DRIFT_MAX.value)
FIRST_MAX = tl.constexpr(MAXIMA.value)
R_POS_LOSS = tl.constexpr(Row.POS_LOSS.value)
R_NEG_LOSS = tl.constexpr(Row.NEG_LOSS.value)
R_WEIGHT_POS = tl.constexpr(Row.WEIGHT_POS.value)
R_WEIGHT_NEG = tl.constexpr(Row.WEIGHT_NEG.value)
R_PRIOR = tl.constexpr(Row.PRIOR.value)
R_OLD_DEVIATION = tl.constexpr(Row.OLD_DEVIATION.value)
R_V_NORM = tl.constexpr(Row.V_NORM.value)
R_V_REF_NORM = tl.constexpr(Row.V_REF_NORM.value)
R_OLD_DEVIATION_MAX = tl.constexpr(Row.OLD_DEVIATION_MAX.value)
R_OLD_PRIOR = tl.constexpr(Row.OLD_PRIOR.value)
R_X0_SQUARE = tl.constexpr(Row.X0_SQUARE.value)
R_X0_SQUARE_MAX = tl.constexpr(Row.X0_SQUARE_MAX.value)
R_DIFFERENCE = tl.constexpr(Row.DIFFERENCE.value)
R_SUM = tl.constexpr(Row.SUM.value)
R_REFERENCE = tl.constexpr(Row.REFERENCE.value)
T_POLICY = tl.constexpr(Total.POLICY.value)
T_PRIOR = tl.constexpr(Total.PRIOR.value)
T_SIGNAL = tl.constexpr(Total.SIGNAL.value)
T_R_MEAN = tl.constexpr(Total.R_MEAN.value)


@triton.jit
def packed_rows(cu_ptr, o, samples, length):
    """(first row, rows) of each packed sample, inside 0 .. length whatever the offsets are: nobody checked them on a GPU."""
    start = tl.load(cu_ptr + o, mask=o < samples, other=0).to(tl.int64)
    stop = tl.load(cu_ptr + o + 1, mask=o < samples, other=0).to(tl.int64)
    start = tl.minimum(tl.maximum(start, 0), length)
    return start, tl.maximum(tl.minimum(stop, length) - start, 0)


@triton.jit
def reduce_kernel(
    part_ptr, sums_ptr, cu_ptr, count: tl.int64, programs: tl.int64, length: tl.int64, samples: tl.int32,
    tiles: tl.int32, SUMS: tl.constexpr, PACKED: tl.constexpr, CU_BLOCK: tl.constexpr,
):  # fmt: skip
    """sums[slot, sample] = sum (or maximum) of part[slot, tiles of the sample], float64."""
    sample = tl.program_id(0)
    slot = tl.program_id(1)
    if (SUMS >> slot) & 1:
        if PACKED:
            o = tl.arange(0, CU_BLOCK)
            start, size = packed_rows(cu_ptr, o, samples, length)
            each = (size * count + 4095) // 4096
            first = tl.sum(tl.where(o < sample, each, 0))
            size = tl.minimum(tl.sum(tl.where(o == sample, each, 0)), programs - first)
        else:
            first = sample.to(tl.int64) * tiles
            size = tiles.to(tl.int64)
        n = tl.arange(0, 1024)
        total = tl.zeros((1024,), tl.float64)
        part = part_ptr + slot * programs + first
        if slot < FIRST_MAX:
            for i in range(0, size, 1024):
                total += tl.load(part + i + n, mask=i + n < size, other=0.0).to(tl.float64)
            tl.store(sums_ptr + slot * samples + sample, tl.sum(total))
        else:  # of squares, so 0 is no more than any
            for i in range(0, size, 1024):
                total = tl.maximum(total, tl.load(part + i + n, mask=i + n < size, other=0.0).to(tl.float64))
            tl.store(sums_ptr + slot * samples + sample, tl.max(total))


@triton.jit
def _row(rows_ptr, samples, k: tl.constexpr, o, m, x):
    tl.store(rows_ptr + samples * k + o, x.to(tl.float32), mask=m)


@triton.jit
def _sum(sums_ptr, samples, k: tl.constexpr, o, m):
    return tl.load(sums_ptr + samples * k + o, mask=m, other=0.0)


@triton.jit
def _highest(sums_ptr, samples, total: tl.constexpr, most: tl.constexpr, o, m):
    """A maximum, which may miss a NaN; the sum does not."""
    total = _sum(sums_ptr, samples, total, o, m)
    return tl.where(total != total, total, _sum(sums_ptr, samples, most, o, m))


@triton.jit
def _divisor(x):
    return tl.where(x == 0.0, 1.0, x)


@triton.jit
def finish_kernel(
    sums_ptr, r_ptr, valid_ptr, chosen_ptr, policy_weight_ptr, prior_weight_ptr, t_ptr, cu_ptr, loss_ptr, totals_ptr, rows_ptr,
    levels: tl.int64, count: tl.int64, length: tl.int64, samples: tl.int32, beta: tl.float32, ref_coef: tl.float32, factor: tl.float32,
    floor: tl.float32, dpo_beta: tl.float32, ADAPTIVE: tl.constexpr, SHARED: tl.constexpr, DPO: tl.constexpr,
    SAMPLE_MEAN: tl.constexpr, BATCH_MEAN: tl.constexpr, REF_BATCH: tl.constexpr, BY_R: tl.constexpr,
    EMPTY_ALL: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr, HAS_VALID: tl.constexpr,
    HAS_CHOSEN: tl.constexpr, HAS_POLICY: tl.constexpr, HAS_PRIOR: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_EACH: tl.constexpr, FINAL: tl.constexpr, STATS: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums per sample -> the gradient's coefficients in float64, and where FINAL also loss, totals and statistics.

    Before FINAL the sums of the weights and of HAS_MASK are known, with DPO those of the errors too. An r or one of the first
    `levels` of t outside [0, 1] makes them NaN.
    """
    o = tl.arange(0, BLOCK)
    m = o < samples
    kept = tl.zeros((BLOCK,), tl.float64) + count
    if PACKED:
        start, size = packed_rows(cu_ptr, o, samples, length)
        kept = (size * count).to(tl.float64)
        stop = tl.load(cu_ptr + o + 1, mask=m, other=0).to(tl.int64)
        # offsets that do not rise from 0 to length leave gaps or overlap: the loss and its gradient are NaN
        if (tl.sum(size) != length) | (tl.sum((m & (stop != start + size)).to(tl.int32)) > 0):
            factor = float("nan")
    if HAS_MASK:
        kept = _sum(sums_ptr, samples, S_KEPT, o, m)
    elements = kept
    kept = _divisor(kept)
    zero = tl.zeros((BLOCK,), tl.float64)
    size = zero + 1.0
    if SAMPLE_MEAN:
        size = kept
    r = zero + 0.5
    if HAS_EACH:
        if FINAL:
            r = _sum(sums_ptr, samples, S_R, o, m) / kept
    else:
        r = tl.load(r_ptr + o, mask=m, other=0.5).to(tl.float64)
        r = tl.where((r >= 0.0) & (r <= 1.0), r, float("nan"))
    i = tl.arange(0, 1024)
    wrong = tl.zeros((1024,), tl.int32)
    for first in range(0, levels, 1024):
        t = tl.load(t_ptr + first + i, mask=first + i < levels, other=0.0)
        wrong += (t >= 0.0).to(tl.int32) * (t <= 1.0).to(tl.int32) - 1
    if tl.sum(wrong) != 0:
        factor = float("nan")
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
        weight = valid / _divisor(tl.sum(valid))
        rho = chosen / _divisor(tl.sum(chosen))
    if REF_BATCH:
        rho = chosen * size / _divisor(tl.sum(chosen * elements))
    if HAS_POLICY:
        weight = weight * tl.load(policy_weight_ptr + o, mask=m, other=0).to(tl.float64)
    if HAS_PRIOR:
        rho = rho * tl.load(prior_weight_ptr + o, mask=m, other=0).to(tl.float64)
    if BY_R:
        if not HAS_EACH:
            rho = rho * r
    w_pos = zero + 1.0
    w_neg = w_pos
    gap = zero  # W+ - W-
    if ADAPTIVE:
        raw = _sum(sums_ptr, samples, S_SIZE, o, m) / kept
        w_pos = tl.maximum(raw, floor)
        w_neg = w_pos
        if HAS_OLD:
            if not SHARED:
                other = raw - _sum(sums_ptr, samples, S_SIZE_GAP, o, m) / kept
                w_neg = tl.maximum(other, floor)
                gap = w_pos - w_neg
    pos = zero
    if FINAL or DPO:
        pos = _sum(sums_ptr, samples, S_POS, o, m) / size / w_pos
    neg = pos
    if HAS_OLD:
        if FINAL or DPO:
            neg = _sum(sums_ptr, samples, S_NEG, o, m) / size / w_neg
    k = 2.0 * beta * factor / size * weight
    pair = w_pos * w_neg
    difference = k * ((2.0 * r - 1.0) * (w_pos + w_neg) - gap) / (2.0 * pair)
    total_row = k * ((w_pos + w_neg) - (2.0 * r - 1.0) * gap) / (2.0 * pair)
    policy_each = r * pos + (1.0 - r) * neg
    if HAS_EACH:
        difference = k / w_pos
        total_row = k / w_neg
    if DPO:
        y = dpo_beta * (2.0 * r - 1.0) / 2.0
        z = y * (pos - neg)
        small = tl.exp(-tl.abs(z))
        slope = k * y * tl.where(z > 0, 1.0, small) / (1.0 + small)
        difference = slope * (1.0 / w_pos + 1.0 / w_neg)
        total_row = slope * (1.0 / w_pos - 1.0 / w_neg)
        policy_each = tl.where(z < 0, 0.0, z) + tl.log(1.0 + small)  # a NaN is passed on
    _row(rows_ptr, samples, R_DIFFERENCE, o, m, difference)
    _row(rows_ptr, samples, R_SUM, o, m, total_row)
    _row(rows_ptr, samples, R_REFERENCE, o, m, 2.0 * ref_coef / size * rho)
    if FINAL:
        prior = zero
        loss_prior = zero
        if HAS_REF:
            prior = _sum(sums_ptr, samples, S_PRIOR, o, m) / size
            loss_prior = prior
        signal_each = (2.0 * r - 1.0) * (pos + neg) / 2.0
        if HAS_EACH:
            r_pos = _sum(sums_ptr, samples, S_R_POS, o, m) / size / w_pos
            r_neg = _sum(sums_ptr, samples, S_R_NEG, o, m) / size / w_neg
            policy_each = r_pos + r_neg
            signal_each = r_pos - pos / 2.0 + neg / 2.0 - r_neg
            if HAS_REF:
                if BY_R:
                    loss_prior = _sum(sums_ptr, samples, S_R_PRIOR, o, m) / size
        policy = tl.sum(tl.where(m, weight * factor * policy_each, 0.0))
        total = tl.sum(tl.where(m, rho * loss_prior, 0.0))
        tl.store(loss_ptr, (policy + ref_coef * total).to(tl.float32))
        tl.store(totals_ptr + T_POLICY, policy.to(tl.float32))
        tl.store(totals_ptr + T_PRIOR, total.to(tl.float32))
        signal = tl.sum(tl.where(m, signal_each, 0.0)) / samples
        tl.store(totals_ptr + T_SIGNAL, signal.to(tl.float32))
        tl.store(totals_ptr + T_R_MEAN, (tl.sum(tl.where(m, r, 0.0)) / samples).to(tl.float32))
        _row(rows_ptr, samples, R_POS_LOSS, o, m, pos)
        _row(rows_ptr, samples, R_NEG_LOSS, o, m, neg)
        _row(rows_ptr, samples, R_WEIGHT_POS, o, m, w_pos)
        _row(rows_ptr, samples, R_WEIGHT_NEG, o, m, w_neg)
        _row(rows_ptr, samples, R_PRIOR, o, m, prior)
        deviation = zero
        norm = zero
        ref_norm = zero
        deviation_max = zero
        old_prior = zero
        square = zero
        square_max = zero
        if STATS:
            norm = tl.sqrt(_sum(sums_ptr, samples, S_V, o, m))
            square = _sum(sums_ptr, samples, S_X0, o, m) / kept
            square_max = _highest(sums_ptr, samples, S_X0, S_X0_MAX, o, m)
            if HAS_OLD:
                deviation = _sum(sums_ptr, samples, S_DRIFT, o, m) / kept
                deviation_max = _highest(sums_ptr, samples, S_DRIFT, S_DRIFT_MAX, o, m)
            if HAS_REF:
                ref_norm = tl.sqrt(_sum(sums_ptr, samples, S_REF, o, m))
                old_prior = _sum(sums_ptr, samples, S_OLD_REF, o, m) / kept
        _row(rows_ptr, samples, R_OLD_DEVIATION, o, m, deviation)
        _row(rows_ptr, samples, R_V_NORM, o, m, norm)
        _row(rows_ptr, samples, R_V_REF_NORM, o, m, ref_norm)
        _row(rows_ptr, samples, R_OLD_DEVIATION_MAX, o, m, deviation_max)
        _row(rows_ptr, samples, R_OLD_PRIOR, o, m, old_prior)
        _row(rows_ptr, samples, R_X0_SQUARE, o, m, square)
        _row(rows_ptr, samples, R_X0_SQUARE_MAX, o, m, square_max)

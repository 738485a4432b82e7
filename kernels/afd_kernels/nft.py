"""The NFT + prior loss: a sweep that sums and / or writes the gradient, and two small kernels that finish the sums.

Per element, with s = 1 (velocity space) or -sigma (x0 space) and w = x0 - eps, x_t - x0, or -x0 (clean):
    a = s v_old + w,  d = s beta (v - v_old),  e+- = a +- d
    dL/dv = s [(c+ - c-) a + (c+ + c-) d] + c_ref m (v - v_ref),  m = 1 or sigma^2
so nothing cancels at zero advantage. With an r per element c+- are products with r and 1 - r; an element's weight multiplies
its sums and its gradient. Sums are tree sums of a 4096-element tile in float32, then of a sample's tiles
in float64, in a fixed order. kernels/csrc/afd_core.h is the same arithmetic in C++; layout.py names slots and rows.
"""

import functools
import json

import torch
import triton
import triton.language as tl
from torch import Tensor

from afd_kernels._finish import R_DIFFERENCE, R_REFERENCE, R_SUM, finish_kernel, packed_rows, reduce_kernel
from afd_kernels._launch import WARPS, check_size, launch, on, rows
from afd_kernels.layout import MAXIMA, TILE, Frames, Row, Slot, Source, Total
from afd_kernels.noise import ONE, first_frame, level, next_quarter, normal4, widen

MOST_LEVELS = 1 << 16  # of t that the finish looks at; more are a t per element
SLOTS = tl.constexpr(len(Slot))
FIRST_MAX = tl.constexpr(MAXIMA.value)
SEED = tl.constexpr(Source.SEED.value)
X_T = tl.constexpr(Source.X_T.value)
CLEAN = tl.constexpr(Source.CLEAN.value)


@triton.jit
def _place(
    cu_ptr, pid, tiles, samples, width: tl.int64, length: tl.int64, PACKED: tl.constexpr, CU_BLOCK: tl.constexpr
):
    """(sample, its tile, first row, rows) of program pid; a program past the last tile gets 0 rows."""
    if PACKED:
        o = tl.arange(0, CU_BLOCK)
        start, count = packed_rows(cu_ptr, o, samples, length)
        each = (count * width + 4095) // 4096
        sample = tl.sum((tl.cumsum(each) <= pid).to(tl.int32))
        tile = pid - tl.sum(tl.where(o < sample, each, 0))
        first = tl.sum(tl.where(o == sample, start, 0))
        size = tl.sum(tl.where(o == sample, count, 0))
        return tl.minimum(sample, samples - 1).to(tl.int64), tile, first, size
    else:
        sample = (pid // tiles).to(tl.int64)
        return sample, pid % tiles, sample, sample * 0 + 1


@triton.jit
def _part(
    v, x0_ptr, y_ptr, old_ptr, ref_ptr, mask_ptr, each_ptr, grad_ptr, t_ptr, sigma_ptr, e, frame, since, n, left, q, inner,
    frames, beta, cd, cs, cr, X0: tl.constexpr, REF_X0: tl.constexpr, SOURCE: tl.constexpr, HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr, HAS_MASK: tl.constexpr, WEIGHTED: tl.constexpr, HAS_EACH: tl.constexpr, BY_R: tl.constexpr,
    HAS_SIGMA: tl.constexpr, FRAMES: tl.constexpr,
    GRAD: tl.constexpr,
):  # fmt: skip
    """A quarter of a tile -> the summands of every slot, in the order of `Slot`. SOURCE: a `Source`."""
    m = n < left
    t = level(t_ptr, frame, since, inner, frames, q, m, FRAMES)
    sigma = t
    if HAS_SIGMA:
        sigma = level(sigma_ptr, frame, since, inner, frames, q, m, FRAMES)
    x0 = widen(tl.load(x0_ptr + n, mask=m, other=0.0))
    y = e
    if SOURCE != SEED and SOURCE != CLEAN:
        y = widen(tl.load(y_ptr + n, mask=m, other=0.0))
    old = v
    if HAS_OLD:
        old = widen(tl.load(old_ptr + n, mask=m, other=0.0))
    ref = v
    if HAS_REF:
        ref = widen(tl.load(ref_ptr + n, mask=m, other=0.0))
    keep = m
    share = 1.0  # of an element in every sum: the compiler drops the products with it
    if HAS_MASK:  # an element outside is zero everywhere: it adds nothing, and its gradient is zero
        weight = tl.load(mask_ptr + n, mask=m, other=0)
        keep = weight != 0
        if WEIGHTED:
            share = weight
        v = tl.where(keep, v, 0.0)
        old = tl.where(keep, old, 0.0)
        ref = tl.where(keep, ref, 0.0)
    if X0:
        if SOURCE != X_T:  # rounded as the network saw it
            y = widen(((1.0 - t) * x0 + t * y).to(x0_ptr.dtype.element_ty))
        w = y - x0
        s = -sigma
    else:
        w = x0 - y
        if SOURCE == X_T:
            w = w / t
        if SOURCE == CLEAN:
            w = -x0
        s = 1.0
    if SOURCE == SEED or HAS_MASK:
        w = tl.where(keep, w, 0.0)
    gap_scale = 1.0
    if REF_X0:
        gap_scale = sigma
    a = s * old + w
    pos = a
    neg = a
    if HAS_OLD:
        d = (s * beta) * (v - old)
        pos = a + d
        neg = a - d
    gap = gap_scale * (v - ref)
    each = 0.0
    if HAS_EACH:
        each = tl.load(each_ptr + n, mask=m, other=0.0)
        each = tl.where((each >= 0.0) & (each <= 1.0), each, float("nan"))
        if HAS_MASK:
            each = tl.where(keep, each, 0.0)
    if GRAD:
        difference = cd
        total = cs
        reference = cr
        if HAS_EACH:
            difference = cd * each - cs * (1.0 - each)
            total = cd * each + cs * (1.0 - each)
            if BY_R:
                reference = cr * each
        g = (s * difference) * a
        if HAS_OLD:
            g += (s * total) * d
        if HAS_REF:
            g += (gap_scale * reference) * gap
        g = share * g
        tl.store(grad_ptr + n, g.to(grad_ptr.dtype.element_ty), mask=m)
    drift = v - old
    clean = x0
    if HAS_MASK:
        clean = tl.where(keep, x0, 0.0)
    behind = old - ref
    size = share * tl.abs(pos)
    size_gap = share * (tl.abs(pos) - tl.abs(neg))
    pos_square = share * (pos * pos)
    neg_square = share * (neg * neg)
    gap_square = share * (gap * gap)
    drift_square = share * (drift * drift)
    clean_square = share * (clean * clean)
    behind_square = share * (behind * behind)
    drift_max = drift * drift
    clean_max = clean * clean
    count = keep.to(tl.float32)
    if WEIGHTED:
        count = weight
    return (
        size,
        size_gap,
        pos_square,
        neg_square,
        gap_square,
        count,
        drift_square,
        v * v,
        ref * ref,
        clean_square,
        behind_square,
        each * pos_square,
        (1.0 - each) * neg_square,
        each * gap_square,
        each * count,
        clean_max,
        drift_max,
    )


@triton.jit
def _plus(a, b):
    return (a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4], a[5] + b[5], a[6] + b[6], a[7] + b[7],
            a[8] + b[8], a[9] + b[9], a[10] + b[10], a[11] + b[11], a[12] + b[12], a[13] + b[13], a[14] + b[14],
            tl.maximum(a[15], b[15]), tl.maximum(a[16], b[16]))  # fmt: skip


@triton.jit(do_not_specialize=["seed"])
def sweep_kernel(
    v_ptr, x0_ptr, y_ptr, old_ptr, ref_ptr, mask_ptr, each_ptr, grad_ptr, part_ptr, t_ptr, sigma_ptr, rows_ptr, go_ptr, cu_ptr,
    seed: tl.int64, count: tl.int64, length: tl.int64, v_stride: tl.int64, x0_stride: tl.int64, y_stride: tl.int64, old_stride: tl.int64,
    ref_stride: tl.int64, mask_stride: tl.int64, each_stride: tl.int64, grad_stride: tl.int64, go_stride: tl.int64, samples: tl.int32, tiles: tl.int32,
    frames: tl.int32, inner: tl.int32, beta: tl.float32,
    X0: tl.constexpr, REF_X0: tl.constexpr, SOURCE: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr,
    HAS_MASK: tl.constexpr, WEIGHTED: tl.constexpr, HAS_EACH: tl.constexpr, BY_R: tl.constexpr, HAS_SIGMA: tl.constexpr,
    FRAMES: tl.constexpr, GRAD: tl.constexpr, SCALED: tl.constexpr, GUARD: tl.constexpr, SUMS: tl.constexpr,
    PACKED: tl.constexpr, CU_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program = one tile of one sample. SUMS: bit mask of the slots to store. GUARD: do nothing for go = [1, 1]."""
    pid = tl.program_id(0)
    sample, tile, row, size = _place(cu_ptr, pid, tiles, samples, count, length, PACKED, CU_BLOCK)
    first = tile.to(tl.int64) * 4096
    left = count * size - first
    scale, prior_scale = 1.0, 1.0
    if SCALED:
        scale = tl.load(go_ptr)
        prior_scale = tl.load(go_ptr + go_stride)
    if GUARD:
        if (scale == 1.0) & (prior_scale == 1.0):
            return
    cd, cs, cr = 0.0, 0.0, 0.0
    if GRAD:
        cd = tl.load(rows_ptr + samples * R_DIFFERENCE + sample) * scale
        cs = tl.load(rows_ptr + samples * R_SUM + sample) * scale
        cr = tl.load(rows_ptr + samples * R_REFERENCE + sample) * prior_scale
    v = v_ptr + row * v_stride + first
    x0 = x0_ptr + row * x0_stride + first
    y = y_ptr + row * y_stride + first
    old = old_ptr + row * old_stride + first
    ref = ref_ptr + row * ref_stride + first
    mask = mask_ptr + row * mask_stride + first
    each = each_ptr + row * each_stride + first
    grad = grad_ptr + row * grad_stride + first
    t = t_ptr + sample * frames
    sigma = sigma_ptr + sample * frames
    if FRAMES == ONE:
        t = tl.load(t)
        if HAS_SIGMA:
            sigma = tl.load(sigma)
    q = tl.arange(0, 1024)
    x = widen(tl.load(v + q, mask=q < left, other=0.0))
    e0, e1, e2, e3 = 0.0, 0.0, 0.0, 0.0
    if SOURCE == SEED:
        e0, e1, e2, e3 = normal4(seed, tile, sample, q, x)
    frame, since = first_frame(tile, inner, frames, FRAMES)
    a = _part(x, x0, y, old, ref, mask, each, grad, t, sigma, e0, frame, since, q, left, q, inner, frames, beta, cd, cs, cr,
              X0, REF_X0, SOURCE, HAS_OLD, HAS_REF, HAS_MASK, WEIGHTED, HAS_EACH, BY_R, HAS_SIGMA, FRAMES, GRAD)  # fmt: skip
    for k in tl.static_range(1, 4):
        n = q + k * 1024
        e = e1 if k == 1 else e2 if k == 2 else e3
        frame, since = next_quarter(frame, since, inner, frames, FRAMES)
        x = widen(tl.load(v + n, mask=n < left, other=0.0))
        a = _plus(a, _part(x, x0, y, old, ref, mask, each, grad, t, sigma, e, frame, since, n, left, q, inner, frames, beta, cd, cs, cr,
                           X0, REF_X0, SOURCE, HAS_OLD, HAS_REF, HAS_MASK, WEIGHTED, HAS_EACH, BY_R, HAS_SIGMA, FRAMES, GRAD))  # fmt: skip
    programs = tl.num_programs(0).to(tl.int64)
    for k in tl.static_range(SLOTS):
        if (SUMS >> k) & 1:
            if k < FIRST_MAX:
                tl.store(part_ptr + k * programs + pid, tl.sum(a[k]))
            else:
                tl.store(part_ptr + k * programs + pid, tl.max(a[k]))


def _bits(wanted: dict[Slot, bool]) -> int:
    """The wanted slots as a bit mask."""
    return sum(slot.bit for slot, want in wanted.items() if want)


class _Call:
    """The arguments of one operator call, brought to what the kernels read; one per call, no state kept."""

    def __init__(self, v, x0, r, t, noise, seed, x_t, v_old, v_ref, sigma, sample_mask, ref_mask, element_mask,
                 each, policy_weight, prior_weight, cu_seqlens, inner, recipe, stats):  # fmt: skip
        self.recipe = c = json.loads(recipe)
        self.samples = r.shape[0]
        self.packed, self.length = cu_seqlens is not None, v.shape[0]
        width = v[0].numel() if v.shape[0] else 0  # of a packed row, or a sample
        self.count, self.tiles = width, triton.cdiv(width, TILE)
        self.programs = v.numel() // TILE + self.samples if self.packed else self.samples * self.tiles
        check_size(self.programs, inner * t.shape[1])
        self.like = v
        self.v, v_stride = rows(v, v)
        self.strides = [v_stride]
        weighted = element_mask is not None and element_mask.is_floating_point()
        if element_mask is not None:
            element_mask = element_mask.contiguous()
            element_mask = element_mask.float() if weighted else element_mask.view(torch.uint8)
        if each is not None:
            each = each.float().contiguous()
        self.tensors = [self.v]
        for x in (x0, noise if x_t is None else x_t, v_old, v_ref, element_mask, each):
            x, stride = rows(x.contiguous() if self.packed and x is not None else x, self.v)
            self.tensors.append(x)
            self.strides.append(stride)
        if self.packed:
            self.tensors[0], self.strides[0] = self.v.contiguous(), width
        self.t, self.sigma = t.float(), t if sigma is None else sigma.float()
        self.levels = self.t.numel() if self.t.numel() <= MOST_LEVELS else 0
        self.r, self.inner = r.float().contiguous(), inner
        self.masks = [None if x is None else x.float().contiguous() if x.is_floating_point() else x.view(torch.uint8)
                      for x in (sample_mask, ref_mask, policy_weight, prior_weight)]  # fmt: skip
        self.cu = self.r if cu_seqlens is None else cu_seqlens.contiguous()
        self.seed = seed or 0
        self.adaptive = c["weighting"] == "adaptive"
        self.old, self.ref = v_old is not None, v_ref is not None
        self.flags = dict(
            X0=c["space"] == "x0", REF_X0=c["ref_space"] == "x0",
            SOURCE=(Source.CLEAN if c["space"] == "clean" else Source.X_T if x_t is not None else Source.SEED
                    if noise is None else Source.NOISE).value,
            HAS_OLD=self.old, HAS_REF=self.ref, HAS_MASK=element_mask is not None, WEIGHTED=weighted,
            HAS_EACH=each is not None, BY_R=c["ref_weight"] == "r", HAS_SIGMA=sigma is not None,
            FRAMES=Frames.of(t.shape[1], inner, self.tiles).value,
        )  # fmt: skip
        self.place = dict(PACKED=self.packed, CU_BLOCK=triton.next_power_of_2(self.samples) if self.packed else 1)
        self.policy = _bits({
            Slot.SIZE: self.adaptive, Slot.SIZE_GAP: self.adaptive and self.old, Slot.POS: True, Slot.NEG: self.old,
            Slot.KEPT: element_mask is not None, Slot.R_POS: each is not None, Slot.R_NEG: each is not None,
            Slot.R: each is not None,
        })  # fmt: skip
        self.prior = _bits({Slot.PRIOR: self.ref, Slot.R_PRIOR: self.ref and each is not None})
        self.extra = _bits({
            Slot.DRIFT: self.old, Slot.V: True, Slot.REF: self.ref, Slot.X0: True, Slot.OLD_REF: self.ref,
            Slot.X0_MAX: True, Slot.DRIFT_MAX: self.old,
        }) if stats else 0  # fmt: skip
        self.stats = stats
        new = functools.partial(torch.empty, dtype=torch.float32, device=v.device)
        self.part, self.sums = new(len(Slot), self.programs), new(len(Slot), self.samples, dtype=torch.float64)
        self.loss, self.totals, self.rows = new(()), new(len(Total)), new(len(Row), self.samples)

    def sweep(self, sums: int, grad: Tensor | None = None, go: Tensor | None = None, guard: bool = False,
              has_ref: bool = True) -> None:  # fmt: skip
        """Walk the tensors once: store the slots `sums`, and the gradient where there is one to write."""
        flags = self.flags | {"HAS_REF": self.ref and has_ref}
        target = self.v if grad is None else grad
        launch(
            sweep_kernel, (self.programs,),
            (*self.tensors, target, self.part, self.t, self.sigma, self.rows, self.t if go is None else go, self.cu),
            (self.seed, self.count, self.length, *self.strides, 0 if grad is None else (self.count if self.packed else grad.stride(0)),
             0 if go is None else go.stride(0), self.samples, self.tiles, self.t.shape[1], self.inner, self.recipe["beta"]),
            GRAD=grad is not None,
            SCALED=go is not None, GUARD=guard, SUMS=sums, num_warps=WARPS, enable_fp_fusion=False, **flags,
            **self.place,
        )  # fmt: skip

    def finish(self, new: int, final: bool = True) -> None:
        """Reduce the slots `new`; coefficients, and the loss where that was the last of them."""
        if new:
            launch(
                reduce_kernel, (self.samples, len(Slot)),
                (self.part, self.sums, self.cu), (self.count, self.programs, self.length, self.samples, self.tiles), SUMS=new,
                num_warps=WARPS, **self.place,
            )  # fmt: skip
        c = self.recipe
        valid, chosen, policy, prior = self.masks
        launch(
            finish_kernel, (1,),
            (self.sums, self.r, *(self.r if x is None else x for x in self.masks), self.t, self.cu, self.loss, self.totals, self.rows),
            (self.levels, self.count, self.length, self.samples, c["beta"], c["ref_coef"], c["factor"], c["weight_floor"], c["dpo_beta"]),
            ADAPTIVE=self.adaptive, SHARED=c["shared_weight"], DPO=c["form"] == "dpo",
            SAMPLE_MEAN=c["sample_reduction"] == "mean", BATCH_MEAN=c["batch_reduction"] == "mean",
            REF_BATCH=c["ref_reduction"] == "batch",
            BY_R=self.flags["BY_R"], EMPTY_ALL=c["ref_empty"] == "all", HAS_OLD=self.old, HAS_REF=self.ref,
            HAS_VALID=valid is not None, HAS_CHOSEN=chosen is not None, HAS_POLICY=policy is not None,
            HAS_PRIOR=prior is not None, HAS_MASK=self.flags["HAS_MASK"], HAS_EACH=self.flags["HAS_EACH"], FINAL=final, STATS=self.stats, PACKED=self.packed, BLOCK=triton.next_power_of_2(self.samples),
            num_warps=WARPS,
        )  # fmt: skip


def nft_loss(*args):
    """Schema of afd_fast::nft_loss: (loss, totals, rows)."""
    call = _Call(*args)
    sums = call.policy | call.prior | call.extra
    with on(call.v):
        call.sweep(sums)
        call.finish(sums)
    return call.loss, call.totals, call.rows


def nft_loss_with_grad(*args):
    """The same, and the gradient for grad_output 1: in the same sweep unless its coefficients need sums first."""
    call, grad = _Call(*args[:-1]), args[-1]
    c = call.recipe
    by_elements = c["sample_reduction"] == "mean" or c["ref_reduction"] == "batch"
    sums_first = call.adaptive or c["form"] == "dpo" or (call.flags["HAS_MASK"] and by_elements)
    first = call.policy if sums_first else 0
    second = (call.policy | call.prior | call.extra) & ~first
    with on(call.v):
        if first:
            call.sweep(first, has_ref=False)
        call.finish(first, final=False)
        call.sweep(second, grad)
        call.finish(second)
    return call.loss, call.totals, call.rows


def nft_loss_backward(grad_output, coefficients, *args):
    """The gradient times grad_output [2], of policy and prior, in v's dtype."""
    call = _Call(*args)
    grad = torch.empty(call.like.shape, dtype=call.like.dtype, device=call.like.device)
    call.rows = coefficients
    with on(call.v):
        call.sweep(0, grad, grad_output)
    return grad


def nft_loss_redo(grad_output, coefficients, *args):
    """Rewrite `grad`, which holds the gradient for grad_output [1, 1], unless that is what grad_output is."""
    call, grad = _Call(*args[:-1]), args[-1]
    call.rows = coefficients
    with on(call.v):
        call.sweep(0, grad, grad_output, guard=True)

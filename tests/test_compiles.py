"""Every Triton kernel compiled to machine code for sm_80 and sm_90, without a GPU, and what that code must look like."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

import triton
import triton.language as tl
from afd_kernels import nft as kernels
from afd_kernels import noise as noise_kernels
from afd_kernels.layout import TILE, Slot, Source

from tests.aot import compile_kernel

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
OFF = dict(
    X0=False, REF_X0=False, SOURCE=Source.NOISE.value, HAS_OLD=False, HAS_REF=True, HAS_MASK=False, HAS_SIGMA=False,
    PER_FRAME=False, GRAD=False, SCALED=False, GUARD=False, SUMS=0, PACKED=False, CU_BLOCK=1,
)  # fmt: skip
SEED, X_T = Source.SEED.value, Source.X_T.value
PRIOR, EVERY = Slot.PRIOR.bit, (1 << len(Slot)) - 1
PLAIN = Slot.POS.bit | PRIOR
ADAPTIVE = Slot.SIZE.bit | Slot.SIZE_GAP.bit | Slot.POS.bit | Slot.NEG.bit  # the four sums of the weights
SWEEPS = {  # flags, tensors read, bytes a bf16 element moves, instructions an element may cost (measured + 5 %)
    "afd, seed, loss and gradient": (dict(SOURCE=SEED, GRAD=True, SUMS=PLAIN), "v x0 ref", 8, 90),
    "afd, seed, loss only": (dict(SOURCE=SEED, SUMS=PLAIN), "v x0 ref", 6, 86),
    "afd, noise, loss and gradient": (dict(GRAD=True, SUMS=PLAIN), "v x0 y ref", 10, 27),
    "afd, gradient again": (dict(GRAD=True, SCALED=True, GUARD=True), "v x0 y ref", 10, 20),
    "adaptive, seed, weights": (dict(X0=True, SOURCE=SEED, HAS_OLD=True, HAS_REF=False, SUMS=ADAPTIVE), "v x0 old", 6, 97),
    "adaptive, seed, gradient": (dict(X0=True, SOURCE=SEED, HAS_OLD=True, GRAD=True, SUMS=PRIOR), "v x0 old ref", 10, 97),
    "adaptive, x_t, sums": (dict(X0=True, SOURCE=X_T, HAS_OLD=True, SUMS=ADAPTIVE | PRIOR), "v x0 y old ref", 10, 36),
    "adaptive, x_t, gradient": (dict(X0=True, SOURCE=X_T, HAS_OLD=True, GRAD=True, SCALED=True), "v x0 y old ref", 12, 28),
    "adaptive, noise, stats": (dict(X0=True, HAS_OLD=True, SUMS=EVERY & ~Slot.KEPT.bit), "v x0 y old ref", 10, 50),
    "mask": (dict(GRAD=True, SUMS=PLAIN | Slot.KEPT.bit, HAS_MASK=True), "v x0 y ref mask", 11, 39),
    "per-frame t": (dict(X0=True, GRAD=True, SUMS=PLAIN, PER_FRAME=True), "v x0 y ref", 10, 65),
    "packed": (dict(X0=True, SOURCE=X_T, HAS_OLD=True, GRAD=True, SUMS=PLAIN, PACKED=True, CU_BLOCK=16), "v x0 y old ref", 12, 45),
}  # fmt: skip


def types(dtype: str) -> dict:
    same = dict.fromkeys((f"{n}_ptr" for n in ("v", "x0", "y", "old", "ref", "grad", "out")), f"*{dtype}")
    floats = dict.fromkeys((f"{n}_ptr" for n in ("part", "t", "sigma", "rows", "go", "r", "loss", "totals")), "*fp32")
    bytes_ = dict.fromkeys(("mask_ptr", "valid_ptr", "chosen_ptr"), "*u8")
    longs = dict.fromkeys(("seed", "count", "programs", "length"), "i64") | {
        f"{n}_stride": "i64" for n in ("v", "x0", "y", "old", "ref", "mask", "grad")
    }
    rest = dict.fromkeys(("samples", "tiles", "frames", "inner"), "i32")
    scalars = dict.fromkeys(("beta", "ref_coef", "factor", "floor"), "fp32")
    return same | floats | bytes_ | longs | rest | scalars | {"sums_ptr": "*fp64", "cu_ptr": "*i64"}


def aligned(kernel) -> list[str]:
    return [n for n in kernel.arg_names if n.endswith(("_ptr", "_stride")) or n == "count"]


def build(kernel, dtype, flags, capability=90, **options):
    options = dict(enable_fp_fusion=False, aligned=aligned(kernel)) | options
    return compile_kernel(kernel, types(dtype), flags, capability=capability, **options)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("case", SWEEPS)
def test_sweep(case, dtype):
    flags, names, moved, budget = SWEEPS[case]
    c = build(kernels.sweep_kernel, dtype, OFF | flags)
    assert c.stack == 0 and c.spills == 0 and not c.backward_branch
    big = {f"{n}_ptr" for n in names.split()}
    assert {n: c.read[n] for n in big} == dict.fromkeys(big, TILE)  # each tensor once, nothing else of that size
    others = {n: k for n, k in c.read.items() if n not in big and n != "t_ptr"}
    assert sum(others.values()) <= 8 + (64 if flags.get("PACKED") else 0)
    assert c.written["grad_ptr"] == (TILE if flags.get("GRAD") else 0)
    assert c.written["part_ptr"] == bin(flags.get("SUMS", 0)).count("1")
    traffic = sum(c.read[n] for n in big - {"mask_ptr"}) + c.written["grad_ptr"]
    if dtype == "bf16":
        assert traffic * 2 + c.read["mask_ptr"] == moved * TILE
    per_instruction = 128 * 128 // 8  # bytes that a 128-bit access of 128 threads moves
    wide = lambda counts: counts.get(128, 0) * per_instruction
    assert wide(c.loads) == sum(c.read[n] for n in big - {"mask_ptr"}) * BYTES[dtype]
    assert wide(c.stores) == c.written["grad_ptr"] * BYTES[dtype]
    assert c.instructions * 128 / TILE <= budget * (1.0 if dtype == "bf16" else 1.05)
    if flags.get("SOURCE") == SEED:  # the same bits everywhere: nothing contracted, nothing approximate
        assert "fma.rn.f32" not in c.ptx and "sqrt.rn.f32" in c.ptx and ".approx" not in c.ptx


def test_a_gradient_that_stays_is_left_at_once():
    """grad_output 1: every thread loads it and leaves, before any address or coefficient."""
    flags = SWEEPS["afd, gradient again"][0]
    ptx = build(kernels.sweep_kernel, "bf16", OFF | flags).ptx
    assert ptx.split("bra", 1)[0].count("ld.global") == 1


def test_bytes_per_element():
    """AFD 12 and adaptive recipes 20 bytes a bf16 element, noising and gradient included, against 158-600 in eager code."""
    element = lambda kernel, flags: (lambda c: 2 * sum(
        n for a, n in (c.read + c.written).items() if a in ("v_ptr", "x0_ptr", "y_ptr", "old_ptr", "ref_ptr", "grad_ptr", "out_ptr")
    ) // TILE)(build(kernel, "bf16", flags))  # fmt: skip
    noising = element(noise_kernels.forward_noise_kernel, dict(SEED=True, PER_FRAME=False))
    sweep = lambda case: element(kernels.sweep_kernel, OFF | SWEEPS[case][0])
    assert noising + sweep("afd, seed, loss and gradient") == 12
    assert noising + sweep("adaptive, seed, weights") + sweep("adaptive, seed, gradient") == 20


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("seed,frames,budget", [(True, False, 75), (False, False, 12), (True, True, 112)])
def test_forward_noise(dtype, seed, frames, budget):
    c = build(noise_kernels.forward_noise_kernel, dtype, dict(SEED=seed, PER_FRAME=frames))
    assert c.stack == 0 and c.spills == 0 and not c.backward_branch
    assert c.read["x0_ptr"] == c.written["out_ptr"] == TILE and c.read["y_ptr"] == (0 if seed else TILE)
    assert c.loads[128] * 2048 == (TILE if seed else 2 * TILE) * BYTES[dtype]
    assert c.stores == {128: TILE * BYTES[dtype] // 2048}
    assert c.instructions * 128 / TILE <= budget


FINISH = dict(
    ADAPTIVE=True, SAMPLE_MEAN=True, BATCH_MEAN=True, BY_R=True, EMPTY_ALL=True, HAS_OLD=True, HAS_REF=True,
    HAS_VALID=True, HAS_CHOSEN=True, HAS_MASK=True, SUMS=EVERY, STATS=True, PACKED=False, BLOCK=64,
)  # fmt: skip


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_everything_compiles(capability, dtype):
    full = OFF | dict(
        X0=True, REF_X0=True, SOURCE=SEED, HAS_OLD=True, HAS_MASK=True, HAS_SIGMA=True, GRAD=True, SCALED=True,
        SUMS=EVERY,
    )  # fmt: skip
    for kernel, flags in (
        (kernels.sweep_kernel, full), (kernels.sweep_kernel, OFF | dict(SOURCE=X_T, GRAD=True, GUARD=True, SCALED=True)),
        (kernels.reduce_kernel, dict(SUMS=EVERY, PACKED=True, CU_BLOCK=8)), (kernels.finish_kernel, FINISH),
        (kernels.finish_kernel, FINISH | dict(PACKED=True, SUMS=0, ADAPTIVE=False)),
        (noise_kernels.forward_noise_kernel, dict(SEED=True, PER_FRAME=True)),
    ):  # fmt: skip
        c = build(kernel, dtype, flags, capability)
        assert c.stack == 0 and c.spills == 0, (kernel.fn.__name__, capability)


def test_unaligned_tensors_are_noticed():
    """The assertions above can fail: without alignment the accesses fall apart."""
    c = build(kernels.sweep_kernel, "bf16", OFF | dict(GRAD=True), aligned=[])
    assert 128 not in c.loads and c.stores.get(128, 0) == 0


@triton.jit
def _twice(x_ptr, out_ptr, n: tl.constexpr):
    i = tl.arange(0, n)
    a = tl.load(x_ptr + i)
    tl.store(out_ptr + i, a)
    tl.store(out_ptr + n + i, a + tl.load(x_ptr + i))


@triton.jit
def _randn(out_ptr, seed, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out_ptr + i, tl.randn(seed, i))


def test_a_second_read_and_slow_libm_are_noticed():
    assert compile_kernel(_twice, {"x_ptr": "*fp32", "out_ptr": "*fp32"}, {"n": 1024}).read["x_ptr"] == 2048
    slow = compile_kernel(_randn, {"out_ptr": "*fp32", "seed": "i64"}, {"n": 1024})
    assert slow.stack > 0 and slow.spills > 0  # tl.sin and tl.cos carry Payne-Hanek tables

"""Every Triton kernel compiled to machine code for sm_80 and sm_90, without a GPU, and what that code must look like."""

import os
import re

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

import triton
import triton.language as tl
from afd_kernels import nft as kernels
from afd_kernels import noise as noise_kernels
from afd_kernels.layout import TILE, Frames, Slot, Source

from tests.aot import compile_kernel

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
OFF = dict(
    X0=False, REF_X0=False, SOURCE=Source.NOISE.value, HAS_OLD=False, HAS_REF=True, HAS_MASK=False, HAS_SIGMA=False,
    WEIGHTED=False, HAS_EACH=False, BY_R=False, FRAMES=Frames.ONE.value, GRAD=False, SCALED=False, GUARD=False, SUMS=0, PACKED=False, CU_BLOCK=1,
)  # fmt: skip
SEED, X_T, LONG = Source.SEED.value, Source.X_T.value, Frames.LONG.value
PRIOR, EVERY = Slot.PRIOR.bit, (1 << len(Slot)) - 1
PLAIN = Slot.POS.bit | PRIOR
ADAPTIVE = Slot.SIZE.bit | Slot.SIZE_GAP.bit | Slot.POS.bit | Slot.NEG.bit  # the four sums of the weights
DENSE = Slot.R_POS.bit | Slot.R_NEG.bit | Slot.R.bit
STATS = EVERY & ~(Slot.KEPT.bit | DENSE | Slot.R_PRIOR.bit)
SWEEPS = {  # flags, tensors read, bytes a bf16 element moves, instructions an element may cost (measured + 5 %)
    "afd, seed, loss and gradient": (dict(SOURCE=SEED, GRAD=True, SUMS=PLAIN), "v x0 ref", 8, 66),
    "afd, seed, loss only": (dict(SOURCE=SEED, SUMS=PLAIN), "v x0 ref", 6, 61.3),
    "afd, noise, loss and gradient": (dict(GRAD=True, SUMS=PLAIN), "v x0 y ref", 10, 22.7),
    "afd, gradient again": (dict(GRAD=True, SCALED=True, GUARD=True), "v x0 y ref", 10, 16.7),
    "adaptive, seed, weights": (dict(X0=True, SOURCE=SEED, HAS_OLD=True, HAS_REF=False, SUMS=ADAPTIVE), "v x0 old", 6, 75.8),
    "adaptive, seed, gradient": (dict(X0=True, SOURCE=SEED, HAS_OLD=True, GRAD=True, SUMS=PRIOR), "v x0 old ref", 10, 76.3),
    "adaptive, x_t, sums": (dict(X0=True, SOURCE=X_T, HAS_OLD=True, SUMS=ADAPTIVE | PRIOR), "v x0 y old ref", 10, 32.8),
    "adaptive, x_t, gradient": (dict(X0=True, SOURCE=X_T, HAS_OLD=True, GRAD=True, SCALED=True), "v x0 y old ref", 12, 24.3),
    "adaptive, noise, stats": (dict(X0=True, HAS_OLD=True, SUMS=STATS), "v x0 y old ref", 10, 60),
    "mask": (dict(GRAD=True, SUMS=PLAIN | Slot.KEPT.bit, HAS_MASK=True), "v x0 y ref mask", 11, 31.9),
    "adaptive, seed, per-frame t": (dict(X0=True, SOURCE=SEED, HAS_OLD=True, GRAD=True, SUMS=PRIOR, FRAMES=LONG), "v x0 old ref", 10, 81.6),
    "per-frame t": (dict(X0=True, GRAD=True, SUMS=PLAIN, FRAMES=LONG), "v x0 y ref", 10, 33.4),
    "r per element": (dict(X0=True, HAS_OLD=True, HAS_EACH=True, GRAD=True, SUMS=DENSE | PRIOR), "v x0 y old ref each", 16, 59.4),
    "weights": (dict(X0=True, HAS_OLD=True, GRAD=True, SUMS=PRIOR, HAS_MASK=True, WEIGHTED=True), "v x0 y old ref mask", 16, 45),
    "packed": (dict(X0=True, SOURCE=X_T, HAS_OLD=True, GRAD=True, SUMS=PLAIN, PACKED=True, CU_BLOCK=16), "v x0 y old ref", 12, 35.1),
}  # fmt: skip


def types(dtype: str, weighted: bool = False) -> dict:
    same = dict.fromkeys((f"{n}_ptr" for n in ("v", "x0", "y", "old", "ref", "grad", "out")), f"*{dtype}")
    floats = dict.fromkeys(
        (
            f"{n}_ptr"
            for n in (
                "part",
                "t",
                "sigma",
                "rows",
                "go",
                "r",
                "loss",
                "totals",
                "each",
                "policy_weight",
                "prior_weight",
            )
        ),
        "*fp32",
    )
    bytes_ = dict.fromkeys(("mask_ptr", "valid_ptr", "chosen_ptr"), "*fp32" if weighted else "*u8")
    longs = dict.fromkeys(("seed", "count", "programs", "length", "levels"), "i64") | {
        f"{n}_stride": "i64" for n in ("v", "x0", "y", "old", "ref", "mask", "each", "grad", "go")
    }
    rest = dict.fromkeys(("samples", "tiles", "frames", "inner"), "i32")
    scalars = dict.fromkeys(("beta", "ref_coef", "factor", "floor", "dpo_beta"), "fp32")
    return same | floats | bytes_ | longs | rest | scalars | {"sums_ptr": "*fp64", "cu_ptr": "*i64"}


def aligned(kernel) -> list[str]:
    return [n for n in kernel.arg_names if n.endswith(("_ptr", "_stride")) or n == "count"]


def build(kernel, dtype, flags, capability=90, **options):
    options = dict(enable_fp_fusion=False, aligned=aligned(kernel)) | options
    return compile_kernel(kernel, types(dtype, flags.get("WEIGHTED", False)), flags, capability=capability, **options)


def assert_exact_noise(c):
    """The same bits everywhere: per pair of normals the seven tl.fma that are written, nothing contracted, and of the
    approximate instructions the one whose result `root` corrects. Made where it is used, not moved between threads."""
    pairs = TILE // 128 // 2
    assert c.ptx.count("fma.rn.f32") == c.ptx.count("fma.") == 7 * pairs
    assert c.ptx.count("rsqrt.approx.ftz.f32") == c.ptx.count(".approx") == pairs
    assert c.conversions == 0


@triton.jit
def _sqrt_rn(x_ptr, out_ptr):
    i = tl.arange(0, 128)
    tl.store(out_ptr + i, tl.sqrt_rn(tl.load(x_ptr + i)))


@triton.jit
def _root(x_ptr, out_ptr):
    i = tl.arange(0, 128)
    tl.store(out_ptr + i, noise_kernels.root(tl.load(x_ptr + i)))


def formula(kernel, capability: int) -> str:
    """What the machine code of an elementwise kernel stores, x being what it loads; branches to slow paths left out."""
    sass = compile_kernel(kernel, {"x_ptr": "*fp32", "out_ptr": "*fp32"}, {}, capability=capability).sass
    value = {}
    for op, text in re.findall(r"(LDG|FMNMX|MUFU\.RSQ|FMUL|FFMA|STG)\S* (.*?) ;", sass):
        to, *names = text.replace(".reuse", "").split(", ")
        if op == "STG":
            return value[names[-1]]
        x = [re.sub(r"R\d+", lambda r: value.get(r[0], r[0]), n) for n in names]
        product = " * ".join(sorted(x[:2]))
        value[to] = {
            "LDG": "x",
            "FMNMX": "x",
            "MUFU.RSQ": f"rsq({x[0]})",
            "FMUL": f"({product})",
            "FFMA": f"({product} + {x[-1]})",
        }[op]
    raise AssertionError("nothing is stored")


@pytest.mark.parametrize("capability", [80, 90])
def test_the_square_root_is_the_one_of_ptx(capability):
    """For a normal argument sqrt.rn.f32 is the arithmetic of `root`, so that one is rounded as correctly as the other."""
    found = formula(_root, capability)
    assert found == formula(_sqrt_rn, capability) and found.count("rsq(x)") >= 4 and "0.5" in found


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
    itemsize = dict.fromkeys(big, BYTES[dtype]) | {"each_ptr": 4, "mask_ptr": 4 if flags.get("WEIGHTED") else 1}
    stored = c.written["grad_ptr"] * BYTES[dtype]
    if dtype == "bf16":
        assert sum(c.read[n] * itemsize[n] for n in big) + stored == moved * TILE
    per_instruction = 128 * 128 // 8  # bytes that a 128-bit access of 128 threads moves
    wide = lambda counts: counts.get(128, 0) * per_instruction
    assert wide(c.loads) == sum(c.read[n] * itemsize[n] for n in big if itemsize[n] > 1)
    assert wide(c.stores) == stored
    assert c.instructions * 128 / TILE <= budget * (1.0 if dtype == "bf16" else 1.05)
    if flags.get("SOURCE") == SEED:
        assert_exact_noise(c)


def test_a_gradient_that_stays_is_left_at_once():
    """grad_output [1, 1]: every thread loads it and leaves, before any address or coefficient."""
    flags = SWEEPS["afd, gradient again"][0]
    ptx = build(kernels.sweep_kernel, "bf16", OFF | flags).ptx
    assert ptx.split("bra", 1)[0].count("ld.global") == 2  # of policy and prior


def test_bytes_per_element():
    """AFD 12 and adaptive recipes 20 bytes a bf16 element, noising and gradient included, against 158-600 in eager code."""
    element = lambda kernel, flags: (lambda c: 2 * sum(
        n for a, n in (c.read + c.written).items() if a in ("v_ptr", "x0_ptr", "y_ptr", "old_ptr", "ref_ptr", "grad_ptr", "out_ptr")
    ) // TILE)(build(kernel, "bf16", flags))  # fmt: skip
    noising = element(noise_kernels.forward_noise_kernel, dict(SEED=True, FRAMES=Frames.ONE.value))
    sweep = lambda case: element(kernels.sweep_kernel, OFF | SWEEPS[case][0])
    assert noising + sweep("afd, seed, loss and gradient") == 12
    assert noising + sweep("adaptive, seed, weights") + sweep("adaptive, seed, gradient") == 20


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("seed,frames,budget", [  # instructions an element may cost (measured + 5 %)
    (True, Frames.ONE, 51.6), (False, Frames.ONE, 9.5), (True, Frames.LONG, 56.8), (False, Frames.LONG, 14.4), (True, Frames.SHORT, 80.3),
])  # fmt: skip
def test_forward_noise(dtype, seed, frames, budget):
    c = build(noise_kernels.forward_noise_kernel, dtype, dict(SEED=seed, FRAMES=frames.value))
    if seed:
        assert_exact_noise(c)
    assert c.stack == 0 and c.spills == 0 and not c.backward_branch
    assert c.read["x0_ptr"] == c.written["out_ptr"] == TILE and c.read["y_ptr"] == (0 if seed else TILE)
    assert c.loads[128] * 2048 == (TILE if seed else 2 * TILE) * BYTES[dtype]
    assert c.stores == {128: TILE * BYTES[dtype] // 2048}
    assert c.instructions * 128 / TILE <= budget


FINISH = dict(
    ADAPTIVE=True, SHARED=False, DPO=False, SAMPLE_MEAN=True, BATCH_MEAN=True, REF_BATCH=False, BY_R=True, EMPTY_ALL=True,
    HAS_OLD=True, HAS_REF=True, HAS_VALID=True, HAS_CHOSEN=True, HAS_POLICY=True, HAS_PRIOR=True, HAS_MASK=True,
    HAS_EACH=True, FINAL=True, STATS=True, PACKED=False, BLOCK=64,
)  # fmt: skip


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_everything_compiles(capability, dtype):
    full = OFF | dict(
        X0=True, REF_X0=True, SOURCE=SEED, HAS_OLD=True, HAS_MASK=True, HAS_SIGMA=True,
        SUMS=STATS | Slot.KEPT.bit,
    )  # fmt: skip
    gradient = dict(
        GRAD=True, SUMS=full["SUMS"] & ~(Slot.SIZE.bit | Slot.SIZE_GAP.bit)
    )  # these two come from a sweep before
    for flags in (full, full | gradient):  # statistics of masked samples from a seed: a few registers go to the cache
        assert build(kernels.sweep_kernel, dtype, flags, capability).spills <= 16
    plain = dict(GRAD=True, SUMS=PLAIN | Slot.NEG.bit | Slot.KEPT.bit)
    for kernel, flags in (
        (kernels.sweep_kernel, full | gradient | dict(HAS_MASK=False)),
        (kernels.sweep_kernel, full | plain), (kernels.sweep_kernel, full | plain | dict(SCALED=True)), (kernels.sweep_kernel, OFF | dict(SOURCE=X_T, GRAD=True, GUARD=True, SCALED=True)),
        (kernels.reduce_kernel, dict(SUMS=EVERY, PACKED=True, CU_BLOCK=8)), (kernels.finish_kernel, FINISH),
        (kernels.finish_kernel, FINISH | dict(PACKED=True, FINAL=False, ADAPTIVE=False)),
        (kernels.finish_kernel, FINISH | dict(DPO=True, REF_BATCH=True, SHARED=True, HAS_EACH=False)),
        (noise_kernels.forward_noise_kernel, dict(SEED=True, FRAMES=LONG)),
        (noise_kernels.forward_noise_kernel, dict(SEED=True, FRAMES=Frames.SHORT.value)),
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

"""The operators of Wan's block: against float64, under gradcheck, opcheck and compile, and their sm_90 code."""

import collections
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from afd_fast.ops import transformer as ops
from afd_fast.reference import transformer as reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
B, FRAMES, TOKENS = 2, 3, 5


def rand(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape))).to(
        dtype
    )


def norm_cases(dtype, width=12, frames=FRAMES, batch=B):
    length = FRAMES * TOKENS
    x, y = rand(B, length, width, dtype=dtype), rand(B, length, width, dtype=dtype, seed=1)
    table = rand(batch, frames, 6, width, dtype=dtype, seed=2)  # rows of the modulation table: strided views
    shift, scale, gate = table.unbind(2)[:3]
    weight, bias = 1 + rand(width, dtype=dtype, seed=3) / 4, rand(width, dtype=dtype, seed=4)
    return {
        "norm_modulate": (x, scale, shift),
        "gate_modulate": (x, y, gate, None, None, scale, shift),
        "gate_affine": (x, y, gate, weight, bias, None, None),
        "add_modulate": (x, y, None, None, None, scale, shift),
        "rms_norm": (x, weight),
    }


def call(name, args, module, official=True):
    rounding = {"official_rounding": official}
    if name in ("norm_modulate", "rms_norm"):
        return (getattr(module, name)(*args, **rounding),)
    x, y, gate, weight, bias, scale, shift = args
    return module.residual_norm(x, y, gate, weight=weight, bias=bias, scale=scale, shift=shift, **rounding)


def rope_case(dtype, heads=2, dim=6, frames=FRAMES, start=0):
    length = frames * TOKENS
    q, k, v = (rand(B, length, heads * dim, dtype=dtype, seed=s) for s in range(3))
    weights = [1 + rand(heads * dim, dtype=dtype, seed=s) / 4 for s in (5, 6)]
    wide = torch.promote_types(dtype, torch.float32)
    return q, k, v, *weights, *reference.rope_tables(dim, (start, start + frames), 1, TOKENS, dtype=wide)


def to(args, dtype):
    return tuple(a.to(dtype) if isinstance(a, torch.Tensor) else a for a in args)


def within(out, eager, exact):
    """Error <= 2 (eager error + eps max), against float64; float64 itself to rounding."""
    if out.dtype == torch.float64:
        assert (out - exact).abs().max() < 1e-13 * max(1, exact.abs().max())
        return
    bound = 2 * ((eager.double() - exact).abs().max() + torch.finfo(out.dtype).eps * exact.abs().max())
    assert (out.double() - exact).abs().max() <= bound


# ---------------------------------------------------------------- the operators on this CPU


@pytest.mark.parametrize("name", norm_cases(torch.float64))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("official", [True, False])
@pytest.mark.parametrize("rows", [(1, 1), (2, 3), (1, 3), (2, 1)])
def test_operator_is_the_reference(name, dtype, official, rows):
    args = norm_cases(dtype, batch=rows[0], frames=rows[1])[name]
    exact = call(name, to(args, torch.float64), reference)
    with torch.no_grad():
        outs = call(name, args, ops, official)
    for out, eager, wide in zip(outs, call(name, args, reference, official), exact):
        assert out.dtype == dtype and torch.equal(out, eager)
        assert (out.double() - wide).abs().max() <= 12 * torch.finfo(dtype).eps * wide.abs().max()


def test_equations():
    """Against the formulas, written out once more."""
    x, y, gate, _, _, scale, shift = norm_cases(torch.float64)["gate_modulate"]
    rows = lambda m: m.repeat_interleave(TOKENS, 1)
    stream, normed = ops.residual_norm(x, y, gate, scale=scale, shift=shift)
    expected = x + y * rows(gate)
    n = (expected - expected.mean(-1, keepdim=True)) / (expected.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    assert (stream - expected).abs().max() < 1e-14 and (
        normed - (n * (1 + rows(scale)) + rows(shift))
    ).abs().max() < 1e-13
    cos, sin = reference.rope_tables(16, (7, 9), 3, 4, dtype=torch.float64)
    z = torch.view_as_complex(rand(1, 24, 1, 8, 2))
    turned = reference.apply_rope(torch.view_as_real(z).flatten(-2), cos, sin)
    assert (turned - torch.view_as_real(z * torch.complex(cos, sin)[:, None]).flatten(-2)).abs().max() < 1e-14
    frame, row, column = 8, 1, 2
    angles = (
        [frame * 10000 ** -(i / 4) for i in range(4)]
        + [row * 100.0**-i for i in range(2)]
        + [column * 100.0**-i for i in range(2)]
    )
    index = (frame - 7) * 12 + row * 4 + column
    assert (cos[index] - torch.tensor(angles, dtype=torch.float64).cos()).abs().max() < 1e-14


@pytest.mark.parametrize("name", norm_cases(torch.float64))
def test_gradcheck(name):
    args = [
        a
        if a is None
        else a.detach().clone()[:, :5].requires_grad_()
        if a.ndim == 3 and a.shape[1] == 15
        else a.detach().clone().requires_grad_()
        for a in norm_cases(torch.float64, width=4, frames=1)[name]
    ]
    assert torch.autograd.gradcheck(lambda *a: call(name, a, ops), args)


def test_gradcheck_rope():
    q, k, _, wq, wk, cos, sin = rope_case(torch.float64, heads=1, dim=6, frames=1)
    args = [a.requires_grad_() for a in (q, k, wq, wk)]
    assert torch.autograd.gradcheck(lambda *a: ops.qk_norm_rope(*a, cos, sin), args)


@pytest.mark.parametrize("name", norm_cases(torch.float64))
def test_opcheck(name):
    args = norm_cases(torch.float32)[name]
    operator = getattr(torch.ops.afd_fast, name if name in ("norm_modulate", "rms_norm") else "residual_norm").default
    torch.library.opcheck(operator, (*args, 1e-6, True))


def test_opcheck_rope():
    q, k, v, wq, wk, cos, sin = rope_case(torch.float32)
    torch.library.opcheck(torch.ops.afd_fast.qk_norm_rope.default, (q, k, wq, wk, cos, sin, 1e-6, True))
    caches = [torch.zeros(B, 4 * TOKENS, 2, 6) for _ in range(2)]
    args = (q, k, v, wq, wk, cos, sin, *caches, TOKENS, 3, 4, 1, 1e-6, True)
    torch.library.opcheck(torch.ops.afd_fast.qk_norm_rope_write.default, args)


@pytest.mark.parametrize("name", norm_cases(torch.float64))
def test_compiles_forward_and_backward(name):
    torch._dynamo.reset()
    args = [a if a is None else a.detach().clone().requires_grad_() for a in norm_cases(torch.float32)[name]]
    compiled = torch.compile(
        lambda *a: sum(o.square().sum() for o in call(name, a, ops)), backend="aot_eager", fullgraph=True
    )
    leaves = [a for a in args if a is not None]
    grads = torch.autograd.grad(compiled(*args), leaves)
    expected = torch.autograd.grad(sum(o.square().sum() for o in call(name, args, ops)), leaves)
    for a, b in zip(grads, expected):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), sum(o.square().sum() for o in call(name, args, ops)))


@pytest.mark.parametrize("start, window, sink", [(0, None, 0), (3, 6, 0), (5, 6, 0), (6, 7, 2), (4, 5, 2)])
def test_cache_write(start, window, sink):
    """Queries as without a cache; keys and values in the ring's slots, the rest of the buffer untouched."""
    q, k, v, wq, wk, cos, sin = rope_case(torch.float64, start=start)
    slots = window or 8
    caches = [torch.full((B, slots * TOKENS, 2, 6), float("nan"), dtype=torch.float64) for _ in range(2)]
    with torch.no_grad():
        out = ops.qk_norm_rope_write(
            q, k, v, wq, wk, cos, sin, *caches, tokens=TOKENS, start_frame=start, window=window, sink=sink
        )
        expected_q, expected_k = ops.qk_norm_rope(q, k, wq, wk, cos, sin)
    assert torch.equal(out, expected_q)
    written = [reference.ring_slot(start + f, window, sink) for f in range(FRAMES)]
    for cache, source in zip(caches, (expected_k, v.view_as(expected_k))):
        frames = cache.unflatten(1, (slots, TOKENS))
        assert torch.equal(frames[:, written], source.unflatten(1, (FRAMES, TOKENS)))
        assert frames[:, [s for s in range(slots) if s not in written]].isnan().all()


def test_refusals():
    x, y, gate, _, _, scale, shift = norm_cases(torch.float32)["gate_modulate"]
    with pytest.raises(ValueError, match="either"):
        ops.residual_norm(x, y, gate)
    with pytest.raises(ValueError, match="either"):
        ops.residual_norm(x, y, gate, scale=scale, shift=shift, weight=x[0, 0], bias=x[0, 0])
    with pytest.raises(ValueError, match="differ"):
        ops.residual_norm(x, y[:, 1:], gate, scale=scale, shift=shift)
    with pytest.raises(ValueError, match="does not fit"):
        ops.norm_modulate(x, scale[..., 1:], shift)
    with pytest.raises(ValueError, match="divide"):
        ops.norm_modulate(x[:, 1:], scale, shift)
    q, k, v, *rest = rope_case(torch.float32)
    cache = torch.zeros(B, 15, 2, 6)
    with pytest.raises(RuntimeError, match="no_grad"):
        ops.qk_norm_rope_write(q.requires_grad_(), k, v, *rest, cache, cache.clone(), tokens=TOKENS, start_frame=0)


# ---------------------------------------------------------------- the Triton kernels, interpreted


@pytest.mark.skipif(INTERPRETED, reason="this is the child")
def test_kernels_in_the_interpreter():
    """Runs the `interpreted_` tests below in a process where Triton interprets instead of compiling."""
    env = os.environ | {"TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        str(Path(__file__)),
        "-k",
        "interpreted",
    ]
    result = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert re.search(r"\d\d+ passed", result.stdout)


interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 from the start")


@pytest.fixture(scope="module")
def kernels():
    """The launchers, with the interpreter's bfloat16 store mended: it truncates where the GPU rounds to even."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(data, source, target, mode):
        if source == tl.float32 and target == tl.bfloat16:
            bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32).astype(np.uint64)
            return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).reshape(data.shape)
        return convert(data, source, target, mode)

    interpreter._convert_float = rounding
    from afd_kernels import transformer

    yield transformer
    interpreter._convert_float = convert


@interpreted
@pytest.mark.parametrize("name", norm_cases(torch.float64))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("official", [True, False])
@pytest.mark.parametrize("rows, width", [((1, 1), 16), ((2, 3), 13)])
def test_interpreted_norms(kernels, name, dtype, official, rows, width):
    args = norm_cases(dtype, width=width, batch=rows[0], frames=rows[1])[name]
    exact = call(name, to(args, torch.float64), reference)
    eager = call(name, args, reference, official)
    launcher = getattr(kernels, name, kernels.residual_norm)
    outs = launcher(*args, 1e-6, official)
    for out, e, x in zip(outs if isinstance(outs, tuple) else (outs,), eager, exact):
        within(out, e, x)
        if dtype == torch.bfloat16 and official:  # the same roundings: only sums may differ, by an ulp here and there
            assert (out != e).float().mean() < 0.02


@interpreted
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("official", [True, False])
def test_interpreted_rope(kernels, dtype, official):
    q, k, _, wq, wk, cos, sin = rope_case(dtype, heads=3, dim=10)  # width 30: the block is masked
    wide = reference.rope_tables(10, (0, FRAMES), 1, TOKENS, dtype=torch.float64)
    exact = reference.qk_norm_rope(*to((q, k, wq, wk), torch.float64), *wide)
    eager = reference.qk_norm_rope(q, k, wq, wk, cos, sin, official_rounding=official)
    for out, e, x in zip(kernels.qk_norm_rope(q, k, wq, wk, cos, sin, 1e-6, official), eager, exact):
        within(out, e, x)


@interpreted
@pytest.mark.parametrize("start, window, sink", [(0, 0, 0), (5, 6, 0), (6, 7, 2), (0, 3, 0)])
def test_interpreted_cache_write(kernels, start, window, sink):
    q, k, v, *rest = rope_case(torch.float32, start=start)
    slots = window or 8
    everything = [torch.full((2, B, slots * TOKENS, 2, 6), float("nan")) for _ in range(2)]
    mine, theirs = ([c[i] for c in everything] for i in (0, 1))
    packed = torch.cat([q, k, v], -1)  # one fused projection: q, k, v are strided slices of it
    out = kernels.qk_norm_rope_write(*packed.chunk(3, -1), *rest, *mine, TOKENS, start, window, sink, 1e-6, True)
    with torch.no_grad():
        expected = ops.qk_norm_rope_write(
            q, k, v, *rest, *theirs, tokens=TOKENS, start_frame=start, window=window or None, sink=sink
        )
    torch.testing.assert_close(out, expected)
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b, equal_nan=True)
        assert not torch.isnan(b).all()


@interpreted
def test_interpreted_edges(kernels):
    """Size 1, a view with a batch stride, nothing at all."""
    x, scale = rand(1, 1, 1, dtype=torch.float32), rand(1, 1, 1, dtype=torch.float32, seed=1)
    torch.testing.assert_close(
        kernels.norm_modulate(x, scale, scale, 1e-6, True), reference.norm_modulate(x, scale, scale)
    )
    x, y, gate, _, _, scale, shift = norm_cases(torch.float32)["gate_modulate"]
    cut = slice(0, TOKENS)
    outs = kernels.residual_norm(x[:, cut], y[:, cut], gate[:, :1], None, None, scale[:, :1], shift[:, :1], 1e-6, True)
    expected = reference.residual_norm(x[:, cut], y[:, cut], gate[:, :1], scale=scale[:, :1], shift=shift[:, :1])
    torch.testing.assert_close(outs, expected)
    assert kernels.rms_norm(x[:0], scale[0, 0], 1e-6, True).shape == (0, *x.shape[1:])


# ---------------------------------------------------------------- the Triton kernels, compiled for sm_90

POINTERS = "X Y GATE WEIGHT BIAS SCALE SHIFT X_OUT OUT Q K V WEIGHT_Q WEIGHT_K Q_OUT K_OUT V_OUT".split()


def compile_sm90(kernel, **constants):
    """(resource usage, counts of SASS instructions by name) of a kernel for bfloat16 rows of 1536."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {"OFFICIAL": True, "WIDE": tl.float32, "BLOCK": 2048, "HALF": 64, **constants}
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    signature = {}
    for name in kernel.arg_names:
        pointer = "*bf16" if name in POINTERS else "*fp32" if name in ("COS", "SIN") else None
        signature[name] = "constexpr" if name in constants else pointer or ("fp32" if name == "eps" else "i32")
    divisible = [n for n, t in signature.items() if t.startswith("*") or n == "D" or re.fullmatch(r"\w+_[blf]", n)]
    index = kernel.arg_names.index
    source = ASTSource(
        kernel,
        signature,
        {(index(n),): v for n, v in constants.items()},
        {(index(n),): [["tt.divisibility", 16]] for n in divisible},
    )
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["cubin"]
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        run = lambda *options: (
            subprocess.run([tools, *options, file.name], capture_output=True, text=True, check=True).stdout
        )
        usage, sass = run("--dump-resource-usage"), run("-sass")
    names = re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.M)
    return {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}, collections.Counter(names)


# 16 elements a thread = two 16-byte accesses of a bfloat16 tensor; the registers are the measured ones + 10 %
KERNELS = {
    "first norm": ("residual_norm_kernel", dict(HAS_Y=False, HAS_GATE=False, AFFINE=False), 3, 1, 44),
    "gate + modulation": ("residual_norm_kernel", dict(HAS_Y=True, HAS_GATE=True, AFFINE=False), 5, 2, 44),
    "gate + affine": ("residual_norm_kernel", dict(HAS_Y=True, HAS_GATE=True, AFFINE=True), 5, 2, 52),
    "one rounding": ("residual_norm_kernel", dict(HAS_Y=True, HAS_GATE=True, AFFINE=False, OFFICIAL=False), 5, 2, 54),
    "rms": ("rms_norm_kernel", {}, 2, 1, 40),
}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("case", KERNELS)
def test_sm90_code(case):
    """No stack, no spills, every tensor moved once and 16 bytes at a time, registers in a budget."""
    from afd_kernels import transformer

    name, constants, loads, stores, registers = KERNELS[case]
    usage, code = compile_sm90(getattr(transformer, name), **constants)
    assert usage["STACK"] == usage["LOCAL"] == 0 and usage["REG"] <= registers, usage
    widths = collections.Counter()
    for instruction, count in code.items():
        if instruction.startswith(("LDG", "STG")):
            widths[instruction[:3], "128" in instruction] += count
    assert widths == {("LDG", True): 2 * loads, ("STG", True): 2 * stores}, widths


@pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")
def test_sm90_code_of_rope():
    """Three roles, each moving its row once: q and k with weight, cosines and sines, v as a copy."""
    from afd_kernels import transformer

    usage, code = compile_sm90(transformer.qk_norm_rope_kernel)
    assert usage["STACK"] == usage["LOCAL"] == 0 and usage["REG"] <= 42, usage
    moves = {i: n for i, n in code.items() if i.startswith(("LDG", "STG"))}
    assert moves == {"LDG.E.128": 2 * (4 + 4 + 1), "STG.E.128": 2 * 3}, moves

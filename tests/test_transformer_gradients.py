"""The gradients through the operators of Wan's block, as CUDA computes them: of activations one kernel each, of weights and
modulations sums."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from afd_fast.ops import transformer as ops
from afd_fast.reference import transformer as reference
from tests.test_transformer_ops import FRAMES, INTERPRETED, POINTERS, call, norm_cases, rand, rope_case, to, within

CASES = [*norm_cases(torch.float64), "rope"]
compiled_only = pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")


@pytest.fixture
def fused(monkeypatch):
    """The choice that CUDA makes, with the operators' CPU implementations."""
    monkeypatch.setattr(ops, "_fused", lambda *_: True)


def case(name, dtype, width=12, trained=False, **sizes):
    """(tensors, function of them and a module): what has a gradient, and the rest bound. trained: weights and modulations too."""
    if name == "rope":
        q, k, _, *rest = rope_case(dtype, heads=width // 6)
        args, count = [q, k, *rest], 4 if trained else 2
    else:
        args = list(norm_cases(dtype, width=width, **sizes)[name])
        count = len(args) if trained else 1 if name in ("norm_modulate", "rms_norm") else 2
    places = [i for i, a in enumerate(args[:count]) if a is not None]

    def function(a, module, official=True):
        given = list(args)
        for i, x in zip(places, a):
            given[i] = x
        if name == "rope":
            return module.qk_norm_rope(*given, official_rounding=official)
        return call(name, tuple(given), module, official)

    return [args[i] for i in places], function


def gradients(name, dtype, module, official=True, **sizes):
    """For random gradients of every result."""
    inputs, function = case(name, dtype, **sizes)
    inputs = [a.clone().requires_grad_() for a in inputs]
    outs = function(inputs, module, official)
    return torch.autograd.grad(outs, inputs, [rand(*o.shape, dtype=dtype, seed=7 + i) for i, o in enumerate(outs)])


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name, trained, fused):
    inputs, function = case(name, torch.float64, width=6, trained=trained)
    inputs = [(a[:1] if name == "rope" and a.ndim > 1 else a).requires_grad_() for a in inputs]
    assert torch.autograd.gradcheck(lambda *a: function(a, ops), inputs)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("official", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_no_worse_than_autograd(name, official, dtype, fused):
    exact = gradients(name, torch.float64, reference, trained=True)
    found, autograd = (gradients(name, dtype, module, official, trained=True) for module in (ops, reference))
    for got, eager, want in zip(found, autograd, exact, strict=True):
        assert got.dtype == dtype
        within(got, eager, want)


@pytest.mark.parametrize("name", ["gate_modulate", "add_modulate"])
@pytest.mark.parametrize("used", [0, 1])
def test_one_result_used(name, used, fused):
    """The head uses the norm alone; nobody has to use it."""
    grads = []
    for module in (ops, reference):
        inputs, function = case(name, torch.float64)
        inputs = [a.requires_grad_() for a in inputs]
        grads.append(torch.autograd.grad(function(inputs, module)[used].square().sum(), inputs))
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_cpu_tensors_take_the_reference():
    """Bit for bit what autograd makes of it: nothing changed on the CPU."""
    for name in CASES:
        assert all(map(torch.equal, gradients(name, torch.float32, ops), gradients(name, torch.float32, reference)))
    x, weight = (a.requires_grad_() for a in norm_cases(torch.float32)["rms_norm"])
    assert ops.rms_norm(x, weight).grad_fn is not None
    assert ops._fused(torch.empty(1, device="meta")) and not ops._fused(x.detach())


@pytest.mark.parametrize("name", ["gate_modulate", "rms_norm", "rope"])
def test_compiles(name, fused):
    torch._dynamo.reset()
    inputs, function = case(name, torch.float32)
    inputs = [a.requires_grad_() for a in inputs]
    total = lambda *a: sum(o.square().sum() for o in function(a, ops))
    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(total(*inputs), inputs)):
        torch.testing.assert_close(a, b)


def backward_arguments(name, dtype, **sizes):
    """(operator's name, its arguments)."""
    if name == "rope":
        q, k, _, *rest = rope_case(dtype, heads=3, dim=10)
        grads = [rand(*q.shape[:2], 3, 10, dtype=dtype, seed=s) for s in (8, 9)]
        return "qk_norm_rope_backward", (q, k, *grads, *rest, 1e-6)
    args = norm_cases(dtype, **sizes)[name]
    grad = rand(*args[0].shape, dtype=dtype, seed=8)
    if name == "rms_norm":
        return "rms_norm_backward", (args[0], grad, args[1], 1e-6)
    if name == "norm_modulate":
        return "residual_norm_backward", (args[0], None, grad, None, None, args[1], 1e-6, True)
    x, y, gate, weight, _, scale, _ = args
    return "residual_norm_backward", (x, rand(*x.shape, dtype=dtype, seed=9), grad, gate, weight, scale, 1e-6, True)


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    operator, args = backward_arguments(name, torch.float32)
    torch.library.opcheck(getattr(torch.ops.afd_fast, operator).default, args)


@pytest.mark.skipif(INTERPRETED, reason="this is the child")
def test_kernels_in_the_interpreter():
    """Runs the `interpreted` test below in a process where Triton interprets instead of compiling."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "interpreted"]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.returncode == 0 and re.search(r"\d\d passed", result.stdout), result.stdout[-3000:]


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 from the start")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width, rows", [(16, (1, 1)), (13, (2, FRAMES))])
def test_interpreted(name, dtype, width, rows):
    """Values, bounds, races; activations and gradients read once, results written once."""
    from afd_kernels import transformer as kernels

    from tests.interpreter import install, sanitize

    install()
    operator, args = backward_arguments(name, dtype, width=width, batch=rows[0], frames=rows[1])
    function = lambda module, args: getattr(module, operator)(*args)
    cpu = getattr(ops, f"_{operator}_cpu")
    read, written = {
        "residual_norm_backward": (["X", "GRAD_OUT"], ["X_GRAD"]), "rms_norm_backward": (["X", "GRAD"], ["OUT"]),
        "qk_norm_rope_backward": (["Q", "K", "GRAD_Q", "GRAD_K"], ["Q_OUT", "K_OUT"]),
    }[operator]  # fmt: skip
    with sanitize() as report:
        found = function(kernels, args)
    report.check(read_once=read, written_once=written)
    exact = cpu(*to(args, torch.float64))
    for got, eager, want in zip(*((o if isinstance(o, tuple) else (o,)) for o in (found, cpu(*args), exact))):
        assert got.dtype == dtype and got.shape == want.shape
        if want.numel():
            within(got, eager, want)
    # rows that are strided views, as slices of a projection, and nothing at all
    wide = [torch.cat([a, a], -1)[..., : a.shape[-1]] if i < 2 and a is not None else a for i, a in enumerate(args)]
    again = function(kernels, wide)
    first = lambda o: o[0] if isinstance(o, tuple) else o
    assert torch.equal(first(again), first(found))
    empty = [a[:0] if isinstance(a, torch.Tensor) and a.ndim >= 3 else a for a in args]
    assert first(function(kernels, empty)).numel() == 0


KERNELS = {  # tensors read and written, registers and instructions per element of 2048
    "gate + modulation": ("residual_norm_backward_kernel", dict(HAS_X=True, HAS_GATE=True, AFFINE=False), 5, 2, 72, 45),
    "affine": ("residual_norm_backward_kernel", dict(HAS_X=True, HAS_GATE=True, AFFINE=True), 5, 2, 64, 45),
    "first": ("residual_norm_backward_kernel", dict(HAS_X=False, HAS_GATE=False, AFFINE=False), 3, 1, 64, 40),
    "rms": ("rms_norm_backward_kernel", {}, 3, 1, 64, 30),
    "rope": ("qk_norm_rope_backward_kernel", {}, 3, 1, 64, 75),
}


@compiled_only
@pytest.mark.parametrize("case", KERNELS)
def test_sm90_code(case):
    """No stack, no spills, every tensor moved once and 16 bytes at a time, registers and instructions in a budget."""
    import triton.language as tl
    from afd_kernels import transformer

    from tests.aot import compile_kernel

    name, constants, loads, stores, registers, instructions = KERNELS[case]
    kernel = getattr(transformer, name)
    constants = {"OFFICIAL": True, "WIDE": tl.float32, "BLOCK": 2048, "HALF": 64, **constants}
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    pointers = {*POINTERS, "GRAD", "GRAD_X", "GRAD_OUT", "X_GRAD", "Y_GRAD", "GRAD_Q", "GRAD_K"}
    types = {n: "*bf16" if n in pointers else "*fp32" if n in ("COS", "SIN") else "i32" for n in kernel.arg_names}
    types["eps"] = "fp32"
    aligned = [n for n, t in types.items() if t.startswith("*") or n == "D" or re.fullmatch(r"\w+_[blf]", n)]
    c = compile_kernel(kernel, types, constants, aligned=[n for n in aligned if n not in constants])
    assert c.stack == c.spills == 0 and not c.backward_branch and c.registers <= registers
    assert set(c.loads) == set(c.stores) == {128}
    if case == "rope":  # with cosines and sines, float32, half a row each; the compiler may merge the two roles
        assert (c.loads[128], c.stores[128]) in ((2 * (loads + 2), 2 * stores), (4 * (loads + 2), 4 * stores))
    else:
        assert (c.loads[128], c.stores[128]) == (2 * loads, 2 * stores)
    assert c.instructions * 128 / 2048 <= instructions

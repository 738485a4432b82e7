"""`norm_silu`: against diffusers' norm, gradcheck, opcheck, compile, the interpreted kernel, its sm_90 code."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from afd_fast.ops.vae import norm_silu
from afd_fast.reference import vae as reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LAYOUTS = (torch.contiguous_format, torch.channels_last_3d)


def case(dtype=torch.float32, shape=(2, 6, 3, 4, 5), layout=torch.contiguous_format, seed=0):
    """x, weight, past."""
    g = torch.Generator().manual_seed(seed)
    n = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)
    past = n(*shape[:2], 2, *shape[3:]).contiguous(memory_format=layout)
    return n(*shape).contiguous(memory_format=layout), 1 + 0.1 * n(shape[1]), past


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_is_diffusers_norm_bit_for_bit(dtype):
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    x, weight, past = case(dtype)
    x[0, :, 0, 0, 0] = 0  # a pixel without a direction
    norm = WanRMS_norm(6, images=False).to(dtype)
    norm.gamma.data.copy_(weight.view(-1, 1, 1, 1))
    with torch.no_grad():
        expected = F.silu(norm(x))
        out, kept = norm_silu(x, weight, past)
        start, short = norm_silu(x[:, :, :1], weight)
        first = F.silu(norm(x[:, :, :1]))
    assert torch.equal(out, torch.cat([past, expected], 2)) and torch.equal(kept, expected[:, :, -2:])
    assert torch.equal(start[:, :, 2:], first) and not start[:, :, :2].any()
    assert torch.equal(short, start[:, :, 1:])


@pytest.mark.parametrize("with_past", [False, True])
def test_gradcheck(with_past):
    x, weight, past = (a.requires_grad_() for a in case(torch.float64, (1, 3, 2, 1, 2)))
    args = (x, weight, past) if with_past else (x, weight)
    assert torch.autograd.gradcheck(norm_silu, args)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_past", [False, True])
def test_opcheck(layout, with_past):
    x, weight, past = case(layout=layout)
    torch.library.opcheck(torch.ops.afd_fast.norm_silu.default, (x, weight, past if with_past else None))


def test_compiles_forward_and_backward():
    torch._dynamo.reset()
    args = [a.requires_grad_() for a in case()]
    total = lambda *a: sum(o.square().sum() for o in norm_silu(*a))
    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(*args), args), torch.autograd.grad(total(*args), args)):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), total(*args))


def test_refusals():
    x, weight, past = case()
    for bad in ((x[0], weight), (x, weight[:4]), (x, weight, past[:, :, :1])):
        with pytest.raises(ValueError, match="norm_silu"):
            norm_silu(*bad)


@pytest.mark.skipif(INTERPRETED, reason="this is the child")
def test_kernel_in_the_interpreter():
    """Runs the `interpreted` tests below in a process where Triton interprets instead of compiling."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "interpreted"]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.returncode == 0 and re.search(r"\d\d passed", result.stdout), result.stdout[-3000:]


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 from the start")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(2, 6, 3, 4, 5), (1, 16, 1, 3, 1), (1, 5, 2, 1, 7), (2, 1, 1, 1, 1), (1, 384, 2, 3, 5)]
)
def test_interpreted(shape, dtype, layout):
    """Values, layouts, bounds, races; every element read and written once, but for the two frames that are kept."""
    from afd_kernels import vae as kernels

    from tests.interpreter import install, sanitize

    install()
    x, weight, past = case(dtype, shape, layout)
    x[0, :, 0, 0, 0] = 0
    views = (x, x.transpose(1, 2).contiguous().transpose(1, 2))  # the second as a 2-D convolution leaves it
    for a, before in ((views[0], past), (views[0], None), (views[1], past)):
        with sanitize() as report:
            found = kernels.norm_silu(a, weight, before)
        report.check(read_once=["X"] + ["PAST"] * (before is not None), written_once=["OUT", "KEPT"])
        exact = reference.norm_silu(x.double(), weight.double(), None if before is None else before.double())
        for got, want, eager in zip(found, exact, reference.norm_silu(x, weight, before)):
            assert got.dtype == dtype and got.shape == want.shape
            if a is x:
                assert got.is_contiguous(memory_format=layout)
            bound = 2 * ((eager.double() - want).abs().max() + torch.finfo(dtype).eps * want.abs().max())
            assert (got.double() - want).abs().max() <= bound
            if dtype == torch.bfloat16:  # the same roundings: only a sum's last bit may differ
                assert (got != eager).float().mean() < 0.02
    assert kernels.norm_silu(x[:0], weight, None)[0].shape == (0, shape[1], shape[2] + 2, *shape[3:])


@pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize(
    "dtype, channels, budget", [("bf16", 96, 31), ("bf16", 192, 31), ("bf16", 384, 31), ("fp32", 96, 33)]
)
def test_sm90_code(dtype, channels, budget):
    """Channels innermost: no stack, no spills, 16 bytes an access, each tensor once, instructions per element."""
    import triton
    from afd_kernels import vae as kernels

    from tests.aot import compile_kernel

    block = triton.next_power_of_2(channels)
    pixels = kernels.TILE // block
    kernel = kernels.norm_silu_kernel
    types = {n: f"*{dtype}" if n in ("X", "WEIGHT", "PAST", "OUT", "KEPT") else "i32" for n in kernel.arg_names}
    types["scale"] = "fp32"
    ones = dict.fromkeys(("x_c", "past_c", "out_c", "kept_c"), 1)
    aligned = [n for n in types if n not in ("pixels", "frames", "scale", "HAS_PAST", "P", "BLOCK", *ones)]
    c = compile_kernel(kernel, types, ones | {"HAS_PAST": True, "P": pixels, "BLOCK": block}, aligned=aligned)
    assert c.stack == 0 and c.spills == 0 and not c.backward_branch
    assert c.read["X"] == c.read["PAST"] == c.written["OUT"] == c.written["KEPT"] == kernels.TILE
    width = 16 // (2 if dtype == "bf16" else 4)
    accesses = kernels.TILE // (128 * width)
    assert c.stores == {128: 2 * accesses} and c.loads[128] == 2 * accesses
    assert sum(c.loads.values()) == 2 * accesses + 1  # and the weight
    assert c.instructions * 128 / kernels.TILE <= budget

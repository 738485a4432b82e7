"""What is measured: inputs, variants and the bytes a perfect implementation would move.

A variant is a function without arguments that does the whole pass (loss and gradient, or noising) and returns the
result that is checked. `copy` is a copy of the same bytes, measured in the same run.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

import afd_fast
from afd_fast.ops.nft import Inputs
from afd_fast.reference import flow
from afd_fast.reference import nft as reference
from benchmarks import eager, one_launch

SHAPES = {"wan": (21, 16, 60, 104), "sd3": (16, 64, 64), "tiny": (4, 8, 8), "flat": (1 << 20,)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Case:
    variants: dict[str, Callable]  # "eager" is the trainers' arithmetic
    bytes_moved: int
    exact: torch.Tensor | None  # float64 result; None where it is random


def _inputs(shape, dtype, device, names):
    g = torch.Generator(device=device).manual_seed(0)
    n = lambda: torch.randn(shape, device=device, generator=g).to(dtype)
    tensors = {name: n() for name in names}
    tensors["v"].requires_grad_() if "v" in tensors else None
    batch = shape[0]
    return tensors | {
        "r": torch.rand(batch, device=device, generator=g),
        "t": 0.1 + 0.8 * torch.rand(batch, device=device, generator=g),
    }


def _loss(shape, dtype, device, recipe, names, peer, seed, out, sweeps, check) -> Case:
    i = _inputs(shape, dtype, device, names)
    buffer = torch.empty_like(i["v"]).detach() if out else None
    grad = lambda loss: torch.autograd.grad(loss, i["v"])[0]
    plain = lambda f, **k: lambda: grad(f(**i, **k))
    fused = {k: x for k, x in i.items() if k not in ("noise", "x_t")} | {"seed": 1} if seed else i
    variants = {
        "fused": lambda: grad(afd_fast.nft_loss(**fused, recipe=recipe, out=buffer)),
        "reference": plain(reference.nft_loss, recipe=recipe),
        "compile": lambda: grad(compiled(**i, recipe=recipe)),
        "eager": plain(peer),
    }
    compiled = torch.compile(reference.nft_loss)
    elements = i["v"].numel()
    exact = None
    if check and not seed:
        wide = {k: x.detach().double() if x.dtype == dtype else x for k, x in i.items()}
        exact = reference.nft_grad(**wide, recipe=recipe)
    return Case(variants, sweeps * elements * dtype.itemsize, exact)


def nft_afd(shape, dtype, device, check=True) -> Case:
    """v, x0, noise, v_ref read, the gradient written: five tensors, one sweep."""
    return _loss(shape, dtype, device, "afd", ("v", "x0", "noise", "v_ref"), eager.afd, False, True, 5, check)


def nft_afd_seed(shape, dtype, device, check=True) -> Case:
    """The noise regenerated: four tensors."""
    return _loss(shape, dtype, device, "afd", ("v", "x0", "noise", "v_ref"), eager.afd, True, True, 4, check)


def nft_diffusionnft(shape, dtype, device, check=True) -> Case:
    """Adaptive weights, noised state given: five tensors read, then five read and one written."""
    names = ("v", "x0", "x_t", "v_old", "v_ref")
    case = _loss(shape, dtype, device, "diffusionnft", names, eager.diffusionnft, False, False, 11, check)
    if device != "cpu" and one_launch.library():
        i = _inputs(shape, dtype, device, names)
        count = i["v"][0].numel()
        inputs = Inputs(
            v=i["v"].detach(), x0=i["x0"], r=i["r"], t=i["t"][:, None].contiguous(), noise=None, seed=None, x_t=i["x_t"],
            v_old=i["v_old"], v_ref=i["v_ref"], sigma=None, sample_mask=None, ref_mask=None, element_mask=None,
            cu_seqlens=None, inner=count, recipe=afd_fast.nft_recipe("diffusionnft").key, stats=False,
        )  # fmt: skip
        grad = torch.empty_like(inputs.v)
        case.variants["one_launch"] = lambda: (one_launch.nft_loss_with_grad(inputs, grad), grad)[1]
    return case


def forward_noise(shape, dtype, device, check=True) -> Case:
    """Noise drawn and x_t made: one tensor read, one written."""
    i = _inputs(shape, dtype, device, ("x0",))
    x0, t = i["x0"], i["t"]
    compiled = torch.compile(eager.add_noise)
    variants = {
        "fused": lambda: afd_fast.forward_noise(x0, t, seed=1),
        "compile": lambda: compiled(x0, t),
        "eager": lambda: eager.add_noise(x0, t),
    }
    exact = flow.forward_noise(x0[:1].double(), t[:1].double(), seed=1) if check else None
    return Case(variants, 2 * x0.numel() * dtype.itemsize, exact)


CASES = {f.__name__: f for f in (nft_afd, nft_afd_seed, nft_diffusionnft, forward_noise)}

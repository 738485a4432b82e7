"""What is measured: inputs, variants and the bytes a perfect implementation would move.

A variant is a function without arguments that does the whole pass (loss and gradient, or noising) and returns the
result that is checked. The variant `eager` is the trainers' arithmetic.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import afd_fast
from afd_fast.ops.inputs import Inputs
from afd_fast.reference import flow
from afd_fast.reference import nft as reference
from afd_fast.reference.nft_inputs import NFTInputs
from afd_fast.reference.noise import normal_noise
from afd_fast.reference.recipes import RecipeName
from benchmarks import eager, one_launch

SHAPES = {"wan": (21, 16, 60, 104), "sd3": (16, 64, 64), "tiny": (4, 8, 8), "flat": (1 << 20,)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CHECKED = {"cpu": 1 << 25, "cuda": 1 << 28}  # elements up to which a float64 result fits next to the rest
DRAWN = 1 << 22  # elements whose noise the reference draws in a second


@dataclass(frozen=True)
class Setting:
    """Where a case is measured: shape [B, ...], type and device of its tensors."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def checked(self) -> bool:
        """Whether there is a float64 result to compare with."""
        return self.elements <= CHECKED[self.device]


@dataclass
class Case:
    """Variants of one computation on the same inputs."""

    variants: dict[str, Callable[[], Tensor]]
    bytes_moved: int
    exact: Tensor | None  # float64; None where it is not computed
    drawn: bool = False  # the other variants draw other noise: only `fused` has an exact result


@dataclass
class LossInputs:
    """One call of a loss."""

    v: Tensor  # [B, ...], with a gradient
    x0: Tensor
    r: Tensor  # [B]
    t: Tensor  # [B]
    given: NFTInputs

    def gradient(self, loss: Callable[..., Tensor], **options: Any) -> Tensor:
        """dL/dv through autograd."""
        return torch.autograd.grad(loss(self.v, self.x0, self.r, self.t, **self.given, **options), self.v)[0]

    def exact(self, recipe: RecipeName) -> Tensor:
        """dL/dv in float64."""
        wide: Any = {name: x.double() for name, x in self.given.items() if isinstance(x, Tensor)}
        return reference.nft_grad(self.v.detach().double(), self.x0.double(), self.r, self.t, **wide, recipe=recipe)

    def arguments(self, recipe: RecipeName) -> Inputs:
        """The same call in the operators' arguments."""
        values: dict[str, Any] = {
            **dict.fromkeys(Inputs._fields), **self.given, "v": self.v.detach(), "x0": self.x0, "r": self.r,
            "t": self.t[:, None].contiguous(), "inner": self.v[0].numel(), "recipe": afd_fast.nft_recipe(recipe).key,
            "stats": False,
        }  # fmt: skip
        return Inputs(**values)


class Draw:
    """Random tensors of a setting."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.generator = torch.Generator(device=setting.device).manual_seed(0)

    def normal(self) -> Tensor:
        s = self.setting
        return torch.randn(s.shape, device=s.device, generator=self.generator).to(s.dtype)

    def uniform(self) -> Tensor:
        """[B]"""
        return torch.rand(self.setting.shape[0], device=self.setting.device, generator=self.generator)

    def inputs(self, *names: str) -> LossInputs:
        """Inputs of a loss; names: of `NFTInputs`."""
        given: Any = {name: self.normal() for name in names}
        return LossInputs(
            self.normal().requires_grad_(), self.normal(), self.uniform(), 0.1 + 0.8 * self.uniform(), given
        )


def _variants(i: LossInputs, recipe: RecipeName, peer: Callable[..., Tensor]) -> dict[str, Callable[[], Tensor]]:
    return {
        "fused": partial(i.gradient, afd_fast.nft_loss, recipe=recipe),
        "reference": partial(i.gradient, reference.nft_loss, recipe=recipe),
        "compile": partial(i.gradient, torch.compile(reference.nft_loss, dynamic=False), recipe=recipe),
        "eager": partial(i.gradient, peer),
    }


def nft_afd(s: Setting) -> Case:
    """v, x0, noise, v_ref read, the gradient written: five tensors, one sweep."""
    i = Draw(s).inputs("noise", "v_ref")
    variants = _variants(i, "afd", eager.afd)
    variants["fused"] = partial(i.gradient, afd_fast.nft_loss, recipe="afd", out=torch.empty_like(i.x0))
    return Case(variants, 5 * s.elements * s.dtype.itemsize, i.exact("afd") if s.checked else None)


def nft_afd_seed(s: Setting) -> Case:
    """The noise regenerated: four tensors."""
    i = Draw(s).inputs("noise", "v_ref")
    variants = _variants(i, "afd", eager.afd)
    seeded = replace(i, given={"seed": 1, "v_ref": i.given["v_ref"]})
    variants["fused"] = partial(seeded.gradient, afd_fast.nft_loss, recipe="afd", out=torch.empty_like(i.x0))
    exact = None
    if s.elements <= DRAWN:
        noise = normal_noise(s.shape, 1, device=s.device)
        exact = replace(i, given={"noise": noise, "v_ref": i.given["v_ref"]}).exact("afd")
    return Case(variants, 4 * s.elements * s.dtype.itemsize, exact, drawn=True)


def nft_diffusionnft(s: Setting) -> Case:
    """Adaptive weights, noised state given: five tensors read, then five read and one written."""
    i = Draw(s).inputs("x_t", "v_old", "v_ref")
    variants = _variants(i, "diffusionnft", eager.diffusionnft)
    if s.device != "cpu" and one_launch.library():
        variants["one_launch"] = partial(one_launch.gradient, i.arguments("diffusionnft"), torch.empty_like(i.x0))
    return Case(variants, 11 * s.elements * s.dtype.itemsize, i.exact("diffusionnft") if s.checked else None)


def forward_noise(s: Setting) -> Case:
    """Noise drawn and x_t made: one tensor read, one written."""
    draw = Draw(s)
    x0, t = draw.normal(), 0.1 + 0.8 * draw.uniform()
    variants: dict[str, Callable[[], Tensor]] = {
        "fused": partial(afd_fast.forward_noise, x0, t, seed=1),
        "compile": partial(torch.compile(eager.add_noise, dynamic=False), x0, t),
        "eager": partial(eager.add_noise, x0, t),
    }
    exact = flow.forward_noise(x0[:1].double(), t[:1].double(), seed=1) if s.checked else None
    return Case(variants, 2 * s.elements * s.dtype.itemsize, exact, drawn=True)


CASES: dict[str, Callable[[Setting], Case]] = {
    f.__name__: f for f in (nft_afd, nft_afd_seed, nft_diffusionnft, forward_noise)
}

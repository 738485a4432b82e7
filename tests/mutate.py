# ruff: noqa: E402
"""Mutation test of the Triton kernels: one-token mutants under the interpreter; how many does a small suite notice?

python tests/mutate.py [every] [--file noise.py]     (tens of minutes; every=3 takes each third mutant; not part of `make test`)
A mutant changes one operator, comparison, constant, name or mask. Survivors are printed by name.
"""

import argparse
import ast
import importlib
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "1"
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch
from afd_kernels.layout import COEFFICIENTS, MAXIMA, Slot
from torch import Tensor

from afd_fast.ops import nft_operators as ops
from afd_fast.ops.inputs import Inputs
from afd_fast.reference import flow
from afd_fast.reference.recipes import NFTRecipe, nft_recipe
from tests.interpreter import install, sanitize

install()
PACKAGE = ROOT / "kernels/afd_kernels"
FILES = ("noise.py", "nft.py", "_finish.py")
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add,
             ast.RShift: ast.LShift, ast.LShift: ast.RShift, ast.BitAnd: ast.BitOr}  # fmt: skip
COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.NotEq: ast.Eq, ast.Eq: ast.NotEq}
NAMES = {"e0": "e1", "e1": "e0", "e2": "e3", "e3": "e2", "old": "ref", "ref": "v", "pos": "neg", "neg": "pos", "cd": "cs",
         "cs": "cd", "cr": "cd", "sigma": "t", "w_pos": "w_neg", "w_neg": "w_pos", "valid": "chosen", "chosen": "valid",
         "sine": "cosine", "h0": "h1", "l0": "l1", "since": "frame", "first": "left", "sample": "tile", "S_POS": "S_NEG", "S_NEG": "S_POS", "S_SIZE": "S_PRIOR",
         "S_SIZE_GAP": "S_SIZE", "S_PRIOR": "S_POS", "S_KEPT": "S_POS", "S_DRIFT": "S_V", "S_V": "S_REF", "S_REF": "S_V",
         "BIT_POS": "BIT_PRIOR", "BIT_PRIOR": "BIT_KEPT", "BIT_KEPT": "BIT_PRIOR", "R_POS_LOSS": "R_NEG_LOSS",
         "R_NEG_LOSS": "R_POS_LOSS", "R_WEIGHT_POS": "R_WEIGHT_NEG", "R_WEIGHT_NEG": "R_WEIGHT_POS", "R_PRIOR": "R_V_NORM",
         "R_OLD_DEVIATION": "R_PRIOR", "R_V_NORM": "R_V_REF_NORM", "R_V_REF_NORM": "R_V_NORM", "R_DIFFERENCE": "R_SUM",
         "R_SUM": "R_DIFFERENCE", "R_REFERENCE": "R_SUM", "T_POLICY": "T_PRIOR", "T_PRIOR": "T_SIGNAL",
         "T_SIGNAL": "T_PRIOR", "T_R_MEAN": "T_SIGNAL", "SEED": "X_T", "X_T": "SEED", "CLEAN": "X_T", "S_X0": "S_V", "S_OLD_REF": "S_REF",
         "S_X0_MAX": "S_DRIFT_MAX", "S_DRIFT_MAX": "S_X0_MAX", "R_OLD_DEVIATION_MAX": "R_OLD_PRIOR",
         "R_OLD_PRIOR": "R_X0_SQUARE", "R_X0_SQUARE": "R_X0_SQUARE_MAX", "R_X0_SQUARE_MAX": "R_X0_SQUARE",
         "drift": "behind", "behind": "drift", "clean": "drift"}  # fmt: skip


class Mutant(NamedTuple):
    """One changed file of the kernels."""

    file: str
    description: str
    source: str


class Change(NamedTuple):
    """A field of a syntax node that gets another value."""

    field: str
    value: Any
    description: str


def change_of(node: ast.AST) -> Change | None:
    """How a node is mutated; None where it is not."""
    match node:
        case ast.BinOp(op=op) if type(op) in OPERATORS:
            other = OPERATORS[type(op)]
            return Change("op", other(), f"{type(op).__name__} -> {other.__name__}")
        case ast.Compare(ops=[op, *_]) if type(op) in COMPARISONS:
            new = COMPARISONS[type(op)]
            return Change("ops", [new()], f"{type(op).__name__} -> {new.__name__}")
        case ast.Constant(value=float(value)):
            return Change("value", value * 1.001 + 1e-7, f"{value} * 1.001")
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            return Change("value", value + 1, f"{value} + 1")
        case ast.Name(id=name, ctx=ast.Load()) if name in NAMES:
            return Change("id", NAMES[name], f"{name} -> {NAMES[name]}")
        case ast.Call(keywords=keywords) if any(k.arg == "mask" for k in keywords):
            return Change("keywords", [k for k in keywords if k.arg not in ("mask", "other")], "mask dropped")
    return None


def mutants(file: str) -> Iterator[Mutant]:
    """Every mutant of a file's kernels."""
    source = (PACKAGE / file).read_text()
    for position, function in enumerate(ast.parse(source).body):
        if not isinstance(function, ast.FunctionDef) or not any(
            "jit" in ast.unparse(d) for d in function.decorator_list
        ):
            continue
        for index, node in enumerate(ast.walk(function)):
            change = change_of(node)
            if change is None:
                continue
            copy = ast.parse(source)
            setattr(list(ast.walk(copy.body[position]))[index], change.field, change.value)
            line = getattr(node, "lineno", function.lineno)
            text = ast.unparse(ast.fix_missing_locations(copy))
            yield Mutant(file, f"{function.name}:{line} {change.description}", text)


class Kernels(NamedTuple):
    """Modules of the kernels' package."""

    noise: Any
    nft: Any


def load(folder: Path, number: int, mutant: Mutant | None = None) -> Kernels:
    """The kernels' package under another name, mutated or as it is."""
    name = f"mutant{number}"
    (folder / name).mkdir()
    for path in PACKAGE.glob("*.py"):
        changed = mutant is not None and path.name == mutant.file
        text = mutant.source if mutant is not None and changed else path.read_text()
        (folder / name / path.name).write_text(text.replace("afd_kernels", name))
    modules = Kernels(importlib.import_module(f"{name}.noise"), importlib.import_module(f"{name}.nft"))
    for key in [k for k in sys.modules if k.split(".")[0] == name]:
        del sys.modules[key]
    return modules


class Draw:
    """Random inputs of the operators."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def levels(self, *shape: int) -> Tensor:
        return 0.1 + 0.8 * self.uniform(*shape)

    def inputs(self, shape: tuple[int, int], recipe: NFTRecipe, source: str, dtype: torch.dtype = torch.float32, frames: int = 1,
               **change: Any) -> Inputs:  # fmt: skip
        """source: noise, seed, x_t or "" (clean space); change: fields with other values."""
        batch = change["cu_seqlens"].numel() - 1 if "cu_seqlens" in change else shape[0]
        values = dict.fromkeys(Inputs._fields) | {
            name: self.normal(shape, dtype) for name in ("v", "x0", "v_old", "v_ref")
        }
        values |= {"r": self.uniform(batch), "t": self.levels(batch, frames), "inner": shape[1], "stats": True}
        values |= {"recipe": recipe.key}
        if source:
            values |= {source: (3 << 40) + 5 if source == "seed" else self.normal(shape, dtype)}
        return Inputs(**values | change)  # type: ignore[arg-type]  # a dictionary of fields of many types


def mask(*values: int) -> Tensor:
    return torch.tensor(values) > 0


def cases() -> Iterator[Inputs]:
    """Inputs of the operators that reach every branch, with tiles != samples."""
    draw = Draw()
    afd, gardo = nft_recipe("afd", ref_coef=0.3), nft_recipe("gardo", ref_coef=0.3)
    diffusionnft = nft_recipe("diffusionnft", ref_coef=0.3)
    some, others = mask(1, 0, 1), mask(0, 1, 1)
    yield draw.inputs((2, 4100), afd, "seed", v_old=None)
    yield draw.inputs((3, 9000), diffusionnft, "x_t", torch.bfloat16, sample_mask=some, ref_mask=others)
    yield draw.inputs((2, 6192), nft_recipe("astrolabe", ref_coef=0.3), "noise", frames=2, inner=1032,
                      sigma=draw.levels(2, 2), element_mask=draw.uniform(2, 6192) > 0.4)  # fmt: skip
    packed = nft_recipe("diffusionnft", ref_coef=0.3, batch_reduction="mean")
    yield draw.inputs((900, 13), packed, "x_t", cu_seqlens=torch.tensor([0, 3, 3, 640, 880, 900]))
    clean = nft_recipe("astrolabe", ref_coef=0.3, space="clean", ref_space="v")
    yield draw.inputs((2, 70), clean, "", element_mask=draw.uniform(2, 70) > 0.4)
    yield draw.inputs((2, 70), gardo, "seed", ref_mask=mask(0, 0), v_old=None)
    yield draw.inputs((3, 70), gardo, "x_t", sample_mask=some, ref_mask=others)
    yield draw.inputs((3, 70), afd, "x_t", sample_mask=some, ref_mask=others)
    yield draw.inputs((2, 70), nft_recipe("afd", ref_coef=0.3, batch_reduction="mean"), "x_t", sample_mask=mask(0, 0))
    yield draw.inputs((2, 70), nft_recipe("diffusionnft", weight_floor=1.3), "x_t", element_mask=torch.zeros(2, 70) > 0)
    by_r = nft_recipe("diffusionnft", ref_coef=0.3, ref_weight="r")
    for recipe in (by_r, gardo, nft_recipe("afd", ref_coef=0.3)):
        yield draw.inputs((2, 70), recipe, "noise", each=draw.uniform(2, 70), element_mask=draw.uniform(2, 70) * (draw.uniform(2, 70) > 0.3),
                          policy_weight=draw.levels(2), prior_weight=draw.levels(2))  # fmt: skip
    yield draw.inputs(
        (2, 70), by_r, "x_t", each=draw.uniform(2, 70), v_ref=None, element_mask=draw.uniform(2, 70) > 0.4
    )
    yield draw.inputs((2, 1300), by_r, "noise", each=draw.uniform(2, 1300))  # two quarters of a tile
    dpo = nft_recipe("diffusionnft", ref_coef=0.3, form="dpo", dpo_beta=0.7)
    yield draw.inputs((3, 70), dpo, "x_t", policy_weight=draw.levels(3))
    yield draw.inputs((3, 70), replace(dpo, weighting="none"), "x_t", v_old=None)
    batch = nft_recipe("diffusionnft", ref_coef=0.3, ref_reduction="batch", shared_weight=True)
    yield draw.inputs(
        (3, 70), batch, "x_t", sample_mask=draw.levels(3), ref_mask=others, element_mask=draw.uniform(3, 70) > 0.4
    )
    yield draw.inputs((2, 70), replace(batch, sample_reduction="sum"), "x_t", stats=False)


class NoiseCase(NamedTuple):
    """x0 [B, N], t [B, F], and what `forward_noise` makes of them."""

    x0: Tensor
    t: Tensor
    seed: int | None  # None: x0 is the noise as well
    inner: int
    expected: Tensor


class LossCase(NamedTuple):
    """Inputs, and what the operators make of them."""

    inputs: Inputs
    sums: ops.Sums
    gradient: Tensor  # float32
    scaled: Tensor  # for grad_output = SCALES


def noise_cases() -> Iterator[NoiseCase]:
    draw = Draw()
    for frames, inner in ((5, 100), (2, 1032)):
        shape = 3, frames * inner * -(-5000 // (frames * inner))
        t, x0 = draw.uniform(3, frames), draw.normal(shape)
        shaped, levels = x0.view(3, -1, frames, inner), t.view(3, 1, frames, 1)
        yield NoiseCase(x0, t, -9, inner, flow.forward_noise(shaped, levels, seed=-9).view(shape))
        yield NoiseCase(x0, t, None, inner, flow.forward_noise(shaped, levels, noise=shaped).view(shape))


NOISE = list(noise_cases())
SCALES = (3.0, 2.0)  # of policy and prior
LOSS = [
    LossCase(i, ops._sums(i), *(ops._gradient(scales, i._replace(v=i.v.float())) for scales in ((1.0, 1.0), SCALES)))
    for i in sorted(cases(), key=lambda i: i.v.numel())  # most mutants die in a small one
]
PART = torch.randn(len(Slot), 2 * 2500, generator=torch.Generator().manual_seed(1))


def check_noise(kernels: Kernels, case: NoiseCase) -> None:
    with sanitize() as report:
        found = kernels.noise.forward_noise(
            case.x0, case.t, None if case.seed else case.x0.clone(), case.seed, case.inner
        )
    report.check(["x0_ptr"], ["out_ptr"])
    assert torch.equal(found, case.expected)


def check_reduce(kernels: Kernels) -> None:
    """A sample of more than 1024 tiles."""
    slots, tiles = len(Slot), PART.shape[1] // 2
    sums = torch.full((slots, 2), float("nan"), dtype=torch.float64)
    with sanitize() as report:
        kernels.nft.reduce_kernel[(2, slots)](
            PART, sums, PART, 1, 2 * tiles, 2, 2, tiles, SUMS=sum(slot.bit for slot in Slot), PACKED=False, CU_BLOCK=1
        )
    report.check()
    parts = PART.double().view(slots, 2, tiles)
    expected = torch.cat([parts[:MAXIMA].sum(2), parts[MAXIMA:].amax(2)])
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-12)


def check_sums(found: ops.Sums, expected: ops.Sums, stats: bool) -> None:
    loss, totals, rows = found
    if not stats:
        torch.testing.assert_close(loss, expected[0], rtol=2e-6, atol=1e-9)
        return
    torch.testing.assert_close(loss, expected[0], rtol=2e-6, atol=1e-9)
    torch.testing.assert_close(totals, expected[1], rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(rows[:COEFFICIENTS], expected[2][:COEFFICIENTS], rtol=2e-6, atol=1e-7)


def check_loss(kernels: Kernels, case: LossCase) -> None:
    """Every operator on one case. Every launch is watched: a wild store would take this process with it."""
    i, exact, nft = case.inputs, case.gradient, kernels.nft
    given = {"v_ptr": i.v, "x0_ptr": i.x0, "old_ptr": i.v_old, "ref_ptr": i.v_ref}
    names = [name for name, x in given.items() if x is not None]
    with sanitize() as report:
        found = nft.nft_loss(*i)
    report.check(names)
    grad = torch.full_like(i.v, float("nan"))
    with sanitize() as report:
        both = nft.nft_loss_with_grad(*i, grad)
    report.check(written_once=["grad_ptr"])
    for sums in (found, both):
        check_sums(sums, case.sums, i.stats)
    rows = found[2]
    with sanitize() as report:
        alone = nft.nft_loss_backward(torch.tensor(SCALES), rows, *i)
    report.check(names, ["grad_ptr"])
    bound = torch.finfo(i.v.dtype).eps * 0.51 + 2e-6
    for gradient, expected in ((grad, exact), (alone, case.scaled)):
        assert (gradient - expected).abs().max() <= bound * expected.abs().max()
    with sanitize() as report:
        nft.nft_loss_redo(torch.ones(1).expand(2), rows, *i, grad)
    assert not report.regions["grad_ptr"].writes.any() and not report.regions["v_ptr"].reads.any()
    for scales in ((1.0, 2.0), (2.0, 1.0), SCALES):
        with sanitize() as report:
            nft.nft_loss_redo(torch.tensor(scales), rows, *i, grad)
        report.check(written_once=["grad_ptr"])
    assert torch.equal(grad, alone)


def check_ranges(kernels: Kernels) -> None:
    """An r, or a t that the finish looks at, outside [0, 1] gives NaN; the ends do not."""
    draw = Draw()
    i = draw.inputs((2, 1100), nft_recipe("afd", ref_coef=0.3, batch_reduction="mean"), "noise", frames=1100, inner=1)
    late = i.t.clone()
    late[1, 900] = 1.5
    below = torch.tensor([0.3, -0.1])
    for change, wrong in (({}, False), ({"r": torch.tensor([0.0, 1.0])}, False), ({"t": i.t.round()}, False),
                          ({"r": below}, True), ({"r": 1 - below}, True), ({"t": late}, True), ({"t": -late}, True),
                          ({"each": draw.uniform(2, 1100)}, False), ({"each": draw.uniform(2, 1100).round()}, False),
                          ({"each": late}, True), ({"each": 1 - late}, True)):  # fmt: skip
        loss, _, rows = kernels.nft.nft_loss(*i._replace(**change))
        assert bool(loss.isnan()) == wrong, change
        if wrong and "each" not in change:
            assert rows[COEFFICIENTS].isnan().any()


def suite(kernels: Kernels) -> None:
    """Everything, what is quick first: most mutants die in it."""
    quick = [loss for loss in LOSS if loss.inputs.v.numel() < 2000]
    for loss in quick:
        check_loss(kernels, loss)
    check_reduce(kernels)
    check_ranges(kernels)
    for noise in NOISE:
        check_noise(kernels, noise)
    for loss in LOSS[len(quick) :]:
        check_loss(kernels, loss)


def survives(folder: Path, number: int, mutant: Mutant) -> bool:
    try:
        suite(load(folder, number, mutant))
    except Exception:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("every", type=int, nargs="?", default=1)
    parser.add_argument("--file", choices=FILES, action="append", help="mutants of this file only")
    given, start = parser.parse_args(), time.time()
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of mutants that divide by zero
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sys.path.insert(0, name)
        suite(load(folder, 0))
        print(f"the suite passes on the kernels themselves in {time.time() - start:.1f} s", flush=True)
        todo = [mutant for file in given.file or FILES for mutant in mutants(file)][:: given.every]
        alive = 0
        for number, mutant in enumerate(todo, 1):
            if survives(folder, number, mutant):
                alive += 1
                print("survives:", mutant.file, mutant.description, flush=True)
        print(f"{len(todo)} mutants, {len(todo) - alive} killed, {alive} survive, {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()

# ruff: noqa: E402
"""Mutation test of the Triton kernels: one-token mutants under the interpreter; how many does a small suite notice?

python tests/mutate.py [every]     (tens of minutes; every=3 takes each third mutant; not part of the default tests)
A mutant changes one operator, comparison, constant, name or mask. Survivors are printed by name.
"""

import ast
import importlib
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch

import afd_fast
from afd_fast.ops import nft as ops
from afd_fast.reference import flow
from tests.interpreter import install, sanitize

install()
PACKAGE = ROOT / "kernels/afd_kernels"
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add,
             ast.RShift: ast.LShift, ast.LShift: ast.RShift, ast.BitAnd: ast.BitOr}  # fmt: skip
COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.NotEq: ast.Eq, ast.Eq: ast.NotEq}
NAMES = {"e0": "e1", "e1": "e0", "e2": "e3", "e3": "e2", "old": "ref", "ref": "v", "pos": "neg", "neg": "pos", "cd": "cs",
         "cs": "cd", "cr": "cd", "sigma": "t", "w_pos": "w_neg", "w_neg": "w_pos", "valid": "chosen", "chosen": "valid",
         "sine": "cosine", "first": "start", "sample": "tile"}  # fmt: skip


def mutants(source: str):
    """(description, mutated source)."""
    tree = ast.parse(source)
    for position, function in enumerate(tree.body):
        jit = isinstance(function, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in function.decorator_list)
        for index, node in enumerate(ast.walk(function)) if jit else ():
            change = None
            if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
                change = (
                    "op",
                    OPERATORS[type(node.op)](),
                    f"{type(node.op).__name__} -> {OPERATORS[type(node.op)].__name__}",
                )
            elif isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
                new = COMPARISONS[type(node.ops[0])]
                change = ("ops", [new()], f"{type(node.ops[0]).__name__} -> {new.__name__}")
            elif isinstance(node, ast.Constant) and type(node.value) is float:
                change = ("value", node.value * 1.001 + 1e-7, f"{node.value} * 1.001")
            elif isinstance(node, ast.Constant) and type(node.value) is int:
                change = ("value", node.value + 1, f"{node.value} + 1")
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in NAMES:
                change = ("id", NAMES[node.id], f"{node.id} -> {NAMES[node.id]}")
            elif isinstance(node, ast.Call) and any(k.arg == "mask" for k in node.keywords):
                change = ("keywords", [k for k in node.keywords if k.arg not in ("mask", "other")], "mask dropped")
            if change is None:
                continue
            copy = ast.parse(source)
            target = list(ast.walk(copy.body[position]))[index]
            setattr(target, change[0], change[1])
            yield f"{function.name}:{node.lineno} {change[2]}", ast.unparse(ast.fix_missing_locations(copy))


def load(folder: Path, number: int, changed: dict):
    """The kernels' package under another name, with some files replaced."""
    name = f"mutant{number}"
    (folder / name).mkdir()
    for path in PACKAGE.glob("*.py"):
        text = changed.get(path.name, path.read_text()).replace("afd_kernels", name)
        (folder / name / path.name).write_text(text)
    modules = importlib.import_module(f"{name}.noise"), importlib.import_module(f"{name}.nft")
    for key in [k for k in sys.modules if k.split(".")[0] == name]:
        del sys.modules[key]
    return modules


def cases():
    """Inputs of the operators that reach every branch, with tiles != samples."""
    g = torch.Generator().manual_seed(0)
    n = lambda *s, dtype=torch.float32: torch.randn(*s, generator=g).to(dtype)
    t = lambda *s: 0.1 + 0.8 * torch.rand(*s, generator=g)
    base = dict.fromkeys(ops.Inputs._fields)

    def case(shape, recipe, source, dtype=torch.float32, frames=1, **change):
        batch = change["cu_seqlens"].numel() - 1 if "cu_seqlens" in change else shape[0]
        values = base | dict(
            v=n(*shape, dtype=dtype), x0=n(*shape, dtype=dtype), v_old=n(*shape, dtype=dtype), v_ref=n(*shape, dtype=dtype),
            r=torch.rand(batch, generator=g), t=t(batch, frames), inner=shape[1], stats=True,
            recipe=afd_fast.nft_recipe(*([recipe] if isinstance(recipe, str) else recipe[:1]), **({} if isinstance(recipe, str) else recipe[1])).key,
        )  # fmt: skip
        values[source] = (3 << 40) + 5 if source == "seed" else n(*shape, dtype=dtype)
        return ops.Inputs(**values | change)

    mean = {"ref_coef": 0.3, "batch_reduction": "mean"}
    yield case((2, 4100), ("afd", {"ref_coef": 0.3}), "seed", v_old=None)
    yield case((3, 9000), ("diffusionnft", {"ref_coef": 0.3}), "x_t", dtype=torch.bfloat16,
               sample_mask=torch.tensor([1, 0, 1]) > 0, ref_mask=torch.tensor([0, 1, 1]) > 0)  # fmt: skip
    yield case((2, 5000), ("astrolabe", {"ref_coef": 0.3}), "noise", frames=5, inner=100, sigma=t(2, 5),
               element_mask=torch.rand(2, 5000, generator=g) > 0.4)  # fmt: skip
    yield case((900, 13), ("diffusionnft", mean), "x_t", cu_seqlens=torch.tensor([0, 3, 3, 640, 900]))
    yield case((2, 70), ("gardo", {"ref_coef": 0.3}), "seed", ref_mask=torch.tensor([False, False]), v_old=None)
    some = {"sample_mask": torch.tensor([1, 0, 1]) > 0, "ref_mask": torch.tensor([0, 1, 1]) > 0}
    yield case((3, 70), ("gardo", {"ref_coef": 0.3}), "x_t", **some)
    yield case((3, 70), ("afd", {"ref_coef": 0.3}), "x_t", **some)
    yield case((2, 70), ("afd", mean), "x_t", sample_mask=torch.tensor([False, False]))
    yield case((2, 70), ("diffusionnft", {"weight_floor": 1.3}), "x_t", element_mask=torch.zeros(2, 70) > 0)


def expectations():
    for i in cases():
        yield i, ops._sums(i), ops._gradient(1.0, i._replace(v=i.v.float()))
    t, x0 = torch.rand(3, 5), torch.randn(3, 5000)
    yield x0, t, flow.forward_noise(x0.view(3, 10, 5, 100), t.view(3, 1, 5, 1), seed=-9).view(3, 5000)
    yield (
        x0,
        t,
        flow.forward_noise(x0.view(3, 10, 5, 100), t.view(3, 1, 5, 1), noise=x0.view(3, 10, 5, 100)).view(3, 5000),
    )


EXPECTED = list(expectations())


PART = torch.randn(9, 2 * 2500, generator=torch.Generator().manual_seed(1))


def suite(noise, nft) -> None:
    for (x0, t, expected), seed in zip(EXPECTED[-2:], (-9, None)):
        with sanitize() as report:
            found = noise.forward_noise(x0, t, None if seed else x0.clone(), seed, 100)
        report.check(["x0_ptr"], ["out_ptr"])
        assert torch.equal(found, expected)
    sums = torch.full((9, 2), float("nan"), dtype=torch.float64)  # a sample of more than 1024 tiles
    with sanitize() as report:
        nft.reduce_kernel[(2, 9)](PART, sums, PART, 1, 5000, 2, 2500, SUMS=511, PACKED=False, CU_BLOCK=1)
    report.check()
    torch.testing.assert_close(sums, PART.double().view(9, 2, 2500).sum(2), rtol=1e-12, atol=1e-12)
    for i, (loss, totals, rows), exact in EXPECTED[:-2]:
        names = [f"{n}_ptr" for n, x in (("v", i.v), ("x0", i.x0), ("old", i.v_old), ("ref", i.v_ref)) if x is not None]
        with sanitize() as report:
            found = nft.nft_loss(*i)
        report.check(names)
        grad = torch.full_like(i.v, float("nan"))
        with sanitize() as report:  # every launch is watched: a wild store would take this process with it
            both = nft.nft_loss_with_grad(*i, grad)
        report.check(written_once=["grad_ptr"])
        for got in (found, both):
            torch.testing.assert_close(got[0], loss, rtol=2e-6, atol=1e-9)
            torch.testing.assert_close(got[1], totals, rtol=2e-6, atol=1e-7)
            torch.testing.assert_close(got[2][:8], rows[:8], rtol=2e-6, atol=1e-7)
        with sanitize() as report:
            alone = nft.nft_loss_backward(torch.tensor(3.0), found[2], *i)
        report.check(names, ["grad_ptr"])
        bound = (torch.finfo(i.v.dtype).eps * 0.51 + 2e-6) * exact.abs().max()
        assert (grad - exact).abs().max() <= bound and (alone / 3 - exact).abs().max() <= bound * 1.1
        with sanitize() as report:
            nft.nft_loss_redo(torch.tensor(1.0), found[2], *i, grad)
        assert not report.regions["grad_ptr"].writes.any() and not report.regions["v_ptr"].reads.any()
        with sanitize() as report:
            nft.nft_loss_redo(torch.tensor(3.0), found[2], *i, grad)
        report.check()
        assert torch.equal(grad, alone)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, start = Path(name), time.time()
        sys.path.insert(0, name)
        suite(*load(folder, 0, {}))
        print(f"the suite passes on the kernels themselves in {time.time() - start:.1f} s", flush=True)
        todo = [(f, d, s) for f in ("noise.py", "nft.py", "_finish.py") for d, s in mutants((PACKAGE / f).read_text())]
        todo = todo[:: int(sys.argv[1]) if len(sys.argv) > 1 else 1]
        survivors = []
        for number, (file, description, source) in enumerate(todo, 1):
            try:
                suite(*load(folder, number, {file: source}))
                survivors.append(f"{file} {description}")
                print("survives:", survivors[-1], flush=True)
            except Exception:
                pass
        print(
            f"{len(todo)} mutants, {len(todo) - len(survivors)} killed, {len(survivors)} survive, {time.time() - start:.0f} s"
        )


if __name__ == "__main__":
    main()

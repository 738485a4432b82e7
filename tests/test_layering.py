"""Imports only point downward, rooms of one floor form no cycle, kernels/ never imports afd_fast, only kernels/ imports
triton. `python tests/test_layering.py` prints the floors with the imports between them, for docs/architecture.md."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [  # from the ground up
    ("errors", "threads"),
    ("reference", "files"),
    ("ops", "video_io"),
    ("teachers", "dropin", "sampler"),
    ("students", "judges", "evaluation"),
    ("rollout", "discriminators"),
    ("generate", "config"),
    ("training",),
    ("reports", "estimate"),
    ("cli",),
    ("__main__",),
]
RANK = {room: rank for rank, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(p for d in ("afd_fast", "kernels") for p in (ROOT / d).rglob("*.py"))
LOOSE = 8  # modules at the top, __main__ aside; threads must run before any room is imported


def imports(path):
    """Dotted names that a file imports at run time, also inside functions; not those for type checkers alone."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(path):
    """The room of a file of afd_fast: its folder or its own name."""
    return path.relative_to(ROOT / "afd_fast").with_suffix("").parts[0]


def arrows():
    """(room, imported room) of all of afd_fast; `import afd_fast` itself is no room."""
    found = set()
    for path in (ROOT / "afd_fast").rglob("*.py"):
        for name in imports(path):
            pieces = name.split(".")
            if pieces[0] == "afd_fast" and len(pieces) > 1 and pieces[1] in RANK and room(path) != "__init__":
                found.add((room(path), pieces[1]))
    return {(a, b) for a, b in found if a != b}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    part = path.relative_to(ROOT).with_suffix("").parts
    for name in imports(path):
        if part[0] == "kernels":
            assert not name.startswith("afd_fast"), f"kernels/ must not import {name}"
            continue
        assert name.split(".")[0] != "triton", "only kernels/ may import triton"
        pieces = name.split(".")
        if pieces[0] == "afd_fast" and len(pieces) > 1 and pieces[1] in RANK and part[1] != "__init__":
            assert part[1] in RANK, f"{part[1]} has no floor: add it to FLOORS"
            assert RANK[pieces[1]] <= RANK[part[1]], f"{part[1]} imports upward: {name}"


def cycle(edges):
    """A cycle of a directed graph as a list, or None."""
    graph = {}
    for a, b in edges:
        graph.setdefault(a, []).append(b)
    seen, path = set(), []

    def walk(node):
        if node in path:
            return [*path[path.index(node) :], node]
        if node in seen:
            return None
        seen.add(node)
        path.append(node)
        found = next((c for n in graph.get(node, []) if (c := walk(n))), None)
        path.pop()
        return found

    return next((c for node in sorted(graph) if (c := walk(node))), None)


def test_no_cycle_between_rooms():
    assert cycle(arrows()) is None


def test_no_cycle_between_modules():
    """Also inside a room; __init__ files, which only re-export, are left out."""
    modules = {}
    for path in (ROOT / "afd_fast").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] != "__init__":
            modules[".".join(parts)] = path
    edges = set()
    for name, path in modules.items():
        for target in imports(path):
            home = next((m for m in (target, target.rpartition(".")[0]) if m in modules), None)
            if home and home != name:
                edges.add((name, home))
    # a student's `graphed` makes the wrapper that calls the student
    edges.discard(("afd_fast.students.wan.model", "afd_fast.students.wan.graphs"))
    assert cycle(edges) is None


def test_a_cycle_would_be_found():
    assert cycle({("a", "b"), ("b", "c")}) is None and cycle({("a", "b"), ("b", "c"), ("c", "a")})[0] == "a"


def test_few_modules_are_loose():
    loose = [p.stem for p in (ROOT / "afd_fast").glob("*.py") if p.stem != "__main__"]
    assert len(loose) <= LOOSE, loose


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 400


DEFAULTING = ("empty", "zeros", "ones", "full", "linspace", "eye", "rand", "randn")


def undecided(path):
    """Lines that allocate in torch's default dtype, which a user may have set to bfloat16; parameters, by convention, do."""
    tree = ast.parse(path.read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    parameters = {id(inner) for node in calls if ast.unparse(node.func) == "nn.Parameter" for inner in ast.walk(node)}
    return [
        f"{path.name}:{node.lineno}"
        for node in calls
        if ast.unparse(node.func) in [f"torch.{name}" for name in DEFAULTING]
        and id(node) not in parameters
        and all(keyword.arg != "dtype" for keyword in node.keywords)
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_allocations_name_their_dtype(path):
    assert undecided(path) == []


def test_import_is_light():
    code = "import sys, afd_fast; print([m for m in ('transformers', 'diffusers', 'peft', 'av') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_training_and_its_tests_need_no_optional_package():
    """A GPU image has none of these: what does not read videos, simulate, load diffusers' VAE or clean prompts runs without."""
    pytest.importorskip("typer", reason="needs the extras")
    absent = ("av", "pymunk", "ftfy", "diffusers", "nvtx")
    imports = "import afd_fast.training.trainer, afd_fast.cli.main, benchmarks.step, benchmarks.rollout, benchmarks.discriminator, tests.conftest"
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); {imports}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def drawing():
    """The floors, top first, each room with the rooms below that it imports."""
    drawn, lines = arrows(), []
    for rooms in reversed(FLOORS):
        for name in rooms:
            below = sorted((b for a, b in drawn if a == name), key=lambda b: (-RANK[b], b))
            lines.append(f"{RANK[name]:2d}  {name:15s} -> {', '.join(below) or '-'}")
    return "\n".join(lines)


def test_the_documented_floors_are_the_codes():
    assert drawing() in (ROOT / "docs/architecture.md").read_text(), "run `python tests/test_layering.py` and paste"


if __name__ == "__main__":
    print(drawing())

"""The core needs torch and NumPy; whatever needs more names the extra that brings it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from afd_fast.errors import EXTRAS

ROOT = Path(__file__).parent.parent
CORE = {"torch", "numpy", "triton", "typing_extensions"}
OPTIONAL = {"inference"}  # of the official VideoAlign, in whose environment videoalign_driver.py runs
MODULES = {"pillow": "PIL"}  # distribution -> module where they differ


def requirements(name: str) -> set[str]:
    """Modules of an extra in pyproject.toml, those of the extras that it names included; "" is the core."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = set()
    for line in project["optional-dependencies"][name] if name else project["dependencies"]:
        distribution, _, rest = line.partition("[")
        if distribution == "afd-fast":
            found |= set().union(*(requirements(part) for part in rest.partition("]")[0].split(",")))
        else:
            distribution = "".join(c if c.isalnum() or c in "_-" else " " for c in line).split()[0]
            found.add(MODULES.get(distribution, distribution))
    return found


@pytest.mark.parametrize("name", EXTRAS)
def test_the_table_of_the_errors_is_pyprojects(name):
    assert set(EXTRAS[name]) == requirements(name) - CORE


def test_core_and_all():
    assert requirements("") == CORE
    assert requirements("all") - CORE == set().union(*EXTRAS.values())


def imported(path: Path):
    """(top-level package, extra of the `with extra(...)` around it or None, line) of every import at run time."""
    extras = {}
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            extras |= {id(inner): "typing" for inner in ast.walk(node)}
        if isinstance(node, ast.With) and (call := ast.unparse(node.items[0].context_expr)).startswith("extra("):
            extras |= {id(inner): call[len("extra('") : -len("')")] for inner in ast.walk(node)}
    for node in ast.walk(tree):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else names
        for name in names:
            if extras.get(id(node)) != "typing":
                yield name.partition(".")[0], extras.get(id(node)), node.lineno


def test_every_import_is_declared_and_names_its_extra():
    ours = {"afd_fast", "afd_kernels"}
    wrong = []
    for path in (p for d in ("afd_fast", "kernels") for p in (ROOT / d).rglob("*.py")):
        for name, extra, line in imported(path):
            if name in sys.stdlib_module_names | CORE | OPTIONAL | ours:
                continue
            # __main__ guards what the command imports, cli/main.py and cli/evaluate.py
            allowed = EXTRAS["train"] if path.parent.name == "cli" else EXTRAS.get(extra, ())
            if name not in allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert not wrong


def test_import_needs_torch_and_numpy_alone():
    code = (
        "import sys, torch, numpy; before = set(sys.modules); import afd_fast; "
        "print({m.partition('.')[0] for m in set(sys.modules) - before} - sys.stdlib_module_names - {'numpy'})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == {"afd_fast", "afd_kernels"}


ABSENT = """
import sys
sys.modules.update(dict.fromkeys({absent}))
sys.argv = ["afd-fast", *{arguments}]
{code}
"""


def without(absent, code, arguments=()):
    """Run `code` where the modules `absent` cannot be imported."""
    code = ABSENT.format(absent=tuple(absent), arguments=list(arguments), code=code)
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


COMMAND = "from afd_fast.__main__ import main; main()"


@pytest.mark.parametrize(
    "arguments,extra",
    [("train demo", "train"), ("demo", "demo"), ("--version", "train"), ("rollout --out x", "eval"), ("eval run vbench x", "eval")],
)  # fmt: skip
def test_a_command_on_the_core_names_its_extra_in_one_line(arguments, extra):
    done = without(EXTRAS["train"], COMMAND, arguments.split())
    who = "afd-fast" if arguments.startswith("-") else f"afd-fast {arguments.split()[0]}"
    missing = ", ".join(EXTRAS[extra])
    assert (
        done.stderr == f"error: {who} needs the extra [{extra}]: pip install 'afd-fast[{extra}]' (missing: {missing})\n"
    )
    assert done.returncode == 2 and not done.stdout


def test_a_package_that_is_missing_later_is_one_line_too(tmp_path):
    """Commands whose own imports are there; the toy student's adapters need peft, and Wan's VAE diffusers."""
    pytest.importorskip("typer", reason="needs the extras")
    done = without(
        ["peft"], COMMAND, ["demo", "iterations=1", "discriminator.warmup=0", "--out", str(tmp_path / "run")]
    )
    expected = "error: afd-fast demo needs the extra [demo]: pip install 'afd-fast[demo]' (missing: peft)\n"
    assert (done.stderr, done.returncode) == (expected, 2)
    done = without(["diffusers"], COMMAND, ["estimate", "afd_table3"])
    expected = "error: afd-fast estimate needs the extra [train]: pip install 'afd-fast[train]' (missing: diffusers)\n"
    assert (done.stderr, done.returncode) == (expected, 2)


def test_the_demo_imports_nothing_of_other_extras():
    """What `afd-fast demo` loads before its run, with the packages of [demo] alone: the teacher's client is [train]'s."""
    pytest.importorskip("typer", reason="needs the extras")
    absent = set(EXTRAS["train"]) - set(EXTRAS["demo"])
    code = "import afd_fast.teachers.dataset, afd_fast.training.trainer, afd_fast.reports, afd_fast.students.toy.family"
    done = without(absent, f"{code}; print('loaded')")
    assert done.stdout == "loaded\n", done.stderr


@pytest.mark.parametrize("statement", [
    "from afd_fast.students import load_student", "from afd_fast.training import train",
    "from afd_fast.discriminators import load_video_reward", "from afd_fast.rollout import rollout",
    "from afd_fast.video_io import read_video; read_video('x.mp4')",
])  # fmt: skip
def test_public_imports_name_their_extra(statement):
    done = without(EXTRAS["train"], statement)
    assert "MissingExtra: this part of afd_fast needs the extra [train]: pip install 'afd-fast[train]' (" in done.stderr


def test_a_broken_package_keeps_its_own_error():
    code = "from afd_fast.errors import extra\nwith extra('train'):\n    import no_such_package"
    assert "ModuleNotFoundError: No module named 'no_such_package'" in without([], code).stderr

"""Calling the official tools: in their own environment, as their own process, judged by the files they leave."""

import os
import socket
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from afd_fast.errors import ConfigError, ToolError

OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _environment(python: Path) -> dict[str, str]:
    """Ours without what would leak our packages or our ranks into the tool, its environment first on the path."""
    env = {key: value for key, value in os.environ.items() if key not in OURS}
    with socket.socket() as probe:  # VBench opens a process group on port 29500 unless told another
        probe.bind(("localhost", 0))
        env["MASTER_PORT"] = str(probe.getsockname()[1])
    return env | {"PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def python_of(env: Path, package: str) -> Path:
    """The python of a virtual or conda environment that has a package. ConfigError otherwise."""
    python = Path(env).absolute() / "bin" / "python"  # not resolved: the link is what makes it that environment's
    if not os.access(python, os.X_OK):
        raise ConfigError(f"{python} is not there; --env is the folder of the tool's environment (docs/evaluation.md)")
    code = f"import importlib.util as u, sys; sys.exit(3 if u.find_spec({package!r}) is None else 0)"
    status = subprocess.run([python, "-c", code], env=_environment(python), cwd=env, capture_output=True).returncode
    if status:
        problem = f"has no package {package}" if status == 3 else "does not start"
        raise ConfigError(f"{python} {problem}; install the tool there (docs/evaluation.md)")
    return python


def call(command: list, *, cwd: Path, log: Path) -> int:
    """Run a command whose first word is the environment's python; its output goes to log. The exit status, which is
    worth little: VBench's is 0 after failures."""
    with log.open("ab") as file:
        file.write(f"$ {' '.join(map(str, command))}\n".encode())
        file.flush()
        return subprocess.run(
            list(map(str, command)), cwd=cwd, env=_environment(Path(command[0])), stdin=subprocess.DEVNULL,
            stdout=file, stderr=subprocess.STDOUT,
        ).returncode  # fmt: skip


def failure(what: str, problem: str, log: Path) -> ToolError:
    """The error of a tool that ran and left no usable result, with the last thing it said."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return ToolError(f"{what}: {problem}; it said {lines[-1].strip()[:200]!r}, all of it is in {log}")


def coverage(scored: Iterable[str], expected: Iterable[str]) -> str | None:
    """What is wrong with the list of scored videos, or None: each expected one once, and no other."""
    count, expected = Counter(scored), set(expected)
    for problem, names in (
        ("scored that were not expected (of an earlier export?)", count.keys() - expected),
        ("scored more than once", {name for name, times in count.items() if times > 1}),
        ("not scored", expected - count.keys()),
    ):
        if names:
            return f"{len(names)} videos {problem}, such as {min(names)!r}"
    return None

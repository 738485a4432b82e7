"""Calls the official tools in their environment, as a separate process, and judges them by the files they write."""

import os
import socket
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from afd_fast.errors import ConfigError, ToolError

OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _environment(python: Path) -> dict[str, str]:
    """Our variables without those that would leak our packages or ranks into the tool; its environment is first on PATH."""
    env = {key: value for key, value in os.environ.items() if key not in OURS}
    with socket.socket() as probe:  # VBench opens a process group on port 29500 unless it is given another
        probe.bind(("localhost", 0))
        env["MASTER_PORT"] = str(probe.getsockname()[1])
    return env | {"PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def python_of(env: Path, package: str) -> Path:
    """The python of a virtual or conda environment that has the package. Raises ConfigError otherwise."""
    python = Path(env).absolute() / "bin" / "python"  # not resolved: through the link it is that environment's python
    if not os.access(python, os.X_OK):
        raise ConfigError(
            f"{python} does not exist or cannot be executed; --env is the folder of the tool's environment "
            "(docs/evaluation.md)"
        )
    code = f"import importlib.util as u, sys; sys.exit(3 if u.find_spec({package!r}) is None else 0)"
    status = subprocess.run([python, "-c", code], env=_environment(python), cwd=env, capture_output=True).returncode
    if status:
        problem = f"has no package {package}" if status == 3 else "does not start"
        raise ConfigError(f"{python} {problem}; install the tool in that environment (docs/evaluation.md)")
    return python


def call(command: Sequence[str | Path], *, cwd: Path, log: Path) -> int:
    """Run a command whose first word is the environment's python, with its output appended to log; returns the exit status.

    The status is not evidence of success: VBench exits with 0 after failures.
    """
    with log.open("ab") as file:
        file.write(f"$ {' '.join(map(str, command))}\n".encode())
        file.flush()
        return subprocess.run(
            list(map(str, command)), cwd=cwd, env=_environment(Path(command[0])), stdin=subprocess.DEVNULL,
            stdout=file, stderr=subprocess.STDOUT,
        ).returncode  # fmt: skip


def failure(what: str, problem: str, log: Path) -> ToolError:
    """The error for a tool that ran and left no usable result. It quotes the last line of the log."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return ToolError(
        f"{what}: {problem}; its last line of output is {lines[-1].strip()[:200]!r}, the whole log is {log}"
    )


def coverage(scored: Iterable[str], expected: Iterable[str]) -> str | None:
    """What is wrong with the list of scored videos, or None if it holds each expected video once and no other."""
    count, wanted = Counter(scored), set(expected)
    for problem, names in (
        ("scored that were not expected (from an earlier export?)", count.keys() - wanted),
        ("scored more than once", {name for name, times in count.items() if times > 1}),
        ("not scored", wanted - count.keys()),
    ):
        if names:
            return f"{len(names)} videos {problem}, such as {min(names)!r}"
    return None

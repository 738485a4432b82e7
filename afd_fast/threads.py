"""OpenMP's settings for the `afd-fast` command, made before PyTorch is imported, and the CPUs that they follow."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

WAITING = "OMP_WAIT_POLICY"
COUNT = "OMP_NUM_THREADS"
_own: set[str] = set()  # of these variables, the ones that the user left to the command


def affinity() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quota(root: Path = Path("/")) -> float | None:
    """CPUs' worth of time that the control groups of this process allow (versions 1 and 2); None: no limit."""
    return min((limit for folder in _groups(root) if (limit := _limit(folder)) is not None), default=None)


def _groups(root: Path) -> Iterator[Path]:
    """The folders of this process's groups, those above them included: a quota of any of them holds."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for number, names, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if number != "0" and "cpu" not in names.split(","):
            continue
        for mount in ("",) if number == "0" else (names, "cpu"):
            folder = Path(path.strip("/"))
            for part in (folder, *folder.parents):
                yield root / "sys/fs/cgroup" / mount / part


def _limit(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            most, period = (folder / "cpu.max").read_text().split()
        else:
            most, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return int(most) / int(period) if most not in ("max", "-1") else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def cpus() -> int:
    """Threads that can run at the same time: `affinity`, or `quota` where it is lower."""
    return max(1, int(min(affinity(), quota() or affinity())))


def configure() -> None:
    """In the command alone, let waiting threads sleep, and start no more threads than the quota allows. What the user
    has set in the environment stays."""
    wanted = {WAITING: "PASSIVE"} | ({COUNT: str(cpus())} if cpus() < affinity() else {})
    for name, value in wanted.items():
        if _is_command() and name not in os.environ:
            os.environ[name] = value
            _own.add(name)


def _is_command() -> bool:
    """Whether this process was started as `afd-fast` or `python -m afd_fast`, torchrun's included."""
    module = sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] if "-m" in sys.orig_argv else []
    return module == ["afd_fast"] or Path(sys.argv[0]).name == "afd-fast"


def share(parts: int) -> dict[str, str]:
    """The environment of one of `parts` processes that run at the same time; the user's settings stay."""
    return {} if COUNT in os.environ and COUNT not in _own else {COUNT: str(max(1, cpus() // parts))}


def facts() -> dict[str, str]:
    """What this process works with, for people."""
    limit, waiting = quota(), os.environ.get(WAITING, "")
    origin = "default of afd-fast; set the variable to change it" if WAITING in _own else "from the environment"
    return {
        "CPUs": f"{affinity()} of {os.cpu_count()}, quota {'none' if limit is None else f'{limit:g}'}",
        "waiting threads": f"{WAITING}={waiting} ({origin})" if waiting else f"OpenMP's default ({WAITING} is not set)",
    }

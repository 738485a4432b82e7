"""One process at a time in a folder: a lock of the kernel's, which ends with its process, however that ends."""

import contextlib
import fcntl
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from afd_fast.errors import ConfigError
from afd_fast.files.lock import take

RUN = "afd-fast-run.lock"  # also the mark of a run folder, the only kind that --overwrite empties
COMPARISON = "afd-fast-comparison.lock"


@contextlib.contextmanager
def locked(folder: Path, name: str = RUN) -> Iterator[None]:
    """Make the folder where there is none, and hold its lock inside the block. ConfigError that names the process which
    holds it, and where the folder cannot be written."""
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = held.enter_context((folder / name).open("a+"))
        except OSError as error:
            raise ConfigError(f"{folder} cannot be written ({error.strerror}): choose another --out") from error
        if not take(file.fileno(), fcntl.LOCK_EX):
            raise _taken(folder, name)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def check_unused(folder: Path, name: str = RUN) -> None:
    """`locked`'s ConfigError when a process works in the folder. Nothing is touched."""
    if not (folder / name).exists():
        return
    with (folder / name).open() as file:
        free = take(file.fileno(), fcntl.LOCK_SH)
    if not free:
        raise _taken(folder, name)


def _taken(folder: Path, name: str) -> ConfigError:
    holder = (folder / name).read_text(errors="replace") or "another process"
    return ConfigError(f"{folder} is in use by {holder}: wait until it has finished, or stop it with kill")

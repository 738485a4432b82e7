"""What is on disk about every video of an API: one JSON file each, and how much money is in them.

docs/teachers.md has the table of states with every transition and who pays.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, get_args

from afd_fast.errors import ConfigError, TeacherError
from afd_fast.files.durable import settle

State = Literal["new", "creating", "created", "made", "done", "unusable", "rejected", "refused", "failed", "lost"]
STATES: tuple[State, ...] = get_args(State)
FINAL = ("refused", "failed", "lost")  # never asked for again


@dataclass(frozen=True)
class Record:
    """One video.

    usd: paid, or reserved for a task that may exist. wire_seed: the seed of the create request, which no other video has.
    failures: tasks that the provider failed. strikes: runs in which the provider answered, but not with this video. reason:
    why it is not available.
    """

    prompt: str
    seed: int
    state: State = "new"
    usd: float = 0.0
    wire_seed: int = -1
    task: str = ""
    failures: int = 0
    strikes: int = 0
    reason: str = ""
    sha256: str = ""

    @property
    def left_out(self) -> bool:
        """Whether every run tries to get it and none waits for it."""
        return self.state in ("unusable", "rejected") or (self.state == "created" and self.strikes > 1)

    @property
    def title(self) -> str:
        """Which video it is, for messages."""
        prompt = self.prompt if len(self.prompt) <= 80 else f"{self.prompt[:77]}..."
        return f"{prompt!r}, seed {self.seed}"

    def __str__(self) -> str:
        return f"{self.title}: {self.state}" + (f" ({self.reason})" if self.reason else "")


class Ledger:
    """The records of a folder by name, as they are on disk."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._records: dict[str, Record] = {}
        self._names: dict[str, str] = {}  # task -> name
        self._spent = Decimal(0)  # exact: a sum of floats would lock the budget a cent too early
        for path in sorted(folder.glob("*.json")):
            if re.fullmatch("[0-9a-f]{32}", path.stem):
                self._put(path.stem, _read(path))

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def get(self, name: str) -> Record | None:
        return self._records.get(name)

    def __getitem__(self, name: str) -> Record:
        return self._records[name]

    @property
    def spent(self) -> Decimal:
        """Dollars on record: paid, or reserved for a task that may exist."""
        return self._spent

    def owner(self, task: str) -> str | None:
        """The name of the video that a task was made for."""
        return self._names.get(task)

    def video(self, name: str) -> Path:
        """Where a video is kept."""
        return self.folder / f"{name}.mp4"

    def add(self, name: str, record: Record) -> None:
        """Write a record: it is complete on disk before this returns. TeacherError where the disk refuses."""
        partial = self.folder / f"{name}.json.part"
        try:
            partial.write_text(json.dumps(asdict(record), ensure_ascii=False, indent=1), encoding="utf-8")
            settle(partial, self.folder / f"{name}.json")
        except OSError as error:
            raise refused_by_disk(partial, error) from None
        self._put(name, record)

    def write(self, name: str, **change: Any) -> None:
        """Change fields of a record, as `add`."""
        self.add(name, replace(self._records[name], **change))

    def _put(self, name: str, record: Record) -> None:
        old = self._records.get(name)
        self._spent += exact(record.usd) - (exact(old.usd) if old else 0)
        self._records[name] = record
        if old and old.task != record.task:
            self._names.pop(old.task, None)
        if record.task:
            self._names[record.task] = name


def exact(usd: float) -> Decimal:
    """An amount as it is written in decimal."""
    return Decimal(str(usd))


def wire_seed(name: str, failures: int) -> int:
    """The seed to send: 31 bits, one for each task that is wanted, by which the task is found in the provider's list."""
    return int(hashlib.sha256(f"{name}/{failures}".encode()).hexdigest()[:8], 16) >> 1


def refused_by_disk(path: Path, error: OSError) -> TeacherError:
    return TeacherError(
        f"{path} cannot be written ({error.strerror}): make room or make {path.parent} writable, and run the same command again"
    )


def _read(path: Path) -> Record:
    """A record on disk. ConfigError for a damaged one."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        record = Record(**{f.name: given[f.name] for f in fields(Record) if f.name in given})
        sound = (
            record.state in STATES and isinstance(record.prompt, str) and math.isfinite(record.usd) and record.usd >= 0
        )
    except (OSError, ValueError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise ConfigError(f"{path} is not a record of a video: restore it, or move it away to buy that video again")
    return record

"""Checkpoints that are whole or not there: written to a temporary file, fsynced, renamed; damage since then is noticed
when one is read, by checksums."""

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from afd_fast.errors import CheckpointError
from afd_fast.files.durable import checksum, settle, sync
from afd_fast.students.files import check_sums, first_line
from afd_fast.training.dcp_reader import PlainPlanner, PlainReader
from afd_fast.training.distributed import Ranks

KEEP = 2
SUMS = "checksums.json"  # in a .dcp folder: SHA-256 by file; a .pt file has its own checksums


def step_of(path: Path) -> int:
    """The iterations done when a checkpoint was written."""
    return int(path.stem.removeprefix("step-"))


def saved(folder: Path, *suffixes: str) -> list[Path]:
    """The checkpoints of a run, newest first."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.stem) and p.suffix in suffixes]
    return sorted(found, key=step_of, reverse=True)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    return next(iter(saved(folder, ".pt", ".dcp")), None)


def _settle(path: Path, partial: Path) -> None:
    """Give a complete checkpoint its name, and drop all but the last KEEP."""
    if path.is_dir():  # of an earlier attempt at the same step
        shutil.rmtree(path)
    settle(partial, path)
    for old in saved(path.parent, path.suffix)[KEEP:]:
        shutil.rmtree(old) if old.is_dir() else old.unlink()


def save(folder: Path, step: int, payload: dict) -> Path:
    """Write step-NNNNNN.pt atomically and drop all but the last KEEP. payload: tensors and plain values only.

    CheckpointError when the disk refuses; earlier checkpoints are untouched then.
    """
    path = folder / f"step-{step:06d}.pt"
    partial = path.with_suffix(".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(payload, file)
        _settle(path, partial)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise _refused(path, error) from error
    return path


def save_sharded(folder: Path, step: int, payload: dict, ranks: Ranks) -> Path:
    """`save` for tensors that are split over the ranks: step-NNNNNN.dcp, a folder of torch.distributed.checkpoint. Every
    rank calls it; readable by any number of them."""
    path = folder / f"step-{step:06d}.dcp"
    partial = path.with_suffix(".part")
    try:
        with ranks.led():
            if ranks.lead and partial.exists():
                shutil.rmtree(partial)
        dcp.save(payload, checkpoint_id=partial, no_dist=ranks.world == 1)
        with ranks.led():
            if ranks.lead:
                _write_sums(partial)
                _settle(path, partial)
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        raise _refused(path, error) from error
    return path


def _refused(path: Path, error: BaseException) -> CheckpointError:
    reason = f"{path} could not be written ({_reason(error)})"
    return CheckpointError(f"{reason}; {standing(path.parent)}. Free some space and continue with --resume")


def standing(folder: Path) -> str:
    """What can be resumed from, in words."""
    valid = latest(folder)
    return f"{valid} is still valid" if valid else "no earlier checkpoint exists"


def _write_sums(folder: Path) -> None:
    sums = {p.name: checksum(p) for p in sorted(folder.iterdir())}
    (folder / SUMS).write_text(json.dumps(sums, indent=1))
    sync(folder / SUMS)


def load(path: Path) -> dict:
    """Read a checkpoint without running code from it. CheckpointError when it is damaged."""
    try:
        check_sums(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise _unreadable(path, error) from error


def load_sharded(path: Path, blank: Callable[[set[str]], dict], ranks: Ranks) -> dict:
    """`load` of a `save_sharded` checkpoint into `blank(its keys)`. Every rank calls it, and checks its share of the files."""
    damage: Exception | None = None
    try:
        sums: dict[str, str] = json.loads((path / SUMS).read_text())
        for name in sorted(sums)[ranks.rank :: ranks.world]:
            if checksum(path / name) != sums[name]:
                raise ValueError(f"{name} has changed since it was written")
    except Exception as error:
        damage = error
    if ranks.any(damage is not None):
        raise _unreadable(path, damage or ValueError("another rank finds it damaged")) from damage
    try:
        reader = PlainReader(path)
        payload = blank(set(reader.read_metadata().state_dict_metadata))
        dcp.load(payload, storage_reader=reader, planner=PlainPlanner(), no_dist=ranks.world == 1)
        return payload
    except (Exception, dcp.api.CheckpointException) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read ({_reason(error)})")


def _reason(error: BaseException) -> str:
    """An error in one line; of a CheckpointException, the error of the first rank that had one."""
    if isinstance(error, dcp.api.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {first_line(error)}"

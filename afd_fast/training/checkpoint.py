"""Checkpoints that are whole or not there: written to a temporary file, fsynced, renamed; the newest is always valid."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from afd_fast.errors import CheckpointError
from afd_fast.training.distributed import Ranks

KEEP = 2


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    return max([*folder.glob("step-*.pt"), *folder.glob("step-*.dcp")], key=lambda p: p.stem, default=None)


def _settle(path: Path, partial: Path) -> None:
    """Give a complete checkpoint its name, and drop all but the last KEEP."""
    if path.is_dir():  # of an earlier attempt at the same step
        shutil.rmtree(path)
    partial.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    for old in sorted(path.parent.glob(f"step-*{path.suffix}"))[:-KEEP]:
        shutil.rmtree(old) if old.is_dir() else old.unlink()


def save(folder: Path, step: int, payload: dict) -> Path:
    """Write step-NNNNNN.pt atomically and drop all but the last KEEP. payload: tensors and plain values only.

    CheckpointError when the disk refuses; earlier checkpoints are untouched then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:06d}.pt"
    partial = path.with_suffix(".part")
    try:
        with partial.open("wb") as file:
            torch.save(payload, file)
            file.flush()
            os.fsync(file.fileno())
        _settle(path, partial)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        partial.unlink(missing_ok=True)
        raise _refused(path, error) from error
    return path


def save_sharded(folder: Path, step: int, payload: dict, ranks: Ranks) -> Path:
    """`save` for tensors that are split over the ranks: step-NNNNNN.dcp, a folder of torch.distributed.checkpoint. Every
    rank calls it; readable by any number of them."""
    path = folder / f"step-{step:06d}.dcp"
    partial = path.with_suffix(".part")
    try:
        if ranks.lead and partial.exists():
            shutil.rmtree(partial)
        ranks.wait()
        dcp.save(payload, checkpoint_id=partial, no_dist=ranks.world == 1)
        if ranks.lead:
            _settle(path, partial)
        ranks.wait()
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        raise _refused(path, error) from error
    return path


def _refused(path: Path, error: BaseException) -> CheckpointError:
    valid = latest(path.parent)
    kept = f"{valid} is still valid" if valid else "no earlier checkpoint exists"
    return CheckpointError(f"{path} could not be written ({error}); {kept}. Free some space and continue with --resume")


def load(path: Path) -> dict:
    """Read a checkpoint without running code from it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error})") from error


def load_sharded(path: Path, blank: Callable[[set[str]], dict], ranks: Ranks) -> dict:
    """Read a `save_sharded` checkpoint into `blank(its keys)`. Its metadata is a pickle: open only your own."""
    try:
        keys = set(dcp.FileSystemReader(path).read_metadata().state_dict_metadata)
        payload = blank(keys)
        dcp.load(payload, checkpoint_id=path, no_dist=ranks.world == 1)
        return payload
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error})") from error

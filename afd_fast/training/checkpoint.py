"""Checkpoints that are whole or not there: written beside, fsynced, renamed; the newest is always valid."""

import os
from pathlib import Path

import torch

KEEP = 2


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read; the message says what is still valid."""


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    return max(folder.glob("step-*.pt"), default=None)


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
        partial.replace(path)
        directory = os.open(folder, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        partial.unlink(missing_ok=True)
        valid = latest(folder)
        kept = f"{valid} is still valid" if valid else "no earlier checkpoint exists"
        raise CheckpointError(
            f"{path} could not be written ({error}); {kept}. Free some space and continue with --resume"
        ) from error
    for old in sorted(folder.glob("step-*.pt"))[:-KEEP]:
        old.unlink()
    return path


def load(path: Path) -> dict:
    """Read a checkpoint without running code from it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error})") from error

"""Continuing a run: the newest valid checkpoint, and what has changed since the run last started."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from afd_fast.config import TrainConfig, to_dict
from afd_fast.errors import CheckpointError, ConfigError
from afd_fast.files.text import read_json
from afd_fast.teachers.dataset import TeacherVideos
from afd_fast.training import checkpoint
from afd_fast.training.run import Run
from afd_fast.training.run_folder import checkpoints, environment, write_json

SHOWN = 3  # prompts in a line

Note = Callable[[str], None]  # logs a line and keeps it for the report


def reopen(out: Path, config: TrainConfig, note: Note) -> None:
    """Make a run folder this process's: it may do more iterations than it was started with, on another machine."""
    before, now = read_json(out / "environment.json"), environment()
    if changed := [f"{key} is {now[key]}, was {before.get(key)}" for key in now if now[key] != before.get(key)]:
        note(f"continued in another environment ({'; '.join(changed)}): numbers may differ in their last digits")
        write_json(out / "environment.json", now)
    iterations = read_json(out / "config.json")["iterations"]
    if iterations != config.iterations:
        (out / "result.json").unlink(missing_ok=True)  # of the shorter run
        write_json(out / "config.json", to_dict(config))
        schedule = ", and the learning rate follows the longer cosine from here" if config.update.lr_decay else ""
        note(f"iterations is {config.iterations}, was {iterations}{schedule}")


def check_teacher(out: Path, data: TeacherVideos, note: Note) -> None:
    """Note which of the teacher's videos, or of their weights, differ from those that the run started with; the first call keeps
    their hashes."""
    path, now = out / "teacher.json", {}
    for prompt, videos in data.videos.items():
        digest, weights = hashlib.sha256(videos.contiguous().numpy().data), data.weights.get(prompt, [1.0])
        digest.update(repr(weights).encode() if min(weights) < 1 else b"")
        now[prompt] = digest.hexdigest()
    if path.exists():
        try:
            before = read_json(path)
        except ConfigError as error:
            note(f"whether the teacher's videos have changed is unknown: {error}")
            before = now
        odd = [prompt for prompt in {**before, **now} if before.get(prompt) != now.get(prompt)]
        if odd:
            more = f" and {len(odd) - SHOWN} more" if len(odd) > SHOWN else ""
            note(f"the teacher's videos or their weights have changed: {', '.join(map(repr, odd[:SHOWN]))}{more}")
    write_json(path, now)


def restore(run: Run, out: Path, note: Note) -> float:
    """Load the newest valid checkpoint into the run, if there is one; returns the seconds that the run had taken.
    CheckpointError when there are some, but none is valid."""
    damage: dict[Path, str] = {}
    for path in checkpoints(out, run.config):
        payload = _read(run, path)
        if run.ranks.any(isinstance(payload, CheckpointError)):
            damage[path] = str(payload) if isinstance(payload, CheckpointError) else f"another rank cannot read {path}"
            continue
        assert not isinstance(payload, CheckpointError)
        run.state.load_state_dict(payload["state"])
        for newer, reason in damage.items():
            note(f"{reason}: set aside as {newer.name}.damaged, continuing from {path.name}")
            with run.ranks.led():
                if run.ranks.lead:
                    newer.rename(newer.with_name(f"{newer.name}.damaged"))
        return payload["elapsed"]
    if damage:
        raise CheckpointError(f"{'; '.join(damage.values())}: restore one, or start again with --overwrite")
    return 0.0


def _read(run: Run, path: Path) -> dict[str, Any] | CheckpointError:
    def blank(keys: set[str]) -> dict[str, Any]:
        return {"state": run.state.blank(keys), "elapsed": 0.0}

    try:
        payload = checkpoint.load(path) if path.suffix == ".pt" else checkpoint.load_sharded(path, blank, run.ranks)
    except CheckpointError as error:
        return error
    if not isinstance(payload, dict) or not {"state", "elapsed"} <= payload.keys():
        return CheckpointError(f"{path} is not a checkpoint of a run")
    return payload

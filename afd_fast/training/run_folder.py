"""A run's folder: made or refused before anything is touched, and its JSONL files."""

import json
import logging
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import afd_fast
from afd_fast.config import TrainConfig, to_dict
from afd_fast.errors import ConfigError, extra
from afd_fast.files.durable import settle
from afd_fast.files.text import read_json
from afd_fast.training.checkpoint import saved
from afd_fast.training.lock import RUN

with extra("train"):
    from safetensors import SafetensorError, safe_open

log = logging.getLogger("afd_fast")


def environment() -> dict[str, Any]:
    """Versions and machine, for reports."""
    packages = ("torch", "triton", "peft", "transformers", "diffusers", "av", "pymunk", "numpy")
    versions = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "afd_fast": afd_fast.__version__,
        "python": platform.python_version(),
        **versions,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": torch.get_num_threads(),
    }


def folder_of(config: TrainConfig, out: str | Path | None) -> Path:
    """Where a run is kept. TypeError for what is no configuration."""
    if not isinstance(config, TrainConfig):
        way = f"afd_fast.training.runs.get({config!r})" if isinstance(config, str) else "TrainConfig(name=value, ...)"
        raise TypeError(f"config must be a TrainConfig, got {config!r}: give {way}")
    return Path("runs") / config.name if out is None else Path(out)


def check_folder(out: Path, config: TrainConfig, *, overwrite: bool, resume: bool) -> None:
    """ConfigError for a folder that cannot be used so; nothing is touched."""
    if resume and overwrite:
        raise ConfigError("give either --resume, which continues the run, or --overwrite, which deletes it")
    if resume:
        return _check_resumable(out, config)
    try:
        taken = out.exists() and any(path.name != RUN for path in out.iterdir())
    except NotADirectoryError:
        raise ConfigError(f"{out} is a file: choose another --out") from None
    if not taken:
        return
    if not overwrite:
        raise ConfigError(
            f"{out} exists; continue it with --resume, replace it with --overwrite, or choose another --out"
        )
    if not (out / RUN).exists():
        raise ConfigError(f"{out} is not a run folder (no {RUN}): --overwrite will not delete it")


def _check_resumable(out: Path, config: TrainConfig) -> None:
    """ConfigError unless the folder holds this run, of at most as many iterations."""
    if not started(out):
        raise ConfigError(f"{out} holds no run to resume")
    before, now = read_json(out / "config.json"), json.loads(json.dumps(to_dict(config)))
    if missing := sorted(now.keys() ^ before.keys()):
        raise ConfigError(
            f"{out} was started by another version of afd_fast (environment.json names it), whose settings differ in "
            f"{', '.join(missing[:4])}: resume with that version, or start again with --overwrite"
        )
    odd = [key for key in now if before[key] != now[key] and key != "iterations"]
    if odd:
        values = ", ".join(f"{key}={before[key]} there and {now[key]} here" for key in odd)
        raise ConfigError(
            f"{out} was started with another configuration ({values}); resume with the same one, only iterations may grow"
        )
    if (least := before["iterations"]) > config.iterations:
        raise ConfigError(
            f"{out} is a run of {least} iterations: set iterations={least} or more, got {config.iterations}"
        )


def checkpoints(out: Path, config: TrainConfig) -> list[Path]:
    """The checkpoints of the run's own kind, newest first."""
    return saved(out / "checkpoints", ".dcp" if config.fsdp else ".pt")


def started(out: Path) -> bool:
    """Whether the folder holds a run, which goes on with --resume: without a configuration it was killed as it was made."""
    return (out / "config.json").exists()


def finished(out: Path, config: TrainConfig) -> dict[str, Any] | None:
    """The content of result.json, if it is that of all of the iterations, and the scores and samples of its report are there. A damaged
    file counts as none: a resumed run makes it again."""
    try:
        result = read_json(out / "result.json")
        judged(out, config.iterations)
        with safe_open(out / "samples.safetensors", "pt"):
            pass
    except (ConfigError, OSError, SafetensorError):
        return None
    return result if result.get("config", {}).get("iterations") == config.iterations else None


def judged(out: Path, iterations: int) -> list[dict[str, Any]]:
    """evaluations.jsonl of a finished run, from the base student's scores to those after all iterations. ConfigError where one of them
    is missing."""
    rows = read_rows(out / "evaluations.jsonl")
    if not {0, iterations} <= {row["step"] for row in rows}:
        raise ConfigError(
            f"{out / 'evaluations.jsonl'} has lost the scores of the base student or of the last iteration: continue the run with "
            "--resume to make them again"
        )
    return rows


def make_folder(out: Path, config: TrainConfig) -> None:
    """Make the folder of a new run, in place of an earlier run that `check_folder` let through. ConfigError where it
    cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / RUN).touch()
        for path in out.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != RUN:
                path.unlink()
        write_json(out / "environment.json", environment())
        write_json(out / "config.json", to_dict(config))
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror}): choose another --out") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """The content as JSON; the file appears whole or not at all."""
    _write(path, json.dumps(content, indent=1))


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".part")
    partial.write_text(text)
    settle(partial, path)


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a JSONL file."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(path: Path, before: int | None = None) -> list[dict[str, Any]]:
    """Rows of a JSONL file of steps; what a crash left of others is skipped, with a warning. before: only rows with
    step < before."""
    rows, torn = [], 0
    for line in path.read_text(errors="replace").split("\n") if path.exists() else []:
        try:
            row = json.loads(line or "{}")
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
        elif row != {}:
            torn += 1
    if torn:
        log.warning("%s: %d damaged line%s skipped", path, torn, "s" * (torn > 1))
    return [row for row in rows if before is None or row["step"] < before]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A JSONL file of these rows alone; it appears whole or not at all."""
    _write(path, "".join(json.dumps(row) + "\n" for row in rows))


def in_common(runs: Sequence[Sequence[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Of the rows of several runs, those of the steps that every run has."""
    steps = set.intersection(*({row["step"] for row in run} for run in runs))
    return [[row for row in run if row["step"] in steps] for run in runs]


def rewind(path: Path, before: int) -> None:
    """Drop the rows of a JSONL file from step `before` on."""
    write_rows(path, read_rows(path, before))

"""A run's folder: made or refused before anything is touched, and its JSONL files."""

import json
import os
import platform
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

import afd_fast
from afd_fast.config import TrainConfig, to_dict
from afd_fast.errors import ConfigError
from afd_fast.video_io import gif


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


def check_folder(out: Path, config: TrainConfig, *, overwrite: bool, resume: bool) -> None:
    """ConfigError for a folder that cannot be used so; nothing is touched."""
    if resume:
        if not (out / "config.json").exists():
            raise ConfigError(f"{out} holds no run to resume")
        saved, now = json.loads((out / "config.json").read_text()), json.loads(json.dumps(to_dict(config)))
        if odd := [key for key in {**now, **saved} if saved.get(key, ...) != now.get(key, ...)]:
            raise ConfigError(
                f"{out} was started with another configuration ({', '.join(odd)} differ); resume with the same one"
            )
        return
    try:
        taken = out.exists() and any(out.iterdir())
    except NotADirectoryError:
        raise ConfigError(f"{out} is a file: choose another --out") from None
    if not taken:
        return
    if not overwrite:
        raise ConfigError(
            f"{out} exists; continue it with --resume, replace it with --overwrite, or choose another --out"
        )
    if not (out / "environment.json").exists() or not (out / "config.json").exists():
        raise ConfigError(
            f"{out} is not a run folder (no config.json and environment.json): --overwrite will not delete it"
        )


def make_folder(out: Path, config: TrainConfig) -> None:
    """Make the folder of a new run, in place of an earlier run that `check_folder` let through. ConfigError where it
    cannot be written."""
    try:
        if out.exists():
            shutil.rmtree(out)
        out.mkdir(parents=True)
        (out / "config.json").write_text(json.dumps(to_dict(config), indent=1))
        (out / "environment.json").write_text(json.dumps(environment(), indent=1))
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror}): choose another --out") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """The content as JSON; the file appears whole or not at all."""
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(content, indent=1))
    partial.replace(path)


def add_video(writer: SummaryWriter, tag: str, video: Tensor, fps: float, step: int) -> None:
    """Show [3, F, H, W] in [0, 1] under a tag in TensorBoard (its own add_video needs moviepy)."""
    image = Summary.Image(
        encoded_image_string=gif(video, fps), height=video.shape[2], width=video.shape[3], colorspace=3
    )
    assert writer.file_writer is not None
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a JSONL file."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(path: Path, before: int | None = None) -> list[dict[str, Any]]:
    """Rows of a JSONL file; a half-written last line is dropped. before: only rows with step < before."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return [row for row in rows if before is None or row["step"] < before]


def rewind(path: Path, before: int) -> None:
    """Drop the rows of a JSONL file from step `before` on."""
    rows = read_rows(path, before)
    partial = path.with_suffix(".part")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partial.replace(path)

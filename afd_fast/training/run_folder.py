"""A run's folder: made or refused before anything is touched, and its JSONL files."""

import json
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

import afd_fast
from afd_fast.config import TrainConfig, from_dict, to_dict
from afd_fast.errors import ConfigError
from afd_fast.video_io import gif


def environment() -> dict:
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


def prepare_folder(out: Path, config: TrainConfig, *, overwrite: bool, resume: bool) -> None:
    """Make the run folder, or refuse before anything is touched."""
    if resume:
        if not (out / "config.json").exists():
            raise ConfigError(f"{out} holds no run to resume")
        saved = from_dict(json.loads((out / "config.json").read_text()))
        if saved != config:
            odd = [k for k, v in to_dict(config).items() if to_dict(saved)[k] != v]
            raise ConfigError(
                f"{out} was started with another configuration ({', '.join(odd)} differ); resume with the same one"
            )
        return
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise ConfigError(
                f"{out} exists; continue it with --resume, replace it with --overwrite, or choose another --out"
            )
        if not (out / "config.json").exists():
            raise ConfigError(f"{out} is not a run folder (no config.json): --overwrite will not delete it")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(to_dict(config), indent=1))
    (out / "environment.json").write_text(json.dumps(environment(), indent=1))


def add_video(writer: SummaryWriter, tag: str, video: Tensor, fps: float, step: int) -> None:
    """Show [3, F, H, W] in [0, 1] under a tag in TensorBoard (its own add_video needs moviepy)."""
    image = Summary.Image(
        encoded_image_string=gif(video, fps), height=video.shape[2], width=video.shape[3], colorspace=3
    )
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def append(path: Path, row: dict) -> None:
    """Add a row to a JSONL file."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(path: Path, before: int | None = None) -> list[dict]:
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

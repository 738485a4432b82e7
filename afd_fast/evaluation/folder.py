"""The folder of an evaluation: videos under the names the tools expect, next to a list of what was requested.

OUT/videos/         mp4 files and nothing else: VBench takes the extension of the first file it happens to list
OUT/manifest.csv    video,prompt,seed of every expected file
OUT/export.json     how the videos were made; an export continues only with the same settings
OUT/results/TOOL/   what the tools wrote
"""

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import av

from afd_fast.errors import ConfigError
from afd_fast.evaluation.intervals import Groups

Settings = dict[str, Any]  # the contents of export.json


@dataclass(frozen=True)
class Clip:
    """One expected video: its file name in OUT/videos, its prompt and the seed of its noise."""

    video: str
    prompt: str
    seed: int


def start(out: Path, clips: list[Clip], settings: Settings) -> None:
    """Write the manifest and the settings, or verify that OUT has the same ones.

    Raises ConfigError if OUT holds another export, and for a prompt that makes no file name.
    """
    for clip in clips:
        if "/" in clip.video or len(clip.video.encode()) > 255:
            raise ConfigError(
                f"the prompt {clip.prompt[:60]!r}... makes no file name, which has no '/' and at most 249 bytes: shorten it"
            )
    if (out / "export.json").exists():
        if read_manifest(out) != clips or read_settings(out) != settings:
            raise ConfigError(f"{out} holds an export with other prompts or settings; choose another folder")
        return
    if out.exists() and {path.name for path in out.iterdir()} - {"videos", "manifest.csv"}:
        raise ConfigError(f"{out} holds other things than an export; choose another folder")
    (out / "videos").mkdir(parents=True, exist_ok=True)
    write_csv(out / "manifest.csv", [field.name for field in fields(Clip)], map(astuple, clips))
    (out / "export.json").write_text(json.dumps(settings, indent=1) + "\n")


def read_settings(out: Path) -> Settings:
    """OUT/export.json. Raises ConfigError if it is missing or damaged."""
    file = out / "export.json"
    if not file.is_file():
        raise ConfigError(f"{out} holds no export.json; make it with `afd-fast eval export`")
    try:
        settings = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON ({error}); make it again with `afd-fast eval export`") from None
    if not isinstance(settings, dict) or "n" not in settings:
        raise ConfigError(f"{file} does not hold the settings of an export; make it again with `afd-fast eval export`")
    return settings


def read_manifest(out: Path) -> list[Clip]:
    """The expected videos, in order. Raises ConfigError if the manifest is missing or damaged."""
    file = out / "manifest.csv"
    if not file.is_file():
        raise ConfigError(f"{out} holds no manifest.csv; make it with `afd-fast eval export`")
    rows = read_csv(file, ("video", "prompt", "seed"))
    try:
        return [Clip(row["video"], row["prompt"], int(row["seed"])) for row in rows]
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{file}: a seed is not an integer ({error}); make it again with `afd-fast eval export`"
        ) from None


def missing(out: Path, clips: list[Clip]) -> list[Clip]:
    """The clips without a readable file. Raises ConfigError for files in OUT/videos that are not in the list."""
    folder = out / "videos"
    if not folder.is_dir():
        raise ConfigError(f"{folder} does not exist; make it with `afd-fast eval export`")
    stray = {path.name for path in folder.iterdir()} - {clip.video for clip in clips}
    if stray:
        raise ConfigError(
            f"{folder} holds {len(stray)} files that do not belong there ({min(stray)}): move them away, "
            "the official tools score every file in this folder or fail on it"
        )
    return [clip for clip in clips if not _readable(folder / clip.video)]


def check(out: Path) -> list[Clip]:
    """The expected clips, each with a readable file and no other file. Raises ConfigError that names the problem."""
    clips = read_manifest(out)
    lacking = missing(out, clips)
    if lacking:
        raise ConfigError(
            f"{len(lacking)} of {len(clips)} videos are missing or unreadable in {out / 'videos'} "
            f"({lacking[0].video}); run `afd-fast eval export` again, or put them there under the manifest's names"
        )
    return clips


def by_prompt(clips: list[Clip], values: Mapping[str, float]) -> Groups:
    """The values {video: value} of each prompt's clips; clips without a value are left out."""
    groups: Groups = {clip.prompt: [] for clip in clips}
    for clip in clips:
        if clip.video in values:
            groups[clip.prompt].append(values[clip.video])
    return groups


def _readable(path: Path) -> bool:
    """Whether the file is a complete mp4: it opens and holds every frame that its index lists."""
    try:
        with av.open(str(path)) as container:
            sizes = [packet.size for packet in container.demux(video=0) if packet.size and not packet.is_corrupt]
            return len(sizes) == container.streams.video[0].frames > 0
    except (av.FFmpegError, OSError, IndexError):
        return False


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a table with a header; the file appears complete or not at all."""
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    partial.replace(path)


def read_csv(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a table. Raises ConfigError unless the file exists and has these columns."""
    if not path.is_file():
        raise ConfigError(f"{path} is not there")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            absent = set(columns) - set(reader.fieldnames or ())
            if absent:
                raise ConfigError(f"{path} has no column {', '.join(sorted(absent))}")
            return list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} is not a CSV file in UTF-8: {error}") from None


def number(row: Mapping[str, str], column: str, path: Path) -> float:
    """The number in a column of a row of the table at `path`. Raises ConfigError for anything else."""
    try:
        return float(row[column])
    except (TypeError, ValueError):
        raise ConfigError(f"{path}: {column} is {row[column]!r}, expected a number; restore the table") from None

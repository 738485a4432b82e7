"""The folder of an evaluation: videos under the names the tools expect, next to a list of what was requested.

OUT/videos/         mp4 files and nothing else: VBench takes the extension of the first file it happens to list
OUT/manifest.csv    video,prompt,seed of every expected file
OUT/export.json     how the videos were made; an export continues only with the same settings
OUT/results/TOOL/   what the tools wrote
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from afd_fast.errors import ConfigError
from afd_fast.evaluation.intervals import Groups
from afd_fast.files.durable import settle
from afd_fast.files.tables import inside, read_csv, write_csv
from afd_fast.files.text import check_folder, read_json
from afd_fast.video_io import is_complete

Settings = dict[str, Any]  # the contents of export.json


@dataclass(frozen=True)
class Clip:
    """One expected video: its file name in OUT/videos, its prompt and the seed of its noise."""

    video: str
    prompt: str
    seed: int


def verify(out: Path, clips: list[Clip], settings: Settings) -> None:
    """Raises ConfigError if OUT holds another export or other things, and for a prompt that makes no file name."""
    for clip in clips:
        if min(clip.video) < " " or "/" in clip.video or len(clip.video.encode()) > 255:
            raise ConfigError(
                f"the prompt {clip.prompt[:60]!r}... makes no file name, which has no '/', no control character "
                "and at most 249 bytes: change it"
            )
    if (out / "export.json").exists():
        if read_manifest(out) != clips or read_settings(out) != settings:
            raise ConfigError(f"{out} holds an export with other prompts or settings; choose another folder")
    elif out.exists() and {p.name for p in out.iterdir() if p.suffix != ".part"} - {"videos", "manifest.csv"}:
        raise ConfigError(f"{out} holds other things than an export; choose another folder")


def start(out: Path, clips: list[Clip], settings: Settings) -> None:
    """Write the manifest and the settings, or verify that OUT has the same ones. Raises ConfigError as `verify`."""
    verify(out, clips, settings)
    if (out / "export.json").exists():
        return
    (out / "videos").mkdir(parents=True, exist_ok=True)
    write_csv(out / "manifest.csv", [field.name for field in fields(Clip)], map(astuple, clips))
    (out / "export.part").write_text(json.dumps(settings, indent=1) + "\n")
    settle(out / "export.part", out / "export.json")


def read_settings(out: Path) -> Settings:
    """OUT/export.json. Raises ConfigError if it is missing or damaged."""
    check_folder(out, "a folder that `afd-fast eval export` made")
    file = out / "export.json"
    if not file.is_file():
        raise ConfigError(f"{out} holds no export.json; make it with `afd-fast eval export`")
    settings = read_json(file)
    if not isinstance(settings.get("n"), int) or settings["n"] < 1:
        raise ConfigError(f"{file} does not hold the settings of an export; make it again with `afd-fast eval export`")
    return settings


def read_manifest(out: Path) -> list[Clip]:
    """The expected videos, in order. Raises ConfigError if the manifest is missing or damaged."""
    check_folder(out, "a folder that `afd-fast eval export` made")
    file = out / "manifest.csv"
    if not file.is_file():
        raise ConfigError(f"{out} holds no manifest.csv; make it with `afd-fast eval export`")
    rows = read_csv(file, ("video", "prompt", "seed"))
    if not rows:
        raise ConfigError(f"{file} lists no video; make it again with `afd-fast eval export`")
    for name, times in Counter(row["video"] for row in rows).items():
        if "/" in name or not name.endswith(".mp4") or times > 1:
            raise ConfigError(
                f"{file} lists {name!r}, expected names of mp4 files in OUT/videos, each once: correct it"
            )
    try:
        return [Clip(row["video"], row["prompt"], int(row["seed"])) for row in rows]
    except ValueError as error:
        raise ConfigError(
            f"{file}: a seed is not an integer ({error}); make it again with `afd-fast eval export`"
        ) from None


def missing(out: Path, clips: list[Clip]) -> list[Clip]:
    """The clips without a whole file. Raises ConfigError for files in OUT/videos that are not in the list, or elsewhere."""
    folder = out / "videos"
    if not folder.is_dir():
        raise ConfigError(f"{folder} does not exist; make it with `afd-fast eval export`")
    stray = {path.name for path in folder.iterdir()} - {clip.video for clip in clips}
    if stray:
        raise ConfigError(
            f"{folder} holds {len(stray)} files that do not belong there ({min(stray)}): move them away, "
            "the official tools score every file in this folder or fail on it"
        )
    return [clip for clip in clips if not is_complete(inside(folder, clip.video))]


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


def number(row: Mapping[str, str], column: str, path: Path) -> float:
    """The number in a column of a row of the table at `path`. Raises ConfigError for anything else."""
    try:
        return float(row[column])
    except ValueError:
        raise ConfigError(f"{path}: {column} is {row[column]!r}, expected a number; restore the table") from None

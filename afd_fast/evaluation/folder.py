"""The folder an evaluation works in: videos under the names the tools expect, and what was asked for beside them.

OUT/videos/         mp4 files and nothing else: VBench takes the extension of the first file it happens to list
OUT/manifest.csv    video,prompt,seed of every expected file
OUT/export.json     how they were made; an export is only continued with the same settings
OUT/results/TOOL/   what the tools wrote
"""

import csv
import json
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import av

from afd_fast.errors import ConfigError
from afd_fast.evaluation.intervals import Groups


@dataclass(frozen=True)
class Clip:
    """One expected video: its file name in OUT/videos, its prompt and the seed of its noise."""

    video: str
    prompt: str
    seed: int


def start(out: Path, clips: list[Clip], settings: dict) -> None:
    """Write the manifest and the settings, or find the same ones there. ConfigError if OUT holds another export."""
    for clip in clips:
        if "/" in clip.video or len(clip.video.encode()) > 255:
            raise ConfigError(f"the prompt {clip.prompt[:60]!r}... is no file name: no '/' and at most 249 bytes")
    if (out / "export.json").exists():
        if read_manifest(out) != clips or read_settings(out) != settings:
            raise ConfigError(f"{out} holds an export with other prompts or settings; choose another folder")
        return
    if out.exists() and {path.name for path in out.iterdir()} - {"videos", "manifest.csv"}:
        raise ConfigError(f"{out} holds other things than an export; choose another folder")
    (out / "videos").mkdir(parents=True, exist_ok=True)
    write_csv(out / "manifest.csv", [field.name for field in fields(Clip)], map(astuple, clips))
    (out / "export.json").write_text(json.dumps(settings, indent=1) + "\n")


def read_settings(out: Path) -> dict:
    """OUT/export.json. ConfigError where there is none."""
    if not (out / "export.json").is_file():
        raise ConfigError(f"{out} holds no export.json; make it with `afd-fast eval export`")
    return json.loads((out / "export.json").read_text())


def read_manifest(out: Path) -> list[Clip]:
    """The expected videos, in their order. ConfigError where there is no manifest."""
    if not (out / "manifest.csv").is_file():
        raise ConfigError(f"{out} holds no manifest.csv; make it with `afd-fast eval export`")
    rows = read_csv(out / "manifest.csv", ("video", "prompt", "seed"))
    return [Clip(row["video"], row["prompt"], int(row["seed"])) for row in rows]


def missing(out: Path, clips: list[Clip]) -> list[Clip]:
    """The clips without a readable file. ConfigError for files in OUT/videos that nobody expects."""
    folder = out / "videos"
    stray = {path.name for path in folder.iterdir()} - {clip.video for clip in clips}
    if stray:
        raise ConfigError(
            f"{folder} holds {len(stray)} files that do not belong there ({min(stray)}): move them away, "
            "the official tools score whatever lies beside the videos or stumble over it"
        )
    return [clip for clip in clips if not _readable(folder / clip.video)]


def check(out: Path) -> list[Clip]:
    """The expected clips, every file there and readable, no other. ConfigError names what is amiss."""
    clips = read_manifest(out)
    lacking = missing(out, clips)
    if lacking:
        raise ConfigError(
            f"{len(lacking)} of {len(clips)} videos are missing or unreadable in {out / 'videos'} "
            f"({lacking[0].video}); run `afd-fast eval export` again, or put them there under the manifest's names"
        )
    return clips


def by_prompt(clips: list[Clip], values: dict[str, float]) -> Groups:
    """The values {video: value} of each prompt's clips; clips without a value are left out."""
    groups: Groups = {clip.prompt: [] for clip in clips}
    for clip in clips:
        if clip.video in values:
            groups[clip.prompt].append(values[clip.video])
    return groups


def _readable(path: Path) -> bool:
    """Whether the file is a whole mp4: it opens and holds every frame its index tells of."""
    try:
        with av.open(str(path)) as container:
            sizes = [packet.size for packet in container.demux(video=0) if packet.size and not packet.is_corrupt]
            return len(sizes) == container.streams.video[0].frames > 0
    except (av.FFmpegError, OSError, IndexError):
        return False


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[Iterable]) -> None:
    """A table with a header; it appears whole or not at all."""
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    partial.replace(path)


def read_csv(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a table. ConfigError unless it is there with these columns."""
    if not path.is_file():
        raise ConfigError(f"{path} is not there")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        absent = set(columns) - set(reader.fieldnames or ())
        if absent:
            raise ConfigError(f"{path} has no column {', '.join(sorted(absent))}")
        return list(reader)

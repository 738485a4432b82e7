"""A teacher that is a folder of finished videos and a manifest of (prompt, file)."""

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from afd_fast.errors import ConfigError, VideoError, some
from afd_fast.files.durable import settle
from afd_fast.files.tables import inside, read_csv, write_csv
from afd_fast.files.text import check_folder, read_text
from afd_fast.teachers.teacher import TeacherBase
from afd_fast.video_io import VideoFormat, check_file, format_of, read_video

COLUMNS = ("prompt", "video")  # of every manifest; "weight" may be a third


class Entry(NamedTuple):
    """A row of a manifest: the prompt, the file's path inside the folder, and how often training draws it, from 0 (never) to 1."""

    prompt: str
    video: str
    weight: float = 1.0


def read_manifest(folder: Path) -> list[Entry]:
    """The rows of manifest.jsonl or manifest.csv (columns prompt, video and, where there is one, weight). ConfigError names the file
    and the row."""
    check_folder(folder, "a folder with mp4 files and manifest.csv (columns prompt,video)")
    source, rows = _rows(folder)
    if source is None:
        raise ConfigError(
            f"{folder} holds neither manifest.csv nor manifest.jsonl: write a manifest.csv with the line prompt,video and then a line "
            "with prompt and file for each of its mp4 files"
        )
    entries, seen = [], dict[tuple[str, str], int]()
    for number, row in enumerate(rows, 1):
        prompt, video = (row.get("prompt"), row.get("video")) if isinstance(row, dict) else (None, None)
        if not (isinstance(prompt, str) and prompt.strip() and isinstance(video, str) and video.strip()):
            has = (
                f" (it has {', '.join(map(str, row))})"
                if isinstance(row, dict) and not {"prompt", "video"} <= row.keys()
                else ""
            )
            raise ConfigError(
                f'{source}: row {number} lacks "prompt" or "video", each a text that is not empty{has}: correct it'
            )
        if (first := seen.setdefault((prompt, Path(video).as_posix()), number)) != number:
            raise ConfigError(f"{source}: row {number} is the video of row {first} again, {video}: remove one of them")
        if odd := [key for key in row if str(key).strip().lower() in ("weight", "weights") and key != "weight"]:
            raise ConfigError(f"{source} has the column {odd[0]!r}: call it weight")
        entries.append(Entry(prompt, video, _weight(row.get("weight"), f"{source}: row {number}")))
    return entries


def write_manifest(folder: Path, entries: Sequence[Entry]) -> Path:
    """Make these the rows of a folder's manifest, manifest.csv where there is none. What a row of the same file holds beside them
    stays; the file changes as a whole or not at all. weight is written where one is not 1, or where there is the column."""
    source, found = _rows(folder)
    before = {(row["prompt"], row["video"]): row for row in found}
    rows = [{**before.get(entry[:2], {}), **entry._asdict()} for entry in entries]
    columns = dict.fromkeys([*COLUMNS, *(key for row in found for key in row), "weight"])
    if all(row["weight"] == 1 for row in rows) and not any("weight" in row for row in found):
        del columns["weight"]
    if source is None or source.suffix == ".csv":
        source = folder / "manifest.csv"
        write_csv(source, columns, ([row.get(key, "") for key in columns] for row in rows))
        return source
    partial = source.with_name(f"{source.name}.{os.getpid()}.part")
    lines = (json.dumps({key: row[key] for key in columns if key in row}, ensure_ascii=False) for row in rows)
    partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    settle(partial, source)
    return source


def lower_weights(folder: Path, weights: Mapping[tuple[str, str], float]) -> Path:
    """Write weights by (prompt, file) into a folder's manifest. A lower weight that is there stays, and so do all other rows; a video
    without a row gets one at the end, in the order of `weights`."""
    before = read_manifest(folder) if _rows(folder)[0] is not None else []
    keys = [(entry.prompt, Path(entry.video).as_posix()) for entry in before]
    rows = [entry._replace(weight=min(entry.weight, weights.get(key, 1.0))) for entry, key in zip(before, keys)]
    new = weights.keys() - set(keys)
    return write_manifest(folder, rows + [Entry(*key, weight) for key, weight in weights.items() if key in new])


def _rows(folder: Path) -> tuple[Path | None, list[Any]]:
    """A folder's manifest and its rows as they are written; None where it has none."""
    jsonl, table = folder / "manifest.jsonl", folder / "manifest.csv"
    if jsonl.exists():
        return jsonl, _json_lines(jsonl)
    return (table, read_csv(table, COLUMNS)) if table.exists() else (None, [])


def _weight(given: Any, where: str) -> float:
    """A weight as a cell of a table or a value of JSON gives it; one that is not given is 1."""
    if given is None or given == "":
        return 1.0
    try:
        weight = math.nan if isinstance(given, bool) else float(given)
    except (TypeError, ValueError):
        weight = math.nan
    if not 0 <= weight <= 1:
        raise ConfigError(f"{where} has the weight {given!r}, expected a number from 0 (left out) to 1: correct it")
    return weight


def _json_lines(path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: line {number} is not JSON ({error}): correct it") from None
    return rows


class Found(NamedTuple):
    """A row of a manifest and its file: what it holds, or why it cannot be used."""

    prompt: str
    video: str
    format: VideoFormat | None
    problem: str = ""


def survey(folder: Path) -> list[Found]:
    """Every row of a folder's manifest with the format of its file. ConfigError where there is no manifest."""
    found = []
    for prompt, video, _ in read_manifest(folder):
        try:
            found.append(Found(prompt, video, format_of(inside(folder, video))))
        except (VideoError, ConfigError) as error:
            found.append(Found(prompt, video, None, str(error)))
    return found


class FolderTeacher(TeacherBase):
    """Videos of a folder, brought to frames x size at fps. `seed` picks among a prompt's videos.

    Every file is read once at construction, and not kept: unreadable or too short ones, those outside the folder and those whose
    weight is 0 are left out and listed in `problems`; prompts without a usable video are gone. ConfigError when nothing is left.
    """

    def __init__(self, folder: str | Path, *, frames: int, size: tuple[int, int], fps: float):
        self.folder = folder = Path(folder)
        self.name, self.fps = f"folder:{folder}", fps
        self._problems: list[str] = []
        self.left_out: dict[str, str] = {}  # the manifest's name of a file -> why
        self.frames, self.size = frames, size
        self._videos: dict[str, list[Path]] = defaultdict(list)
        self._weights: dict[str, list[float]] = defaultdict(list)
        for prompt, file, weight in read_manifest(folder):
            try:
                if not weight:
                    raise VideoError(f"{folder / file} has the weight 0 in the manifest")
                path = inside(folder, file)
                check_file(path, frames=frames, size=size, fps=fps)
                self._videos[prompt].append(path)
                self._weights[prompt].append(weight)
            except (VideoError, ConfigError) as error:
                self._problems.append(str(error))
                self.left_out[file] = str(error)
        self.prompts = [p for p, videos in self._videos.items() if videos]
        if not self.prompts:
            raise ConfigError(f"{folder}: no usable video. " + some(self._problems or ["the manifest is empty"]))

    @property
    def problems(self) -> list[str]:
        """Files that were left out, and why."""
        return self._problems

    def seeds(self, prompt: str, wanted: Iterable[int]) -> list[int]:
        """Those of the wanted seeds that have a usable video."""
        return [seed for seed in wanted if seed < len(self._videos[prompt])]

    def weight(self, prompt: str, seed: int) -> float:
        """Of a video, as the manifest gives it."""
        return self._weights[prompt][seed]

    def file(self, prompt: str, seed: int) -> str:
        """The file of a video, as it is named in the folder."""
        return self._videos[prompt][seed].relative_to(self.folder).as_posix()

    def __call__(self, prompt: str, seed: int) -> Tensor:
        videos = self._videos.get(prompt)
        if not videos:
            raise ConfigError(f"{self.name} has no video for {prompt!r}")
        return read_video(videos[seed % len(videos)], frames=self.frames, size=self.size, fps=self.fps)

"""A teacher that is a folder of finished videos and a manifest of (prompt, file)."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from afd_fast.errors import ConfigError, VideoError
from afd_fast.files.tables import inside, read_csv
from afd_fast.files.text import check_folder, read_text
from afd_fast.teachers.teacher import TeacherBase
from afd_fast.video_io import VideoFormat, check_file, format_of, read_video


class Entry(NamedTuple):
    """A row of a manifest: the prompt and the file's path inside the folder."""

    prompt: str
    video: str


def read_manifest(folder: Path) -> list[Entry]:
    """The rows of manifest.jsonl or manifest.csv (columns prompt, video). ConfigError names the file and the row."""
    check_folder(folder, "a folder with mp4 files and manifest.csv (columns prompt,video)")
    jsonl, table = folder / "manifest.jsonl", folder / "manifest.csv"
    rows: Sequence[Any]
    if jsonl.exists():
        source, rows = jsonl, _json_lines(jsonl)
    elif table.exists():
        source, rows = table, read_csv(table, Entry._fields)
    else:
        raise ConfigError(
            f"{folder} holds neither manifest.csv nor manifest.jsonl: write a manifest.csv with the line prompt,video and then a line "
            "with prompt and file for each of its mp4 files"
        )
    entries = []
    for number, row in enumerate(rows, 1):
        prompt, video = (row.get("prompt"), row.get("video")) if isinstance(row, dict) else (None, None)
        if not (isinstance(prompt, str) and prompt.strip() and isinstance(video, str) and video.strip()):
            raise ConfigError(
                f'{source}: row {number} lacks "prompt" or "video", each a text that is not empty: correct it'
            )
        entries.append(Entry(prompt, video))
    return entries


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
    for prompt, video in read_manifest(folder):
        try:
            found.append(Found(prompt, video, format_of(inside(folder, video))))
        except (VideoError, ConfigError) as error:
            found.append(Found(prompt, video, None, str(error)))
    return found


class FolderTeacher(TeacherBase):
    """Videos of a folder, brought to frames x size at fps. `seed` picks among a prompt's videos.

    Every file is read once at construction, and not kept: unreadable or too short ones and those outside the folder are
    left out and listed in `problems`; prompts without a usable video are gone. ConfigError when nothing is left.
    """

    def __init__(self, folder: str | Path, *, frames: int, size: tuple[int, int], fps: float):
        self.folder = folder = Path(folder)
        self.name, self.fps = f"folder:{folder}", fps
        self._problems: list[str] = []
        self.left_out: dict[str, str] = {}  # the manifest's name of a file -> why
        self.frames, self.size = frames, size
        self._videos: dict[str, list[Path]] = defaultdict(list)
        for prompt, file in read_manifest(folder):
            try:
                path = inside(folder, file)
                check_file(path, frames=frames, size=size, fps=fps)
                self._videos[prompt].append(path)
            except (VideoError, ConfigError) as error:
                self._problems.append(str(error))
                self.left_out[file] = str(error)
        self.prompts = [p for p, videos in self._videos.items() if videos]
        if not self.prompts:
            raise ConfigError(f"{folder}: no usable video. " + "; ".join(self._problems or ["the manifest is empty"]))

    @property
    def problems(self) -> list[str]:
        """Files that were left out, and why."""
        return self._problems

    def seeds(self, prompt: str, wanted: Iterable[int]) -> list[int]:
        """Those of the wanted seeds that have a usable video."""
        return [seed for seed in wanted if seed < len(self._videos[prompt])]

    def file(self, prompt: str, seed: int) -> str:
        """The file of a video, as it is named in the folder."""
        return self._videos[prompt][seed].relative_to(self.folder).as_posix()

    def __call__(self, prompt: str, seed: int) -> Tensor:
        videos = self._videos.get(prompt)
        if not videos:
            raise ConfigError(f"{self.name} has no video for {prompt!r}")
        return read_video(videos[seed % len(videos)], frames=self.frames, size=self.size, fps=self.fps)

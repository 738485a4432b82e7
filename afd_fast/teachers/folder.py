"""A teacher that is a folder of finished videos and a manifest of (prompt, file)."""

import csv
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from afd_fast.errors import ConfigError, VideoError
from afd_fast.teachers.teacher import TeacherBase
from afd_fast.video_io import read_video


def read_manifest(folder: Path) -> list[tuple[str, str]]:
    """(prompt, file) rows of manifest.csv (columns prompt, video) or manifest.jsonl (the same keys)."""
    jsonl, table = folder / "manifest.jsonl", folder / "manifest.csv"
    if jsonl.exists():
        rows = [json.loads(line) for line in jsonl.read_text().splitlines() if line.strip()]
        source = jsonl
    elif table.exists():
        with table.open(newline="") as file:
            rows = list(csv.DictReader(file))
        source = table
    else:
        raise ConfigError(f'{folder} holds neither manifest.csv nor manifest.jsonl (columns "prompt" and "video")')
    for number, row in enumerate(rows, 1):
        if not row.get("prompt") or not row.get("video"):
            raise ConfigError(f'{source}: row {number} lacks "prompt" or "video"')
    return [(row["prompt"], row["video"]) for row in rows]


class FolderTeacher(TeacherBase):
    """Videos of a folder, brought to frames x size at fps. `seed` picks among a prompt's videos.

    Every file is read once at construction, and not kept: unreadable or too short ones are left out and listed in
    `problems`; prompts without a usable video are gone. ConfigError when nothing is left.
    """

    def __init__(self, folder: str | Path, *, frames: int, size: tuple[int, int], fps: float):
        folder = Path(folder)
        self.name, self.fps = f"folder:{folder}", fps
        self._problems: list[str] = []
        self.frames, self.size = frames, size
        self._videos: dict[str, list[Path]] = defaultdict(list)
        for prompt, file in read_manifest(folder):
            try:
                self._read(folder / file)
                self._videos[prompt].append(folder / file)
            except VideoError as error:
                self._problems.append(str(error))
        self.prompts = [p for p, videos in self._videos.items() if videos]
        if not self.prompts:
            raise ConfigError(f"{folder}: no usable video. " + "; ".join(self._problems or ["the manifest is empty"]))

    def _read(self, path: Path) -> Tensor:
        return read_video(path, frames=self.frames, size=self.size, fps=self.fps)

    @property
    def problems(self) -> list[str]:
        """Files that were left out, and why."""
        return self._problems

    def seeds(self, prompt: str, wanted: Iterable[int]) -> list[int]:
        """Those of the wanted seeds that have a usable video."""
        return [seed for seed in wanted if seed < len(self._videos[prompt])]

    def __call__(self, prompt: str, seed: int) -> Tensor:
        videos = self._videos.get(prompt)
        if not videos:
            raise ConfigError(f"{self.name} has no video for {prompt!r}")
        return self._read(videos[seed % len(videos)])

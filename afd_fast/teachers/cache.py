"""An on-disk cache in front of any teacher: a video is asked for once, ever."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from torch import Tensor

from afd_fast.errors import VideoError
from afd_fast.files.durable import settle
from afd_fast.teachers.teacher import PromptSplit, Request, Teacher, nothing
from afd_fast.video_io import VideoFormat, checked, read_frames, read_video, write_video


class CachedTeacher:
    """Keeps a teacher's videos as lossless mp4 files named by a hash of (teacher, prompt, seed).

    A file appears under its name only when it is complete; one that cannot be read is asked for again. fit: bring the
    videos to this format when they are read.
    """

    def __init__(self, teacher: Teacher, folder: str | Path, fit: VideoFormat | None = None):
        self.teacher, self.folder, self.fit = teacher, Path(folder), fit
        self.name, self.fps, self.judge = teacher.name, teacher.fps, teacher.judge
        self.hits = self.misses = 0

    def path(self, prompt: str, seed: int) -> Path:
        """Where a video is kept."""
        key = "\0".join((self.teacher.name, prompt, str(seed)))
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.mp4"

    def __call__(self, prompt: str, seed: int) -> Tensor:
        path = self.path(prompt, seed)
        if path.exists():
            try:
                video = self._fitted(path, prompt)
            except VideoError:
                if _readable(path):  # it is whole and does not fit: another one would not either
                    raise
            else:
                self.hits += 1
                return video
        self.misses += 1
        video = checked(self.teacher(prompt, seed), prompt, seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.part")
        with partial.open("wb") as file:
            write_video(file, video, self.teacher.fps, lossless=True)
        settle(partial, path)
        return self._fitted(path, prompt)  # always through the file: the first answer equals every later one

    def _fitted(self, path: Path, prompt: str) -> Tensor:
        """The file's video in the wanted format. VideoError that names the prompt where it is too short."""
        if self.fit is None:
            return read_video(path)
        try:
            return read_video(path, frames=self.fit.frames, size=(self.fit.height, self.fit.width), fps=self.fit.fps)
        except VideoError as error:
            raise VideoError(
                f"the teacher {self.name!r} gave a video of {prompt!r} that does not fit: {error}"
            ) from error

    def fetch(self, requests: Sequence[Request], done: Callable[[], None] = nothing) -> None:
        """Ask for every video that is not in the folder, one by one."""
        for prompt, seed in requests:
            if not self.path(prompt, seed).exists():
                self(prompt, seed)
            done()

    def split(self) -> PromptSplit:
        return self.teacher.split()

    def seeds(self, prompt: str, wanted: Iterable[int]) -> list[int]:
        return self.teacher.seeds(prompt, wanted)

    def weight(self, prompt: str, seed: int) -> float:
        return self.teacher.weight(prompt, seed)

    def file(self, prompt: str, seed: int) -> str:
        return self.path(prompt, seed).name

    def familiar(self, prompts: Sequence[str]) -> list[str]:
        return self.teacher.familiar(prompts)

    @property
    def problems(self) -> list[str]:
        return self.teacher.problems

    def cost(self, requests: Sequence[Request]) -> str:
        return self.teacher.cost(requests)


def _readable(path: Path) -> bool:
    """Whether the file holds a whole video."""
    try:
        for _ in read_frames(path):
            pass
    except VideoError:
        return False
    return True

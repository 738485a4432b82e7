"""An on-disk cache in front of any teacher: a video is asked for once, ever."""

import hashlib
import os
from pathlib import Path

from torch import Tensor

from afd_fast.errors import VideoError
from afd_fast.teachers import Teacher
from afd_fast.video_io import read_video, write_video


class CachedTeacher:
    """Keeps a teacher's videos as lossless mp4 files named by a hash of (teacher, prompt, seed).

    A file appears under its name only when it is complete; one that cannot be read is asked for again.
    """

    def __init__(self, teacher: Teacher, folder: str | Path):
        self.teacher, self.folder = teacher, Path(folder)
        self.name, self.fps = teacher.name, teacher.fps
        self.hits = self.misses = 0
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, prompt: str, seed: int) -> Path:
        """Where a video is kept."""
        key = "\0".join((self.teacher.name, prompt, str(seed)))
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.mp4"

    def __call__(self, prompt: str, seed: int) -> Tensor:
        path = self.path(prompt, seed)
        if path.exists():
            try:
                video = read_video(path)
                self.hits += 1
                return video
            except VideoError:
                path.unlink()
        self.misses += 1
        partial = path.with_suffix(f".{os.getpid()}.part")
        with partial.open("wb") as file:
            write_video(file, self.teacher(prompt, seed), self.fps, lossless=True)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        return read_video(path)  # always through the file: the first answer equals every later one

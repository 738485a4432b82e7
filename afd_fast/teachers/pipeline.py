"""A teacher that is a diffusers pipeline, and any teacher written out as a folder of videos.

Legend: F frames, H x W pixels.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afd_fast.errors import ConfigError
from afd_fast.teachers.folder import Entry, read_manifest, write_manifest
from afd_fast.teachers.teacher import TeacherBase, nothing
from afd_fast.video_io import checked, write_video


class PipelineTeacher(TeacherBase):
    """Any diffusers pipeline whose output has `.frames` (WanPipeline, HunyuanVideoPipeline, LTXPipeline ...).

    fps: of its videos, for the files. arguments: passed to every call (num_frames=, height=, guidance_scale= ...). The
    pipeline is used on the device it is on; one generator per video, so a seed is a video.
    """

    def __init__(self, pipeline: Any, *, fps: float, prompts: Sequence[str] = (), **arguments: Any):
        self.pipeline, self.fps, self.arguments, self.prompts = pipeline, fps, arguments, list(prompts)
        self.name = f"pipeline:{pipeline.config.get('_name_or_path') or type(pipeline).__name__}"

    @torch.no_grad()
    def __call__(self, prompt: str, seed: int) -> Tensor:
        """[3, F, H, W] in [0, 1]. VideoError for anything else, such as the NaN of a half-precision overflow."""
        generator = torch.Generator(self.pipeline.device).manual_seed(seed)
        frames = self.pipeline(prompt=prompt, generator=generator, output_type="pt", **self.arguments).frames[0]
        return checked(frames.float().cpu().transpose(0, 1), prompt, seed)  # [F, 3, H, W] before


def write_folder(
    teacher: Callable[[str, int], Tensor], prompts: list[str], folder: str | Path, *, fps: float, per_prompt: int = 1,
    crf: int = 12, done: Callable[[], None] = nothing,
) -> Path:  # fmt: skip
    """Ask any callable (prompt, seed) -> [3, F, H, W] in [0, 1] for seeds 0 .. per_prompt - 1 of every prompt and write
    mp4 files and manifest.csv: what `afd-fast distill --videos` and `teacher=folder:PATH` take. Files that are there are
    kept, so it can be stopped and started again; done() after each. Run it before training: teacher and student then never share a GPU.
    ConfigError without prompts, and for a folder with another manifest; VideoError that names prompt and seed for a video
    with NaN or values outside [0, 1], before its file is written."""
    folder, prompts = Path(folder), list(dict.fromkeys(prompts))
    if not prompts:
        raise ConfigError("no prompts to ask the teacher for")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(p, f"{i:05d}-{seed}.mp4", seed) for i, p in enumerate(prompts) for seed in range(per_prompt)]
    manifest, known = folder / "manifest.csv", dict[str, Entry]()
    if manifest.exists():
        known = {entry.video: entry for entry in read_manifest(folder)}
        if any(known.get(name, Entry(prompt, name)).prompt != prompt for prompt, name, _ in rows):
            raise ConfigError(f"{manifest} names other prompts: choose another folder")
    write_manifest(folder, [known.get(name, Entry(prompt, name)) for prompt, name, _ in rows])
    for prompt, name, seed in rows:
        if not (folder / name).exists():
            video, partial = checked(teacher(prompt, seed), prompt, seed), folder / f"{name}.{os.getpid()}.part"
            write_video(partial, video, fps, crf=crf)
            partial.replace(folder / name)
        done()
    return folder

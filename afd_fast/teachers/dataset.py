"""The finished teacher videos a run works with: asked for once, split into training and held-out prompts.

Legend: P prompts, M videos a prompt, F frames, H x W pixels.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from afd_fast.config import TrainConfig
from afd_fast.errors import ConfigError
from afd_fast.teachers import Teacher, api, physics
from afd_fast.teachers.cache import CachedTeacher
from afd_fast.teachers.folder import FolderTeacher
from afd_fast.training.state import System
from afd_fast.video_io import deliver, to_uint8

Track = Callable[[Iterable, str], Iterable]  # rich.progress.track-like: (iterable, description)
REFERENCE_SEEDS, TEACHER_ROW_SEEDS = 10_000, 20_000  # apart from the training clips' 0, 1, 2 ...


@dataclass
class Shard:
    """A part of an iteration's batch: b rows grouped by prompt, with random numbers of its own (`index`)."""

    index: int
    prompts: list[str]
    teacher: Tensor  # [b, 3, F, H, W] in [0, 1]


@dataclass
class TeacherVideos:
    """Videos as uint8, by prompt; what the training loop and the judge draw from."""

    teacher: Teacher
    train_prompts: list[str]
    held_out: list[str]
    codec_crf: int | None
    videos: dict[str, Tensor] = field(default_factory=dict)  # prompt -> [M, 3, F, H, W] uint8, through the door
    problems: list[str] = field(default_factory=list)

    @property
    def judged(self) -> bool:
        """Whether the physics judge can score this teacher's prompts."""
        return isinstance(getattr(self.teacher, "teacher", self.teacher), physics.PhysicsTeacher)

    @property
    def first_held_out(self) -> list[str]:
        """The held-out prompts of the world the base student knows, where this teacher shows it in another look: what the
        student forgets is measured on them."""
        if not self.judged or physics.parse(self.held_out[0]).look == "day":
            return []
        return [p.rpartition(", ")[0] for p in self.held_out]

    def clips(self, prompts: list[str], seeds: Iterable[int]) -> Tensor:
        """Videos [B, 3, F, H, W] in [0, 1] for (prompt, seed) pairs, through the same door as the student's."""
        return deliver(torch.stack([self.teacher(p, s) for p, s in zip(prompts, seeds)]), self.codec_crf)

    def batch(self, config: TrainConfig, step: int, shards: Iterable[int]) -> list[Shard]:
        """The named shards of iteration `step`: K rows for each of P prompts, a random teacher video for each row.
        A function of (seed, step)."""
        rng = np.random.default_rng([config.seed, step])
        count = min(config.prompts_per_step, len(self.train_prompts))
        chosen = [self.train_prompts[i] for i in rng.permutation(len(self.train_prompts))[:count]]
        prompts = [p for p in chosen for _ in range(config.rollouts_per_prompt)]
        picks = [rng.integers(len(self.videos[p])) for p in prompts]
        if count % config.shards:
            raise ConfigError(f"{count} training prompts cannot be split into shards={config.shards}")
        rows = len(prompts) // config.shards
        parts = []
        for index in shards:
            mine = range(index * rows, (index + 1) * rows)
            videos = torch.stack([self.videos[prompts[i]][picks[i]] for i in mine]).float() / 255
            parts.append(Shard(index, [prompts[i] for i in mine], videos))
        return parts


def open_teacher(
    config: TrainConfig, system: System, cache: Path, track: Track
) -> tuple[Teacher, list[str], list[str], list[str]]:
    """ "physics", "physics:dusk", "folder:PATH" or "api:FILE" -> (teacher, training prompts, held-out prompts, problems)."""
    spec = config.teacher
    kind, _, path = spec.partition(":")
    if kind == "physics" and path in ("", *physics.LOOKS):
        teacher = CachedTeacher(physics.PhysicsTeacher(system.video[0]), cache)
        return teacher, *physics.split_prompts(look=path or "day"), []
    if kind not in ("folder", "api") or not path:
        raise ConfigError(f'teacher must be "physics" or "folder:PATH" or "api:FILE", got {spec!r}')
    fit = {"frames": system.video[0], "size": system.video[1:], "fps": system.fps}
    if kind == "folder":
        teacher = FolderTeacher(path, **fit)
        return teacher, *hold_out(teacher.prompts), teacher.problems
    teacher = api.from_file(path, **fit)
    pairs = [(p, seed) for p in teacher.prompts for seed in range(config.teacher_clips)]
    ticks = iter(track(pairs, "teacher API"))
    teacher.fetch(pairs, lambda: next(ticks, None))
    list(ticks)  # to the end of the bar
    return (
        teacher,
        *hold_out([p for p in teacher.prompts if teacher.seeds(p, range(config.teacher_clips))]),
        teacher.problems(),
    )


def hold_out(prompts: list[str]) -> tuple[list[str], list[str]]:
    """(training, held-out) prompts: the last eighth is held out; of a single prompt, none."""
    held = max(1, len(prompts) // 8) if len(prompts) > 1 else 0
    train = prompts[: len(prompts) - held]
    return train, prompts[len(train) :] or train


def collect(config: TrainConfig, system: System, cache: Path, track: Track) -> TeacherVideos:
    """Ask the teacher for every video of the run before training starts. ConfigError without prompts."""
    teacher, train, held_out, problems = open_teacher(config, system, cache, track)
    if not train:
        raise ConfigError(f"{config.teacher} has no training prompt")
    data = TeacherVideos(teacher, train, held_out, config.codec_crf, problems=problems)
    for prompt in track(list(dict.fromkeys(train + held_out)), "teacher videos"):
        seeds = range(config.teacher_clips)
        seeds = teacher.seeds(prompt, seeds) if hasattr(teacher, "seeds") else seeds
        data.videos[prompt] = to_uint8(data.clips([prompt] * len(seeds), seeds))
    return data

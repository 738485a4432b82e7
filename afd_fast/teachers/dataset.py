"""The finished teacher videos a run works with: asked for once, split into training and held-out prompts.

Legend: P prompts, K rollouts per prompt, M videos per prompt, F frames, H x W pixels.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from afd_fast.errors import ConfigError, some
from afd_fast.teachers import lights, mixed, physics
from afd_fast.teachers.folder import FolderTeacher
from afd_fast.teachers.teacher import TEACHERS, PromptSplit, Request, Teacher, hold_out
from afd_fast.video_io import VideoFormat, checked, deliver, to_uint8

Track = Callable[[Sequence, str], Iterable]  # like rich.progress.track: (items, description) -> the items


@dataclass(frozen=True)
class BatchPlan:
    """How an iteration's prompts are drawn: `prompts` of them, K `rollouts` each, in `shards` equal parts."""

    seed: int
    prompts: int
    rollouts: int
    shards: int


def shown(pixels: Tensor, device: torch.device | str) -> Tensor:
    """Pixels on a device, uint8 as float32 in [0, 1]."""
    pixels = pixels.to(device, non_blocking=pixels.is_pinned())
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels


@dataclass
class Shard:
    """A part of an iteration's batch: b rows grouped by prompt, with its own random numbers (`index`)."""

    index: int
    prompts: list[str]
    pixels: Tensor  # of the teacher's videos [b, 3, F, H, W], uint8 (or floats in [0, 1])
    picks: list[int] = field(default_factory=list)  # which of its prompt's videos each row's teacher video is

    def teacher(self, device: torch.device | str) -> Tensor:
        """The teacher's videos [b, 3, F, H, W] in [0, 1] on a device; a quarter of the bytes goes there."""
        return shown(self.pixels, device)

    @property
    def keys(self) -> list[Request]:
        """What identifies each row's teacher video."""
        return [Request(prompt, pick) for prompt, pick in zip(self.prompts, self.picks)]


@dataclass
class TeacherVideos:
    """Videos as uint8, by prompt; what the training loop and the judge draw from."""

    teacher: Teacher
    train_prompts: list[str]
    held_out: list[str]
    codec_crf: int | None
    videos: dict[str, Tensor] = field(default_factory=dict)  # prompt -> [M, 3, F, H, W] uint8, through the door
    weights: dict[str, list[float]] = field(default_factory=dict)  # prompt -> [M] in (0, 1]; none: ones
    names: dict[str, list[str]] = field(default_factory=dict)  # prompt -> [M] files of the teacher, or seeds in words
    problems: list[str] = field(default_factory=list)

    def clips(self, prompts: Sequence[str], seeds: Iterable[int]) -> Tensor:
        """Videos [B, 3, F, H, W] in [0, 1] for (prompt, seed) pairs, through the same door as the student's."""
        asked = zip(prompts, seeds, strict=True)
        return torch.stack([deliver(checked(self.teacher(p, s), p, s)[None], self.codec_crf)[0] for p, s in asked])

    def picked(self, requests: Iterable[Request]) -> Tensor:
        """Videos [B, 3, F, H, W], uint8, by prompt and number, which goes round among a prompt's M. In pinned memory where there
        is a GPU: the host does not wait for what goes there."""
        clips = [self.videos[p][i % len(self.videos[p])] for p, i in requests]
        first, pinned = clips[0], torch.cuda.is_available()
        out = first.new_empty(len(clips), *first.shape, dtype=first.dtype, pin_memory=pinned)
        return torch.stack(clips, out=out)

    def rounds(self, prompts: Sequence[str], count: int) -> list[Request]:
        """Every prompt `count` times over, each time with the next of its M videos, which go round."""
        return [Request(p, i % len(self.videos[p])) for i in range(count) for p in prompts]

    def _pick(self, prompt: str, rng: np.random.Generator, second: np.random.Generator) -> int:
        """A video's number. The uniform draw stands with the chance weight / largest weight, so that weights of one leave it alone;
        the draw in its place is by weight, which makes both together proportional to the weights."""
        pick = int(rng.integers(len(self.videos[prompt])))
        weights = np.array(self.weights.get(prompt, [1.0] * (pick + 1)))
        if second.random() < weights[pick] / weights.max():
            return pick
        return int(second.choice(len(weights), p=weights / weights.sum()))

    def batch(self, plan: BatchPlan, step: int, shards: Iterable[int]) -> list[Shard]:
        """The named shards of iteration `step`: K rows for each of P prompts, a random teacher video for each row. A video is drawn
        in proportion to its weight among its prompt's, and a prompt to the largest of them. A function of (seed, step)."""
        rng, second = np.random.default_rng([plan.seed, step]), np.random.default_rng([plan.seed, step, 1])
        count = min(plan.prompts, len(self.train_prompts))
        order = [self.train_prompts[i] for i in rng.permutation(len(self.train_prompts))]
        passed = [second.random() < max(self.weights.get(p, (1.0,))) for p in order]
        chosen = [p for kept in (True, False) for p, ok in zip(order, passed) if ok is kept][:count]
        prompts = [p for p in chosen for _ in range(plan.rollouts)]
        picks = [self._pick(p, rng, second) for p in prompts]
        rows, parts = len(prompts) // plan.shards, []
        for index in shards:
            mine = slice(index * rows, (index + 1) * rows)
            pairs = [Request(*pair) for pair in zip(prompts[mine], picks[mine])]
            parts.append(Shard(index, prompts[mine], self.picked(pairs), picks[mine]))
        return parts


def check_prompts(teacher: str, train: Sequence[str], plan: BatchPlan) -> None:
    """ConfigError unless the training prompts of the teacher of this name fill every shard."""
    if not train:
        raise ConfigError(f"{teacher} has no training prompt")
    count = min(plan.prompts, len(train))
    if count % plan.shards:
        raise ConfigError(
            f"{count} training prompts cannot be split into shards={plan.shards}: set shards to a divisor of {count}, or give more prompts"
        )


def prompts_of(teacher: Teacher, count: int | None) -> PromptSplit:
    """A teacher's prompts with only the first `count` training prompts; None: all. ConfigError where it has fewer."""
    train, held_out = teacher.split()
    if count is not None and count > len(train):
        raise ConfigError(
            f"teacher_prompts={count} asks for more than the {len(train)} training prompts of {teacher.name}"
        )
    return PromptSplit(train[:count], held_out)


def open_teacher(spec: str, video: VideoFormat, cache: Path) -> Teacher:
    """ "physics", "physics:dusk", "lights", "folder:PATH", "api:FILE" or a registered "KIND:..." for videos of this format, or several
    as `mixed.parse` takes them. Nothing is fetched or paid for. ConfigError for another spec and for a teacher without usable videos or
    prompts."""
    if (shares := mixed.parse(spec)) is not None:
        return mixed.MixedTeacher({one: open_teacher(one, video, cache) for one in shares}, shares)
    kind, _, rest = spec.partition(":")
    if kind in TEACHERS:
        return TEACHERS[kind](rest, video, cache)
    size = (video.height, video.width)
    if kind == "physics" and rest in ("", *physics.LOOKS):
        _check_format(spec, physics.SIZE, video, "student=toy")
        return physics.PhysicsTeacher(video.frames, look=rest or "day")  # makes a video faster than a file is read
    if spec == "lights":
        _check_format(spec, lights.SIZE, video, "student=lights, as the run regime does")
        return lights.LightsTeacher(video.frames)
    if kind == "folder" and rest:
        return FolderTeacher(rest, frames=video.frames, size=size, fps=video.fps)
    if kind == "api" and rest:
        from afd_fast.teachers import api  # httpx takes a tenth of the command's start

        return api.from_file(rest, frames=video.frames, size=size, fps=video.fps)
    known = "".join(f' or "{name}:..."' for name in TEACHERS)
    raise ConfigError(f'teacher must be "physics" or "lights" or "folder:PATH" or "api:FILE"{known}, got {spec!r}')


def _check_format(spec: str, side: int, video: VideoFormat, remedy: str) -> None:
    """ConfigError for a student whose videos are not an embedded teacher's squares, or too short for its judge."""
    if (video.height, video.width) != (side, side):
        raise ConfigError(
            f"teacher={spec} makes videos of {side}x{side} pixels, and this student of {video.height}x{video.width}: set {remedy}"
        )
    if video.frames < physics.LEAST_FRAMES:
        raise ConfigError(
            f"teacher={spec} is judged on clips of {physics.LEAST_FRAMES} frames or more, and this student makes {video.frames}: "
            "give another student.base"
        )


def collect(
    teacher: Teacher, clips: int, codec_crf: int | None, track: Track, train_prompts: int | None = None, *,
    fetch: bool = True,
) -> TeacherVideos:  # fmt: skip
    """Ask for `clips` videos of every prompt before training starts. ConfigError without training prompts.
    train_prompts: as of `prompts_of`. fetch: False for the videos that are there, so that nothing is bought."""
    train, held_out = prompts_of(teacher, train_prompts)
    prompts = list(dict.fromkeys(train + held_out))
    if fetch:
        requests = [Request(p, seed) for p in prompts for seed in range(clips)]
        ticks = iter(track(requests, "fetching teacher videos"))
        teacher.fetch(requests, lambda: next(ticks, None))
        for _ in ticks:  # to the end of the bar
            pass
    seeds = {p: teacher.seeds(p, range(clips)) for p in prompts}  # of an API some videos may be refused
    train, held_out = [p for p in train if seeds[p]], [p for p in held_out if seeds[p]]
    if not held_out:
        train, held_out = hold_out(train)
    if not train:
        raise ConfigError(f"{teacher.name} has no training prompt with a video. " + some(teacher.problems))
    data = TeacherVideos(teacher, train, held_out, codec_crf, problems=list(teacher.problems))
    for prompt in track(list(dict.fromkeys(train + held_out)), "reading teacher videos"):
        data.videos[prompt] = torch.stack([to_uint8(data.clips([prompt], [seed])[0]) for seed in seeds[prompt]])
        data.names[prompt] = [teacher.file(prompt, seed) or f"seed {seed}" for seed in seeds[prompt]]
        data.weights[prompt] = [teacher.weight(prompt, seed) for seed in seeds[prompt]]
    return data

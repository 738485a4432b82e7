"""Prompts to videos: text, rollout chunk by chunk, decode, write; with times that say what they count.

Legend: B videos made together, F latent frames (4 F - 3 frames of video), H x W latent pixels.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from afd_fast.errors import ConfigError, check_at_least, check_fields
from afd_fast.rollout import RolloutConfig, config_of, stream
from afd_fast.students.wan.experts import TwoExperts
from afd_fast.students.wan.family import KnownPrompts, Networks
from afd_fast.students.wan.model import CausalWan
from afd_fast.students.wan.text import NEGATIVE_PROMPT
from afd_fast.students.wan.vae import WanDecoder
from afd_fast.video_io import checked, write_video

Moment: TypeAlias = Any  # seconds on the CPU, a CUDA event on a GPU


@dataclass
class GenerateStats:
    """What was made and how long it took; seconds. Text encoding and mp4 writing are in neither figure."""

    videos: int = 0
    frames: int = 0  # of video, all videos together
    dit_seconds: float = 0.0  # the student
    video_seconds: float = 0.0  # student and VAE, overlapped on CUDA
    first_chunk_seconds: list[float] = field(default_factory=list)  # a batch's start to its first chunk in pixels
    overlapped: bool = False  # whether the VAE worked on the same GPU during dit_seconds, which it lengthens

    def line(self) -> str:
        """The summary for a terminal: each figure with what it counts."""
        if not self.videos:
            return "no videos"
        latency = sum(self.first_chunk_seconds) / len(self.first_chunk_seconds)
        dit = "DiT, the VAE beside it," if self.overlapped else "DiT only"
        return (
            f"{self.videos} video{'s' * (self.videos != 1)}, {self.frames} frames: {dit} {self.frames / self.dit_seconds:.2f} FPS, "
            f"with VAE {self.frames / self.video_seconds:.2f} FPS, first chunk after {latency:.2f} s "
            "(frames of video per second over all videos; text encoding and mp4 writing not counted)"
        )


class _Clock:
    """Time on the device's main stream: CUDA events there, the wall clock elsewhere."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def now(self) -> Moment:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Moment, end: Moment) -> float:
        if isinstance(start, float) or isinstance(end, float):
            return float(end) - float(start)
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def file_name(index: int, prompt: str) -> str:
    """`0003-a-red-ball-rolls.mp4`: the prompt's place in the list and its first words."""
    words = re.findall(r"[a-z0-9]+", prompt.lower())[:6]
    return f"{index:04d}-{'-'.join(words)[:60] or 'video'}.mp4"


@dataclass(frozen=True)
class Job:
    """One video to make: its prompt, file name and the seed of its noise."""

    prompt: str
    name: str
    seed: int


def jobs(prompts: Sequence[str], seed: int = 0, seeds: Sequence[int] | None = None) -> list[Job]:
    """A job per prompt: `file_name`, and seed + i for prompt i; with `seeds` one per prompt and seed, which ends the name.
    Empty prompts are left out; ConfigError without any."""
    kept = [p.strip() for p in prompts if p.strip()]
    if not kept:
        raise ConfigError("no prompts")
    if seeds is not None:
        named = [(p, file_name(i, p)[:-4]) for i, p in enumerate(kept)]
        return [Job(prompt, f"{name}-{s}.mp4", s) for prompt, name in named for s in seeds]
    return [Job(prompt, file_name(i, prompt), seed + i) for i, prompt in enumerate(kept)]


@dataclass(frozen=True)
class GenerateOptions:
    """Size of the videos and of the batches. frames, height, width: of the latents; 21, 60, 104 are 81 frames of
    480 x 832. fps: of the files. batch: videos made together; a video depends on its own seed, not on its batch."""

    frames: int = 21
    height: int = 60
    width: int = 104
    fps: float = 16.0
    batch: int = 1

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, 1, "frames", "height", "width", "batch")
        if self.fps <= 0:
            raise ConfigError(f"fps must be a positive number, got {self.fps}")


Write = Callable[[Path, Tensor, float], None]  # (path, pixels [3, frames, H, W] in [0, 1], fps) writes a file


def generate(
    networks: Networks,
    todo: Sequence[Job],
    out_dir: str | Path,
    options: GenerateOptions = GenerateOptions(),
    config: RolloutConfig | None = None,
    *,
    negative: str = NEGATIVE_PROMPT,
    write: Write = write_video,
    progress: Callable[[int, int], None] | None = None,
) -> GenerateStats:
    """Make one mp4 per job in out_dir.

    Args:
        networks: student, text encoder and VAE (`students.wan.family.load_networks`).
        config: how to sample; None: as the student's checkpoint says.
        negative: the prompt of config.guidance; Wan's own by default.
        progress: called with (chunks done, chunks of all videos' batches).

    Raises ConfigError for frames that do not fill the chunks and for prompts that are too long, before anything is made,
    VideoError that names prompt and seed for a video with NaN, and what the student raises.
    """
    config, vae = config_of(networks.student, config), networks.vae
    check_decoder(config, isinstance(vae, WanDecoder))
    chunks_each, out_dir = chunk_count(options.frames, config), Path(out_dir)
    student, stats, done = networks.student, GenerateStats(), 0
    parts = [todo[first : first + options.batch] for first in range(0, len(todo), options.batch)]
    encode = KnownPrompts(networks.text, student.device)
    against: Any = None
    if config.guidance is not None:
        with torch.no_grad():
            against = student.encode_text(encode([negative]))
    for part in parts:  # a prompt that the encoder refuses is found before hours of work
        encode([job.prompt for job in part])
    clock = _Clock(student.device)
    side = torch.cuda.Stream(student.device) if clock.cuda else None
    stats.overlapped = side is not None
    pixels: list[Tensor] = []  # of the batch's chunks so far

    def first_frame(latents: Tensor) -> Tensor:
        assert isinstance(vae, WanDecoder)
        with _on(side):
            found = vae.reencode(latents, pixels[-1])
        if side is not None:
            torch.cuda.current_stream().wait_stream(side)
            found.record_stream(torch.cuda.current_stream())
        return found

    for part in parts:
        with torch.no_grad():
            text = student.encode_text(encode([job.prompt for job in part]))
        generators = [torch.Generator(student.device).manual_seed(job.seed) for job in part]
        noise = _noise(student, generators, options)
        decoder = vae.stream()
        pixels.clear()
        begin = mark = clock.now()
        latency: Moment | None = None
        chunks = stream(
            student, text, noise, config, generator=generators, negative=against,
            first_frame=first_frame if config.reencodes else None,
        )  # fmt: skip
        for latents in _counted(chunks, stats, clock):
            with _on(side):
                if side is not None:
                    latents.record_stream(side)
                pixels.append(decoder(latents))
                mark = clock.now()
            latency = latency or mark
            done += 1
            if progress is not None:
                progress(done, len(parts) * chunks_each)
        stats.video_seconds += clock.between(begin, mark)
        stats.first_chunk_seconds.append(clock.between(begin, latency or mark))
        video = torch.cat(pixels, 2)
        stats.videos += len(part)
        stats.frames += len(part) * video.shape[2]
        out_dir.mkdir(parents=True, exist_ok=True)  # not before there is something for it
        for job, one in zip(part, video, strict=True):
            write(out_dir / job.name, checked(one, job.prompt, job.seed), options.fps)
    return stats


def _noise(student: CausalWan | TwoExperts, generators: Sequence[torch.Generator], options: GenerateOptions) -> Tensor:
    """Initial noise [B, C, F, H, W], sample b from generator b, drawn as [F, C, H, W]: the official layout, in which a
    seed is the official video (Self-Forcing `inference.py:161` at 33593df)."""
    shape = (options.frames, student.config.in_dim, options.height, options.width)
    rows = [torch.randn(shape, generator=g, device=student.device, dtype=student.dtype) for g in generators]
    return torch.stack(rows).transpose(1, 2).contiguous()


def check_decoder(config: RolloutConfig, whole: bool) -> None:
    """ConfigError for a rollout that needs the VAE's encoder where there is only a preview decoder (not `whole`)."""
    if config.reencodes and not whole:
        raise ConfigError(
            "recompute encodes a frame of video anew, which a preview decoder cannot: leave out the preview"
        )


def filling(frames: int, config: RolloutConfig) -> int:
    """The most latent frames up to `frames` that fill chunks, one chunk at least."""
    first = int(config.independent_first_frame)
    return first + max((frames - first) // config.chunk, 1) * config.chunk


def chunk_count(frames: int, config: RolloutConfig) -> int:
    """Chunks of a rollout of `frames` latent frames. ConfigError where they do not divide."""
    first, few = int(config.independent_first_frame), filling(frames, config)
    if (frames - first) % config.chunk or frames < first:
        raise ConfigError(
            f"{frames} latent frames do not divide into chunks of {config.chunk}{' after the first frame' if first else ''}: "
            f"{few} or {few + config.chunk} do"
        )
    return first + (frames - first) // config.chunk


def _on(side: torch.cuda.Stream | None) -> AbstractContextManager[Any]:
    """Run on the side stream, after what is on the main one so far; without one, here."""
    if side is None:
        return contextlib.nullcontext()
    side.wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(side)


def _counted(chunks: Iterator[Tensor], stats: GenerateStats, clock: _Clock) -> Iterator[Tensor]:
    """Pass chunks on; their own time, measured around each, is added to dit_seconds at the end."""
    spans = []
    iterator = iter(chunks)
    while True:
        start = clock.now()
        try:
            latents = next(iterator)
        except StopIteration:
            break
        spans.append((start, clock.now()))
        yield latents
    stats.dit_seconds += sum(clock.between(*span) for span in spans)

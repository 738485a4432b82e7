"""Prompts to videos: text, rollout chunk by chunk, decode, write; with times that say what they count.

Legend: B videos made together, F latent frames (4 F - 3 frames of video), H x W latent pixels.
"""

import contextlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from afd_fast.rollout import RolloutConfig, stream


@dataclass
class GenerateStats:
    """What was made and how long it took; seconds. Text encoding and mp4 writing are in neither figure."""

    videos: int = 0
    frames: int = 0  # of video, all videos together
    dit_seconds: float = 0.0  # the student alone
    video_seconds: float = 0.0  # student and VAE, overlapped on CUDA
    first_chunk_seconds: list[float] = field(default_factory=list)  # a batch's start to its first chunk in pixels

    def line(self) -> str:
        """The summary for a terminal: each figure with what it counts."""
        if not self.videos:
            return "no videos"
        latency = sum(self.first_chunk_seconds) / len(self.first_chunk_seconds)
        return (
            f"{self.videos} videos, {self.frames} frames: DiT only {self.frames / self.dit_seconds:.2f} FPS, "
            f"with VAE {self.frames / self.video_seconds:.2f} FPS, first chunk after {latency:.2f} s "
            "(frames of video per second over all videos; text encoding and mp4 writing not counted)"
        )


class _Clock:
    """Time on the device's main stream: CUDA events there, the wall clock elsewhere."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start, end) -> float:
        if not self.cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def file_name(index: int, prompt: str) -> str:
    """`0003-a-red-ball-rolls.mp4`: the prompt's place in the list and its first words."""
    words = re.findall(r"[a-z0-9]+", prompt.lower())[:6]
    return f"{index:04d}-{'-'.join(words)[:60] or 'video'}.mp4"


def generate(
    student,
    prompts: list[str],
    out_dir: str | Path,
    *,
    encode: Callable[[list[str]], list[Tensor]],
    decode,
    write: Callable[[Path, Tensor, float], None],
    config: RolloutConfig = RolloutConfig(),
    frames: int = 21,
    height: int = 60,
    width: int = 104,
    batch: int = 1,
    seed: int = 0,
    fps: float = 16.0,
    names: list[str] | None = None,
    seeds: list[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GenerateStats:
    """Make one mp4 per prompt in out_dir.

    Args:
        student: a CausalWan. encode: prompts to embeddings (`models.text.TextEncoder`). decode: a
            `models.vae.WanDecoder`. write: (path, pixels [3, frames, H, W] in [0, 1], fps) writes a file.
        frames, height, width: of the latents; 21, 60, 104 are 81 frames of 480 x 832.
        batch: prompts generated together. seed: video i is drawn from seed + i, whatever the batch.
        names, seeds: each video's file name and seed, where `file_name` and seed + i are not wanted.
        progress: called with (chunks done, chunks of all videos' batches).

    Raises ValueError for empty prompts, and what the student raises for sizes.
    """
    prompts = [p.strip() for p in prompts if p.strip()]
    if not prompts:
        raise ValueError("no prompts")
    names = names or [file_name(i, prompt) for i, prompt in enumerate(prompts)]
    seeds = seeds or [seed + i for i in range(len(prompts))]
    if not len(names) == len(seeds) == len(prompts):
        raise ValueError(f"{len(prompts)} prompts, {len(names)} names, {len(seeds)} seeds")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    clock, stats = _Clock(student.device), GenerateStats()
    side = torch.cuda.Stream(student.device) if clock.cuda else None
    batches = [range(i, min(i + batch, len(prompts))) for i in range(0, len(prompts), batch)]
    done, total = 0, None
    for indices in batches:
        with torch.no_grad():
            text = student.encode_text(encode([prompts[i] for i in indices]))
        generators = [torch.Generator(student.device).manual_seed(seeds[i]) for i in indices]
        shape = (student.config.in_dim, frames, height, width)
        options = {"device": student.device, "dtype": student.dtype}
        noise = torch.stack([torch.randn(shape, generator=g, **options) for g in generators])
        decoder, pixels = decode.stream(), []
        begin = mark = first = clock.now()
        for number, latents in enumerate(
            _counted(stream(student, text, noise, config, generator=generators), stats, clock)
        ):
            with _on(side):
                if side is not None:
                    latents.record_stream(side)
                pixels.append(decoder(latents))
                mark = clock.now()
            first = mark if number == 0 else first
            done += 1
            if progress is not None:
                total = total or len(batches) * _chunks(frames, config)
                progress(done, total)
        stats.video_seconds += clock.between(begin, mark)
        stats.first_chunk_seconds.append(clock.between(begin, first))
        video = torch.cat(pixels, 2)
        stats.videos += len(indices)
        stats.frames += len(indices) * video.shape[2]
        for i, one in zip(indices, video):
            write(out_dir / names[i], one, fps)
    return stats


def _chunks(frames: int, config: RolloutConfig) -> int:
    first = 1 if config.independent_first_frame else 0
    return first + (frames - first) // config.chunk


def _on(side):
    """Run on the side stream, after what is on the main one so far; without one, here."""
    if side is None:
        return contextlib.nullcontext()
    side.wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(side)


def _counted(chunks, stats: GenerateStats, clock: _Clock):
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


class HashText:
    """Random embeddings that depend on the prompt alone: stands in for UMT5 where there are no weights."""

    def __init__(self, text_dim: int, text_len: int):
        self.text_dim, self.text_len = text_dim, text_len

    def __call__(self, prompts: list[str]) -> list[Tensor]:
        import zlib

        rows = []
        for prompt in prompts:
            g = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
            rows.append(torch.randn(min(self.text_len, len(prompt.split()) + 1), self.text_dim, generator=g))
        return rows


def load_networks(student: str, base: str, seed: int = 0):
    """(student, encode, decode) on the GPU where there is one: `tiny(seed)` for "tiny", else the checkpoint `student` in
    bfloat16 with the text encoder and VAE of the diffusers repository `base`."""
    if student == "tiny":
        return tiny(seed)
    from afd_fast.students import load_student
    from afd_fast.students.wan.text import TextEncoder
    from afd_fast.students.wan.vae import WanDecoder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return (
        load_student(student, dtype=torch.bfloat16, device=device),
        TextEncoder.from_pretrained(base, device=device),
        WanDecoder.from_pretrained(base, device=device),
    )


def tiny(seed: int = 0):
    """(student, encode, decode) with random weights, for trying the command without a GPU or a download.

    Use latents of 6 x 10 or so: 48 x 80 pixels. Needs diffusers for the VAE's architecture.
    """
    from diffusers import AutoencoderKLWan

    from afd_fast.students import CausalWan, CausalWanConfig
    from afd_fast.students.wan.vae import WanDecoder

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = CausalWan(CausalWanConfig.tiny()).eval()
        vae = AutoencoderKLWan(base_dim=4, num_res_blocks=1)
    return student, HashText(student.config.text_dim, student.config.text_len), WanDecoder(vae)

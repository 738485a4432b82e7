"""The type that flows through an iteration, and the first phases that fill it in: sampling, decoding, scoring.

Streaming is an argument of sampling: with `active` frames of a longer rollout, a prefix is rolled out once per prompt,
its K continuations share it, and each of their clips is decoded, judged and given its r. Memory does not grow
with the stream beyond its latents: the cache holds a window, the decoder one clip.

Legend: P prompts, K rollouts per prompt, b = K rows per prompt of a shard, A active clips of f latent frames (A = 1
without streaming), F0 frames of the prefix, C channels, F frames, H x W pixels.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afd_fast.discriminators.discriminator import Clips, Features
from afd_fast.errors import TrainingError, VideoError
from afd_fast.rollout import rollout
from afd_fast.teachers.dataset import Shard
from afd_fast.training.run import Run
from afd_fast.video_io import deliver


@dataclass
class Rollouts:
    """One shard's rollouts; each phase fills in what it adds. Clip-wise fields are clip by clip: [A * b]."""

    index: int
    prompts: list[str]  # [b], grouped by prompt
    latents: Tensor  # [b, C, F, H, W]
    teacher: Clips  # [A * b] on the discriminator's device
    active: range | None = None  # latent frames that are trained; None: all
    videos: Clips | None = None  # [A * b] finished videos on the discriminator's device, or their features
    scores: Tensor | None = None  # [A * b] D(video, prompt)
    r: Tensor | None = None  # [b, S] optimality per clip of the rollout; 0 in the prefix, which is not trained

    @property
    def clip_prompts(self) -> list[str]:
        """The prompt of every clip: [A * b]."""
        return self.prompts * (len(self.teacher) // len(self.prompts))


def draw_place(run: Run) -> range | None:
    """The active frames of this iteration's stream; None without streaming."""
    stream, length = run.config.stream, run.family.latents.frames
    if stream.frames is None:
        return None
    places = stream.frames // length - stream.active_clips + 1
    start = length * int(torch.randint(places, (), generator=run.generator("place")))
    return range(start, start + length * stream.active_clips)


def sample(run: Run, shard: Shard, active: range | None = None) -> Rollouts:
    """On-policy rollouts of a shard's prompts: by the averaged student where it is the policy (update.v_old=ema)."""
    rng = run.generator("rollout", shard.index)
    average = run.config.update.v_old == "ema"
    teacher = run.teacher_clips(shard)
    if active is None:
        return Rollouts(shard.index, shard.prompts, sample_policy(run, shard.prompts, rng, average), teacher)
    clips = run.config.stream.active_clips
    latents = continuations(run, shard.prompts, rng, active)
    repeated = teacher.repeat(clips, 1, 1, 1, 1) if isinstance(teacher, Tensor) else Features(teacher.clips * clips)
    return Rollouts(shard.index, shard.prompts, latents, repeated, active)


def beside(rng: torch.Generator, device: torch.device) -> torch.Generator:
    """What draws a rollout's noise on the student's device: rng itself on the CPU, elsewhere a generator with a seed drawn
    from rng, so that the rollouts of one rng (a stream's prefix, its continuation, the next prompt's) have noise of their own.
    """
    if device.type == "cpu":
        return rng
    seed = int(torch.randint(2**63 - 1, (), generator=rng))
    return torch.Generator(device).manual_seed(seed)


def sample_policy(
    run: Run,
    prompts: Sequence[str],
    rng: torch.Generator,
    average: bool,
    *,
    frames: int | None = None,
    history: Tensor | None = None,
) -> Tensor:
    """Latents [B, C, F, H, W] of the current student, or of its average; adapters merged meanwhile. frames: other than
    the family's. history: latents [B or 1, C, F0, H, W] that these continue, not in the result."""
    family, student = run.family, run.family.student
    channels, length, height, width = family.latents
    noise = torch.randn(len(prompts), channels, frames or length, height, width, generator=rng, dtype=torch.float32)
    noise = noise.to(next(student.parameters()))
    rng = beside(rng, noise.device)
    weights = run.state.ema.applied(student) if average else contextlib.nullcontext()
    with torch.no_grad(), weights:
        shared = history is not None and len(history) < len(prompts)  # a prefix run once needs its one prompt
        text = student.encode_text(family.text(list(prompts[:1] if shared else prompts)))
        x = rollout(student, text, noise, run.sampler, generator=rng, initial_latent=history)
        return x if history is None else x[:, :, history.shape[2] :]


def continuations(run: Run, prompts: Sequence[str], rng: torch.Generator, active: range) -> Tensor:
    """Latents [b, C, F0 + A f, H, W] of prompts [b], K rows per prompt that are the same up to the active frames."""
    average, k, rows = run.config.update.v_old == "ema", run.config.rollouts_per_prompt, []
    for prompt in prompts[::k]:
        prefix = None
        if active.start:
            prefix = sample_policy(run, [prompt], rng, average, frames=active.start)
        tail = sample_policy(run, [prompt] * k, rng, average, frames=len(active), history=prefix)
        rows.append(tail if prefix is None else torch.cat([prefix.expand(k, -1, -1, -1, -1), tail], 2))
    return torch.cat(rows)


def decode(run: Run, rollouts: Rollouts) -> None:
    """The finished videos of a shard, through the door, on the discriminator's device."""
    active, length = rollouts.active, run.family.latents.frames
    firsts = range(1) if active is None else range(active.start, active.stop, length)
    videos = torch.cat([clip(run, rollouts.latents, first) for first in firsts])
    with torch.no_grad():
        rollouts.videos = run.discriminator.encode(videos.to(run.discriminator_device))


def clip(run: Run, latents: Tensor, first: int = 0) -> Tensor:
    """The finished video [b, 3, F, H, W] of a clip's latent frames from `first` on, as long as a teacher's. The chunk
    before goes through the decoder with them, for its history, and is cut off."""
    family, before = run.family, min(first, run.family.chunk)
    with torch.no_grad():
        pixels = family.vae.decode(latents[:, :, first - before : first + family.latents.frames])
    return delivered(run, pixels[:, :, -family.video.frames :])


def delivered(run: Run, pixels: Tensor) -> Tensor:
    """The student's pixels [b, 3, F, H, W] through the door. TrainingError where they are NaN or infinite."""
    try:
        return deliver(pixels, run.config.codec_crf)
    except VideoError as error:
        raise TrainingError(
            f"iteration {run.state.step}, the student's videos: {error}; the last checkpoint is valid: lower update.lr"
        ) from error


def score(run: Run, rollouts: Rollouts) -> None:
    """D of every clip, after the discriminator's update."""
    assert rollouts.videos is not None
    with torch.no_grad():
        rollouts.scores = run.discriminator.score(rollouts.videos, rollouts.clip_prompts)

"""Chunk-by-chunk generation with a KV cache: the few-step sampler of Self-Forcing
(`pipeline/causal_inference.py:47-276` at 33593df): predict x0, re-noise to the next step, refresh the cache.

Legend: B samples, C channels, F latent frames, f frames of a chunk, H x W latent pixels.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from afd_fast.errors import ConfigError, check_at_least, check_fields
from afd_fast.reference.flow import shift_sigma
from afd_fast.reference.transformer import split_blocks
from afd_fast.students.lora import merged_lora
from afd_fast.students.student import Cache, Student, StudentModule, Text, batch_of
from afd_fast.students.wan import sampler as presets

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator]  # one, or one per sample


def _check_steps(name: str, steps: tuple[float, ...]) -> None:
    if not steps or any(not 0 < s <= 1000 for s in steps) or any(a <= b for a, b in itertools.pairwise(steps)):
        raise ConfigError(f"{name} must fall from at most 1000 to above 0, got {steps}")


@dataclass(frozen=True)
class RolloutConfig:
    """How to sample.

    steps: denoising steps in 0..1000, falling; a 0 at the end, which some configurations have, is left out.
    shift: of the timestep schedule; 5.0 in Self-Forcing's configs, 8.0 in its demo: explicit on purpose.
    chunk: latent frames generated together.
    context_noise: t of the cache pass, 0..1000 (the frames themselves are not noised, as officially).
    independent_first_frame: the first frame is a chunk by itself.
    first_chunk_steps: other steps for the first chunk (Causal-Forcing++ `denoising_step_list_first_chunk`).
    window: latent frames a chunk attends to; none: all.
    sink: how many of the first frames are always among the window's.
    warp: move the steps along the shifted schedule (750 is 937.5 at shift 5); false: they are on it already (CausVid, Krea).
    fuse_cache_pass: run chunk i's cache pass together with chunk i + 1's first step, one longer forward.
    merge_lora: merge LoRA layers into the weights for the rollout and restore them bit for bit after it.
    graphs: record each forward once as a CUDA graph and replay it in later rollouts of the same shape.
    """

    steps: tuple[float, ...] = (1000, 750, 500, 250)
    shift: float = 5.0
    chunk: int = 3
    context_noise: float = 0.0
    independent_first_frame: bool = False
    first_chunk_steps: tuple[float, ...] | None = None
    window: int | None = None
    sink: int = 0
    warp: bool = True
    fuse_cache_pass: bool = False
    merge_lora: bool = True
    graphs: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("steps", "first_chunk_steps"):
            if (given := getattr(self, name)) and given[-1] == 0:
                object.__setattr__(self, name, given[:-1])
        _check_steps("steps", self.steps)
        if self.first_chunk_steps is not None:
            _check_steps("first_chunk_steps", self.first_chunk_steps)
        if not 0 <= self.context_noise <= 1000:
            raise ConfigError(f"context_noise must lie in 0..1000, got {self.context_noise}")
        if self.shift <= 0:
            raise ConfigError(f"shift must be a positive number, got {self.shift}")
        check_at_least(self, 1, "chunk")
        if self.window is None and self.sink:
            raise ConfigError(f"sink={self.sink} needs a window larger than it: set window")
        if self.window is not None and not 0 <= self.sink < self.window:
            raise ConfigError(f"sink={self.sink} must be at least 0 and below window={self.window}")
        for steps in (self.steps, self.first_chunk_steps or self.steps):
            sigmas = [step.sigma for step in step_table(steps, self.shift, self.warp)]
            if not all(a > b for a, b in itertools.pairwise([*sigmas, 0.0])):
                raise ConfigError(
                    f"shift={self.shift} gives the steps {steps} the noise levels {sigmas}: they must fall and stay above 0; "
                    "set steps to different whole numbers from 1000 to 1, or shift closer to 1"
                )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "RolloutConfig":
        """As a public project samples its students (`students.wan.sampler.PRESETS`), with other settings changed."""
        return cls(**{**presets.preset(name), **changes})

    @classmethod
    def of(cls, sampler: Mapping[str, Any], **changes: Any) -> "RolloutConfig":
        """As a checkpoint says (`student.sampler`; Self-Forcing's where it says nothing), with settings changed. ConfigError
        for settings that are not known here."""
        found = {**sampler, **changes}
        if unknown := sorted(set(found) - {f.name for f in fields(cls)}):
            raise ConfigError(
                f"the checkpoint is to be sampled with {unknown[0]}={found[unknown[0]]!r}, which is not known here"
            )
        return cls(**found)

    def sampler(self) -> dict[str, Any]:
        """The settings that change the result, ready for JSON: what `save_student` keeps with a student."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in presets.HOW_FAST}


class Step(NamedTuple):
    """One denoising step: the network's t in 0..1000, and the noise level sigma in [0, 1]."""

    t: float
    sigma: float


def step_table(steps: tuple[float, ...], shift: float, warp: bool = True) -> list[Step]:
    """Every step on the shifted schedule, both rounded to float32 as in the official table (1000 sigmas; steps are looked
    up by their integer part). Without warp, t is the step and sigma that of the table's nearest time."""
    sigmas = shift_sigma(torch.linspace(1, 0, 1001, dtype=torch.float32)[:-1], shift)
    times = sigmas * 1000
    if not warp:
        nearest = [int((times.double() - step).abs().argmin()) for step in steps]
        return [Step(float(step), float(sigmas[i])) for step, i in zip(steps, nearest)]
    rows = [1000 - int(s) for s in steps]
    return [Step(float(times[i]), float(sigmas[i])) if i < 1000 else Step(0.0, 0.0) for i in rows]


class _Noise:
    """The noise drawn between steps, in the official order and layout ([B * f, C, H, W] per draw).

    From a tensor ([draws, B * f, C, H, W] or [draws, B, C, f, H, W]), from one generator, or from one generator
    per sample, which makes a batch equal to single rollouts.
    """

    def __init__(self, like: Tensor, generator: Generators | None, renoise: Tensor | None):
        if generator is not None and renoise is not None:
            raise ValueError("give generator= or renoise=, not both")
        if isinstance(generator, Sequence) and len(generator) != like.shape[0]:
            raise ValueError(f"{len(generator)} generators for a batch of {like.shape[0]}")
        if renoise is not None and renoise.ndim not in (5, 6):
            raise ValueError(
                f"renoise must be [draws, B*f, C, H, W] or [draws, B, C, f, H, W], got {tuple(renoise.shape)}"
            )
        self.like, self.generator, self.renoise, self.draws = like, generator, renoise, 0

    def draw(self, frames: int) -> Tensor:
        """[B, C, f, H, W]"""
        batch, channels, _, height, width = self.like.shape
        self.draws += 1
        if self.renoise is not None:
            if self.draws > len(self.renoise):
                raise ValueError(f"renoise holds {len(self.renoise)} draws, the rollout needs more")
            noise = self.renoise[self.draws - 1]
            if noise.ndim == 4:
                noise = noise.unflatten(0, (batch, -1)).transpose(1, 2)
            if tuple(noise.shape) != (batch, channels, frames, height, width):
                raise ValueError(
                    f"renoise draw is {tuple(noise.shape)}, want {(batch, channels, frames, height, width)}"
                )
            return noise.to(self.like)
        dtype, device, shape = self.like.dtype, self.like.device, (frames, channels, height, width)
        if isinstance(self.generator, Sequence):
            noise = torch.stack([torch.randn(shape, generator=g, dtype=dtype, device=device) for g in self.generator])
        else:
            noise = torch.randn((batch, *shape), generator=self.generator, dtype=dtype, device=device)
        return noise.transpose(1, 2)


class _Sampler:
    """One rollout: the model, its text, cache and timetables. `denoise` makes a chunk, `refresh` caches it."""

    def __init__(
        self, model: Student, text: Text, noise: Tensor, config: RolloutConfig, frames: int, source: _Noise, grad: bool
    ):
        self.model, self.text, self.config, self.source, self.grad = model, text, config, source, grad
        self.batch = noise.shape[0]
        self.size = (frames, noise.shape[3], noise.shape[4])
        self.cache: Cache = None
        self.tables: dict[tuple[float, int, int], Any] = {}

    def start(self, initial: Tensor | None, history: list[tuple[int, int]]) -> None:
        """A fresh cache, filled with the given frames; one given video for a batch is run once and shared."""
        shared = initial is not None and initial.shape[0] < self.batch
        batch, self.batch = self.batch, 1 if shared else self.batch
        self.cache = self.model.new_cache(self.batch, *self.size, window=self.config.window, sink=self.config.sink)
        if initial is not None:
            for a, b in history:
                self.refresh(initial[:, :, a:b], a)
        if shared:
            self.batch, self.cache = batch, self.cache.fork(batch)

    def at(self, time: float, frames: int) -> Any:
        """t as the model takes it, made once per distinct t."""
        key = (time, self.batch, frames)
        if key not in self.tables:
            with torch.no_grad():
                self.tables[key] = self.model.timestep(time, self.batch, frames)
        return self.tables[key]

    def forward(self, x: Tensor, time: float, start: int, grad: bool) -> Tensor:
        if grad:  # the tables hold no graph
            t = torch.full((self.batch, x.shape[2]), time, device=x.device, dtype=torch.float32)
        else:
            t = self.at(time, x.shape[2])
        with torch.set_grad_enabled(grad):
            return self.model(x, t, self.text, cache=self.cache, start_frame=start)

    def denoise(self, x: Tensor, steps: list[Step], start: int, pending: Tensor | None) -> Tensor:
        """Noise [B, C, f, H, W] -> clean latents. pending: the previous chunk, whose cache pass this one's first
        step takes along."""
        for index, (time, sigma) in enumerate(steps):
            last = index + 1 == len(steps)
            grad = self.grad and last
            if index == 0 and pending is not None:
                v = self.fused_first_step(pending, x, time, start)
            else:
                v = self.forward(x, time, start, grad)
            with torch.set_grad_enabled(grad):
                x0 = (x.double() - sigma * v.double()).to(x.dtype)  # float64 as in wan_wrapper.py:169-193
            if not last:
                sigma = steps[index + 1][1]
                wide = torch.promote_types(x.dtype, torch.float32)
                eps = self.source.draw(x.shape[2])
                x = ((1 - sigma) * x0.to(wide) + sigma * eps.to(wide)).to(x.dtype)
        return x0

    def fused_first_step(self, previous: Tensor, x: Tensor, time: float, start: int) -> Tensor:
        sizes = (previous.shape[2], x.shape[2])
        times = [float(self.config.context_noise)] * sizes[0] + [time] * sizes[1]
        t = torch.tensor([times], device=x.device, dtype=torch.float32).expand(self.batch, -1)
        both = torch.cat([previous.detach(), x], 2)
        model: Any = self.model  # blocks= is a CausalWan's
        with torch.no_grad():
            v = model(both, t, self.text, cache=self.cache, start_frame=start - sizes[0], blocks=sizes)
        return v[:, :, sizes[0] :]

    def refresh(self, x0: Tensor, start: int) -> None:
        """The cache pass: x0's keys and values at t = context_noise."""
        self.forward(x0.detach(), float(self.config.context_noise), start, grad=False)


def _check_initial(initial: Tensor, noise: Tensor, text: Text) -> None:
    """ValueError for frames to continue from that do not fit."""
    rows = initial.shape[0]
    sizes_fit = initial.shape[1] == noise.shape[1] and initial.shape[3:] == noise.shape[3:]
    if not sizes_fit or rows not in (1, noise.shape[0]):
        raise ValueError(f"initial_latent {tuple(initial.shape)} does not fit noise {tuple(noise.shape)}")
    if rows < noise.shape[0] and batch_of(text) != 1:
        raise ValueError(f"one initial_latent for a batch of {noise.shape[0]} needs one prompt, got {batch_of(text)}")


def _merged(model: Student) -> AbstractContextManager[Any]:
    """The model's adapters merged inside the block, also where it is wrapped for CUDA graphs."""
    module = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    return merged_lora(module) if isinstance(module, nn.Module) else nullcontext()


def stream(
    model: Student,
    text: Text,
    noise: Tensor,
    config: RolloutConfig | None = None,
    *,
    generator: Generators | None = None,
    renoise: Tensor | None = None,
    grad_last_step: bool = False,
    initial_latent: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Tensor]:
    """`rollout`, one chunk [B, C, f, H, W] at a time, as soon as it is denoised; same arguments and errors.

    The first chunk comes after its own steps only: its cache pass runs when the next chunk is asked for, and
    the last chunk, whose cache nobody reads, has none.
    """
    config = config or RolloutConfig.of(getattr(model, "sampler", {}))
    if noise.ndim != 5:
        raise ValueError(f"noise must be [B, C, F, H, W], got {tuple(noise.shape)}")
    given = 0 if initial_latent is None else initial_latent.shape[2]
    if initial_latent is not None:
        _check_initial(initial_latent, noise, text)
    frames = given + noise.shape[2]
    if config.independent_first_frame and given == 1:  # image to video: the given frame is the independent one
        history, blocks = [(0, 1)], split_blocks(noise.shape[2], config.chunk)
    else:
        independent = config.independent_first_frame
        history = split_blocks(given, config.chunk, independent) if given else []
        blocks = split_blocks(noise.shape[2], config.chunk, independent and not given)
    steps = step_table(config.steps, config.shift, config.warp)
    first_steps = step_table(config.first_chunk_steps or config.steps, config.shift, config.warp)
    source = _Noise(noise, generator, renoise)
    merge = _merged(model) if config.merge_lora and not grad_last_step else nullcontext()
    student = model
    if config.graphs and not grad_last_step and isinstance(model, StudentModule):
        student = model.graphed()

    def chunks() -> Iterator[Tensor]:
        with merge:  # also undone when the consumer stops early; grad modes are set inside calls, never over a yield
            sampler = _Sampler(student, text, noise, config, frames, source, grad_last_step)
            sampler.start(initial_latent if initial_latent is None else initial_latent.to(noise), history)
            previous: tuple[Tensor, int] | None = (
                None  # (latents, first frame) of the chunk whose cache pass is still due
            )
            for index, (a, b) in enumerate(blocks):
                fuse = previous is not None and config.fuse_cache_pass and not (grad_last_step and len(steps) == 1)
                if previous is not None and not fuse:
                    sampler.refresh(*previous)
                pending = previous[0] if previous is not None and fuse else None
                x0 = sampler.denoise(noise[:, :, a:b], steps if index else first_steps, given + a, pending)
                previous = (x0, given + a)
                if progress is not None:
                    progress(index + 1, len(blocks))
                yield x0

    return chunks()


def rollout(
    model: Student,
    text: Text,
    noise: Tensor,
    config: RolloutConfig | None = None,
    *,
    generator: Generators | None = None,
    renoise: Tensor | None = None,
    grad_last_step: bool = False,
    initial_latent: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Latents [B, C, F, H, W] from initial noise of that shape.

    Args:
        model: a causal student (`afd_fast.students.Student`).
        text: its `encode_text`, of batch B or 1.
        config: how to sample; None: as the student's checkpoint says (its `sampler`).
        generator: source of the noise between steps, drawn in the official order, so that a seed gives the
            official rollout; a list of B generators makes sample b independent of the rest of the batch.
        renoise: that noise itself, for exact comparisons, in the order drawn: [draws, B * f, C, H, W] (the
            official layout, sample-major) or [draws, B, C, f, H, W].
        grad_last_step: let the gradient through the last denoising call of every chunk (history detached), as
            distillation and GAN training need; else none. LoRA then stays unmerged.
        initial_latent: [B, C, F0, H, W] frames to continue from (image to video, extension): they fill the
            cache at t = context_noise and come first in the result. Of batch 1, with one prompt, they are run
            once for B continuations, which share their cache until they diverge.
        progress: called with (chunks done, chunks) after each chunk.

    Raises ValueError for shapes, steps and frames that do not divide into chunks.
    """
    chunks = list(
        stream(
            model, text, noise, config, generator=generator, renoise=renoise, grad_last_step=grad_last_step,
            initial_latent=initial_latent, progress=progress,
        )
    )  # fmt: skip
    if initial_latent is not None:
        chunks.insert(0, initial_latent.to(noise).expand(noise.shape[0], -1, -1, -1, -1))
    return torch.cat(chunks, 2)

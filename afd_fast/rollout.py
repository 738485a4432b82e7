"""Chunk-by-chunk generation with a KV cache: the few-step sampler of Self-Forcing
(`pipeline/causal_inference.py:47-276` at 33593df): predict x0, re-noise to the next step, refresh the cache.

Legend: B samples, C channels, F latent frames, f frames of a chunk, H x W latent pixels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Never

from afd_fast.errors import field_types, in_words
from afd_fast.reference.schedule import Step, renoise_weights
from afd_fast.reference.transformer import split_blocks
from afd_fast.sampler import Context, FirstFrame, Generators, Noise, RolloutConfig, unipc
from afd_fast.students.guided import Guided
from afd_fast.students.lora import merged_lora
from afd_fast.students.student import (
    Cache,
    Schedule,
    Student,
    StudentModule,
    Text,
    batch_of,
    check_latents,
    texts_of_chunks,
)

SCENE = 45  # frames of the window before a scene cut's chunk (infinity-rope 63d7b84, wan/modules/causal_model.py:29)


class _Sampler:
    """One rollout: the model, its text, cache and timetables. `denoise` makes a chunk, `refresh` caches it, `recache` and
    `recompute` write the history anew."""

    def __init__(
        self, model: Student, text: Text, noise: Tensor, config: RolloutConfig, frames: int, source: Noise, grad: bool
    ):
        self.model, self.text, self.config, self.source, self.grad = model, text, config, source, grad
        self.boundary = getattr(model, "boundary", None)
        self.boundary_level = config.boundary_level(self.boundary)
        self.batch = noise.shape[0]
        room = frames if config.window is None or not config.recompute else config.window
        self.size = (room, noise.shape[3], noise.shape[4])
        self.cache: Cache = None
        self.away = 0  # frames by which the chunk's positions are off, after a scene cut
        self.tables: dict[tuple[float, int, int], Any] = {}

    def start(self, initial: Tensor | None, history: list[tuple[int, int]]) -> None:
        """A fresh cache, filled with the given frames; one given video for a batch is run once and shared."""
        shared = initial is not None and initial.shape[0] < self.batch
        batch, self.batch = self.batch, 1 if shared else self.batch
        self.cache = None  # its memory first
        self.cache = self.model.new_cache(self.batch, *self.size, **self.config.history)
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

    def forward(self, x: Tensor, time: float, start: int, grad: bool, finished: bool = False) -> Tensor:
        if grad:  # the tables hold no graph
            t = torch.full((self.batch, x.shape[2]), time, device=x.device, dtype=torch.float32)
        else:
            t = self.at(time, x.shape[2])
        model: Any = self.model
        more: dict[str, Any] = {}
        if finished and self.boundary is not None:
            more = {"both": True}
        if self.away:  # rope= is a CausalWan's
            first = start + self.away
            more = {"rope": model.rope(first, first + x.shape[2], self.cache.height, self.cache.width)}
        with torch.set_grad_enabled(grad):
            return model(x, t, self.text, cache=self.cache, start_frame=start, **more)

    def denoise(self, x: Tensor, steps: list[Step], start: int, pending: Tensor | None) -> Tensor:
        """Noise [B, C, f, H, W] -> clean latents. pending: the previous chunk, whose cache pass this one's first
        step takes along."""
        solver = None if self.config.unipc_steps is None else unipc(steps)
        for index, (time, sigma) in enumerate(steps):
            last = index + 1 == len(steps)
            grad = self.grad and last
            if index == 0 and pending is not None:
                v = self.fused_first_step(pending, x, time, start)
            else:
                v = self.forward(x, time, start, grad)
            if solver is not None:
                x = x0 = solver.step(v, solver.timesteps[index], x, return_dict=False)[0]
                continue
            level = self.predicts(time)
            with torch.set_grad_enabled(grad):
                x0 = (x.double() - (sigma - level) * v.double()).to(x.dtype)  # float64 as in wan_wrapper.py:169-193
            if last or self.predicts(steps[index + 1].t) != level:  # the low-noise expert goes on from the boundary
                x = x0
                continue
            wide = torch.promote_types(x.dtype, torch.float32)
            eps = self.source.draw(x.shape[2])
            kept, fresh = renoise_weights(steps[index + 1].sigma, level)
            x = (kept * x0.to(wide) + fresh * eps.to(wide)).to(x.dtype)
        return x0

    def predicts(self, time: float) -> float:
        """The noise level of what a step at this t predicts: clean latents, but the boundary's above it."""
        return 0.0 if self.boundary is None or time < self.boundary else self.boundary_level

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
        self.forward(x0.detach(), float(self.config.context_noise), start, grad=False, finished=True)
        if self.away:  # only while it was made was the chunk far away
            self.cache.turn(start, start + x0.shape[2], -self.away)
            self.away = 0

    def recompute(self, past: Tensor | None) -> int:
        """The history anew: `past`, block by block at positions from 0 on. Returns where it ends."""
        length = 0 if past is None else past.shape[2]
        self.start(past, split_blocks(length, self.config.chunk) if length else [])
        return length

    def recache(self, past: Tensor, end: int, sink: bool) -> None:
        """The history before frame `end` anew from its clean latents `past`, under the text that is now set: the whole window
        as one block. Once frames have left the window the sink stays as it is, or (sink) becomes the window's first frames."""
        window = self.config.window
        if window is None or end <= window or sink:
            length = end if window is None else min(window, end)
            self.cache = None  # its memory first
            self.cache = self.model.new_cache(self.batch, *self.size, **self.config.history)
            if end > length:
                self.cache.reset(end - length)
        else:
            length = window - self.config.sink
        self.refresh(past[:, :, past.shape[2] - length :], end - length)


def config_of(
    model: Student, config: RolloutConfig | None, unknown: Mapping[str, object] | None = None
) -> RolloutConfig:
    """The config, or the one of the student's checkpoint. TypeError for what is no `RolloutConfig`, and for `unknown` arguments,
    which are often settings of one."""
    for name in unknown or ():
        kinds = field_types(RolloutConfig)
        way = (
            f": it is a setting of the config, RolloutConfig({name}=...), {in_words(kinds[name])}"
            if name in kinds
            else ""
        )
        raise TypeError(f"rollout takes no {name}={way}")
    if config is None:
        return RolloutConfig.of(getattr(model, "sampler", {}))
    if not isinstance(config, RolloutConfig):
        way = f"RolloutConfig.preset({config!r})" if isinstance(config, str) else "RolloutConfig(name=value, ...)"
        raise TypeError(f"config must be a RolloutConfig or None, got {config!r}: give {way}")
    return config


def _check_initial(initial: Tensor, noise: Tensor, text: Text) -> None:
    """ValueError for frames to continue from that do not fit."""
    rows = initial.shape[0]
    sizes_fit = initial.shape[1] == noise.shape[1] and initial.shape[3:] == noise.shape[3:]
    if not sizes_fit or rows not in (1, noise.shape[0]):
        raise ValueError(f"initial_latent {tuple(initial.shape)} does not fit noise {tuple(noise.shape)}")
    if rows < noise.shape[0] and batch_of(text) != 1:
        raise ValueError(f"one initial_latent for a batch of {noise.shape[0]} needs one prompt, got {batch_of(text)}")


def _cut_chunks(model: Student, config: RolloutConfig, cuts: Sequence[int], starts: Sequence[int]) -> set[int]:
    """The numbers of the chunks that begin at these frames. ValueError where a scene cannot be cut."""
    if not cuts:
        return set()
    fits = config.rope == "relative" and config.guidance is None and config.cache_pass
    if not fits or not hasattr(model, "rope"):
        raise ValueError(
            f'scene_cuts={list(cuts)} needs a CausalWan, rope="relative" and cache_pass=True in its config and no guidance'
        )
    if (config.window or 0) > SCENE:
        raise ValueError(f"scene_cuts places a chunk at frame {SCENE}: a window of {config.window} reaches beyond it")
    if wrong := [cut for cut in cuts if cut == 0 or cut not in starts]:
        raise ValueError(
            f"no chunk with a history begins at frame {wrong[0]} of scene_cuts: they begin at {list(starts)}"
        )
    return {starts.index(cut) for cut in cuts}


def _merged(model: Student) -> AbstractContextManager[Any]:
    """The model's adapters merged inside the block, also where it is wrapped for CUDA graphs."""
    module = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    return merged_lora(module) if isinstance(module, nn.Module) else nullcontext()


def stream(
    model: Student,
    text: Schedule,
    noise: Tensor,
    config: RolloutConfig | None = None,
    *,
    generator: Generators | None = None,
    renoise: Tensor | None = None,
    grad_last_step: bool = False,
    initial_latent: Tensor | None = None,
    recache: bool | Literal["sink"] = False,
    scene_cuts: Sequence[int] = (),
    negative: Text = None,
    first_frame: FirstFrame | None = None,
    progress: Callable[[int, int], None] | None = None,
    **unknown: Never,
) -> Iterator[Tensor]:
    """`rollout`, one chunk [B, C, f, H, W] at a time, as soon as it is denoised; same arguments and errors.

    The first chunk comes after its own steps only: its cache pass runs when the next chunk is asked for, and
    the last chunk, whose cache nobody reads, has none.
    """
    config = config_of(model, config, unknown)
    check_latents("noise", noise, getattr(model, "channels", None))
    if initial_latent is not None:
        check_latents("initial_latent", initial_latent, noise.shape[1])
    given = 0 if initial_latent is None else initial_latent.shape[2]
    frames = given + noise.shape[2]
    if config.independent_first_frame and given == 1:  # image to video: the given frame is the independent one
        history, blocks = [(0, 1)], split_blocks(noise.shape[2], config.chunk)
    else:
        independent = config.independent_first_frame
        try:
            history = split_blocks(given, config.chunk, independent) if given else []
        except ValueError as error:
            raise ValueError(f"initial_latent: {error}") from None
        blocks = split_blocks(noise.shape[2], config.chunk, independent and not given)
    texts = texts_of_chunks(text, [given + a for a, _ in blocks], given)
    if initial_latent is not None:
        for words in (*texts.values(), *([] if negative is None else [negative])):
            _check_initial(initial_latent, noise, words)
    if recache not in (False, True, "sink") or (recache and len(texts) == 1):
        raise ValueError(
            f'recache must be False, True or "sink" and needs a schedule of several texts [(frame, text), ...]; got {recache!r} '
            f"with {len(texts)}"
        )
    cuts = _cut_chunks(model, config, scene_cuts, [given + a for a, _ in blocks])
    if recache == "sink" and not config.sink:
        raise ValueError(
            'recache="sink" rewrites a sink, and the rollout has none: recache=True rewrites all its window'
        )
    if (config.guidance is None) != (negative is None):
        raise ValueError(
            f"guidance={config.guidance} and negative= (encode_text of the negative prompt) belong together: give both or neither"
        )
    if config.recompute and recache:
        raise ValueError("recompute=True writes the history anew before every chunk: leave out recache")
    if first_frame is not None and not callable(first_frame):
        raise TypeError(f"first_frame must be a function of a chunk's latents, got {first_frame!r}")
    if first_frame is not None and not config.reencodes:
        raise ValueError("first_frame= is for a config with recompute=True and sink=0: leave it out")
    if grad_last_step and config.unipc_steps is not None:
        raise ValueError("grad_last_step needs the last step of a few-step student: leave out unipc_steps")
    steps, first_steps = config.timetable(), config.timetable(first=True)
    source = Noise(noise, generator, renoise)
    merge = _merged(model) if config.merge_lora and not grad_last_step else nullcontext()
    student = model
    if config.graphs and not grad_last_step and isinstance(model, StudentModule):
        student = model.graphed()
    if config.guidance is not None:
        student = Guided(student, negative, config.guidance)

    sampler = _Sampler(student, texts[min(texts)], noise, config, frames, source, grad_last_step)

    def chunks() -> Iterator[Tensor]:
        with merge:  # also undone when the consumer stops early; grad modes are set inside calls, never over a yield
            first = None if initial_latent is None else initial_latent.to(noise)
            context = Context(config, first_frame) if config.recompute else None
            if context is None:
                sampler.start(first, history)
            elif first is not None:
                context.start(first.expand(noise.shape[0], -1, -1, -1, -1))
            past = [] if first is None or not recache else [first.expand(noise.shape[0], -1, -1, -1, -1)]
            previous: tuple[Tensor, int] | None = (
                None  # (latents, first frame) of the chunk whose cache pass is still due
            )
            for index, (a, b) in enumerate(blocks):
                switch = index in texts and index > min(texts)
                start = given + a
                if context is not None:
                    finished = None if previous is None else previous[0].detach()
                    start, previous = sampler.recompute(context.before(index, finished)), None
                fuse = previous is not None and config.fuse_cache_pass and not (grad_last_step and len(steps) == 1)
                fuse = fuse and not sampler.away and index not in cuts
                if switch and recache:
                    sampler.text, sampler.away, previous = texts[index], 0, None
                    sampler.recache(torch.cat(past, 2), given + a, recache == "sink")
                elif switch:  # the chunk before is cached under its own text
                    fuse = False
                if previous is not None and not fuse:
                    sampler.refresh(*previous)
                if switch:
                    sampler.text = texts[index]
                pending = previous[0] if previous is not None and fuse else None
                if index in cuts:
                    assert config.window is not None
                    sampler.away = SCENE + b - a - min(config.window, given + b)
                x0 = sampler.denoise(noise[:, :, a:b], steps if index else first_steps, start, pending)
                previous = (x0, start) if config.cache_pass else None
                if recache:
                    past = [torch.cat([*past, x0.detach()], 2)[:, :, -(config.window or frames) :]]
                if progress is not None:
                    progress(index + 1, len(blocks))
                yield x0

    return chunks()


def rollout(
    model: Student,
    text: Schedule,
    noise: Tensor,
    config: RolloutConfig | None = None,
    *,
    generator: Generators | None = None,
    renoise: Tensor | None = None,
    grad_last_step: bool = False,
    initial_latent: Tensor | None = None,
    recache: bool | Literal["sink"] = False,
    scene_cuts: Sequence[int] = (),
    negative: Text = None,
    first_frame: FirstFrame | None = None,
    progress: Callable[[int, int], None] | None = None,
    **unknown: Never,
) -> Tensor:
    """Latents [B, C, F, H, W] from initial noise of that shape.

    Args:
        model: a causal student (`afd_fast.students.Student`).
        text: its `encode_text`, of batch B or 1. Or a schedule [(0, text), (21, text), ...]: each holds from the first chunk
            that starts at or after its frame of the result.
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
        scene_cuts: frames of the result at which a chunk begins that is placed 45 frames after the start of its window while it is made
            (Infinity-RoPE's cut): a new scene, of what the sink shows. For a CausalWan with rope="relative".
        negative: `encode_text` of the negative prompt, of batch B or 1, for config.guidance.
        recache: where the text changes, write the cache anew from the clean latents under the new text, as LongLive does
            (with its `global_sink`: once the window is full the sink stays; "sink": its first frames become the sink,
            `global_sink=False`). False: earlier frames keep the keys and values they had.
        first_frame: for config.recompute, called with every finished chunk [B, C, f, H, W] in order, before the next one: gives the latent
            [B, C, 1, H, W] of the last frame of video that the chunk's first latent frame became, encoded as a video's first
            frame (`WanDecoder.reencode`). None: that first latent frame itself stands for it, which is not what Krea does.
        progress: called with (chunks done, chunks) after each chunk.

    Raises ValueError for shapes, steps and frames that do not divide into chunks.
    """
    chunks = list(
        stream(
            model, text, noise, config, generator=generator, renoise=renoise, grad_last_step=grad_last_step,
            initial_latent=initial_latent, recache=recache, scene_cuts=scene_cuts, negative=negative, first_frame=first_frame,
            progress=progress, **unknown,
        )
    )  # fmt: skip
    if initial_latent is not None:
        chunks.insert(0, initial_latent.to(noise).expand(noise.shape[0], -1, -1, -1, -1))
    return torch.cat(chunks, 2)

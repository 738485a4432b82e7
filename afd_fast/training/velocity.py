"""The student's velocity for training, and the loss's gradient, chunk by chunk: the KV-detached update.

A no-grad pass at t = `context_noise` writes each clean chunk's keys and values to a cache; the noised chunk after it runs
with gradient over that detached history. That is exactly the sampling function, with dense attention only, and only the
cache grows with the number of chunks (with a window not even that). t [B, F] is one noise level per chunk.

`velocity` keeps every chunk's graph, `nft_backward` one chunk's at a time. For comparison, `velocity` also computes the
full gradient (teacher forcing) and Astrolabe's function of the noised history (block-causal).

Legend: B samples, C channels, F latent frames, H x W latent pixels, S clips of F / S frames with a reward each.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_fast import ops
from afd_fast.reference.nft import NFTRecipe
from afd_fast.rollout import RolloutConfig
from afd_fast.students.student import StudentModule, Text, map_tensors


@dataclass(frozen=True)
class Chunking:
    """How a student walks through F latent frames: `chunk` at a time, attending to a `window` with a `sink` (None: all),
    whose positions and averaging are `more` keywords of `new_cache`.
    active: the frames that are trained; earlier ones only fill the cache, later ones are not touched. None: all.
    context_noise: t in 0..1000 of the clean chunks' pass, as in sampling."""

    chunk: int
    window: int | None = None
    sink: int = 0
    active: range | None = None
    context_noise: float = 0.0
    more: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, chunk: int, sampler: RolloutConfig, active: range | None = None) -> "Chunking":
        """As a sampler walks."""
        history = dict(sampler.history)
        return cls(chunk, history.pop("window"), history.pop("sink"), active, sampler.context_noise, history)

    @property
    def history(self) -> dict[str, Any]:
        """Keywords of `new_cache` and of the forwards that see all chunks at once."""
        return {"window": self.window, "sink": self.sink, **self.more}

    def trained(self, frames: int) -> range:
        """The active frames of `frames`. ValueError unless both are whole chunks."""
        active = self.active if self.active is not None else range(frames)
        if frames % self.chunk or active.start % self.chunk or active.stop % self.chunk or active.stop > frames:
            raise ValueError(
                f"{frames} frames, active {active.start}..{active.stop}, are not whole chunks of {self.chunk}"
            )
        return active


@dataclass(frozen=True)
class LossInputs:
    """What the NFT + prior loss of Eq. 3-5 is computed from, apart from the student's velocity.

    x0, x_t, noise, v_old, v_ref: [B, C, F, H, W]; t: [B, F] in [0, 1]; r: [B, S], one per clip.
    """

    x0: Tensor
    x_t: Tensor
    noise: Tensor
    t: Tensor
    r: Tensor
    recipe: NFTRecipe
    v_old: Tensor | None = None
    v_ref: Tensor | None = None

    @property
    def clip_length(self) -> int:
        """Latent frames per clip."""
        return self.x0.shape[2] // self.r.shape[1]

    def rows(self, part: slice) -> "LossInputs":
        """These samples."""
        return replace(
            self,
            x0=self.x0[part],
            x_t=self.x_t[part],
            noise=self.noise[part],
            t=self.t[part],
            r=self.r[part],
            v_old=None if self.v_old is None else self.v_old[part],
            v_ref=None if self.v_ref is None else self.v_ref[part],
        )


@dataclass
class LossSums:
    """What adds up over chunks; detached. v_square, v_ref_square: [B], of the velocities; the rest are scalars."""

    policy_loss: Tensor
    prior_loss: Tensor
    signal: Tensor
    v_square: Tensor
    v_ref_square: Tensor

    def plus(self, other: "LossSums") -> "LossSums":
        return LossSums(
            self.policy_loss + other.policy_loss,
            self.prior_loss + other.prior_loss,
            self.signal + other.signal,
            self.v_square + other.v_square,
            self.v_ref_square + other.v_ref_square,
        )


class UpdateStats(NamedTuple):
    """Detached scalars of one update; sums and means as in the loss."""

    loss: Tensor
    policy_loss: Tensor  # without the prior
    prior_loss: Tensor  # before ref_coef
    signal: Tensor  # `NFTStats.signal`: moves where the loss value is flat in r
    velocity_norm_ratio: Tensor  # mean of ||v|| / ||v_ref|| over the samples; inf without v_ref

    @classmethod
    def of(cls, loss: Tensor, sums: LossSums) -> "UpdateStats":
        ratio = (sums.v_square / sums.v_ref_square).sqrt().mean()
        return cls(loss.detach(), sums.policy_loss, sums.prior_loss, sums.signal, ratio)


class ChunkVelocity(NamedTuple):
    """v_theta of some frames."""

    frames: slice
    v: Tensor


def chunk_velocities(
    model: StudentModule, x_t: Tensor, t: Tensor, text: Text, clean: Tensor, chunking: Chunking
) -> Iterator[ChunkVelocity]:
    """v_theta of every active chunk, in order. Call backward before taking the next one, and no graph outlives its
    chunk. x_t, clean: [B, C, F, H, W]; t: [B, F] in [0, 1]. ValueError where the chunks do not fill the frames."""
    batch, _, frames, height, width = x_t.shape
    active, chunk = chunking.trained(frames), chunking.chunk
    cache = model.new_cache(batch, frames, height, width, **chunking.history)
    for start in range(0, active.stop, chunk):
        part = slice(start, start + chunk)
        if start in active:
            yield ChunkVelocity(part, model(x_t[:, :, part], t[:, part] * 1000, text, cache=cache, start_frame=start))
        if part.stop < active.stop:
            with torch.no_grad():
                past = torch.full_like(t[:, part], chunking.context_noise)
                model(clean[:, :, part], past, text, cache=cache, start_frame=start)


def velocity(
    model: StudentModule, x_t: Tensor, t: Tensor, text: Text, clean: Tensor, chunking: Chunking,
    history: str = "detached",
) -> Tensor:  # fmt: skip
    """v_theta(x_t, t | history) [B, C, F, H, W], with the graphs of all chunks; zeros in frames that are not active.

    history: "detached", the sampling function; "teacher_forcing", with the gradient of the clean history;
    "block_causal", of the noised history. Other arguments as of `chunk_velocities`.
    """
    if history == "detached":
        active = chunking.trained(x_t.shape[2])
        v = torch.cat([v for _, v in chunk_velocities(model, x_t, t, text, clean, chunking)], 2)
        before, after = active.start, x_t.shape[2] - active.stop
        return F.pad(v, (0, 0, 0, 0, before, after)) if before or after else v
    if history == "teacher_forcing":
        return model.forward_teacher_forcing(x_t, t * 1000, text, clean, chunking.chunk, **chunking.history)
    return model.forward_block_causal(x_t, t * 1000, text, chunking.chunk, **chunking.history)


def clip_loss(v: Tensor, inputs: LossInputs, first: int = 0) -> tuple[Tensor, LossSums]:
    """`nft_loss` of the velocities of frames [first, first + f), with one r per clip, and what adds up over chunks. A
    clip is a sample of the loss, so a clip's r reaches its own frames only. v: [B, C, f, H, W]."""
    recipe, length, clips = inputs.recipe, inputs.clip_length, inputs.r.shape[1]
    last = first + v.shape[2]
    edges = sorted({first, last, *(k for k in range(length, last, length) if k > first)})
    losses, sums = [], None
    for a, b in pairwise(edges):
        part = slice(a, b)
        loss, stats = ops.nft_loss(
            v[:, :, a - first : b - first],
            inputs.x0[:, :, part],
            inputs.r[:, a // length],
            inputs.t[:, part],
            noise=inputs.noise[:, :, part],
            v_old=None if inputs.v_old is None else inputs.v_old[:, :, part],
            v_ref=None if inputs.v_ref is None else inputs.v_ref[:, :, part],
            frame_dim=2,
            recipe=recipe,
            return_stats=True,
        )
        share = (b - a) / length if recipe.sample_reduction == "mean" else 1.0
        weight = share / clips if recipe.batch_reduction == "mean" else share
        losses.append(loss * weight)
        found = LossSums(
            stats.policy_loss * weight,
            stats.prior_loss * weight,
            stats.signal * share / clips,
            stats.v_norm.square(),
            stats.v_ref_norm.square(),
        )
        sums = found if sums is None else sums.plus(found)
    assert sums is not None
    return sum(losses[1:], start=losses[0]), sums


def nft_backward(
    model: StudentModule, text: Text, inputs: LossInputs, chunking: Chunking, scale: float = 1.0
) -> UpdateStats:
    """Add d(scale * NFT + prior loss) / d(parameters) to `.grad` with one chunk's activations alive at a time. Equal to
    `(scale * clip_loss(velocity(...), inputs)[0]).backward()` but for rounding.

    v_ref is taken over the reference's own history. With adaptive weights (their sums need the whole clip) the
    velocities are first computed without a graph, one more forward; without them a chunk's gradient is known when the
    chunk is. ValueError for clips that are not whole chunks, and for adaptive weights with a clip only partly active.
    """
    frames, clips, length = inputs.x0.shape[2], inputs.r.shape[1], inputs.clip_length
    active = chunking.trained(frames)
    if frames % clips or length % chunking.chunk:
        raise ValueError(
            f"{clips} rewards for {frames} frames in chunks of {chunking.chunk}: a clip must be whole chunks"
        )
    adaptive = inputs.recipe.weighting != "none"
    if adaptive and (active.start % length or active.stop % length):
        raise ValueError(f"adaptive weights need whole clips of {length} frames, active {active.start}..{active.stop}")
    words = _Leaves(text)
    if adaptive:
        with torch.no_grad():
            parts = [v for _, v in chunk_velocities(model, inputs.x_t, inputs.t, text, inputs.x0, chunking)]
        whole = torch.cat(parts, 2).requires_grad_()
        loss, sums = clip_loss(whole, inputs, active.start)
        (gradient,) = torch.autograd.grad(loss * scale, whole)
        chunks = chunk_velocities(model, inputs.x_t, inputs.t, words.text, inputs.x0, chunking)
        for (_, v), of_chunk in zip(chunks, gradient.split(chunking.chunk, 2)):
            v.backward(of_chunk)
    else:
        loss = torch.zeros((), dtype=torch.promote_types(inputs.x0.dtype, torch.float32), device=inputs.x0.device)
        total: LossSums | None = None
        for part, v in chunk_velocities(model, inputs.x_t, inputs.t, words.text, inputs.x0, chunking):
            chunk_loss, found = clip_loss(v, inputs, part.start)
            (chunk_loss * scale).backward()
            loss += chunk_loss.detach()
            total = found if total is None else total.plus(found)
        assert total is not None
        sums = total
    words.backward()
    return UpdateStats.of(loss, sums)


class _Leaves:
    """A text encoding cut from its graph: every chunk's backward ends at leaves, and `backward` then goes through the
    text's own graph once."""

    def __init__(self, text: Text):
        self.sources: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self.text = map_tensors(text, self._cut)

    def _cut(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            return x
        self.sources.append(x)
        self.leaves.append(x.detach().requires_grad_())
        return self.leaves[-1]

    def backward(self) -> None:
        """Pass on what has arrived at the leaves."""
        reached = [(x, leaf.grad) for x, leaf in zip(self.sources, self.leaves) if leaf.grad is not None]
        if reached:
            torch.autograd.backward([x for x, _ in reached], [g for _, g in reached])

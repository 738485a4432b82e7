"""The student's velocity for training, and its gradient, chunk by chunk: the KV-detached update.

A no-grad pass at t = 0 writes each clean chunk's keys and values to a cache; the noised chunk before it runs with
gradient over that detached history. That is exactly the sampling function, with dense attention only, and of length
nothing but the cache grows (with window and sink, not even that). Per-chunk t [B, F] is a noise level per frame.

`student_velocity` keeps every chunk's graph, `nft_backward` one chunk's at a time. For comparison, `UPDATES` also holds
the full gradient (teacher forcing) and Astrolabe's function of the noised history (block-causal).

Legend: B samples, C channels, F latent frames, H x W latent pixels, S clips of F / S frames with a reward of their own.
"""

from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from afd_fast import ops
from afd_fast.reference.nft import NFTRecipe


def chunk_velocities(
    model,
    x_t: Tensor,
    t: Tensor,
    text,
    clean: Tensor,
    chunk: int,
    *,
    active: range | None = None,
    beside=(),
    **cache_options,
) -> Iterator[tuple[slice, Tensor, list[Tensor]]]:
    """(frames, v_theta of these frames, velocities beside it) for every chunk, in order.

    Call backward before taking the next chunk, and no graph outlives its chunk. x_t, clean: [B, C, F, H, W]; t: [B, F]
    in [0, 1]. active: the frames to yield; earlier ones only fill the cache, later ones are not touched. beside:
    (context manager function, text) pairs, each another student's no-grad velocity over *this* history. cache_options:
    window=, sink= of `model.new_cache`. ValueError where the chunks do not fill the frames.
    """
    batch, _, frames, height, width = x_t.shape
    active = active or range(frames)
    if frames % chunk or active.start % chunk or active.stop % chunk or active.stop > frames:
        raise ValueError(f"{frames} frames, active {active.start}..{active.stop}, are not whole chunks of {chunk}")
    cache = model.new_cache(batch, frames, height, width, **cache_options)
    for start in range(0, active.stop, chunk):
        part = slice(start, start + chunk)
        run = lambda words, part=part, start=start: model(
            x_t[:, :, part], t[:, part] * 1000, words, cache=cache, start_frame=start
        )
        if start in active:
            others = []
            with torch.no_grad():
                for context, words in beside:
                    with context():
                        others.append(run(words))
            yield part, run(text), others
        if part.stop < active.stop:
            with torch.no_grad():
                model(clean[:, :, part], torch.zeros_like(t[:, part]), text, cache=cache, start_frame=start)


def student_velocity(model, x_t: Tensor, t: Tensor, text, clean: Tensor, chunk: int, **options) -> Tensor:
    """v_theta(x_t, t | own clean history) [B, C, F, H, W] (active frames only), with the graphs of all chunks.
    Arguments as of `chunk_velocities`."""
    return torch.cat([v for _, v, _ in chunk_velocities(model, x_t, t, text, clean, chunk, **options)], 2)


UPDATES = {  # v_theta [B, C, F, H, W] of (model, x_t, t, text, clean, chunk)
    "detached": student_velocity,
    "teacher_forcing": lambda model, x_t, t, text, clean, chunk, **window: model.forward_teacher_forcing(
        x_t, t * 1000, text, clean, chunk, **window
    ),
    "block_causal": lambda model, x_t, t, text, clean, chunk, **window: model.forward_block_causal(
        x_t, t * 1000, text, chunk, **window
    ),
}


def add(*rows: dict) -> dict:
    """The sum of equal dictionaries, key by key."""
    return {key: sum(row[key] for row in rows) for key in rows[0]}


def clip_loss(
    v: Tensor, x0: Tensor, r: Tensor, t: Tensor, recipe: NFTRecipe, *, first: int = 0, length: int, **tensors
) -> tuple[Tensor, dict[str, Tensor]]:
    """`nft_loss` of frames [first, first + f) with one reward a clip, and what adds up over parts to `UpdateStats`. r:
    [B, S] for clips of `length` frames; a clip is a sample of the loss, so a clip's reward reaches its own frames alone.
    Other tensors [B, C, f, H, W], t [B, f]."""
    last = first + v.shape[2]
    cut = sorted({first, last, *(k for k in range(length, last, length) if k > first)})
    losses, rows = [], []
    for a, b in pairwise(cut):
        part = slice(a - first, b - first)
        own = {name: x if x is None else x[:, :, part] for name, x in tensors.items()}
        loss, stats = ops.nft_loss(
            v[:, :, part], x0[:, :, part], r[:, a // length], t[:, part], frame_dim=2, recipe=recipe,
            return_stats=True, **own,
        )  # fmt: skip
        share = (b - a) / length if recipe.sample_reduction == "mean" else 1.0
        weight = share / r.shape[1] if recipe.batch_reduction == "mean" else share
        losses.append(loss * weight)
        rows.append({
            "policy_loss": stats.policy_loss * weight, "prior_loss": stats.prior_loss * weight,
            "signal": stats.signal * share / r.shape[1],
            "v_square": stats.v_norm.square(), "v_ref_square": stats.v_ref_norm.square(),
        })  # fmt: skip
    return sum(losses), add(*rows)


class UpdateStats(NamedTuple):
    """Detached scalars of one update; sums and means as in the loss."""

    policy_loss: Tensor  # without the prior
    prior_loss: Tensor  # before its weight
    signal: Tensor  # `NFTStats.signal`: moves where the loss value is flat in r
    velocity_norm_ratio: Tensor  # mean of ||v|| / ||v_ref|| over the samples; inf without v_ref

    @classmethod
    def of(cls, sums: dict[str, Tensor]) -> "UpdateStats":
        """From the sum of `clip_loss`'s dictionaries over all parts."""
        ratio = (sums["v_square"] / sums["v_ref_square"]).sqrt().mean()
        return cls(sums["policy_loss"], sums["prior_loss"], sums["signal"], ratio)


def nft_backward(
    model, x_t: Tensor, t: Tensor, text, x0: Tensor, chunk: int, *, r: Tensor, noise: Tensor, recipe: NFTRecipe,
    v_ref: Tensor | None = None, v_old: Tensor | None = None, reference=None, scale: float = 1.0,
    active: range | None = None, **options,
) -> tuple[Tensor, UpdateStats]:  # fmt: skip
    """Add d(scale * NFT + prior loss) / d(parameters) to `.grad` with one chunk's activations alive at a time; returns
    the loss and its stats. Equal to `(scale * ops.nft_loss(student_velocity(...), ...)).backward()` but for rounding.

    r: [B], or [B, S] for one reward a clip (F divides into S clips of whole chunks). x_t, x0, noise, v_ref, v_old:
    [B, C, F, H, W]; t: [B, F] in [0, 1]. v_ref is exact with a history of the reference's own; reference, a (context
    manager function, text) pair, instead takes it over the policy's history, in passing: half its cost, approximate.
    With adaptive weights (their sums need the whole clip) the velocities are first computed without a graph, one more
    forward; without them a chunk's gradient is known when the chunk is.
    ValueError for clips that are not whole chunks, and for adaptive weights with a clip only partly active.
    """
    frames = x0.shape[2]
    active = active or range(frames)
    r = r[:, None] if r.ndim == 1 else r
    length = frames // r.shape[1]
    if frames % r.shape[1] or length % chunk:
        raise ValueError(f"{r.shape[1]} rewards for {frames} frames in chunks of {chunk}: a clip must be whole chunks")
    adaptive = recipe.weighting != "none"
    if adaptive and (active.start % length or active.stop % length):
        raise ValueError(f"adaptive weights need whole clips of {length} frames, active {active.start}..{active.stop}")
    beside = [reference] if reference else []
    velocities = lambda words, **more: chunk_velocities(
        model, x_t, t, words, x0, chunk, active=active, **more, **options
    )
    cut = lambda x, part: None if x is None else x[:, :, part]

    def loss_of(v: Tensor, part: slice, others: list[Tensor]) -> tuple[Tensor, dict]:
        return clip_loss(
            v, x0[:, :, part], r, t[:, part], recipe, first=part.start, length=length, noise=noise[:, :, part],
            v_old=cut(v_old, part), v_ref=others[0] if others else cut(v_ref, part),
        )  # fmt: skip

    words, leaves = _cut_graph(text)
    if adaptive:
        with torch.no_grad():
            parts = list(velocities(text, beside=beside))
        v = torch.cat([v for _, v, _ in parts], 2).requires_grad_()
        loss, sums = loss_of(
            v, slice(active.start, active.stop), [torch.cat([o[0] for _, _, o in parts], 2)] if beside else []
        )
        (gradient,) = torch.autograd.grad(loss * scale, v)
        for (_, v, _), own in zip(velocities(words), gradient.split(chunk, 2)):
            v.backward(own)
    else:
        loss, rows = torch.zeros((), dtype=torch.promote_types(x0.dtype, torch.float32), device=x0.device), []
        for part, v, others in velocities(words, beside=beside):
            of_chunk, row = loss_of(v, part, others)
            (of_chunk * scale).backward()
            loss += of_chunk.detach()
            rows.append(row)
        sums = add(*rows)
    reached = [(source, leaf.grad) for source, leaf in leaves if leaf.grad is not None]
    if reached:
        torch.autograd.backward(*zip(*reached))
    return loss.detach(), UpdateStats.of(sums)


def _cut_graph(text) -> tuple[object, list[tuple[Tensor, Tensor]]]:
    """A prompt's encoding with leaves in place of its tensors, and (tensor, leaf) pairs: every chunk's backward ends at
    the leaves, and the text's own graph is gone through once."""
    leaves = []

    def cut(x):
        if isinstance(x, (list, tuple)):
            return type(x)(cut(y) for y in x)
        if not isinstance(x, Tensor) or not x.requires_grad:
            return x
        leaves.append((x, x.detach().requires_grad_()))
        return leaves[-1][1]

    return replace(text, **{f.name: cut(getattr(text, f.name)) for f in fields(text)}), leaves

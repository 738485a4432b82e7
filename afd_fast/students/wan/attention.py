"""Who attends to whom, as dense attention over ranges of frames: one object per forward, called in every layer.

A pattern takes the raw projections q, k, v [B, L, D] of one layer and returns [B, L, H, d]. No mask is built:
block-causal and teacher-forcing attention are loops over blocks, each with exactly the keys it may see.

Legend: B samples, L tokens, D width, H heads, d = D / H; blocks are frame ranges [(start, end), ...].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from afd_fast.ops import transformer as ops
from afd_fast.reference.transformer import apply_rope, rope_tables, visible_frames
from afd_fast.students.wan.cache import KVCache, Range, check_positions
from afd_fast.students.wan.layers import Attention
from afd_fast.students.wan.parallel import SequenceSplit


class Heads(NamedTuple):
    """Queries and keys after RMSNorm and RoPE, and values: [B, L, H, d] each."""

    q: Tensor
    k: Tensor
    v: Tensor


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class Roped:
    """RMSNorm, RoPE and the split into heads, common to all patterns. cos, sin: [L, d / 2]. split, tokens: where ranks share
    the `tokens` of a frame, L are a rank's own, and `attended` sees all of them with a share of the heads."""

    def __init__(self, cos: Tensor, sin: Tensor, tokens: int, split: SequenceSplit | None = None):
        self.cos, self.sin, self.tokens, self.split = cos, sin, tokens, split

    def rope(self, attn: Attention, q: Tensor, k: Tensor, v: Tensor) -> Heads:
        q, k = ops.qk_norm_rope(q, k, attn.norm_q.weight, attn.norm_k.weight, self.cos, self.sin, **attn.rounding)
        heads = Heads(q, k, v.unflatten(-1, (attn.heads, -1)))
        if self.split is None:
            return heads
        frames = q.shape[1] * self.split.ranks // self.tokens
        return Heads(*self.split.to_heads(torch.cat(heads), frames).chunk(3))

    def attended(self, layer: int, attn: Attention, heads: Heads) -> Tensor:
        raise NotImplementedError

    def __call__(self, layer: int, attn: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = self.attended(layer, attn, self.rope(attn, q, k, v))
        return out if self.split is None else self.split.to_tokens(out, out.shape[1] // self.tokens)


class Bidirectional(Roped):
    """Every frame attends to every frame."""

    def attended(self, layer: int, attn: Attention, heads: Heads) -> Tensor:
        return attn.attend(*heads)


class BlockCausal(Roped):
    """A block attends to itself and to the blocks before it: to all, or to the sink and the latest frames of the window.

    tokens: per frame. rope: as of `KVCache`. Raises ValueError for a sink that fills the window and a block that exceeds it.
    """

    def __init__(
        self, cos: Tensor, sin: Tensor, blocks: Sequence[Range], tokens: int, window: int | None, sink: int,
        rope: str = "absolute", split: SequenceSplit | None = None,
    ):  # fmt: skip
        super().__init__(cos, sin, tokens, split)
        self.blocks, self.window, self.sink = blocks, window, sink
        self.moves = rope == "relative" and sink > 0
        if sink and (window is None or sink >= window):
            raise ValueError(f"got sink={sink} with window={window}; the window must be larger than the sink")
        check_positions(rope, None, window, sink)
        if window is not None and max(b - a for a, b in blocks) > window - sink:
            raise ValueError(
                f"a block of {max(b - a for a, b in blocks)} frames does not fit window {window}, sink {sink}: make the "
                "block smaller or the window larger"
            )

    def joined(self, x: Tensor, ranges: Sequence[Range]) -> Tensor:
        """The tokens [B, n, H, d] of these ranges of frames: a view of a single range."""
        return _cat([x[:, a * self.tokens : b * self.tokens] for a, b in ranges])

    def keys(self, k: Tensor, ranges: Sequence[Range], end: int) -> Tensor:
        """The keys of these ranges for a block that ends at `end`; the sink's where the window has moved on are turned."""
        if not self.moves or self.window is None or end <= self.window:
            return self.joined(k, ranges)
        move = (end - self.window, end - self.window + 1)
        tables = rope_tables(k.shape[-1], move, 1, 1, dtype=self.cos.dtype, device=k.device)
        return _cat([apply_rope(self.joined(k, ranges[:1]), *tables), self.joined(k, ranges[1:])])

    def causal(self, attn: Attention, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Range]) -> list[Tensor]:
        """The attended values of each block."""
        outs = []
        for a, b in blocks:
            seen = visible_frames(b, self.window, self.sink)
            outs.append(attn.attend(self.joined(q, [(a, b)]), self.keys(k, seen, b), self.joined(v, seen)))
        return outs

    def attended(self, layer: int, attn: Attention, heads: Heads) -> Tensor:
        return _cat(self.causal(attn, *heads, self.blocks))


class TeacherForcing(BlockCausal):
    """[clean || noisy]: clean blocks as in `BlockCausal`; a noisy block attends to the clean blocks before it and to
    itself. The clean half ends before the last block."""

    def attended(self, layer: int, attn: Attention, heads: Heads) -> Tensor:
        q, k, v = heads
        history = self.blocks[-1][0]
        split = history * self.tokens
        outs = self.causal(attn, q[:, :split], k[:, :split], v[:, :split], self.blocks[:-1])
        for a, b in self.blocks:
            past = [(i, min(j, a)) for i, j in visible_frames(b, self.window, self.sink) if i < a]
            own = [(history + a, history + b)]
            seen = past + own
            outs.append(attn.attend(self.joined(q, own), self.keys(k, seen, b), self.joined(v, seen)))
        return _cat(outs)


@dataclass(frozen=True)
class _Step:
    start: int  # absolute frames [start, end) of the block
    end: int
    history: list[Range]  # slot ranges of the earlier frames it attends to
    slots: int  # leading slots it attends to after its frames were written


class Cached(Roped):
    """Blocks in order over a KV cache: write the block's keys and values, attend to the cache in place.

    With autograd the block's keys and values are concatenated to a copy of the (detached) history instead, so that later
    writes to the buffer do not change what the backward pass needs. Raises ValueError as `KVCache.history`.
    """

    def __init__(
        self, cos: Tensor, sin: Tensor, cache: KVCache, blocks: Sequence[Range], write: bool,
        split: SequenceSplit | None = None,
    ):  # fmt: skip
        super().__init__(cos, sin, cache.tokens, split)
        self.cache, self.write, self.first = cache, write, blocks[0][0]
        if not write and len(blocks) > 1:
            raise ValueError(f"got {len(blocks)} blocks with write=False; pass a single block, or write=True")
        self.steps: list[_Step] = []
        for start, end in blocks:  # each block attends to what the earlier ones will have written
            history = cache.history(start, end)
            self.steps.append(_Step(start, end, history, cache.mark(start, end) if write else 0))
        if write:
            cache.withhold(self.first, self.steps[-1].end)

    def finish(self) -> None:
        """Every layer is through: the cache holds the frames."""
        if self.write:
            self.cache.mark(self.first, self.steps[-1].end)

    def __call__(self, layer: int, attn: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        graph = torch.is_grad_enabled() and any(a.requires_grad for a in (q, k, v))
        if graph or not self.write or self.split is not None:
            return super().__call__(layer, attn, q, k, v)
        outs, cache, weights = [], self.cache, (attn.norm_q.weight, attn.norm_k.weight)
        for step, rows in self._blocks(layer):  # one kernel that also writes
            args, tables = (q, k, v), (self.cos, self.sin)
            if len(self.steps) > 1:
                args, tables = (q[:, rows], k[:, rows], v[:, rows]), (self.cos[rows], self.sin[rows])
            k_cache, v_cache = cache.writable(layer)
            roped = ops.qk_norm_rope_write(
                *args, *weights, *tables, k_cache, v_cache, tokens=self.tokens, start_frame=step.start - cache.origin,
                window=cache.window, sink=cache.sink, **attn.rounding,
            )  # fmt: skip
            seen = slice(0, step.slots * self.tokens)
            outs.append(attn.attend(roped, k_cache[:, seen], v_cache[:, seen]))
        return _cat(outs)

    def attended(self, layer: int, attn: Attention, heads: Heads) -> Tensor:
        outs, cache = [], self.cache
        for step, rows in self._blocks(layer):
            q, k, v = (a[:, rows] for a in heads)
            if self.write and not torch.is_grad_enabled():
                cache.write(layer, step.start, k, v)
                seen = slice(0, step.slots * self.tokens)
                outs.append(attn.attend(q, *(buffer[:, seen] for buffer in cache.writable(layer))))
                continue
            past = cache.read(layer, step.history)
            keys, values = _cat([p.k for p in past] + [k]), _cat([p.v for p in past] + [v])
            if self.write:
                cache.write(layer, step.start, k, v)
            outs.append(attn.attend(q, keys, values))
        return _cat(outs)

    def _blocks(self, layer: int) -> Iterator[tuple[_Step, slice]]:
        """The blocks with their rows of tokens, the layer's cache ready for each."""
        for step in self.steps:
            self.cache.settle(layer, step.start, step.end, self.write)
            yield step, slice((step.start - self.first) * self.tokens, (step.end - self.first) * self.tokens)

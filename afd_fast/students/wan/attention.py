"""Who attends to whom, as dense attention over ranges of frames: one object per forward, called in every layer.

A pattern takes the raw projections q, k, v [B, L, D] of one layer and returns [B, L, H, d]. No mask is built:
block-causal and teacher-forcing attention are loops over blocks, each with exactly the keys it may see.

Legend: B samples, L tokens, D width, H heads, d = D / H; blocks are frame ranges [(start, end), ...].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from afd_fast.ops import transformer as ops
from afd_fast.reference.transformer import apply_rope, rope_tables, visible_frames
from afd_fast.students.wan.cache import KVCache, Range, check_positions
from afd_fast.students.wan.layers import Attention


class Heads(NamedTuple):
    """Queries and keys after RMSNorm and RoPE, and values: [B, L, H, d] each."""

    q: Tensor
    k: Tensor
    v: Tensor


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class _Roped:
    """RMSNorm, RoPE and the split into heads, common to all patterns. cos, sin: [L, d / 2]."""

    def __init__(self, cos: Tensor, sin: Tensor):
        self.cos, self.sin = cos, sin

    def rope(self, attn: Attention, q: Tensor, k: Tensor, v: Tensor) -> Heads:
        q, k = ops.qk_norm_rope(q, k, attn.norm_q.weight, attn.norm_k.weight, self.cos, self.sin, **attn.rounding)
        return Heads(q, k, v.unflatten(-1, (attn.heads, -1)))


class Bidirectional(_Roped):
    """Every frame attends to every frame."""

    def __call__(self, layer: int, attn: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attn.attend(*self.rope(attn, q, k, v))


class BlockCausal(_Roped):
    """A block attends to itself and to the blocks before it: to all, or to the sink and the latest frames of the window.

    tokens: per frame. rope: as of `KVCache`. Raises ValueError for a sink that fills the window and a block that exceeds it.
    """

    def __init__(
        self, cos: Tensor, sin: Tensor, blocks: Sequence[Range], tokens: int, window: int | None, sink: int,
        rope: str = "absolute",
    ):  # fmt: skip
        super().__init__(cos, sin)
        self.blocks, self.tokens, self.window, self.sink = blocks, tokens, window, sink
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

    def __call__(self, layer: int, attn: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _cat(self.causal(attn, *self.rope(attn, q, k, v), self.blocks))


class TeacherForcing(BlockCausal):
    """[clean || noisy]: clean blocks as in `BlockCausal`; a noisy block attends to the clean blocks before it and to
    itself. The clean half ends before the last block."""

    def __call__(self, layer: int, attn: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self.rope(attn, q, k, v)
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


class Cached(_Roped):
    """Blocks in order over a KV cache: write the block's keys and values, attend to the cache in place.

    With autograd the block's keys and values are concatenated to a copy of the (detached) history instead, so that later
    writes to the buffer do not change what the backward pass needs. Raises ValueError as `KVCache.history`.
    """

    def __init__(self, cos: Tensor, sin: Tensor, cache: KVCache, blocks: Sequence[Range], write: bool):
        super().__init__(cos, sin)
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
        outs, tokens = [], self.cache.tokens
        for step in self.steps:
            rows = slice((step.start - self.first) * tokens, (step.end - self.first) * tokens)
            args = (q, k, v, self.cos, self.sin)
            if len(self.steps) > 1:
                args = (q[:, rows], k[:, rows], v[:, rows], self.cos[rows], self.sin[rows])
            outs.append(self._block(layer, attn, step, *args))
        return _cat(outs)

    def _block(
        self, layer: int, attn: Attention, step: _Step, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        cache, weights = self.cache, (attn.norm_q.weight, attn.norm_k.weight)
        cache.settle(layer, step.start, step.end, self.write)
        graph = torch.is_grad_enabled() and any(a.requires_grad for a in (q, k, v))
        if self.write and not graph:
            k_cache, v_cache = cache.writable(layer)
            q = ops.qk_norm_rope_write(
                q, k, v, *weights, cos, sin, k_cache, v_cache, tokens=cache.tokens, start_frame=step.start - cache.origin,
                window=cache.window, sink=cache.sink, **attn.rounding,
            )  # fmt: skip
            seen = slice(0, step.slots * cache.tokens)
            return attn.attend(q, k_cache[:, seen], v_cache[:, seen])
        q, k = ops.qk_norm_rope(q, k, *weights, cos, sin, **attn.rounding)
        v = v.unflatten(-1, (attn.heads, -1))
        past = cache.read(layer, step.history)
        keys, values = _cat([p.k for p in past] + [k]), _cat([p.v for p in past] + [v])
        if self.write:
            cache.write(layer, step.start, k, v)
        return attn.attend(q, keys, values)

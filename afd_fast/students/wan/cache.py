"""Keys and values of the earlier frames: allocated once, positions kept on the host, a ring that moves no data.

Keys are stored after RoPE with absolute positions and attention does not depend on the order of keys, so a frame may be
in any slot. With a window the newest frame overwrites the oldest in place, where the official code shifts the whole
buffer (Self-Forcing causal_model.py:206-222). The cache's position is never read from a device.

rope="relative" counts positions from the start of the visible window. RoPE sees differences of positions only, and those
among the latest frames are the absolute ones: what moves, by one chunk per chunk, is the sink against them. So the sink's
keys alone are turned, once per chunk, from a copy at their first positions; projects that keep keys before rotation
(LongLive's causal_model_infinity.py, FastVideo's "relativistic", Reward-Forcing, Infinity-RoPE) rotate the whole window in
every forward, to the same numbers.

Legend: B samples, H heads, d head width, N tokens per frame, S slots of one frame each.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from afd_fast.reference.transformer import RopeTables, apply_rope, ring_slot, rope_tables, visible_frames

Range = tuple[int, int]  # [start, end) of frames or slots


class KeysValues(NamedTuple):
    """Keys and values [B, L, H, d] of L tokens in one layer."""

    k: Tensor
    v: Tensor


class _Storage:
    """One layer's keys and values [rows, S * N, H, d] and the number of caches that hold it."""

    def __init__(self, k: Tensor, v: Tensor):
        self.k, self.v, self.owners = k, v, 1


class _Sink(NamedTuple):
    """One layer's sink with rope="relative"."""

    absorbed: int  # the frames before this one, counted from the origin, are in it
    home: Tensor | None = None  # its keys [B, sink * N, H, d] at their first positions, once the window has moved on
    turned: int = 0  # frames by which the buffer's are turned from there


def check_positions(rope: str, sink_ema: float | None, window: int | None, sink: int) -> None:
    """ValueError for settings of a window's positions that do not fit together."""
    if rope not in ("absolute", "relative"):
        raise ValueError(f'rope must be "absolute" or "relative", got {rope!r}')
    if rope == "relative" and window is None:
        raise ValueError('rope="relative" counts positions from the start of the window: set window')
    if sink_ema is not None and (rope != "relative" or not sink or not 0 <= sink_ema <= 1):
        raise ValueError(f'sink_ema={sink_ema} must lie in 0..1 and needs rope="relative" and a sink, got sink={sink}')


class KVCache:
    """The self-attention cache of a student. Made by `CausalWan.new_cache`.

    frames: number of latent frames in a rollout; window: None, or the number of frames a block attends to, of which the
    first `sink` are never overwritten (the rollout may then have any length). height, width: in tokens, not latents.
    rope: "absolute", or "relative": positions count from the start of the window, so that the sink stays as near as it was
    when the window filled. sink_ema: None, or the weight a of Reward-Forcing's moving sink: sink frames that leave the window
    at a time are averaged into it, a sink + (1 - a) gone, keys before rotation.
    Raises ValueError for sizes below 1, a sink that fills the window, and settings that need a window or a sink.
    """

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        frames: int,
        height: int,
        width: int,
        heads: int,
        head_dim: int,
        window: int | None = None,
        sink: int = 0,
        rope: str = "absolute",
        sink_ema: float | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ):
        if min(batch, frames, height, width) < 1:
            raise ValueError(
                f"got batch {batch}, frames {frames}, {height}x{width} tokens; all sizes of a cache must be positive"
            )
        if sink < 0 or (sink and window is None) or (window is not None and sink >= window):
            raise ValueError(f"got sink={sink} with window={window}; the window must be larger than the sink")
        check_positions(rope, sink_ema, window, sink)
        self.batch, self.height, self.width, self.tokens = batch, height, width, height * width
        self.window, self.sink, self.frames = window, sink, frames
        self.moves, self.sink_ema = rope == "relative" and sink > 0, sink_ema
        self.origin = 0  # the frame whose slot is 0; another one after `restart`
        self.slots = frames if window is None else min(frames, window)
        self.slot_frames: list[int | None] = [None] * self.slots  # the absolute frame each slot holds
        shape = (batch, self.slots * self.tokens, heads, head_dim)
        self._layers = [
            _Storage(*(torch.empty(shape, dtype=dtype, device=device) for _ in range(2))) for _ in range(layers)
        ]
        self._repeats = [1] * layers  # how often each layer's stored rows are repeated in this cache's batch
        self._sinks = [_Sink(sink)] * layers
        self._turns: dict[int, RopeTables] = {}  # the tables of the last turns, shared by the layers and forks

    def __repr__(self) -> str:
        window = "" if self.window is None else f", window={self.window}, sink={self.sink}"
        window += ", relative" if self.moves else ""
        return (
            f"KVCache({len(self._layers)} layers, batch={self.batch}, slots={self.slots} x {self.tokens} tokens{window}, "
            f"{self.nbytes / 2**20:.1f} MiB)"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers in use, including those shared with a fork."""
        return sum(s.k.nbytes + s.v.nbytes for s in self._layers)

    @property
    def dtype(self) -> torch.dtype:
        return self._layers[0].k.dtype

    @property
    def device(self) -> torch.device:
        return self._layers[0].k.device

    @property
    def is_shared(self) -> bool:
        """Whether a write has to copy first, because a fork shares the buffers."""
        return any(s.owners > 1 for s in self._layers) or max(self._repeats) > 1

    def reset(self, origin: int = 0) -> None:
        """Forget every frame; the buffers stay allocated. origin: the frame that the history begins with."""
        self.slot_frames, self.origin = [None] * self.slots, origin

    def _slot(self, frame: int) -> int:
        return ring_slot(frame - self.origin, self.window, self.sink)

    def place(self, start: int, end: int) -> tuple[int, int]:
        """What a block [start, end) reads and writes: its first slot, and the number of leading slots it attends to."""
        return self._slot(start), min(end - self.origin, self.slots)

    def history(self, start: int, end: int) -> list[Range]:
        """Slot ranges of the frames before `start` that a block [start, end) attends to.

        Raises ValueError if the block does not fit the cache or the cache lacks a frame that the block needs.
        """
        if start < self.origin or end <= start:
            raise ValueError(
                f"got frames {start}..{end}; start_frame must be >= {self.origin} and the chunk must not be empty"
            )
        first, last = self.origin, end - self.origin
        room = self.slots if self.window is None else self.window - self.sink
        if self.window is not None and last > self.window and end - start > room:
            raise ValueError(
                f"a chunk of {end - start} frames does not fit a window of {self.window} with sink {self.sink}: make the "
                "chunk smaller or the window larger"
            )
        if last > self.slots and (self.window is None or self.slots < self.window):
            raise ValueError(f"frames {start}..{end} do not fit a cache of {self.slots} frames: make a larger one")
        runs: list[Range] = []
        for a, b in visible_frames(last, self.window, self.sink):
            for frame in range(first + a, min(first + b, start)):
                slot = self._slot(frame)
                if self.slot_frames[slot] != frame:
                    raise ValueError(f"the cache does not hold frame {frame}: run the earlier chunks first")
                if runs and runs[-1][1] == slot:
                    runs[-1] = (runs[-1][0], slot + 1)
                else:
                    runs.append((slot, slot + 1))
        return runs

    def mark(self, start: int, end: int) -> int:
        """Declare frames [start, end) written and return how many leading slots a block that ends at `end` attends to:
        the visible frames always fill exactly these slots. Frames from `end` on belong to a discarded history and are
        forgotten."""
        self.slot_frames = [f if f is not None and f < end else None for f in self.slot_frames]
        for frame in range(start, end):
            self.slot_frames[self._slot(frame)] = frame
        return self.place(start, end)[1]

    def withhold(self, start: int, end: int) -> None:
        """Take frames [start, end) back: a forward is about to write them, and may fail before every layer has."""
        self.slot_frames = [None if f is not None and start <= f < end else f for f in self.slot_frames]

    def writable(self, layer: int) -> KeysValues:
        """The layer's buffers [B, S * N, H, d] to write into; copied first if another cache shares them."""
        storage, repeat = self._layers[layer], self._repeats[layer]
        if storage.owners > 1 or repeat > 1:
            copies = [a.repeat_interleave(repeat, 0) if repeat > 1 else a.clone() for a in (storage.k, storage.v)]
            storage.owners -= 1
            self._layers[layer], self._repeats[layer] = _Storage(*copies), 1
        return KeysValues(self._layers[layer].k, self._layers[layer].v)

    @torch.no_grad()
    def settle(self, layer: int, start: int, end: int, write: bool) -> None:
        """Before a block [start, end) reads or writes the layer: what leaves the window is averaged into the sink, once, and
        the sink's keys are turned to where the block's window has them. Does nothing without rope="relative".

        Raises ValueError where other than `sink` frames leave, or leave in a forward that must not write.
        """
        if not self.moves:
            return
        assert self.window is not None
        sink, beyond, n = self._sinks[layer], max(0, end - self.origin - self.window), self.sink * self.tokens
        gone = self.sink + beyond if self.sink_ema is not None else 0  # frames [sink, gone) have left the window
        if gone > sink.absorbed or beyond != sink.turned:
            k, v = self.writable(layer)
            home = k[:, :n].clone() if sink.home is None else sink.home
            if len(home) < len(k):  # a fork's
                home = home.repeat_interleave(len(k) // len(home), 0)
            if gone > sink.absorbed and self.sink_ema is not None:
                first, a = self._slot(self.origin + sink.absorbed) * self.tokens, self.sink_ema
                if gone - sink.absorbed != self.sink or not write:
                    raise ValueError(
                        f"{gone - sink.absorbed} frames leave the window at frame {end} with write={write}; sink_ema averages "
                        f"sink={self.sink} frames at a time, in forwards that write: make chunks of {self.sink} and the "
                        "window a multiple of them"
                    )
                home = a * home + (1 - a) * self._turned(k[:, first : first + n], -sink.absorbed)
                v[:, :n] = a * v[:, :n] + (1 - a) * v[:, first : first + n]
            k[:, :n] = self._turned(home, beyond)
            sink = _Sink(max(gone, sink.absorbed), home, beyond)
        self._sinks[layer] = _Sink(self.sink) if write and start - self.origin < self.sink else sink

    @torch.no_grad()
    def turn(self, start: int, end: int, frames: int) -> None:
        """The keys of frames [start, end) as they are `frames` later."""
        for layer in range(len(self._layers)):
            k = self.writable(layer).k
            for frame in range(start, end):
                slot = slice(self._slot(frame) * self.tokens, (self._slot(frame) + 1) * self.tokens)
                k[:, slot] = self._turned(k[:, slot], frames)

    def _turned(self, k: Tensor, frames: int) -> Tensor:
        """Roped keys [B, L, H, d] as they are `frames` later; heights and widths stay."""
        if frames == 0:
            return k
        if frames not in self._turns:
            if len(self._turns) > 3:
                self._turns.clear()
            wide = torch.promote_types(self.dtype, torch.float32)
            self._turns[frames] = rope_tables(k.shape[-1], (frames, frames + 1), 1, 1, dtype=wide, device=self.device)
        return apply_rope(k, *self._turns[frames])

    def read(self, layer: int, runs: list[Range]) -> list[KeysValues]:
        """Views [B, n * N, H, d] of slot ranges, detached. Rows that a fork shares are repeated: as a view if one sample is
        stored, else as a copy."""
        storage, repeat = self._layers[layer], self._repeats[layer]

        def rows(buffer: Tensor, a: int, b: int) -> Tensor:
            x = buffer[:, a * self.tokens : b * self.tokens]
            return x[:, None].expand(-1, repeat, *x.shape[1:]).flatten(0, 1) if repeat > 1 else x

        return [KeysValues(rows(storage.k, a, b), rows(storage.v, a, b)) for a, b in runs]

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Copy k, v [B, F * N, H, d] of the frames from `start` on into their slots (detached)."""
        targets = self.writable(layer)
        with torch.no_grad():
            for target, source in zip(targets, (k, v)):
                for index, frame in enumerate(source.detach().split(self.tokens, 1)):
                    slot = self._slot(start + index)
                    target[:, slot * self.tokens : (slot + 1) * self.tokens] = frame

    def ordered(self, layer: int) -> KeysValues:
        """Copies of the layer's keys and values of all frames it holds, in ascending order (for tests, export)."""
        order = sorted((f, s) for s, f in enumerate(self.slot_frames) if f is not None)
        pairs = self.read(layer, [(s, s + 1) for _, s in order])
        return KeysValues(torch.cat([pair.k for pair in pairs], 1), torch.cat([pair.v for pair in pairs], 1))

    def fork(self, k: int) -> "KVCache":
        """A cache for k rollouts of each sample (batch B * k, sample-major) that shares this cache's buffers until
        either side writes; a layer is copied on its first write. Both stay usable."""
        if k < 1:
            raise ValueError(f"fork got k={k}; each sample needs k >= 1 rollouts")
        other = object.__new__(KVCache)
        other.__dict__.update(self.__dict__)
        other.batch, other.slot_frames = self.batch * k, list(self.slot_frames)
        other._layers, other._repeats = list(self._layers), [r * k for r in self._repeats]
        other._sinks = list(self._sinks)
        for storage in self._layers:
            storage.owners += 1
        return other

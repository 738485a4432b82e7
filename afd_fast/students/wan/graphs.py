"""CUDA graphs for rollouts: each forward recorded once per (place in the cache, timestep) and replayed after.

A rollout's shapes are static and its positions host integers, so a forward is the same list of kernels on the same
addresses every time: what is worth most for frame-wise students, whose GPU work per forward is no longer than the
time Python takes to launch it. RoPE tables are inputs like x, so a ring that goes round meets the same few forwards again:
window 12, sink 3 and chunks of 3 have 3 places, with 5 timesteps 15 graphs for a stream of any length. A forward is recorded
when it comes the second time, so that those that a ring meets once, while it fills, cost nothing.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from afd_fast.errors import ConfigError
from afd_fast.students.student import check_text, map_tensors
from afd_fast.students.wan.cache import KVCache
from afd_fast.students.wan.model import CausalWan, Conditioning, WanText


class CudaRecorder:
    """Records what a function launches, on one stream. Recordings share the memory pool of those still alive: a pool whose
    graphs are all gone takes no new one."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ConfigError("CUDA graphs need a CUDA device, and there is none here: leave out graphs")
        self.stream: torch.cuda.Stream | None = (
            None  # of its own: a stream's cuBLAS workspace goes with any graph of it
        )
        self.last: weakref.ref[torch.cuda.CUDAGraph] | None = None

    def record(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """Run `function` once to warm up, record it, and return its output tensor and what replays it into that."""
        side = self.stream = self.stream or torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # lazy initialisation must not happen while recording
            function()
        torch.cuda.current_stream().wait_stream(side)
        last, graph = None if self.last is None else self.last(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=None if last is None else last.pool(), stream=side):
            out = function()
        self.last = weakref.ref(graph)
        return out, graph.replay


class Recorder(Protocol):
    """What records a forward: `CudaRecorder`, or a stand-in where there is no GPU."""

    def record(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """Run and record `function`; its output tensor, and what replays it into that."""


class Recording(NamedTuple):
    """A recorded forward."""

    out: Tensor
    replay: Callable[[], None]


@dataclass
class Inputs:
    """What recordings of one shape read: x, and the RoPE tables of its frames from `start` on."""

    x: Tensor
    rope: tuple[Tensor, Tensor]
    start: int


class KeptText(NamedTuple):
    """The text that was given last, and the tensors that recordings read it from."""

    given: WanText
    kept: WanText


def _copy(x: Tensor) -> Tensor:
    return x.detach().clone()


class GraphedStudent:
    """A CausalWan to give to `rollout` in its stead, for many rollouts of one shape.

    The cache, the text's and the timesteps' tensors are kept and filled anew for each rollout. Everything is
    recorded again when the cache's shape, a prompt batch's size or a weight's address changes. Recordings see updates
    in place, such as an optimiser's or merged LoRA. Calls that are not a rollout's (gradient, forks, several blocks,
    tensors of timesteps) and those that come the first time run the model itself.
    """

    def __init__(self, model: CausalWan, *, max_graphs: int = 256, recorder: Recorder | None = None):
        self.model, self.max_graphs, self.recorder = model, max_graphs, recorder
        self._cache: KVCache | None = None
        self._cache_key: tuple[object, ...] | None = None
        self._weights: list[int] | None = None
        self._text: KeptText | None = None
        self._conditionings: dict[float, Conditioning] = {}
        self._inputs: dict[tuple[int, ...], Inputs] = {}
        self._met: set[tuple[object, ...]] = set()  # keys of forwards that have come once
        self._graphs: dict[tuple[object, ...], Recording] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy begins without recordings: they read this model's weights."""
        return GraphedStudent, (self.model,)

    def _forget(self) -> None:
        self._graphs.clear()
        self._met.clear()
        self._inputs.clear()
        self._conditionings.clear()
        self._text = None

    def new_cache(
        self, batch: int, frames: int, height: int, width: int, window: int | None = None, sink: int = 0,
        rope: str = "absolute", sink_ema: float | None = None,
    ) -> KVCache:  # fmt: skip
        """The kept cache, emptied; the start of a rollout, where changed shapes and weights are noticed. ConfigError without a GPU."""
        self.recorder = self.recorder or CudaRecorder()  # a copy has none: it may be made where there is no GPU
        self.model.join()  # before their addresses are read
        key = (batch, frames, height, width, window, sink, rope, sink_ema)
        weights = [p.data_ptr() for p in self.model.parameters()]
        if self._cache is None or key != self._cache_key or weights != self._weights:
            self._forget()
            self._cache = None  # its memory first
            self._cache = self.model.new_cache(*key)
            self._cache_key, self._weights = key, weights
        self._cache.reset()
        return self._cache

    @torch.no_grad()
    def timestep(self, t: float, batch: int, frames: int) -> Conditioning:
        """The model's, in tensors that stay the same for the same t."""
        fresh = self.model.conditioning(t, tables=True)
        if t not in self._conditionings:
            self._conditionings[t] = fresh
        kept = self._conditionings[t]
        for target, source in zip((kept.e, kept.e0, *(kept.tables or ())), (fresh.e, fresh.e0, *(fresh.tables or ()))):
            target.copy_(source)
        return kept

    def _kept_text(self, text: WanText) -> WanText:
        if self._text is None or self._text.kept.batch != text.batch:
            self._graphs.clear()
            self._met.clear()
            self._text = KeptText(text, map_tensors(text, _copy))
        elif self._text.given is not text:
            for target, source in zip(self._text.kept.keys + self._text.kept.values, text.keys + text.values):
                target.copy_(source)
            self._text = KeptText(text, self._text.kept)
        return self._text.kept

    def __call__(
        self, x: Tensor, t: Any, text: WanText, *, cache: KVCache | None = None, start_frame: int = 0, **options: Any
    ) -> Tensor:
        """`CausalWan.forward`; a rollout's calls are replayed."""
        ours = any(t is kept for kept in self._conditionings.values())
        kept = cache is not None and cache is self._cache and not cache.is_shared
        if cache is None or torch.is_grad_enabled() or options or not kept or not ours:
            return self.model(x, t, text, cache=cache, start_frame=start_frame, **options)
        check_text(text, WanText)
        text = self._kept_text(text)
        end = start_frame + x.shape[2]
        cache.history(start_frame, end)  # the host's side of the forward, which a replay leaves out: its checks,
        key = (*cache.place(start_frame, end), tuple(x.shape), id(t))
        first = key not in self._met
        self._met.add(key)
        if first or (key not in self._graphs and len(self._graphs) >= self.max_graphs):
            return self.model(x, t, text, cache=cache, start_frame=start_frame)
        for layer in range(len(text.keys)):
            cache.settle(layer, start_frame, end, write=True)
        inputs = self._filled(x, start_frame, cache)
        if key not in self._graphs:
            forward = partial(self.model, inputs.x, t, text, cache=cache, start_frame=start_frame, rope=inputs.rope)
            assert self.recorder is not None  # new_cache has made it
            self._graphs[key] = Recording(*self.recorder.record(forward))
        recording = self._graphs[key]
        cache.withhold(start_frame, end)
        recording.replay()
        cache.mark(start_frame, end)  # and its bookkeeping
        return recording.out.clone()

    def _filled(self, x: Tensor, start: int, cache: KVCache) -> Inputs:
        """The kept inputs of x's shape, holding x and its frames' RoPE tables."""
        shape = tuple(x.shape)
        if shape not in self._inputs or self._inputs[shape].start != start:
            tables = self.model.rope(start, start + x.shape[2], cache.height, cache.width)
            if shape not in self._inputs:
                self._inputs[shape] = Inputs(_copy(x), (_copy(tables[0]), _copy(tables[1])), start)
            for kept, fresh in zip(self._inputs[shape].rope, tables):
                kept.copy_(fresh)
            self._inputs[shape].start = start
        inputs = self._inputs[shape]
        inputs.x.copy_(x)
        return inputs

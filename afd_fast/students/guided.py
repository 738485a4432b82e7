"""Classifier-free guidance around any student (Ho & Salimans 2022, as Self-Forcing's `pipeline/causal_diffusion_inference.py`
at 33593df applies it chunk by chunk)."""

from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from afd_fast.students.student import Cache, Student, Text


class Caches(NamedTuple):
    """Two histories that hold the same frames: of the prompt and the negative one, or of two experts."""

    first: Cache
    second: Cache

    def fork(self, batch: int) -> "Caches":
        return Caches(*(cache.fork(batch) for cache in self))

    def reset(self, start: int) -> None:
        for cache in self:
            cache.reset(start)


class Guided:
    """A `Student` whose velocity is v_negative + scale (v - v_negative), at two forwards each. negative: the student's
    `encode_text` of the negative prompt, of batch B or 1."""

    def __init__(self, model: Student, negative: Text, scale: float):
        self.model, self.negative, self.scale = model, negative, scale
        self.boundary = getattr(model, "boundary", None)

    def encode_text(self, context: Any) -> Text:
        return self.model.encode_text(context)

    def new_cache(
        self, batch: int, frames: int, height: int, width: int, window: int | None = None, sink: int = 0, **more: Any
    ) -> Cache:
        make = partial(self.model.new_cache, batch, frames, height, width, window, sink, **more)
        return Caches(make(), make())

    def timestep(self, t: float, batch: int, frames: int) -> Any:
        return self.model.timestep(t, batch, frames)

    def __call__(self, x: Tensor, t: Any, text: Text, *, cache: Cache, start_frame: int = 0, **more: Any) -> Tensor:
        v = self.model(x, t, text, cache=cache.first, start_frame=start_frame, **more)
        negative = self.model(x, t, self.negative, cache=cache.second, start_frame=start_frame, **more)
        return negative + self.scale * (v - negative)

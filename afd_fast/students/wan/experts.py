"""Two CausalWans, one for high and one for low noise, as one student: Wan2.2-A14B.

Each has its cache and its text. A forward at t >= boundary is the high-noise expert's, every other the low-noise one's
(Wan2.2 `wan/text2video.py`, diffusers `WanPipeline`). A finished chunk is shown to both, so that both caches hold it
(FastVideo `pipelines/stages/causal_denoising.py` at 2f3d407).
"""

from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from afd_fast.errors import ConfigError
from afd_fast.students.guided import Caches
from afd_fast.students.student import Cache, Context, Student, StudentModule, check_text
from afd_fast.students.wan.model import CausalWan, CausalWanConfig


class ExpertTexts(NamedTuple):
    """Each expert's `encode_text` of the same prompts: its text layers are its own."""

    high: Any
    low: Any


class ExpertTimes(NamedTuple):
    """One t, and what each expert takes for it."""

    t: float
    high: Any
    low: Any


class TwoExperts(StudentModule):
    """The student of two experts of one size, dtype and device. boundary: t in 0..1000 from which on the high-noise one takes over
    (875 for Wan2.2-T2V-A14B).

    A few-step rollout predicts the noise level of the boundary above it, and hands that on (`RolloutConfig.boundary_level`). For
    sampling alone: training, a fused cache pass and `scene_cuts` are refused. Raises ConfigError for experts that differ in
    size, dtype or device, and for another boundary; TypeError for other students.
    """

    boundary: float

    def __init__(self, high: CausalWan, low: CausalWan, boundary: float):
        super().__init__()
        for expert in (high, low):
            if isinstance(expert, TwoExperts) or not isinstance(getattr(expert, "config", None), CausalWanConfig):
                raise TypeError(
                    f"TwoExperts takes two CausalWans, got a {type(high).__name__} and a {type(low).__name__}"
                )
        if (
            not isinstance(boundary, (int, float, Real))
            or isinstance(boundary, bool)
            or not 1 <= float(boundary) < 1000
        ):
            raise ConfigError(
                "boundary must be a t from 1 to 1000, such as 875 of Wan2.2-T2V-A14B (1000 times the boundary_ratio of "
                f"model_index.json), got {boundary!r}"
            )
        check_same(high.config, low.config)
        if high.dtype != low.dtype:
            raise ConfigError(f"the experts are {high.dtype} and {low.dtype}: load both with one dtype=")
        if high.device != low.device:
            raise ConfigError(f"the experts are on {high.device} and {low.device}: load both on one device=")
        self.high, self.low, self.boundary = high, low, float(boundary)
        self.sampler, self.channels = dict(high.sampler), high.channels

    @property
    def config(self) -> CausalWanConfig:
        """Sizes of each expert."""
        return self.high.config

    @property
    def dtype(self) -> torch.dtype:
        return self.high.dtype

    @property
    def device(self) -> torch.device:
        return self.high.device

    def encode_text(self, context: Context) -> ExpertTexts:
        """`CausalWan.encode_text` of both."""
        return ExpertTexts(self.high.encode_text(context), self.low.encode_text(context))

    def new_cache(
        self, batch: int, frames: int, height: int, width: int, window: int | None = None, sink: int = 0, **more: Any
    ) -> Cache:
        """`CausalWan.new_cache` of both."""
        sizes = (batch, frames, height, width, window, sink)
        return Caches(self.high.new_cache(*sizes, **more), self.low.new_cache(*sizes, **more))

    def timestep(self, t: float, batch: int, frames: int) -> ExpertTimes:
        return ExpertTimes(t, self.high.timestep(t, batch, frames), self.low.timestep(t, batch, frames))

    def graphed(self) -> Student:
        """Both experts' `GraphedStudent`s as one student."""
        return TwoExperts(self.high.graphed(), self.low.graphed(), self.boundary)  # type: ignore[arg-type]  # their stand-ins

    def split_sequence(self, group: "dist.ProcessGroup | None", height: int, width: int) -> None:
        """Of both experts."""
        for expert in (self.high, self.low):
            expert.split_sequence(group, height, width)

    def forward(
        self, x: Tensor, t: Any, text: ExpertTexts, *, cache: Cache, start_frame: int = 0, both: bool = False
    ) -> Tensor:
        """Velocity of the expert of t: [B, F], the same everywhere, or `timestep`'s. both: x is finished, and is written into the
        other expert's cache as well, without gradient. Shapes and errors as `CausalWan.forward`."""
        check_text(text, ExpertTexts)
        if not isinstance(t, ExpertTimes):
            t = ExpertTimes(self._one(t), t, t)
        runs = [
            partial(expert, x, time, words, cache=kept, start_frame=start_frame)
            for expert, time, words, kept in zip((self.high, self.low), t[1:], text, cache)
        ]
        chosen, other = runs if t.t >= self.boundary else runs[::-1]
        if both:
            with torch.no_grad():
                other()
        return chosen()

    def _one(self, t: Tensor) -> float:
        """The t that all frames of the tensor have; ValueError for several."""
        low, high = (float(a) for a in t.aminmax())
        if low != high:
            raise ValueError(
                f"the frames of one forward must have one t, which one expert takes; got {low:g} .. {high:g}"
            )
        return low


def check_same(high: CausalWanConfig, low: CausalWanConfig) -> None:
    """ConfigError that names the sizes in which the experts differ."""
    names = [name for name, value in vars(high).items() if getattr(low, name) != value]
    if names:
        found = ", ".join(f"{name} {getattr(high, name)} and {getattr(low, name)}" for name in names)
        raise ConfigError(f"the two experts have different sizes ({found}): give the two of one model")

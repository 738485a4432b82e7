"""What every phase of an iteration works on: configuration, state, ranks, random numbers and the phase timer."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from afd_fast.config import TrainConfig
from afd_fast.discriminators.discriminator import Clips, Discriminator, FeatureCache
from afd_fast.rollout import RolloutConfig
from afd_fast.students.lora import trainable
from afd_fast.students.student import Family
from afd_fast.teachers.dataset import Shard, prompts_of, shown
from afd_fast.teachers.mixed import MixedTeacher
from afd_fast.teachers.teacher import Request, Teacher
from afd_fast.training.distributed import Ranks
from afd_fast.training.state import TrainState, generator
from afd_fast.training.velocity import Chunking

Metrics = dict[str, float]


@contextlib.contextmanager
def profiled(name: str) -> Iterator[None]:
    """A range of PyTorch's profiler where one runs (`emit_nvtx`, which nsys switches on, makes it an NVTX range); without
    one an NVTX range, for ncu."""
    if torch.autograd._profiler_enabled():
        with torch.profiler.record_function(name):
            yield
    else:
        with torch.cuda.nvtx.range(name) if torch.version.cuda else contextlib.nullcontext():
            yield


@dataclass
class Run:
    """One run on this rank. seconds: of this iteration's phases, by name. teachers: of several, by prompt which one is its."""

    config: TrainConfig
    state: TrainState
    ranks: Ranks = Ranks()
    seconds: Metrics = field(default_factory=dict)
    teachers: Mapping[str, str] = field(default_factory=dict)
    features: FeatureCache | None = None  # of the teacher's clips, where the discriminator keeps them

    def __post_init__(self) -> None:
        if self.discriminator.keeps_features:
            self.features = FeatureCache(self.discriminator)

    @property
    def family(self) -> Family:
        return self.state.family

    @property
    def discriminator(self) -> Discriminator:
        return self.state.discriminator

    @property
    def discriminator_device(self) -> torch.device:
        return next(self.discriminator.parameters()).device

    @property
    def past_warmup(self) -> bool:
        """Whether the student learns in this iteration."""
        return self.state.step >= self.config.discriminator.warmup

    @property
    def sampler(self) -> RolloutConfig:
        """How the student samples, in training and evaluation."""
        return self.config.rollout

    def chunking(self, active: range | None = None) -> Chunking:
        """How the student's update walks through latent frames: as its sampler does."""
        return Chunking.of(self.family.chunk, self.sampler, active)

    def generator(self, purpose: str, shard: int = 0) -> torch.Generator:
        """This iteration's random numbers for a purpose; a function of (seed, step, purpose, shard)."""
        return generator(self.config.seed, self.state.step, purpose, shard)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the iteration under its name; on a GPU until its work is done. A phase that is entered again
        adds up. In a profile it is the range afd_fast.NAME."""
        start = time.perf_counter()
        with profiled(f"afd_fast.{name}"):
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        key = f"seconds/{name}"
        self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - start

    def teacher_clips(self, shard: Shard) -> Clips:
        """The teacher's clips [b] of a shard on the discriminator's device; encoded once per run where it keeps features."""
        return self.encoded(shard.keys, shard.pixels)

    def encoded(self, keys: list[Request], pixels: torch.Tensor) -> Clips:
        """Teacher videos [B, 3, F, H, W], uint8, as the discriminator takes them; keys: what identifies each."""
        home = self.discriminator_device
        if self.features is None or len(keys) != len(pixels):
            return shown(pixels, home)
        return self.features(keys, lambda i: shown(pixels[i], home), home)


def facts(run: Run, teacher: Teacher) -> dict[str, str]:
    """What a run would be, without running it: sizes of the networks and of their trained part, and the teacher's cost."""
    config, family = run.config, run.family

    def millions(module: torch.nn.Module) -> str:
        whole, trained = (sum(p.numel() for p in ps) / 1e6 for ps in (module.parameters(), trainable(module).values()))
        return f"{whole:.2f} M, {trained:.2f} M of them trained"

    video, trained = family.video, sum(p.numel() for p in trainable(family.student).values())
    count = config.prompts_per_step * config.rollouts_per_prompt
    found = {
        "student parameters": millions(family.student),
        "discriminator parameters": millions(run.discriminator),
        "videos per iteration": f"{count} of {video.frames} frames, {video.height}x{video.width} pixels, {video.fps} fps",
        "optimiser and average": f"{16 * trained / 2**30:.2f} GiB",
    }
    split = prompts_of(teacher, config.teacher_prompts)
    prompts = dict.fromkeys([p for part in split for p in part])
    cost = teacher.cost([Request(p, seed) for p in prompts for seed in range(config.teacher_clips)])
    if isinstance(teacher, MixedTeacher):
        found |= {f"prompts of {spec}": about for spec, about in teacher.counts(split).items()}
    return found | ({"teacher's videos": cost} if cost else {})

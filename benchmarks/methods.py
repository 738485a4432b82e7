"""What an iteration of every method costs: AFD and its baselines on the same student, videos and discriminator.

    python -m benchmarks.methods [--size demo|regime|tiny|1.3b] [--iterations 5]      random teacher videos, no download

FLOPs by torch's counter; passes: whole clips that go through the student, for each clip of the iteration; medians of one interleaved
run after a warm-up; memory: the most bytes kept for backward at any time (what several operators keep is counted several times), and on a
GPU the peak above the weights.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from afd_fast.config import with_values
from afd_fast.students import Family
from afd_fast.students.student import StudentModule, family
from afd_fast.teachers import lights, physics
from afd_fast.teachers.dataset import Shard
from afd_fast.training import compare, runs
from afd_fast.training.loop import train_step
from afd_fast.training.methods import METHODS
from afd_fast.training.run import Run
from afd_fast.training.state import new_state
from benchmarks.rows import CUDA, Times, clocked, device_name, ranged, refusals
from benchmarks.step import SIZES, build, config_of
from benchmarks.update import CPU_FLASH, saved_bytes

WORLDS = {"demo": physics, "regime": lights}  # embedded runs; the other sizes take any prompt


@dataclass
class Costs:
    """Of one method's iteration. kept: bytes for backward."""

    flops: int
    passes: float
    kept: int
    times: Times = field(default_factory=Times)


class Prepared:
    """A run of one method past its warm-up, with one iteration's shards."""

    def __init__(self, size: str, method: str, device: str) -> None:
        if size in WORLDS:
            config = runs.get(size)
            self.family: Family = family(config.student, chunk=config.rollout.chunk, seed=config.seed)
        else:
            config = config_of(size)
            self.family = build(config, device)
        (variant,) = compare.methods(config, [method])
        config = with_values(config, variant.keys)
        count = config.prompts_per_step // config.shards
        prompts = WORLDS.get(size, physics).split_prompts().train
        words = [p for p in prompts[:count] for _ in range(config.rollouts_per_prompt)]
        video = self.family.video
        self.shards = [
            Shard(i, words, torch.rand(len(words), 3, video.frames, video.height, video.width))
            for i in range(config.shards)
        ]
        self.run = Run(config, new_state(config, self.family))
        self.run.state.step = config.discriminator.warmup

    def step(self) -> None:
        """One iteration; waits for the device, as its metrics are numbers."""
        train_step(self.run, self.shards)

    @contextlib.contextmanager
    def passes(self) -> Iterator[list[float]]:
        """What goes through the student inside the block, and through its frozen copy where there is one: shares of the iteration's clips."""
        found: list[float] = []
        of_all = sum(len(shard.prompts) for shard in self.shards) * self.family.latents.frames
        models = [m for m in (self.family.student, self.run.state.reference) if isinstance(m, StudentModule)]
        with contextlib.ExitStack() as stack:
            for model, name in product(models, ("forward", "forward_teacher_forcing")):
                stack.enter_context(patch.object(model, name, counted(getattr(model, name), found, of_all)))
            yield found


def counted(forward: Callable[..., Tensor], found: list[float], of_all: int) -> Callable[..., Tensor]:
    """A student's forward that notes its share of `of_all` frames."""

    def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found.append(x.shape[0] * x.shape[2] / of_all)
        return forward(x, *args, **kwargs)

    return call


def measure(prepared: dict[str, Prepared], iterations: int, device: str) -> dict[str, Costs]:
    """Costs by method; the timed iterations take turns."""
    costs: dict[str, Costs] = {}
    for method, one in prepared.items():
        with FlopCounterMode(display=False, custom_mapping=CPU_FLASH) as counter, one.passes() as passes:
            one.step()
        costs[method] = Costs(counter.get_total_flops(), sum(passes), saved_bytes(one.step))
    for _ in range(iterations):
        for method, one in prepared.items():
            with clocked(costs[method].times, device == "cuda"):
                one.step()
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=(*WORLDS, *SIZES), default="demo")
    parser.add_argument("--iterations", type=ranged(int, 1), default=5)
    args = parser.parse_args()
    device = "cuda" if CUDA and args.size not in WORLDS else "cpu"
    prepared = {method: Prepared(args.size, method, device) for method in METHODS}
    costs = measure(prepared, args.iterations, device)
    name = device_name(device) if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"an iteration, {args.size}, {name}, median of {args.iterations}")
    print(
        f"{'method':12}{'GFLOP':>12}{'passes':>12}{'ms':>12}{'MB kept':>12}"
        + (f"{'peak MB':>12}" if device == "cuda" else "")
    )
    for method, c in costs.items():
        peak = "" if c.times.peak_mib is None else f"{c.times.peak_mib * 2**20 / 1e6:12.0f}"
        print(f"{method:12}{c.flops / 1e9:12.1f}{c.passes:12.1f}{c.times.ms:12.0f}{c.kept / 1e6:12.1f}{peak}")


if __name__ == "__main__":
    with refusals():
        main()

"""What an iteration of every method costs: AFD and its baselines on the same student, videos and discriminator.

    python -m benchmarks.methods [--size demo|tiny|1.3b] [--iterations 5]      random teacher videos, no download

FLOPs by torch's counter; medians of one interleaved run after a warm-up; memory: the most bytes kept for backward at any time
(what several operators keep is counted several times), and on a GPU the peak above the weights.
"""

import argparse
from dataclasses import dataclass, field

import torch
from torch.utils.flop_counter import FlopCounterMode

from afd_fast.config import with_values
from afd_fast.students.toy import shipped
from afd_fast.students.toy.family import of_student
from afd_fast.teachers.dataset import Shard
from afd_fast.teachers.physics import all_prompts
from afd_fast.training import compare, runs
from afd_fast.training.loop import train_step
from afd_fast.training.methods import METHODS
from afd_fast.training.run import Run
from afd_fast.training.state import new_state
from benchmarks.rows import CUDA, Times, clocked, device_name
from benchmarks.step import SIZES, build, config_of
from benchmarks.update import CPU_FLASH, saved_bytes


@dataclass
class Costs:
    """Of one method's iteration. kept: bytes for backward."""

    flops: int
    kept: int
    times: Times = field(default_factory=Times)


class Prepared:
    """A run of one method past its warm-up, with one iteration's shards."""

    def __init__(self, size: str, method: str, device: str) -> None:
        if size == "demo":
            config, family = runs.demo(), of_student(shipped.load())
        else:
            config = config_of(size)
            family = build(config, device)
        (variant,) = compare.methods(config, [method])
        config = with_values(config, variant.keys)
        count = config.prompts_per_step // config.shards
        words = [p for p in all_prompts()[:count] for _ in range(config.rollouts_per_prompt)]
        video = family.video
        self.shards = [
            Shard(i, words, torch.rand(len(words), 3, video.frames, video.height, video.width))
            for i in range(config.shards)
        ]
        self.run = Run(config, new_state(config, family))
        self.run.state.step = config.discriminator.warmup

    def step(self) -> None:
        """One iteration; waits for the device, as its metrics are numbers."""
        train_step(self.run, self.shards)


def measure(prepared: dict[str, Prepared], iterations: int, device: str) -> dict[str, Costs]:
    """Costs by method; the timed iterations take turns."""
    costs: dict[str, Costs] = {}
    for method, one in prepared.items():
        with FlopCounterMode(display=False, custom_mapping=CPU_FLASH) as counter:
            one.step()
        costs[method] = Costs(counter.get_total_flops(), saved_bytes(one.step))
    for _ in range(iterations):
        for method, one in prepared.items():
            with clocked(costs[method].times, device == "cuda"):
                one.step()
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("demo", *SIZES), default="demo")
    parser.add_argument("--iterations", type=int, default=5)
    args = parser.parse_args()
    device = "cuda" if CUDA and args.size != "demo" else "cpu"
    prepared = {method: Prepared(args.size, method, device) for method in METHODS}
    costs = measure(prepared, args.iterations, device)
    name = device_name(device) if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"an iteration, {args.size}, {name}, median of {args.iterations}")
    print(f"{'method':12}{'GFLOP':>12}{'ms':>12}{'MB kept':>12}" + (f"{'peak MB':>12}" if device == "cuda" else ""))
    for method, c in costs.items():
        peak = "" if c.times.peak_mib is None else f"{c.times.peak_mib * 2**20 / 1e6:12.0f}"
        print(f"{method:12}{c.flops / 1e9:12.1f}{c.times.ms:12.0f}{c.kept / 1e6:12.1f}{peak}")


if __name__ == "__main__":
    main()

"""What an iteration of every method costs: AFD and its baselines on the same student, videos and discriminator.

    python -m benchmarks.methods [--size demo|tiny|1.3b] [--iterations 5]      random teacher videos, no download

FLOPs by torch's counter; medians of one interleaved run after a warm-up; memory: the most bytes kept for backward at any time
(what several operators keep is counted several times), and on a GPU the peak above the weights.
"""

import argparse
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from afd_fast.config import with_overrides
from afd_fast.students.toy import shipped as base_student
from afd_fast.teachers.dataset import Shard
from afd_fast.teachers.physics import all_prompts
from afd_fast.training import runs as recipes
from afd_fast.training.methods.baselines import STEPS
from afd_fast.training.state import new_state, toy_system
from benchmarks.step import COMMON, SIZES, build
from benchmarks.update import CPU_FLASH, saved_bytes


def prepared(size: str, method: str, device: str):
    """(state, configuration, shards) of a method past its warm-up."""
    if size == "demo":
        config, system = recipes.demo(), toy_system(base_student.load())
    else:
        config = with_overrides(recipes.afd_table3(), [*COMMON, *SIZES[size]])
        system = build(config, device)
    config = with_overrides(config, [f"{k}={v}" for k, v in recipes.baseline(config, method).items()])
    words = [
        p for p in all_prompts()[: config.prompts_per_step // config.shards] for _ in range(config.rollouts_per_prompt)
    ]
    shards = [Shard(i, words, torch.rand(len(words), 3, *system.video)) for i in range(config.shards)]
    state = new_state(config, system)
    state.step = config.disc_warmup
    return state, config, shards


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("demo", *SIZES), default="demo")
    parser.add_argument("--iterations", type=int, default=5)
    args = parser.parse_args()
    device = "cuda" if cuda and args.size != "demo" else "cpu"
    runs = {method: prepared(args.size, method, device) for method in STEPS}
    step = lambda method: STEPS[method](*runs[method])
    flops, kept, times, peaks = {}, {}, {method: [] for method in runs}, {}
    for method in runs:
        with FlopCounterMode(display=False, custom_mapping=CPU_FLASH) as counter:
            step(method)
        flops[method] = counter.get_total_flops()
        kept[method] = saved_bytes(lambda method=method: step(method))
    for _ in range(args.iterations):
        for method in runs:
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            step(method)  # waits for the device: its metrics are numbers
            times[method].append(time.perf_counter() - start)
            if device == "cuda":
                peaks[method] = torch.cuda.max_memory_allocated() - before
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"an iteration, {args.size}, {name}, median of {args.iterations}")
    print(f"{'method':12}{'GFLOP':>12}{'ms':>12}{'MB kept':>12}" + (f"{'peak MB':>12}" if peaks else ""))
    for method in runs:
        peak = f"{peaks[method] / 1e6:12.0f}" if peaks else ""
        print(
            f"{method:12}{flops[method] / 1e9:12.1f}{statistics.median(times[method]) * 1e3:12.0f}{kept[method] / 1e6:12.1f}{peak}"
        )


if __name__ == "__main__":
    main()

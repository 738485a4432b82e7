"""Whether the regime that AFD is made for exists on the lights: the preconditions of every comparison there, in one table.

    python -m benchmarks.regime [--many FILE] [--few FILE] [--clips 16] [--iterations 100] [--lr 0.003] [--seeds 5]

1. The many-step student is good at many steps and bad at the few of the student that was distilled from it.
2. The distilled student is good at these few steps.
3. Flow-matching regression (SFT's update) on the distilled student's *own* samples hurts it already. They can teach it nothing
   new, so what is lost is lost to regression.

Clips of the held-out prompts, judged against the wrong world that both students have learnt; that world's own clips come first. Mean and
standard deviation over --seeds of the noise, and of the regression's clips and updates.
"""

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor

from afd_fast.config import TrainConfig, with_values
from afd_fast.judges import JUDGES
from afd_fast.students.toy import shipped
from afd_fast.students.toy.family import of_student
from afd_fast.students.toy.model import ToyStudent
from afd_fast.students.toy.pretrain import WRONG_ELASTICITY, WRONG_GRAVITY
from afd_fast.teachers import lights
from afd_fast.teachers.dataset import Shard
from afd_fast.training import compare, runs
from afd_fast.training.loop import train_step
from afd_fast.training.rollouts import clip, sample_policy
from afd_fast.training.run import Run
from afd_fast.training.state import generator, new_state
from afd_fast.video_io import to_uint8
from benchmarks.rows import over_seeds, ranged, refusals

SCORES = ("general", "size", "light", "shape", "sharp", "motion", "dynamic_px", "diversity_px", "frechet", "flicker")


def run_of(config: TrainConfig, student: ToyStudent, keys: Mapping[str, Any] = MappingProxyType({})) -> Run:
    """A run of SFT on a copy of the student. keys: of the configuration."""
    (variant,) = compare.methods(config, ["sft"])
    config = with_values(config, {**variant.keys, **keys})
    return Run(config, new_state(config, of_student(copy.deepcopy(student))))


def clips_of(run: Run, prompts: Sequence[str], number: int) -> Tensor:
    """Clips [N, 3, F, H, W] uint8 of a run's averaged student; number: of their noise."""
    return to_uint8(clip(run, sample_policy(run, prompts, generator(0, number, "regime"), average=True)))


def regressed(
    config: TrainConfig, few: ToyStudent, prompts: Sequence[str], iterations: int, lr: float, seed: int
) -> Run:
    """A run that has learnt by SFT from the clips of the distilled student itself, new ones at every iteration."""
    source = run_of(config, few)
    run = run_of(config, few, {"iterations": iterations, "update.lr": lr, "seed": seed})
    rows = config.prompts_per_step * config.rollouts_per_prompt
    for step in range(iterations):
        words = [prompts[i] for i in np.random.default_rng([1 + seed, step]).integers(len(prompts), size=rows)]
        train_step(run, [Shard(0, words, clips_of(source, words, 1 + seed * iterations + step))])
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--many", type=Path, help="many-step student; default: the shipped one")
    parser.add_argument("--few", type=Path, help="few-step student; default: the shipped one")
    parser.add_argument("--clips", type=ranged(int, 1), default=16, help="of each held-out prompt")
    parser.add_argument("--iterations", type=ranged(int, 1), default=100, help="of the regression")
    parser.add_argument("--lr", type=ranged(float, 0), nargs="+", default=[3e-3], help="of the regression")
    parser.add_argument("--seeds", type=ranged(int, 1), default=5)
    args = parser.parse_args()
    config = runs.regime()
    train, held = lights.split_prompts()
    prompts = held * args.clips
    many, few = (shipped.load(file, name=name) for file, name in ((args.many, "lights_many"), (args.few, "lights")))

    def wrong(seed: int) -> Tensor:
        return lights.sample_clips(prompts, np.random.default_rng(seed), WRONG_GRAVITY, WRONG_ELASTICITY)

    def show(name: str, clips: Callable[[int], Tensor]) -> None:
        found = [JUDGES["lights"](clips(seed), prompts, reference) for seed in range(args.seeds)]
        values = np.array([[scores[key] for key in SCORES] for scores in found])
        print(f"| {name} | " + " | ".join(over_seeds(values)) + " |", flush=True)

    def at(steps: int) -> TrainConfig:
        even = tuple(1000 * (1 - i / steps) for i in range(steps))
        return replace(config, rollout=replace(config.rollout, steps=even))

    def sampled(steps: TrainConfig, student: ToyStudent) -> Callable[[int], Tensor]:
        run = run_of(steps, student)
        return lambda seed: clips_of(run, prompts, seed)

    reference = wrong(1000)  # the same whatever --seeds
    print(f"| {len(prompts)} clips of {len(held)} held-out prompts |" + "".join(f" {key} |" for key in SCORES))
    print("|---" * (1 + len(SCORES)) + "|")
    show("the wrong world itself", wrong)
    for steps in (16, 4, 2):
        show(f"many-step student, {steps} even steps", sampled(at(steps), many))
    few_steps = ", ".join(f"{t:g}" for t in config.rollout.steps)
    show(f"many-step student, steps {few_steps}", sampled(config, many))
    show(f"distilled student, steps {few_steps}", sampled(config, few))
    for lr in args.lr:

        def learnt(seed: int, lr: float = lr) -> Tensor:
            return clips_of(regressed(config, few, train, args.iterations, lr, seed), prompts, seed)

        show(f"after {args.iterations} iterations on its own clips, lr {lr:g}", learnt)


if __name__ == "__main__":
    with refusals():
        main()

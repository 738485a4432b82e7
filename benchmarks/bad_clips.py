"""What `afd-fast review` finds of bad clips that were planted among an embedded teacher's, and what they cost its student.

    python -m benchmarks.bad_clips [--world physics lights] [--rate 0.1 0.3] [--seeds 5] [--steps 150]     the tables
    python -m benchmarks.bad_clips --train clean planted reviewed --world physics [--rate 0.3] [--seeds 5] [key=value ...]   students

Four clips of every training prompt (448 of the balls, 128 of the lights). The bad ones are drawn at random, as many of each kind:
frozen (its first frame), black, cut (goes on as a clip of another prompt), prompt (a clip of another prompt), physics (gravity 0.3 to 1.5
instead of 3.0, and bounces that keep 0 to 0.3 of the speed). Precision and recall are of the clips whose weight is below 1.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from afd_fast.config import TrainConfig, with_overrides
from afd_fast.errors import ConfigError
from afd_fast.evaluation.intervals import crossed
from afd_fast.files.text import read_json
from afd_fast.students.student import family
from afd_fast.teachers import lights, physics
from afd_fast.teachers.dataset import collect
from afd_fast.teachers.teacher import PromptSplit, Request, Teacher, TeacherBase
from afd_fast.training import compare, runs, train
from afd_fast.training.review import Reviewed, review
from afd_fast.training.run import Run
from afd_fast.training.run_folder import finished, judged, started
from afd_fast.training.state import new_state
from benchmarks.rows import over_seeds, ranged, refusals

KINDS = ("frozen", "black", "cut", "prompt", "physics")
GRAVITY, ELASTICITY = (0.3, 1.5), {"low": (0.0, 0.3), "high": (0.0, 0.3)}  # of the clips with wrong physics
CLIPS = 4  # of a prompt
STUDENT_SCORES = ("residual_px", "frechet", "general", "gravity")


class World(NamedTuple):
    """An embedded world: its module, its teacher, and the run that distils it."""

    module: ModuleType
    teacher: Teacher
    config: TrainConfig


def world(name: str) -> World:
    if name == "physics":
        return World(physics, physics.PhysicsTeacher(), runs.demo())
    return World(lights, lights.LightsTeacher(), runs.regime())


class Planted(TeacherBase):
    """A world's teacher, bad at `kinds`, with the weights that a review found."""

    def __init__(self, of: World, rate: float, seed: int) -> None:
        self.of, self.fps, self.judge = of, of.teacher.fps, of.teacher.judge
        self.name = f"{of.teacher.name} with {100 * rate:g}% bad clips, {seed}"
        self.prompts: list[str] = of.teacher.split().train
        self.rng = np.random.default_rng([7, seed])
        keys = [Request(prompt, i) for prompt in self.prompts for i in range(CLIPS)]
        bad = self.rng.permutation(len(keys))[: round(rate * len(keys))]
        self.kinds = {keys[i]: KINDS[n % len(KINDS)] for n, i in enumerate(bad)}
        self.bad = {key: self._bad(key, kind) for key, kind in self.kinds.items()}
        self.weights: dict[Request, float] = {}

    def _bad(self, key: Request, kind: str) -> Tensor:
        true = self.of.teacher(*key)
        if kind == "frozen":
            return true[:, :1].expand_as(true)
        if kind == "black":
            return torch.zeros_like(true)
        if kind == "physics":
            return self._drawn(key.prompt, gravity=GRAVITY, elasticity=ELASTICITY)
        other = self._drawn(self.rng.choice([prompt for prompt in self.prompts if prompt != key.prompt]))
        if kind == "prompt":
            return other
        frames = true.shape[1]
        at = int(self.rng.integers(frames // 3, frames - frames // 3))
        return torch.cat([true[:, :at], other[:, at:]], 1)

    def _drawn(self, prompt: str, **wrong: object) -> Tensor:
        clips: Tensor = self.of.module.sample_clips([prompt], self.rng, **wrong)
        return clips[0].float() / 255

    def __call__(self, prompt: str, seed: int) -> Tensor:
        found = self.bad.get(Request(prompt, seed))
        return self.of.teacher(prompt, seed) if found is None else found

    def split(self) -> PromptSplit:
        return self.of.teacher.split()

    def seeds(self, prompt: str, wanted: Iterable[int]) -> list[int]:
        return [seed for seed in wanted if self.weights.get(Request(prompt, seed), 1.0) > 0]

    def weight(self, prompt: str, seed: int) -> float:
        return self.weights.get(Request(prompt, seed), 1.0)


class _TrainingClips(Planted):
    """Only the prompts that are trained on."""

    def split(self) -> PromptSplit:
        return PromptSplit(self.prompts, self.prompts[:1])


def track(items: Sequence, about: str) -> Sequence:
    return items


def reviewed(of: World, teacher: Planted, steps: int) -> list[Reviewed]:
    """The review of a planted teacher's training clips."""
    config = of.config
    run = Run(config, new_state(config, family(config.student, chunk=config.rollout.chunk, seed=config.seed)))
    return review(run, collect(teacher, CLIPS, None, track), track, steps)


def table(name: str, rate: float, seeds: int, steps: int) -> None:
    """A row of the table: precision, recall, and recall by kind, over the seeds."""
    of, rows = world(name), []
    for seed in range(seeds):
        teacher = _TrainingClips(of, rate, seed)
        listed = [Request(x.prompt, x.number) for x in reviewed(of, teacher, steps) if x.weight < 1]
        found = Counter(teacher.kinds.get(key, "good") for key in listed)
        planted = Counter(teacher.kinds.values())
        hits = len(listed) - found["good"]
        row = [hits / len(listed), hits / len(teacher.kinds), *(found[kind] / planted[kind] for kind in KINDS)]
        rows.append(row)
        print(f"  seed {seed}: {len(listed)} listed, {dict(found)}, planted {dict(planted)}", flush=True)
    mean, low, high = (f(np.array(rows), 0) for f in (np.mean, np.min, np.max))
    cells = [f"{m:.2f} ({a:.2f} to {b:.2f})" for m, a, b in zip(mean, low, high)]
    print(f"| {name}, {rate:.0%} | " + " | ".join(cells) + " |", flush=True)


def planned(
    name: str, rate: float, kinds: Sequence[str], seeds: int, steps: int, keys: list[str], out: Path
) -> dict[str, dict[Path, TrainConfig]]:
    """By kind of teacher clips, the folder and the configuration of every seed's run. ConfigError where a folder holds another run."""
    config = with_overrides(replace(world(name).config, teacher_clips=CLIPS), keys)
    if config.teacher_clips != CLIPS:
        raise ConfigError(
            f"teacher_clips={config.teacher_clips}: bad clips are planted among {CLIPS} of a prompt, leave it out"
        )
    marks = {"clean": "", "planted": f" {rate:g}", "reviewed": f" {rate:g}, {steps} steps"}
    return {
        which: compare.runs(config, [compare.Variant(f"{name} {which}{marks[which]}")], seeds, out) for which in kinds
    }


def student(name: str, rate: float, which: str, steps: int, folder: Path, config: TrainConfig) -> None:
    """Train on the clips as they should be, with the bad ones, or with the weights that a review gives them. A run that is finished stays
    as it is, and one that was stopped goes on."""
    if finished(folder, config):
        return
    of = world(name)
    teacher = Planted(of, 0.0 if which == "clean" else rate, config.seed)
    if which == "reviewed":
        found = reviewed(of, _TrainingClips(of, rate, config.seed), steps)
        teacher.weights = {Request(x.prompt, x.number): x.weight for x in found}
    begun = started(folder)
    train(config, out=folder, resume=begun, overwrite=not begun, teacher=teacher, console=Console(quiet=True))


def students(name: str, rate: float, kinds: Sequence[str], seeds: int, steps: int, keys: list[str], out: Path) -> None:
    """The table of what bad clips cost: a row for the base student and for each kind of teacher clips, over the seeds."""
    plan = planned(name, rate, kinds, seeds, steps, keys, out)
    for which, of_kind in plan.items():
        for folder, config in of_kind.items():
            student(name, rate, which, steps, folder, config)
    first, *_ = next(iter(plan.values()))
    base = read_json(first / "result.json")["rows"]["base"]
    print(f"| {name}, {rate:.0%} bad | " + " | ".join(STUDENT_SCORES) + " | residual_px, 95 % over prompts and seeds |")
    print("|---" * (2 + len(STUDENT_SCORES)) + "|")
    print("| (base student) | " + " | ".join(f"{base[key]:.3f}" for key in STUDENT_SCORES) + " | |")
    for which, of in plan.items():
        rows = [read_json(folder / "result.json")["rows"]["student"] for folder in of]
        last = [judged(folder, config.iterations)[-1]["by_prompt"] for folder, config in of.items()]
        low, high = crossed(np.array(last))
        values = np.array([[row[key] for key in STUDENT_SCORES] for row in rows])
        print(f"| {which} | " + " | ".join(over_seeds(values)) + f" | {low:.2f} to {high:.2f} |")


def check_rate(name: str, rate: float) -> None:
    """ConfigError where not every kind gets a bad clip."""
    clips = CLIPS * len(world(name).teacher.split().train)
    if (bad := round(rate * clips)) < len(KINDS):
        raise ConfigError(
            f"--rate {rate:g} of the {clips} clips of {name} is {bad}: give at least {len(KINDS) / clips:.2g}, one for each kind"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", nargs="+", choices=("physics", "lights"), default=["physics", "lights"])
    parser.add_argument("--rate", nargs="+", type=ranged(float, 0, 1), help="default: 0.1 0.3, with --train 0.3")
    parser.add_argument("--seeds", type=ranged(int, 1), default=5)
    parser.add_argument("--steps", type=ranged(int, 0), default=150)
    parser.add_argument("--train", nargs="+", choices=("clean", "planted", "reviewed"))
    parser.add_argument("--out", type=Path, default=Path("runs/bad-clips"))
    parser.add_argument("keys", nargs="*", help="key=value of the students' runs")
    args = parser.parse_intermixed_args()
    if args.keys and not args.train:
        parser.error(f"{args.keys[0]} is for the students' runs: give --train too")
    rates = args.rate or ([0.3] if args.train else [0.1, 0.3])
    for name in args.world:
        for rate in rates:
            check_rate(name, rate)
    if args.train:
        for name in args.world:
            for rate in rates:
                students(name, rate, args.train, args.seeds, args.steps, args.keys, args.out)
        return
    print("| world, bad clips | precision | recall | " + " | ".join(KINDS) + " |")
    print("|---" * (3 + len(KINDS)) + "|")
    for name in args.world:
        for rate in rates:
            table(name, rate, args.seeds, args.steps)


if __name__ == "__main__":
    with refusals():
        main()

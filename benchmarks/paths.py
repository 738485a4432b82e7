"""Where training takes the student: physics against diversity and against general quality, from evaluation to evaluation.

    python -m benchmarks.paths runs/compare-regime 'runs/budget/afd 128' [--out paths.png]

Each argument is a comparison folder, of which every method is drawn, or one method of one: its runs without the seed. A line is the mean
over the seeds, a small point an evaluation of one seed, the large one the end.
"""

import argparse
import re
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from afd_fast.errors import ConfigError
from afd_fast.files.text import read_json
from afd_fast.reports.run import read_result
from afd_fast.reports.scores import name_of
from afd_fast.training.run_folder import in_common, judged
from benchmarks.rows import picture, refusals

matplotlib.use("Agg")
import matplotlib.pyplot as plt

X = {"diversity_px": "diversity over seeds, px", "general": "general quality"}
Y = "residual_px"


def methods(place: Path) -> dict[str, list[Path]]:
    """The run folders of each method of a comparison, or of `place`, which names one of them. ConfigError where there is none."""
    found = sorted(place.glob("*-*")) if place.is_dir() else sorted(place.parent.glob(f"{place.name}-*"))
    runs: dict[str, list[Path]] = {}
    for folder in found:
        name = re.fullmatch(r"(.+)-\d+", folder.name)
        if name and (folder / "result.json").exists():
            runs.setdefault(name[1], []).append(folder)
    if not runs:
        raise ConfigError(f"{place} holds no finished runs of a comparison")
    return runs


def label(folder: Path) -> str:
    """What a run's method is called."""
    config = read_json(folder / "config.json")
    name, r = name_of(config["method"]), config.get("teacher_r")
    return name if r is None else f"{name}, teacher_r={r}"


def origin(folder: Path) -> str:
    """Which runs these are: the folder without the seed."""
    return folder.with_name(folder.name.rpartition("-")[0]).as_posix()


def read(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A run's evaluations, and its teacher's scores. ConfigError where they are not there, or not what is drawn."""
    result = read_result(folder)
    evaluations, teacher = judged(folder, result["config"]["iterations"]), result["rows"]["teacher"]
    if missing := [key for key in (*X, Y) if key not in teacher]:
        raise ConfigError(
            f"{folder} has no {' and no '.join(missing)}: the lights' judge has it, so give runs of `regime`"
        )
    return evaluations, teacher


def draw(runs: dict[str, list[Path]], file: Path) -> None:
    read_runs = {name: [read(folder) for folder in folders] for name, folders in runs.items()}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for axis, (key, title) in zip(axes, X.items()):
        for number, (name, of_method) in enumerate(read_runs.items()):
            judgements = in_common([evaluations for evaluations, _ in of_method])
            points = np.array([[(e[key], e[Y]) for e in run] for run in judgements])  # [seeds, n, 2]
            colour, mean = f"C{number}", points.mean(0)
            axis.plot(*mean.T, color=colour, lw=1.6, label=name)
            axis.plot(*points[:, 1:].reshape(-1, 2).T, ".", color=colour, ms=4, alpha=0.5)
            axis.plot(*mean[-1], "o", color=colour, ms=8)
        teacher = of_method[0][1]
        axis.plot(*mean[0], "ks", ms=8, label="base student")
        axis.plot(teacher[key], teacher[Y], "k*", ms=13, label="teacher")
        axis.set_xlabel(title, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("physics residual, px: lower is better", fontsize=9)
    axes[1].legend(fontsize=8, frameon=False, loc="lower left")
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=picture, default=Path("paths.png"))
    args = parser.parse_args()
    runs = [(label(folders[0]), folders) for place in args.runs for folders in methods(place).values()]
    times = Counter(name for name, _ in runs)
    found = {name if times[name] == 1 else f"{name} ({origin(folders[0])})": folders for name, folders in runs}
    draw(found, args.out)
    print(f"{args.out}: {', '.join(f'{name} ({len(folders)} runs)' for name, folders in found.items())}")


if __name__ == "__main__":
    with refusals():
        main()

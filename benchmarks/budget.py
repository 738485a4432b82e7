"""Physics, dynamic degree, diversity and general quality against the number of teacher clips bought, SFT beside AFD on the lights.

    python -m benchmarks.budget [--clips 16 32 64 128 448] [--seeds 5] [--jobs 2] [--out runs/budget] [key=value ...]

AFD is the run `regime` with teacher_r=0.75. A budget below the world's 32 training prompts is so many prompts with one clip each, and
above them as many clips of each prompt. The judge's clips of the held-out prompts are not counted. The same command again continues;
--out gets comparison.json and budget.png, with bands from the lowest to the highest seed.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from rich.console import Console

from afd_fast.config import TrainConfig
from afd_fast.errors import ConfigError
from afd_fast.evaluation.intervals import crossed
from afd_fast.teachers import lights
from afd_fast.training import compare
from benchmarks.rows import over_seeds, ranged, refusals

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METHODS = {"sft": ("SFT", "#d97706"), "afd": ("AFD, teacher_r=0.75", "#3b82f6")}
SCORES = {
    "residual_px": "physics residual, px: lower is better",
    "dynamic_px": "dynamic degree, px per frame",
    "diversity_px": "diversity over seeds, px",
    "general": "general quality",
}


def keys_of(clips: int) -> dict[str, int | None]:
    """The configuration that asks the teacher for so many clips of training prompts. ConfigError where none does."""
    prompts = len(lights.split_prompts()[0])
    if clips <= prompts:
        return {"teacher_prompts": clips, "teacher_clips": 1}
    if clips % prompts:
        raise ConfigError(f"{clips} clips cannot be shared among {prompts} prompts: give a multiple of {prompts}")
    return {"teacher_prompts": None, "teacher_clips": clips // prompts}


def variants(config: TrainConfig, budgets: list[int]) -> list[compare.Variant]:
    """Every method at every budget."""
    of_method = compare.methods(config, list(METHODS), {"afd": ["teacher_r=0.75"]})
    return [compare.Variant(f"{v.label} {clips}", {**v.keys, **keys_of(clips)}) for clips in budgets for v in of_method]


def draw(rows: dict[str, Any], budgets: list[int], file: Path) -> None:
    """The picture of comparison.json's rows."""
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.4), layout="constrained")
    for axis, (key, title) in zip(axes, SCORES.items()):
        for method, (label, colour) in METHODS.items():
            of = [rows[f"{method} {clips}"][key] for clips in budgets]
            axis.plot(budgets, [x["mean"] for x in of], "o-", color=colour, label=label)
            low, high = ([end(x["values"]) for x in of] for end in (min, max))
            axis.fill_between(budgets, low, high, color=colour, alpha=0.18, lw=0)
        for row, style in (("base", ":"), ("teacher", "--")):
            axis.axhline(
                rows[row][key]["mean"], color="#555", ls=style, lw=1, label=f"{row} student" if row == "base" else row
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(budgets, [str(b) for b in budgets])
        axis.minorticks_off()
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("teacher clips bought", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[0].legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 0.1))
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the run")
    parser.add_argument("--clips", type=ranged(int, 1), nargs="+", default=[16, 32, 64, 128, 448])
    parser.add_argument("--seeds", type=ranged(int, 1), default=5)
    parser.add_argument("--jobs", type=ranged(int, 1), default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/budget"))
    args = parser.parse_args()
    budgets = sorted(set(args.clips))
    found = compare.compare(
        "regime", args.overrides, lambda config: variants(config, budgets), args.seeds, args.out, jobs=args.jobs, console=Console()
    )  # fmt: skip
    rows = found["rows"]
    draw(rows, budgets, args.out / "budget.png")
    shown = [*SCORES, "frechet", "gravity"]
    print("| method, clips |" + "".join(f" {key} |" for key in shown) + " residual_px, 95 % over prompts and seeds |")
    for label, scores in rows.items():
        cells = over_seeds(np.array([scores[key]["values"] for key in shown]).T)
        interval = ""
        if label != "teacher":
            low, high = crossed(np.array(found["by_prompt"][label]))
            interval = f" {low:.2f} to {high:.2f}"
        print(f"| {label} | " + " | ".join(cells) + f" |{interval} |")


if __name__ == "__main__":
    with refusals():
        main()

"""A comparison folder -> table for the terminal and one self-contained comparison.html."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from afd_fast.errors import extra
from afd_fast.files.text import read_json
from afd_fast.reports.run import METHODS, SCORES, read_samples, side_by_side, smooth, style, svg
from afd_fast.training.run_folder import read_rows

with extra("train"):
    import matplotlib.pyplot as plt
    from jinja2 import Environment, PackageLoader, select_autoescape
    from rich.markup import escape
    from rich.table import Table

PROMPTS = 6  # shown
EDGE = {"base": "#8a8f98", "teacher": "#16a34a"}
TRACES = {  # of training: key -> title
    "pair_r": "r = sigmoid(D(student) − D(teacher)) in training",
    "reward_std_in_prompt": "spread of D within a prompt",
    "grad_norm": "gradient norm of the student",
}


def name(label: str) -> str:
    return METHODS.get(label, label)


def table(comparison: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """(column titles, (row label, cells)): mean ± standard deviation over seeds; one value where there is no spread."""
    rows = comparison["rows"]
    keys = [k for k in SCORES if k in rows["base"]] + ["seconds"]

    def cell(score: Mapping[str, Any] | None) -> str:
        if score is None:
            return ""
        digits = 0 if score["mean"] > 20 else 3
        spread = "" if score["sd"] is None else f" ± {score['sd']:.{digits}f}"
        return f"{score['mean']:.{digits}f}{spread}"

    titles = [SCORES[k][0].strip() if k in SCORES else "seconds" for k in keys]
    return titles, [(name(label), [cell(row.get(k)) for k in keys]) for label, row in rows.items()]


def console_table(comparison: Mapping[str, Any]) -> Table:
    """The table on its side: one line a score, one column a method."""
    titles, rows = table(comparison)
    seeds = comparison["seeds"]
    shown = Table(
        title=f"held-out prompts, {comparison['clips_judged']} clips per run, seeds {seeds[0]}..{seeds[-1]}",
        title_justify="left",
    )
    shown.add_column("score")
    for label, _ in rows:
        shown.add_column(escape(label), justify="right")
    for index, title in enumerate(titles):
        shown.add_row(title, *(cells[index] for _, cells in rows))
    return shown


def curves(comparison: Mapping[str, Any], out: Path) -> str:
    """Held-out scores over the iterations (mean, band from the lowest to the highest seed) and what to watch of the
    discriminator, as SVG."""
    rows = comparison["rows"]
    judged = "residual_px" in rows["base"]
    keys = ("residual_px", "frechet", "general") if judged else ("dynamic", "frechet", "contrast")
    labels = [label for label in rows if label not in EDGE]
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.8), layout="constrained")
    for index, label in enumerate(labels):
        folders = [out / run for run in comparison["runs"] if run.rpartition("-")[0] == label]
        color = f"C{index}"
        evaluations = [read_rows(f / "evaluations.jsonl") for f in folders]
        steps = sorted(
            set.intersection(*({e["step"] for e in run} for run in evaluations))
        )  # damaged rows are left out
        evaluations = [[e for e in run if e["step"] in steps] for run in evaluations]
        for axis, key in zip(axes[0], keys):
            values = np.array([[e[key] for e in run] for run in evaluations])
            axis.plot(steps, values.mean(0), "o-", color=color, ms=3, lw=1.4, label=name(label))
            axis.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
        metrics = read_rows(folders[0] / "metrics.jsonl")
        for axis, key in zip(axes[1], TRACES):
            if key in metrics[-1]:
                trace = smooth([m.get(key, math.nan) for m in metrics])
                axis.plot([m["step"] + 1 for m in metrics], trace, color=color, lw=1.2)
    for axis, key in zip(axes[0], keys):
        for label, color in EDGE.items():
            axis.axhline(rows[label][key]["mean"], color=color, lw=1, ls="--", label=label)
        style(axis, SCORES[key][0].split(" (")[0])
    for axis, title in zip(axes[1], TRACES.values()):
        style(axis, title)
    axes[1, 2].set_yscale("log")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=8, frameon=False
    )
    return svg(figure)


def write_report(out: str | Path) -> Path:
    """comparison.html of a folder that `compare.gather` finished."""
    out = Path(out)
    comparison = read_json(out / "comparison.json")
    firsts: dict[str, Path] = {}  # label -> the first seed's run folder
    for run in comparison["runs"]:
        firsts.setdefault(run.rpartition("-")[0], out / run)
    panels: dict[str, Tensor] = {}
    prompts: list[str] = []
    for label, folder in firsts.items():
        prompts, clips = read_samples(folder)
        panels.setdefault("base", clips["base"])
        panels[label], teacher = clips["student"], clips["teacher"]
    panels["teacher"] = teacher
    videos = [
        {"prompt": prompt, "strip": side_by_side([clips[0, p] for clips in panels.values()], fps=6, zoom=8)}
        for p, prompt in enumerate(prompts[:PROMPTS])
    ]
    titles, rows = table(comparison)
    template = Environment(loader=PackageLoader("afd_fast", "assets"), autoescape=select_autoescape()).get_template(
        "comparison.html"
    )
    path = out / "comparison.html"
    path.write_text(
        template.render(
            comparison=comparison, titles=titles, rows=rows, curves=curves(comparison, out), videos=videos,
            names=[name(label) for label in panels],
        )
    )  # fmt: skip
    return path

"""A comparison folder -> table for the terminal, and comparison.html: what is better or worse, over the seeds."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from afd_fast.errors import extra
from afd_fast.evaluation.intervals import NONE, Interval, crossed
from afd_fast.files.text import read_json
from afd_fast.reports.figures import shown_scores, smooth, style, subplots, svg
from afd_fast.reports.media import Clip, videos
from afd_fast.reports.run import Samples, open_samples, template
from afd_fast.reports.scores import NO_VALUE, SCORES, WHY, gain, label_of, name_of, signed
from afd_fast.training.run_folder import in_common, read_rows

with extra("train"):
    from rich.markup import escape
    from rich.table import Table

PROMPTS = 6  # shown
BOOTSTRAP = "95 % over prompts and seeds"  # of the score above
# Student's t, 97.5 % point, for 1, 2, ... degrees of freedom
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110,
        2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip
EDGE = {"base": "#8a8f98", "teacher": "#16a34a"}
TRACES = {  # of training: key -> title
    "pair_r": "r = sigmoid(D(student) − D(teacher)) in training",
    "reward_std_in_prompt": "spread of D within a prompt",
    "grad_norm": "gradient norm of the student",
}


def reference(rows: Mapping[str, Any]) -> str | None:
    """The method that the others are compared with, seed by seed: AFD, or the first of an ablation."""
    trained = [label for label in rows if label not in EDGE]
    return "afd" if "afd" in trained else next(iter(trained), None)


def interval(differences: Sequence[float]) -> Interval:
    """95 % interval of the mean of n differences, by Student's t with n - 1 degrees of freedom; nan for fewer than two."""
    n = len(differences)
    if n < 2:
        return NONE
    half = (T975[n - 2] if n - 2 < len(T975) else 1.96) * np.std(differences, ddof=1) / math.sqrt(n)
    return Interval(float(np.mean(differences) - half), float(np.mean(differences) + half))


class Cell(NamedTuple):
    """A score of a method: mean ± standard deviation over seeds; one value where there is no spread. mark: better or worse
    than the base student, where the interval of the change says so. why: the reason of what could not be computed."""

    text: str
    mark: str = ""
    why: str = ""


class Line(NamedTuple):
    """A score: its name, and a cell for every method."""

    name: str
    cells: list[Cell]


def _digits(value: float) -> int:
    return 0 if value > 20 else 3


def _cell(key: str, label: str, rows: Mapping[str, Any]) -> Cell:
    score, better = rows[label].get(key), ""
    if score is None:
        return Cell("")
    if not math.isfinite(score["mean"]):
        return Cell(NO_VALUE, why=WHY.get(key, "its value is not finite"))
    digits = _digits(score["mean"])
    spread = "" if score["sd"] is None else f" ± {score['sd']:.{digits}f}"
    if label not in EDGE and key in SCORES:
        base, teacher = rows["base"][key]["mean"], rows["teacher"].get(key, {}).get("mean", math.nan)
        low, high = interval([gain(key, base, value, teacher) for value in score["values"]])
        better = "better" if low > 0 else "worse" if high < 0 else ""
    return Cell(f"{score['mean']:.{digits}f}{spread}", better)


def _interval(values: Sequence[Sequence[float]]) -> Cell:
    low, high = crossed(np.array(values)) if values and all(values) else NONE  # an older version's runs have none
    return Cell(f"{low:.{_digits(low)}f} to {high:.{_digits(high)}f}" if math.isfinite(low) else "")


def table(comparison: Mapping[str, Any]) -> tuple[list[str], list[Line]]:
    """(methods, a line per score)."""
    rows = comparison["rows"]
    keys = [key for key in SCORES if key in rows["base"]]
    lines = [Line(label_of(key, rows["base"]).strip(), [_cell(key, label, rows) for label in rows]) for key in keys]
    if "by_prompt" in comparison:  # not in a comparison of an older version
        lines.insert(1, Line(BOOTSTRAP, [_interval(comparison["by_prompt"].get(label, [])) for label in rows]))
    lines.append(Line("seconds", [_cell("seconds", label, rows) for label in rows]))
    return [name_of(label) for label in rows], lines


class Difference(NamedTuple):
    """A score of a method minus the reference's, seed by seed."""

    method: str
    score: str
    mean: float
    low: float
    high: float
    mark: str


def paired(comparison: Mapping[str, Any]) -> list[Difference]:
    """Every method against the reference, over the seeds that both have: mean difference, 95 % interval, and whether it
    is better or worse. Empty for one seed or one method."""
    rows, found = comparison["rows"], []
    first = reference(rows)
    others = [label for label in rows if label not in EDGE and label != first]
    for label in others if first else ():
        for key in shown_scores(rows["base"]):
            mine, theirs = rows[label][key]["values"], rows[first][key]["values"]
            low, high = interval([a - b for a, b in zip(mine, theirs)])
            if math.isfinite(low):
                teacher = rows["teacher"].get(key, {}).get("mean", math.nan)
                gains = interval([gain(key, b, a, teacher) for a, b in zip(mine, theirs)])
                mark = "better" if gains.low > 0 else "worse" if gains.high < 0 else "cannot be told apart"
                score = label_of(key, rows["base"]).split(" (")[0]
                found.append(Difference(name_of(label), score, float(np.mean(mine) - np.mean(theirs)), low, high, mark))
    return found


def verdict(comparison: Mapping[str, Any]) -> str:
    """One sentence: which methods are better than the base student in the first score, over the seeds."""
    rows, seeds = comparison["rows"], len(comparison["seeds"])
    key = shown_scores(rows["base"])[0]
    score = label_of(key, rows["base"]).partition(",")[0]
    trained = [label for label in rows if label not in EDGE]
    shown = ", ".join(f"{name_of(label)} {_cell(key, label, rows).text}" for label in trained)
    values = f"{score.capitalize()}: {shown}; base student {rows['base'][key]['mean']:.3f}"
    if seeds < 2:
        return f"{values}. One seed gives no interval: --seeds 3 tells chance from change."
    better = [name_of(label) for label in trained if _cell(key, label, rows).mark == "better"]
    if not better:
        return f"No method is better than the base student with 95 % confidence over {seeds} seeds. {values}."
    verb = "is" if len(better) == 1 else "are"
    return f"{', '.join(better)} {verb} better than the base student (95 % interval over {seeds} seeds). {values}."


def console_table(comparison: Mapping[str, Any]) -> Table:
    """One line per score, one column per method; ▲ better and ▼ worse than the base student, over the seeds."""
    names, lines = table(comparison)
    seeds = comparison["seeds"]
    shown = Table(
        title=f"held-out prompts, {comparison['clips_judged']} clips per run, seeds {seeds[0]}..{seeds[-1]}",
        title_justify="left",
        caption="▲ better, ▼ worse than the base student: 95 % interval over the seeds" if len(seeds) > 1 else None,
        caption_justify="left",
    )
    shown.add_column("score")
    for label in names:
        shown.add_column(escape(label), justify="right")
    marks = {"better": " ▲", "worse": " ▼", "": ""}
    for line in lines:
        shown.add_row(line.name, *(cell.text + marks[cell.mark] for cell in line.cells))
    return shown


def _evaluations(comparison: Mapping[str, Any], label: str, out: Path) -> tuple[list[int], list[list[dict[str, Any]]]]:
    """(steps that every run of a method was judged at, their rows of every run); damaged rows are left out."""
    folders = [out / run for run in comparison["runs"] if run.rpartition("-")[0] == label]
    found = in_common([read_rows(folder / "evaluations.jsonl") for folder in folders])
    return [e["step"] for e in found[0]], found


def curves(comparison: Mapping[str, Any], out: Path) -> str:
    """Held-out scores over the iterations (mean, and a thin line for every seed), their differences to the reference seed
    by seed, and what to watch of the discriminator, as SVG."""
    rows = comparison["rows"]
    keys, first = shown_scores(rows["base"]), reference(rows)
    labels = [label for label in rows if label not in EDGE]
    found = {label: _evaluations(comparison, label, out) for label in labels}
    pairs = len(labels) > 1
    figure, axes = subplots(2 + pairs, 3, 5.8 + 2.9 * pairs)
    for index, label in enumerate(labels):
        color, (steps, evaluations) = f"C{index}", found[label]
        for column, key in enumerate(keys):
            values = np.array([[e[key] for e in run] for run in evaluations])
            _lines(axes[0, column], steps, values, color, name_of(label))
            if label != first and first is not None and found[first][0] == steps:
                theirs = np.array([[e[key] for e in run] for run in found[first][1]])
                both = min(len(values), len(theirs))
                _lines(axes[1, column], steps, values[:both] - theirs[:both], color, name_of(label))
        folder = out / next(run for run in comparison["runs"] if run.rpartition("-")[0] == label)
        metrics = read_rows(folder / "metrics.jsonl")
        for axis, key in zip(axes[-1], TRACES):
            if metrics and key in metrics[-1]:
                trace = smooth([m.get(key, math.nan) for m in metrics])
                axis.plot([m["step"] + 1 for m in metrics], trace, color=color, lw=1.2)
    for column, key in enumerate(keys):
        score = label_of(key, rows["base"]).split(" (")[0]
        for label, color in EDGE.items():
            axes[0, column].axhline(rows[label][key]["mean"], color=color, lw=1, ls="--", label=label)
        style(axes[0, column], score)
        if pairs:
            axes[1, column].axhline(0, color=EDGE["base"], lw=1, ls="--")
            style(axes[1, column], f"minus {name_of(first or '')}, seed by seed")
    for axis, title in zip(axes[-1], TRACES.values()):
        style(axis, title)
    axes[-1, 2].set_yscale("log")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=8, frameon=False
    )
    return svg(
        figure, "Curves over the iterations: scores of every method, differences seed by seed, the discriminator"
    )


def _lines(axis: Any, steps: list[int], values: np.ndarray, color: str, label: str) -> None:
    """The mean over seeds [seeds, steps], and every seed."""
    axis.plot(steps, values.mean(0), "o-", color=color, ms=3, lw=1.6, label=label)
    if len(values) > 1:
        axis.plot(steps, values.T, color=color, lw=0.6, alpha=0.5)


def clips_of(samples: Mapping[str, Samples]) -> Iterator[Clip]:
    """The first clip of every method for a prompt, next to each other: {label: the samples of its first seed}."""
    first = next(iter(samples.values()))
    names = ", ".join(["base student", *map(name_of, samples), "teacher"])
    for p, prompt in enumerate(first.prompts[:PROMPTS]):
        panels = [
            first.clip("base", 0, p),
            *(s.clip("student", 0, p) for s in samples.values()),
            first.clip("teacher", 0, p),
        ]
        yield Clip(panels, f"{prompt}: {names}, next to each other")


def write_report(out: str | Path) -> Path:
    """comparison.html of a folder that `compare.gather` finished, and comparison.videos where they do not fit into it."""
    out = Path(out)
    path, comparison = out / "comparison.html", read_json(out / "comparison.json")
    firsts: dict[str, Path] = {}  # label -> the first seed's run folder
    for run in comparison["runs"]:
        firsts.setdefault(run.rpartition("-")[0], out / run)
    with contextlib.ExitStack() as stack:
        samples = {label: stack.enter_context(open_samples(folder)) for label, folder in firsts.items()}
        first = next(iter(samples.values()))
        made, prompts = videos(clips_of(samples), first.fps, path), first.prompts[:PROMPTS]
    names, lines = table(comparison)
    html = template("comparison.html").render(
        comparison=comparison, names=names, lines=lines, paired=paired(comparison), signed=signed, verdict=verdict(comparison),
        reference=name_of(reference(comparison["rows"]) or ""), curves=curves(comparison, out), videos=list(zip(prompts, made)),
        panels=["base", *map(name_of, firsts), "teacher"],
    )  # fmt: skip
    path.write_text(html, encoding="utf-8")
    return path

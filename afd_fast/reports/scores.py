"""What the scores of a run say: the rows of its table, and one sentence with an interval."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from afd_fast.errors import extra
from afd_fast.evaluation.intervals import Interval, bootstrap

with extra("train"):
    from rich.table import Table

METHODS = {"afd": "AFD", "sft": "SFT", "gan": "GAN", "dmd": "score-free DMD", "rejection": "rejection sampling"}
Better = Literal["low", "high", "teacher"]  # what is better: less, more, or closer to the teacher
Mark = Literal["better", "worse", ""]
SCORES: dict[str, tuple[str, Better]] = {
    "residual_px": ("physics residual, px", "low"),
    "energy_error": ("energy error, of a fall through the box", "low"),
    "frechet": ("Fréchet distance of trajectories", "low"),
    "gravity": ("measured gravity, box/s²", "teacher"),
    "gravity_error": ("gravity error, relative", "low"),
    "bounce_high": ("elasticity where the prompt says high", "teacher"),
    "bounce_low": ("elasticity where the prompt says low", "teacher"),
    "dynamic_px": ("dynamic degree, px/frame", "teacher"),
    "diversity_px": ("distance of two clips of a prompt, px", "teacher"),
    "general": ("general quality (mean of the indented rows)", "high"),
    "color": ("  color matches", "high"),
    "size": ("  size matches", "high"),
    "light": ("  light matches", "high"),
    "shape": ("  shape is a disc", "high"),
    "sharp": ("  edges are sharp", "high"),
    "motion": ("  motion matches", "high"),
    "flicker": ("background flicker, %", "low"),
    "background": ("background brightness", "teacher"),
    "first_residual_px": ("first domain: physics residual, px", "low"),
    "first_general": ("first domain: general quality", "high"),
    "first_background": ("first domain: background brightness", "low"),
    "dynamic": ("dynamic degree, % of range per frame", "teacher"),
    "brightness": ("brightness", "teacher"),
    "contrast": ("contrast", "teacher"),
}
FLIGHT = "no clip shows two frames of free flight"
REBOUND = "no clip of such a prompt shows a fall and a rebound"
WHY = {  # a score that is not a number
    "diversity_px": "no prompt has two clips: set evaluation.rollouts=2 or more",
    "frechet": "needs two clips on each side: of the student evaluation.rollouts times the held-out prompts, of the teacher the videos of "
               "the held-out prompts",
    "gravity": FLIGHT, "gravity_error": FLIGHT, "bounce_high": REBOUND, "bounce_low": REBOUND,
}  # fmt: skip
DIGITS = 3
NO_VALUE = "–"


def signed(value: float) -> str:
    """A change with its sign, or 0 where its digits show nothing."""
    text = f"{value:+.{DIGITS}f}"
    return text if float(text) else "0"


class Row(NamedTuple):
    """A line of the table. mark: better, worse, or empty where the change cannot be seen or computed. why: the reason of
    a value that could not be computed, or empty."""

    key: str
    label: str
    base: str
    student: str
    teacher: str
    change: str
    mark: Mark
    why: str


def name_of(method: str) -> str:
    """A method in words; a registered one's own name."""
    return METHODS.get(method, method)


def label_of(key: str, rows: Mapping[str, Any]) -> str:
    """A score's name. Without a simulator the Fréchet distance is one of colours and motion."""
    if key == "frechet" and "residual_px" not in rows:
        return "Fréchet distance of colours and motion"
    return SCORES[key][0]


def gain(key: str, base: float, student: float, teacher: float) -> float:
    """How much better the student's value is than the base student's; negative: worse; nan: nobody can tell."""
    better = SCORES[key][1]
    if better == "teacher":
        return abs(base - teacher) - abs(student - teacher)
    return base - student if better == "low" else student - base


def headline(scores: Mapping[str, Any]) -> str:
    """The score that has a value for every prompt, hence an interval."""
    return next(key for key in ("residual_px", "dynamic") if key in scores)


def table_rows(result: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The comparison, one row per score: base, trained student, teacher, the change and whether it is for the better. Nothing is
    marked unless the headline's interval leaves out zero; the other scores have none, and their marks say the direction alone."""
    base, student, teacher = (result["rows"][name] for name in ("base", "student", "teacher"))
    rows = [_row(key, base, student, teacher) for key in SCORES if key in base]
    low, high = changed_by(evaluations)[1]
    return rows if low > 0 or high < 0 else [row._replace(mark="") for row in rows]


def _row(key: str, base: Mapping[str, float], student: Mapping[str, float], teacher: Mapping[str, float]) -> Row:
    theirs = teacher.get(key, math.nan)
    values = [x[key] for x in (base, student, teacher) if key in x]
    why = "" if all(map(math.isfinite, values)) else WHY.get(key, "its value is not finite")
    cells = [f"{v:.{DIGITS}f}" if math.isfinite(v) else NO_VALUE for v in (base[key], student[key], theirs)]
    change = student[key] - base[key]
    mark: Mark = ""
    if not math.isfinite(change):
        shown = NO_VALUE
    elif cells[0] == cells[1] or signed(change) == "0":
        shown = "0"
    else:
        percent = f" ({100 * change / base[key]:+.0f} %)" if SCORES[key][1] == "low" and base[key] else ""
        shown = signed(change) + percent
        better = gain(key, base[key], student[key], theirs)
        mark = "better" if better > 0 else "worse" if better < 0 else ""
    return Row(key, label_of(key, base), cells[0], cells[1], cells[2], shown, mark, why)


def console_table(result: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]]) -> Table:
    """`table_rows` for the terminal."""
    rows = table_rows(result, evaluations)
    why = "".join(f"\n{NO_VALUE} {row.label.strip()}: {row.why}" for row in rows if row.why)
    table = Table(
        title=f"held-out prompts, {result['clips_judged']} clips per row", title_justify="left",
        caption=why.strip() or None, caption_justify="left",
    )  # fmt: skip
    table.add_column("score")
    method = name_of(result["config"]["method"])
    for name in ("base", method, "teacher", "change"):
        table.add_column(name, justify="right")
    colors = {"better": "[green]", "worse": "[red]", "": ""}
    for row in rows:
        table.add_row(row.label, row.base, row.student, row.teacher, f"{colors[row.mark]}{row.change}")
    return table


def changed_by(evaluations: Sequence[Mapping[str, Any]]) -> tuple[float, Interval]:
    """The mean change of the first headline score from the first to the last evaluation, prompt by prompt, and its 95 %
    interval (nan: fewer than two prompts, or an old run's evaluations)."""
    before, after = (row.get("by_prompt", []) for row in (evaluations[0], evaluations[-1])) if evaluations else ([], [])
    differences = {
        str(i): [b - a] for i, (a, b) in enumerate(zip(before, after)) if math.isfinite(a) and math.isfinite(b)
    }
    mean = sum(d for (d,) in differences.values()) / len(differences) if differences else math.nan
    return mean, bootstrap(differences)


def verdict(result: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]]) -> str:
    """One sentence: what the run did to its first score, with an interval over the held-out prompts."""
    base, student, teacher = (result["rows"][name] for name in ("base", "student", "teacher"))
    method, prompts = name_of(result["config"]["method"]), result["prompts"]["held_out"]
    key = headline(base)
    if all(same(base[k], student.get(k, math.nan)) for k in SCORES if k in base):
        return (
            f"The student did not change: after {result['config']['iterations']} iterations every score equals the base "
            "student's. Raise update.lr or iterations, or lower update.ema."
        )
    change, (low, high) = changed_by(evaluations)
    name = label_of(key, base).partition(",")[0]
    values = f"{base[key]:.3f} → {student[key]:.3f}"
    if key in teacher and math.isfinite(teacher[key]):
        values += f", teacher {teacher[key]:.3f}"
    if not math.isfinite(low):
        few = "one held-out prompt gives no interval" if prompts == 1 else "without an interval"
        return f"{method} changed the {name} by {signed(student[key] - base[key])} ({values}); {few}."
    interval = f"{signed(change)}, 95 % interval {signed(low)} to {signed(high)} over {prompts} held-out prompts"
    if low <= 0 <= high:
        return f"No change can be told: {name} {values} ({interval})."
    good = gain(key, base[key], student[key], teacher.get(key, math.nan)) > 0
    if SCORES[key][1] == "teacher":  # which alone does not make a better video
        return f"{method} moved {'towards' if good else 'away from'} the teacher: {name} {values} ({interval})."
    return f"{method} is {'better' if good else 'worse'} than the base student: {name} {values} ({interval})."


def same(a: float, b: float) -> bool:
    """Equal to every digit, or both not a number."""
    return a == b or (math.isnan(a) and math.isnan(b))

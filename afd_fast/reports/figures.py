"""Curves as inline SVG whose text follows the page's colour, light or dark."""

import html
import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from afd_fast.errors import extra
from afd_fast.judges import JUDGES
from afd_fast.reports.scores import label_of

with extra("train"):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.spines import Spine
    from matplotlib.text import Text

INK = "#010203"  # stands for the page's own colour
COLORS = {"base": "#8a8f98", "student": "#3b82f6", "teacher": "#16a34a"}
PANELS = {
    "reward": "reward D(rollout)", "margin": "margin D(teacher) − D(student)", "accuracy": "pair accuracy of D",
}  # fmt: skip
_numbers = itertools.count()


def svg(figure: Figure, description: str) -> str:
    """The figure as an <svg> element that a screen reader reads as its description; closes it."""
    for text in figure.findobj(Text):
        text.set_color(INK)
    for spine in figure.findobj(Spine):
        spine.set_edgecolor(INK)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True)
    plt.close(figure)
    drawing = buffer.getvalue()[buffer.getvalue().index("<svg") :].replace(INK, "currentColor")
    mark = f"figure{next(_numbers)}-"  # ids are unique in a page
    drawing = re.sub(r'(id="|url\(#|href="#)', rf"\1{mark}", drawing)
    return drawing.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1)


def subplots(rows: int, columns: int, height: float, **how: Any) -> tuple[Figure, Any]:
    """A figure with axes [rows, columns]."""
    return plt.subplots(rows, columns, figsize=(11, height), layout="constrained", squeeze=False, **how)


def style(axis: Axes, title: str, xlabel: str = "iteration") -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(xlabel, fontsize=8)
    axis.tick_params(labelsize=8, color=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)


def smooth(values: list[float], window: int = 9) -> list[float]:
    return [sum(values[max(0, i - window + 1) : i + 1]) / (i + 1 - max(0, i - window + 1)) for i in range(len(values))]


def shown_scores(rows: Mapping[str, Any]) -> tuple[str, str, str]:
    """The three scores that get a curve."""
    return ("residual_px", "frechet", "general") if "residual_px" in rows else ("dynamic", "frechet", "contrast")


def curves(
    metrics: list[dict[str, Any]], evaluations: Sequence[Mapping[str, Any]], teacher: Mapping[str, float], method: str
) -> str:
    """Reward, margin and accuracy of D (without one, the loss) and the judge's scores over the run, as SVG."""
    figure, axes = subplots(2, 3, 5.2)
    steps = [m["step"] + 1 for m in metrics]
    panels = list(PANELS.items()) if metrics and "margin" in metrics[-1] else [("loss", "training loss")]
    for axis in axes[0, len(panels) :]:
        axis.set_axis_off()
    for axis, (key, title) in zip(axes[0], panels):
        values = [m.get(key, math.nan) for m in metrics]
        axis.plot(steps, values, color=COLORS["student"], alpha=0.25, lw=0.8)
        axis.plot(steps, smooth(values), color=COLORS["student"], lw=1.6, label="training")
        style(axis, title)
    at = [e["step"] for e in evaluations]
    if "held_out_accuracy" in evaluations[-1]:
        held_out = [e.get("held_out_accuracy", math.nan) for e in evaluations]
        axes[0, 2].plot(at, held_out, "o--", color="#d97706", ms=4, lw=1, label="held-out prompts")
        axes[0, 2].axhline(0.5, color="#999", lw=0.8, ls=":")
        axes[0, 2].legend(fontsize=8, frameon=False)
    for axis, key in zip(axes[1], shown_scores(teacher)):
        if not any(math.isfinite(e[key]) for e in evaluations):
            axis.text(0.5, 0.5, "not computed", ha="center", transform=axis.transAxes, fontsize=9)
        axis.plot(at, [e[key] for e in evaluations], "o-", color=COLORS["student"], ms=4, lw=1.6, label=method)
        axis.axhline(evaluations[0][key], color=COLORS["base"], lw=1, ls="--", label="base")
        axis.axhline(teacher[key], color=COLORS["teacher"], lw=1, ls="--", label="teacher")
        style(axis, label_of(key, teacher).split(" (")[0])
    axes[1, 0].legend(fontsize=8, frameon=False)
    what = ", ".join(title for _, title in panels)
    return svg(figure, f"Curves over the iterations: {what}, and scores of the held-out prompts")


def height_tracks(clips: Mapping[str, Tensor], method: str, judge: str) -> str:
    """The height over time of all that moves in every sample clip, as the judge of this name sees it: SVG."""
    figure, axes = subplots(1, 3, 2.6, sharey=True)
    heights = JUDGES[judge].heights
    assert heights is not None
    for axis, (name, video) in zip(axes[0], clips.items()):
        axis.plot(heights(video.flatten(0, 1).numpy()).T, color=COLORS[name], lw=1, alpha=0.7)
        style(axis, {"base": "base student", "student": method}.get(name, name), "frame")
    axes[0, 0].set_ylabel("height", fontsize=8)
    return svg(figure, "Height of what moves over the frames: base student, trained student and teacher")

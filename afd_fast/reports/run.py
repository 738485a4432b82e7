"""A run folder -> one self-contained report.html: table, side-by-side videos, curves, configuration."""

import base64
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from afd_fast.errors import ConfigError, extra
from afd_fast.files.text import read_json
from afd_fast.judges.physics import track
from afd_fast.training.run_folder import read_rows
from afd_fast.video_io import write_video

with extra("train"):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from jinja2 import Environment, PackageLoader, select_autoescape
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table
    from safetensors import SafetensorError, safe_open

GAP = 8  # px
COLORS = {"base": "#8a8f98", "student": "#2563eb", "teacher": "#16a34a"}
METHODS = {"afd": "AFD", "sft": "SFT", "gan": "GAN", "dmd": "score-free DMD", "rejection": "rejection sampling"}
PANELS = {
    "reward": "reward D(rollout)", "margin": "margin D(teacher) − D(student)", "accuracy": "pair accuracy of D",
}  # fmt: skip
# score -> (label, what is better: "low", "high" or "teacher")
SCORES = {
    "residual_px": ("physics residual, px", "low"),
    "frechet": ("Fréchet distance of trajectories", "low"),
    "gravity": ("measured gravity, box/s²", "teacher"),
    "gravity_error": ("gravity error, relative", "low"),
    "bounce_high": ("elasticity where the prompt says high", "teacher"),
    "bounce_low": ("elasticity where the prompt says low", "teacher"),
    "dynamic_px": ("dynamic degree, px/frame", "teacher"),
    "general": ("general quality (mean of the next four)", "high"),
    "color": ("  color matches", "high"),
    "size": ("  size matches", "high"),
    "shape": ("  shape is a disc", "high"),
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


def table_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The comparison: one row a score with base, trained student, teacher, the change and whether it is for the better."""
    base, student, teacher = (result["rows"][k] for k in ("base", "student", "teacher"))
    rows = []
    for key, (label, better) in SCORES.items():
        if key not in base:
            continue
        shown = teacher.get(key, math.nan)
        change = student[key] - base[key]
        gain = {
            "low": -change,
            "high": change,
            "teacher": abs(base[key] - shown) - abs(student[key] - shown),
        }[better]
        percent = f" ({100 * change / base[key]:+.0f} %)" if better == "low" and base[key] else ""
        rows.append(
            {
                "key": key, "label": label, "base": f"{base[key]:.3f}", "student": f"{student[key]:.3f}",
                "teacher": f"{shown:.3f}" if key in teacher else "", "change": f"{change:+.3f}{percent}", "better": gain > 0,
            }
        )  # fmt: skip
    return rows


def console_table(result: Mapping[str, Any]) -> Table:
    """`table_rows` for the terminal."""
    table = Table(title=f"held-out prompts, {result['clips_judged']} clips per row", title_justify="left")
    table.add_column("score")
    method = METHODS[result["config"]["method"]]
    for name in ("base", method, "teacher", f"{method} - base"):
        table.add_column(name, justify="right")
    for row in table_rows(result):
        color = "green" if row["better"] else "red"
        table.add_row(row["label"], row["base"], row["student"], row["teacher"], f"[{color}]{row['change']}[/]")
    return table


def svg(figure: Figure) -> str:
    """The figure as an <svg> element; closes it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def style(axis: Axes, title: str, xlabel: str = "iteration") -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(xlabel, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)


def smooth(values: list[float], window: int = 9) -> list[float]:
    return [sum(values[max(0, i - window + 1) : i + 1]) / (i + 1 - max(0, i - window + 1)) for i in range(len(values))]


def curves(
    metrics: list[dict[str, Any]], evaluations: list[dict[str, Any]], teacher: Mapping[str, float], method: str
) -> str:
    """Reward, margin and accuracy of D (without one, the loss) and the judge's scores over the run, as SVG."""
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.2), layout="constrained")
    steps = [m["step"] + 1 for m in metrics]
    panels = list(PANELS.items()) if "margin" in metrics[-1] else [("loss", "training loss")]
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
    judged = "residual_px" in teacher
    keys = ("residual_px", "frechet", "general") if judged else ("dynamic", "frechet", "contrast")
    for axis, key in zip(axes[1], keys):
        axis.plot(at, [e[key] for e in evaluations], "o-", color=COLORS["student"], ms=4, lw=1.6, label=METHODS[method])
        axis.axhline(evaluations[0][key], color=COLORS["base"], lw=1, ls="--", label="base")
        axis.axhline(teacher[key], color=COLORS["teacher"], lw=1, ls="--", label="teacher")
        style(axis, SCORES[key][0].split(" (")[0])
    axes[1, 0].legend(fontsize=8, frameon=False)
    return svg(figure)


def height_tracks(clips: dict[str, Tensor], method: str) -> str:
    """The ball's height over time in every sample clip, as SVG."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 2.6), sharey=True, layout="constrained")
    for axis, (name, video) in zip(axes, clips.items()):
        heights = track(video.flatten(0, 1).numpy() / 255)[0][..., 1]
        axis.plot(heights.T, color=COLORS[name], lw=1, alpha=0.7)
        style(axis, {"base": "base student", "student": METHODS[method]}.get(name, name), "frame")
    axes[0].set_ylabel("height", fontsize=8)
    return svg(figure)


def side_by_side(panels: list[Tensor], fps: float, zoom: int = 10) -> str:
    """Videos [3, F, H, W] (uint8) side by side, enlarged `zoom` times, as a data URL (mp4, H.264 4:2:0)."""
    large = [p.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2) for p in panels]
    gap = torch.full((*large[0].shape[:-1], GAP), 255, dtype=torch.uint8)
    strip = torch.cat([part for panel in large for part in (gap, panel)][1:], -1)
    buffer = io.BytesIO()
    write_video(buffer, strip, fps, crf=16)
    return "data:video/mp4;base64," + base64.b64encode(buffer.getvalue()).decode()


class Samples(NamedTuple):
    """What a finished run keeps to look at: P prompts, and of "base", "student" and "teacher" clips
    [n, P, 3, F, H, W]."""

    prompts: list[str]
    clips: dict[str, Tensor]


def read_samples(run: Path) -> Samples:
    """ConfigError where the run's file is missing or damaged."""
    path = run / "samples.safetensors"
    try:
        with safe_open(path, "pt") as file:
            clips = {name: file.get_tensor(name) for name in ("base", "student", "teacher")}
            return Samples(json.loads(file.metadata()["prompts"]), clips)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}): continue the run with --resume to make it again"
        ) from error


def write_report(run: str | Path) -> Path:
    """report.html of a finished run folder. ConfigError for another folder."""
    run = Path(run)
    result = read_json(run / "result.json")
    prompts, clips = read_samples(run)
    metrics, evaluations = read_rows(run / "metrics.jsonl"), read_rows(run / "evaluations.jsonl")
    phases = [k for k in metrics[-1] if k.startswith("seconds/")]
    total = {k.removeprefix("seconds/"): sum(m.get(k, 0) for m in metrics) for k in phases}
    judged, method = "residual_px" in result["rows"]["teacher"], result["config"]["method"]
    videos = [
        {
            "prompt": prompt,
            "strips": [side_by_side([clips[n][i, p] for n in clips], fps=6) for i in range(len(clips["student"]))],
        }
        for p, prompt in enumerate(prompts)
    ]
    template = Environment(loader=PackageLoader("afd_fast", "assets"), autoescape=select_autoescape()).get_template(
        "report.html"
    )
    html = template.render(
        result=result, rows=table_rows(result), videos=videos, curves=curves(metrics, evaluations, result["rows"]["teacher"], method),
        tracks=height_tracks(clips, method) if judged else None, seconds=total, last=evaluations[-1], judged=judged,
        method=METHODS[method],
    )  # fmt: skip
    path = run / "report.html"
    path.write_text(html)
    return path

"""A run folder -> report.html: verdict, side-by-side videos, table, curves, configuration."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from afd_fast.errors import ConfigError, extra
from afd_fast.files.text import read_json
from afd_fast.reports.figures import curves, height_tracks
from afd_fast.reports.media import Clip, videos
from afd_fast.reports.scores import console_table, headline, name_of, table_rows, verdict
from afd_fast.training.run_folder import judged, read_rows

with extra("train"):
    from jinja2 import Environment, PackageLoader, select_autoescape
    from rich.console import Console
    from rich.markup import escape
    from safetensors import SafetensorError, safe_open

KINDS = ("base", "student", "teacher")


class Samples(NamedTuple):
    """What a finished run keeps to look at: P prompts, n clips [3, F, H, W] uint8 of each and of every kind. `clip` reads one.
    judge: the name of the run's judge."""

    prompts: list[str]
    per_prompt: int
    fps: float
    judge: str
    file: Any

    def clip(self, kind: str, index: int, prompt: int) -> Tensor:
        """The clip of "base", "student" or "teacher"."""
        return self.file.get_slice(kind)[index, prompt]

    def all(self, kind: str) -> Tensor:
        """Every clip of a kind [n, P, 3, F, H, W], for small ones."""
        return self.file.get_tensor(kind)


@contextlib.contextmanager
def open_samples(run: Path) -> Iterator[Samples]:
    """The samples of a run, read clip by clip. ConfigError where its file is missing or damaged."""
    path = run / "samples.safetensors"
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(safe_open(path, "pt"))
            about = file.metadata()
            shapes = [tuple(file.get_slice(kind).get_shape()) for kind in KINDS]
            if len(set(shapes)) > 1 or len(shapes[0]) != 6:
                raise ValueError(f"its clips have the shapes {shapes}")
            judge = about.get("judge", "physics")  # the only one that drew tracks when files did not say
            prompts, fps = json.loads(about["prompts"]), float(json.loads(about["fps"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{path} cannot be read ({error}): continue the run with --resume to make it again"
            ) from error
        yield Samples(prompts, shapes[0][0], fps, judge, file)


def template(name: str) -> Any:
    """A page of the assets."""
    pages = Environment(loader=PackageLoader("afd_fast", "assets"), autoescape=select_autoescape(), trim_blocks=True)
    return pages.get_template(name)


def clips_of(samples: Samples, method: str) -> Iterator[Clip]:
    """Every sample with its panels next to each other, prompt by prompt."""
    for p, prompt in enumerate(samples.prompts):
        for i in range(samples.per_prompt):
            panels = [samples.clip(kind, i, p) for kind in KINDS]
            yield Clip(panels, f"{prompt}: base student, {method} and teacher next to each other, clip {i + 1}")


def read_result(run: Path) -> dict[str, Any]:
    """result.json of a finished run. ConfigError where it is missing, or holds something else."""
    result = read_json(run / "result.json")
    if not isinstance(result, dict) or not {"config", "rows"} <= result.keys():
        raise ConfigError(
            f"{run / 'result.json'} holds no result of a run: continue the run with --resume to make it again"
        )
    return result


def write_report(run: str | Path) -> Path:
    """report.html of a finished run folder, and the folder report.videos where they do not fit into it. ConfigError for
    another folder."""
    run = Path(run)
    result, path = read_result(run), run / "report.html"
    metrics, evaluations = read_rows(run / "metrics.jsonl"), judged(run, result["config"]["iterations"])
    method, teacher = name_of(result["config"]["method"]), result["rows"]["teacher"]
    physical = "residual_px" in teacher
    with open_samples(run) as samples:
        made = videos(clips_of(samples, method), samples.fps, path)
        tracks = height_tracks({kind: samples.all(kind) for kind in KINDS}, method, samples.judge) if physical else None
        prompts, count = samples.prompts, samples.per_prompt
    html = template("report.html").render(
        result=result, rows=table_rows(result, evaluations), verdict=verdict(result, evaluations), prompts=prompts,
        videos=[made[i * count : (i + 1) * count] for i in range(len(prompts))], curves=curves(metrics, evaluations, teacher, method),
        tracks=tracks, seconds=phases(metrics), last=evaluations[-1], judged=physical, headline=headline(result["rows"]["base"]), method=method,
    )  # fmt: skip
    path.write_text(html, encoding="utf-8")
    return path


def phases(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of a run by phase."""
    names = [key for row in metrics[-1:] for key in row if key.startswith("seconds/")]
    return {key.removeprefix("seconds/"): sum(m.get(key, 0) for m in metrics) for key in names}


def conclude(console: Console, run: Path, result: Mapping[str, Any]) -> None:
    """Write the report of a run that has just ended, and say what it found."""
    evaluations = judged(run, result["config"]["iterations"])
    console.print(console_table(result, evaluations))
    last = result["rows"]["student"]
    if "reward_physics_correlation" in last:
        console.print(
            f"within prompts, discriminator score and physics score correlate at {last['reward_physics_correlation']:.2f}; "
            f"discriminator accuracy on held-out prompts {last['held_out_accuracy']:.2f}"
        )
    console.print(escape(verdict(result, evaluations)), highlight=False)
    console.print(f"{result['seconds']:.0f} s; report: {escape(str(write_report(run)))}")

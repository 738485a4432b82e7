"""Scores of finished videos by the official tools, each in its own environment (docs/evaluation.md)."""

import os
import shutil
from dataclasses import astuple, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from afd_fast.cli import sampling as cli
from afd_fast.cli.common import check_place, table
from afd_fast.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from afd_fast.evaluation.folder import Clip
    from afd_fast.evaluation.intervals import Score
    from afd_fast.evaluation.scores import Difference
    from afd_fast.students.wan.family import Networks

app = typer.Typer(no_args_is_help=True, help=__doc__)
console = Console(emoji=False)

Folder = Annotated[Path, typer.Argument(help="the evaluation's folder", show_default=False)]


LISTING = ("out", "vbench", "prompts", "n", "seed")  # options of an export that makes no video: what its manifest lists


@app.command()
def export(
    context: typer.Context,
    out: Folder,
    vbench: Annotated[Path | None, typer.Option(help="VBench_full_info.json of the official repository")] = None,
    prompts: Annotated[Path | None, typer.Option(help="text file, one prompt per line, for the other tools")] = None,
    student: Annotated[
        str | None,
        typer.Option(
            help='checkpoint that makes the videos, or "tiny"; without one, only the manifest of videos to put in OUT/videos'
        ),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(help="videos per prompt; default 5 for VBench (25 for its flickering prompts), else 1"),
    ] = None,
    base: Annotated[str | None, typer.Option(help="diffusers repository of text encoder and VAE")] = None,
    preset: cli.Preset = None,
    size: cli.Size = None,
    frames: cli.Frames = None,
    steps: cli.Steps = None,
    first_chunk_steps: cli.FirstSteps = None,
    shift: cli.Shift = None,
    warp: cli.Warp = None,
    chunk: cli.Chunk = None,
    window: cli.Window = None,
    sink: cli.Sink = None,
    rope: cli.Rope = None,
    sink_ema: cli.SinkEma = None,
    recompute: cli.Recompute = None,
    zero_step: cli.ZeroStep = None,
    cache_pass: cli.CachePass = None,
    unipc_steps: cli.UniPC = None,
    guidance: cli.Guidance = None,
    negative: cli.Negative = None,
    lora: cli.Lora = None,
    fps: cli.Fps = None,
    batch: int = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**62)] = 0,
) -> None:
    """Make the videos a tool expects, under the names it expects; run again to continue."""
    from afd_fast.evaluation import folder
    from afd_fast.evaluation import vbench as suite
    from afd_fast.files.durable import settle
    from afd_fast.students.wan.family import BASE, load_networks

    if (vbench is None) == (prompts is None):
        raise ConfigError("give either --vbench VBench_full_info.json or --prompts FILE")
    if student is None and (odd := [name for name in _given(context) if name not in LISTING]):
        raise ConfigError(
            f"without --student no video is made here: leave out {', '.join('--' + name.replace('_', '-') for name in odd)}, "
            "or give --student"
        )
    if vbench is not None:
        n = suite.KEPT if n is None else n
        clips = suite.clips(suite.suite(vbench), n, seed)
    elif prompts is not None:
        n = 1 if n is None else n
        clips = _listed(prompts, n, seed)
    check_place(out)
    settings: folder.Settings = {"n": n, "student": student}
    networks = None
    if student is not None:
        found = cli.sampling(
            student, base, preset, size, frames, fps, batch, lora, negative, steps=steps,
            first_chunk_steps=first_chunk_steps, shift=shift, warp=warp, chunk=chunk, window=window, sink=sink, rope=rope,
            sink_ema=sink_ema, recompute=recompute, zero_step=zero_step, cache_pass=cache_pass,
            unipc_steps=unipc_steps, guidance=guidance,
        )  # fmt: skip
        settings |= {"base": base or BASE} | found.settings()
        folder.verify(out, clips, settings)
        if not (out / "export.json").exists() or folder.missing(out, clips):
            # a wrong checkpoint leaves no folder that blocks the right one
            networks = load_networks(student, base, seed, lora=found.lora or None)
    folder.start(out, clips, settings)
    if vbench is not None and not (out / suite.SUITE).exists():
        shutil.copyfile(vbench, out / "suite.part")
        settle(out / "suite.part", out / suite.SUITE)
    todo = folder.missing(out, clips)
    if networks is not None and todo:
        _generate(out, todo, networks, found)
        todo = folder.missing(out, clips)
    console.print(
        f"{len(clips) - len(todo)} of {len(clips)} videos are in {escape(str(out / 'videos'))}; names: manifest.csv"
    )


def _given(context: typer.Context) -> list[str]:
    """The parameters that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


def _listed(prompts: Path, n: int, seed: int) -> "list[Clip]":
    """n clips of every line of a text file."""
    from afd_fast.evaluation.folder import Clip
    from afd_fast.files.text import read_prompts
    from afd_fast.generate import file_name

    if n < 1:
        raise ConfigError(f"--n must be at least 1, got {n}")
    lines = list(dict.fromkeys(read_prompts(prompts)))
    names = [(prompt, f"{file_name(i, prompt)[:-4]}-{k}.mp4") for i, prompt in enumerate(lines) for k in range(n)]
    return [Clip(name, prompt, seed + i) for i, (prompt, name) in enumerate(names)]


def _generate(out: Path, clips: "list[Clip]", networks: "Networks", found: cli.Sampling) -> None:
    """Make clips; a file appears in OUT/videos only when it is whole."""
    from afd_fast.generate import Job, generate
    from afd_fast.video_io import write_video

    def write(path: Path, video: "Tensor", fps: float) -> None:
        write_video(out / "partial.mp4", video, fps)
        os.replace(out / "partial.mp4", path)

    todo = [Job(clip.prompt, clip.video, clip.seed) for clip in clips]
    with Progress(console=console) as progress:
        task = progress.add_task("chunks", total=None)
        stats = generate(
            networks,
            todo,
            out / "videos",
            found.options,
            found.config,
            negative=found.negative,
            write=write,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    console.print(stats.line())


@app.command()
def run(
    tool: Annotated[str, typer.Argument(help='"vbench", "videophy2", "videoalign", or "flickering" (computed here)')],
    out: Folder,
    env: Annotated[Path | None, typer.Option(help="the tool's virtual or conda environment")] = None,
    repo: Annotated[Path | None, typer.Option(help="clone of the tool's repository (videophy2, videoalign)")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="folder of its model (videophy2, videoalign)")] = None,
    dimension: Annotated[list[str] | None, typer.Option(help="of VBench, repeatable; default all")] = None,
) -> None:
    """Score the videos of a folder with an official tool; what is scored already is kept."""
    from afd_fast.evaluation import flickering, vbench, videoalign, videophy2

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    if tool == "flickering":
        flickering.run(out, say)
    elif tool == "vbench" and env is not None:
        vbench.run(out, env, dimension, say)
    elif tool in ("videophy2", "videoalign") and None not in (env, repo, checkpoint):
        assert env is not None and repo is not None and checkpoint is not None
        {"videophy2": videophy2, "videoalign": videoalign}[tool].run(out, env, repo, checkpoint, say)
    else:
        raise ConfigError(
            "give `vbench OUT --env PATH`, `flickering OUT`, or `videophy2` or `videoalign` "
            "with OUT --env PATH --repo PATH --checkpoint PATH"
        )


@app.command()
def collect(out: Folder) -> None:
    """Check what the tools wrote, print one table with 95 % intervals, and write it to OUT/scores.csv."""
    from afd_fast.evaluation import folder, scores
    from afd_fast.evaluation.intervals import Score

    rows = scores.collect(out)
    folder.write_csv(out / "scores.csv", [field.name for field in fields(Score)], map(astuple, rows))
    shown = table("", "score", "95 % interval", "videos", "")
    for row in rows:
        digits = _digits(row.name, row.value)
        shown.add_row(
            escape(row.name), f"{row.value:{digits}}", _between(row, digits), str(row.videos), escape(row.note)
        )
    console.print(shown)


@app.command()
def compare(
    base: Annotated[Path, typer.Argument(help="the folder to compare with", show_default=False)], out: Folder
) -> None:
    """Every score that both folders have: OUT - BASE, prompt by prompt, with 95 % intervals; also in OUT/differences.csv."""
    from afd_fast.evaluation import folder, scores

    rows = scores.differences(base, out)
    names = [field.name for field in fields(scores.Difference)]
    folder.write_csv(out / "differences.csv", names, map(astuple, rows))
    shown = table("", escape(base.name), escape(out.name), "difference", "95 % interval", "prompts", "")
    for row in rows:
        digits = _digits(row.name, row.base)
        clear = "[bold]" if row.low > 0 or row.high < 0 else ""
        shown.add_row(
            escape(row.name), f"{row.base:{digits}}", f"{row.other:{digits}}", f"{clear}{row.difference:+{digits}}",
            _between(row, "+" + digits), str(row.prompts), escape(row.note),
        )  # fmt: skip
    console.print(shown)


def _digits(name: str, value: float) -> str:
    return ".2f" if name.startswith("VBench") or value > 10 else ".3f"


def _between(row: "Score | Difference", digits: str) -> str:
    return "" if row.low != row.low else f"{row.low:{digits}} .. {row.high:{digits}}"

"""`afd-fast rollout`: videos of a causal Wan student."""

from pathlib import Path
from typing import Annotated

import typer

from afd_fast.cli import sampling as cli
from afd_fast.cli.common import check_place, console
from afd_fast.errors import ConfigError


def rollout(
    prompts: Annotated[Path, typer.Option(help="text file, one prompt per line")],
    out: Annotated[Path, typer.Option(help="folder for the mp4 files; must not exist")],
    student: Annotated[str | None, typer.Option(help="checkpoint: .pt, .safetensors, folder or repository")] = None,
    config: Annotated[str, typer.Option(help='"wan", or "tiny": random weights, to try the command anywhere')] = "wan",
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
    preview: Annotated[
        Path | None,
        typer.Option(help="weights of TAEHV's format (taew2_1.pth): fast pixels that only resemble the VAE's"),
    ] = None,
    batch: int = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="of the first prompt; prompt i has seed + i")] = 0,
    seeds: Annotated[str | None, typer.Option(help="such as 0,1,2: a video of every prompt with each of them")] = None,
    graphs: Annotated[bool, typer.Option("--graphs", help="replay forwards as CUDA graphs")] = False,
) -> None:
    """Generate a video for every prompt with a causal Wan student.

    As its checkpoint says, as a --preset says, or as set. Under torchrun all processes make each video together, each with its share of
    tokens and heads.
    """
    import torch
    from rich.progress import MofNCompleteColumn, Progress

    from afd_fast.files.text import read_prompts
    from afd_fast.generate import check_decoder, generate, jobs
    from afd_fast.students.wan.family import load_networks
    from afd_fast.video_io import write_video

    if graphs and not torch.cuda.is_available():
        raise ConfigError("--graphs records CUDA graphs, and there is no CUDA device here: leave it out")
    if config not in ("wan", "tiny") or (config == "wan") != (student is not None):
        raise ConfigError("give either --student CHECKPOINT or --config tiny")
    todo = jobs(read_prompts(prompts), seed, None if seeds is None else cli.numbers_of_seeds(seeds))
    if out.exists():
        raise ConfigError(f"{out} exists; choose another --out")
    check_place(out)
    found = cli.sampling(
        student or "tiny", base, preset, size, frames, fps, batch, lora, negative, steps=steps,
        first_chunk_steps=first_chunk_steps, shift=shift, warp=warp, chunk=chunk, window=window, sink=sink, rope=rope,
        sink_ema=sink_ema, recompute=recompute, zero_step=zero_step, cache_pass=cache_pass,
        unipc_steps=unipc_steps, guidance=guidance, graphs=graphs or None,
    )  # fmt: skip
    check_decoder(found.config, preview is None)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with cli.together(found) as ranks, Progress(*columns, console=console, disable=not ranks.lead) as progress:
        networks = load_networks(student or "tiny", base, seed, lora=found.lora or None, preview=preview)
        ranks.split_sequence(found.options.height, found.options.width, networks.student)
        task = progress.add_task("chunks", total=None)
        stats = generate(
            networks,
            todo,
            out,
            found.options,
            found.config,
            negative=found.negative,
            write=write_video if ranks.lead else lambda *_: None,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if ranks.lead:
        console.print(stats.line())

"""The `afd-fast` command."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from afd_fast.cli.evaluate import app as evaluation

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_show_locals=False)
app.add_typer(evaluation, name="eval")
console = Console()

Out = Annotated[Path | None, typer.Option(help="run folder; default runs/NAME")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace the run folder if it exists")]
Resume = Annotated[bool, typer.Option("--resume", help="continue the run in the folder")]
Keys = Annotated[list[str] | None, typer.Argument(help="key=value overrides of the configuration", show_default=False)]


def _system(config, weights: Path | None = None):
    """The networks of a configuration; weights: of a toy student other than the shipped one."""
    from afd_fast.errors import ConfigError
    from afd_fast.students.toy import shipped as base_student
    from afd_fast.students.wan.family import wan_system
    from afd_fast.training.state import toy_system

    if config.student in base_student.SHIPPED:
        if config.stream or config.window:
            raise ConfigError("stream and window need a Wan student: the embedded one has a fixed length")
        return toy_system(base_student.load(weights, name=config.student))
    return wan_system(config)


def _run(config, out: Path | None, overwrite: bool, resume: bool, weights: Path | None = None) -> None:
    from afd_fast.reports.run import console_table, write_report
    from afd_fast.training import distributed, trainer

    out = out or Path("runs") / config.name
    with distributed.job() as ranks:
        screen = console if ranks.lead else Console(quiet=True)
        system = _system(config, weights)
        result = trainer.start(config, system, out, overwrite=overwrite, resume=resume, console=screen, ranks=ranks)
    if not ranks.lead:
        return
    console.print(console_table(result))
    last = result["rows"]["student"]
    if "reward_physics_correlation" in last:
        console.print(
            f"within prompts, discriminator score and physics score correlate at {last['reward_physics_correlation']:.2f}; "
            f"discriminator accuracy on held-out prompts {last['held_out_accuracy']:.2f}"
        )
    console.print(f"{result['seconds']:.0f} s; report: {write_report(out)}")


@app.command()
def demo(
    overrides: Keys = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help='"physics", "folder:PATH" with manifest.csv|jsonl and mp4 files, or "api:FILE" (docs/teachers.md)'
        ),
    ] = None,
    from_scratch: Annotated[
        bool,
        typer.Option(
            "--from-scratch", help="pretrain the base student too, into OUT.base.safetensors (about ten minutes)"
        ),
    ] = False,
    out: Out = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
) -> None:
    """Distil the embedded teacher into the shipped base student and write a report."""
    from dataclasses import replace

    from afd_fast.config import with_overrides
    from afd_fast.students.toy import shipped as base_student
    from afd_fast.training import runs as recipes

    config = with_overrides(recipes.demo(), overrides or [])
    if teacher:
        name = config.name if teacher == "physics" else f"{config.name}-{Path(teacher.partition(':')[2]).stem}"
        config = replace(config, teacher=teacher, name=name)
    weights = (out or Path("runs") / config.name).with_suffix(".base.safetensors") if from_scratch else None
    if weights and not weights.exists():
        weights.parent.mkdir(parents=True, exist_ok=True)
        base_student.make(console, weights)
    _run(config, out, overwrite, resume, weights)


@app.command()
def train(
    recipe: str,
    overrides: Keys = None,
    out: Out = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would run, how large it is and what the teacher would cost")
    ] = False,
) -> None:
    """Train a named RECIPE (see `afd-fast recipes`) with key=value overrides."""
    from afd_fast.config import with_overrides
    from afd_fast.training import runs as recipes

    config = with_overrides(recipes.get(recipe), overrides or [])
    if not dry_run:
        return _run(config, out, overwrite, resume)
    from afd_fast.config import to_dict
    from afd_fast.estimate.estimate import floor
    from afd_fast.training.trainer import facts

    table = Table(show_header=False)
    for key, value in (to_dict(config) | facts(config, _system(config)) | floor(config)).items():
        table.add_row(key, str(value))
    console.print(table)


Seeds = Annotated[int, typer.Option(help="runs of every row, with seeds from the recipe's on")]
Jobs = Annotated[int, typer.Option(help="runs at the same time; each gets its share of the cores")]


def _compare(recipe, overrides, variants, seeds: int, out: Path, jobs: int) -> None:
    from afd_fast.reports.comparison import console_table, write_report
    from afd_fast.training.compare import compare

    comparison = compare(recipe, overrides or [], variants, seeds, out, jobs=jobs, console=console)
    console.print(console_table(comparison))
    console.print(f"report: {write_report(out)}")


@app.command(name="compare")
def compare_methods(
    recipe: str,
    overrides: Keys = None,
    methods: Annotated[str, typer.Option(help="of afd, sft, gan, dmd, rejection; the base student is always there")] = (
        "base,sft,gan,dmd,afd"
    ),
    seeds: Seeds = 3,
    out: Out = None,
    jobs: Jobs = 1,
) -> None:
    """Train RECIPE with several methods over several seeds: one table, one report. The same command goes on after a stop."""
    from afd_fast.training import compare

    names = [name for name in methods.split(",") if name and name != "base"]
    rows = lambda config: compare.methods(config, names)
    _compare(recipe, overrides, rows, seeds, out or Path("runs") / f"compare-{recipe}", jobs)


@app.command()
def ablate(
    what: Annotated[str, typer.Argument(help="disc_lr, disc_loss, v_old, t_sampling, k, prior or update")],
    recipe: str,
    overrides: Keys = None,
    seeds: Seeds = 1,
    out: Out = None,
    jobs: Jobs = 1,
) -> None:
    """Train RECIPE with several settings of one thing (the paper's sweeps), as `compare` does."""
    from afd_fast.errors import ConfigError
    from afd_fast.training.compare import ABLATIONS

    if what not in ABLATIONS:
        raise ConfigError(f"unknown ablation {what!r}; known: {', '.join(ABLATIONS)}")
    _compare(recipe, overrides, ABLATIONS[what], seeds, out or Path("runs") / f"ablate-{what}-{recipe}", jobs)


@app.command()
def estimate(
    recipe: str,
    overrides: Keys = None,
    gpu: Annotated[str, typer.Option(help="h100, h200, a100 or rtx4090")] = "h100",
) -> None:
    """Least time and memory of one training iteration of RECIPE on a GPU, by phase; nothing is run or downloaded."""
    from afd_fast.config import with_overrides
    from afd_fast.estimate import estimate as floor
    from afd_fast.training import runs as recipes

    device, config = floor.gpu_of(gpu), with_overrides(recipes.get(recipe), overrides or [])
    found = floor.estimate(config)
    console.print(*floor.tables(found, device), *found.about, sep="\n")


@app.command(name="recipes")
def list_recipes() -> None:
    """List the named runs."""
    from afd_fast.training import runs as recipes

    for name, function in recipes.RECIPES.items():
        console.print(f"[bold]{name}[/]  {function.__doc__}")


@app.command()
def pretrain(
    out: Annotated[Path, typer.Option(help="where the weights go")] = Path("base_student.safetensors"),
    seed: int = 0,
    frames: Annotated[int, typer.Option(help="length of its clips; a multiple of 3")] = 12,
) -> None:
    """Train a base student of the embedded task from nothing: a few-step student of the wrong physics."""
    from afd_fast.errors import ConfigError
    from afd_fast.students.toy import shipped as base_student

    if out.exists():
        raise ConfigError(f"{out} exists; choose another --out")
    base_student.make(console, out, seed=seed, frames=frames)


@app.command()
def rollout(
    prompts: Annotated[Path, typer.Option(help="text file, one prompt a line")],
    out: Annotated[Path, typer.Option(help="folder for the mp4 files; must not exist")],
    student: Annotated[str | None, typer.Option(help="checkpoint: .pt, .safetensors, folder or repository")] = None,
    config: Annotated[str, typer.Option(help='"wan", or "tiny": random weights, to try the command anywhere')] = "wan",
    base: Annotated[
        str, typer.Option(help="diffusers repository of text encoder and VAE")
    ] = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    frames: Annotated[int, typer.Option(help="latent frames; 21 are 81 frames of video")] = 21,
    shift: float = 5.0,
    chunk: int = 3,
    batch: int = 1,
    seed: int = 0,
) -> None:
    """Generate a video for every prompt with a causal Wan student."""
    from rich.progress import Progress

    from afd_fast.errors import ConfigError
    from afd_fast.generate import generate, load_networks
    from afd_fast.rollout import RolloutConfig
    from afd_fast.video_io import write_video

    if config not in ("wan", "tiny") or (config == "wan") != (student is not None):
        raise ConfigError("give either --student CHECKPOINT or --config tiny")
    if not prompts.is_file():
        raise ConfigError(f"{prompts} is not a file with prompts")
    lines = [line.strip() for line in prompts.read_text().splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f"{prompts} holds no prompt")
    if out.exists():
        raise ConfigError(f"{out} exists; choose another --out")
    model, encode, decode = load_networks(student or "tiny", base, seed)
    size = {} if student else {"height": 6, "width": 10}
    with Progress(console=console) as progress:
        task = progress.add_task("chunks", total=None)
        stats = generate(
            model, lines, out, encode=encode, decode=decode, write=write_video, frames=frames, batch=batch, seed=seed,
            config=RolloutConfig(shift=shift, chunk=chunk), **size,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )  # fmt: skip
    console.print(stats.line())


@app.command()
def report(run: Path) -> None:
    """Write report.html of a finished run folder again."""
    from afd_fast.errors import ConfigError
    from afd_fast.reports.run import write_report

    if not (run / "result.json").exists():
        raise ConfigError(f"{run} holds no finished run (no result.json)")
    console.print(write_report(run))


@app.command()
def env() -> None:
    """Print versions, devices and which implementation serves every operator."""
    from afd_fast import ops
    from afd_fast.training.run_folder import environment

    table = Table(show_header=False)
    for key, value in environment().items():
        table.add_row(key, str(value))
    for name, where in ops.backends().items():
        table.add_row(f"operator {name}", where)
    console.print(table)


def main() -> None:
    """Run the command; errors the user can mend are one line and exit status 1 (2: configuration, 130: interrupted)."""
    from afd_fast.errors import ConfigError

    try:
        app()
    except ConfigError as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False)
        sys.exit(2)
    except Exception as error:
        from afd_fast.errors import CheckpointError, Interrupted, TeacherError, TrainingError, VideoError

        if isinstance(error, Interrupted):
            console.print(str(error))
            sys.exit(130)
        if isinstance(error, (CheckpointError, TeacherError, TrainingError, VideoError)):
            Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False)
            sys.exit(1)
        raise

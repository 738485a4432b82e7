"""The `afd-fast` command."""

import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape

from afd_fast.cli import missing
from afd_fast.cli.common import Keys, Out, Overwrite, Resume, check_place, check_writable, console, keeping, table
from afd_fast.cli.common import run as train_run
from afd_fast.cli.distill import distill
from afd_fast.cli.doctor import doctor
from afd_fast.cli.evaluate import app as evaluation
from afd_fast.cli.pretrain import pretrain
from afd_fast.cli.review import review
from afd_fast.cli.rollout import rollout
from afd_fast.errors import AFDError, ConfigError, MissingExtra

if TYPE_CHECKING:
    from rich.table import Table

    from afd_fast.config import TrainConfig
    from afd_fast.training.compare import Variants

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help=__doc__,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(evaluation, name="eval")
app.command()(distill)
app.command()(doctor)
app.command()(pretrain)
app.command()(review)
app.command()(rollout)


def _version(asked: bool) -> None:
    if asked:
        from afd_fast import __version__

        console.print(f"afd-fast {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Adversarial Flow Distillation: train, roll out, evaluate and estimate causal video students."""


@app.command()
def demo(
    overrides: Keys = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help='"physics", "physics:dusk", or "api:FILE" with prompts of this world (docs/teachers.md); your own videos: afd-fast distill'
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
    from afd_fast.config import with_overrides
    from afd_fast.training import runs

    config = with_overrides(runs.demo(), overrides or [])
    if teacher is not None and teacher.startswith("folder:"):
        raise ConfigError(
            f"the demo's student knows bouncing balls of 16x16 pixels: give your own videos to afd-fast distill --videos "
            f"{teacher.partition(':')[2] or 'DIR'}"
        )
    if teacher is not None:
        name = config.name if teacher == "physics" else f"{config.name}-{Path(teacher.partition(':')[2]).stem}"
        config = replace(config, teacher=teacher, name=name)
    if from_scratch:
        config = _from_scratch(config, out or Path("runs") / config.name, overwrite, resume)
    train_run(config, out, overwrite, resume)


def _from_scratch(config: "TrainConfig", out: Path, overwrite: bool, resume: bool) -> "TrainConfig":
    """The configuration with the base student OUT.base.safetensors, which is made where there is none. ConfigError, before that, for
    what `train` would refuse."""
    from afd_fast.config import with_values
    from afd_fast.students.toy import shipped
    from afd_fast.training.run_folder import check_folder
    from afd_fast.training.teacher import teacher_of
    from afd_fast.training.trainer import new_run

    if config.student.base is not None:
        raise ConfigError("give either --from-scratch, which makes the base student, or student.base")
    if config.student.name != "toy":
        raise ConfigError(
            f"--from-scratch pretrains student=toy: for student={config.student.name} give student.base=FILE, which afd-fast pretrain makes"
        )
    base = out.with_name(f"{out.name}.base.safetensors")
    changed = with_values(config, {"student.base": str(base)})
    check_folder(out, changed, overwrite=overwrite, resume=resume)
    if not base.exists():
        if resume:
            raise ConfigError(
                f"{out} cannot be continued: its base student {base} is missing. Start again with --overwrite"
            )
        teacher_of(new_run(config), None, out.parent / "teacher-cache")
        with keeping(base, {"world": "physics"}) as (report, kept):
            shipped.make(base, report=report, kept=kept)
    return changed


@app.command()
def train(
    run: Annotated[str, typer.Argument(help="a named run (see `afd-fast runs`)")],
    overrides: Keys = None,
    out: Out = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show what would run, how large it is and what the teacher would cost")
    ] = False,
    help_keys: Annotated[bool, typer.Option("--help-keys", help="list the run's keys and exit")] = False,
) -> None:
    """Train a named RUN with key=value overrides."""
    from afd_fast.config import with_overrides
    from afd_fast.training import runs

    config = with_overrides(runs.get(run), overrides or [])
    if help_keys:
        return console.print(_key_table(config))
    if not dry_run:
        return train_run(config, out, overwrite, resume)
    from tempfile import TemporaryDirectory

    from afd_fast.config import to_dict
    from afd_fast.estimate import floor
    from afd_fast.training.run import facts
    from afd_fast.training.teacher import teacher_of
    from afd_fast.training.trainer import new_run

    check_place(out or Path("runs") / config.name)
    with TemporaryDirectory() as cache:
        prepared = new_run(config)
        teacher = teacher_of(prepared, None, Path(cache))
        found = facts(prepared, teacher)
    usual, now = to_dict(runs.get(run)), to_dict(config)
    parts = ("name", "method", "iterations", "student.name", "teacher", "discriminator.name")
    chosen = {key: value for key, value in now.items() if key in parts or value != usual[key]}
    shown = table("", "")
    for key, value in (chosen | found | floor(config)).items():
        shown.add_row(key, escape(str(value)))
    console.print(shown)
    for problem in teacher.problems:
        console.print(f"[yellow]left out:[/] {escape(problem)}")
    console.print(f"every other key is as {escape(run)} has it: afd-fast keys {escape(run)}", highlight=False)


def _key_table(config: "TrainConfig") -> "Table":
    """Every key as it is typed, `key=default`, with its meaning."""
    from afd_fast.config import keys

    listed = table("key=default", "meaning", title=escape(f"keys of {config.name}"), box=SIMPLE_HEAD)
    listed.columns[0].min_width, listed.columns[0].max_width = 38, 44
    for key in keys(config):
        if isinstance(key.value, tuple):
            value = ",".join(map(str, key.value))
        else:
            value = key.value if isinstance(key.value, str) else str(key.value).lower()
        listed.add_row(escape(f"{key.name}={value}"), escape(key.meaning))
    return listed


@app.command(name="keys")
def list_keys(
    run: Annotated[str, typer.Argument(help="a named run, whose values are the defaults")] = "demo",
) -> None:
    """List every key of the configuration with its default and meaning."""
    from afd_fast.training import runs

    console.print(_key_table(runs.get(run)))


Seeds = Annotated[int, typer.Option(help="runs per row, with seeds from the run's on")]
Jobs = Annotated[int, typer.Option(help="runs at the same time; each gets its share of the cores")]


def _compare(run: str, overrides: list[str] | None, variants: "Variants", seeds: int, out: Path, jobs: int) -> None:
    from afd_fast.reports.comparison import console_table, verdict, write_report
    from afd_fast.training.compare import compare

    check_place(out)
    comparison = compare(run, overrides or [], variants, seeds, out, jobs=jobs, console=console)
    console.print(console_table(comparison))
    console.print(escape(verdict(comparison)), highlight=False)
    console.print(f"report: {escape(str(write_report(out)))}")


@app.command(name="compare")
def compare_methods(
    run: str,
    overrides: Keys = None,
    methods: Annotated[str, typer.Option(help="of afd, sft, gan, dmd, rejection; the base student is always there")] = (
        "base,sft,gan,dmd,afd"
    ),
    seeds: Seeds = 3,
    out: Out = None,
    jobs: Jobs = 1,
) -> None:
    """Train RUN with several methods over several seeds: one table, one report.

    METHOD:key=value is a setting of one method alone. The same command continues after a stop.
    """
    from afd_fast.training import compare

    names = [name for name in dict.fromkeys(map(str.strip, methods.split(","))) if name and name != "base"]
    common, own = compare.own_overrides(overrides or [])

    def rows(config: "TrainConfig") -> list[compare.Variant]:
        return compare.methods(config, names, own)

    _compare(run, common, rows, seeds, out or Path("runs") / f"compare-{run}", jobs)


@app.command()
def ablate(
    what: Annotated[str, typer.Argument(help="disc_lr, disc_loss, v_old, t_sampling, k, teacher_r, prior or history")],
    run: str,
    overrides: Keys = None,
    seeds: Seeds = 1,
    out: Out = None,
    jobs: Jobs = 1,
) -> None:
    """Train RUN with several settings of one thing (the paper's sweeps), as `compare` does."""
    from afd_fast.training.compare import ABLATIONS

    if what not in ABLATIONS:
        raise ConfigError(f"unknown ablation {what!r}; known: {', '.join(ABLATIONS)}")
    _compare(run, overrides, ABLATIONS[what], seeds, out or Path("runs") / f"ablate-{what}-{run}", jobs)


@app.command()
def estimate(
    run: str,
    overrides: Keys = None,
    gpu: Annotated[str, typer.Option(help="h100, h200, a100 or rtx4090")] = "h100",
) -> None:
    """Least time and memory of one training iteration of RUN on a GPU, by phase; nothing is run or downloaded."""
    from afd_fast import estimate as arithmetic
    from afd_fast.config import with_overrides
    from afd_fast.training import runs

    device, config = arithmetic.gpu_of(gpu), with_overrides(runs.get(run), overrides or [])
    found = arithmetic.estimate(config)
    console.print(*arithmetic.tables(found, device), *map(escape, found.about), sep="\n")


@app.command(name="runs")
def list_runs() -> None:
    """List the named runs."""
    from afd_fast.training import runs

    for name, function in runs.RUNS.items():
        console.print(f"[bold]{name}[/]  {' '.join((function.__doc__ or '').split())}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="folder of a finished run")],
    picture: Annotated[
        Path | None, typer.Option(help="write its sample videos side by side as a moving .webp or .gif instead")
    ] = None,
) -> None:
    """Write report.html of a finished run folder again."""
    from afd_fast.files.text import check_folder
    from afd_fast.reports.picture import write_picture
    from afd_fast.reports.run import write_report

    check_folder(run, "the folder of a finished run, such as runs/demo")
    if not (run / "result.json").exists():
        mend = "continue it with --resume" if (run / "config.json").exists() else "give a run's, such as runs/demo"
        raise ConfigError(f"{run} holds no finished run (no result.json): {mend}")
    check_writable(picture or run / "report.html")
    console.print(escape(str(write_picture(run, picture) if picture else write_report(run))))


@app.command()
def env() -> None:
    """Print versions, devices and which implementation serves every operator."""
    from afd_fast import ops, threads
    from afd_fast.training.run_folder import environment

    shown = table("", "")
    for key, value in (environment() | threads.facts()).items():
        shown.add_row(key, escape(str(value)))
    for name, where in ops.backends().items():
        shown.add_row(f"operator {name}", where)
    console.print(shown)


def main() -> None:
    """Run the command. An error that the user can mend is one line on stderr, with the exit status of its class; so is a
    file that cannot be read or written. Errors that this library did not raise keep their traceback."""
    try:
        app()
    except MissingExtra as error:
        _fail(str(missing(sys.argv[1:], error)), error.exit_code)
    except AFDError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        _fail(f"{error.filename or ''}: {error.strerror or error}".lstrip(": "), 1)
    except ValueError as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        if not Path(where).is_relative_to(Path(__file__).parent.parent):
            raise
        _fail(str(error), ConfigError.exit_code)


def _fail(text: str, status: int) -> NoReturn:
    Console(stderr=True, soft_wrap=True, emoji=False).print(f"[red]error:[/] {escape(text)}", highlight=False)
    sys.exit(status)

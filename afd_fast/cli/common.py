"""What the commands share: the terminal, options, a training run from its configuration to its report."""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from afd_fast.errors import ConfigError

if TYPE_CHECKING:
    from afd_fast.config import TrainConfig
    from afd_fast.students.toy.pretrain import Kept, Report

console = Console(emoji=False)  # a path may hold ":x:"
FRAMES, FPS = 24, 8.0  # of somebody's own videos, where nothing else is said

Out = Annotated[Path | None, typer.Option(help="run folder; default runs/NAME")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace the run folder if it exists")]
Resume = Annotated[bool, typer.Option("--resume", help="continue the run in the folder")]
Seed = Annotated[int, typer.Option(min=0, max=2**62)]
Keys = Annotated[
    list[str] | None,
    typer.Argument(help="key=value overrides of the configuration (see `afd-fast keys`)", show_default=False),
]


def run(config: "TrainConfig", out: Path | None, overwrite: bool, resume: bool) -> None:
    """Train and write the report."""
    from afd_fast.reports.run import conclude
    from afd_fast.training import train

    out = out or Path("runs") / config.name
    if not out.exists():  # else `train` looks at it, and another rank's probe inside would count as its content
        check_place(out)
    result = train(config, out=out, resume=resume, overwrite=overwrite, console=console)
    if result is not None:  # rank 0
        conclude(console, out, result)


def height_width(text: str) -> tuple[int, int] | None:
    """ "48x80" -> (48, 80); None for another text."""
    parts = text.lower().split("x")
    return (int(parts[0]), int(parts[1])) if len(parts) == 2 and all(part.isdecimal() for part in parts) else None


def table(*headers: str, **options: Any) -> Table:
    """A table whose long words, such as paths, go on in the next line instead of being cut; headers of "" alone are not shown."""
    columns = (Column(header, overflow="fold") for header in headers)
    return Table(*columns, show_header=any(headers), title_justify="left", **options)


def check_place(out: Path) -> None:
    """ConfigError unless the folder `out` can be made, or is there and can be written; nothing is left behind."""
    nearest = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".afd-fast-", dir=nearest):
            pass
    except OSError:
        what = "cannot be written" if nearest.is_dir() else "is a file"
        raise ConfigError(f"{out} cannot be made, as {nearest} {what}: choose another --out") from None


@contextlib.contextmanager
def keeping(base: Path, made: Mapping[str, Any]) -> Iterator[tuple["Report", "Kept"]]:
    """Around the minutes that make a base student's file `base`: the bar, and what keeps them. A stop ends them after the step that
    runs, and the same command continues; `made`: what tells these minutes from others."""
    from afd_fast.students.toy import shipped
    from afd_fast.students.toy.pretrain import Kept
    from afd_fast.training.progress import on_stop_signal

    check_writable(base)
    kept = Kept(base.with_suffix(".state"), json.dumps(made))

    def stop(*_: object) -> None:
        kept.stop = True
        console.print("stopping after this step ...")

    with shipped.shown(console) as report, on_stop_signal(stop):
        yield report, kept
    kept.path.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """ConfigError now, not after the minutes that make the file; a file that is there stays as it is."""
    check_place(path.parent)
    new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}): choose another place") from None
    if new:
        path.unlink()

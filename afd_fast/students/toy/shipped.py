"""The embedded worlds' base students: shipped weights, and the runs that made them."""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.resources import as_file, files
from pathlib import Path

from afd_fast.errors import ConfigError, extra
from afd_fast.files.tensors import save_tensors
from afd_fast.students.files import loading
from afd_fast.students.toy import pretrain
from afd_fast.students.toy.model import ToyConfig, ToyStudent

with extra("demo"):
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from safetensors import safe_open

TIMED = 6  # steps after which the rest is foretold
SHIPPED = {
    "toy": "base_student.safetensors",
    "toy_long": "base_student_long.safetensors",
    "lights": "lights_few_steps.safetensors",
    "lights_many": "lights_many_steps.safetensors",
}


def load(path: Path | None = None, *, name: str = "toy") -> ToyStudent:
    """A shipped base student, or one that `make` or a run wrote. ConfigError for another file."""
    if path is not None and path.is_dir():
        raise ConfigError(f"{path} is a folder: give the file of a toy student, such as a run's student.safetensors")
    with as_file(files("afd_fast") / "assets" / SHIPPED[name]) as shipped, loading("toy student", path or shipped):
        with safe_open(path or shipped, "pt") as file:
            student = ToyStudent(ToyConfig(**json.loads(file.metadata()["config"])))
            student.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
    return student


def in_time(seconds: float) -> str:
    """About how long, in words."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds > 2 * size:
            return f"about {seconds / size:.0f} {unit}"
    return f"about {max(seconds, 1):.0f} s"


@contextlib.contextmanager
def shown(console: Console) -> Iterator[pretrain.Report]:
    """The bar of a base student's pretraining, and a line that says how long it takes: call it with (steps done, steps, loss)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    seen: list[float] = []  # when the first steps were done
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=console) as progress:
        task = progress.add_task("base student", total=None, loss=0.0)

        def report(step: int, of: int, loss: float) -> None:
            progress.update(task, total=of, completed=step, loss=loss)
            seen.append(time.monotonic())
            if len(seen) == TIMED and of > step:
                each = (seen[-1] - seen[0]) / (TIMED - 1)
                console.print(f"the base student takes {in_time(each * (of - step))} more at {each:.2g} s a step")

        yield report


def make(
    out: Path, *, name: str = "physics", seed: int = 0, frames: int | None = None, report: pretrain.Report,
    kept: pretrain.Kept | None = None,
) -> str:  # fmt: skip
    """Pretrain the base student of a world of `pretrain.WORLDS` from nothing; `out` gets the weights, with command, seed and loss
    as metadata. frames: of its clips; None: the world's. Returns the loss, the mean of the last 200 steps of this call."""
    world = pretrain.WORLDS[name]
    if frames is not None:
        world = replace(world, student=replace(world.student, frames=frames))
    losses: list[float] = []

    def noted(step: int, of: int, loss: float) -> None:
        losses.append(loss)
        report(step, of, loss)

    student = pretrain.pretrain(world, seed=seed, report=noted, kept=kept)
    command = f"afd-fast pretrain --world {name} --seed {seed} --frames {world.student.frames}"
    loss = f"{sum(losses[-200:]) / len(losses[-200:]):.4f}"
    save(student, out, world=name, command=command, seed=str(seed), loss=loss)
    return loss


def save(student: ToyStudent, out: Path, **about: str) -> None:
    """Write a base student's weights, with what made them as metadata: world, command, seed, figures."""
    save_tensors(student.state_dict(), out, {"config": json.dumps(asdict(student.config)), **about})


def world_of_many_steps(path: Path) -> str:
    """The world whose wrong physics a many-step student that `make` wrote has learnt. ConfigError for another file, a student that has
    been distilled already or comes from a run too."""
    with loading("toy student", path), safe_open(path, "pt") as file:
        about = file.metadata()
    if "run" in about or "--distill" in about.get("command", ""):
        raise ConfigError(f"{path} is no many-step student: give what `afd-fast pretrain --world lights` wrote")
    return str(about.get("world", "physics"))  # which older files do not say

"""`afd-fast pretrain`: the base students of the embedded worlds, from nothing."""

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from afd_fast.cli.common import Seed, console, keeping
from afd_fast.errors import ConfigError
from afd_fast.files.durable import checksum


def pretrain(
    out: Annotated[Path, typer.Option(help="where the weights go")] = Path("base_student.safetensors"),
    seed: Seed = 0,
    world: Annotated[
        str | None,
        typer.Option(help='"physics", one ball; "looks", it with dusk in one clip of ten; "lights", two lights'),
    ] = None,
    frames: Annotated[int | None, typer.Option(help="length of its clips, whole chunks; none: the world's")] = None,
    distill: Annotated[
        Path | None,
        typer.Option(
            help="instead, distil this many-step student, which the command wrote, to three steps (Self-Forcing's DMD)"
        ),
    ] = None,
) -> None:
    """Train a base student of an embedded world's wrong physics from nothing, or distil one to three steps."""
    if out.exists():
        raise ConfigError(f"{out} exists; choose another --out")
    if distill is not None:
        if world is not None or frames is not None:
            raise ConfigError("--distill takes world and frames from its file: leave out --world and --frames")
        return _distill(distill, out, seed)
    from afd_fast.students.toy import shipped
    from afd_fast.students.toy.pretrain import WORLDS
    from afd_fast.teachers import physics

    name = world or "physics"
    if name not in WORLDS:
        raise ConfigError(f"--world must be {' or '.join(WORLDS)}, got {name!r}")
    chunk = WORLDS[name].student.chunk
    least = math.ceil(physics.LEAST_FRAMES / chunk) * chunk
    if frames is not None and (frames < least or frames % chunk):
        raise ConfigError(f"--frames must be a multiple of {chunk} and at least {least}, got {frames}")
    with keeping(out, {"world": name, "seed": seed, "frames": frames}) as (report, kept):
        loss = shipped.make(out, name=name, seed=seed, frames=frames, report=report, kept=kept)
    console.print(f"{escape(str(out))}: loss {loss}")


def _distill(many: Path, out: Path, seed: int) -> None:
    from afd_fast.students.toy import shipped
    from afd_fast.students.toy.family import of_student
    from afd_fast.students.toy.model import ToyStudent
    from afd_fast.students.toy.pretrain import WORLDS
    from afd_fast.training import self_forcing

    student, name = shipped.load(many), shipped.world_of_many_steps(many)
    of = {"distilled": checksum(many), "seed": seed}
    with keeping(out, of) as (report, kept):
        made = self_forcing.distill(of_student(student), WORLDS[name].prompts, seed=seed, report=report, kept=kept)
        assert isinstance(made, ToyStudent)
        command = f"afd-fast pretrain --distill {many.name} --seed {seed}"
        shipped.save(made, out, world=name, command=command, seed=str(seed))
    console.print(escape(str(out)))

"""Runs for tests: networks of the embedded task or a tiny CausalWan, without folder or teacher."""

from pathlib import Path

from rich.console import Console

from afd_fast.config import with_values
from afd_fast.students.student import family
from afd_fast.students.toy import shipped
from afd_fast.students.toy.family import of_student
from afd_fast.training.run import Run
from afd_fast.training.run_folder import make_folder
from afd_fast.training.state import new_state
from afd_fast.training.teacher import teacher_of
from afd_fast.training.trainer import Trainer, new_run
from afd_fast.training.velocity import Chunking, velocity

QUIET = Console(quiet=True)


def changed(config, **keys):
    """The configuration with values; `__` is a dot: changed(config, update__v_old="self")."""
    return with_values(config, {name.replace("__", "."): value for name, value in keys.items()})


def toy_run(config, student=None):
    """A Run of a ToyStudent, the shipped one by default."""
    return Run(config, new_state(config, of_student(student or shipped.load())))


def named_run(config):
    """A Run of the family that the configuration names."""
    return Run(config, new_state(config, family(config.student, chunk=config.rollout.chunk, seed=config.seed)))


def trainer(config, out: Path, console=QUIET) -> Trainer:
    """A Trainer in a new folder `out`, its teacher cache next to it."""
    run = new_run(config)
    teacher = teacher_of(run, None, out.parent / "cache")
    make_folder(out, config)
    return Trainer(run, teacher, out, console)


def student_velocity(student, x_t, t, text, x0, chunk):
    """v_theta of the update, over a detached history."""
    return velocity(student, x_t, t, text, x0, Chunking(chunk))

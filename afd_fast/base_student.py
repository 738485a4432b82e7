"""The demo's base student: shipped weights, and the run that made them."""

import json
from dataclasses import asdict
from importlib.resources import as_file, files
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file

from afd_fast.models.toy import ToyConfig, ToyStudent
from afd_fast.rollout import RolloutConfig
from afd_fast.training.pretrain import distill, pretrain_flow

FLOW_STEPS, DISTILL_STEPS = 4000, 240
SHIPPED = "base_student.safetensors"


def load(path: Path | None = None) -> ToyStudent:
    """The shipped base student, or one written by `pretrain`."""
    with as_file(files("afd_fast") / "assets" / SHIPPED) as shipped, safe_open(path or shipped, "pt") as file:
        student = ToyStudent(ToyConfig(**json.loads(file.metadata()["config"])))
        student.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
    return student


def pretrain(console: Console, out: Path | None = None, *, seed: int = 0) -> ToyStudent:
    """Train a base student from nothing; `out` gets the weights with the command, seed and losses in the metadata."""
    losses: dict[str, list[float]] = {"flow": [], "distill": []}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("loss {task.fields[loss]:.3f}"))
    with Progress(*columns, console=console) as progress:
        tasks = {
            "flow": progress.add_task("base student, flow", total=FLOW_STEPS, loss=0.0),
            "distill": progress.add_task("base student, few-step", total=DISTILL_STEPS, loss=0.0),
        }

        def report(phase: str, step: int, of: int, loss: float) -> None:
            losses[phase].append(loss)
            progress.update(tasks[phase], completed=step, loss=loss)

        student = pretrain_flow(FLOW_STEPS, seed=seed, report=report)
        student = distill(student, DISTILL_STEPS, RolloutConfig(shift=1.0), seed=seed, report=report)
    if out:
        last = {phase: sum(values[-50:]) / len(values[-50:]) for phase, values in losses.items()}
        about = {
            "config": json.dumps(asdict(student.config)),
            "command": f"afd-fast pretrain --seed {seed}",
            "seed": str(seed),
            "losses": json.dumps({k: round(v, 4) for k, v in last.items()}),
        }
        save_file(student.state_dict(), out, about)
        console.print(f"{out}: {about['command']}, final losses {about['losses']}")
    return student

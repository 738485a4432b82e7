"""Methods or settings side by side, each over several seeds: child processes, one table, one report.

A comparison folder holds a run folder for each (variant, seed), comparison.json and comparison.html. The same command
again keeps what is finished, resumes what is not, and adds what is new.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from afd_fast.config import TrainConfig, from_dict, to_dict, with_overrides
from afd_fast.errors import ConfigError, Interrupted, TrainingError
from afd_fast.training import runs as recipes
from afd_fast.training.trainer import on_stop_signal

POLL = 0.5  # seconds


@dataclass(frozen=True)
class Variant:
    """A row of the table: keys of the configuration that make it differ from the recipe."""

    label: str
    keys: dict = field(default_factory=dict)


def methods(config: TrainConfig, names: list[str]) -> list[Variant]:
    """ "afd" and the baselines, with the settings of `recipes.baseline`. ConfigError for other names."""
    return [Variant(name, recipes.baseline(config, name)) for name in names]


def _scaled(key: str, *factors: float) -> Callable[[TrainConfig], list[Variant]]:
    return lambda c: [Variant(f"{key}={v:g}", {key: v}) for v in (f * getattr(c, key) for f in factors)]


def _choices(key: str, *values) -> Callable[[TrainConfig], list[Variant]]:
    return lambda c: [Variant(f"{key}={v}", {key: v}) for v in values]


def _group_sizes(config: TrainConfig) -> list[Variant]:
    batch = config.prompts_per_step * config.rollouts_per_prompt
    return [
        Variant(f"K={k}", {"rollouts_per_prompt": k, "prompts_per_step": batch // k}) for k in (2, 4, 8) if batch % k == 0
    ]  # fmt: skip


ABLATIONS = {
    "disc_lr": _scaled("disc_lr", 0, 0.1, 0.5, 1, 5),  # the paper's sweep (Figure 5) in units of its best
    "disc_loss": _choices("disc_loss", "bt", "gan"),  # Figure 6
    "v_old": _choices("v_old", "ema", "self"),
    "t_sampling": _choices("t_sampling", "grid", "uniform"),
    "k": _group_sizes,  # rollouts a prompt at the same batch
    "prior": _scaled("prior_weight", 0, 1, 10, 100),
    "update": _choices("update", "detached", "teacher_forcing", "block_causal"),
}


def _text(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def runs(config: TrainConfig, variants: list[Variant], seeds: int, out: Path) -> dict[Path, TrainConfig]:
    """Run folder -> its configuration, seed by seed. ConfigError if a folder holds another run already."""
    planned = {}
    for seed in range(config.seed, config.seed + seeds):
        for v in variants:
            folder = out / f"{v.label}-{seed}"
            planned[folder] = replace(config, **v.keys, seed=seed, name=f"{config.name} {v.label}")
    for folder, wanted in planned.items():
        if (folder / "config.json").exists():
            found = to_dict(from_dict(json.loads((folder / "config.json").read_text())))
            odd = [key for key, value in to_dict(wanted).items() if found[key] != value]
            if odd:
                raise ConfigError(f"{folder} is a run with another {', '.join(odd)}: choose another --out")
        elif folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder} exists and is not a run folder: choose another --out")
    return planned


def log_of(folder: Path) -> Path:
    """Where a run's output goes, beside its folder (whose name may hold a dot)."""
    return folder.with_name(f"{folder.name}.log")


def _start(recipe: str, folder: Path, config: TrainConfig, jobs: int) -> subprocess.Popen:
    default = to_dict(recipes.get(recipe))
    overrides = [f"{k}={_text(v)}" for k, v in to_dict(config).items() if v != default[k]]
    resume = ["--resume"] if (folder / "config.json").exists() else []
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "afd_fast", "train", recipe, *overrides, "--out", str(folder), *resume]
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    with log_of(folder).open("ab") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, env={"OMP_NUM_THREADS": threads} | os.environ, start_new_session=True
        )


def run_all(recipe: str, planned: dict[Path, TrainConfig], *, jobs: int, console: Console) -> None:
    """Run what is not finished, `jobs` processes at a time. TrainingError with the log's last line when one fails;
    Interrupted after Ctrl-C or SIGTERM, once every child has saved itself."""
    waiting = [folder for folder in planned if not (folder / "result.json").exists()]
    running: dict[Path, subprocess.Popen] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    asked = []  # a signal in the middle of starting a child must not lose it
    with on_stop_signal(lambda *_: asked.append(True)), Progress(*columns, console=console) as progress:
        whole = progress.add_task("runs", total=len(planned), completed=len(planned) - len(waiting))
        bars = {}
        try:
            while (waiting or running) and not asked:
                while waiting and len(running) < jobs:
                    folder = waiting.pop(0)
                    running[folder] = _start(recipe, folder, planned[folder], jobs)
                    bars[folder] = progress.add_task(folder.name, total=planned[folder].iterations)
                time.sleep(POLL)
                for folder, child in list(running.items()):
                    log = folder / "metrics.jsonl"
                    progress.update(bars[folder], completed=log.read_bytes().count(b"\n") if log.exists() else 0)
                    if child.poll() is None:
                        continue
                    del running[folder]
                    if child.returncode:
                        last = log_of(folder).read_text(errors="replace").strip().splitlines()[-1:]
                        raise TrainingError(f"{folder.name} failed: {' '.join(last)} (see {log_of(folder)})")
                    progress.remove_task(bars[folder])
                    progress.advance(whole)
        finally:
            for child in running.values():
                child.send_signal(signal.SIGINT)
            for child in running.values():
                child.wait()
    if asked:
        raise Interrupted("stopped; the same command goes on from here")


def gather(recipe: str, planned: dict[Path, TrainConfig], variants: list[Variant], out: Path) -> dict:
    """comparison.json's content: for base, every variant and the teacher each score's mean, standard deviation (of a
    sample; None for one seed) and values."""
    results = {folder: json.loads((folder / "result.json").read_text()) for folder in planned}
    by_label = {v.label: [r for f, r in results.items() if f.name.rpartition("-")[0] == v.label] for v in variants}

    def scores(rows: list[dict]) -> dict:
        kept = {}
        for key in rows[0]:
            values = [row[key] for row in rows if key in row]
            spread = statistics.stdev(values) if len(values) > 1 else None
            kept[key] = {"mean": statistics.fmean(values), "sd": spread, "values": values}
        return kept

    first = next(iter(results.values()))
    rows = {"base": scores([first["rows"]["base"]])}
    for label, found in by_label.items():
        rows[label] = scores([r["rows"]["student"] for r in found])
        rows[label] |= scores([{"seconds": r["seconds"]} for r in found])
    rows["teacher"] = scores([first["rows"]["teacher"]])
    comparison = {
        "recipe": recipe,
        "rows": rows,
        "seeds": sorted({c.seed for c in planned.values()}),
        "clips_judged": first["clips_judged"],
        "prompts": first["prompts"],
        "runs": {str(f.relative_to(out)): to_dict(c) for f, c in planned.items()},
        "environment": first["environment"],
    }
    partial = out / "comparison.part"
    partial.write_text(json.dumps(comparison, indent=1))
    partial.replace(out / "comparison.json")
    return comparison


def compare(
    recipe: str, overrides: list[str], variants: Callable[[TrainConfig], list[Variant]], seeds: int, out: Path, *,
    jobs: int = 1, console: Console,
) -> dict:  # fmt: skip
    """Run, collect; returns comparison.json's content. Errors of `runs` before anything starts, of `run_all` during it."""
    if seeds < 1 or jobs < 1:
        raise ConfigError(f"--seeds and --jobs must be at least 1, got {seeds} and {jobs}")
    config = with_overrides(recipes.get(recipe), overrides)
    rows = variants(config)
    planned = runs(config, rows, seeds, out)
    run_all(recipe, planned, jobs=jobs, console=console)
    return gather(recipe, planned, rows, out)

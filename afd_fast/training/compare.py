"""Methods or settings side by side, each over several seeds: child processes, one table, one report.

A comparison folder holds a run folder for each (variant, seed), comparison.json and comparison.html. The same command
again keeps what is finished, resumes what is not, and adds what is new, more iterations too.
"""

import os
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

from afd_fast import threads
from afd_fast.config import TrainConfig, to_dict, with_overrides, with_values
from afd_fast.errors import ConfigError, Interrupted, TrainingError, extra
from afd_fast.files.text import read_json
from afd_fast.students.student import FAMILIES
from afd_fast.training import runs as named
from afd_fast.training.lock import COMPARISON, check_unused, locked
from afd_fast.training.methods import METHODS
from afd_fast.training.progress import on_stop_signal, progress
from afd_fast.training.run_folder import check_folder, finished, judged, started, write_json
from afd_fast.training.teacher import teacher_of
from afd_fast.training.trainer import new_run

with extra("train"):
    from rich.console import Console

POLL = 0.5  # seconds
SHARED = {  # what the base student and the teacher are and how they are judged, besides rollout.*
    "teacher", "codec_crf", "evaluation.rollouts", "stream.frames", "student.name", "student.base", "student.frames", "student.height",
    "student.width",
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A row of the table: the keys of the configuration by which it differs from the run."""

    label: str
    keys: dict[str, Any] = field(default_factory=dict)


Variants = Callable[[TrainConfig], list[Variant]]


def methods(
    config: TrainConfig, names: list[str], own: Mapping[str, list[str]] = MappingProxyType({})
) -> list[Variant]:
    """ "afd" and the baselines, each with its method's defaults. own: "key=value" strings of one method alone, by its name.
    ConfigError for other names."""
    for name in [*names, *own]:
        if name not in METHODS:
            raise ConfigError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    if unused := [name for name in own if name not in names]:
        raise ConfigError(f"settings for {', '.join(unused)}, which is not compared: add it to --methods")
    found = []
    for name in names:
        method = METHODS[name]
        for key in ("method", "seed", "name"):
            if any(item.partition("=")[0].strip() == key for item in own.get(name, [])):
                raise ConfigError(f"{name}:{key}= is not for one method alone: a comparison sets it itself")
        keys = {"method": name, **method.defaults, "update.lr": config.update.lr * method.lr_scale}
        usual = with_values(config, keys)
        before, given = to_dict(usual), to_dict(with_overrides(usual, own.get(name, [])))
        changed = {key: value for key, value in given.items() if value != before[key]}
        if shared := [key for key in changed if key in SHARED or key.startswith("rollout.")]:
            raise ConfigError(
                f"{name}:{shared[0]}= is not for one method alone: all rows have one base student, one teacher and one judge"
            )
        found.append(Variant(name, keys | changed))
    return found


def own_overrides(overrides: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The "key=value" strings of all methods, and those written "METHOD:key=value" by method."""
    common, own = [], defaultdict[str, list[str]](list)
    for item in overrides:
        name, colon, rest = item.partition(":")
        if colon and "=" not in name:
            own[name].append(rest)
        else:
            common.append(item)
    return common, dict(own)


def _scaled(key: str, *factors: float) -> Variants:
    """Variants at multiples of the configuration's value."""

    def variants(config: TrainConfig) -> list[Variant]:
        values = [f * to_dict(config)[key] for f in factors]
        return [Variant(f"{key}={v:g}", {key: v}) for v in values]

    return variants


def _choices(key: str, *values: Any) -> Variants:
    """Variants with these values."""

    def variants(config: TrainConfig) -> list[Variant]:
        return [Variant(f"{key}={v}", {key: v}) for v in values]

    return variants


def _group_sizes(config: TrainConfig) -> list[Variant]:
    """Rollouts per prompt at the same batch."""
    batch = config.prompts_per_step * config.rollouts_per_prompt
    return [
        Variant(f"K={k}", {"rollouts_per_prompt": k, "prompts_per_step": batch // k})
        for k in (2, 4, 8)
        if batch % k == 0
    ]


ABLATIONS: dict[str, Variants] = {
    "disc_lr": _scaled("discriminator.lr", 0, 0.1, 0.5, 1, 5),  # the paper's sweep (Figure 5) in units of its best
    "disc_loss": _choices("discriminator.loss", "bt", "gan"),  # Figure 6
    "v_old": _choices("update.v_old", "ema", "self"),
    "t_sampling": _choices("update.t_sampling", "grid", "uniform"),
    "k": _group_sizes,
    "teacher_r": _choices("teacher_r", None, 0.75),
    "prior": _scaled("loss.ref_coef", 0, 1, 10, 100),
    "history": _choices("update.history", "detached", "teacher_forcing", "block_causal"),
}


def _text(value: Any) -> str:
    """A value as `key=value` takes it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def runs(config: TrainConfig, variants: list[Variant], seeds: int, out: Path) -> dict[Path, TrainConfig]:
    """Run folder -> its configuration, seed by seed. ConfigError if a folder holds another run already."""
    planned = {}
    for seed in range(config.seed, config.seed + seeds):
        for v in variants:
            keys = {**v.keys, "seed": seed, "name": f"{config.name} {v.label}"}
            planned[out / f"{v.label}-{seed}"] = with_values(config, keys)
    for folder, wanted in planned.items():
        if not started(folder) and (folder / "checkpoints").exists():
            raise ConfigError(f"{folder} has lost its config.json: delete the folder, or choose another --out")
        check_folder(folder, wanted, overwrite=not started(folder), resume=started(folder))
    return planned


def log_of(folder: Path) -> Path:
    """Where a run's output goes, next to its folder (whose name may hold a dot)."""
    return folder.with_name(f"{folder.name}.log")


def overrides_of(run: str, config: TrainConfig) -> list[str]:
    """The "key=value" strings that make the named run this configuration. A recipe's name stands for all of its settings."""
    default = named.get(run)
    recipe = [] if config.loss.name == default.loss.name else [f"loss={config.loss.name}"]
    before = to_dict(with_overrides(default, recipe))
    return recipe + [f"{k}={_text(v)}" for k, v in to_dict(config).items() if v != before[k]]


def _start(run: str, folder: Path, config: TrainConfig, jobs: int) -> "subprocess.Popen[bytes]":
    how = "--resume" if started(folder) else "--overwrite"
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "afd_fast", "train", run, *overrides_of(run, config), "--out", str(folder), how]
    with log_of(folder).open("ab") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | threads.share(jobs), start_new_session=True
        )


def run_all(run: str, planned: dict[Path, TrainConfig], *, jobs: int, console: Console) -> None:
    """Run what is not finished, `jobs` processes at a time. TrainingError with the log's last line when one fails;
    Interrupted after Ctrl-C or SIGTERM, once every child has saved itself."""
    waiting = [folder for folder, config in planned.items() if not finished(folder, config)]
    running: dict[Path, subprocess.Popen] = {}
    asked = []  # a signal in the middle of starting a child must not lose it
    with on_stop_signal(lambda *_: asked.append(True)), progress(console) as bar:
        whole = bar.add_task("runs", total=len(planned), completed=len(planned) - len(waiting))
        bars = {}
        try:
            while (waiting or running) and not asked:
                while waiting and len(running) < jobs:
                    folder = waiting.pop(0)
                    running[folder] = _start(run, folder, planned[folder], jobs)
                    bars[folder] = bar.add_task(folder.name, total=planned[folder].iterations)
                time.sleep(POLL)
                for folder, child in list(running.items()):
                    log = folder / "metrics.jsonl"
                    bar.update(bars[folder], completed=log.read_bytes().count(b"\n") if log.exists() else 0)
                    if child.poll() is None:
                        continue
                    del running[folder]
                    if child.returncode:
                        last = log_of(folder).read_text(errors="replace").strip().splitlines()[-1:]
                        raise TrainingError(f"{folder.name} failed: {' '.join(last)} (see {log_of(folder)})")
                    bar.remove_task(bars[folder])
                    bar.advance(whole)
        finally:
            for child in running.values():
                child.send_signal(signal.SIGINT)
            for child in running.values():
                child.wait()
    if asked:
        raise Interrupted("stopped; the same command continues from here")


def gather(run: str, planned: dict[Path, TrainConfig], variants: list[Variant], out: Path) -> dict[str, Any]:
    """comparison.json's content: for base, every variant and the teacher each score's mean, standard deviation (of a
    sample; None for one seed) and values; by_prompt, the first headline score [seeds, held-out prompts] of all but the teacher."""
    results = {folder: read_json(folder / "result.json") for folder in planned}
    folders = {v.label: [folder for folder in planned if folder.name.rpartition("-")[0] == v.label] for v in variants}

    def at(number: int, folder: Path) -> list[float]:
        """An evaluation's score of every prompt; empty in a run of an older version."""
        by_prompt: list[float] = judged(folder, planned[folder].iterations)[number].get("by_prompt", [])
        return by_prompt

    def scores(rows: list[dict[str, float]]) -> dict[str, Any]:
        kept = {}
        for key in rows[0]:
            values = [row[key] for row in rows if key in row]
            spread = statistics.stdev(values) if len(values) > 1 else None
            kept[key] = {"mean": statistics.fmean(values), "sd": spread, "values": values}
        return kept

    folder, first = next(iter(results.items()))
    rows, by_prompt = {"base": scores([first["rows"]["base"]])}, {"base": [at(0, folder)]}
    for label, of in folders.items():
        rows[label] = scores([results[folder]["rows"]["student"] for folder in of])
        rows[label] |= scores([{"seconds": results[folder]["seconds"]} for folder in of])
        by_prompt[label] = [at(-1, folder) for folder in of]
    rows["teacher"] = scores([first["rows"]["teacher"]])
    comparison = {
        "run": run,
        "rows": rows,
        "by_prompt": by_prompt,
        "seeds": sorted({c.seed for c in planned.values()}),
        "clips_judged": first["clips_judged"],
        "prompts": first["prompts"],
        "runs": {str(f.relative_to(out)): to_dict(c) for f, c in planned.items()},
        "environment": first["environment"],
    }
    write_json(out / "comparison.json", comparison)
    return comparison


def _check_effect(default: TrainConfig, config: TrainConfig, variants: Variants) -> None:
    """ConfigError for a setting that is what is compared: every row replaces it by its own, whatever is given."""
    before, now, rows = to_dict(default), to_dict(config), variants(config)
    for key in rows[0].keys:
        values = [v.keys[key] for v in rows if key in v.keys]
        varied = key == "method" or any(value != values[0] for value in values)
        if now[key] == before[key] or len(values) < len(rows) or not varied:
            continue
        try:
            same = variants(with_values(config, {key: before[key]})) == rows
        except ConfigError:  # two settings that need each other
            continue
        if same:
            raise ConfigError(f"{key}={_text(now[key])} has no effect here, as every row has its own: leave it out")


def compare(
    run: str, overrides: list[str], variants: Variants, seeds: int, out: Path, *, jobs: int = 1, console: Console
) -> dict[str, Any]:
    """Run, collect; returns comparison.json's content. Errors of `runs` before anything starts, of `run_all` during it."""
    if seeds < 1 or jobs < 1:
        raise ConfigError(f"--seeds and --jobs must be at least 1, got {seeds} and {jobs}")
    config = with_overrides(named.get(run), overrides)
    rows = variants(config)
    if not rows:
        raise ConfigError("there is nothing to train: name at least one method besides base")
    if (
        out.is_dir()
        and not any((out / name).exists() for name in (COMPARISON, "comparison.json"))
        and any(out.iterdir())
    ):
        raise ConfigError(f"{out} holds other things than a comparison: choose another --out")
    _check_effect(named.get(run), config, variants)
    planned = runs(config, rows, seeds, out)
    others = sorted(path.parent.name for path in out.glob("*/config.json") if path.parent not in planned)
    if others:
        console.print(
            f"not in the table, as not among these methods and seeds: {', '.join(others)}",
            highlight=False,
            markup=False,
        )
    if config.student.name in FAMILIES and not all(finished(folder, one) for folder, one in planned.items()):
        # what every run would refuse, before the first; a checkpoint takes too long to load
        with TemporaryDirectory() as cache:
            teacher_of(new_run(next(iter(planned.values()))), None, Path(cache))
    with locked(out, COMPARISON):
        for folder in planned:  # a comparison that was killed leaves its trainers running
            check_unused(folder)
        run_all(run, planned, jobs=jobs, console=console)
        return gather(run, planned, rows, out)

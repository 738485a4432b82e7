"""Commands killed with SIGKILL at random moments against the same ones left alone: python tests/kill.py trainer 100

A command is a fork of this process, which has imported the library, so that no kill costs seconds of imports. The API
client is killed by tests/api_model.py.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from afd_fast import generate
from afd_fast.cli.main import main as afd_fast
from afd_fast.reports import comparison
from afd_fast.reports import run as report
from afd_fast.teachers.physics import FPS, all_prompts, sample_clips
from afd_fast.training import checkpoint, compare, trainer
from afd_fast.training.run_folder import read_rows
from afd_fast.video_io import is_complete, write_video

TINY = ["demo", "iterations=8", "discriminator.warmup=2", "prompts_per_step=4", "rollouts_per_prompt=2", "evaluation.every=4",
        "evaluation.rollouts=1", "teacher_clips=1", "checkpoint_every=1", "student.lora_rank=4", "discriminator.width=8"]  # fmt: skip
PATIENCE = 300  # seconds until what is left of a killed command has ended


def untimed(x: Any) -> Any:
    """Without what no two runs share: times and folders."""
    if isinstance(x, dict):
        return {k: untimed(v) for k, v in x.items() if "seconds" not in k and k not in ("elapsed", "environment")}
    return [untimed(y) for y in x] if isinstance(x, list) else x


def trained(run: Path) -> Any:
    """What a finished run leaves: the newest checkpoint and the rows of its log."""
    path = checkpoint.latest(run / "checkpoints")
    rows = [read_rows(run / name) for name in ("metrics.jsonl", "evaluations.jsonl")]
    return checkpoint.load(path)["state"] if path else None, untimed(rows)


def compared(folder: Path) -> Any:
    comparison = json.loads((folder / "comparison.json").read_text())
    return untimed(comparison), [trained(run.parent) for run in sorted(folder.glob("*/config.json"))]


def evaluated(folder: Path) -> Any:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".part"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def difference(a: Any, b: Any, where: str = "") -> str:
    """Where two results first differ; empty if nowhere. NaN equals NaN."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return next(filter(None, (difference(a[k], b[k], f"{where}/{k}") for k in a)), "")
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return next(filter(None, (difference(x, y, f"{where}/{i}") for i, (x, y) in enumerate(zip(a, b)))), "")
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return "" if torch.equal(a, b) else f"{where}: tensors"
    return "" if a == b or (a != a and b != b) else f"{where}: {str(a)[:300]} and {str(b)[:300]}"


LATE = (compare, generate, trainer, comparison, report)  # what the commands import when they need it


def resume(folder: Path) -> list[str]:
    return ["--resume"] if (folder / "config.json").exists() else ["--overwrite"]


@dataclass(frozen=True)
class Kind:
    """steps: commands that make the folder, and finish it when it is there in part. result: what they leave. kept: the
    files that are finished and must not be made again."""

    steps: Callable[[Path], list[list[Any]]]
    result: Callable[[Path], Any]
    kept: Callable[[Path], list[Path]]


def kinds(work: Path) -> dict[str, Kind]:
    """work: holds the teacher's videos and the prompts."""
    tiny = [*TINY, f"teacher=folder:{work / 'teacher'}"]
    prompts = ["--prompts", work / "prompts.txt", "--student", "tiny", "--frames", "3"]
    return {
        "trainer": Kind(
            lambda folder: [["train", *tiny, "--out", folder, *resume(folder)]], trained, lambda folder: []
        ),
        "compare": Kind(
            lambda folder: [["compare", *tiny, "--methods", "sft,afd", "--seeds", 1, "--jobs", 2, "--out", folder]],
            compared,
            lambda folder: list(folder.glob("*/result.json")),
        ),
        "eval": Kind(
            lambda folder: [
                ["eval", "export", folder, *prompts],
                ["eval", "run", "flickering", folder],
                ["eval", "collect", folder],
            ],
            evaluated,
            lambda folder: [path for path in folder.glob("videos/*.mp4") if is_complete(path)],
        ),
    }


def prepare(work: Path) -> None:
    asked = all_prompts()[::12][:10]
    (work / "teacher").mkdir()
    for i, clip in enumerate(sample_clips(asked, np.random.default_rng(0))):
        write_video(work / "teacher" / f"{i}.mp4", clip.repeat_interleave(4, -1).repeat_interleave(4, -2), FPS)
    rows = [f'"{prompt}",{i}.mp4' for i, prompt in enumerate(asked)]
    (work / "teacher" / "manifest.csv").write_text("\n".join(["prompt,video", *rows]))
    (work / "prompts.txt").write_text("a ball\na cup\nrain\nsnow\nfog\n")


def start(words: list[Any], log: Path) -> int:
    """A process with the command; its output goes to the log."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = ["afd-fast", *map(str, words)]
        afd_fast()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def children(folder: Path) -> list[int]:
    """The processes that a command has started for the folder, by their command lines."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended
            continue
        if any(folder in Path(word).parents for word in words):
            found.append(int(entry.name))
    return sorted(found)


def stop(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def run(kind: Kind, folder: Path, seconds: float | None, rng: random.Random) -> bool:
    """Run the steps; after `seconds`, kill the command, one of its children, or all of them, and stop the others as the
    command's message says. Whether it was still running."""
    end = None if seconds is None else time.time() + seconds
    log = folder.with_suffix(".txt")
    for step in kind.steps(folder):
        parent = start(step, log)
        while (ended := os.waitpid(parent, os.WNOHANG))[0] == 0 and (end is None or time.time() < end):
            time.sleep(0.01)
        if ended[0] == 0:
            alive = [parent, *children(folder)]
            stop(rng.choice([alive, alive[:1], alive[-1:]]), signal.SIGKILL)
            stop([parent, *children(folder)], signal.SIGTERM)
            os.waitpid(parent, 0)
            patience = time.time() + PATIENCE
            while left := children(folder):
                if time.time() > patience:
                    raise SystemExit(f"processes {left} outlive the killed command in {folder}")
                time.sleep(0.05)
            return True
        if status := os.waitstatus_to_exitcode(ended[1]):
            raise SystemExit(f"{' '.join(map(str, step))}: exits with {status}, expected 0:\n{log.read_text()}")
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("trainer", "compare", "eval"))
    parser.add_argument("kills", type=int, nargs="?", default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    done, finishes, rng = 0, 0, random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        prepare(work)
        kind = kinds(work)[options.kind]
        started = time.time()
        run(kind, work / "alone", None, rng)
        duration, expected = time.time() - started, kind.result(work / "alone")
        print(f"left alone: {duration:.1f} s", flush=True)
        while done < options.kills:
            folder, kept = work / f"killed-{finishes}", dict[Path, int]()
            while run(kind, folder, rng.uniform(0, duration) if done < options.kills else None, rng):
                done += 1
                again = [path.name for path, when in kept.items() if path.stat().st_mtime_ns != when]
                kept = {path: path.stat().st_mtime_ns for path in kind.kept(folder)}
                print(f"kill {done}: {len(kept)} files are finished, made again: {again}", flush=True)
                if again:
                    sys.exit(1)
            finishes += 1
            if odd := difference(kind.result(folder), expected):
                raise SystemExit(f"{folder.name} differs from the one left alone at {odd}")
        print(f"{done} kills, {finishes} finishes: all bit-identical to the one left alone")


if __name__ == "__main__":
    main()

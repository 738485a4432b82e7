"""A run killed with SIGKILL at random moments against one left alone: python tests/kill.py [kills]   (minutes)"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from afd_fast.training import checkpoint
from tests.test_trainer import command, same

RUN = ["train", "demo", "iterations=70", "discriminator.warmup=2", "prompts_per_step=4", "rollouts_per_prompt=2", "evaluation.every=70",
       "evaluation.rollouts=1", "teacher_clips=1", "checkpoint_every=1", "student.lora_rank=4", "discriminator.width=8", "--out"]  # fmt: skip


def state(folder: Path) -> dict[str, Any] | None:
    """What the newest checkpoint holds; None before the first."""
    path = checkpoint.latest(folder / "checkpoints")
    return checkpoint.load(path)["state"] if path else None


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for a run that nobody kills."""
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"a run left alone exits with {process.returncode}, expected 0:\n{output}")


def resume(folder: Path) -> subprocess.Popen[str]:
    return command(*RUN, folder, "--resume" if (folder / "config.json").exists() else "--overwrite")


def kill_once(folder: Path, rng: random.Random) -> bool:
    """Start or resume the run and kill it soon after an iteration that it had not logged yet, or, now and then, before.
    Whether it was still running."""
    metrics, process = folder / "metrics.jsonl", resume(folder)

    def written() -> int:
        return metrics.stat().st_size if metrics.exists() else 0

    before = written()  # a resumed run cuts the file back to its checkpoint first
    while process.poll() is None and written() <= before and rng.random() > 0.001:
        time.sleep(0.05)
    time.sleep(rng.uniform(0, 0.6))
    process.kill()
    return process.wait() != 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kills", type=int, nargs="?", default=20)
    kills, done, rng = parser.parse_args().kills, 0, random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        alone, killed = Path(name) / "alone", Path(name) / "killed"
        finish(command(*RUN, alone))
        started = time.time()
        while done < kills and kill_once(killed, rng):
            done, saved = done + 1, state(killed)
            print(f"kill {done}: after {time.time() - started:.1f} s, checkpoint of iteration {saved['step'] if saved else 0}", flush=True)  # fmt: skip
            started = time.time()
        finish(resume(killed))
        equal = same(state(alone), state(killed))
        print(f"{done} kills; final state bit-identical to the run left alone: {equal}")
        sys.exit(not equal)


if __name__ == "__main__":
    main()

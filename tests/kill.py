"""A run killed with SIGKILL at random moments against one left alone: python tests/kill.py [kills]   (minutes)"""

import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from afd_fast.training import checkpoint
from tests.test_trainer import command, same

RUN = ["train", "demo", "iterations=70", "discriminator.warmup=2", "prompts_per_step=4", "rollouts_per_prompt=2", "evaluation.every=70",
       "evaluation.rollouts=1", "teacher_clips=1", "checkpoint_every=1", "student.lora_rank=4", "discriminator.width=8", "--out"]  # fmt: skip


def state(folder: Path) -> dict | None:
    path = checkpoint.latest(folder / "checkpoints")
    return checkpoint.load(path)["state"] if path else None


def main(kills: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        alone, killed = Path(name) / "alone", Path(name) / "killed"
        straight = command(*RUN, alone)
        assert straight.wait() == 0, straight.stdout.read()
        moments, rng = [], random.Random(0)
        while len(moments) < kills:
            resume = ["--resume"] if (killed / "config.json").exists() else ["--overwrite"]
            process, started = command(*RUN, killed, *resume), time.time()
            rows = killed / "metrics.jsonl"
            before = rows.stat().st_size if rows.exists() else -1
            while (
                process.poll() is None
                and (rows.stat().st_size if rows.exists() else -1) == before
                and rng.random() > 0.001
            ):
                time.sleep(0.05)  # wait for its first iteration, or, now and then, not
            time.sleep(rng.uniform(0, 0.6))
            process.kill()
            if process.wait() == 0:
                break
            saved = state(killed)
            moments.append(saved["step"] if saved else 0)
            print(
                f"kill {len(moments)}: after {time.time() - started:.1f} s, checkpoint of iteration {moments[-1]}",
                flush=True,
            )
        last = command(*RUN, killed, "--resume")
        assert last.wait() == 0, last.stdout.read()
        equal = same(state(alone), state(killed))
        print(f"{len(moments)} kills; final state bit-identical to the run left alone: {equal}")
        sys.exit(not equal)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)

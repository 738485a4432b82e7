"""The loop's share of an iteration, whatever the method: learning rate, step count, means over the ranks."""

import math
from collections.abc import Sequence

from afd_fast.teachers.dataset import Shard
from afd_fast.training.methods import METHODS
from afd_fast.training.run import Metrics, Run

FINAL_LR = 0.05  # of the cosine schedule, in units of the first


def train_step(run: Run, shards: Sequence[Shard]) -> Metrics:
    """One iteration on this rank's shards. Returns metrics, averaged over all ranks."""
    run.seconds.clear()
    set_learning_rate(run)
    metrics = METHODS[run.config.method].iteration(run, shards)
    run.state.step += 1
    return run.ranks.mean(metrics | run.seconds)


def set_learning_rate(run: Run) -> None:
    """The student's learning rate of this iteration: constant, or a cosine from the student's first update on."""
    config = run.config
    warmup = config.discriminator.warmup if METHODS[config.method].uses_discriminator else 0
    done = (run.state.step - warmup) / max(1, config.iterations - warmup)
    cosine = FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done))))
    for group in run.state.optimizer.param_groups:
        group["lr"] = config.update.lr * (cosine if config.update.lr_decay else 1.0)

"""Adversarial Flow Distillation: one iteration of Algorithm 1, top to bottom."""

from collections.abc import Sequence

from afd_fast.teachers.dataset import Shard
from afd_fast.training.credit import assign_credit
from afd_fast.training.methods.method import Method
from afd_fast.training.rollouts import decode, draw_place, sample, score
from afd_fast.training.run import Metrics, Run
from afd_fast.training.update import Targets, update_discriminator, update_student, with_teacher


def iteration(run: Run, shards: Sequence[Shard]) -> Metrics:
    """Rollouts -> discriminator update -> scores -> per-prompt advantages -> NFT + prior update."""
    active = draw_place(run)  # of a stream
    with run.phase("rollout"):
        rollouts = [sample(run, shard, active) for shard in shards]
    with run.phase("decode"):
        for x in rollouts:
            decode(run, x)
    with run.phase("discriminator"):
        metrics = update_discriminator(run, rollouts)
    with run.phase("score"):
        for x in rollouts:
            score(run, x)
    metrics |= assign_credit(run, rollouts)
    if active is not None:
        metrics["place"] = float(active.start)
    if run.past_warmup:  # phases: reference, backward, optimiser
        targets = [Targets.of(x) for x in rollouts]
        if run.config.teacher_r is not None:
            with run.phase("encode"):
                targets = [with_teacher(run, x, shard) for x, shard in zip(targets, shards)]
        metrics |= update_student(run, targets)
    return metrics


METHOD = Method("afd", iteration)

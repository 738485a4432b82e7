"""Supervised fine-tuning: flow matching on the teacher's videos, each chunk given the teacher's own clean earlier chunks
(teacher prefixes), at the noise levels of the student's sampler. No rollout, no discriminator."""

from collections.abc import Sequence

from afd_fast.teachers.dataset import Shard
from afd_fast.training.methods.method import Method
from afd_fast.training.run import Metrics, Run
from afd_fast.training.update import Targets, ones, regress


def iteration(run: Run, shards: Sequence[Shard]) -> Metrics:
    """One regression step on the shards' teacher videos."""
    weight = next(run.family.student.parameters())
    with run.phase("encode"):
        x0 = [run.family.vae.encode(s.teacher(weight.device)).to(weight.dtype) for s in shards]
    return regress(run, [Targets(x, ones(x), s.prompts, s.index) for s, x in zip(shards, x0)])


METHOD = Method("sft", iteration, {"update.v_old": "self", "discriminator.warmup": 0}, uses_discriminator=False)

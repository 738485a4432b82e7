"""Rejection sampling, a sanity check between SFT and AFD: flow matching on the one of a prompt's K rollouts that the
discriminator likes best, given that rollout's own history."""

from collections.abc import Sequence

import torch

from afd_fast.teachers.dataset import Shard
from afd_fast.training.methods.method import Method
from afd_fast.training.rollouts import Rollouts, decode, sample, score
from afd_fast.training.run import Metrics, Run
from afd_fast.training.update import Targets, ones, regress, update_discriminator


def iteration(run: Run, shards: Sequence[Shard]) -> Metrics:
    """Rollouts -> discriminator update -> scores -> regression on the best rollout of every prompt."""
    with run.phase("rollout"):
        rollouts = [sample(run, shard) for shard in shards]
    with run.phase("decode"):
        for x in rollouts:
            decode(run, x)
    with run.phase("discriminator"):
        metrics = update_discriminator(run, rollouts)
    with run.phase("score"):
        for x in rollouts:
            score(run, x)
    scores = [x.scores for x in rollouts if x.scores is not None]
    metrics["reward"] = torch.cat(scores).mean().item()
    if run.past_warmup:
        metrics |= regress(run, [best(x, run.config.rollouts_per_prompt) for x in rollouts])
    return metrics


def best(rollouts: Rollouts, k: int) -> Targets:
    """The highest-scored of every prompt's k rollouts."""
    assert rollouts.scores is not None
    scores = rollouts.scores
    rows = scores.view(-1, k).argmax(1) + k * torch.arange(len(scores) // k, device=scores.device)
    x0 = rollouts.latents[rows.to(rollouts.latents.device)]
    return Targets(x0, ones(x0), rollouts.prompts[::k], rollouts.index)


METHOD = Method("rejection", iteration, {"update.v_old": "self"}, lr_scale=0.1)

"""Credit: everybody's scores -> per-prompt advantages -> optimality r (Eq. 2; Table 3).

Legend: B rows of the whole batch, K per prompt, b of a shard, A active clips per row, S clips of a rollout.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from afd_fast.reference.advantage import reward_to_r
from afd_fast.training.rollouts import Rollouts
from afd_fast.training.run import Metrics, Run


def assign_credit(run: Run, rollouts: Sequence[Rollouts]) -> Metrics:
    """Set r [b, S] in [0, 1] of every shard from the scores of all ranks. A clip is compared with the same clip of its
    prompt's other rows; clips before the active frames get 0, as they are not trained."""
    names, scores = [], []
    for x in rollouts:
        assert x.scores is not None
        scores.append(x.scores)
        clips = len(x.scores) // len(x.prompts)
        names += [f"{p}#{clip}" if clip else p for clip in range(clips) for p in x.prompts]
    prompts, rewards = run.ranks.gather(names, torch.cat(scores))  # [A * B]
    advantages = normalised(run, prompts, rewards).float()
    if run.config.shuffle_rewards:
        advantages = advantages[torch.randperm(len(advantages), generator=run.generator("shuffle"))]
    r = reward_to_r(advantages, clip=run.config.loss.adv_clip)
    size = len(scores[0])
    for x, own in zip(rollouts, r.split(size)[rollouts[0].index :]):
        own = own.view(-1, len(x.prompts)).T.to(x.latents.device)  # [b, A]
        before = x.active.start // run.family.latents.frames if x.active is not None else 0
        x.r = torch.cat([own.new_zeros(len(x.prompts), before), own], 1) if before else own
    within = rewards.view(-1, run.config.rollouts_per_prompt)
    return {
        "reward": rewards.mean().item(),
        "reward_std_in_prompt": within.std(1, unbiased=False).mean().item(),
        "r_std": r.std().item(),
    }


def normalised(run: Run, prompts: list[str], rewards: Tensor) -> Tensor:
    """Advantages [A * B] of this iteration's rewards. Of several teachers each has a scale of its own, which matters with
    global_std."""
    tracker = run.state.tracker
    tracker.clear()  # statistics are of one iteration
    if not run.teachers:
        return tracker.update(prompts, rewards)
    owners = [run.teachers.get(name) or run.teachers[name.rpartition("#")[0]] for name in prompts]
    advantages = torch.zeros_like(rewards, dtype=torch.float64)
    for teacher in dict.fromkeys(owners):
        rows = [i for i, owner in enumerate(owners) if owner == teacher]
        advantages[rows] = tracker.update([prompts[i] for i in rows], rewards[rows]).to(advantages)
    return advantages

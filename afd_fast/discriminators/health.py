"""Around the discriminator's step: earlier students among the negatives, and the statistics of its health."""

from collections.abc import Sequence

import torch
from torch import Tensor

from afd_fast.discriminators.discriminator import Features
from afd_fast.reference.adversarial import pair_accuracy, pair_health, probe_drift


class Replay:
    """The last `keep` clips of every prompt; a share of a batch's clips is exchanged for them, so that D does not
    forget what earlier students did. Shifts D's target to teacher / (mixture of students): keep the share small."""

    def __init__(self, keep: int = 4):
        self.keep, self.kept = keep, {}

    def mix(self, clips, prompts: Sequence[str], share: float, rng: torch.Generator):
        """clips (videos [B, 3, F, H, W] or Features) with about `share` of them exchanged for earlier clips of the
        same prompt, where there are any of the same shape; then remembers the given ones. rng: a CPU generator."""
        given = list(clips.clips if isinstance(clips, Features) else clips)
        if len(given) != len(prompts) or not 0 <= share <= 1:
            raise ValueError(
                f"{len(given)} clips, {len(prompts)} prompts, share={share}: one prompt a clip, share in [0, 1]"
            )
        mixed = list(given)
        for i, prompt in enumerate(prompts):
            u = torch.rand(2, generator=rng)
            earlier = [clip for clip in self.kept.get(prompt, ()) if clip.shape == given[i].shape]
            if earlier and u[0] < share:
                mixed[i] = earlier[int(u[1] * len(earlier))].to(given[i])
        for clip, prompt in zip(given, prompts):
            self.kept[prompt] = [*self.kept.get(prompt, ()), clip.detach().clone()][-self.keep :]
        return Features(tuple(mixed)) if isinstance(clips, Features) else torch.stack(mixed)


class Health:
    """Statistics of one discriminator over a run. held_out and probe: (teacher, student, prompts) of prompts that are
    not trained on, and (videos, prompts) that never change; clips or Features."""

    def __init__(self, discriminator, *, held_out: tuple | None = None, probe: tuple | None = None):
        self.discriminator, self.held_out, self.probe = discriminator, held_out, probe
        self.first: Tensor | None = None

    @torch.no_grad()
    def __call__(self, score_teacher: Tensor, score_student: Tensor, student=None, prompts=None) -> dict[str, float]:
        """`pair_health` of a step's scores [B]; accuracy on the held-out prompts (far below the training accuracy:
        D memorises); drift on the probe since the first call; with `student` and its prompts the frozen reward
        model's own scores of the rollouts (falling while D's rise: D is being gamed)."""
        d = self.discriminator
        stats = pair_health(score_teacher, score_student)
        if self.held_out is not None:
            stats["held_out_accuracy"] = pair_accuracy(*d.pair_scores(*self.held_out))
        if self.probe is not None:
            scores = d.score(*self.probe)
            self.first = scores.clone() if self.first is None else self.first
            stats |= {f"probe_{name}": value for name, value in probe_drift(scores, self.first).items()}
        if student is not None:
            with d.frozen():
                stats |= {f"frozen_{name}": v.mean() for name, v in d.rewards(student, prompts).items()}
        return {name: value.item() for name, value in stats.items()}

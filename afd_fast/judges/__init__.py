"""Judges: scores of finished clips from pixels alone, never from the discriminator."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from afd_fast.judges import clips, physics

Scores = dict[str, float]


def _clips(videos: np.ndarray, prompts: Sequence[str], reference: np.ndarray) -> Scores:
    return clips.evaluate(videos, reference)


def _physics(videos: np.ndarray, prompts: Sequence[str], reference: np.ndarray) -> Scores:
    return physics.evaluate(videos, list(prompts), reference)


class Judge(NamedTuple):
    """scores: (clips [N, 3, F, H, W] in [0, 1], prompts [N], teacher clips of the same prompts) -> scores.
    headline: the scores that the terminal shows. fault: per clip [N], how far it is from what its prompt asks for, if
    the judge knows; lower is better. free_reference: whether the teacher makes more clips for nothing."""

    scores: Callable[[np.ndarray, Sequence[str], np.ndarray], Scores]
    headline: tuple[str, ...]
    fault: Callable[[np.ndarray, list[str]], np.ndarray] | None = None
    free_reference: bool = False

    def __call__(self, videos: Tensor, prompts: Sequence[str], reference: Tensor) -> Scores:
        return self.scores(videos.numpy(), prompts, reference.numpy())


JUDGES = {
    "physics": Judge(_physics, ("residual_px", "frechet", "general"), physics.physics_residual, free_reference=True),
    "clips": Judge(_clips, ("dynamic", "frechet")),
}

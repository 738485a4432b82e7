"""Judges: scores of finished clips from pixels alone, never from the discriminator."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from afd_fast.judges import clips, lights, physics

Scores = dict[str, float]


def _clips(videos: np.ndarray, prompts: Sequence[str], reference: np.ndarray) -> Scores:
    return clips.evaluate(videos, reference)


def _unit(videos: np.ndarray) -> np.ndarray:
    """8-bit pixels -> float32 in [0, 1]."""
    return videos.astype(np.float32) / np.float32(255)


def _dynamic(videos: np.ndarray, prompts: list[str]) -> np.ndarray:
    return clips.dynamic(videos)


class Judge(NamedTuple):
    """Takes finished clips as they are stored, 8 bits a value: float clips of full size do not fit a host's memory.

    scores: (clips [N, 3, F, H, W], prompts [N], teacher clips of the same prompts) -> scores.
    headline: the scores that the terminal shows. by_clip: the first of them, per clip [N]. fault: whether that is how far
    a clip is from what its prompt asks for. free_reference: whether the teacher makes more clips for nothing. heights: what a report
    draws of clips, the heights [M, F] of all that moves in them; None: nothing."""

    scores: Callable[[np.ndarray, Sequence[str], np.ndarray], Scores]
    headline: tuple[str, ...]
    by_clip: Callable[[np.ndarray, list[str]], np.ndarray]
    fault: bool = False
    free_reference: bool = False
    heights: Callable[[np.ndarray], np.ndarray] | None = None

    def __call__(self, videos: Tensor, prompts: Sequence[str], reference: Tensor) -> Scores:
        return self.scores(videos.numpy(), prompts, reference.numpy())


class _HasCentres(Protocol):
    """What an embedded world's judge finds in clips: centres [N, ..., F, 2] of all that moves."""

    @property
    def centres(self) -> np.ndarray: ...


def _of_world(
    evaluate: Callable[[np.ndarray, list[str], np.ndarray], Scores],
    residual: Callable[[np.ndarray, list[str]], np.ndarray],
    track: Callable[[np.ndarray], _HasCentres],
) -> Judge:
    """The judge of an embedded world, whose functions take clips [N, 3, F, H, W] in [0, 1]."""
    return Judge(
        scores=lambda videos, prompts, reference: evaluate(_unit(videos), list(prompts), _unit(reference)),
        headline=("residual_px", "frechet", "general"),
        by_clip=lambda videos, prompts: residual(_unit(videos), prompts),
        fault=True,
        free_reference=True,
        heights=lambda videos: track(_unit(videos)).centres[..., 1].reshape(-1, videos.shape[2]),
    )


JUDGES = {
    "physics": _of_world(physics.evaluate, physics.physics_residual, physics.track),
    "lights": _of_world(lights.evaluate, lights.residual, lights.track),
    "clips": Judge(_clips, ("dynamic", "frechet"), _dynamic),
}

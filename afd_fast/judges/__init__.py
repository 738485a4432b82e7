"""Judges: scores of finished clips from pixels alone, never from the discriminator."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from afd_fast.judges import clips, lights, physics

Scores = dict[str, float]


def _clips(videos: np.ndarray, prompts: Sequence[str], reference: np.ndarray) -> Scores:
    return clips.evaluate(videos, reference)


def _unit(videos: np.ndarray) -> np.ndarray:
    """8-bit pixels -> float32 in [0, 1]."""
    return videos.astype(np.float32) / np.float32(255)


def _physics(videos: np.ndarray, prompts: Sequence[str], reference: np.ndarray) -> Scores:
    return physics.evaluate(_unit(videos), list(prompts), _unit(reference))


def _physics_fault(videos: np.ndarray, prompts: list[str]) -> np.ndarray:
    return physics.physics_residual(_unit(videos), prompts)


def _height(videos: np.ndarray) -> np.ndarray:
    return physics.track(_unit(videos)).centres[..., 1]


def _lights(videos: np.ndarray, prompts: Sequence[str], reference: np.ndarray) -> Scores:
    return lights.evaluate(_unit(videos), list(prompts), _unit(reference))


def _lights_fault(videos: np.ndarray, prompts: list[str]) -> np.ndarray:
    return lights.residual(_unit(videos), prompts)


def _heights_of_lights(videos: np.ndarray) -> np.ndarray:
    return lights.track(_unit(videos)).centres[..., 1].reshape(-1, videos.shape[2])


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


JUDGES = {
    "physics": Judge(
        _physics,
        ("residual_px", "frechet", "general"),
        _physics_fault,
        fault=True,
        free_reference=True,
        heights=_height,
    ),
    "lights": Judge(
        _lights,
        ("residual_px", "frechet", "general"),
        _lights_fault,
        fault=True,
        free_reference=True,
        heights=_heights_of_lights,
    ),
    "clips": Judge(_clips, ("dynamic", "frechet"), _dynamic),
}

"""Weight-free scores for real videos, where no simulator can judge. One clip at a time is in float64: 0.8 GB at 480 x 832.

Legend: N clips, F frames, H x W pixels, 8 bits a value.
"""

from typing import NamedTuple

import numpy as np

from afd_fast.judges.physics import frechet


class _Measured(NamedTuple):
    """Of one clip: features (mean colour of every frame, mean change between frames), means over all pixels."""

    features: np.ndarray
    change: float
    mean: float
    variance: float


def _pixels(clip: np.ndarray) -> np.ndarray:
    """A clip uint8 in [0, 1]."""
    return (clip.astype(np.float32) / np.float32(255)).astype(np.float64)


def _change(x: np.ndarray) -> np.ndarray:
    """Mean absolute change between the frames of a clip [3, F, H, W]: [F - 1]."""
    return np.abs(np.diff(x, axis=1)).mean((0, 2, 3))


def _measured(clip: np.ndarray) -> _Measured:
    """Of a clip [3, F, H, W]."""
    x = _pixels(clip)
    change = _change(x)
    features = np.concatenate([x.mean((2, 3)).ravel(), change])
    return _Measured(features, float(change.mean()), float(x.mean()), float(x.var()))


def evaluate(clips: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Scores of clips [N, 3, F, H, W] uint8, compared with teacher clips of the same prompts.

    dynamic: mean absolute change between frames, percent of the range. brightness, contrast: mean and std.
    frechet: Frechet distance on per-frame mean colour and mean change (nan with fewer than two clips on a side).
    """
    mine, theirs = [_measured(x) for x in clips], [_measured(x) for x in reference]
    means = np.array([m.mean for m in mine])
    enough = min(len(mine), len(theirs)) > 1
    sides = [np.stack([m.features for m in side]) for side in (mine, theirs)]
    return {
        "dynamic": 100 * float(np.mean([m.change for m in mine])),
        "brightness": float(means.mean()),
        "contrast": float(np.sqrt(np.mean([m.variance for m in mine]) + means.var())),
        "frechet": frechet(*sides) if enough else float("nan"),
    }


def dynamic(clips: np.ndarray) -> np.ndarray:
    """Of every clip [N, 3, F, H, W] uint8 the mean absolute change between frames, percent of the range: [N]."""
    return 100 * np.array([_change(_pixels(x)).mean() for x in clips])

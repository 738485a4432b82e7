"""What is wrong with a finished clip as its pixels tell it, without learning: no picture, no motion, a cut, a copy of another clip.

A clip is compared with the others of its collection, through medians, which a minority of bad clips does not move.

Legend: N clips, F frames, H x W pixels, 8 bits a value.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

FLAT = 0.01  # deviation of a frame's pixels, of the range: below it there is no picture
STILL = 0.05  # of the collection's usual change between frames: below it nothing moves
MOST_FLAT, MOST_STILL = 1 / 3, 1 / 3  # shares of a clip's frames and steps
CUT = 5.0  # robust deviations
SAME = 1 / 255  # root mean square distance of two small clips, of the range
SMALL = (4, 8, 8)  # frames, height and width of the clips that are compared with each other


class Defects(NamedTuple):
    """Of one clip. flat: share of frames without a picture. still: share of steps between frames without motion. cut: the step in
    which the picture moves most suddenly, in robust deviations above the other clips' (5 and more: a cut). copy: the index of the first
    of the clips that are this one, its own where it is the first."""

    flat: float
    still: float
    cut: float
    copy: int

    @property
    def reasons(self) -> list[str]:
        """What is wrong with the clip in words, but for copies; nothing where it looks sound."""
        if self.flat > MOST_FLAT:
            return [f"no picture in {self.flat:.0%} of its frames"]
        if self.still > MOST_STILL:
            return [f"frozen in {self.still:.0%} of its steps"]
        return [f"a cut ({self.cut:.1f})"] if self.cut > CUT else []


class _Series(NamedTuple):
    """Of one clip: deviation of the pixels of each frame [F], change [F - 1] and displacement [F - 1] between frames, and the clip
    made small."""

    spread: np.ndarray
    change: np.ndarray
    moved: np.ndarray
    small: np.ndarray


def _measured(clip: np.ndarray) -> _Series:
    """Of a clip [3, F, H, W]. The displacement is how far brightness is carried along each axis, which grows with the distance that a
    thing moves, where the change of pixels stops at twice its area."""
    x = clip.astype(np.float32) / np.float32(255)
    step = np.diff(x, axis=1)
    level = step - step.mean((2, 3), keepdims=True)  # what all pixels share is no motion
    moved = sum(abs(level.mean(axis).cumsum(2)).mean((0, 2)) / level.shape[5 - axis] for axis in (2, 3))
    return _Series(x.reshape(3, x.shape[1], -1).std(2).mean(0), abs(step).mean((0, 2, 3)), np.asarray(moved), _small(x))


def _small(x: np.ndarray) -> np.ndarray:
    """A clip [3, F, H, W] at the size SMALL, or what it has of it, as a vector: means over areas of evenly spaced frames."""
    frames, height, width = (np.linspace(0, n, min(n, m) + 1).astype(int) for n, m in zip(x.shape[1:], SMALL))
    x = x[:, frames[:-1]]
    for axis, edges in ((2, height), (3, width)):
        x = np.add.reduceat(x, edges[:-1], axis) / np.diff(edges).reshape((-1,) + (1,) * (3 - axis))
    return x.ravel()


def _median(values: np.ndarray) -> float:
    return float(np.median(values)) if len(values) else 0.0


def robust(values: np.ndarray, least: float = 0.0) -> np.ndarray:
    """How many deviations each of the values [N] lies above their median; the deviation is that of a normal distribution with their
    median absolute deviation, `least` or more."""
    from_median = values - np.median(values)
    return from_median / max(1.4826 * float(np.median(abs(from_median))), least, 1e-12)


def _spike(moved: np.ndarray) -> float:
    """By how much one step [F - 1] exceeds both of its neighbours."""
    around = np.pad(moved, 1)
    return float((moved - np.maximum(around[:-2], around[2:])).max(initial=0.0)) if len(moved) > 1 else 0.0


def _firsts(small: np.ndarray, sound: Sequence[bool]) -> list[int]:
    """For each clip [N, D] the first of those before it that is sound and the same, itself where there is none."""
    square, firsts = (small**2).sum(1), list(range(len(small)))
    for i, x in enumerate(small):
        distance = (square[:i] + square[i] - 2 * small[:i] @ x).clip(0) / len(x)
        same = np.flatnonzero((distance < SAME**2) & np.asarray(sound[:i], bool))
        firsts[i] = int(same[0]) if len(same) else i
    return firsts


def defects(clips: Iterable[np.ndarray]) -> list[Defects]:
    """Of clips [3, F, H, W] uint8 of one size, which are read once and one at a time."""
    found = [_measured(clip) for clip in clips]
    if not found:
        return []
    usual, step = (_median(np.concatenate(series)) for series in ([f.change for f in found], [f.moved for f in found]))
    flat = [float((f.spread < FLAT).mean()) for f in found]
    still = [float((f.change <= STILL * usual).mean()) if len(f.change) else 0.0 for f in found]
    spikes = np.array([_spike(f.moved) for f in found])
    sound = [a <= MOST_FLAT and b <= MOST_STILL for a, b in zip(flat, still)]
    firsts = _firsts(np.stack([f.small for f in found]).astype(np.float64), sound)
    return [Defects(*row) for row in zip(flat, still, robust(spikes, least=0.1 * step).tolist(), firsts)]

"""95 % intervals of scores: Wilson for yes/no, bootstrap over prompts for the rest.

Legend: P prompts, D dimensions scored on the same videos. Videos of one prompt are alike, so prompts are resampled, not
videos.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
NONE = (float("nan"), float("nan"))


@dataclass(frozen=True)
class Score:
    """A line of a table of results: the value, its 95 % interval (nan: none), videos scored, what to know."""

    name: str
    value: float
    low: float
    high: float
    videos: int
    note: str = ""


def wilson(k: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of a share: k of n, as shares in [0, 1]. ValueError unless 0 <= k <= n and n > 0.

    Source: Wilson, J. Am. Stat. Assoc. 22 (1927) 209.
    """
    if not 0 <= k <= n or n < 1:
        raise ValueError(f"wilson needs 0 <= k <= n and n > 0, got k={k}, n={n}")
    z = 1.959963984540054  # the normal distribution's 97.5 % point
    centre = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * (k * (n - k) / n + z * z / 4) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def resampled_means(sums: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means of DRAWS resamplings of the prompts, the same prompts for every dimension: [DRAWS, D].

    sums, counts: [P, D], of a prompt's values. A mean is over videos: a prompt with more of them weighs more.
    """
    prompts = len(sums)
    weights = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=DRAWS)  # [DRAWS, P]
    with np.errstate(invalid="ignore"):  # a draw with no video at all is nan, and not counted
        return (weights @ sums) / (weights @ counts)


def percentiles(draws: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of draws [DRAWS]."""
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return float(low), float(high)


def bootstrap(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Percentile interval of the mean over all values, resampling groups (the values of one prompt each).

    The same values give the same interval. Fewer than two groups with values: no interval (nan, nan).
    """
    groups = [group for group in groups if len(group)]
    if len(groups) < 2:
        return NONE
    sums = np.array([[np.sum(group)] for group in groups], float)
    counts = np.array([[len(group)] for group in groups], float)
    return percentiles(resampled_means(sums, counts, np.random.default_rng(0))[:, 0])

"""95 % intervals of scores: Wilson for yes/no, bootstrap over prompts for the rest.

Legend: P prompts, D dimensions scored on the same videos. Videos of one prompt are alike, so prompts are resampled, not
videos.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

DRAWS = 10_000
Groups = dict[str, list[float]]  # {prompt: the values of its videos}


class Interval(NamedTuple):
    """Bounds of an interval; nan where there is none."""

    low: float
    high: float


NONE = Interval(float("nan"), float("nan"))


@dataclass(frozen=True)
class Score:
    """A row of a results table: the value, its 95 % interval (nan: none), the number of videos scored, a remark."""

    name: str
    value: float
    low: float
    high: float
    videos: int
    note: str = ""


def wilson(k: int, n: int) -> Interval:
    """Wilson's score interval of the share k / n, as shares in [0, 1]. Raises ValueError unless 0 <= k <= n and n > 0.

    Source: Wilson, J. Am. Stat. Assoc. 22 (1927) 209.
    """
    if not 0 <= k <= n or n < 1:
        raise ValueError(f"wilson got k={k}, n={n}, expected 0 <= k <= n and n > 0: k counts successes among n trials")
    z = 1.959963984540054  # the normal distribution's 97.5 % point
    centre = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * (k * (n - k) / n + z * z / 4) ** 0.5
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def resampled_means(sums: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means of DRAWS resamplings of the prompts, the same prompts for every dimension: [DRAWS, D].

    sums, counts: [P, D], sum and number of each prompt's values. The mean is over videos: a prompt with more videos
    has more weight.
    """
    prompts = len(sums)
    weights = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=DRAWS)  # [DRAWS, P]
    with np.errstate(invalid="ignore"):  # a draw without any video is nan and is not counted
        return (weights @ sums) / (weights @ counts)


def percentiles(draws: np.ndarray) -> Interval:
    """The central 95 % of draws [DRAWS]."""
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return Interval(float(low), float(high))


def mean(groups: Groups) -> float:
    """The mean over all videos."""
    return sum(map(sum, groups.values())) / sum(map(len, groups.values()))


def draws(tables: Mapping[str, Groups]) -> dict[str, np.ndarray]:
    """{score: resampled means [DRAWS]}. Scores of the same prompts share their resampled prompts.

    Every call draws the same prompts for the same list of prompts, so the draws of two sets of videos can be subtracted.
    """
    rng = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}
    alike: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, groups in tables.items():
        alike[tuple(groups)].append(name)
    for prompts, names in alike.items():
        sums = np.array([[sum(tables[name][prompt]) for name in names] for prompt in prompts], float)  # [P, D]
        counts = np.array([[len(tables[name][prompt]) for name in names] for prompt in prompts])
        found |= dict(zip(names, resampled_means(sums, counts, rng).T))
    return found


def bootstrap(groups: Groups) -> Interval:
    """Percentile interval of the mean over all values, resampling prompts.

    The same values give the same interval. With fewer than two prompts that have values there is no interval (nan, nan).
    """
    groups = {prompt: values for prompt, values in groups.items() if values}
    return percentiles(draws({"": groups})[""]) if len(groups) > 1 else NONE


def crossed(values: np.ndarray) -> Interval:
    """Percentile interval of the mean of values [S seeds, P prompts], resampling both; nan where a value could not be computed.

    There is no interval with fewer than two prompts. One seed says nothing of the others: then prompts alone are resampled.
    """
    if values.shape[1] < 2:
        return NONE
    rng = np.random.default_rng(0)
    seeds, prompts = (rng.multinomial(n, np.full(n, 1 / n), size=DRAWS) for n in values.shape)
    found = np.isfinite(values)
    sums, counts = (((seeds @ table) * prompts).sum(1) for table in (np.where(found, values, 0), found))
    with np.errstate(invalid="ignore"):
        return percentiles(sums / counts)


def score(name: str, groups: Groups, note: str = "") -> Score:
    """The mean over all videos with its bootstrap interval."""
    return Score(name, mean(groups), *bootstrap(groups), sum(map(len, groups.values())), note)

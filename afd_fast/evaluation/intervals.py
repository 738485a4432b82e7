"""95 % intervals of scores: Wilson for yes/no, bootstrap over prompts for the rest.

Legend: P prompts, D dimensions scored on the same videos. Videos of one prompt are alike, so prompts are resampled, not
videos.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
NONE = (float("nan"), float("nan"))
Groups = dict[str, list[float]]  # {prompt: its videos' values}


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


def mean(groups: Groups) -> float:
    """Over all videos."""
    return sum(map(sum, groups.values())) / sum(map(len, groups.values()))


def draws(tables: Mapping[str, Groups]) -> dict[str, np.ndarray]:
    """{score: resampled means [DRAWS]}; scores of the same prompts share their draws of prompts. The same prompts in the
    same order are drawn alike at every call, so draws of two sets of videos can be subtracted."""
    rng, found, alike = np.random.default_rng(0), {}, defaultdict(list)
    for name, groups in tables.items():
        alike[tuple(groups)].append(name)
    for prompts, names in alike.items():
        sums = np.array([[sum(tables[name][prompt]) for name in names] for prompt in prompts], float)  # [P, D]
        counts = np.array([[len(tables[name][prompt]) for name in names] for prompt in prompts])
        found |= dict(zip(names, resampled_means(sums, counts, rng).T))
    return found


def bootstrap(groups: Groups) -> tuple[float, float]:
    """Percentile interval of the mean over all values, resampling prompts.

    The same values give the same interval. Fewer than two prompts with values: no interval (nan, nan).
    """
    groups = {prompt: values for prompt, values in groups.items() if values}
    return percentiles(draws({"": groups})[""]) if len(groups) > 1 else NONE


def score(name: str, groups: Groups, note: str = "") -> Score:
    """The mean over all videos with its bootstrap interval."""
    return Score(name, mean(groups), *bootstrap(groups), sum(map(len, groups.values())), note)

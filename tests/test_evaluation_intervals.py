"""Intervals against values from elsewhere: published ones, the normal limit, and their own coverage."""

import math

import numpy as np
import pytest

from afd_fast.evaluation.intervals import bootstrap, draws, wilson


def groups(values, each=1):
    return {f"prompt {i}": [v] * each for i, v in enumerate(values)}


@pytest.mark.parametrize(
    "k,n,low,high",
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe, Stat. Med. 17 (1998) 857, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_is_newcombes_table(k, n, low, high):
    assert wilson(k, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_solves_its_equation():
    """The bounds are the shares p at which k/n lies 1.96 standard errors of p away."""
    for k, n in ((57, 72), (44, 72), (80, 100)):
        for p in wilson(k, n):
            assert abs(k / n - p) == pytest.approx(1.959963984540054 * math.sqrt(p * (1 - p) / n), rel=1e-12)


@pytest.mark.parametrize("k,n", [(-1, 3), (4, 3), (0, 0)])
def test_wilson_refuses(k, n):
    with pytest.raises(ValueError, match="0 <= k <= n"):
        wilson(k, n)


def test_bootstrap_is_the_normal_limit():
    values = np.random.default_rng(0).normal(5, 2, 400)
    low, high = bootstrap(groups(values))
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.06 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.06 * error)


def test_bootstrap_resamples_prompts_not_videos():
    """Five equal videos per prompt say no more than one."""
    values = np.random.default_rng(1).random(50)
    assert bootstrap(groups(values, 5)) == pytest.approx(bootstrap(groups(values)))


def test_bootstrap_covers():
    rng = np.random.default_rng(2)
    inside = 0
    for _ in range(100):
        low, high = bootstrap(groups(rng.random(40)))
        inside += low < 0.5 < high
    assert 88 <= inside <= 100


def test_bootstrap_repeats_itself_and_needs_two_prompts():
    values = groups(np.random.default_rng(3).random(40))
    assert bootstrap(values) == bootstrap(values | {"unscored": []})
    assert all(math.isnan(bound) for bound in bootstrap({"a": [0.3, 0.5], "b": []}))


def test_scores_of_the_same_prompts_are_drawn_together():
    """A score that is always 1 - another's value: their mean has no spread, if the same prompts are drawn."""
    values = np.random.default_rng(0).random(30)
    other = {f"another {prompt}": value for prompt, value in groups(1 - values).items()}
    found = draws({"a": groups(values), "b": groups(1 - values), "c": other})
    assert np.std(found["a"] + found["b"]) < 1e-12 < 0.05 < np.std(found["a"] + found["c"])

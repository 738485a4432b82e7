"""Intervals against values from elsewhere: published ones, the normal limit, and their own coverage."""

import math

import numpy as np
import pytest

from afd_fast.evaluation.intervals import bootstrap, crossed, draws, wilson


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


def test_seeds_and_prompts_are_resampled_together():
    """Variances of independent effects add: 30 seeds of deviation a and 40 prompts of deviation b give a²/30 + b²/40."""
    rng = np.random.default_rng(3)
    seeds, prompts = rng.normal(size=(30, 1)), 2 * rng.normal(size=(1, 40))
    low, high = crossed(5 + seeds + prompts)
    error = (seeds.var() / 30 + prompts.var() / 40) ** 0.5
    assert (low + high) / 2 == pytest.approx(5 + seeds.mean() + prompts.mean(), abs=0.05)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.04)


def test_one_seed_resamples_its_prompts_and_one_prompt_has_no_interval():
    values = np.random.default_rng(4).random((1, 25))
    assert crossed(values) == pytest.approx(bootstrap(groups(values[0])), abs=0.01)
    assert all(math.isnan(bound) for bound in crossed(np.ones((5, 1))))


def test_what_could_not_be_computed_does_not_count():
    values = np.array([[1.0, 2.0, math.nan], [1.0, 2.0, 3.0]])
    low, high = crossed(values)
    assert 1 <= low < high <= 3

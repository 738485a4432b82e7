"""Named runs: functions that return a configuration. `afd-fast train NAME key=value` starts one."""

from dataclasses import replace
from difflib import get_close_matches

from afd_fast.config import ConfigError, TrainConfig


def demo() -> TrainConfig:
    """The embedded main job: `demo_lagged`. Over 3 seeds both readings score the same, this one with less spread (README)."""
    return TrainConfig()


def demo_lagged() -> TrainConfig:
    """The reading of the paper's section 10 and of every public NFT trainer: v_old = the EMA policy, which collects."""
    return replace(TrainConfig(), name="demo_lagged", recipe="diffusionnft", v_old="ema")


def demo_eq4() -> TrainConfig:
    """The paper's Eq. 4 read literally: v_old = stop-grad(v), velocity space, sums, no adaptive weight."""
    return replace(TrainConfig(), name="demo_eq4", recipe="afd", v_old="self", student_lr=2e-3, prior_weight=1e-3)


def demo_shuffled() -> TrainConfig:
    """The control: `demo` with advantages permuted across the batch, so that reward carries no credit."""
    return replace(demo(), name="demo_shuffled", shuffle_rewards=True)


RECIPES = {f.__name__: f for f in (demo, demo_eq4, demo_lagged, demo_shuffled)}


def get(name: str) -> TrainConfig:
    """A recipe by name; ConfigError with the nearest name."""
    if name not in RECIPES:
        near = get_close_matches(name, RECIPES, 1)
        raise ConfigError(
            f"unknown recipe {name!r}" + (f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(RECIPES)}")
        )
    return RECIPES[name]()

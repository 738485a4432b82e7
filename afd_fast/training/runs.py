"""Named runs: functions that return a configuration. `afd-fast train NAME key=value` starts one."""

from dataclasses import replace
from difflib import get_close_matches

from afd_fast.config import TrainConfig
from afd_fast.errors import ConfigError


def demo() -> TrainConfig:
    """The embedded main job: `demo_lagged`. Over 3 seeds both readings score the same (README)."""
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


def afd_table3() -> TrainConfig:
    """The paper's run (Table 3) on a causal Wan 1.3B; give student=, discriminator= and teacher= (docs/training.md)."""
    return TrainConfig(
        name="afd_table3", student="Self-Forcing/self_forcing_dmd.pt", discriminator="KwaiVGI/VideoReward",
        teacher="folder:teacher", iterations=1000, teacher_clips=1, prompts_per_step=8, rollouts_per_prompt=4, shift=5.0,
        recipe="afd", v_old="self", beta=0.1, prior_weight=1e-4, adv_clip=5.0, global_std=True, t_sampling="uniform",
        student_lr=1e-5, lr_decay=False, weight_decay=1e-4, grad_norm=1.0, lora_rank=256, ema=0.99, shards=8, chunked_update=True, update_batch=1,
        disc_lr=1e-5, instance_noise=0.0, r1=0.0, eval_rollouts=1, eval_batch=4,
    )  # fmt: skip


def demo_long() -> TrainConfig:
    """`demo` on clips twice as long (24 frames, 8 chunks), where errors of the history add up."""
    return replace(demo(), name="demo_long", student="toy_long", prompts_per_step=6)


def baseline(config: TrainConfig, method: str) -> dict:
    """Keys that turn a recipe into a baseline of training/baselines.py. Learning rates are multiples of the recipe's,
    the best of the ones tried on the embedded task (docs/baselines.md); ConfigError for an unknown method."""
    if method not in BASELINES:
        raise ConfigError(f"unknown method {method!r}; known: {', '.join(BASELINES)}")
    keys = dict(BASELINES[method])
    rate = keys.pop("lr", 1.0)
    return keys | {"student_lr": config.student_lr * rate}


BASELINES = {
    "afd": {},
    "sft": {"method": "sft", "lr": 1.0, "v_old": "self", "disc_warmup": 0},
    "rejection": {"method": "rejection", "lr": 0.1, "v_old": "self"},
    "gan": {"method": "gan", "lr": 1 / 3, "v_old": "self"},
    "dmd": {"method": "dmd", "lr": 1 / 3, "v_old": "self", "disc_steps": 5},
}

RECIPES = {f.__name__: f for f in (demo, demo_eq4, demo_lagged, demo_shuffled, demo_long, afd_table3)}


def get(name: str) -> TrainConfig:
    """A recipe by name; ConfigError with the nearest name."""
    if name not in RECIPES:
        near = get_close_matches(name, RECIPES, 1)
        raise ConfigError(
            f"unknown recipe {name!r}" + (f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(RECIPES)}")
        )
    return RECIPES[name]()

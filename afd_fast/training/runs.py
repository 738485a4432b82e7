"""Named runs: functions that return a configuration. `afd-fast train NAME key=value` starts one."""

from dataclasses import replace
from difflib import get_close_matches

from afd_fast.config import EvaluationConfig, TrainConfig, UpdateConfig
from afd_fast.discriminators.config import DiscriminatorConfig
from afd_fast.errors import ConfigError
from afd_fast.reference.nft import nft_recipe
from afd_fast.rollout import RolloutConfig
from afd_fast.students.student import StudentConfig


def demo() -> TrainConfig:
    """The embedded main job, as `demo_lagged`. Both readings of the paper reach the same physics (docs/results.md)."""
    return TrainConfig()


def demo_lagged() -> TrainConfig:
    """The reading of the paper's section 10 and of every public NFT trainer: v_old = the EMA policy, which collects."""
    return replace(demo(), name="demo_lagged")


def demo_eq4() -> TrainConfig:
    """The paper's Eq. 4 read literally: v_old = stop-grad(v), velocity space, sums, no adaptive weight."""
    base = demo()
    return replace(
        base,
        name="demo_eq4",
        loss=nft_recipe("afd", ref_coef=1e-3),
        update=replace(base.update, v_old="self", lr=2e-3),
    )


def demo_shuffled() -> TrainConfig:
    """The control: `demo` with advantages permuted across the batch, so that the reward carries no credit."""
    return replace(demo(), name="demo_shuffled", shuffle_rewards=True)


def demo_long() -> TrainConfig:
    """`demo` on clips twice as long (24 frames, 8 chunks), where errors of the history add up."""
    return replace(demo(), name="demo_long", student=StudentConfig("toy_long"))


def regime() -> TrainConfig:
    """The student that AFD is made for, small: distilled to three steps, prompts that leave much open, teacher=lights."""
    return replace(
        demo(),
        name="regime",
        iterations=120,
        teacher="lights",
        prompts_per_step=8,
        rollouts_per_prompt=4,
        student=StudentConfig("lights"),
        rollout=RolloutConfig(steps=(1000, 500, 250), shift=1.0, chunk=6),
    )


def afd_table3() -> TrainConfig:
    """The paper's run (Table 3) on a causal Wan 1.3B; set student=, discriminator= and teacher= (docs/training.md).

    Decided here, as the paper gives no number: no warm-up of the discriminator (Algorithm 1 has none), no instance
    noise and no gradient penalty, t ~ U(0.04, 1), a constant learning rate, one teacher video per prompt.
    """
    return TrainConfig(
        name="afd_table3",
        iterations=1000,
        teacher="folder:teacher",
        teacher_clips=1,
        prompts_per_step=8,
        rollouts_per_prompt=4,
        shards=8,
        global_std=True,
        student=StudentConfig("Self-Forcing/self_forcing_dmd.pt", lora_rank=256),
        rollout=RolloutConfig(shift=5.0),
        loss=nft_recipe("afd", beta=0.1, ref_coef=1e-4, adv_clip=5.0),
        update=UpdateConfig(
            v_old="self",
            t_sampling="uniform",
            chunked=True,
            batch=1,
            lr=1e-5,
            lr_decay=False,
            weight_decay=1e-4,
            grad_norm=1.0,
            ema=0.99,
        ),
        discriminator=DiscriminatorConfig(name="KwaiVGI/VideoReward", lr=1e-5, warmup=0),
        evaluation=EvaluationConfig(rollouts=1, batch=4),
    )


RUNS = {f.__name__: f for f in (demo, demo_eq4, demo_lagged, demo_shuffled, demo_long, regime, afd_table3)}


def get(name: str) -> TrainConfig:
    """A named run. ConfigError with the nearest name."""
    if name not in RUNS:
        near = get_close_matches(name, RUNS, 1)
        hint = f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(RUNS)}"
        raise ConfigError(f"unknown run {name!r}{hint}")
    return RUNS[name]()

"""One AFD iteration (Algorithm 1) as one straight line.

prompts -> teacher videos (finished, cached) -> K rollouts a prompt -> discriminator update -> score ->
advantage -> r -> forward noise -> velocities -> NFT + prior loss -> optimiser -> EMA.

Legend: P prompts, K rollouts each, B = P * K samples, F frames, H x W pixels.
"""

import contextlib
import math
import time

import torch
from torch import Tensor

from afd_fast import ops
from afd_fast.config import TrainConfig
from afd_fast.models.lora import merged_lora
from afd_fast.models.toy import decode_video, tokenize
from afd_fast.reference.advantage import reward_to_r
from afd_fast.reference.adversarial import approximate_gradient_penalty
from afd_fast.reference.nft import NFTRecipe, NFTStats, nft_recipe
from afd_fast.rollout import RolloutConfig, rollout, step_table
from afd_fast.training.lora import disabled, trainable
from afd_fast.training.state import TrainState, generator
from afd_fast.training.update import student_velocity
from afd_fast.video_io import deliver

PENALTY_SIGMA = 0.05  # step of the finite-difference R1 / R2, in [0, 1] pixels


def loss_recipe(config: TrainConfig) -> NFTRecipe:
    """The loss a configuration names."""
    return nft_recipe(config.recipe, beta=config.beta, ref_coef=config.prior_weight, adv_clip=config.adv_clip)


def rollout_config(config: TrainConfig, chunk: int) -> RolloutConfig:
    """The sampler a configuration names."""
    return RolloutConfig(steps=config.steps, shift=config.shift, chunk=chunk)


def sample_policy(
    state: TrainState, config: TrainConfig, prompts: list[str], rng: torch.Generator, average: bool
) -> Tensor:
    """Latents [B, 3, F, H, W] of the current student, or of its average; adapters merged meanwhile."""
    student, c = state.student, state.student.config
    noise = torch.randn(len(prompts), 3, c.frames, c.height, c.width, generator=rng)
    weights = state.ema.applied(student) if average else contextlib.nullcontext()
    with torch.no_grad(), weights:
        text = student.encode_text(tokenize(prompts, c.text_len))
        return rollout(student, text, noise, rollout_config(config, c.chunk), generator=rng)


def discriminator_update(
    state: TrainState, config: TrainConfig, teacher: Tensor, student: Tensor, prompts: list[str], rng
) -> dict:
    """One Bradley-Terry step on paired videos [B, 3, F, H, W] in [0, 1] (Eq. 1), with instance noise and R1 / R2."""
    noisy = lambda x, scale: x + scale / 2 * torch.randn(x.shape, generator=rng)  # scale is for the [-1, 1] range
    both = torch.cat([noisy(teacher, config.instance_noise), noisy(student, config.instance_noise)])
    scores = state.discriminator.score(both, prompts * 2)
    of_teacher, of_student = scores.chunk(2)
    loss = ops.bt_loss(of_teacher, of_student)
    if config.r1:
        shaken = state.discriminator.score(noisy(both, PENALTY_SIGMA), prompts * 2)
        loss = loss + 2 * config.r1 * approximate_gradient_penalty(scores, shaken, PENALTY_SIGMA)
    state.disc_optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(state.discriminator.parameters(), 5.0)
    state.disc_optimizer.step()
    margin = (of_teacher - of_student).detach()
    return {"disc_loss": loss.item(), "margin": margin.mean().item(), "accuracy": (margin > 0).float().mean().item()}


def student_loss(
    state: TrainState, config: TrainConfig, x0: Tensor, r: Tensor, prompts: list[str], rng
) -> tuple[Tensor, NFTStats]:
    """NFT + prior loss (Eq. 3-5) of the student on rollouts x0 [B, 3, F, H, W] with optimality r [B]."""
    student, c = state.student, state.student.config
    shape = (len(x0), c.frames // c.chunk)  # every chunk has its own noise level
    if config.t_sampling == "grid":
        grid = torch.tensor([sigma for _, sigma in step_table(config.steps, config.shift)], dtype=x0.dtype)
        t = grid[torch.randint(len(grid), shape, generator=rng)]
    else:
        t = torch.rand(shape, generator=rng, dtype=x0.dtype) * 0.96 + 0.04
    t = t.repeat_interleave(c.chunk, 1)  # [B, F]
    noise = torch.randn(x0.shape, generator=rng, dtype=x0.dtype)
    x_t = ops.forward_noise(x0, t, noise=noise, frame_dim=2)
    ids = tokenize(prompts, c.text_len)
    velocity = lambda: student_velocity(student, x_t, t, student.encode_text(ids), x0, c.chunk)
    with torch.no_grad():
        with disabled(student):
            v_ref = velocity()
        v_old = None
        if config.v_old == "ema":
            with state.ema.applied(student), merged_lora(student):
                v_old = velocity()
    return ops.nft_loss(
        velocity(),
        x0,
        r,
        t,
        noise=noise,
        v_old=v_old,
        v_ref=v_ref,
        frame_dim=2,
        recipe=loss_recipe(config),
        return_stats=True,
    )


def student_update(state: TrainState, config: TrainConfig, x0: Tensor, r: Tensor, prompts: list[str], rng) -> dict:
    """One optimiser and EMA step on `student_loss`."""
    loss, stats = student_loss(state, config, x0, r, prompts, rng)
    state.optimizer.zero_grad()
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(trainable(state.student).values(), config.grad_norm)
    state.optimizer.step()
    state.ema.update(state.student)
    return {
        "loss": loss.item(),
        "policy_loss": stats.policy_loss.item(),
        "prior_loss": stats.prior_loss.item(),
        "signal": stats.signal.item(),
        "grad_norm": grad_norm.item(),
        "velocity_norm_ratio": (stats.v_norm / stats.v_ref_norm).mean().item(),
    }


def train_step(state: TrainState, config: TrainConfig, prompts: list[str], teacher: Tensor) -> dict[str, float]:
    """One iteration; `prompts` [B], grouped by prompt, and a teacher video [B, 3, F, H, W] for each. Returns metrics."""
    seconds, clock = {}, time.perf_counter()

    def lap(phase):
        nonlocal clock
        now = time.perf_counter()
        seconds[f"seconds/{phase}"], clock = now - clock, now

    rng = lambda purpose: generator(config.seed, state.step, purpose)
    learning_student = state.step >= config.disc_warmup
    for group in state.optimizer.param_groups:
        done = (state.step - config.disc_warmup) / max(1, config.iterations - config.disc_warmup)
        cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done))))
        group["lr"] = config.student_lr * (cosine if config.lr_decay else 1.0)

    x0 = sample_policy(state, config, prompts, rng("rollout"), average=config.v_old == "ema")
    videos = deliver(decode_video(x0), config.codec_crf)
    lap("rollout")
    noise = rng("discriminator")
    for _ in range(config.disc_steps):
        metrics = discriminator_update(state, config, teacher, videos, prompts, noise)
    lap("discriminator")
    with torch.no_grad():
        rewards = state.discriminator.score(videos, prompts)  # [B]
    state.tracker.clear()  # every iteration is an epoch of its own
    advantages = state.tracker.update(prompts, rewards).float()
    if config.shuffle_rewards:
        advantages = advantages[torch.randperm(len(advantages), generator=rng("shuffle"))]
    r = reward_to_r(advantages, clip=config.adv_clip)
    within = rewards.view(-1, config.rollouts_per_prompt)
    metrics |= {
        "reward": rewards.mean().item(),
        "reward_std_in_prompt": within.std(1, unbiased=False).mean().item(),
        "r_std": r.std().item(),
    }
    lap("score")
    if learning_student:
        metrics |= student_update(state, config, x0, r, prompts, rng("update"))
        lap("update")
    state.step += 1
    return metrics | seconds

"""One AFD iteration (Algorithm 1) as one straight line.

prompts -> teacher videos (finished, cached) -> K rollouts a prompt -> discriminator update -> score ->
advantage -> r -> forward noise -> velocities -> NFT + prior loss -> optimiser -> EMA.

The batch comes in shards (`config.shards`), gone through one after the other and shared out among the ranks;
gradients add up over both.

Legend: P prompts, K rollouts each, B = P * K samples (b in a shard), C channels, F frames, H x W pixels.
"""

import contextlib
import math
import time
from collections.abc import Callable

import nvtx
import torch
import torch.nn.functional as F
from torch import Tensor

from afd_fast import ops
from afd_fast.config import TrainConfig
from afd_fast.errors import TrainingError
from afd_fast.reference.advantage import reward_to_r
from afd_fast.reference.adversarial import approximate_gradient_penalty, gan_loss
from afd_fast.reference.nft import NFTRecipe, nft_recipe
from afd_fast.rollout import RolloutConfig, rollout, step_table
from afd_fast.students.lora import disabled, merged_lora, trainable
from afd_fast.teachers.dataset import Shard
from afd_fast.training.distributed import Ranks, local, total_norm
from afd_fast.training.state import System, TrainState, generator
from afd_fast.training.update import UPDATES, UpdateStats, add, clip_loss, nft_backward
from afd_fast.video_io import deliver

PENALTY_SIGMA = 0.05  # step of the finite-difference R1 / R2, in [0, 1] pixels


@contextlib.contextmanager
def phase(name: str, seconds: dict[str, float]):
    """Time a part of the iteration under its name, as an NVTX range too; on a GPU until its work is done."""
    start = time.perf_counter()
    with nvtx.annotate(name, domain="afd_fast"):
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    seconds[f"seconds/{name}"] = time.perf_counter() - start


def clip_gradients(named: dict[str, torch.nn.Parameter], max_norm: float, step: int) -> float:
    """Scale the gradients down to `max_norm` together; returns the norm before. TrainingError that names the tensor
    when one is not finite, before an optimiser could spread it."""
    gradients = {name: p.grad for name, p in named.items() if p.grad is not None}
    norm = total_norm(list(gradients.values()))
    if not norm.isfinite():
        bad = next((name for name, g in gradients.items() if not local(g).isfinite().all()), "all together")
        raise TrainingError(
            f"iteration {step}: the gradient of {bad} is not finite. Stopped before a weight was changed; the last "
            "checkpoint is valid. A lower student_lr (disc_lr, if it is the discriminator's) often helps"
        )
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for g in gradients.values():
        local(g).mul_(scale.to(g.device))
    return norm.item()


def loss_recipe(config: TrainConfig, step: int = 0) -> NFTRecipe:
    """The loss a configuration names, at iteration `step`: with ref_every = n the prior is there every n-th time, n-fold.
    Methods that regress on chosen videos have no policy loss: r = 1 and beta = 1 make it |v_theta - (eps - x0)|^2."""
    if config.method in ("sft", "rejection"):
        return nft_recipe("afd", beta=1.0, ref_coef=0.0, sample_reduction="mean", batch_reduction="mean")
    weight = config.prior_weight * config.ref_every if step % config.ref_every == 0 else 0.0
    return nft_recipe(config.recipe, beta=config.beta, ref_coef=weight, adv_clip=config.adv_clip)


def rollout_config(config: TrainConfig, chunk: int) -> RolloutConfig:
    """The sampler a configuration names."""
    return RolloutConfig(steps=config.steps, shift=config.shift, chunk=chunk, window=config.window, sink=config.sink)


def sample_policy(
    state: TrainState,
    config: TrainConfig,
    prompts: list[str],
    rng: torch.Generator,
    average: bool,
    *,
    frames: int | None = None,
    history: Tensor | None = None,
) -> Tensor:
    """Latents [B, C, F, H, W] of the current student, or of its average; adapters merged meanwhile. frames: other than
    the system's. history: latents [B or 1, C, F0, H, W] that these go on from, not in the result."""
    system, student = state.system, state.student
    channels, length, height, width = system.shape
    noise = torch.randn(len(prompts), channels, frames or length, height, width, generator=rng)
    noise = noise.to(next(student.parameters()))
    if noise.is_cuda:
        rng = torch.Generator(noise.device).manual_seed(rng.initial_seed())
    weights = state.ema.applied(student) if average else contextlib.nullcontext()
    with torch.no_grad(), weights:
        shared = history is not None and len(history) < len(prompts)  # a prefix run once needs its one prompt
        text = student.encode_text(system.encode(prompts[:1] if shared else prompts))
        sampler = rollout_config(config, system.chunk)
        x = rollout(student, text, noise, sampler, generator=rng, initial_latent=history)
        return x if history is None else x[:, :, history.shape[2] :]


def discriminator_loss(
    state: TrainState, config: TrainConfig, teacher: Tensor, student: Tensor, prompts: list[str], rng
) -> tuple[Tensor, Tensor]:
    """Bradley-Terry (Eq. 1), or the binary loss of the ablation, on paired videos [b, 3, F, H, W] in [0, 1], with
    instance noise and R1 / R2: the loss, and the margins [b]."""
    draw = lambda x: torch.randn(x.shape, generator=rng).to(x.device)
    noisy = lambda x, scale: x + scale / 2 * draw(x) if scale else x  # scale is for the [-1, 1] range
    both = torch.cat([noisy(teacher, config.instance_noise), noisy(student, config.instance_noise)])
    scores = state.discriminator.score(both, prompts * 2)
    of_teacher, of_student = scores.chunk(2)
    loss = ops.bt_loss if config.disc_loss == "bt" else gan_loss
    loss = loss(of_teacher, of_student)
    if config.r1:
        shaken = state.discriminator.score(noisy(both, PENALTY_SIGMA), prompts * 2)
        loss = loss + 2 * config.r1 * approximate_gradient_penalty(scores, shaken, PENALTY_SIGMA)
    return loss, (of_teacher - of_student).detach()


def discriminator_update(state: TrainState, config: TrainConfig, parts: list[tuple], ranks: Ranks = Ranks()) -> dict:
    """One step on `discriminator_loss`; parts: its (teacher, student, prompts, rng) for every shard of this rank."""
    state.disc_optimizer.zero_grad()
    rows = []
    for part in parts:
        loss, margin = discriminator_loss(state, config, *part)
        (loss / (len(parts) * ranks.world)).backward()
        rows.append({
            "disc_loss": loss.item(), "margin": margin.mean().item(), "accuracy": (margin > 0).float().mean().item(),
            "pair_r": torch.sigmoid(-margin).mean().item(),
        })  # fmt: skip
    parameters = {f"discriminator.{name}": p for name, p in trainable(state.discriminator).items()}
    ranks.sum_gradients(parameters.values())
    clip_gradients(parameters, 5.0, state.step)
    state.disc_optimizer.step()
    return average_rows(rows)


def average_rows(rows: list[dict]) -> dict:
    """Metrics of several shards, key by key."""
    return {key: value / len(rows) for key, value in add(*rows).items()}


def noised(system: System, config: TrainConfig, x0: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(t [b, F], noise, x_t) of Eq. 3; every chunk has a noise level of its own."""
    shape, wide = (len(x0), x0.shape[2] // system.chunk), torch.promote_types(x0.dtype, torch.float32)
    if config.t_sampling == "grid":
        grid = torch.tensor([sigma for _, sigma in step_table(config.steps, config.shift)], dtype=wide)
        t = grid[torch.randint(len(grid), shape, generator=rng)]
    else:
        t = torch.rand(shape, generator=rng, dtype=wide) * 0.96 + 0.04
    t = t.repeat_interleave(system.chunk, 1).to(x0.device)
    noise = torch.randn(x0.shape, generator=rng, dtype=wide).to(x0)
    return t, noise, ops.forward_noise(x0, t, noise=noise, frame_dim=2)


def student_backward(
    state: TrainState, config: TrainConfig, x0: Tensor, r: Tensor, prompts: list[str], rng, *,
    scale: float = 1.0, active: range | None = None,
) -> dict[str, float]:  # fmt: skip
    """Add scale * the gradient of the NFT + prior loss (Eq. 3-5) on rollouts x0 [b, C, F, H, W] with optimality r [b]:
    `update_batch` rows at a time, and with `chunked_update` or `active` chunk by chunk (`nft_backward`). Returns the
    loss and its stats.

    active: the frames that are trained, of a longer stream with r [b, S] for its S clips.
    """
    t, noise, x_t = noised(state.system, config, x0, rng)
    size, parts = config.update_batch or len(x0), []
    for start in range(0, len(x0), size):
        rows = slice(start, start + size)
        own = (x_t[rows], t[rows], x0[rows])
        context = state.system.encode(prompts[rows])
        velocity, given = velocities(state, config, *own, context, active)
        given |= {"noise": noise[rows]}
        of_rows = len(own[0]) / len(x0)
        share = of_rows if given["recipe"].batch_reduction == "mean" else 1.0
        if config.chunked_update or active:
            text = state.student.encode_text(context)
            given |= window(config) | {"r": r[rows], "active": active, "scale": scale * share}
            loss, stats = nft_backward(state.student, *own[:2], text, own[2], state.system.chunk, **given)
        else:
            loss, sums = clip_loss(velocity(), own[2], r[rows, None], own[1], length=x0.shape[2], **given)
            (loss * scale * share).backward()
            stats = UpdateStats.of(sums)
        part = {
            "loss": loss.detach() * share,
            "policy_loss": stats.policy_loss * share,
            "signal": stats.signal * of_rows,
        }
        if given["v_ref"] is not None:
            ratio = stats.velocity_norm_ratio * of_rows
            part |= {"prior_loss": stats.prior_loss * share, "velocity_norm_ratio": ratio}
        parts.append(part)
    return {key: value.item() for key, value in add(*parts).items()}


def window(config: TrainConfig) -> dict:
    """Options of the cache that a configuration names."""
    return {"window": config.window, "sink": config.sink} if config.window else {}


def velocities(
    state: TrainState, config: TrainConfig, x_t: Tensor, t: Tensor, x0: Tensor, context, active=None
) -> tuple[Callable, dict]:
    """(function that computes v_theta with its graph, v_ref and v_old and the recipe they are for); of a stream's active
    frames v_ref and v_old hold zeros elsewhere. context: `system.encode`'s of the rows' prompts."""
    system, student, forward = state.system, state.student, UPDATES[config.update]
    options = window(config) | ({} if active is None else {"active": active})

    def velocity(model=student):
        v = forward(model, x_t, t, model.encode_text(context), x0, system.chunk, **options)
        return v if active is None else F.pad(v, (0, 0, 0, 0, active.start, x0.shape[2] - active.stop))

    v_ref, v_old, recipe = None, None, loss_recipe(config, state.step)
    with torch.no_grad():
        if recipe.ref_coef:
            with disabled(student) if state.reference is None else contextlib.nullcontext():
                v_ref = velocity(state.reference or student)
        if config.v_old == "ema":
            with state.ema.applied(student), merged_lora(student):
                v_old = velocity()
    return velocity, {"v_old": v_old, "v_ref": v_ref, "recipe": recipe}


def student_update(
    state: TrainState, config: TrainConfig, parts: list[tuple], ranks: Ranks = Ranks(), *, active: range | None = None
) -> dict:
    """One optimiser and EMA step on `student_backward`; parts: its (x0, r, prompts, rng) for every shard of this rank.
    active: of a stream, as there."""
    share = 1 if loss_recipe(config).batch_reduction == "sum" else len(parts) * ranks.world
    state.optimizer.zero_grad()
    rows = [student_backward(state, config, *part, scale=1 / share, active=active) for part in parts]
    return average_rows(rows) | {"grad_norm": optimise(state, config, ranks)}


def optimise(state: TrainState, config: TrainConfig, ranks: Ranks) -> float:
    """The student's optimiser and EMA step on what all ranks have in `.grad`; returns the gradient's norm."""
    parameters = trainable(state.student)
    ranks.sum_gradients(parameters.values())
    grad_norm = clip_gradients(parameters, config.grad_norm, state.step)
    state.optimizer.step()
    state.ema.update(state.student)
    return grad_norm


def set_learning_rate(state: TrainState, config: TrainConfig) -> bool:
    """The student's learning rate of this iteration; returns whether it is past the discriminator's warm-up."""
    for group in state.optimizer.param_groups:
        done = (state.step - config.disc_warmup) / max(1, config.iterations - config.disc_warmup)
        cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done))))
        group["lr"] = config.student_lr * (cosine if config.lr_decay else 1.0)
    return state.step >= config.disc_warmup


def on_policy(
    state: TrainState, config: TrainConfig, shards: list[Shard], ranks: Ranks, seconds: dict
) -> tuple[list[Tensor], list[Tensor], dict]:
    """Rollouts, the discriminator's update on them, and its scores after it: ([b, C, F, H, W], [b]) for every shard,
    and metrics."""
    rng = lambda purpose, shard: generator(config.seed, state.step, purpose, shard)
    lagged = config.v_old == "ema"
    with phase("rollout", seconds):
        x0 = [sample_policy(state, config, s.prompts, rng("rollout", s.index), average=lagged) for s in shards]
    with phase("decode", seconds):
        home = next(state.discriminator.parameters()).device
        videos = [deliver(state.system.decode(x), config.codec_crf).to(home) for x in x0]
    with phase("discriminator", seconds):
        noises = [rng("discriminator", s.index) for s in shards]
        pairs = [(s.teacher.to(home), video, s.prompts, noise) for s, video, noise in zip(shards, videos, noises)]
        for _ in range(config.disc_steps):
            metrics = discriminator_update(state, config, pairs, ranks)
    with phase("score", seconds), torch.no_grad():
        scores = [state.discriminator.score(v, s.prompts) for s, v in zip(shards, videos)]
    return x0, scores, metrics


def optimality(
    state: TrainState, config: TrainConfig, shards: list[Shard], scores: list[Tensor], ranks: Ranks, clips: int = 1
) -> tuple[list[Tensor], dict]:
    """r [b] in [0, 1] for every shard from everybody's scores (Eq. 2), and metrics. clips: with several clips of a row,
    scores [clips * b] clip by clip; a clip is compared with the same clip of its prompt's other rows."""
    names = [f"{p}#{clip}" if clip else p for s in shards for clip in range(clips) for p in s.prompts]
    prompts, rewards = ranks.gather(names, torch.cat(scores))  # [B]
    state.tracker.clear()  # every iteration is an epoch of its own
    advantages = state.tracker.update(prompts, rewards).float()
    if config.shuffle_rewards:
        order = torch.randperm(len(advantages), generator=generator(config.seed, state.step, "shuffle"))
        advantages = advantages[order]
    r = reward_to_r(advantages, clip=config.adv_clip)
    within = rewards.view(-1, config.rollouts_per_prompt)
    return list(r.split(clips * len(shards[0].prompts))[shards[0].index :]), {
        "reward": rewards.mean().item(),
        "reward_std_in_prompt": within.std(1, unbiased=False).mean().item(),
        "r_std": r.std().item(),
    }


def train_step(state: TrainState, config: TrainConfig, shards: list[Shard], ranks: Ranks = Ranks()) -> dict[str, float]:
    """One iteration on this rank's shards. Returns metrics, averaged over all ranks."""
    seconds: dict[str, float] = {}
    learning_student = set_learning_rate(state, config)
    x0, scores, metrics = on_policy(state, config, shards, ranks, seconds)
    r, rewards = optimality(state, config, shards, scores, ranks)
    metrics |= rewards
    if learning_student:
        with phase("update", seconds):
            rng = lambda s: generator(config.seed, state.step, "update", s.index)
            parts = [(x, own.to(x.device), s.prompts, rng(s)) for x, own, s in zip(x0, r, shards)]
            metrics |= student_update(state, config, parts, ranks)
    state.step += 1
    return ranks.mean(metrics | seconds)

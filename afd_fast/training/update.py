"""The two optimiser steps of an iteration: the discriminator on pairs, the student on the NFT + prior loss.

Gradients add up over a rank's shards and over the ranks.
Legend: b rows of a shard, C channels, F frames, H x W pixels or latent pixels, S clips of a rollout.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from afd_fast import ops
from afd_fast.discriminators.discriminator import Clips
from afd_fast.errors import TrainingError
from afd_fast.reference.adversarial import pair_health
from afd_fast.reference.nft import NFTRecipe, nft_recipe
from afd_fast.rollout import RolloutConfig
from afd_fast.students.lora import disabled, merged_lora, trainable
from afd_fast.students.student import Context, StudentModule
from afd_fast.teachers.dataset import Shard
from afd_fast.training.distributed import local, total_norm
from afd_fast.training.rollouts import Rollouts
from afd_fast.training.run import Metrics, Run
from afd_fast.training.velocity import LossInputs, UpdateStats, clip_loss, nft_backward, velocity

DISC_GRAD_NORM = 5.0
REGRESSION = nft_recipe("afd", beta=1.0, ref_coef=0.0, sample_reduction="mean", batch_reduction="mean")
HEADLINE = ("disc_loss", "margin", "accuracy", "pair_r")  # of what a pair says; the rest is its health


class Pair(NamedTuple):
    """Both sides of a shard's pairs, [b] each."""

    teacher: Clips
    student: Clips


View = Callable[[Pair, torch.Generator], Pair]  # what a method does to a pair before the discriminator sees it


def mean_of(rows: Sequence[Metrics]) -> Metrics:
    """Metrics of several shards, key by key."""
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def clip_gradients(named: Mapping[str, nn.Parameter], max_norm: float, step: int) -> float:
    """Scale the gradients down to `max_norm` together; returns the norm before. TrainingError that names the tensor
    when one is not finite, before an optimiser could spread it."""
    gradients = {name: p.grad for name, p in named.items() if p.grad is not None}
    norm = total_norm(list(gradients.values()))
    if not norm.isfinite():
        bad = next((name for name, g in gradients.items() if not local(g).isfinite().all()), "all together")
        raise TrainingError(
            f"iteration {step}: the gradient of {bad} is not finite. Stopped before a weight was changed; the last "
            "checkpoint is valid. A lower update.lr (discriminator.lr, if it is the discriminator's) often helps"
        )
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for g in gradients.values():
        local(g).mul_(scale.to(g.device))
    return norm.item()


# -- the discriminator -----------------------------------------------------------------------------------------


def update_discriminator(run: Run, rollouts: Sequence[Rollouts], view: View | None = None) -> Metrics:
    """`discriminator.steps` updates on the teacher's and the student's clips, paired by prompt (Eq. 1). Metrics of the
    last one, before its optimiser step."""
    noises = [run.generator("discriminator", x.index) for x in rollouts]
    metrics: Metrics = {}
    for _ in range(run.config.discriminator.steps):
        run.state.disc_optimizer.zero_grad()
        rows = []
        for x, rng in zip(rollouts, noises):
            assert x.videos is not None
            pair = Pair(x.teacher, x.videos)
            rows.append(
                discriminator_backward(run, view(pair, rng) if view else pair, x.clip_prompts, rng, len(rollouts))
            )
        parameters = {f"discriminator.{name}": p for name, p in trainable(run.discriminator).items()}
        run.ranks.sum_gradients(parameters.values())
        clip_gradients(parameters, DISC_GRAD_NORM, run.state.step)
        run.state.disc_optimizer.step()
        metrics = mean_of(rows)
    return metrics


def discriminator_backward(run: Run, pair: Pair, prompts: list[str], rng: torch.Generator, shards: int) -> Metrics:
    """Add a shard's share of the discriminator's gradient; its loss and the health of its scores."""
    found = run.discriminator.paired_loss(*pair, prompts, run.config.discriminator.objective, rng=rng)
    (found.loss / (shards * run.ranks.world)).backward()
    said = {"disc_loss": found.loss.detach(), **cast(dict[str, Tensor], pair_health(found.teacher, found.student))}
    values = torch.stack(list(said.values())).tolist()  # one wait for the GPU
    return {name if name in HEADLINE else f"health/{name}": value for name, value in zip(said, values)}


# -- the student -----------------------------------------------------------------------------------------------


class Noised(NamedTuple):
    """Rollouts at random noise levels (Eq. 3): t [b, F], noise and x_t [b, C, F, H, W]."""

    t: Tensor
    noise: Tensor
    x_t: Tensor


def drawn_levels(
    sampler: RolloutConfig, shape: tuple[int, int], dtype: torch.dtype, rng: torch.Generator, first: bool = False
) -> Tensor:
    """Noise levels of a sampler's steps (first: of its first chunk's), drawn uniformly."""
    grid = torch.tensor([step.sigma for step in sampler.timetable(first)], dtype=dtype)
    return grid[torch.randint(len(grid), shape, generator=rng)]


def noised(run: Run, x0: Tensor, rng: torch.Generator) -> Noised:
    """Latents x0 [b, C, F, H, W] noised; every chunk has its own noise level."""
    chunk, wide = run.family.chunk, torch.promote_types(x0.dtype, torch.float32)
    shape = (len(x0), x0.shape[2] // chunk)
    if run.config.update.t_sampling == "grid":
        t = drawn_levels(run.sampler, shape, wide, rng)
        if run.sampler.first_chunk_steps is not None:
            t[:, :1] = drawn_levels(run.sampler, (len(x0), 1), wide, rng, first=True)
    else:
        t = torch.rand(shape, generator=rng, dtype=wide) * 0.96 + 0.04
    t = t.repeat_interleave(chunk, 1).to(x0.device)
    noise = torch.randn(x0.shape, generator=rng, dtype=wide).to(x0)
    return Noised(t, noise, ops.forward_noise(x0, t, noise=noise, frame_dim=2))


def policy_recipe(run: Run) -> NFTRecipe:
    """The loss of this iteration: with update.ref_every = n the prior is there every n-th time, n-fold."""
    loss, every = run.config.loss, run.config.update.ref_every
    if every == 1:
        return loss
    return replace(loss, ref_coef=loss.ref_coef * every if run.state.step % every == 0 else 0.0)


@dataclass(frozen=True)
class Targets:
    """What the student learns on: latents x0 [b, C, F, H, W] of prompts [b] with optimality r [b, S].

    index: of the shard, for its random numbers. active: the frames that are trained, of a longer stream.
    """

    x0: Tensor
    r: Tensor
    prompts: list[str]
    index: int
    active: range | None = None

    @classmethod
    def of(cls, rollouts: Rollouts) -> "Targets":
        assert rollouts.r is not None
        return cls(rollouts.latents, rollouts.r, rollouts.prompts, rollouts.index, rollouts.active)


def with_teacher(run: Run, targets: Targets, shard: Shard) -> Targets:
    """The targets of a shard's rollouts, joined by a teacher's clip of each prompt with r = teacher_r."""
    k, teacher_r = run.config.rollouts_per_prompt, run.config.teacher_r
    assert teacher_r is not None
    x0 = run.family.vae.encode(shard.teacher(targets.x0.device)[::k]).to(targets.x0)
    r = targets.r.new_full((len(x0), targets.r.shape[1]), teacher_r)
    prompts = [*targets.prompts, *targets.prompts[::k]]
    return replace(targets, x0=torch.cat([targets.x0, x0]), r=torch.cat([targets.r, r]), prompts=prompts)


def update_student(run: Run, targets: Sequence[Targets], recipe: NFTRecipe | None = None) -> Metrics:
    """One optimiser and EMA step on the NFT + prior loss, or another recipe of it."""
    recipe = recipe or policy_recipe(run)
    scale = 1.0 if recipe.batch_reduction == "sum" else 1.0 / (len(targets) * run.ranks.groups)
    run.state.optimizer.zero_grad()
    rows = [student_backward(run, x, recipe, run.generator("update", x.index), scale) for x in targets]
    with run.phase("optimiser"):
        grad_norm = optimise(run)
    return mean_of(rows) | {"grad_norm": grad_norm}


def student_backward(
    run: Run, targets: Targets, recipe: NFTRecipe, rng: torch.Generator, scale: float = 1.0
) -> Metrics:
    """Add scale * the gradient of the loss (Eq. 3-5) on a shard, `update.batch` rows at a time; its stats."""
    t, noise, x_t = noised(run, targets.x0, rng)
    inputs = LossInputs(targets.x0, x_t, noise, t, targets.r, recipe)
    count = len(targets.x0)
    size, parts = run.config.update.batch or count, []
    for start in range(0, count, size):
        part = inputs.rows(slice(start, start + size))
        of_rows = len(part.x0) / count
        share = of_rows if recipe.batch_reduction == "mean" else 1.0
        context = run.family.text(targets.prompts[start : start + size])
        with run.phase("reference"):
            part = with_references(run, part, context, targets.active)
        with run.phase("backward"):
            stats = backward(run, part, context, targets.active, scale * share)
        row = {
            "loss": stats.loss * share,
            "policy_loss": stats.policy_loss * share,
            "signal": stats.signal * of_rows,
        }
        if part.v_ref is not None:
            row["prior_loss"] = stats.prior_loss * share
            row["velocity_norm_ratio"] = stats.velocity_norm_ratio * of_rows
        parts.append(row)
    return {key: sum((row[key] for row in parts[1:]), start=parts[0][key]).item() for key in parts[0]}


def backward(run: Run, inputs: LossInputs, context: Context, active: range | None, scale: float) -> UpdateStats:
    """One backward pass, chunk by chunk with update.chunked or a stream, else through all chunks at once."""
    student, chunking = run.family.student, run.chunking(active)
    if run.config.update.chunked or active is not None:
        return nft_backward(student, student.encode_text(context), inputs, chunking, scale)
    text = student.encode_text(context)
    v = velocity(student, inputs.x_t, inputs.t, text, inputs.x0, chunking, run.config.update.history)
    loss, sums = clip_loss(v, inputs)
    (loss * scale).backward()
    return UpdateStats.of(loss, sums)


def with_references(run: Run, inputs: LossInputs, context: Context, active: range | None) -> LossInputs:
    """The inputs with v_ref of the frozen initial student where the prior has weight, and v_old of the lagged policy
    with update.v_old=ema; zeros in frames of a stream that are not active."""
    state, student = run.state, run.family.student
    v_ref = v_old = None

    def compute(model: StudentModule) -> Tensor:
        text = model.encode_text(context)
        return velocity(model, inputs.x_t, inputs.t, text, inputs.x0, run.chunking(active), run.config.update.history)

    with torch.no_grad():
        if inputs.recipe.ref_coef:
            with disabled(student) if state.reference is None else contextlib.nullcontext():
                v_ref = compute(state.reference or student)
        if run.config.update.v_old == "ema":
            with state.ema.applied(student), merged_lora(student):
                v_old = compute(student)
    return replace(inputs, v_ref=v_ref, v_old=v_old)


def optimise(run: Run) -> float:
    """The student's optimiser and EMA step on what all ranks have in `.grad`; returns the gradient's norm."""
    state, parameters = run.state, run.state.weights
    run.ranks.sum_gradients(parameters.values())
    grad_norm = clip_gradients(parameters, run.config.update.grad_norm, state.step)
    state.optimizer.step()
    state.publish()
    state.ema.update(parameters)
    return grad_norm


def regress(run: Run, targets: Sequence[Targets]) -> Metrics:
    """One step on mean |v_theta - (eps - x0)|^2, clean history from x0 too: the NFT loss with r = 1 and beta = 1."""
    metrics = update_student(run, targets, REGRESSION)
    return {key: metrics[key] for key in ("loss", "grad_norm")}


def ones(x: Tensor) -> Tensor:
    """r [b, 1] of latents that are all optimal."""
    return torch.ones(len(x), 1, device=x.device, dtype=torch.float32)

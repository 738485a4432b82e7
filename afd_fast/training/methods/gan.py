"""Adversarial training of the rollout itself, without a forward-process update: `gan`, and `dmd` without a score.

* `gan`: the gradient of -log sigmoid(D(rollout) - D(teacher)) goes through the discriminator, the decoder and the last
  denoising call of every chunk (Self-Forcing 33593df, `self_forcing_training.py:140-216`: the call at which a rollout
  ends is drawn at random for each iteration, the history is detached). The door's rounding to 8 bits passes the gradient
  on unchanged.
* `dmd`: score-free DMD. The paper gives no loss; this is our reading: the scaffold of DMD2 (backward-simulated rollouts,
  `discriminator.steps` updates per student update, a discriminator on diffused samples) with the KL gradient zero, since a
  black box has no score. What remains is `gan` with both videos noised to x_t = (1 - t) x0 + t eps in [-1, 1] pixels
  before the discriminator, t ~ U(0, 1) the same in a pair. DMD2's fake-score network, which without that gradient trains
  nothing the student sees, is left out.

Legend: b rows of a shard, C channels, F frames, H x W pixels.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from afd_fast.reference.adversarial import bt_loss
from afd_fast.rollout import rollout
from afd_fast.teachers.dataset import Shard
from afd_fast.training.methods.method import Method
from afd_fast.training.rollouts import Rollouts, beside, delivered
from afd_fast.training.run import Metrics, Run
from afd_fast.training.update import Pair, View, mean_of, optimise, update_discriminator


def gan_iteration(run: Run, shards: Sequence[Shard]) -> Metrics:
    """`discriminator.steps` updates of the discriminator, one of the student through its last denoising calls."""
    return _iteration(run, shards, None)


def dmd_iteration(run: Run, shards: Sequence[Shard]) -> Metrics:
    """`gan_iteration` with diffused videos."""
    return _iteration(run, shards, diffused)


def _iteration(run: Run, shards: Sequence[Shard], view: View | None) -> Metrics:
    learns = run.past_warmup
    exit_step = 1 + int(torch.randint(len(run.sampler.steps), (), generator=run.generator("exit")))
    with run.phase("rollout"), torch.set_grad_enabled(learns):
        latents = [differentiable_rollout(run, s, exit_step) for s in shards]
    with run.phase("decode"), torch.set_grad_enabled(learns):
        pixels = [run.family.vae.decode(x) for x in latents]
    rollouts = [finished(run, s, x, p) for s, x, p in zip(shards, latents, pixels)]
    with run.phase("discriminator"):
        metrics = update_discriminator(run, rollouts, view)
    if learns:
        run.state.optimizer.zero_grad()
        with run.phase("backward"):
            rows = [student_backward(run, x, p, view, len(shards)) for x, p in zip(rollouts, pixels)]
        with run.phase("optimiser"):
            metrics |= mean_of(rows) | {"grad_norm": optimise(run)}
    return metrics


def finished(run: Run, shard: Shard, latents: Tensor, pixels: Tensor) -> Rollouts:
    """A shard's rollouts with their videos through the door, cut from the graph. The discriminator sees pixels on both
    sides: the student's gradient passes through its encoder."""
    home = run.discriminator_device
    videos = delivered(run, pixels.detach()).to(home)
    return Rollouts(shard.index, shard.prompts, latents.detach(), shard.teacher(home), videos=videos)


def differentiable_rollout(run: Run, shard: Shard, steps: int) -> Tensor:
    """Latents [b, C, F, H, W] of the student after `steps` of its denoising steps, with the graph of the last one."""
    family, student = run.family, run.family.student
    rng = run.generator("rollout", shard.index)
    noise = torch.randn(len(shard.prompts), *family.latents, generator=rng, dtype=torch.float32).to(
        next(student.parameters())
    )
    rng = beside(rng, noise.device)
    sampler = replace(run.sampler, steps=run.sampler.steps[:steps])
    text = student.encode_text(family.text(shard.prompts))
    return rollout(student, text, noise, sampler, generator=rng, grad_last_step=torch.is_grad_enabled())


def student_backward(run: Run, rollouts: Rollouts, pixels: Tensor, view: View | None, shards: int) -> Metrics:
    """Pass the generator loss's gradient from the finished videos on to `pixels`, which have a graph."""
    assert isinstance(rollouts.videos, Tensor)
    leaf = rollouts.videos.clone().requires_grad_()
    pair = Pair(rollouts.teacher, leaf)
    if view is not None:
        pair = view(pair, run.generator("diffuse", rollouts.index))
    found = generator_loss(run, pair, rollouts.prompts)
    (gradient,) = torch.autograd.grad(found.loss / (shards * run.ranks.groups), leaf)
    pixels.backward(gradient.to(pixels))
    return {"loss": found.loss.item(), "reward": found.scores.mean().item()}


class GeneratorLoss(NamedTuple):
    """What the student minimises, and D of its videos [b], detached."""

    loss: Tensor
    scores: Tensor


def generator_loss(run: Run, pair: Pair, prompts: list[str]) -> GeneratorLoss:
    """The discriminator's loss with the sides exchanged, on videos [b, 3, F, H, W]."""
    with torch.no_grad():
        of_teacher = run.discriminator.score(pair.teacher, prompts)
    of_student = run.discriminator.score(pair.student, prompts)
    if run.config.discriminator.loss == "gan":  # non-saturating: softplus(-D(student))
        return GeneratorLoss(torch.nn.functional.softplus(-of_student).mean(), of_student.detach())
    return GeneratorLoss(bt_loss(of_student, of_teacher), of_student.detach())


def diffused(pair: Pair, rng: torch.Generator) -> Pair:
    """Both videos [b, 3, F, H, W] at one random noise level per pair, in units of [0, 1] pixels (unclipped)."""
    assert isinstance(pair.teacher, Tensor) and isinstance(pair.student, Tensor)
    t = torch.rand((len(pair.teacher), 1, 1, 1, 1), generator=rng, dtype=torch.float32).to(pair.teacher.device)

    def noised(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=rng, dtype=torch.float32).to(x.device)
        return ((1 - t) * (x * 2 - 1) + t * noise + 1) / 2

    return Pair(noised(pair.teacher), noised(pair.student))


GAN = Method("gan", gan_iteration, {"update.v_old": "self"}, lr_scale=1 / 3)
DMD = Method("dmd", dmd_iteration, {"update.v_old": "self", "discriminator.steps": 5}, lr_scale=1 / 3)

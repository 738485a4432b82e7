"""The methods AFD is compared with, as iterations over the same student, teacher videos, discriminator and judge.

* `sft`: supervised fine-tuning. Flow matching on the teacher's videos, each chunk given the teacher's own clean earlier
  chunks (teacher prefixes), at the noise levels of the student's sampler. No rollout, no discriminator.
* `rejection`: a sanity check between SFT and AFD. Flow matching on the one of a prompt's K rollouts that the
  discriminator likes best, given that rollout's own history.
* `gan`: adversarial training of the rollout itself, without a forward-process update. The gradient of
  -log sigmoid(D(rollout) - D(teacher)) goes through the discriminator, the decoder and the last denoising call of every
  chunk (Self-Forcing 33593df, `self_forcing_training.py:140-216`: the call at which a rollout ends is drawn at random for
  each iteration, history is detached). The door's rounding to 8 bits passes the gradient on unchanged.
* `dmd`: score-free DMD. The paper gives no loss; this is our reading: the scaffold of DMD2 (backward-simulated rollouts,
  `disc_steps` discriminator updates for each of the student, a discriminator on diffused samples) with the KL gradient
  zero, since a black box has no score. What remains is `gan` with both videos noised to x_t = (1 - t) x0 + t eps in
  [-1, 1] pixels before the discriminator, t ~ U(0, 1) the same in a pair. DMD2's fake-score network, which without
  that gradient trains nothing the student sees, is left out.

Legend: b rows of a shard, K of them a prompt; C channels, F frames, H x W pixels.
"""

from dataclasses import replace

import torch
from torch import Tensor

from afd_fast.config import TrainConfig
from afd_fast.reference.adversarial import bt_loss
from afd_fast.rollout import rollout
from afd_fast.teachers.dataset import Shard
from afd_fast.training.distributed import Ranks
from afd_fast.training.state import TrainState, generator
from afd_fast.training.step import (
    average_rows,
    discriminator_update,
    on_policy,
    optimise,
    phase,
    rollout_config,
    set_learning_rate,
    student_update,
    train_step,
)
from afd_fast.video_io import deliver


def sft_step(state: TrainState, config: TrainConfig, shards: list[Shard], ranks: Ranks = Ranks()) -> dict[str, float]:
    """One iteration of supervised fine-tuning on the shards' teacher videos."""
    seconds: dict[str, float] = {}
    set_learning_rate(state, config)
    student = next(state.student.parameters())
    with phase("encode", seconds):
        x0 = [state.system.encode_video(s.teacher.to(student.device)).to(student.dtype) for s in shards]
    with phase("update", seconds):
        metrics = regress(state, config, shards, x0, [s.prompts for s in shards], ranks)
    state.step += 1
    return ranks.mean(metrics | seconds)


def rejection_step(
    state: TrainState, config: TrainConfig, shards: list[Shard], ranks: Ranks = Ranks()
) -> dict[str, float]:
    """One iteration of fine-tuning on the best rollout of every prompt."""
    seconds: dict[str, float] = {}
    learning_student = set_learning_rate(state, config)
    x0, scores, metrics = on_policy(state, config, shards, ranks, seconds)
    metrics["reward"] = torch.cat(scores).mean().item()
    if learning_student:
        k = config.rollouts_per_prompt
        with phase("update", seconds):
            best = [own.view(-1, k).argmax(1) + k * torch.arange(len(own) // k, device=own.device) for own in scores]
            chosen = [x[b.to(x.device)] for x, b in zip(x0, best)]
            metrics |= regress(state, config, shards, chosen, [s.prompts[::k] for s in shards], ranks)
    state.step += 1
    return ranks.mean(metrics | seconds)


def regress(state, config, shards, x0: list[Tensor], prompts: list[list[str]], ranks: Ranks) -> dict[str, float]:
    """One step of the student on mean |v_theta - (eps - x0)|^2 of the given latents, clean history from them too."""
    rng = lambda s: generator(config.seed, state.step, "update", s.index)
    ones = lambda x: torch.ones(len(x), device=x.device)
    parts = [(x, ones(x), words, rng(s)) for s, x, words in zip(shards, x0, prompts)]
    metrics = student_update(state, config, parts, ranks)
    return {key: metrics[key] for key in ("loss", "grad_norm")}


def gan_step(state: TrainState, config: TrainConfig, shards: list[Shard], ranks: Ranks = Ranks()) -> dict[str, float]:
    """One iteration of "gan" or "dmd": `disc_steps` updates of the discriminator, one of the student."""
    seconds: dict[str, float] = {}
    learning_student = set_learning_rate(state, config)
    rng = lambda purpose, shard=0: generator(config.seed, state.step, purpose, shard)
    exit_step = 1 + int(torch.randint(len(config.steps), (), generator=rng("exit")))
    with phase("rollout", seconds), torch.set_grad_enabled(learning_student):
        x0 = [differentiable_rollout(state, config, s.prompts, rng("rollout", s.index), exit_step) for s in shards]
    with phase("decode", seconds), torch.set_grad_enabled(learning_student):
        pixels = [state.system.decode(x) for x in x0]
    home = next(state.discriminator.parameters()).device
    videos = [deliver(p.detach(), config.codec_crf).to(home) for p in pixels]
    teacher = [s.teacher.to(home) for s in shards]
    diffuse = diffused if config.method == "dmd" else lambda a, b, generator: (a, b)
    with phase("discriminator", seconds):
        noises = [rng("discriminator", s.index) for s in shards]
        for _ in range(config.disc_steps):
            pairs = [
                (*diffuse(real, own, noise), s.prompts, noise)
                for s, real, own, noise in zip(shards, teacher, videos, noises)
            ]
            metrics = discriminator_update(state, config, pairs, ranks)
    if learning_student:
        with phase("update", seconds):
            state.optimizer.zero_grad()
            rows = []
            for s, real, own, drawn in zip(shards, teacher, videos, pixels):
                leaf = own.clone().requires_grad_()
                loss, reward = generator_loss(state, config, *diffuse(real, leaf, rng("diffuse", s.index)), s.prompts)
                (gradient,) = torch.autograd.grad(loss / (len(shards) * ranks.world), leaf)
                drawn.backward(gradient.to(drawn))
                rows.append({"loss": loss.item(), "reward": reward.mean().item()})
            metrics |= average_rows(rows) | {"grad_norm": optimise(state, config, ranks)}
    state.step += 1
    return ranks.mean(metrics | seconds)


def differentiable_rollout(state: TrainState, config: TrainConfig, prompts: list[str], rng, steps: int) -> Tensor:
    """Latents [b, C, F, H, W] of the student after `steps` of its denoising steps, with the graph of the last one."""
    system, student = state.system, state.student
    noise = torch.randn(len(prompts), *system.shape, generator=rng).to(next(student.parameters()))
    if noise.is_cuda:
        rng = torch.Generator(noise.device).manual_seed(rng.initial_seed())
    sampler = rollout_config(config, system.chunk)
    sampler = replace(sampler, steps=sampler.steps[:steps])
    text = student.encode_text(system.encode(prompts))
    return rollout(student, text, noise, sampler, generator=rng, grad_last_step=torch.is_grad_enabled())


def generator_loss(state, config, teacher: Tensor, student: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """What the student minimises on videos [b, 3, F, H, W]: the discriminator's loss with the sides exchanged; and D(student) [b]."""
    with torch.no_grad():
        of_teacher = state.discriminator.score(teacher, prompts)
    of_student = state.discriminator.score(student, prompts)
    if config.disc_loss == "gan":  # non-saturating: softplus(-D(student))
        return torch.nn.functional.softplus(-of_student).mean(), of_student.detach()
    return bt_loss(of_student, of_teacher), of_student.detach()


def diffused(teacher: Tensor, student: Tensor, rng) -> tuple[Tensor, Tensor]:
    """Both videos [b, 3, F, H, W] at a random noise level of their own for each pair, in [0, 1] pixels' units (unclipped)."""
    t = torch.rand((len(teacher), 1, 1, 1, 1), generator=rng).to(teacher.device)
    draw = lambda x: torch.randn(x.shape, generator=rng).to(x.device)
    noised = lambda x: ((1 - t) * (x * 2 - 1) + t * draw(x) + 1) / 2
    return noised(teacher), noised(student)


STEPS = {"afd": train_step, "sft": sft_step, "rejection": rejection_step, "gan": gan_step, "dmd": gan_step}

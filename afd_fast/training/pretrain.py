"""The base student of the embedded task: a few-step student of the *wrong* world.

1. `pretrain_flow`: rectified-flow training with teacher forcing on clips with weak gravity and dead bounces.
2. `distill`: Self-Forcing's DMD (`model/dmd.py`) from that flow, run on its own rollouts, into 4 steps.
"""

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from afd_fast.models.toy import ToyConfig, ToyStudent, encode_video, tokenize
from afd_fast.reference.flow import forward_noise, x0_from_velocity
from afd_fast.rollout import RolloutConfig, rollout
from afd_fast.teachers.physics import all_prompts, sample_clips

WRONG_GRAVITY, WRONG_BOUNCINESS = (0.3, 3.3), (0.0, 1.1)  # the truth is 3.0 and 1
Report = Callable[[str, int, int, float], None]  # phase, step, of, loss


def _ema(average: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    with torch.no_grad():
        for a, b in zip(average.parameters(), model.parameters()):
            a.lerp_(b, 1 - decay)


def _per_frame(t: torch.Tensor, chunk: int) -> torch.Tensor:
    """[B, K] in 0..1 -> [B, F]."""
    return t.repeat_interleave(chunk, 1)


def wrong_world_clips(count: int, seed: int = 0) -> tuple[torch.Tensor, list[str]]:
    """uint8 clips [count, 3, F, H, W] of the wrong world and their prompts."""
    rng = np.random.default_rng(seed)
    prompts = [all_prompts()[i] for i in rng.integers(0, len(all_prompts()), count)]
    return sample_clips(prompts, rng, WRONG_GRAVITY, WRONG_BOUNCINESS), prompts


def pretrain_flow(steps: int, *, seed: int = 0, clips: int = 16000, batch: int = 64, lr: float = 2e-3, report: Report) -> ToyStudent:
    """A many-step student of the wrong world (EMA weights)."""
    torch.manual_seed(seed)
    data, prompts = wrong_world_clips(clips, seed)
    ids = tokenize(prompts)
    model = ToyStudent(ToyConfig())
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=1e-2)
    chunk = model.config.chunk
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, step / 100) * (0.5 * (1 + np.cos(np.pi * step / steps)) + 0.02)
        pick = torch.randint(0, clips, (batch,))
        x0 = encode_video(data[pick].float() / 255)
        t = _per_frame(torch.sigmoid(torch.randn(batch, model.chunks) * 1.2 + 0.3), chunk)
        x_t = forward_noise(x0, t, noise=torch.randn_like(x0), frame_dim=2)
        clean = x0 + 0.03 * torch.randn_like(x0)  # histories will be the student's own, not perfect
        v = model.forward_teacher_forcing(x_t, t * 1000, model.encode_text(ids[pick]), clean)
        sigma = t[:, None, :, None, None]
        error = x0_from_velocity(x_t, v, sigma) - x0
        loss = (error.square() / sigma.clamp(min=0.08) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        _ema(average, model, min(0.998, (1 + step) / (10 + step)))
        report("flow", step + 1, steps, loss.item())
    return average


def distill(
    flow: ToyStudent, iterations: int, config: RolloutConfig, *, seed: int = 0, batch: int = 48, lr: float = 2e-4, critic_steps: int = 3, report: Report
) -> ToyStudent:
    """A few-step student by distribution matching against `flow` on its own rollouts (EMA weights)."""
    torch.manual_seed(seed)
    generator, real, fake, average = (copy.deepcopy(flow) for _ in range(4))
    real.requires_grad_(False)
    average.requires_grad_(False)
    opt_g = torch.optim.AdamW(generator.parameters(), lr, betas=(0.0, 0.99), weight_decay=0.0)
    opt_f = torch.optim.AdamW(fake.parameters(), lr * 2, betas=(0.0, 0.99), weight_decay=0.0)
    c = flow.config
    ids = tokenize(all_prompts())
    for step in range(iterations):
        for turn in range(critic_steps + 1):
            train_generator = turn == critic_steps
            y = ids[torch.randint(0, len(ids), (batch,))]
            exit_step = int(torch.randint(1, len(config.steps) + 1, ()))
            noise = torch.randn(batch, 3, c.frames, c.height, c.width)
            with torch.set_grad_enabled(train_generator):
                text = generator.encode_text(y)
            x0 = rollout(generator, text, noise, replace(config, steps=config.steps[:exit_step]), grad_last_step=train_generator)
            clean = x0.detach()
            t = (torch.rand(batch, 1) * 0.96 + 0.02).expand(batch, c.frames)
            sigma = t[:, None, :, None, None]
            x_t = forward_noise(clean, t, noise=torch.randn_like(clean), frame_dim=2)

            def denoise(model):
                v = model.forward_teacher_forcing(x_t, t * 1000, model.encode_text(y), clean)
                return x0_from_velocity(x_t, v, sigma)

            if train_generator:
                with torch.no_grad():
                    of_real, of_fake = denoise(real), denoise(fake)
                    scale = (clean - of_real).abs().mean((1, 2, 3, 4), keepdim=True).clamp(min=1e-3)
                    target = clean - (of_fake - of_real) / scale
                loss, optimizer, model = 0.5 * F.mse_loss(x0, target), opt_g, generator
            else:
                loss = ((denoise(fake) - clean).square() / sigma.clamp(min=0.08) ** 2).mean()
                optimizer, model = opt_f, fake
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        _ema(average, generator, min(0.97, (1 + step) / (10 + step)))
        report("distill", step + 1, iterations, loss.item())
    return average

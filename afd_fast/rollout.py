"""Chunk-by-chunk generation with a KV cache: the few-step sampler of Self-Forcing
(`pipeline/causal_inference.py`): predict x0, re-noise to the next step, refresh the cache at t = 0.

Legend: B samples, C channels, F latent frames, H x W latent pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from afd_fast.reference.flow import warped_steps, x0_from_velocity


@dataclass(frozen=True)
class RolloutConfig:
    """steps: unwarped denoising steps in 0..1000; shift: 5.0 in Self-Forcing's configs (explicit on purpose,
    its demo uses 8.0); chunk: latent frames generated together; context_noise: t of the cache pass, 0..1000."""

    steps: tuple[float, ...] = (1000, 750, 500, 250)
    shift: float = 5.0
    chunk: int = 3
    context_noise: float = 0.0

    def __post_init__(self):
        if (
            not self.steps
            or any(not 0 < s <= 1000 for s in self.steps)
            or list(self.steps) != sorted(self.steps, reverse=True)
        ):
            raise ValueError(f"steps must fall from at most 1000 to above 0, got {self.steps}")


def rollout(
    model,
    text,
    noise: Tensor,
    config: RolloutConfig = RolloutConfig(),
    *,
    generator: torch.Generator | None = None,
    renoise: Tensor | None = None,
    grad_last_step: bool = False,
) -> Tensor:
    """Latents [B, C, F, H, W] from initial noise of that shape.

    model: a causal student (`model(x, t, text, cache=, start_frame=)` -> velocity); text: its `encode_text`.
    The noise added between steps comes from `generator` or, for exact comparisons, from `renoise`
    [draws, B, C, chunk, H, W] in the order drawn. grad_last_step: let the gradient through the last
    denoising call of every chunk (history detached), as distillation and GAN training need; else none.
    """
    batch, channels, frames, height, width = noise.shape
    if frames % config.chunk:
        raise ValueError(f"{frames} frames do not divide into chunks of {config.chunk}")
    times = warped_steps(config.steps, config.shift)
    cache = model.new_cache(batch, frames, height, width)
    latents, draws = [], 0
    for start in range(0, frames, config.chunk):
        x = noise[:, :, start : start + config.chunk]
        for index, time in enumerate(times):
            last = index + 1 == len(times)
            with torch.set_grad_enabled(grad_last_step and last):
                t = torch.full((batch, config.chunk), time, device=noise.device)
                v = model(x, t, text, cache=cache, start_frame=start)
                x0 = x0_from_velocity(x, v, time / 1000)
            if not last:
                if renoise is None:
                    eps = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=x0.device)
                else:
                    eps = renoise[draws]
                draws += 1
                sigma = times[index + 1] / 1000
                x = (1 - sigma) * x0 + sigma * eps
        latents.append(x0)
        if start + config.chunk < frames:  # the last chunk's cache is never read
            t = torch.full((batch, config.chunk), float(config.context_noise), device=noise.device)
            with torch.no_grad():
                model(x0.detach(), t, text, cache=cache, start_frame=start)
    return torch.cat(latents, 2)

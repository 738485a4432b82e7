"""The denoising steps of causal students on the shifted schedule: network times and noise levels, rounded as the official tables are
(Self-Forcing `utils/scheduler.py` at 33593df)."""

from typing import NamedTuple

import numpy as np
import torch

from afd_fast.reference.flow import shift_sigma


class Step(NamedTuple):
    """One denoising step: the network's t in 0..1000, and the noise level sigma in [0, 1]."""

    t: float
    sigma: float


def step_table(steps: tuple[float, ...], shift: float, warp: bool = True) -> list[Step]:
    """Every step on the shifted schedule, both rounded to float32 as in the official table (1000 sigmas; steps are looked
    up by their integer part). Without warp, t is the step and sigma that of the table's nearest time."""
    sigmas = shift_sigma(torch.linspace(1, 0, 1001, dtype=torch.float32)[:-1], shift)
    times = sigmas * 1000
    if not warp:
        nearest = [int((times.double() - step).abs().argmin()) for step in steps]
        return [Step(float(step), float(sigmas[i])) for step, i in zip(steps, nearest)]
    rows = [1000 - int(s) for s in steps]
    return [Step(float(times[i]), float(sigmas[i])) if i < 1000 else Step(0.0, 0.0) for i in rows]


def renoise_weights(sigma: float, level: float) -> tuple[float, float]:
    """Of latents that have the noise level `level` < sigma, and of the fresh noise that takes them to sigma, so that the clean part and the
    noise's variance are those of sigma; float32 as in the official schedules (FastVideo `calculate_alpha_beta_high`)."""
    kept = np.float32(1 - sigma) / np.float32(1 - level)
    fresh = np.sqrt(np.float32(sigma) ** 2 - (kept * np.float32(level)) ** 2)
    return float(kept), float(fresh)


def unipc_table(steps: int, shift: float) -> list[Step]:
    """The steps of `unipc`: sigmas evenly from 0.999 towards 0 and shifted, t their whole thousandths (Wan2.1
    `wan/utils/fm_solvers_unipc.py`, `set_timesteps`)."""
    even = torch.from_numpy(np.linspace(float(np.float32(0.999)), 0, steps + 1)[:-1])
    return [Step(float(int(s * 1000)), float(np.float32(s))) for s in shift_sigma(even, shift).tolist()]

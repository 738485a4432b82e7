"""The judge of the embedded task: it measures pixels and never asks the discriminator.

Legend: N clips, F frames, H x W pixels. Lengths are box sides (0..1, y up) unless a name says px.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from afd_fast.teachers.physics import BACKGROUND, BOUNCES, COLORS, FPS, GRAVITY, LEAST_FRAMES, LOOKS, Scene, parse


class Track(NamedTuple):
    """A ball in every frame of N clips: centre [N, F, 2] and spread (rms radius) [N, F]."""

    centres: np.ndarray
    spread: np.ndarray


def by_day(clips: np.ndarray, prompts: list[str]) -> np.ndarray:
    """Clips [N, 3, F, H, W] without the look that the prompts ask for, as the measurements below expect them.

    Raises ValueError unless all prompts ask for one look.
    """
    looks = {parse(p).look for p in prompts}
    if len(looks) != 1:
        raise ValueError(f"the prompts ask for the looks {sorted(looks)}, expected one: judge each look by itself")
    look = looks.pop()
    if look == "day":
        return clips
    dark = LOOKS[look]
    return (BACKGROUND + (clips - dark) * (1 - BACKGROUND) / (1 - dark)).clip(0, 1)


def track(clips: np.ndarray) -> Track:
    """The ball's track in clips [N, 3, F, H, W] with values in [0, 1]."""
    bright = clips.max(1) - BACKGROUND  # [N, F, H, W]
    return moments(np.where(bright > 0.12, bright, 0))


def moments(mass: np.ndarray) -> Track:
    """Centre and spread of the mass [..., H, W] of one body, with these leading axes."""
    height, width = mass.shape[-2:]
    total = mass.sum((-1, -2)) + 1e-6
    yy, xx = np.mgrid[0:height, 0:width]
    cx, cy = (mass * xx).sum((-1, -2)) / total, (mass * yy).sum((-1, -2)) / total
    square = (xx - cx[..., None, None]) ** 2 + (yy - cy[..., None, None]) ** 2
    spread = np.sqrt((mass * square).sum((-1, -2)) / total) / width
    return Track(np.stack([(cx + 0.5) / width, 1 - (cy + 0.5) / height], -1), spread)


def _heights(
    y0: ArrayLike, v0: ArrayLike, radius: float, elasticity: float, frames: int, substeps: int = 40
) -> np.ndarray:
    """Heights of balls that start at (y0, v0) under the true gravity: broadcast shape + [F]."""
    y, v = (a.copy() for a in np.broadcast_arrays(y0, v0))
    out = np.empty(y.shape + (frames,))
    dt = 1 / FPS / substeps
    for frame in range(frames):
        out[..., frame] = y
        for _ in range(substeps):
            v = v - GRAVITY * dt
            y = y + v * dt
            v = np.where((y < radius) & (v < 0), -elasticity * v, v)
            y = np.maximum(y, radius)
    return out


@cache
def _bank(radius: float, elasticity: float, frames: int) -> np.ndarray:
    """All physical height tracks on a fine grid of starts: [tracks, F]."""
    y0, v0 = np.linspace(0.05, 1.0, 96)[:, None], np.linspace(-1.0, 2.6, 73)[None]
    return _heights(y0, v0, radius, elasticity, frames).reshape(-1, frames)


def physics_residual(clips: np.ndarray, prompts: list[str]) -> np.ndarray:
    """[N] px: rms distance of a clip's height track to the nearest track that the true gravity and the
    prompt's bounce allow, over all starts. clips: as delivered, with the look that their prompts ask for."""
    return residual(by_day(clips, prompts), [parse(p) for p in prompts])


def residual(clips: np.ndarray, scenes: list[Scene]) -> np.ndarray:
    """`physics_residual` of clips by day."""
    heights = track(clips).centres[..., 1]  # [N, F]
    out = np.empty(len(clips))
    for i, (scene, y) in enumerate(zip(scenes, heights)):
        bank = _bank(scene.radius, scene.elasticity, y.shape[0])
        out[i] = np.sqrt(((y - bank) ** 2).mean(-1).min()) * clips.shape[-2]
    return out


def measured_gravity(heights: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """[N] box sides / s^2: median second difference over the frames of free flight; NaN where there are < 2."""
    accel = (heights[:, 2:] - 2 * heights[:, 1:-1] + heights[:, :-2]) * FPS**2
    window = np.stack([heights[:, 2:], heights[:, 1:-1], heights[:, :-2]])
    free = (window.min(0) - radius[:, None] > 0.15) & (window.max(0) + radius[:, None] < 0.985)
    out = np.full(len(heights), np.nan)
    for i in np.flatnonzero(free.sum(1) >= 2):
        out[i] = -np.median(accel[i][free[i]])
    return out


def measured_bounce(heights: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """[N] elasticity sqrt(rebound height / fall height); NaN where the clip does not show both."""
    out = np.full(len(heights), np.nan)
    for i, (y, r) in enumerate(zip(heights, radius)):
        low = y.argmin()
        if 2 <= low <= len(y) - 4 and y[low] - r < 0.12:
            fall, rebound = y[:low].max() - r, y[low:].max() - r
            out[i] = np.sqrt(max(rebound, 0) / max(fall, 1e-3))
    return out


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance between the Gaussians fitted to the feature rows a and b."""
    mean = a.mean(0) - b.mean(0)
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(mean @ mean + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def flicker(clips: np.ndarray) -> np.floating:
    """Mean absolute change of background pixels between frames, percent, of clips [N, 3, F, H, W] in [0, 1]."""
    bright = clips.max(1)  # [N, F, H, W]
    still = (bright[:, 1:] < BACKGROUND + 0.25) & (bright[:, :-1] < BACKGROUND + 0.25)
    return 100 * abs(np.diff(clips, axis=2)).mean(1)[still].mean()


def _features(centres: np.ndarray) -> np.ndarray:
    x, y = centres[..., 0], centres[..., 1]
    return np.concatenate([y, np.diff(y, axis=1) * 3, x], 1)


def evaluate(clips: np.ndarray, prompts: list[str], reference: np.ndarray) -> dict[str, float]:
    """Scores of clips [N, 3, F, H, W] in [0, 1] for their prompts; `reference`: teacher clips of the same prompts.

    physics: residual_px, gravity, gravity_error (relative), bounce_high / bounce_low (elasticity), frechet,
    dynamic_px (motion per frame). general: mean of color, size, shape, motion (shares of clips or frames
    that match the prompt). flicker: mean absolute change of background pixels between frames, percent. background: its
    brightness, the only score measured in the look as delivered; the prompts and the reference share one look.
    """
    clips = np.asarray(clips, dtype=np.float64).clip(0, 1)
    background = np.median(clips.max(1).reshape(len(clips), -1), 1).mean()
    clips, reference = by_day(clips, prompts), by_day(np.asarray(reference, dtype=np.float64), prompts)
    scenes = [parse(p) for p in prompts]
    radius = np.array([s.radius for s in scenes])
    width = clips.shape[-1]
    centres, spread = track(clips)
    heights = centres[..., 1]
    gravity, bounce = measured_gravity(heights, radius), measured_bounce(heights, radius)
    out = {
        "residual_px": residual(clips, scenes).mean(),
        "frechet": frechet(_features(centres), _features(track(reference).centres)),
        "gravity": np.nanmedian(gravity),
        "gravity_error": np.nanmean(abs(gravity.clip(-2, 8) - GRAVITY)) / GRAVITY,
    }
    for word in BOUNCES:
        with_word = bounce[[s.bounce == word for s in scenes]]
        out[f"bounce_{word}"] = np.nanmedian(with_word) if np.isfinite(with_word).any() else np.nan
    out["dynamic_px"] = np.abs(np.diff(centres, axis=1)).sum(-1).mean() * width

    bright = clips.max(1)  # [N, F, H, W]
    body = np.where(bright - BACKGROUND > 0.35, bright - BACKGROUND, 0)[:, None]
    mean_color = (clips * body).sum((-1, -2)) / (body.sum((-1, -2)) + 1e-6)  # [N, 3, F]
    palette = np.array(list(COLORS.values()))
    nearest = ((mean_color[..., None] - palette.T[None, :, None]) ** 2).sum(1).argmin(-1)  # [N, F]
    wanted = np.array([list(COLORS).index(s.color) for s in scenes])
    out["color"] = (nearest == wanted[:, None]).mean()
    peak = palette.max(1)[wanted][:, None, None, None] - BACKGROUND
    area = ((bright - BACKGROUND) / peak > 0.5).sum((-1, -2))  # [N, F] px
    out["size"] = (abs(area / (np.pi * (radius * width) ** 2)[:, None] - 1) < 0.35).mean()
    out["shape"] = (abs(spread / (radius[:, None] / np.sqrt(2)) - 1) < 0.3).mean()
    dx = centres[:, LEAST_FRAMES - 1, 0] - centres[:, 0, 0]
    limits = {"thrown left": (-1, -0.06), "thrown right": (0.06, 1), "dropped": (-0.1, 0.1), "tossed up": (-0.1, 0.1)}
    out["motion"] = np.mean([limits[s.motion][0] < d < limits[s.motion][1] for s, d in zip(scenes, dx)])
    out["general"] = np.mean([out[k] for k in ("color", "size", "shape", "motion")])

    out["flicker"] = flicker(clips)
    out["background"] = background
    return {k: float(v) for k, v in out.items()}

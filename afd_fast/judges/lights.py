"""The judge of the two lights: it measures pixels and never asks the discriminator.

Every light has a colour channel of its own, in which it is measured whatever the other one does. Both walls and both axes bounce
alike, so all physical motions of an axis are one bank of tracks, and a clip's residual is the distance to the best of them: over all
starts, and over all winds, one for both lights of a clip.

Legend: N clips, F frames, H x W pixels. Lengths are box sides (0..1, y up) unless a name says px. Axis 1 of tracks: the two lights.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

from afd_fast.judges.physics import flicker, frechet, measured_gravity, moments
from afd_fast.teachers.lights import CHANNELS, RADIUS, WIND, flight, parse
from afd_fast.teachers.physics import BACKGROUND, BOUNCES, FPS, GRAVITY, LEAST_FRAMES

WINDS = np.linspace(-WIND, WIND, 17)
DARK = 0.12  # what is less bright than this above the background is not a light's
NEAR = 0.12  # of the floor, box sides: a light that turns there has bounced
MOTION = {"thrown left": (-1, -0.06), "thrown right": (0.06, 1), "dropped": (-0.13, 0.13), "tossed up": (-0.13, 0.13)}


class Tracks(NamedTuple):
    """The lights of N clips, in every frame: centres [N, 2, F, 2], spread (rms radius) [N, 2, F], light (sum of the brightness) and
    area (of the pixels brighter than half) in units of a disc's [N, 2, F], edge (number of half-lit pixels) in units of its outline [N, 2, F],
    and stray, the brightest pixel of the third channel [N, F]."""

    centres: np.ndarray
    spread: np.ndarray
    light: np.ndarray
    area: np.ndarray
    edge: np.ndarray
    stray: np.ndarray


class Fit(NamedTuple):
    """The physical motion that comes closest to each clip: tracks [N, 2, F, 2], wind [N], and its distance, rms over frames and
    lights [N]."""

    tracks: np.ndarray
    wind: np.ndarray
    distance: np.ndarray


def track(clips: np.ndarray) -> Tracks:
    """The lights in clips [N, 3, F, H, W] with values in [0, 1]."""
    width = clips.shape[-1]
    bright = (clips[:, CHANNELS] - BACKGROUND) / (1 - BACKGROUND)  # [N, 2, F, H, W]
    mass = np.where(bright > DARK, bright, 0)
    disc = np.pi * (RADIUS * width) ** 2
    return Tracks(
        *moments(mass),
        (mass.sum((-1, -2)) + 1e-6) / disc,
        (bright > 0.5).sum((-1, -2)) / disc,
        ((bright > 0.25) & (bright < 0.75)).sum((-1, -2)) / (2 * np.pi * RADIUS * width),
        (clips[:, 3 - sum(CHANNELS)] - BACKGROUND).max((-1, -2)) / (1 - BACKGROUND),
    )


@cache
def _bank_y(elasticity: float, frames: int) -> np.ndarray:
    """All heights under the true gravity on a fine grid of starts: [tracks, F], float32."""
    y, v = np.linspace(RADIUS, 1 - RADIUS, 75)[:, None], np.linspace(-2.0, 2.6, 93)[None]
    return flight(y, v, -GRAVITY, elasticity, frames).reshape(-1, frames).astype(np.float32)


@cache
def _bank_x(elasticity: float, frames: int) -> np.ndarray:
    """All sideways motions for each of WINDS: [winds, tracks, F], float32."""
    wind = WINDS[:, None, None]
    x, v = np.linspace(RADIUS, 1 - RADIUS, 75)[None, :, None], np.linspace(-1.5, 1.5, 61)[None, None]
    return flight(x, v, wind, elasticity, frames).reshape(len(WINDS), -1, frames).astype(np.float32)


def _nearest(tracks: np.ndarray, bank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For tracks [M, F] the index of the nearest in a bank [tracks, F], and its squared distance summed over the frames [M]."""
    square = (bank**2).sum(1) - 2 * tracks.astype(np.float32) @ bank.T
    index = square.argmin(1)
    return index, ((tracks - bank[index]) ** 2).sum(1)


def fit(centres: np.ndarray, elasticity: np.ndarray) -> Fit:
    """The best physical motion for centres [N, 2, F, 2] of lights whose bounces keep elasticity [N]."""
    count, _, frames, _ = centres.shape
    tracks, wind, square = np.empty(centres.shape), np.empty(count), np.empty(count)
    for e in np.unique(elasticity):
        of = np.flatnonzero(elasticity == e)
        x, y = np.moveaxis(centres[of].reshape(-1, frames, 2), -1, 0)  # [2 M, F]: light by light of every clip
        index, vertical = _nearest(y, bank := _bank_y(e, frames))
        tracks[of, ..., 1] = bank[index].reshape(-1, 2, frames)
        found = [_nearest(x, bank) for bank in _bank_x(e, frames)]  # for every wind
        sideways = np.stack([s.reshape(-1, 2).sum(1) for _, s in found])  # [winds, M], both lights under one wind
        best = sideways.argmin(0)
        wind[of] = WINDS[best]
        square[of] = sideways.min(0) + vertical.reshape(-1, 2).sum(1)
        for row, number in enumerate(best):
            tracks[of[row], ..., 0] = _bank_x(e, frames)[number][found[number][0].reshape(-1, 2)[row]]
    return Fit(tracks, wind, np.sqrt(square / (2 * frames)))


def _elasticity(prompts: list[str]) -> np.ndarray:
    return np.array([parse(p).elasticity for p in prompts])


def residual(clips: np.ndarray, prompts: list[str]) -> np.ndarray:
    """[N] px: rms distance of a clip's lights to the nearest motion that the true gravity, the prompt's bounce and one wind for
    both lights allow, over all starts and winds. clips [N, 3, F, H, W] in [0, 1]."""
    return fit(track(clips).centres, _elasticity(prompts)).distance * clips.shape[-1]


def energy(tracks: np.ndarray) -> np.ndarray:
    """Kinetic and potential energy per mass of lights whose centres are [..., F, 2], from differences of the frames before and
    after: [..., F - 2]."""
    velocity = (tracks[..., 2:, :] - tracks[..., :-2, :]) * FPS / 2
    return (velocity**2).sum(-1) / 2 + GRAVITY * tracks[..., 1:-1, 1]


def diversity(centres: np.ndarray, prompts: list[str]) -> float:
    """Mean distance, rms over frames and lights, between two clips of one prompt; nan where no prompt has two."""
    found = []
    for prompt in dict.fromkeys(prompts):
        group = centres[[p == prompt for p in prompts]]
        square = ((group[:, None] - group[None]) ** 2).sum(-1).mean((-1, -2))  # [n, n]
        found += list(np.sqrt(square[np.triu_indices(len(group), 1)]))
    return float(np.mean(found)) if found else float("nan")


def _of_finite(function: Callable[[np.ndarray], np.floating], values: np.ndarray) -> float:
    """A function of the values that could be measured; nan where none could."""
    found = values[np.isfinite(values)]
    return float(function(found)) if len(found) else float("nan")


def first_bounce(heights: np.ndarray) -> np.ndarray:
    """[M] elasticity sqrt(rebound height / fall height) of the first bounce of tracks [M, F], later ones being lower and at last
    rest; NaN where a track does not show it."""
    out = np.full(len(heights), np.nan)
    for i, y in enumerate(heights - RADIUS):
        rises, low = np.diff(y) > 0, y < NEAR
        turns = 1 + np.flatnonzero(~rises[:-1] & rises[1:] & low[1:-1])  # frames before and after which it is higher
        found = [k for k in turns if 2 <= k < len(y) - 4 and y[:k].max() > 0.2]
        if found:
            k = found[0]
            end = next((j for j in turns if j > k + 1), len(y))
            out[i] = np.sqrt(y[k:end].max().clip(0) / y[:k].max())
    return out


def _features(centres: np.ndarray) -> np.ndarray:
    x, y = np.moveaxis(centres, -1, 0)
    return np.concatenate([y, np.diff(y, axis=2) * 3, x], 2).reshape(len(centres), -1)


def evaluate(clips: np.ndarray, prompts: list[str], reference: np.ndarray) -> dict[str, float]:
    """Scores of clips [N, 3, F, H, W] in [0, 1] for their prompts; `reference`: teacher clips of the same prompts, all of them
    equally often.

    physics: residual_px, energy_error (mean distance of the energy from the best motion's, over the energy of a fall through the
    box), gravity, gravity_error (relative), bounce_high / bounce_low (elasticity), frechet. life: dynamic_px (motion of a light per
    frame), diversity_px (`diversity`). general: mean of color, size, light, shape, sharp (shares of the lights and frames) and motion
    (share of the motions that the prompts name). flicker: mean absolute change of background pixels between frames, percent.
    """
    clips = np.asarray(clips, dtype=np.float64).clip(0, 1)
    width = clips.shape[-1]
    scenes = [parse(p) for p in prompts]
    found, bounces = track(clips), _elasticity(prompts)
    centres = found.centres
    best = fit(centres, bounces)
    heights, radius = centres[..., 1].reshape(-1, centres.shape[2]), np.full(2 * len(clips), RADIUS)  # light by light
    gravity, bounce = measured_gravity(heights, radius), first_bounce(heights)
    out = {
        "residual_px": (best.distance * width).mean(),
        "energy_error": abs(energy(centres) - energy(best.tracks)).mean() / GRAVITY,
        "frechet": frechet(_features(centres), _features(track(np.asarray(reference, np.float64)).centres)),
        "gravity": _of_finite(np.median, gravity),
        "gravity_error": _of_finite(np.mean, abs(gravity.clip(-2, 8) - GRAVITY)) / GRAVITY,
    }
    for word, e in BOUNCES.items():
        out[f"bounce_{word}"] = _of_finite(np.median, bounce[np.repeat(bounces == e, 2)])
    out["dynamic_px"] = np.abs(np.diff(centres, axis=2)).sum(-1).mean() * width
    out["diversity_px"] = diversity(centres, prompts) * width
    lit = found.light > 0.25
    out["color"] = (lit & (found.stray < 0.25)[:, None]).mean()
    out["size"] = (abs(found.area - 1) < 0.35).mean()
    out["light"] = (abs(found.light - 1) < 0.3).mean()
    out["shape"] = (abs(found.spread / (RADIUS / np.sqrt(2)) - 1) < 0.3).mean()
    out["sharp"] = (lit & (found.edge < 1.5)).mean()
    dx = centres[:, :, LEAST_FRAMES - 1, 0] - centres[:, :, 0, 0]  # [N, 2]
    asked = [(MOTION[m], d) for scene, moved in zip(scenes, dx) for m, d in zip(scene.motions, moved) if m]
    out["motion"] = np.mean([low < d < high for (low, high), d in asked])
    out["general"] = np.mean([out[k] for k in ("color", "size", "light", "shape", "sharp", "motion")])
    out["flicker"] = flicker(clips)
    return {k: float(v) for k, v in out.items()}

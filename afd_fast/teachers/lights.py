"""The second embedded teacher: two lights bounce in a box, and a wind that the prompt does not mention pushes both sideways.

A prompt leaves open where both lights start, what the second one does and the wind, which shows only over time. Lights pass
through each other and each has a colour channel of its own, so a judge can measure both in every frame. Their motion is separable,
x under the wind and y under gravity, both with bounces: `flight` is exact.

Units: lengths in box sides (0..1, y up), time in seconds. Legend: N clips, F frames, H x W pixels; axis 2 of tracks: the two lights.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from afd_fast.teachers.physics import (
    BACKGROUND,
    BOUNCES,
    FPS,
    GRAVITY,
    MOTIONS,
    Range,
    clip_rng,
    coverage,
    initial_state,
    shuffled_split,
)
from afd_fast.teachers.teacher import PromptSplit, TeacherBase

FRAMES, SIZE = 18, 24
RADIUS = 0.16
WIND = 1.0  # its acceleration is uniform in +-WIND box sides / s^2, drawn for each clip
CHANNELS = (0, 2)  # of the first light, red, and the second, blue
SECOND = {
    "": None,
    " falling": "dropped",
    " westward": "thrown left",
    " eastward": "thrown right",
    " rising": "tossed up",
}
# the second light's motions have words of their own: the small student and discriminator read a prompt as a bag of words
GRAMMAR = re.compile(
    rf"a red light ({'|'.join(MOTIONS)}) and a blue light({'|'.join(SECOND)}), ({'|'.join(BOUNCES)}) bounce"
)


@dataclass(frozen=True)
class Scene:
    """The contents of a prompt. motions: of the first light, and of the second or None where the prompt leaves it open."""

    motions: tuple[str, str | None]
    bounce: str

    @property
    def elasticity(self) -> float:
        return BOUNCES[self.bounce]


def parse(prompt: str) -> Scene:
    """Read a prompt. Raises ValueError that shows the grammar for a prompt outside it."""
    match = GRAMMAR.fullmatch(prompt)
    if not match:
        raise ValueError(
            f"the lights teacher cannot render {prompt!r}; write it as "
            '"a red light {dropped|thrown left|thrown right|tossed up} and a blue light'
            '[ falling| westward| eastward| rising], {low|high} bounce"'
        )
    first, second, bounce = match.groups()
    return Scene((first, SECOND[second]), bounce)


def all_prompts() -> list[str]:
    """The 40 prompts of the world."""
    return [
        f"a red light {motion} and a blue light{second}, {bounce} bounce"
        for motion, second, bounce in itertools.product(MOTIONS, SECOND, BOUNCES)
    ]


def split_prompts(held_out: int = 8) -> PromptSplit:
    """Training and held-out prompts; the split is the same for every seed, so that runs can be compared."""
    return shuffled_split(all_prompts(), held_out)


def flight(
    x: ArrayLike, v: ArrayLike, acceleration: ArrayLike, elasticity: ArrayLike, frames: int, substeps: int = 5
) -> np.ndarray:
    """Positions of a light's centre along one axis: broadcast shape + [F]. It starts at x with velocity v under a constant
    acceleration and bounces off both walls of the box, which leaves `elasticity` of its speed.

    Free flight and the moment of a bounce are exact for at most one bounce in a substep; a light that cannot leave a wall rests.
    """
    x, v, a, e = (q.astype(np.float64) for q in np.broadcast_arrays(x, v, acceleration, elasticity))
    dt, out = 1 / FPS / substeps, np.empty((*x.shape, frames))
    for frame in range(frames):
        out[..., frame] = x
        for _ in range(substeps):
            x, v = x + v * dt + a * dt**2 / 2, v + a * dt
            for wall, sign in ((RADIUS, 1), (1 - RADIUS, -1)):  # sign: of the way back into the box
                x, v = _bounced(x, v, a, e, wall, sign, dt)
    return out


def _bounced(
    x: np.ndarray, v: np.ndarray, a: np.ndarray, e: np.ndarray, wall: float, sign: int, dt: float
) -> tuple[np.ndarray, np.ndarray]:
    """(x, v) where they should be for the lights that the last `dt` carried through the wall; others as they are."""
    depth, speed, pull = sign * (x - wall), sign * v, sign * a
    hit = depth < 0
    at_wall = -np.sqrt((speed**2 - 2 * pull * depth).clip(0))  # by energy
    since = np.where(hit, 2 * depth / np.minimum(speed + at_wall, -1e-12), 0).clip(0, dt)  # time, by the mean speed
    back = -e * at_wall
    inside, onward = back * since + pull * since**2 / 2, back + pull * since
    rests = inside <= 0
    onward = np.where(rests, onward.clip(0), onward)
    return np.where(hit, wall + sign * inside.clip(0), x), np.where(hit, sign * onward, v)


def sample_tracks(
    scenes: Sequence[Scene],
    rng: np.random.Generator,
    gravity: Range | None = None,
    elasticity: Mapping[str, Range] | None = None,
    frames: int = FRAMES,
) -> np.ndarray:
    """Centres [N, 2, F, 2] (x, y) of the lights of N clips.

    gravity: the range to draw from; elasticity: the range for each bounce word. None is the true world.
    """
    starts = np.empty((len(scenes), 2, 4))
    wind, pull, kept = (np.empty((len(scenes), 1)) for _ in range(3))
    for i, scene in enumerate(scenes):
        for light, motion in enumerate(scene.motions):
            starts[i, light] = initial_state(motion or MOTIONS[rng.integers(len(MOTIONS))], RADIUS, rng)
        wind[i] = rng.uniform(-WIND, WIND)
        pull[i] = GRAVITY if gravity is None else rng.uniform(*gravity)
        kept[i] = scene.elasticity if elasticity is None else rng.uniform(*elasticity[scene.bounce])
    x, y, vx, vy = np.moveaxis(starts, -1, 0)
    x, y = (q.clip(RADIUS, 1 - RADIUS) for q in (x, y))
    return np.stack([flight(x, vx, wind, kept, frames), flight(y, vy, -pull, kept, frames)], -1)


def render(centres: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Two antialiased discs, each in its colour channel: centres [2, F, 2] -> uint8 [3, F, H, W]."""
    image = np.full((3, centres.shape[1], size, size), BACKGROUND)
    for channel, track in zip(CHANNELS, centres):
        image[channel] = BACKGROUND + coverage(track, RADIUS, size) * (1 - BACKGROUND)
    return (image * 255 + 0.5).astype(np.uint8)


def sample_clips(
    prompts: Sequence[str],
    rng: np.random.Generator,
    gravity: Range | None = None,
    elasticity: Mapping[str, Range] | None = None,
    frames: int = FRAMES,
) -> Tensor:
    """One clip per prompt -> uint8 [N, 3, F, H, W]; gravity and elasticity as of `sample_tracks`."""
    tracks = sample_tracks([parse(prompt) for prompt in prompts], rng, gravity, elasticity, frames)
    return torch.from_numpy(np.stack([render(of_clip) for of_clip in tracks]))


class LightsTeacher(TeacherBase):
    """Prompt and seed -> floats [3, F, H, W] in [0, 1]. A longer clip starts with the frames of a shorter one."""

    fps = float(FPS)
    judge = "lights"

    def __init__(self, frames: int = FRAMES):
        self.frames = frames
        # part of the cache key: change it with anything that changes a pixel
        self.name = "lights-1" if frames == FRAMES else f"lights-1-{frames}"

    def __call__(self, prompt: str, seed: int) -> Tensor:
        return sample_clips([prompt], clip_rng(prompt, seed), frames=self.frames)[0].float() / 255

    def split(self) -> PromptSplit:
        return split_prompts()

"""The embedded teacher: a bouncing ball in a box (pymunk rigid bodies) rendered to a small RGB clip.

Only finished clips leave `PhysicsTeacher`: prompt and seed in, pixels out. `sample_clips` with other
physics makes the wrong world the base student is pretrained on.

Units: lengths in box sides (0..1, y up), time in seconds. Legend: C channels, F frames, H x W pixels.
"""

import itertools
import re
from dataclasses import dataclass

import numpy as np
import pymunk
import torch
from torch import Tensor

FRAMES, SIZE, FPS = 12, 16, 10
GRAVITY = 3.0  # box sides / s^2; the true world
BACKGROUND = 0.06
COLORS = {
    "red": (1.0, 0.15, 0.15), "green": (0.15, 0.9, 0.2), "blue": (0.2, 0.35, 1.0),
    "yellow": (1.0, 0.9, 0.1), "purple": (0.75, 0.2, 0.9), "white": (1.0, 1.0, 1.0),
    "cyan": (0.1, 0.9, 0.95), "orange": (1.0, 0.5, 0.1),
}  # fmt: skip
RADII = {"small": 0.11, "large": 0.16}
BOUNCES = {"low": 0.6, "high": 0.8}  # elasticity in the true world
LOOKS = {"day": BACKGROUND, "dusk": 0.15}  # brightness of the background; the range above it shrinks with it
MOTIONS = ("dropped", "thrown left", "thrown right", "tossed up")
GRAMMAR = re.compile(
    rf"a ({'|'.join(RADII)}) ({'|'.join(COLORS)}) ball ({'|'.join(MOTIONS)}), ({'|'.join(BOUNCES)}) bounce(?:, (dusk))?"
)


@dataclass(frozen=True)
class Scene:
    """What a prompt says."""

    size: str
    color: str
    motion: str
    bounce: str
    look: str = "day"

    @property
    def radius(self) -> float:
        return RADII[self.size]

    @property
    def elasticity(self) -> float:
        return BOUNCES[self.bounce]


def parse(prompt: str) -> Scene:
    """Read a prompt. ValueError names the grammar when the prompt is outside it."""
    match = GRAMMAR.fullmatch(prompt)
    if not match:
        raise ValueError(
            f"the physics teacher cannot render {prompt!r}; it knows "
            '"a {small|large} {color} ball {dropped|thrown left|thrown right|tossed up}, {low|high} bounce[, dusk]" '
            f"with colors {', '.join(COLORS)}"
        )
    return Scene(*match.groups(default="day"))


def all_prompts() -> list[str]:
    """The 128 prompts of the world."""
    return [
        f"a {size} {color} ball {motion}, {bounce} bounce"
        for size, color, motion, bounce in itertools.product(RADII, COLORS, MOTIONS, BOUNCES)
    ]


def split_prompts(held_out: int = 16, look: str = "day") -> tuple[list[str], list[str]]:
    """(training, held-out) prompts; the same split for every seed and look so that runs compare."""
    prompts = [p if look == "day" else f"{p}, {look}" for p in all_prompts()]
    order = np.random.default_rng(0).permutation(len(prompts))
    return [prompts[i] for i in order[held_out:]], [prompts[i] for i in order[:held_out]]


def initial_state(scene: Scene, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """(x, y, vx, vy) at the first frame."""
    if scene.motion == "tossed up":
        return (
            rng.uniform(0.2, 0.8),
            rng.uniform(0.2, 0.35) + scene.radius / 2,
            rng.uniform(-0.1, 0.1),
            rng.uniform(1.2, 1.7),
        )
    if scene.motion == "dropped":
        return rng.uniform(0.2, 0.8), rng.uniform(0.72, 0.86), rng.uniform(-0.08, 0.08), rng.uniform(-0.1, 0.1)
    x, vx = rng.uniform(0.2, 0.5), rng.uniform(0.5, 0.9)
    if scene.motion == "thrown left":
        x, vx = 1 - x, -vx
    return x, rng.uniform(0.55, 0.8), vx, rng.uniform(-0.1, 0.5)


def simulate(radius, state, gravity, elasticity, frames=FRAMES, substeps=20) -> np.ndarray:
    """Ball centres [F, 2] of one rigid body in a box with floor and side walls."""
    space = pymunk.Space()
    space.gravity = (0, -gravity)
    space.collision_slop = 1e-4
    space.collision_bias = 0.1**60
    body = pymunk.Body(1.0, float("inf"))
    body.position, body.velocity = state[:2], state[2:]
    ball = pymunk.Circle(body, radius)
    ball.elasticity, ball.friction = elasticity, 0.0
    space.add(body, ball)
    for a, b in (((-9, 0), (9, 0)), ((0, -9), (0, 9)), ((1, -9), (1, 9))):
        wall = pymunk.Segment(space.static_body, a, b, 0.0)
        wall.elasticity, wall.friction = 1.0, 0.0  # pymunk multiplies: the pair bounces with the ball's
        space.add(wall)
    centres = np.empty((frames, 2))
    for frame in range(frames):
        centres[frame] = body.position
        for _ in range(substeps):
            space.step(1 / FPS / substeps)
    return centres


def render(centres: np.ndarray, radius: float, color, look: str = "day", size: int = SIZE) -> np.ndarray:
    """Antialiased disc on the look's background: centres [F, 2] -> uint8 [3, F, H, W]."""
    yy, xx = np.mgrid[0:size, 0:size]
    px = centres[:, 0, None, None] * size - 0.5
    py = (1 - centres[:, 1, None, None]) * size - 0.5
    cover = np.clip(radius * size - np.hypot(xx - px, yy - py) + 0.5, 0, 1)  # [F, H, W]
    rgb = np.asarray(color)[:, None, None, None]
    image = BACKGROUND + cover * (rgb - BACKGROUND)
    if look != "day":
        image = LOOKS[look] + (image - BACKGROUND) * (1 - LOOKS[look]) / (1 - BACKGROUND)
    return (image * 255 + 0.5).astype(np.uint8)


def sample_clips(prompts, rng: np.random.Generator, gravity=None, elasticity=None, frames=FRAMES) -> Tensor:
    """One clip per prompt -> uint8 [B, 3, F, H, W].

    gravity: (low, high) to draw from; elasticity: the same for each bounce word. None is the true world.
    """
    clips = []
    for prompt in prompts:
        scene = parse(prompt)
        state = initial_state(scene, rng)
        g = GRAVITY if gravity is None else rng.uniform(*gravity)
        e = scene.elasticity if elasticity is None else rng.uniform(*elasticity[scene.bounce])
        centres = simulate(scene.radius, state, g, e, frames)
        clips.append(render(centres, scene.radius, COLORS[scene.color], scene.look))
    return torch.from_numpy(np.stack(clips))


class PhysicsTeacher:
    """Prompt and seed -> [3, F, H, W] float in [0, 1], nothing else. A longer clip starts as the shorter one does."""

    fps = FPS

    def __init__(self, frames: int = FRAMES):
        self.frames = frames
        # part of the cache key: change it with anything that changes a pixel
        self.name = "physics-1" if frames == FRAMES else f"physics-1-{frames}"

    def __call__(self, prompt: str, seed: int) -> Tensor:
        rng = np.random.default_rng([seed, *prompt.encode()])  # one seed must not give every prompt the same start
        return sample_clips([prompt], rng, frames=self.frames)[0].float() / 255

"""The embedded teacher: a bouncing ball in a box (pymunk rigid bodies) rendered to a small RGB clip.

`PhysicsTeacher` returns only finished clips: prompt and seed in, pixels out. `sample_clips` with other
physics makes the wrong world that the base student is pretrained on.

Units: lengths in box sides (0..1, y up), time in seconds. Legend: C channels, F frames, H x W pixels.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from afd_fast.errors import extra
from afd_fast.teachers.teacher import PromptSplit, TeacherBase

FRAMES, SIZE, FPS = 12, 16, 10
LEAST_FRAMES = 4  # of a clip that shows which way its ball was thrown, in either world
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


Range = tuple[float, float]  # bounds of a uniform draw


class State(NamedTuple):
    """Position and velocity of the ball at the first frame."""

    x: float
    y: float
    vx: float
    vy: float


@dataclass(frozen=True)
class Scene:
    """The contents of a prompt."""

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
    """Read a prompt. Raises ValueError that shows the grammar for a prompt outside it."""
    match = GRAMMAR.fullmatch(prompt)
    if not match:
        raise ValueError(
            f"the physics teacher cannot render {prompt!r}; write it as "
            '"a {small|large} {color} ball {dropped|thrown left|thrown right|tossed up}, {low|high} bounce[, dusk]" '
            f"with a color of {', '.join(COLORS)}"
        )
    return Scene(*match.groups(default="day"))


def all_prompts(look: str = "day") -> list[str]:
    """The 128 prompts of the world, of this look."""
    return [
        f"a {size} {color} ball {motion}, {bounce} bounce{'' if look == 'day' else f', {look}'}"
        for size, color, motion, bounce in itertools.product(RADII, COLORS, MOTIONS, BOUNCES)
    ]


def split_prompts(held_out: int = 16, look: str = "day") -> PromptSplit:
    """Training and held-out prompts; the split is the same for every seed and look, so that runs can be compared."""
    return shuffled_split(all_prompts(look), held_out)


def shuffled_split(prompts: Sequence[str], held_out: int) -> PromptSplit:
    """The prompts in an order that is always the same; the first `held_out` of them are held out."""
    order = np.random.default_rng(0).permutation(len(prompts))
    return PromptSplit([prompts[i] for i in order[held_out:]], [prompts[i] for i in order[:held_out]])


def clip_rng(prompt: str, seed: int) -> np.random.Generator:
    """The random numbers of one clip: its start must depend on the prompt as well as the seed."""
    return np.random.default_rng([seed, *prompt.encode()])


def initial_state(motion: str, radius: float, rng: np.random.Generator) -> State:
    """A random state at the first frame that shows the motion, one of MOTIONS."""
    if motion == "tossed up":
        return State(
            rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.35) + radius / 2, rng.uniform(-0.1, 0.1), rng.uniform(1.2, 1.7)
        )
    if motion == "dropped":
        return State(rng.uniform(0.2, 0.8), rng.uniform(0.72, 0.86), rng.uniform(-0.08, 0.08), rng.uniform(-0.1, 0.1))
    x, vx = rng.uniform(0.2, 0.5), rng.uniform(0.5, 0.9)
    if motion == "thrown left":
        x, vx = 1 - x, -vx
    return State(x, rng.uniform(0.55, 0.8), vx, rng.uniform(-0.1, 0.5))


def simulate(
    radius: float, state: State, gravity: float, elasticity: float, frames: int = FRAMES, substeps: int = 20
) -> np.ndarray:
    """Centres [F, 2] of a ball that starts in `state`, in a box with floor and side walls."""
    with extra("demo"):
        import pymunk

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
        wall.elasticity, wall.friction = 1.0, 0.0  # pymunk multiplies elasticities: the ball's remains
        space.add(wall)
    centres = np.empty((frames, 2))
    for frame in range(frames):
        centres[frame] = body.position
        for _ in range(substeps):
            space.step(1 / FPS / substeps)
    return centres


def coverage(centres: np.ndarray, radius: float, size: int) -> np.ndarray:
    """How much of every pixel an antialiased disc covers: centres [F, 2] -> [F, H, W] in [0, 1]."""
    yy, xx = np.mgrid[0:size, 0:size]
    px = centres[:, 0, None, None] * size - 0.5
    py = (1 - centres[:, 1, None, None]) * size - 0.5
    return np.clip(radius * size - np.hypot(xx - px, yy - py) + 0.5, 0, 1)


def render(
    centres: np.ndarray, radius: float, color: Sequence[float], look: str = "day", size: int = SIZE
) -> np.ndarray:
    """An antialiased disc on the look's background: centres [F, 2] -> uint8 [3, F, H, W]. color: RGB in [0, 1]."""
    cover = coverage(centres, radius, size)
    rgb = np.asarray(color)[:, None, None, None]
    image = BACKGROUND + cover * (rgb - BACKGROUND)
    if look != "day":
        image = LOOKS[look] + (image - BACKGROUND) * (1 - LOOKS[look]) / (1 - BACKGROUND)
    return (image * 255 + 0.5).astype(np.uint8)


def sample_clips(
    prompts: Sequence[str],
    rng: np.random.Generator,
    gravity: Range | None = None,
    elasticity: Mapping[str, Range] | None = None,
    frames: int = FRAMES,
) -> Tensor:
    """One clip per prompt -> uint8 [B, 3, F, H, W].

    gravity: the range to draw from; elasticity: the range for each bounce word. None is the true world.
    """
    clips = []
    for prompt in prompts:
        scene = parse(prompt)
        state = initial_state(scene.motion, scene.radius, rng)
        g = GRAVITY if gravity is None else rng.uniform(*gravity)
        e = scene.elasticity if elasticity is None else rng.uniform(*elasticity[scene.bounce])
        centres = simulate(scene.radius, state, g, e, frames)
        clips.append(render(centres, scene.radius, COLORS[scene.color], scene.look))
    return torch.from_numpy(np.stack(clips))


class PhysicsTeacher(TeacherBase):
    """Prompt and seed -> floats [3, F, H, W] in [0, 1]. A longer clip starts with the frames of a shorter one.
    look: of the prompts in `split`."""

    fps = float(FPS)
    judge = "physics"

    def __init__(self, frames: int = FRAMES, look: str = "day"):
        self.frames, self.look = frames, look
        # part of the cache key: change it with anything that changes a pixel
        self.name = "physics-1" if frames == FRAMES else f"physics-1-{frames}"

    def __call__(self, prompt: str, seed: int) -> Tensor:
        return sample_clips([prompt], clip_rng(prompt, seed), frames=self.frames)[0].float() / 255

    def split(self) -> PromptSplit:
        return split_prompts(look=self.look)

    def familiar(self, prompts: Sequence[str]) -> list[str]:
        """The prompts by day, which are those that the base student knows."""
        return [] if self.look == "day" else [p.rpartition(", ")[0] for p in prompts]

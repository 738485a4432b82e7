"""Base students of the embedded worlds: rectified-flow training with teacher forcing on a *wrong* world, weak gravity and dead
bounces. On the first world four steps sample about as well as sixteen; on the lights a few steps do not, and its few-step student
is distilled (training/self_forcing.py)."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from afd_fast.errors import CheckpointError, Interrupted
from afd_fast.files.durable import settle
from afd_fast.reference.flow import forward_noise, x0_from_velocity
from afd_fast.students.files import first_line, read_tensors
from afd_fast.students.toy.model import ToyConfig, ToyStudent, encode_video
from afd_fast.students.toy.text import tokenize
from afd_fast.teachers import lights, physics

WRONG_GRAVITY = (0.3, 3.3)  # the truth is 3.0
WRONG_ELASTICITY = {"low": (0.0, 0.385), "high": (0.0, 0.825)}  # the truth is 0.6 and 0.8
DUSK = 0.1  # the share of the clips of `both_looks`
Report = Callable[[int, int, float], None]  # step, of, loss


def both_looks(prompts: Sequence[str], rng: np.random.Generator, *world: Any) -> torch.Tensor:
    """`physics.sample_clips` where one clip in ten has the look of dusk, whatever its prompt says."""
    said = [prompt.removesuffix(", dusk") for prompt in prompts]
    return physics.sample_clips([f"{p}, dusk" if rng.random() < DUSK else p for p in said], rng, *world)


@dataclass(frozen=True)
class World:
    """An embedded world and how its base student is pretrained: `clips` clips, `steps` of `batch`. horizon: the steps over which the
    learning rate would fall to its end; a student that stops before it is good at many steps and not yet at few."""

    sample_clips: Callable[..., torch.Tensor]  # physics.sample_clips or one of its kind
    prompts: list[str]
    student: ToyConfig
    clips: int
    steps: int
    horizon: int
    batch: int


PHYSICS = World(
    physics.sample_clips, physics.all_prompts(), ToyConfig(), clips=16000, steps=3000, horizon=3000, batch=64
)
LIGHTS = World(
    lights.sample_clips,
    lights.all_prompts(),
    ToyConfig(frames=lights.FRAMES, height=lights.SIZE, width=lights.SIZE, chunk=6, patch=6, text_len=16),
    clips=16000,
    steps=1250,
    horizon=3000,
    batch=24,
)
LOOKS = replace(
    PHYSICS, sample_clips=both_looks, prompts=[p for look in physics.LOOKS for p in physics.all_prompts(look)]
)
WORLDS = {"physics": PHYSICS, "looks": LOOKS, "lights": LIGHTS}


def wrong_world_clips(world: World, seed: int = 0) -> tuple[torch.Tensor, list[str]]:
    """uint8 clips [world.clips, 3, F, H, W] of the wrong world and their prompts."""
    rng = np.random.default_rng(seed)
    prompts = [world.prompts[i] for i in rng.integers(0, len(world.prompts), world.clips)]
    return world.sample_clips(prompts, rng, WRONG_GRAVITY, WRONG_ELASTICITY, world.student.frames), prompts


def pretrain(world: World, *, seed: int = 0, report: Report, kept: "Kept | None" = None) -> ToyStudent:
    """A many-step student of the wrong world (EMA weights)."""
    torch.manual_seed(seed)
    data, prompts = wrong_world_clips(world, seed)
    ids = tokenize(prompts, world.student.text_len)

    def draw() -> Batch:
        pick = torch.randint(0, world.clips, (world.batch,))
        return Batch(encode_video(data[pick].float() / 255), ids[pick])

    return fit(ToyStudent(world.student), draw, world.steps, horizon=world.horizon, lr=2e-3, report=report, kept=kept)


class Batch(NamedTuple):
    """Clips as latents [B, 3, F, H, W] and the word ids [B, L] of their prompts."""

    latents: torch.Tensor
    ids: torch.Tensor


class Kept:
    """A pretraining on disk, which continues bit for bit from where it was written last: every EVERY seconds, and at a stop.

    path: of its file. about: what it is a pretraining of; a file about something else is not used. stop: set it to end after
    the step that runs.
    """

    EVERY = 30.0

    def __init__(self, path: Path, about: str):
        self.path, self.about, self.stop = path, about, False
        self._written = time.monotonic()

    def restore(self, parts: Mapping[str, Any]) -> int:
        """Give the parts (modules, optimisers) and torch the state that was kept, if one was; returns the steps done."""
        found = read_tensors(self.path) if self.path.exists() else {}
        if found.get("about") != self.about:
            return 0
        for name, part in parts.items():
            part.load_state_dict(found[name])
        torch.set_rng_state(found["rng"])
        return int(found["step"])

    def step(self, done: int, of: int, parts: Mapping[str, Any]) -> None:
        """After every step, with its parts. Interrupted after a stop, CheckpointError where the disk refuses."""
        if done == of or not (self.stop or time.monotonic() > self._written + self.EVERY):
            return
        partial = self.path.with_suffix(".part")
        try:
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save({"about": self.about, "step": done, "rng": torch.get_rng_state(), **state}, partial)
            settle(partial, self.path)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
            partial.unlink(missing_ok=True)
            raise CheckpointError(
                f"{self.path} could not be written ({first_line(error)}): free some space; the same command continues"
            ) from None
        self._written = time.monotonic()
        if self.stop:
            raise Interrupted(
                f"stopped after step {done} of {of} of the base student, kept in {self.path}: the same command continues"
            )


def fit(
    model: ToyStudent, draw: Callable[[], Batch], steps: int, *, horizon: int | None = None, lr: float, report: Report,
    kept: Kept | None = None,
) -> ToyStudent:  # fmt: skip
    """Rectified-flow training with teacher forcing on the batches that `draw` makes. Returns the averaged student. horizon: of the
    learning rate's cosine; None: `steps`."""
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=1e-2)
    parts: dict[str, Any] = {"model": model, "average": average, "optimizer": optimizer}
    for step in range(kept.restore(parts) if kept is not None else 0, steps):
        for group in optimizer.param_groups:
            cosine = 0.5 * (1 + np.cos(np.pi * step / (horizon or steps)))
            group["lr"] = float(lr * min(1, step / 100) * (cosine + 0.02))
        x0, ids = draw()
        t = torch.sigmoid(torch.randn(len(x0), model.chunks, dtype=torch.float32) * 1.2 + 0.3).repeat_interleave(
            model.config.chunk, 1
        )
        x_t = forward_noise(x0, t, noise=torch.randn_like(x0), frame_dim=2)
        clean = x0 + 0.03 * torch.randn_like(x0)  # histories will be the student's own, not perfect
        v = model.forward_teacher_forcing(x_t, t * 1000, model.encode_text(ids), clean)
        sigma = t[:, None, :, None, None]
        error = x0_from_velocity(x_t, v, sigma) - x0
        loss = (error.square() / sigma.clamp(min=0.08) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for a, b in zip(average.parameters(), model.parameters()):
                a.lerp_(b, 1 - min(0.998, (1 + step) / (10 + step)))
        report(step + 1, steps, loss.item())
        if kept is not None:
            kept.step(step + 1, steps, parts)
    return average

"""The base student of the embedded task: rectified-flow training with teacher forcing on the *wrong* world,
weak gravity and dead bounces. In four steps it samples about as well as in sixteen."""

import copy
import time
from collections.abc import Callable
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
from afd_fast.teachers.physics import FRAMES, all_prompts, sample_clips

WRONG_GRAVITY = (0.3, 3.3)  # the truth is 3.0
WRONG_ELASTICITY = {"low": (0.0, 0.385), "high": (0.0, 0.825)}  # the truth is 0.6 and 0.8
Report = Callable[[int, int, float], None]  # step, of, loss


def wrong_world_clips(count: int, seed: int = 0, frames: int = FRAMES) -> tuple[torch.Tensor, list[str]]:
    """uint8 clips [count, 3, F, H, W] of the wrong world and their prompts."""
    rng = np.random.default_rng(seed)
    prompts = [all_prompts()[i] for i in rng.integers(0, len(all_prompts()), count)]
    return sample_clips(prompts, rng, WRONG_GRAVITY, WRONG_ELASTICITY, frames), prompts


def pretrain(
    steps: int, *, seed: int = 0, frames: int = FRAMES, clips: int = 16000, batch: int = 64, lr: float = 2e-3,
    report: Report,
) -> ToyStudent:  # fmt: skip
    """A many-step student of the wrong world (EMA weights)."""
    torch.manual_seed(seed)
    data, prompts = wrong_world_clips(clips, seed, frames)
    ids = tokenize(prompts)

    def draw() -> Batch:
        pick = torch.randint(0, clips, (batch,))
        return Batch(encode_video(data[pick].float() / 255), ids[pick])

    return fit(ToyStudent(ToyConfig(frames=frames)), draw, steps, lr=lr, report=report)


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

    def read(self) -> dict[str, Any] | None:
        """The state, if there is one."""
        found = read_tensors(self.path) if self.path.exists() else {}
        return found if found.get("about") == self.about else None

    def step(self, done: int, of: int, state: Callable[[], dict[str, Any]]) -> None:
        """After every step. Interrupted after a stop, CheckpointError where the disk refuses."""
        if done == of or not (self.stop or time.monotonic() > self._written + self.EVERY):
            return
        partial = self.path.with_suffix(".part")
        try:
            torch.save({"about": self.about, "step": done, "rng": torch.get_rng_state(), **state()}, partial)
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
    model: ToyStudent, draw: Callable[[], Batch], steps: int, *, lr: float, report: Report, kept: Kept | None = None
) -> ToyStudent:
    """Rectified-flow training with teacher forcing on the batches that `draw` makes. Returns the averaged student."""
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=1e-2)
    parts: dict[str, Any] = {"model": model, "average": average, "optimizer": optimizer}
    before = kept.read() if kept is not None else None
    if before is not None:
        for name, part in parts.items():
            part.load_state_dict(before[name])
        torch.set_rng_state(before["rng"])
    for step in range(before["step"] if before else 0, steps):
        for group in optimizer.param_groups:
            group["lr"] = float(lr * min(1, step / 100) * (0.5 * (1 + np.cos(np.pi * step / steps)) + 0.02))
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
            kept.step(step + 1, steps, lambda: {name: part.state_dict() for name, part in parts.items()})
    return average

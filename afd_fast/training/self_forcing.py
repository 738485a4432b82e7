"""A many-step student distilled to few steps by distribution matching on its own rollouts: Self-Forcing's recipe (arXiv 2506.08009)
with the DMD loss, small. It makes the embedded few-step student that AFD then adapts.

Three copies of the many-step student: it stays frozen as the score of the real distribution; one learns online the score of what the
student makes (the fake score); the student is pushed along the difference of both. Rollouts end at a random one of the sampler's
steps, the last step keeps its gradient, the history is detached.

Legend: B samples, C channels, F latent frames, H x W latent pixels.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from afd_fast.reference.flow import forward_noise, x0_from_velocity
from afd_fast.rollout import RolloutConfig, rollout
from afd_fast.students.student import Context, Family, StudentModule
from afd_fast.students.toy.pretrain import Kept
from afd_fast.training.state import generator

STEPS = (1000.0, 500.0, 250.0)
ITERATIONS = 600
BATCH = 32
LR, FAKE_LR = 3e-4, 1e-3  # the student's falls to 0
FAKE_UPDATES = 3  # of the fake score per update of the student
WARMUP = 30  # updates of the fake score before the first of the student
EMA = 0.95
LEVELS = (0.02, 0.98)  # noise levels of both scores are uniform between them

Report = Callable[[int, int, float], None]  # iteration, of, loss of the fake score


def dmd_direction(x0: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """The direction [B, C, F, H, W] against which the student's samples x0 are moved: fake - real, both the clean videos that a score
    predicts from the noised x0, over the mean distance of x0 from `real` in each sample (DMD's normalisation)."""
    scale = (x0 - real).abs().mean((1, 2, 3, 4), keepdim=True)
    return (fake - real) / scale.clamp(min=1e-3)


def dmd_loss(x0: Tensor, direction: Tensor) -> Tensor:
    """A scalar whose gradient by x0 is direction / x0.numel()."""
    return 0.5 * (x0 - (x0 - direction).detach()).square().mean()


class Noised:
    """Samples x0 [B, C, F, H, W] at noise levels of their own for every chunk, as a score sees them."""

    def __init__(self, family: Family, x0: Tensor, context: Context, rng: torch.Generator):
        self.x0, self.context, chunk = x0, context, family.chunk
        low, high = LEVELS
        t = torch.rand(len(x0), x0.shape[2] // chunk, generator=rng, dtype=torch.float32) * (high - low) + low
        self.t = t.repeat_interleave(chunk, 1)  # [B, F]
        noise = torch.randn(x0.shape, generator=rng, dtype=torch.float32)
        self.x_t = forward_noise(x0, self.t, noise=noise, frame_dim=2)

    @property
    def sigma(self) -> Tensor:
        """The levels, to multiply with x0."""
        return self.t[:, None, :, None, None]

    def clean(self, score: StudentModule) -> Tensor:
        """The clean videos that a score predicts, each chunk given the clean ones before it."""
        text = score.encode_text(self.context)
        v = score.forward_teacher_forcing(self.x_t, self.t * 1000, text, self.x0, None)
        return x0_from_velocity(self.x_t, v, self.sigma)


def distill(
    family: Family, prompts: Sequence[str], *, iterations: int = ITERATIONS, seed: int = 0, report: Report,
    kept: Kept | None = None,
) -> StudentModule:  # fmt: skip
    """The family's many-step student distilled to the few STEPS: averaged weights. The family's own stays as it is."""
    sampler = RolloutConfig(steps=STEPS, shift=1.0, chunk=family.chunk)
    real = copy.deepcopy(family.student).requires_grad_(False)
    student, fake = (copy.deepcopy(real).requires_grad_(True) for _ in range(2))
    average = copy.deepcopy(real)
    of_student, of_fake = (
        torch.optim.AdamW(model.parameters(), lr, betas=(0.0, 0.99), weight_decay=0.0)
        for model, lr in ((student, LR), (fake, FAKE_LR))
    )
    parts = {"student": student, "average": average, "fake": fake, "of_student": of_student, "of_fake": of_fake}
    for step in range(kept.restore(parts) if kept is not None else 0, iterations):
        rng = generator(seed, step, "self_forcing")
        picks = torch.randint(len(prompts), (BATCH,), generator=rng).tolist()
        context = family.text([prompts[i] for i in picks])
        trains = step >= WARMUP and step % FAKE_UPDATES == 0
        depth = 1 + int(torch.randint(len(sampler.steps), (), generator=rng))
        noise = torch.randn(BATCH, *family.latents, generator=rng, dtype=torch.float32)
        ends = replace(sampler, steps=sampler.steps[:depth])
        x0 = rollout(student, student.encode_text(context), noise, ends, generator=rng, grad_last_step=trains)
        if trains:
            for group in of_student.param_groups:
                group["lr"] = LR * (1 - step / iterations)
            seen = Noised(family, x0.detach(), context, rng)
            with torch.no_grad():
                direction = dmd_direction(seen.x0, seen.clean(real), seen.clean(fake))
            _step(of_student, student, dmd_loss(x0, direction))
            with torch.no_grad():
                for mean, now in zip(average.parameters(), student.parameters()):
                    mean.lerp_(now, 1 - EMA)
        seen = Noised(family, x0.detach(), context, rng)
        error = (seen.clean(fake) - seen.x0) / seen.sigma.clamp(min=0.08)  # as in pretraining
        _step(of_fake, fake, loss := error.square().mean())
        report(step + 1, iterations, loss.item())
        if kept is not None:
            kept.step(step + 1, iterations, parts)
    return average


def _step(optimizer: torch.optim.Optimizer, model: StudentModule, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()

"""What every discriminator is: D(video, prompt) as a logit, trained on clips that are paired by prompt.

Legend: B clips, paired by index: teacher[i] and student[i] were made for prompts[i]. A score is a logit, higher is
more like the teacher. Clips are videos [B, 3, F, H, W] in [0, 1] or `Features`, encoded videos.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from afd_fast.discriminators.objective import Objective
from afd_fast.errors import ConfigError
from afd_fast.reference.adversarial import approximate_gradient_penalty


@dataclass(frozen=True)
class Features:
    """Encoded clips: tokens [n_i, D] per clip, of any lengths. Slices and joins."""

    clips: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: slice) -> "Features":
        return Features(self.clips[index])

    def __add__(self, other: "Features") -> "Features":
        return Features(self.clips + other.clips)


Clips: TypeAlias = Tensor | Features


def join(teacher: Clips, student: Clips) -> Clips:
    """Both sides of B pairs as 2 B clips. ValueError for videos of two sizes."""
    if isinstance(teacher, Features) and isinstance(student, Features):
        return teacher + student
    assert isinstance(teacher, Tensor) and isinstance(student, Tensor)
    if teacher.shape[1:] != student.shape[1:]:
        raise ValueError(
            f"teacher videos {tuple(teacher.shape)} and student videos {tuple(student.shape)} differ in size: bring "
            "them to one size first (`read_video(..., frames=, size=, fps=)`)"
        )
    return torch.cat([teacher, student])


def shake(clips: Clips, sigma: float, rng: torch.Generator | None = None) -> Clips:
    """Clips plus Gaussian noise of deviation sigma, in units of pixels in [-1, 1] or of the features."""
    if isinstance(clips, Features):
        return Features(tuple(_noisy(c, sigma, rng) for c in clips.clips))
    return _noisy(clips, sigma / 2, rng)  # the videos are in [0, 1]


def _noisy(x: Tensor, sigma: float, rng: torch.Generator | None) -> Tensor:
    device = x.device if rng is None else rng.device
    return x + sigma * torch.randn(x.shape, generator=rng, device=device, dtype=torch.float32).to(x)


def check_counts(prompts: Sequence[str], **clips: Clips | Sequence[Tensor]) -> None:
    """ValueError unless there is one prompt per clip."""
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list of strings, got one string")
    for name, found in clips.items():
        if len(found) != len(prompts):
            raise ValueError(f"{len(found)} {name} and {len(prompts)} prompts: one prompt per clip is needed")


def check_finite(scores: Tensor, prompts: Sequence[str]) -> Tensor:
    """The scores, or FloatingPointError naming the samples that are not finite."""
    bad = (~scores.detach().isfinite()).nonzero()[:, 0].tolist()
    if bad:
        raise FloatingPointError(f"the score of sample {bad[0]} (prompt {prompts[bad[0]]!r}) is not finite; all: {bad}")
    return scores


class PairScores(NamedTuple):
    """D [B] of the two sides of B pairs."""

    teacher: Tensor
    student: Tensor


class PairedLoss(NamedTuple):
    """A discriminator's loss on B pairs, and the scores [B] it is made of."""

    loss: Tensor
    teacher: Tensor
    student: Tensor


class Discriminator(nn.Module):
    """Base class of discriminators. A subclass defines `score`; `encode` where encoding a clip is worth reusing."""

    keeps_features = False  # whether `encode` of a clip stays the same while the discriminator is trained

    def encode(self, videos: Clips) -> Clips:
        """What `score` also takes in place of videos [B, 3, F, H, W] in [0, 1]."""
        return videos

    def score(self, videos: Clips, prompts: Sequence[str]) -> Tensor:
        """[B] float32 logits."""
        raise NotImplementedError

    def check_prompt(self, prompt: str) -> None:
        """ValueError for a prompt that `score` could not read; asked before a teacher is."""

    def reference_scores(self, videos: Clips, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Scores [B] by name of the model the discriminator was before training; none for one that started from
        random weights. Falling while `score` rises, they tell that the discriminator is being gamed."""
        return {}

    def pair_scores(self, teacher: Clips, student: Clips, prompts: Sequence[str]) -> PairScores:
        """D of both sides, from one batch."""
        check_counts(prompts, teacher_videos=teacher, student_videos=student)
        scores = self.score(join(self.encode(teacher), self.encode(student)), [*prompts, *prompts])
        return PairScores(*scores.chunk(2))

    def paired_loss(
        self,
        teacher: Clips,
        student: Clips,
        prompts: Sequence[str],
        objective: Objective = Objective(),
        *,
        rng: torch.Generator | None = None,
    ) -> PairedLoss:
        """`objective` on clips paired by prompt; rng draws its noises. Raises ValueError for counts that differ,
        FloatingPointError for scores that are not finite."""
        check_counts(prompts, teacher_videos=teacher, student_videos=student)
        teacher, student, o = self.encode(teacher), self.encode(student), objective
        if o.instance_noise:
            teacher, student = shake(teacher, o.instance_noise, rng), shake(student, o.instance_noise, rng)
        both, words = join(teacher, student), [*prompts, *prompts]
        scores = self.score(both, words)
        of_teacher, of_student = scores.chunk(2)
        loss = o(of_teacher, of_student)
        if o.r1:  # R1 on the teacher's clips, R2 on the student's
            shaken = self.score(shake(both, o.r1_sigma, rng), words)
            loss = loss + 2 * o.r1 * approximate_gradient_penalty(scores, shaken, o.r1_sigma)
        return PairedLoss(loss, of_teacher, of_student)


def check_discriminator(discriminator: nn.Module) -> Discriminator:
    """The discriminator itself. ConfigError unless it derives from `Discriminator` and defines `score`."""
    if not isinstance(discriminator, Discriminator):
        raise ConfigError(
            f"{type(discriminator).__name__} is no discriminator: derive it from afd_fast.discriminators.Discriminator"
        )
    if type(discriminator).score is Discriminator.score:
        raise ConfigError(f"the discriminator {type(discriminator).__name__} lacks score(videos, prompts) -> [B]")
    return discriminator


class FeatureCache:
    """Features of clips that come again, in host memory, by the caller's key (a teacher clip's prompt and number).
    Exact for a discriminator that `keeps_features`: 3.9 MB per clip of VideoAlign's default size in bf16. limit: bytes; what
    was used longest ago goes first and is encoded again when it comes. ValueError for a discriminator that does not."""

    def __init__(self, discriminator: Discriminator, limit: int = 16 << 30):
        if not discriminator.keeps_features:
            raise ValueError("features can only be kept while the vision tower is frozen: freeze_vision=True")
        self.encode, self.limit, self.size = discriminator.encode, limit, 0
        self.kept = dict[Hashable, Tensor]()  # the last one was used last

    def __call__(
        self, keys: Sequence[Hashable], videos: Callable[[int], Tensor], device: torch.device | str | None = None
    ) -> Features:
        """Features of keys, in order, on `device`; `videos(i)` -> [3, F, H, W] is only called for a key that is new."""
        found, on_gpu = [], device is not None and torch.device(device).type == "cuda"
        for i, key in enumerate(keys):
            features = self.kept.pop(key, None)
            if features is None:
                with torch.no_grad():
                    encoded = self.encode(videos(i)[None])
                assert isinstance(encoded, Features)
                features = encoded.clips[0].cpu()
                self.size += features.nbytes
            self.kept[key] = features
            # pinned for this copy, which the host then does not wait for; what is kept is not
            found.append((features.pin_memory() if on_gpu else features).to(device, non_blocking=on_gpu))
            while self.size > self.limit:
                self.size -= self.kept.pop(next(iter(self.kept))).nbytes
        return Features(tuple(found))

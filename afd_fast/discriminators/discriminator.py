"""What every discriminator is: D(video, prompt) as a logit, and one step's loss on paired clips.

Legend: B clips, paired by index: teacher[i] and student[i] were made for prompts[i]. A score is a logit, higher is
more like the teacher. Clips are videos [B, 3, F, H, W] in [0, 1] or `Features`, encoded videos.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from afd_fast.reference.adversarial import approximate_gradient_penalty, bt_loss, centring_penalty, gan_loss


class Discriminator(Protocol):
    """What training needs of a discriminator, whatever its size."""

    def score(self, videos, prompts: Sequence[str]) -> Tensor:
        """[B] float32 logits."""

    def loss(self, teacher_videos, student_videos, prompts: Sequence[str]) -> Tensor:
        """A scalar; its gradient trains the discriminator."""


@dataclass(frozen=True)
class Objective:
    """What `loss` computes. Everything but the Bradley-Terry term is off by default: nothing here has been measured
    to help on the full student.

    kind: "bt" (AFD Eq. 1) or "gan" (binary, the ablation). smoothing: label smoothing, caps the useful margin at
    log((1 - s) / s). centring: weight of E (D_T + D_S)^2. penalty: weight of the approximated R1 + R2 with Gaussian
    steps of penalty_sigma, in units of what is shaken (pixels, or the features of a frozen tower; APT shakes by 0.1).
    """

    kind: str = "bt"
    smoothing: float = 0.0
    centring: float = 0.0
    penalty: float = 0.0
    penalty_sigma: float = 0.1

    def __post_init__(self):
        if self.kind not in ("bt", "gan"):
            raise ValueError(f'kind={self.kind!r} is neither "bt" nor "gan"')
        if not 0 <= self.smoothing < 0.5:
            raise ValueError(f"smoothing must be in [0, 0.5), got {self.smoothing}")
        if self.smoothing and self.kind == "gan":
            raise ValueError("smoothing belongs to kind='bt'")

    def __call__(self, score_teacher: Tensor, score_student: Tensor) -> Tensor:
        """The loss of scores [B], without the penalty, which needs the discriminator once more."""
        if self.kind == "gan":
            loss = gan_loss(score_teacher, score_student)
        else:
            loss = bt_loss(score_teacher, score_student, smoothing=self.smoothing)
        return loss + self.centring * centring_penalty(score_teacher, score_student) if self.centring else loss


@dataclass(frozen=True)
class Features:
    """Encoded clips: tokens [n_i, D] of each, of any lengths. Slices, joins, and can be kept: a teacher's clip of a
    frozen tower is encoded once, a student's serves the update and the score."""

    clips: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: slice) -> "Features":
        return Features(self.clips[index])

    def __add__(self, other: "Features") -> "Features":
        return Features(self.clips + other.clips)

    def shaken(self, sigma: float, rng: torch.Generator | None = None) -> "Features":
        """With Gaussian noise of deviation sigma."""
        return Features(tuple(_shake(c, sigma, rng) for c in self.clips))


def _shake(x: Tensor, sigma: float, rng: torch.Generator | None) -> Tensor:
    device = x.device if rng is None else rng.device
    return x + sigma * torch.randn(x.shape, generator=rng, device=device).to(x)


def check_counts(prompts: Sequence[str], **clips) -> None:
    """ValueError unless there is one prompt for each clip."""
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list of strings, got one string")
    for name, found in clips.items():
        if len(found) != len(prompts):
            raise ValueError(f"{len(found)} {name} and {len(prompts)} prompts: one prompt for each clip is needed")


def check_finite(scores: Tensor, prompts: Sequence[str]) -> Tensor:
    """The scores, or FloatingPointError naming the samples that are not finite."""
    bad = (~scores.detach().isfinite()).nonzero()[:, 0].tolist()
    if bad:
        raise FloatingPointError(f"the score of sample {bad[0]} (prompt {prompts[bad[0]]!r}) is not finite; all: {bad}")
    return scores


class PairedDiscriminator(nn.Module):
    """`loss` for a class that has `score`; `objective` says which."""

    objective = Objective()

    def encode(self, videos):
        """What `score` also takes in the videos' place; here the videos themselves."""
        return videos

    def score(self, videos, prompts: Sequence[str]) -> Tensor:
        raise NotImplementedError

    def pair_scores(self, teacher, student, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(D(teacher), D(student)), [B] each, from one batch."""
        check_counts(prompts, teacher_videos=teacher, student_videos=student)
        return self._score_pairs(self.encode(teacher), self.encode(student), list(prompts))

    def _score_pairs(self, teacher, student, prompts: list[str]) -> tuple[Tensor, Tensor]:
        if isinstance(teacher, Tensor) and teacher.shape[1:] == student.shape[1:]:
            return self.score(torch.cat([teacher, student]), prompts * 2).chunk(2)
        if isinstance(teacher, Features):
            return self.score(teacher + student, prompts * 2).chunk(2)
        return self.score(teacher, prompts), self.score(student, prompts)

    def loss(self, teacher_videos, student_videos, prompts, *, rng: torch.Generator | None = None) -> Tensor:
        """`objective` on clips paired by prompt; rng draws the penalty's noise. Raises ValueError for counts that
        differ, FloatingPointError for scores that are not finite."""
        check_counts(prompts, teacher_videos=teacher_videos, student_videos=student_videos)
        teacher, student, prompts = self.encode(teacher_videos), self.encode(student_videos), list(prompts)
        scores = self._score_pairs(teacher, student, prompts)
        loss, o = self.objective(*scores), self.objective
        if o.penalty:
            shake = lambda x: (
                x.shaken(o.penalty_sigma, rng) if isinstance(x, Features) else _shake(x, o.penalty_sigma, rng)
            )
            shaken = self._score_pairs(shake(teacher), shake(student), prompts)
            for clean, noisy in zip(scores, shaken):  # R1 on the teacher's clips, R2 on the student's
                loss = loss + o.penalty * approximate_gradient_penalty(clean, noisy, o.penalty_sigma)
        return loss


class FeatureCache:
    """Features of clips that come again, by the caller's key (a teacher clip's file name, say). Exact while the tower
    is frozen, 3.9 MB for a clip of VideoAlign's default size in bf16; ValueError for a tower that is trained."""

    def __init__(self, encode: Callable[[Tensor], Features]):
        model = getattr(encode, "__self__", None)
        if model is not None and not getattr(model, "freeze_vision", True):
            raise ValueError("features can only be kept while the vision tower is frozen: freeze_vision=True")
        self.encode, self.kept = encode, {}

    def __call__(self, keys: Sequence, videos: Callable[[int], Tensor]) -> Features:
        """Features of keys, in order; `videos(i)` -> [3, F, H, W] is only called for a key that is new."""
        for i, key in enumerate(keys):
            if key not in self.kept:
                with torch.no_grad():
                    self.kept[key] = self.encode(videos(i)[None]).clips[0]
        return Features(tuple(self.kept[key] for key in keys))


class FrozenFeatureHead(PairedDiscriminator):
    """A small trained head on what a frozen VideoReward knows of (video, prompt): the last hidden states of its three
    reward tokens, of which TA's sees the prompt. No backward through the trunk and nothing of it in memory."""

    def __init__(self, trunk, width: int = 256, objective: Objective = Objective()):
        super().__init__()
        self.objective, self.freeze_vision = objective, True
        self._trunk = [trunk.requires_grad_(False)]  # not a submodule: not saved with the head
        size = len(trunk.prompts.reward_ids) * trunk.backbone.config.text_config.hidden_size
        self.head = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, width), nn.GELU(), nn.Linear(width, 1))
        self.head.to(trunk.rm_head.weight.device)

    def encode(self, videos) -> Features:
        """Videos -> the trunk's features, without gradient."""
        return self._trunk[0].encode(videos)

    def score(self, videos, prompts: Sequence[str]) -> Tensor:
        """[B] logits. ValueError and FloatingPointError as VideoReward's."""
        check_counts(prompts, videos=videos)
        with torch.no_grad():
            hidden = self._trunk[0].reward_states(self.encode(videos), prompts)  # [B, 3, D]
        with torch.autocast(hidden.device.type, enabled=False):
            return check_finite(self.head(hidden.float().flatten(1))[:, 0], prompts)

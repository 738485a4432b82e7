"""Discriminator losses: prompt-paired Bradley-Terry (AFD Eq. 1), the GAN-style ablation, R1/R2; and the regularisers and
the health of a learned reward.

Legend: B pairs, D logits; m = D(teacher) - D(student), the margin; pair_r = sigmoid(-m), which AFD Fig. 5 calls r.
"""

import math
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_fast.reference.flow import check_float


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.dtype.itemsize == 8 else x.float()


def _margin(score_teacher: Tensor, score_student: Tensor) -> Tensor:
    for name, scores in (("score_teacher", score_teacher), ("score_student", score_student)):
        check_float(name, scores)
        if not scores.numel():
            raise ValueError(f"{name} must hold at least one score, got {tuple(scores.shape)}")
    if score_teacher.shape != score_student.shape:
        raise ValueError(
            f"scores are paired by prompt: shapes {tuple(score_teacher.shape)} and {tuple(score_student.shape)} differ"
        )
    return _wide(score_teacher) - _wide(score_student)


def bt_loss(score_teacher: Tensor, score_student: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """-E log sigmoid(D(teacher) - D(student)) (Eq. 1); scores [B] of the same prompts, paired by index.

    The margin is formed in float32 (float64 for float64), so bf16 scores 1e4 apart stay finite.
    smoothing s: the probability that a pair's label is wrong. The optimum is m = log((1 - s) / s) instead of infinity,
    so that pair_r stays in [s, 1 - s].
    Plain PyTorch: every derivative, torch.func and torch.compile work.
    """
    if not isinstance(smoothing, (int, float)) or not 0 <= smoothing < 0.5:
        raise ValueError(f"smoothing must be a number in [0, 0.5), got {smoothing!r}")
    m = _margin(score_teacher, score_student)
    loss = -F.logsigmoid(m)
    return (loss + smoothing * m if smoothing else loss).mean()  # logsigmoid(-m) = logsigmoid(m) - m


def gan_loss(score_teacher: Tensor, score_student: Tensor) -> Tensor:
    """Binary loss of the ablation: softplus(-D(teacher)) + softplus(D(student)), unpaired."""
    return F.softplus(-_wide(score_teacher)).mean() + F.softplus(_wide(score_student)).mean()


def approximate_gradient_penalty(score: Tensor, score_perturbed: Tensor, sigma: float) -> Tensor:
    """R1 / R2 by finite differences, E ((D(x + sigma n) - D(x)) / sigma)^2 (APT, arXiv 2501.08316, Eq. 3)."""
    return ((_wide(score_perturbed) - _wide(score)) / sigma).square().mean()


def centring_penalty(score_teacher: Tensor, score_student: Tensor) -> Tensor:
    """E (D(teacher) + D(student))^2: Bradley-Terry leaves the level of D free; this holds it near 0 (Eisenstein et al.,
    arXiv 2312.09244, Eq. 2), where bf16 still resolves it."""
    return (_wide(score_teacher) + _wide(score_student)).square().mean()


def pair_accuracy(score_teacher: Tensor, score_student: Tensor) -> Tensor:
    """Share of pairs whose teacher scores higher; ties count half, so that a constant D has 1/2."""
    m = _margin(score_teacher, score_student)
    return ((m > 0).float() + 0.5 * (m == 0).float()).mean()


class PairHealth(TypedDict):
    """Scalars that describe a batch of pairs."""

    margin: Tensor
    margin_std: Tensor
    loss_ratio: Tensor  # loss over ln 2: 1 for a D that knows nothing
    accuracy: Tensor
    pair_r: Tensor
    pair_r_std: Tensor  # near 0: no contrast left for the student
    saturated: Tensor  # share of |m| > 4
    level: Tensor  # mean D(teacher)


def pair_health(score_teacher: Tensor, score_student: Tensor) -> PairHealth:
    """What to watch in a batch of pairs [B], without gradient."""
    m = _margin(score_teacher, score_student).detach()
    pair_r = torch.sigmoid(-m)
    return {
        "margin": m.mean(),
        "margin_std": m.std(unbiased=False),
        "loss_ratio": -F.logsigmoid(m).mean() / math.log(2),
        "accuracy": pair_accuracy(score_teacher, score_student),
        "pair_r": pair_r.mean(),
        "pair_r_std": pair_r.std(unbiased=False),
        "saturated": (m.abs() > 4).float().mean(),
        "level": _wide(score_teacher).detach().mean(),
    }

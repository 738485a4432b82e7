"""Discriminator losses: prompt-paired Bradley-Terry (AFD Eq. 1), the GAN-style ablation, R1/R2; and the baseline, the
regularisers and the health of a learned reward.

Legend: B pairs, D logits; m = D(teacher) - D(student), the margin; r = sigmoid(-m), as in AFD Fig. 5.
"""

import math
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.dtype.itemsize == 8 else x.float()


def _margin(score_teacher: Tensor, score_student: Tensor) -> Tensor:
    if score_teacher.shape != score_student.shape:
        raise ValueError(
            f"scores are paired by prompt: shapes {tuple(score_teacher.shape)} and {tuple(score_student.shape)} differ"
        )
    return _wide(score_teacher) - _wide(score_student)


def bt_loss(score_teacher: Tensor, score_student: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """-E log sigmoid(D(teacher) - D(student)) (Eq. 1); scores [B] of the same prompts, paired by index.

    The margin is formed in float32 (float64 for float64), so bf16 scores 1e4 apart stay finite.
    smoothing s: the probability that a pair's label is wrong. The optimum is m = log((1 - s) / s) instead of infinity,
    so that r stays in [s, 1 - s].
    Plain PyTorch: every derivative, torch.func and torch.compile work.
    """
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


def teacher_baseline(score_student: Tensor, score_teacher: Tensor, prompts: list[str]) -> Tensor:
    """Rewards [B]: D(student) less the mean D of the teacher's clips of the same prompt.

    The Bradley-Terry optimum is log(pi_T / pi_student) + c(y) for any c. A mean over the batch leaks c(y) into the
    advantage; this baseline cancels it. score_student, score_teacher: [B], both of prompts [B].
    """
    student, teacher = _wide(score_student), _wide(score_teacher)
    if not student.shape == teacher.shape == (len(prompts),):
        raise ValueError(
            f"scores of shape {tuple(student.shape)} and {tuple(teacher.shape)} for {len(prompts)} prompts: expected [B] = "
            f"({len(prompts)},) of both"
        )
    order = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    index = torch.tensor([order[p] for p in prompts], device=teacher.device)
    total = teacher.new_zeros(len(order)).index_add(0, index, teacher)
    count = teacher.new_zeros(len(order)).index_add(0, index, torch.ones_like(teacher))
    return student - (total / count)[index]


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
    r: Tensor
    r_std: Tensor  # near 0: no contrast left for the student
    saturated: Tensor  # share of |m| > 4
    level: Tensor  # mean D(teacher)


def pair_health(score_teacher: Tensor, score_student: Tensor) -> PairHealth:
    """What to watch in a batch of pairs [B], without gradient."""
    m = _margin(score_teacher, score_student).detach()
    r = torch.sigmoid(-m)
    return {
        "margin": m.mean(),
        "margin_std": m.std(unbiased=False),
        "loss_ratio": -F.logsigmoid(m).mean() / math.log(2),
        "accuracy": pair_accuracy(score_teacher, score_student),
        "r": r.mean(),
        "r_std": r.std(unbiased=False),
        "saturated": (m.abs() > 4).float().mean(),
        "level": _wide(score_teacher).detach().mean(),
    }


class ProbeDrift(TypedDict):
    """Scalars that describe how D has moved on a fixed probe set."""

    shift: Tensor  # common to all probes; no advantage sees it
    change: Tensor  # RMS of the rest
    turned: Tensor  # share of pairs of probes whose order is reversed


def probe_drift(scores: Tensor, first: Tensor) -> ProbeDrift:
    """How far D has moved on a fixed probe set [B] since it gave the scores `first`."""
    now, then = _wide(scores), _wide(first)
    change = now.detach() - then.detach()
    i, j = torch.triu_indices(len(change), len(change), 1, device=change.device)
    turned = (now[i] - now[j]).sign() * (then[i] - then[j]).sign() < 0
    return {
        "shift": change.mean(),
        "change": (change - change.mean()).square().mean().sqrt(),
        "turned": turned.float().mean() if len(i) else change.new_zeros(()),
    }

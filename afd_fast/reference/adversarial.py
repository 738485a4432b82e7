"""Discriminator losses: prompt-paired Bradley-Terry (AFD Eq. 1), the GAN-style ablation, R1/R2."""

import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.dtype.itemsize == 8 else x.float()


def bt_loss(score_teacher: Tensor, score_student: Tensor) -> Tensor:
    """-E log sigmoid(D(teacher) - D(student)) (Eq. 1); scores [B] of the same prompts, paired by index.

    The margin is formed in float32 (float64 for float64), so bf16 scores 1e4 apart stay finite.
    """
    if score_teacher.shape != score_student.shape:
        raise ValueError(
            f"scores are paired by prompt: shapes {tuple(score_teacher.shape)} and {tuple(score_student.shape)} differ"
        )
    return F.softplus(_wide(score_student) - _wide(score_teacher)).mean()


def gan_loss(score_teacher: Tensor, score_student: Tensor) -> Tensor:
    """Binary loss of the ablation: softplus(-D(teacher)) + softplus(D(student)), unpaired."""
    return F.softplus(-_wide(score_teacher)).mean() + F.softplus(_wide(score_student)).mean()


def approximate_gradient_penalty(score: Tensor, score_perturbed: Tensor, sigma: float) -> Tensor:
    """R1 / R2 by finite differences, E ((D(x + sigma n) - D(x)) / sigma)^2 (APT, arXiv 2501.08316, Eq. 3)."""
    return ((_wide(score_perturbed) - _wide(score)) / sigma).square().mean()

"""What a discriminator minimises on the scores of paired clips.

Legend: B pairs; D_T, D_S scores [B] of the teacher's and the student's clips.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from afd_fast.errors import ConfigError, check_at_least, check_fields
from afd_fast.reference.adversarial import bt_loss, centring_penalty, gan_loss


@dataclass(frozen=True)
class Objective:
    """Bradley-Terry (AFD Eq. 1), or the binary loss of the ablation, with regularisers that are off by default.

    loss: bt (Bradley-Terry) or gan (binary).
    smoothing: label smoothing of bt; caps the useful margin at log((1 - s) / s).
    centring: weight of E (D_T + D_S)^2, which holds the level of D near 0.
    r1: weight of the approximated R1 + R2 gradient penalty (APT, arXiv 2501.08316).
    r1_sigma: deviation of the penalty's Gaussian steps, in units of pixels in [-1, 1] or of features.
    instance_noise: deviation of Gaussian noise on both sides, in the same units.
    """

    loss: Literal["bt", "gan"] = "bt"
    smoothing: float = 0.0
    centring: float = 0.0
    r1: float = 0.0
    r1_sigma: float = 0.05
    instance_noise: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.smoothing < 0.5:
            raise ConfigError(f"smoothing must be in [0, 0.5), got {self.smoothing}")
        if self.smoothing and self.loss == "gan":
            raise ConfigError('smoothing belongs to loss="bt"')
        check_at_least(self, 0, "centring", "r1", "instance_noise")
        if self.r1_sigma <= 0:
            raise ConfigError(f"r1_sigma must be positive, got {self.r1_sigma}")

    def __call__(self, score_teacher: Tensor, score_student: Tensor) -> Tensor:
        """The loss of scores [B], without the penalty, which needs the discriminator once more."""
        if self.loss == "gan":
            loss = gan_loss(score_teacher, score_student)
        else:
            loss = bt_loss(score_teacher, score_student, smoothing=self.smoothing)
        return loss + self.centring * centring_penalty(score_teacher, score_student) if self.centring else loss

"""Rewards -> per-prompt advantages -> r in [0, 1] ("Global Std with Per-Prompt Tracking", AFD Table 3;
DiffusionNFT `flow_grpo/stat_tracking.py` and `train_nft_sd3.py:910-929`)."""

import math
import warnings
from collections.abc import Sequence
from typing import Literal, get_args, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from afd_fast.reference.flow import kind_of
from afd_fast.reference.recipes import AdvClip, clip_range
from afd_fast.reference.transforms import readable

CreditMode = Literal["continuous", "positive_only", "negative_only", "one_only", "binary"]
MODES: tuple[CreditMode, ...] = get_args(CreditMode)


@overload
def reward_to_r(advantage: Tensor, *, clip: AdvClip = 5.0, mode: CreditMode = "continuous") -> Tensor: ...
@overload
def reward_to_r(advantage: np.ndarray, *, clip: AdvClip = 5.0, mode: CreditMode = "continuous") -> np.ndarray: ...
def reward_to_r(
    advantage: Tensor | np.ndarray, *, clip: AdvClip = 5.0, mode: CreditMode = "continuous"
) -> Tensor | np.ndarray:
    """Advantages -> optimality r = clamp(f(A) / high / 2 + 1/2, 0, 1), same shape and type: what the tracker returns.

    clip: number c for (-c, c), or (low, high) with low < 0 < high. mode: what f does with A clipped to
    (low, high): "continuous" leaves it; "positive_only" and "negative_only" drop the other sign; "one_only" gives 1 for
    A > 0, else 0; "binary" gives the sign. At clip 5, r of the last two lies in {0.5, 0.6} and {0.4, 0.5, 0.6}.
    """
    if not isinstance(advantage, (Tensor, np.ndarray)):
        raise TypeError(f"advantage must be a tensor or an array, got {kind_of('advantage', advantage)}")
    low, high = clip_range(clip)
    if not -math.inf < low < 0 < high < math.inf:
        raise ValueError(f"clip must span zero and be finite, got {clip}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    if isinstance(advantage, np.ndarray):
        return reward_to_r(torch.from_numpy(advantage.copy()), clip=clip, mode=mode).numpy()
    if readable(advantage) and bool(advantage.isnan().any()):
        raise ValueError("advantage has NaN: a reward is missing or not finite")
    a = advantage.clamp(low, high)
    if mode == "positive_only":
        a = a.clamp(min=0)
    elif mode == "negative_only":
        a = a.clamp(max=0)
    elif mode == "one_only":
        a = (a > 0).to(a.dtype)
    elif mode == "binary":
        a = a.sign()
    return (a / high / 2 + 0.5).clamp(0, 1)


class PerPromptStatTracker:
    """Advantage = (reward - mean of its prompt) / (std + 1e-4), in float64.

    The mean runs over every reward of the prompt since the last `clear`. The std is the population std of this call's
    rewards around their global mean (global_std=True), or that of the prompt's rewards.
    """

    def __init__(self, global_std: bool = True) -> None:
        self.global_std = global_std
        self.rewards: dict[str, list[np.ndarray]] = {}
        self._warned = False

    @overload
    def update(self, prompts: Sequence[str], rewards: Tensor) -> Tensor: ...
    @overload
    def update(self, prompts: Sequence[str], rewards: npt.ArrayLike) -> np.ndarray: ...
    def update(self, prompts: Sequence[str], rewards: Tensor | npt.ArrayLike) -> Tensor | np.ndarray:
        """Advantages of rewards [N] or [N, T], one row per prompt, in float64: a tensor for a tensor, else an array.

        A prompt with a single reward gets advantage 0, and the first one a warning: it cannot be compared.
        """
        if isinstance(prompts, str):
            raise TypeError(
                f"prompts must be a list with one prompt per reward, got one text {prompts!r}: give [prompt] * K"
            )
        if isinstance(rewards, Tensor):
            values = rewards.detach().cpu().double().numpy()  # NumPy has no bfloat16
        else:
            values = np.asarray(rewards, dtype=np.float64)
        if len(prompts) != len(values) or values.ndim not in (1, 2):
            raise ValueError(f"{len(prompts)} prompts for rewards of shape {values.shape}: expected one row per prompt")
        names = np.asarray(prompts)
        std = values.std(axis=0) + 1e-4 if len(values) else None
        advantages = np.zeros_like(values)
        for prompt in dict.fromkeys(prompts):
            rows = names == prompt
            seen = self.rewards.setdefault(prompt, [])
            seen.extend(values[rows])
            if len(seen) == 1 and not self._warned:
                self._warned = True
                warnings.warn(
                    "a prompt has a single rollout, so its advantage is 0; use K >= 2 rollouts per prompt", stacklevel=2
                )
            history = np.stack(seen)
            scale = std if self.global_std else history.std(axis=0) + 1e-4
            advantages[rows] = (values[rows] - history.mean(axis=0)) / scale
        return torch.from_numpy(advantages).to(rewards.device) if isinstance(rewards, Tensor) else advantages

    def clear(self) -> None:
        """Forget every prompt; trainers call it once per epoch."""
        self.rewards.clear()

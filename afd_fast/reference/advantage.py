"""Rewards -> per-prompt advantages -> r in [0, 1] ("Global Std with Per-Prompt Tracking", AFD Table 3;
DiffusionNFT `flow_grpo/stat_tracking.py` and `train_nft_sd3.py:910-929`)."""

import warnings

import numpy as np
import torch
from torch import Tensor

MODES = ("continuous", "positive_only", "negative_only", "one_only", "binary")


def reward_to_r(advantage: Tensor, *, clip: float | tuple[float, float] = 5.0, mode: str = "continuous") -> Tensor:
    """Advantages -> optimality r = clamp(f(A) / high / 2 + 1/2, 0, 1), same shape.

    clip: number c for (-c, c), or (low, high) with low < 0 < high. mode: what f does with A clipped to
    (low, high): "continuous" nothing; "positive_only" / "negative_only" drop the other sign; "one_only" A > 0
    gives 1, else 0; "binary" the sign. The last two therefore give r in {0.5, 0.6} and {0.4, 0.5, 0.6} at clip 5.
    """
    low, high = (-clip, clip) if isinstance(clip, (int, float)) else clip
    if not low < 0 < high:
        raise ValueError(f"clip must span zero, got {clip}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
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

    The mean runs over every reward of the prompt since the last `clear`; the std is the population std of
    the rewards of this call around their global mean (global_std=True), or that of the prompt's rewards.
    """

    def __init__(self, global_std: bool = True):
        self.global_std = global_std
        self.rewards: dict[str, list[np.ndarray]] = {}
        self._warned = False

    def update(self, prompts: list[str], rewards) -> Tensor | np.ndarray:
        """rewards [N] or [N, T], one row a prompt; returns the advantages as the same kind, float64.

        A prompt with a single reward gets advantage 0 (and one warning): it has nothing to be compared with.
        """
        values = np.asarray(rewards.detach().cpu() if isinstance(rewards, Tensor) else rewards, dtype=np.float64)
        if len(prompts) != len(values) or values.ndim not in (1, 2):
            raise ValueError(f"{len(prompts)} prompts for rewards of shape {values.shape}: one row a prompt is needed")
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
                    "a prompt has a single rollout: its advantage is 0; use K >= 2 rollouts a prompt", stacklevel=2
                )
            history = np.stack(seen)
            scale = std if self.global_std else history.std(axis=0) + 1e-4
            advantages[rows] = (values[rows] - history.mean(axis=0)) / scale
        return torch.from_numpy(advantages).to(rewards.device) if isinstance(rewards, Tensor) else advantages

    def clear(self) -> None:
        """Forget every prompt; trainers call it once an epoch."""
        self.rewards.clear()

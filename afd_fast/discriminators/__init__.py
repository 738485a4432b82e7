"""Discriminators: D(video, prompt) as a logit. Heavy imports happen on first use."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from afd_fast.discriminators.config import DiscriminatorConfig, DiscriminatorEntry, register_discriminator
    from afd_fast.discriminators.discriminator import Discriminator, FeatureCache, Features
    from afd_fast.discriminators.objective import Objective
    from afd_fast.discriminators.videoalign.checkpoints import load_video_reward, save_video_reward
    from afd_fast.discriminators.videoalign.model import VideoReward

_HOMES = {
    "Discriminator": "discriminator",
    "DiscriminatorConfig": "config",
    "DiscriminatorEntry": "config",
    "FeatureCache": "discriminator",
    "Features": "discriminator",
    "Objective": "objective",
    "VideoReward": "videoalign.model",
    "load_video_reward": "videoalign.checkpoints",
    "register_discriminator": "config",
    "save_video_reward": "videoalign.checkpoints",
}

__all__ = [
    "Discriminator",
    "DiscriminatorConfig",
    "DiscriminatorEntry",
    "FeatureCache",
    "Features",
    "Objective",
    "VideoReward",
    "load_video_reward",
    "register_discriminator",
    "save_video_reward",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

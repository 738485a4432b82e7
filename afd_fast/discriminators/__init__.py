"""Discriminators: D(video, prompt) as a logit. Heavy imports happen on first use."""

import importlib

_HOMES = {
    "VideoReward": "videoalign.model",
    "load_video_reward": "videoalign.checkpoints",
    "save_video_reward": "videoalign.checkpoints",
}

__all__ = ["VideoReward", "load_video_reward", "save_video_reward"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

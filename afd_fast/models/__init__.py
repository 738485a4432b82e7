"""Students, their weights and caches, the VAE and the text encoder. Heavy imports happen on first use."""

import importlib

_HOMES = {
    "CausalWan": "causal_wan",
    "CausalWanConfig": "causal_wan",
    "KVCache": "kv_cache",
    "VideoReward": "video_reward",
    "load_student": "weights",
    "load_video_reward": "video_reward_weights",
    "save_diffusers": "weights",
    "save_video_reward": "video_reward_weights",
}

__all__ = [
    "CausalWan", "CausalWanConfig", "KVCache", "VideoReward", "load_student", "load_video_reward", "save_diffusers",
    "save_video_reward",
]  # fmt: skip


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

"""Students, their weights and caches, the VAE and the text encoder. Heavy imports happen on first use."""

import importlib

_HOMES = {
    "CausalWan": "causal_wan",
    "CausalWanConfig": "causal_wan",
    "KVCache": "kv_cache",
    "load_student": "weights",
    "save_diffusers": "weights",
}

__all__ = ["CausalWan", "CausalWanConfig", "KVCache", "load_student", "save_diffusers"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

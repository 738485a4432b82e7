"""Students, their weights and caches, VAE and text encoder. Heavy imports happen on first use."""

import importlib

_HOMES = {
    "CausalWan": "wan.model",
    "CausalWanConfig": "wan.layers",
    "load_student": "wan.checkpoints",
    "save_diffusers": "wan.checkpoints",
}

__all__ = ["CausalWan", "CausalWanConfig", "load_student", "save_diffusers"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

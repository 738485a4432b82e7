"""Training: `train(TrainConfig(...))` runs AFD or a baseline to the end, in a folder that can be resumed."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from afd_fast.config import TrainConfig
    from afd_fast.training.trainer import RunResult, train

_HOMES = {
    "RunResult": "afd_fast.training.trainer",
    "TrainConfig": "afd_fast.config",
    "train": "afd_fast.training.trainer",
}

__all__ = ["RunResult", "TrainConfig", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

"""Black-box teachers. A teacher is a callable (prompt, seed) -> video [3, F, H, W] in [0, 1], nothing else."""

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Teacher(Protocol):
    """Prompt and seed in, a finished video out. `name` identifies it in caches, `fps` is the rate of its videos."""

    name: str
    fps: float

    def __call__(self, prompt: str, seed: int) -> Tensor: ...

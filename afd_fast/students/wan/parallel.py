"""Sequence parallelism: ranks share the tokens of every frame, and around self-attention the heads (DeepSpeed-Ulysses, Jacobs
et al. 2023). Every other operator works on a token by itself; self-attention sees all tokens with a rank's share of the
heads, whose keys and values are all that its cache holds. One exchange before attention, one after it.

Inputs and outputs of a forward are whole, and equal on all ranks of the group. Gradients of parameters are a rank's share:
they add up over the group.

Legend: B samples, F frames, N tokens per frame, P ranks, n = N / P, H heads, h = H / P, d head width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _exchange(parts: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """Part i [P, ...] goes to rank i; part i of the result is rank i's."""
    out = torch.empty_like(parts, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, parts.contiguous(), group=group)
    return out


class _Linear(torch.autograd.Function):
    """A linear function across ranks and its adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, apply: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.both = (apply, adjoint)
        return apply(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        apply, adjoint = ctx.both
        return _Linear.apply(grad, adjoint, apply), None, None


class SequenceSplit:
    """A rank's share of tokens and heads. Raises ValueError where they cannot be shared evenly."""

    def __init__(self, group: "dist.ProcessGroup", heads: int):
        self.group, self.ranks, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        if heads % self.ranks:
            raise ValueError(f"{self.ranks} ranks cannot share {heads} heads: use a number of ranks that divides them")
        self.heads = heads // self.ranks

    def __deepcopy__(self, memo: Any) -> "SequenceSplit":
        return self  # a process group is not copied with a student

    def check(self, height: int, width: int) -> None:
        """ValueError for frames of height x width tokens that cannot be shared."""
        if height * width % self.ranks:
            raise ValueError(
                f"{self.ranks} ranks cannot share the {height * width} tokens of a frame ({height}x{width}): use a number of "
                "ranks that divides them"
            )

    def own(self, x: Tensor, frames: int) -> Tensor:
        """[B, F N, C] -> this rank's tokens of every frame [B, F n, C]."""
        return _Linear.apply(x, lambda x: self._own(x, frames), lambda x: self._all(x, frames))

    def whole(self, x: Tensor, frames: int) -> Tensor:
        """[B, F n, C] of every rank -> [B, F N, C]."""
        return _Linear.apply(x, lambda x: self._all(x, frames), lambda x: self._own(x, frames))

    def to_heads(self, x: Tensor, frames: int) -> Tensor:
        """Own tokens with all heads [B, F n, H, d] -> all tokens with own heads [B, F N, h, d]."""
        return _Linear.apply(x, lambda x: self._to_heads(x, frames), lambda x: self._to_tokens(x, frames))

    def to_tokens(self, x: Tensor, frames: int) -> Tensor:
        """The inverse of `to_heads`."""
        return _Linear.apply(x, lambda x: self._to_tokens(x, frames), lambda x: self._to_heads(x, frames))

    def _own(self, x: Tensor, frames: int) -> Tensor:
        return x.unflatten(1, (frames, self.ranks, -1))[:, :, self.rank].flatten(1, 2)

    def _all(self, x: Tensor, frames: int) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.ranks)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.stack([part.unflatten(1, (frames, -1)) for part in parts], 2).flatten(1, 3)

    def _to_heads(self, x: Tensor, frames: int) -> Tensor:
        parts = x.unflatten(2, (self.ranks, self.heads)).unflatten(1, (frames, -1))  # [B, F, n, P, h, d]
        return _exchange(parts.movedim(3, 0), self.group).movedim(0, 2).flatten(1, 3)

    def _to_tokens(self, x: Tensor, frames: int) -> Tensor:
        parts = x.unflatten(1, (frames, self.ranks, -1))  # [B, F, P, n, h, d]
        return _exchange(parts.movedim(2, 0), self.group).movedim(0, 3).flatten(3, 4).flatten(1, 2)

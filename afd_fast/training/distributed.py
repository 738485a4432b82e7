"""Data parallel training under torchrun: ranks share out the batch's shards and agree on gradients and rewards.

A shard draws its own random numbers, so a run with `shards = n` is the same run on 1, 2 ... n ranks: with two of
them bit for bit, with more to the rounding of a sum in another order.
"""

import os
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from afd_fast.config import ConfigError


@dataclass(frozen=True)
class Ranks:
    """This process among those of the job; alone by default."""

    rank: int = 0
    world: int = 1

    @property
    def lead(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def share(self, shards: int) -> range:
        """The shards of this rank. ConfigError when they cannot be shared out evenly."""
        if shards % self.world:
            raise ConfigError(f"shards={shards} cannot be shared by {self.world} processes: set shards={self.world}")
        each = shards // self.world
        return range(self.rank * each, (self.rank + 1) * each)

    def gather(self, prompts: list[str], rewards: Tensor) -> tuple[list[str], Tensor]:
        """Everybody's prompts and rewards [b], in the order of the shards: once a step, names with numbers."""
        if self.world == 1:
            return prompts, rewards
        everybody: list = [None] * self.world
        dist.all_gather_object(everybody, (prompts, rewards.cpu()))
        return [p for names, _ in everybody for p in names], torch.cat([r for _, r in everybody]).to(rewards.device)

    def sum_gradients(self, parameters) -> None:
        """Add up the gradients of all ranks, in place, in one message."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.world == 1 or not gradients:
            return
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for g, summed in zip(gradients, flat.split([g.numel() for g in gradients])):
            g.copy_(summed.view_as(g))

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Every value averaged over the ranks."""
        if self.world == 1:
            return values
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=_device())
        dist.all_reduce(total)
        return dict(zip(values, (total / self.world).tolist()))

    def any(self, flag: bool) -> bool:
        """Whether it is true on some rank."""
        return self.mean({"flag": float(flag)})["flag"] > 0

    @contextmanager
    def lead_first(self):
        """The lead goes through the block alone, then the others."""
        if not self.lead:
            dist.barrier()
        yield
        if self.lead and self.world > 1:
            dist.barrier()


def _device() -> str:
    return f"cuda:{torch.cuda.current_device()}" if dist.get_backend() == "nccl" else "cpu"


@contextmanager
def job():
    """This process's Ranks in the job torchrun started (NCCL with a GPU for each process, gloo without); alone otherwise."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Ranks()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()

"""Data parallel training under torchrun: ranks share out the batch's shards and agree on gradients and rewards.

A shard draws its own random numbers, so a run with `shards = n` is the same run on 1, 2 ... n ranks: with two of
them bit for bit, with more to the rounding of a sum in another order.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from afd_fast.errors import ConfigError, TrainingError
from afd_fast.students.student import StudentModule

PATIENCE = timedelta(days=30)  # for rank 0's work alone; torchrun ends a job whose rank 0 died


@dataclass(frozen=True)
class Ranks:
    """This process among those of the job; alone by default. patient: a group that waits for PATIENCE where the default
    one, after 10 or 30 minutes, takes its peers for dead. split: successive ranks that work on a shard together, each with
    its share of the student's tokens (`StudentModule.split_sequence`); peers: their group."""

    rank: int = 0
    world: int = 1
    patient: dist.ProcessGroup | None = None
    split: int = 1
    peers: dist.ProcessGroup | None = None

    @property
    def groups(self) -> int:
        """Ranks that have shards of their own."""
        return self.world // self.split

    def together(self, split: int) -> "Ranks":
        """The same with `split` ranks on a shard; alone, a shard needs no help. ConfigError where they do not divide."""
        if split == 1 or self.world == 1:
            return self
        if self.world % split:
            raise ConfigError(
                f"sequence_parallel={split} cannot be formed by {self.world} processes: start a multiple of {split}"
            )
        peers, _ = dist.new_subgroups(split)
        return replace(self, split=split, peers=peers)

    @property
    def lead(self) -> bool:
        """Whether this is rank 0, which evaluates, writes files and logs."""
        return self.rank == 0

    def split_sequence(self, height: int, width: int, *students: StudentModule | None) -> None:
        """Let the ranks of a group share the students' tokens, of latents of height x width. ConfigError where they cannot."""
        for student in students:
            if self.split > 1 and student is not None:
                try:
                    student.split_sequence(self.peers, height, width)
                except ValueError as error:
                    raise ConfigError(f"sequence_parallel={self.split}: {error}") from None

    def share(self, shards: int) -> range:
        """The shards of this rank. ConfigError when they cannot be shared out evenly."""
        if shards % self.groups:
            who = f"{self.world} processes" if self.split == 1 else f"{self.groups} groups of {self.split} processes"
            raise ConfigError(f"shards={shards} cannot be shared by {who}: set shards={self.groups}")
        each, group = shards // self.groups, self.rank // self.split
        return range(group * each, (group + 1) * each)

    def gather(self, prompts: list[str], rewards: Tensor) -> tuple[list[str], Tensor]:
        """Everybody's prompts and rewards [b], in the order of the shards: once per step, names with numbers."""
        if self.world == 1:
            return prompts, rewards
        everybody: list = [None] * self.world
        dist.all_gather_object(everybody, (prompts, rewards.cpu()))
        leads = everybody[:: self.split]  # its peers have the same
        return [p for names, _ in leads for p in names], torch.cat([r for _, r in leads]).to(rewards.device)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of all ranks, in place, in one message. FSDP has done it for parameters it shards."""
        gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
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

    def wait(self) -> None:
        """Until every rank is here, however long it takes."""
        if self.world > 1:
            dist.barrier(group=self.patient)

    def any(self, flag: bool) -> bool:
        """Whether it is true on some rank."""
        return self.mean({"flag": float(flag)})["flag"] > 0

    @contextmanager
    def lead_first(self) -> Iterator[None]:
        """Rank 0 goes through the block, then the others, however long it takes. `led`'s errors."""
        if not self.lead:
            self._hear()
        with self._telling():
            yield

    @contextmanager
    def led(self) -> Iterator[None]:
        """At the end of the block the others wait for rank 0, which may have work of its own there, however long it
        takes. Where rank 0 raises, they raise TrainingError with its message."""
        with self._telling():
            yield
        if not self.lead:
            self._hear()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Rank 0 tells the others how the block ended."""
        try:
            yield
        except BaseException as error:
            with suppress(RuntimeError):  # a peer may be what failed
                self._tell(f"rank 0 stopped: {str(error) or type(error).__name__}")
            raise
        self._tell(None)

    def _tell(self, failure: str | None) -> None:
        if self.lead and self.world > 1:
            dist.broadcast_object_list([failure], src=0, group=self.patient)

    def _hear(self) -> None:
        told: list[str | None] = [None]
        dist.broadcast_object_list(told, src=0, group=self.patient)
        if told[0] is not None:
            raise TrainingError(told[0])


def shard_parameters(model: StudentModule) -> None:
    """Split the parameters of a student over the ranks with FSDP2, block by block: each rank keeps its part, and gathers
    a block's weights for the block's forward and backward. Gradients add up over the ranks (`sum_gradients`' convention).

    Every rank has to take part in every forward then.
    """
    plan = model.shard_plan()
    for module in (*plan.blocks, model):
        sharded = fully_shard(module, ignored_params=set(plan.whole))
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sums
        sharded.set_gradient_divide_factor(1.0)
        for name in plan.methods:
            if name in dir(type(module)):
                register_fsdp_forward_method(module, name)


def local(x: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, any other tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """A sharded tensor put together (all ranks have to ask), any other tensor itself."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, of sharded ones over all ranks."""
    mine = [g.to_local() for g in gradients if isinstance(g, DTensor)]
    norm = torch.nn.utils.get_total_norm([g for g in gradients if not isinstance(g, DTensor)])
    if not mine:
        return norm
    square = torch.nn.utils.get_total_norm(mine).square()
    dist.all_reduce(square)
    return (square + norm.square()).sqrt()


def _device() -> str:
    return f"cuda:{torch.cuda.current_device()}" if dist.get_backend() == "nccl" else "cpu"


@contextmanager
def job() -> Iterator[Ranks]:
    """This process's Ranks in the job torchrun started (NCCL with a GPU per process, gloo without); alone otherwise. A
    process group that exists already is used and left alone."""
    if dist.is_initialized():
        yield _ranks()
        return
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Ranks()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield _ranks()
    finally:
        dist.destroy_process_group()


def _ranks() -> Ranks:
    rank, world = dist.get_rank(), dist.get_world_size()
    return Ranks(rank, world, dist.new_group(backend="gloo", timeout=PATIENCE) if world > 1 else None)

"""Everything a run changes, and how its random numbers are drawn."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from afd_fast.config import TrainConfig
from afd_fast.discriminators.config import new_discriminator
from afd_fast.discriminators.discriminator import Discriminator
from afd_fast.errors import CheckpointError, ConfigError
from afd_fast.reference.advantage import PerPromptStatTracker
from afd_fast.students.lora import add_lora, trainable
from afd_fast.students.student import Family, StudentModule
from afd_fast.training.distributed import local, shard_parameters

DISC_BETAS, DISC_WEIGHT_DECAY = (0.0, 0.99), 1e-3


def generator(seed: int, step: int, purpose: str, shard: int = 0) -> torch.Generator:
    """A generator that is a function of its arguments alone: resuming needs the step, nothing else."""
    entropy = [seed, step, *purpose.encode(), *([shard] if shard else [])]
    words = np.random.SeedSequence(entropy).generate_state(2)
    return torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


class Masters:
    """The trained parameters of a half-precision network in float32, in which an update of 1e-5 is not lost: what the
    optimiser and the average see. Gradients arrive in the network's dtype and add up here in float32."""

    def __init__(self, model: nn.Module):
        self.copies = trainable(model)
        self.weights = {name: nn.Parameter(p.detach().float()) for name, p in self.copies.items()}
        for name, p in self.copies.items():
            p.register_post_accumulate_grad_hook(partial(self._take, self.weights[name]))

    @staticmethod
    def _take(master: nn.Parameter, p: Tensor) -> None:
        """Move a gradient that has arrived at p to its master."""
        assert p.grad is not None
        master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
        p.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """The network's weights are the masters, rounded."""
        for name, p in self.copies.items():
            p.copy_(self.weights[name])


class EMA:
    """Exponential moving average of the trained weights."""

    def __init__(self, weights: Mapping[str, nn.Parameter], decay: float):
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in weights.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, nn.Parameter]) -> None:
        """shadow <- decay * shadow + (1 - decay) * weights."""
        for name, p in weights.items():
            self.shadow[name].lerp_(p, 1 - self.decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The averaged weights inside the block, the trained ones again after it."""
        parameters = trainable(model)
        kept = {
            name: p.data if self._swaps(p, self.shadow[name]) else p.detach().clone() for name, p in parameters.items()
        }
        self._put(parameters, self.shadow)
        try:
            yield
        finally:
            self._put(parameters, kept)

    @staticmethod
    def _swaps(p: Tensor, value: Tensor) -> bool:
        """Whether p can take the value's memory: not where FSDP gathers from p's own, nor where the value is rounded."""
        return not isinstance(p, DTensor) and p.dtype == value.dtype

    @torch.no_grad()
    def _put(self, parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
        for name, p in parameters.items():
            if self._swaps(p, self.shadow[name]):
                p.data = values[name]
            else:
                p.copy_(values[name])


class Trained(NamedTuple):
    """A network's trained parameters, their optimiser, and the optimiser's key in a checkpoint."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.AdamW
    key: str


@dataclass
class TrainState:
    """The family with its student (adapters in place), the average, discriminator, optimisers, reward statistics,
    iterations done. reference: the frozen initial student where there are no adapters to switch off. masters: of a
    half-precision student that is trained itself."""

    family: Family
    ema: EMA
    optimizer: torch.optim.AdamW
    discriminator: Discriminator
    disc_optimizer: torch.optim.AdamW
    tracker: PerPromptStatTracker
    reference: StudentModule | None = None
    masters: Masters | None = None
    pair_r: list[float] = field(default_factory=list)  # of the last iterations, for the trainer's watch
    step: int = 0

    @property
    def student(self) -> StudentModule:
        return self.family.student

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The student's trained weights as the optimiser sees them."""
        return trainable(self.student) if self.masters is None else self.masters.weights

    def publish(self) -> None:
        """Bring what has changed in `weights` to the student."""
        if self.masters is not None:
            self.masters.publish()

    def trained(self) -> dict[str, Trained]:
        """By the network's name in a checkpoint."""
        return {
            "student": Trained(self.weights, self.optimizer, "optimizer"),
            "discriminator": Trained(trainable(self.discriminator), self.disc_optimizer, "disc_optimizer"),
        }

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values: what a checkpoint holds. What is not trained is not in it. An optimiser's state is
        by parameter name; there is none before its first step."""
        saved: dict[str, Any] = {"step": self.step, "pair_r": self.pair_r, "ema": self.ema.shadow}
        saved["disc_lr"] = self.disc_optimizer.param_groups[0]["lr"]
        for name, (parameters, optimizer, key) in self.trained().items():
            saved[name] = {n: p.detach() for n, p in parameters.items()}
            saved[key] = {n: dict(optimizer.state[p]) for n, p in parameters.items() if p in optimizer.state}
        return saved

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Inverse of `state_dict`. CheckpointError when the parameters do not match."""
        if missing := sorted(self.state_dict().keys() - saved.keys()):
            raise CheckpointError(
                f"the checkpoint lacks {', '.join(missing)}: another version of afd_fast wrote it. Finish the run with "
                "that version, or start it again with --overwrite"
            )
        for name, (parameters, optimizer, key) in self.trained().items():
            if parameters.keys() != saved[name].keys():
                odd = sorted(parameters.keys() ^ saved[name].keys())
                raise CheckpointError(f"the checkpoint belongs to another configuration: {odd[:3]} ... do not match")
            for n, p in parameters.items():
                p.copy_(saved[name][n])
                if n in saved[key]:
                    optimizer.state[p] = {k: x.to(p.device) if x.ndim else x for k, x in saved[key][n].items()}
        self.publish()
        for name, average in self.ema.shadow.items():
            average.copy_(saved["ema"][name])
        for group in self.disc_optimizer.param_groups:
            group["lr"] = saved["disc_lr"]
        self.step, self.pair_r = saved["step"], list(saved["pair_r"])

    def not_finite(self) -> str | None:
        """The name of a tensor of this rank that is not finite, None where all are."""

        def walk(name: str, value: Any) -> Iterator[str]:
            if isinstance(value, dict):
                for key, inner in value.items():
                    yield from walk(f"{name}.{key}" if name else key, inner)
            elif isinstance(value, Tensor) and not local(value).isfinite().all():
                yield name

        return next(walk("", self.state_dict()), None)

    def blank(self, keys: set[str]) -> dict[str, Any]:
        """A `state_dict` to read a sharded checkpoint into; keys: its flattened names, which tell which optimiser has
        taken a step."""
        empty = self.state_dict()
        for parameters, _, key in self.trained().values():
            stepped = any(k.startswith(f"state.{key}.") for k in keys)
            empty[key] = {n: _blank_moments(p.detach()) for n, p in parameters.items()} if stepped else {}
        return empty


def _blank_moments(p: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a parameter before its first step."""
    return {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def new_state(config: TrainConfig, family: Family, discriminator: Discriminator | None = None) -> TrainState:
    """A fresh run; deterministic in config.seed. The family's student gets its adapters; with student.lora_rank=0 all
    of it is trained: it computes in its dtype, its `Masters` are float32. discriminator: in place of the one that the
    configuration names."""
    torch.manual_seed(config.seed)
    student, rank, reference, masters = family.student, config.student.lora_rank, None, None
    config.check_stream(family.latents.frames)
    if rank and not family.lora_targets:
        raise ConfigError(f"the family {family.name!r} names no layers for adapters: set student.lora_rank=0")
    half = not rank and all(p.dtype.itemsize == 2 for p in student.parameters())
    if rank:
        add_lora(student, rank, list(family.lora_targets))
    else:
        reference = copy.deepcopy(student if half else student.float()).requires_grad_(False)
        student.requires_grad_()
    if config.fsdp and dist.is_initialized():
        for module in (student, reference):
            if module is not None:
                shard_parameters(module)
    if half:
        masters = Masters(student)
    weights = trainable(student) if masters is None else masters.weights
    update, critic = config.update, config.discriminator
    discriminator = discriminator or new_discriminator(critic, family.video, family.device)
    return TrainState(
        family=family,
        ema=EMA(weights, update.ema),
        optimizer=torch.optim.AdamW(
            groups(weights), update.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=update.weight_decay
        ),
        discriminator=discriminator,
        disc_optimizer=torch.optim.AdamW(
            trainable(discriminator).values(), critic.lr, betas=DISC_BETAS, weight_decay=DISC_WEIGHT_DECAY
        ),
        tracker=PerPromptStatTracker(config.global_std),
        reference=reference,
        masters=masters,
    )


def groups(parameters: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Parameter groups of an optimiser: sharded tensors and others do not mix in one."""
    sharded = [p for p in parameters.values() if isinstance(p, DTensor)]
    others = [p for p in parameters.values() if not isinstance(p, DTensor)]
    return [{"params": group} for group in (sharded, others) if group]

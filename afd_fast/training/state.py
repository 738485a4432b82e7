"""Everything a run is made of, and how its random numbers are drawn."""

from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from afd_fast.config import TrainConfig
from afd_fast.models.toy import ToyDiscriminator, ToyStudent
from afd_fast.reference.advantage import PerPromptStatTracker
from afd_fast.training.lora import add_lora, trainable

LORA_TARGETS = ["qkv", "proj", "up", "down"]


def generator(seed: int, step: int, purpose: str) -> torch.Generator:
    """A generator that is a function of (seed, step, purpose) alone: resuming needs the step, nothing else."""
    words = np.random.SeedSequence([seed, step, *purpose.encode()]).generate_state(2)
    return torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


class EMA:
    """Exponential moving average of the trained parameters."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in trainable(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """shadow <- decay * shadow + (1 - decay) * parameters."""
        for name, p in trainable(model).items():
            self.shadow[name].lerp_(p, 1 - self.decay)

    @contextmanager
    def applied(self, model: nn.Module):
        """The averaged weights inside the block, the trained ones again after it."""
        parameters = trainable(model)
        kept = {name: p.data for name, p in parameters.items()}
        for name, p in parameters.items():
            p.data = self.shadow[name]
        try:
            yield
        finally:
            for name, p in parameters.items():
                p.data = kept[name]


@dataclass
class TrainState:
    """Student (with adapters), its average, discriminator, optimisers, reward statistics, iterations done."""

    student: ToyStudent
    ema: EMA
    optimizer: torch.optim.Optimizer
    discriminator: ToyDiscriminator
    disc_optimizer: torch.optim.Optimizer
    tracker: PerPromptStatTracker
    step: int = 0

    def parts(self) -> dict:
        return {
            "optimizer": self.optimizer, "discriminator": self.discriminator, "disc_optimizer": self.disc_optimizer
        }  # fmt: skip

    def state_dict(self) -> dict:
        """Tensors and plain values: what a checkpoint holds. The base student is not trained and not in it."""
        return {
            "step": self.step,
            "student": {name: p.detach() for name, p in trainable(self.student).items()},
            "ema": self.ema.shadow,
            **{name: part.state_dict() for name, part in self.parts().items()},
        }

    @torch.no_grad()
    def load_state_dict(self, saved: dict) -> None:
        """Inverse of `state_dict`; ValueError when the parameters do not match."""
        parameters = trainable(self.student)
        if parameters.keys() != saved["student"].keys():
            odd = sorted(parameters.keys() ^ saved["student"].keys())
            raise ValueError(f"the checkpoint belongs to another configuration: {odd[:3]} ... do not match")
        for name, p in parameters.items():
            p.copy_(saved["student"][name])
            self.ema.shadow[name].copy_(saved["ema"][name])
        for name, part in self.parts().items():
            part.load_state_dict(saved[name])
        self.step = saved["step"]


def new_state(config: TrainConfig, base: ToyStudent) -> TrainState:
    """A fresh run from the base student; deterministic in config.seed."""
    torch.manual_seed(config.seed)
    if config.lora_rank:
        add_lora(base, config.lora_rank, LORA_TARGETS)
    discriminator = ToyDiscriminator(base.config, config.disc_width)
    return TrainState(
        student=base,
        ema=EMA(base, config.ema),
        optimizer=torch.optim.AdamW(
            trainable(base).values(), config.student_lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=config.weight_decay
        ),
        discriminator=discriminator,
        disc_optimizer=torch.optim.AdamW(
            discriminator.parameters(), config.disc_lr, betas=(0.0, 0.99), weight_decay=1e-3
        ),
        tracker=PerPromptStatTracker(config.global_std),
    )

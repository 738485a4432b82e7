"""Everything a run is made of, and how its random numbers are drawn."""

import json
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from afd_fast.config import TrainConfig
from afd_fast.models.toy import ToyDiscriminator, ToyStudent, decode_video, encode_video, tokenize
from afd_fast.reference.advantage import PerPromptStatTracker
from afd_fast.teachers import physics
from afd_fast.training.lora import add_lora, trainable


def generator(seed: int, step: int, purpose: str, shard: int = 0) -> torch.Generator:
    """A generator that is a function of its arguments alone: resuming needs the step, nothing else."""
    entropy = [seed, step, *purpose.encode(), *([shard] if shard else [])]
    words = np.random.SeedSequence(entropy).generate_state(2)
    return torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


@dataclass
class System:
    """The networks a run trains, and what lies between prompts, latents and pixels."""

    student: nn.Module  # the call surface of CausalWan
    new_discriminator: Callable[[TrainConfig], nn.Module]  # with score(videos, prompts) -> [B]
    encode: Callable[[list[str]], Any]  # prompts -> what student.encode_text takes
    decode: Callable[[Tensor], Tensor]  # latents [B, C, F, H, W] -> pixels in [0, 1]; differentiable
    encode_video: Callable[[Tensor], Tensor]  # pixels -> latents
    shape: tuple[int, int, int, int]  # C, F, H, W of the latents
    chunk: int  # latent frames generated together
    video: tuple[int, int, int]  # F, H, W of the pixels
    fps: float
    save: Callable[[dict[str, Tensor], dict, Path], None]  # (the student's own weights, facts, run folder) -> files
    lora_targets: list[str]  # linear layers that get adapters


def toy_system(student: ToyStudent) -> System:
    """The embedded task: a small student whose latents are pixels."""
    c = student.config
    return System(
        student=student,
        new_discriminator=lambda config: ToyDiscriminator(c, config.disc_width),
        encode=lambda prompts: tokenize(prompts, c.text_len),
        decode=decode_video,
        encode_video=encode_video,
        shape=(3, c.frames, c.height, c.width),
        chunk=c.chunk,
        video=(c.frames, c.height, c.width),
        fps=physics.FPS,
        save=lambda weights, about, folder: save_file(
            weights, folder / "student.safetensors", {"config": json.dumps(asdict(c)), "run": json.dumps(about)}
        ),
        lora_targets=["qkv", "proj", "up", "down"],
    )


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
    """The system with its student (adapters in place), the average, discriminator, optimisers, reward statistics,
    iterations done."""

    system: System
    ema: EMA
    optimizer: torch.optim.Optimizer
    discriminator: nn.Module
    disc_optimizer: torch.optim.Optimizer
    tracker: PerPromptStatTracker
    step: int = 0

    @property
    def student(self) -> nn.Module:
        return self.system.student

    def parts(self) -> dict:
        return {
            "optimizer": self.optimizer, "disc_optimizer": self.disc_optimizer
        }  # fmt: skip

    def state_dict(self) -> dict:
        """Tensors and plain values: what a checkpoint holds. What is not trained is not in it."""
        return {
            "step": self.step,
            "student": {name: p.detach() for name, p in trainable(self.student).items()},
            "ema": self.ema.shadow,
            "discriminator": {name: p.detach() for name, p in trainable(self.discriminator).items()},
            **{name: part.state_dict() for name, part in self.parts().items()},
        }

    @torch.no_grad()
    def load_state_dict(self, saved: dict) -> None:
        """Inverse of `state_dict`; ValueError when the parameters do not match."""
        for key, parameters in (("student", trainable(self.student)), ("discriminator", trainable(self.discriminator))):
            if parameters.keys() != saved[key].keys():
                odd = sorted(parameters.keys() ^ saved[key].keys())
                raise ValueError(f"the checkpoint belongs to another configuration: {odd[:3]} ... do not match")
            for name, p in parameters.items():
                p.copy_(saved[key][name])
        for name, average in self.ema.shadow.items():
            average.copy_(saved["ema"][name])
        for name, part in self.parts().items():
            part.load_state_dict(saved[name])
        self.step = saved["step"]


def new_state(config: TrainConfig, system: System) -> TrainState:
    """A fresh run; deterministic in config.seed. The system's student gets its adapters."""
    torch.manual_seed(config.seed)
    student = system.student
    if config.lora_rank:
        add_lora(student, config.lora_rank, system.lora_targets)
    discriminator = system.new_discriminator(config)
    return TrainState(
        system=system,
        ema=EMA(student, config.ema),
        optimizer=torch.optim.AdamW(
            trainable(student).values(),
            config.student_lr,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=config.weight_decay,
        ),
        discriminator=discriminator,
        disc_optimizer=torch.optim.AdamW(
            trainable(discriminator).values(), config.disc_lr, betas=(0.0, 0.99), weight_decay=1e-3
        ),
        tracker=PerPromptStatTracker(config.global_std),
    )

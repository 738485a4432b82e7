"""Everything a run is made of, and how its random numbers are drawn."""

import copy
import json
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from afd_fast.config import TrainConfig
from afd_fast.discriminators.toy import ToyDiscriminator
from afd_fast.reference.advantage import PerPromptStatTracker
from afd_fast.students.lora import add_lora, trainable
from afd_fast.students.toy.model import ToyStudent, decode_video, encode_video
from afd_fast.students.toy.text import tokenize
from afd_fast.teachers import physics
from afd_fast.training.distributed import shard_parameters


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
    # (the student's own weights with adapters merged, the adapters by themselves, facts, run folder) -> files
    save: Callable[[dict[str, Tensor], dict[str, Tensor], dict, Path], None]
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
        save=lambda weights, adapters, about, folder: save_file(
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
        kept = {name: p.detach().clone() if isinstance(p, DTensor) else p.data for name, p in parameters.items()}
        self._put(parameters, self.shadow)
        try:
            yield
        finally:
            self._put(parameters, kept)

    @staticmethod
    @torch.no_grad()
    def _put(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
        for name, p in parameters.items():
            if isinstance(p, DTensor):  # FSDP gathers from this very memory
                p.copy_(values[name])
            else:
                p.data = values[name]


@dataclass
class TrainState:
    """The system with its student (adapters in place), the average, discriminator, optimisers, reward statistics,
    iterations done. reference: the frozen initial student where there are no adapters to switch off."""

    system: System
    ema: EMA
    optimizer: torch.optim.AdamW
    discriminator: nn.Module
    disc_optimizer: torch.optim.AdamW
    tracker: PerPromptStatTracker
    reference: nn.Module | None = None
    pair_r: list[float] = field(default_factory=list)  # of the last iterations, for the trainer's watch
    step: int = 0

    @property
    def student(self) -> nn.Module:
        return self.system.student

    def trained(self) -> dict[str, tuple[dict[str, nn.Parameter], torch.optim.AdamW, str]]:
        """Name -> (trained parameters, their optimiser, its key in a checkpoint)."""
        return {
            "student": (trainable(self.student), self.optimizer, "optimizer"),
            "discriminator": (trainable(self.discriminator), self.disc_optimizer, "disc_optimizer"),
        }

    def state_dict(self) -> dict:
        """Tensors and plain values: what a checkpoint holds. What is not trained is not in it. An optimiser's state is
        by parameter name; there is none before its first step."""
        saved = {"step": self.step, "pair_r": self.pair_r, "ema": self.ema.shadow}
        saved["disc_lr"] = self.disc_optimizer.param_groups[0]["lr"]
        for name, (parameters, optimizer, key) in self.trained().items():
            saved[name] = {n: p.detach() for n, p in parameters.items()}
            saved[key] = {n: dict(optimizer.state[p]) for n, p in parameters.items() if p in optimizer.state}
        return saved

    @torch.no_grad()
    def load_state_dict(self, saved: dict) -> None:
        """Inverse of `state_dict`; ValueError when the parameters do not match."""
        if missing := sorted(self.state_dict().keys() - saved.keys()):
            raise ValueError(
                f"the checkpoint lacks {', '.join(missing)}: another version of afd_fast wrote it. Finish the run with that "
                "version, or start it again with --overwrite"
            )
        for name, (parameters, optimizer, key) in self.trained().items():
            if parameters.keys() != saved[name].keys():
                odd = sorted(parameters.keys() ^ saved[name].keys())
                raise ValueError(f"the checkpoint belongs to another configuration: {odd[:3]} ... do not match")
            for n, p in parameters.items():
                p.copy_(saved[name][n])
                if n in saved[key]:
                    optimizer.state[p] = {k: x.to(p.device) if x.ndim else x for k, x in saved[key][n].items()}
        for name, average in self.ema.shadow.items():
            average.copy_(saved["ema"][name])
        for group in self.disc_optimizer.param_groups:
            group["lr"] = saved["disc_lr"]
        self.step, self.pair_r = saved["step"], list(saved["pair_r"])

    def blank(self, keys: set[str]) -> dict:
        """A `state_dict` to read a sharded checkpoint into; keys: its flattened names, which tell which optimiser has
        taken a step."""
        empty = self.state_dict()
        for parameters, _, key in self.trained().values():
            zeros = lambda p: {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
            stepped = any(k.startswith(f"state.{key}.") for k in keys)
            empty[key] = {n: zeros(p.detach()) for n, p in parameters.items()} if stepped else {}
        return empty


def new_state(config: TrainConfig, system: System) -> TrainState:
    """A fresh run; deterministic in config.seed. The system's student gets its adapters; with lora_rank=0 all of it is
    trained, in float32."""
    torch.manual_seed(config.seed)
    student, reference = system.student, None
    if config.lora_rank:
        add_lora(student, config.lora_rank, system.lora_targets)
    else:
        reference = copy.deepcopy(student.float()).requires_grad_(False)
        student.requires_grad_()
    if config.fsdp and dist.is_initialized():
        for module in (student, reference):
            if module is not None:
                shard_parameters(module)
    discriminator = system.new_discriminator(config)
    return TrainState(
        system=system,
        ema=EMA(student, config.ema),
        optimizer=torch.optim.AdamW(
            groups(trainable(student)),
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
        reference=reference,
    )


def groups(parameters: dict[str, nn.Parameter]) -> list[dict]:
    """Parameter groups of an optimiser: sharded tensors and others do not mix in one."""
    sharded = [p for p in parameters.values() if isinstance(p, DTensor)]
    others = [p for p in parameters.values() if not isinstance(p, DTensor)]
    return [{"params": group} for group in (sharded, others) if group]

"""The configuration of a training run: one frozen dataclass, flat keys, `key=value` overrides."""

import types
import typing
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches

from afd_fast.errors import ConfigError

CHOICES = {
    "method": ("afd", "sft", "gan", "dmd", "rejection"),
    "v_old": ("ema", "self"),
    "t_sampling": ("grid", "uniform"),
    "disc_loss": ("bt", "gan"),
    "update": ("detached", "teacher_forcing", "block_causal"),
}


@dataclass(frozen=True)
class TrainConfig:
    """A run of AFD (Algorithm 1) or of a baseline. Defaults are the demo's; `afd_fast.training.runs` holds the named runs.

    Units: learning rates per step, `steps` in 0..1000, `ema` and `beta` in 0..1.
    """

    name: str = "demo"
    method: str = "afd"  # or a baseline of afd_fast/training/baselines.py: "sft", "gan", "dmd", "rejection"
    seed: int = 0
    iterations: int = 300
    # data
    teacher: str = "physics"  # or "folder:PATH" (with manifest.csv or manifest.jsonl), "api:FILE" (docs/teachers.md)
    teacher_clips: int = 4  # finished videos bought per prompt
    prompts_per_step: int = 12
    rollouts_per_prompt: int = 8  # K; with K = 1 every advantage is 0
    fsdp: bool = False  # under torchrun: the student's parameters are split over the ranks, checkpoints are DCP folders
    shards: int = 1  # parts of the batch with random numbers of their own: worked on one by one, shared by the ranks
    codec_crf: int | None = None  # H.264 quality both sides pass through before the discriminator; None: 8-bit only
    # networks
    student: str = "toy"  # "toy", "tiny" (a random CausalWan, to try things) or a checkpoint for `load_student`
    discriminator: str = "toy"  # "toy", or a folder or repository of VideoAlign's VideoReward
    wan_base: str = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"  # where a Wan student's text encoder and VAE come from
    frames: int = 21  # latent frames, height and width of a Wan student's videos
    height: int = 60
    width: int = 104
    chunk: int = 3  # latent frames a Wan student generates together
    # rollout
    stream: int | None = None  # latent frames of a long rollout, of which `frames` at a time are trained and judged
    active_clips: int = 1  # of `frames` each that are trained together at a random place of the stream
    window: int | None = None  # latent frames a chunk attends to (a rolling cache), `sink` first ones always among them
    sink: int = 0
    steps: tuple[float, ...] = (1000, 750, 500, 250)
    shift: float = 1.0
    # student update
    recipe: str = "diffusionnft"  # a name of afd_fast.nft_recipe
    v_old: str = "ema"  # "ema": the lagged policy collects and interpolates; "self": stop-gradient of v (Eq. 4)
    beta: float = 0.1
    prior_weight: float = 3e-3  # lambda_prior
    adv_clip: float = 5.0
    global_std: bool = False  # True (Table 3) lets the spread of D between prompts shrink every advantage
    update: str = "detached"  # the sampling function; "teacher_forcing": with the history's gradient; "block_causal"
    ref_every: int = 1  # v_ref every n-th iteration, its weight times n
    gradient_checkpointing: bool = False  # of a Wan student, with update="teacher_forcing" or "block_causal"
    chunked_update: bool = False  # backward chunk by chunk: one chunk's activations in memory, not all
    update_batch: int | None = None  # rows a backward; None: all of a shard's
    t_sampling: str = "grid"  # "grid": the sampler's own steps; "uniform": U(0, 1)
    student_lr: float = 3e-3
    lr_decay: bool = True  # cosine to 5 %
    weight_decay: float = 1e-4
    grad_norm: float = 1.0
    lora_rank: int = 16  # 0: every weight is trained, in float32, and v_ref comes from a frozen copy
    ema: float = 0.9
    # discriminator
    disc_loss: str = "bt"  # "bt": Bradley-Terry (Eq. 1); "gan": the binary loss of the ablation
    disc_lr: float = 2e-4
    disc_lr_auto: bool = False  # doubled where the discriminator is stale, halved where it overpowers (Figure 5)
    disc_steps: int = 1  # per iteration
    disc_warmup: int = 20  # discriminator-only iterations before the first student update
    disc_width: int = 48  # of the toy discriminator
    disc_device: str | None = None  # of a Wan student's discriminator, "cuda:1" say; None: the student's
    disc_lora_rank: int = 64  # of VideoReward's adapters
    instance_noise: float = 0.3
    r1: float = 0.1
    # bookkeeping
    eval_every: int = 50
    eval_rollouts: int = 16  # per held-out prompt
    eval_batch: int | None = None  # of them at a time; None: all
    checkpoint_every: int = 50
    shuffle_rewards: bool = False  # the control: advantages permuted across the batch

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                known = " or ".join(f'"{choice}"' for choice in choices)
                raise ConfigError(f"{name} must be {known}, got {getattr(self, name)!r}")
        if self.chunked_update and self.update != "detached":
            raise ConfigError(f'chunked_update needs update="detached", not {self.update!r}')
        if self.stream is not None and (self.stream % self.frames or self.method != "afd"):
            raise ConfigError(f"stream={self.stream} must be a multiple of frames={self.frames}, with method=afd")
        if self.active_clips < 1 or self.active_clips * self.frames > (self.stream or self.frames):
            raise ConfigError(
                f"active_clips={self.active_clips} of frames={self.frames} do not fit stream={self.stream}"
            )
        if self.update_batch is not None and self.update_batch < 1:
            raise ConfigError(f"update_batch must be at least 1, got {self.update_batch}")
        if self.rollouts_per_prompt < 2:
            raise ConfigError("rollouts_per_prompt must be at least 2: a single rollout has advantage 0")
        if self.prompts_per_step % max(1, self.shards):
            raise ConfigError(f"shards={self.shards} must divide prompts_per_step={self.prompts_per_step}")
        for name in (
            "iterations",
            "prompts_per_step",
            "shards",
            "ref_every",
            "teacher_clips",
            "eval_every",
            "checkpoint_every",
            "eval_rollouts",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


def _parse(text: str, kind) -> object:
    """'3e-4' -> the type of the field."""
    if isinstance(kind, types.UnionType):
        if text.lower() == "none":
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("true or false")
        return text.lower() == "true"
    if typing.get_origin(kind) is tuple:
        return tuple(float(part) for part in text.strip("()").split(",") if part)
    return kind(text)


def with_overrides(config: TrainConfig, overrides: list[str]) -> TrainConfig:
    """`config` with "key=value" strings applied. ConfigError for an unknown key (nearest name given) or value."""
    kinds = {f.name: f.type for f in fields(TrainConfig)}
    values = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"overrides are written key=value, got {item!r}")
        if key not in kinds:
            near = get_close_matches(key, kinds, 1)
            raise ConfigError(
                f"unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(kinds)}")
            )
        try:
            values[key] = _parse(text, kinds[key])
        except ValueError as error:
            raise ConfigError(
                f"{key}={text}: expected {getattr(kinds[key], '__name__', kinds[key])} ({error})"
            ) from error
    return replace(config, **values)


def to_dict(config: TrainConfig) -> dict:
    """JSON-ready."""
    return asdict(config)


def from_dict(values: dict) -> TrainConfig:
    """Inverse of `to_dict`, after a trip through JSON."""
    return TrainConfig(**{**values, "steps": tuple(values["steps"])})

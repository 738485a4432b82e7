"""The configuration of a training run: one frozen dataclass in parts, written `key=value` and `part.key=value`."""

import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import PurePath
from typing import Any, Literal, NamedTuple, cast

from afd_fast.discriminators.config import DiscriminatorConfig
from afd_fast.errors import ConfigError, check_at_least, check_fields, field_types, in_words
from afd_fast.reference.nft import NFTRecipe, RecipeName, nft_recipe
from afd_fast.rollout import RolloutConfig
from afd_fast.students.student import StudentConfig, entry

# method -> whether it uses a discriminator; training.methods registers more
METHOD_NAMES: dict[str, bool] = {"afd": True, "sft": False, "gan": True, "dmd": True, "rejection": True}


@dataclass(frozen=True)
class UpdateConfig:
    """How the student learns from an iteration's rollouts.

    v_old: ema (the lagged policy collects and interpolates) or self (stop-gradient of v, Eq. 4).
    history: detached (the sampling function), teacher_forcing (with the history's gradient) or block_causal (noised history).
    t_sampling: grid (the sampler's own steps) or uniform, U(0.04, 1).
    ref_every: iterations per computation of v_ref, whose weight is multiplied by as much.
    chunked: backward chunk by chunk, with one chunk's activations in memory.
    batch: rows per backward; none: all of a shard's.
    lr: learning rate of AdamW.
    lr_decay: cosine decay of lr to 5 %.
    weight_decay: of AdamW.
    grad_norm: the gradient's norm is clipped to it.
    ema: decay of the averaged student.
    """

    v_old: Literal["ema", "self"] = "ema"
    history: Literal["detached", "teacher_forcing", "block_causal"] = "detached"
    t_sampling: Literal["grid", "uniform"] = "grid"
    ref_every: int = 1
    chunked: bool = False
    batch: int | None = None
    lr: float = 3e-3
    lr_decay: bool = True
    weight_decay: float = 1e-4
    grad_norm: float = 1.0
    ema: float = 0.9

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, 1, "ref_every", "batch")
        check_at_least(self, 0, "lr", "weight_decay")
        if not 0 < self.grad_norm:
            raise ConfigError(f"grad_norm must be positive, got {self.grad_norm}")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema must be in [0, 1), got {self.ema}")
        if self.chunked and self.history != "detached":
            raise ConfigError(f'chunked needs history="detached", got {self.history!r}')


@dataclass(frozen=True)
class StreamConfig:
    """Training on parts of rollouts that are longer than a teacher's video.

    frames: latent frames of the whole rollout, a multiple of the student's; none: no streaming.
    active_clips: clips of the student's length that are trained and judged together, at a random place of the stream.
    """

    frames: int | None = None
    active_clips: int = 1

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, 1, "frames", "active_clips")


@dataclass(frozen=True)
class EvaluationConfig:
    """When and how the student is judged on held-out prompts.

    every: iterations between evaluations.
    rollouts: student clips per held-out prompt.
    batch: clips that are made, and seen by the discriminator, at a time; none: all.
    """

    every: int = 50
    rollouts: int = 16
    batch: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, 1, "every", "rollouts", "batch")


@dataclass(frozen=True)
class TrainConfig:
    """A run of AFD (Algorithm 1) or of a baseline. Defaults are the demo's; `afd_fast.training.runs` holds the named runs.

    name: of the run, for its folder and reports.
    method: afd, or a baseline: sft, gan, dmd, rejection.
    seed: of every random number of the run.
    iterations: updates of the student, warm-up included.
    teacher: physics, physics:dusk, lights, folder:PATH (with manifest.csv or manifest.jsonl), api:FILE (docs/teachers.md), a registered one, or several, [a,b].
    teacher_clips: finished videos asked for per prompt.
    teacher_prompts: training prompts, the teacher's first ones; none: all.
    prompts_per_step: prompts per iteration.
    rollouts_per_prompt: K, rollouts per prompt, at least 2.
    teacher_r: optimality in (0.5, 1] of a clip of the teacher that each prompt's K rollouts are joined by in the update; none: none is.
    shards: parts of the batch, each with its own random numbers, worked on one by one and shared by the ranks.
    fsdp: under torchrun, split the student's parameters over the ranks; checkpoints are DCP folders.
    sequence_parallel: under torchrun, ranks that work on a shard together, each with its share of the student's tokens and heads.
    codec_crf: H.264 quality that both sides pass through before the discriminator; none: rounding to 8 bits only.
    global_std: divide advantages by the standard deviation over the batch (Table 3) rather than per prompt.
    shuffle_rewards: the control: advantages permuted across the batch.
    checkpoint_every: iterations between checkpoints.
    logger: tensorboard (files in the run's folder), or wandb (Weights & Biases in addition; needs the extra [wandb]).
    """

    name: str = "demo"
    method: str = "afd"
    seed: int = 0
    iterations: int = 300
    teacher: str = "physics"
    teacher_clips: int = 4
    teacher_prompts: int | None = None
    prompts_per_step: int = 6
    rollouts_per_prompt: int = 8
    teacher_r: float | None = None
    shards: int = 1
    fsdp: bool = False
    sequence_parallel: int = 1
    codec_crf: int | None = None
    global_std: bool = False
    shuffle_rewards: bool = False
    checkpoint_every: int = 50
    logger: Literal["tensorboard", "wandb"] = "tensorboard"
    student: StudentConfig = StudentConfig()
    rollout: RolloutConfig = RolloutConfig(shift=1.0)
    loss: NFTRecipe = field(default_factory=lambda: nft_recipe("diffusionnft", beta=0.1, ref_coef=3e-3, adv_clip=5.0))
    update: UpdateConfig = UpdateConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig(r1=0.1, instance_noise=0.3)
    evaluation: EvaluationConfig = EvaluationConfig()
    stream: StreamConfig = StreamConfig()

    def _check_loss(self) -> None:
        """Training sums the loss over chunks and clips, which only a loss that is a sum over them allows."""
        loss = self.loss
        for key, given, usual in (
            ("space", loss.space == "clean", '"v" or "x0"'), ("form", loss.form != "mse", '"mse"'),
            ("drift_clip", loss.drift_clip is not None, "none"), ("ref_reduction", loss.ref_reduction != "sample", '"sample"'),
        ):  # fmt: skip
            if given:
                raise ConfigError(
                    f"loss.{key} must be {usual} in training, which computes the loss chunk by chunk: "
                    f"{getattr(loss, key)!r} is for afd_fast.nft_loss in a trainer of your own"
                )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.method not in METHOD_NAMES:
            known = (f'"{name}"' for name in METHOD_NAMES)
            raise ConfigError(f"method must be {' or '.join(known)}, got {self.method!r}")
        check_at_least(self, 1, "iterations", "teacher_clips", "teacher_prompts", "prompts_per_step", "shards")
        check_at_least(self, 1, "sequence_parallel", "checkpoint_every")
        check_at_least(self, 0, "seed")
        if self.rollouts_per_prompt < 2:
            raise ConfigError("rollouts_per_prompt must be at least 2: a single rollout has advantage 0")
        if self.prompts_per_step % self.shards:
            raise ConfigError(f"shards={self.shards} must divide prompts_per_step={self.prompts_per_step}")
        if self.codec_crf is not None and not 0 <= self.codec_crf <= 51:
            raise ConfigError(f"codec_crf must be in 0..51, got {self.codec_crf}")
        if METHOD_NAMES[self.method] and self.discriminator.warmup >= self.iterations:
            raise ConfigError(
                f"discriminator.warmup={self.discriminator.warmup} leaves none of iterations={self.iterations} to the "
                f"student: set discriminator.warmup below {self.iterations}"
            )
        self._check_loss()
        folder = PurePath(self.name)  # in runs/
        named = self.name.strip() and self.name.isprintable() and folder.name
        if not named or ".." in folder.parts or folder.root:
            raise ConfigError(f"name must be that of a folder, since the run's is named after it, got {self.name!r}")
        if self.seed >= 2**63:
            raise ConfigError(f"seed must be below 2**63, got {self.seed}")
        self._check_family()
        if self.sequence_parallel > 1 and self.rollout.graphs:
            raise ConfigError("rollout.graphs cannot hold the exchanges of sequence_parallel: leave out one of the two")
        if self.stream.frames is not None:
            if self.rollout.graphs:
                raise ConfigError(
                    "rollout.graphs cannot replay a stream's continuations: leave out one of it and stream.frames"
                )
            if self.method != "afd":
                raise ConfigError(f"stream.frames={self.stream.frames} needs method=afd, got method={self.method}")
            if self.update.history != "detached":
                raise ConfigError(f"stream.frames needs update.history=detached, got {self.update.history}")
        if self.shuffle_rewards and self.method != "afd":
            raise ConfigError(f"shuffle_rewards permutes the advantages of method=afd, got method={self.method}")
        if self.teacher_r is not None:
            if not 0.5 < self.teacher_r <= 1:
                raise ConfigError(f"teacher_r must be above 0.5 and at most 1, got {self.teacher_r}")
            if self.method != "afd":
                raise ConfigError(f"teacher_r needs method=afd, got method={self.method}")
            if self.stream.frames is not None:
                raise ConfigError("teacher_r needs rollouts as long as the teacher's clips: leave out stream.frames")

    def _check_family(self) -> None:
        """ConfigError for settings that this student's family cannot have."""
        family, rollout = entry(self.student.name), self.rollout
        if family.chunk is not None and rollout.chunk != family.chunk:
            raise ConfigError(
                f"the student {self.student.name!r} has rollout.chunk={family.chunk}, not {rollout.chunk}"
            )
        if not family.windows and (rollout.window is not None or self.stream.frames is not None):
            raise ConfigError(
                f"stream.frames and rollout.window need a Wan student: the student {self.student.name!r} has a fixed length"
            )
        if family.chunk is not None and rollout.fuse_cache_pass:
            raise ConfigError(
                f"rollout.fuse_cache_pass needs chunks of any size; the student {self.student.name!r} has {family.chunk}"
            )
        if rollout.sink_ema is not None and self.update.history != "detached":
            raise ConfigError(
                f"rollout.sink_ema averages frames as they leave the cache: it needs update.history=detached, got "
                f"{self.update.history}"
            )
        if rollout.context_noise and self.update.history != "detached":
            raise ConfigError(
                f'rollout.context_noise={rollout.context_noise} needs update.history="detached", whose history is the '
                f"sampler's; got {self.update.history!r}"
            )
        plain = RolloutConfig()
        names = ("unipc_steps", "guidance", "recompute", "zero_step", "cache_pass", "independent_first_frame")
        if other := [name for name in names if getattr(rollout, name) != getattr(plain, name)]:
            way = " ".join(f"rollout.{name}={str(getattr(plain, name)).lower()}" for name in other)
            raise ConfigError(
                f"rollout.{' and rollout.'.join(other)}: for generation. Training learns on the few steps of rollout.steps, in whole "
                f"chunks that share one cache; set {way}"
            )

    def check_stream(self, frames: int) -> None:
        """ConfigError for a stream that is not whole clips of `frames`, the student's latent frames."""
        whole, active = self.stream.frames, self.stream.active_clips
        if whole is not None and whole % frames:
            raise ConfigError(f"stream.frames={whole} must be a multiple of the student's {frames} latent frames")
        if active * frames > (whole or frames):
            raise ConfigError(
                f"stream.active_clips={active} of {frames} latent frames do not fit stream.frames={whole or frames}"
            )


class Key(NamedTuple):
    """One setting: its dotted name, type, default in a configuration, and meaning."""

    name: str
    kind: Any
    value: Any
    meaning: str


def _meanings(part: type) -> dict[str, str]:
    """The `name: meaning` entries of a dataclass's docstring and its bases'."""
    found: dict[str, str] = {}
    for base in reversed(part.__mro__):
        text = " ".join((base.__dict__.get("__doc__") or "").split())
        names = [f.name for f in fields(part)]
        marks = list(re.finditer(rf"(?<![\w.])({'|'.join(names)})((?:(?: / |, )(?:{'|'.join(names)}))*): ", text))
        for mark, after in zip(marks, [*marks[1:], None]):
            meaning = text[mark.end() : after.start() if after else None].strip()
            for name in re.findall(r"\w+", mark.group(0)):
                found[name] = meaning
    return found


def keys(config: TrainConfig) -> Iterator[Key]:
    """Every setting of a configuration."""

    def walk(part: Any, prefix: str) -> Iterator[Key]:
        meanings = _meanings(type(part))
        for name, kind in field_types(type(part)).items():
            value = getattr(part, name)
            if is_dataclass(value):
                yield from walk(value, f"{name}.")
            else:
                yield Key(prefix + name, kind, value, meanings.get(name, ""))

    return walk(config, "")


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Dotted name -> value; ready for JSON."""
    return {key.name: key.value for key in keys(config)}


def with_values(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """`config` with dotted names replaced by values. ConfigError names the key in full."""
    flat = {name: value for name, value in values.items() if "." not in name}
    parts: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        part, dot, leaf = name.partition(".")
        if dot:
            parts.setdefault(part, {})[leaf] = value
    for part, changes in parts.items():
        try:
            flat[part] = replace(getattr(config, part), **changes)
        except ValueError as error:
            raise ConfigError(f"{part}.{error}") from error
    return replace(config, **flat)


def _parse(text: str, kind: Any) -> Any:
    """'3e-4' -> the type of the field. ValueError says what is expected."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        options = typing.get_args(kind)
        if type(None) in options and text.lower() == "none":
            return None
        for option in options:
            if option is not type(None):
                try:
                    return _parse(text, option)
                except ValueError:
                    continue
        raise ValueError(in_words(kind))
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("true or false")
        return text.lower() == "true"
    if typing.get_origin(kind) is tuple:
        items = [part for part in text.strip("()").split(",") if part.strip()]
        kinds = typing.get_args(kind)
        if len(kinds) == 2 and kinds[1] is not Ellipsis and len(items) != 2:
            raise ValueError("two numbers")
        return tuple(float(part) for part in items)
    if typing.get_origin(kind) is Literal:
        return text  # validated with the part
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise ValueError(in_words(kind)) from None
    return text


def with_overrides(config: TrainConfig, overrides: list[str]) -> TrainConfig:
    """`config` with "key=value" strings applied; "student=NAME" and "discriminator=NAME" set the part's name,
    "loss=RECIPE" takes all of a recipe, and "rollout=PRESET" all of a public project's sampler. ConfigError for an unknown key (with the nearest names) or a bad value."""
    values: dict[str, Any] = {}
    for item in overrides:
        name, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"overrides are written key=value, got {item!r}")
        if name in ("loss", "loss.name"):
            try:
                config = replace(config, loss=nft_recipe(cast(RecipeName, text)))
            except ValueError as error:
                raise ConfigError(f"{item}: {error}") from error
            continue
        if name == "rollout":
            values |= {f"rollout.{key}": value for key, value in RolloutConfig.preset(text).sampler().items()}
            continue
        if name in ("student", "discriminator"):
            name += ".name"
        kinds = {key.name: key.kind for key in keys(config)}
        if name not in kinds:
            raise ConfigError(f"unknown key {name!r}{_nearest(name, list(kinds))}")
        try:
            values[name] = _parse(text, kinds[name])
        except ValueError as error:
            raise ConfigError(f"{name}={text}: expected {error}") from error
    return with_values(config, values)


PREFIXES = {"disc_": "discriminator.", "student_": "update.", "eval_": "evaluation."}  # how a part is often written
RENAMED = {"recipe": "loss", "prior_weight": "loss.ref_coef", "update": "update.history"}


def _nearest(name: str, known: list[str]) -> str:
    """', did you mean ...?' by the whole name or by its last part."""
    if name in RENAMED:
        return f", did you mean {RENAMED[name]!r}?"
    written = [part + name.removeprefix(p) for p, part in PREFIXES.items() if name.startswith(p)]
    leaf = written[0].partition(".")[2] if written else name.rpartition(".")[2]
    near = [k for k in written if k in known] or [k for k in known if k.rpartition(".")[2] == leaf]
    near = near or get_close_matches(written[0] if written else name, known, 1)
    if not near:
        close = get_close_matches(leaf, [k.rpartition(".")[2] for k in known], 1)
        near = [k for k in known if close and k.rpartition(".")[2] == close[0]]
    if not near:
        return "; `afd-fast keys` lists them all"
    return f", did you mean {' or '.join(repr(n) for n in near)}?"

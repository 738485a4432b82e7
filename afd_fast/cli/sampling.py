"""Options of the commands that sample a causal Wan student, and the settings that they give: checked before anything is
loaded, downloaded in bulk or created."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from afd_fast.cli.common import height_width
from afd_fast.errors import ConfigError

if TYPE_CHECKING:
    from afd_fast.generate import GenerateOptions
    from afd_fast.rollout import RolloutConfig
    from afd_fast.training.distributed import Ranks

Preset = Annotated[
    str | None, typer.Option(help="a public project's sampler, such as self_forcing or longlive (docs/models.md)")
]
Size = Annotated[str | None, typer.Option(help="HEIGHTxWIDTH of the videos in pixels; default 480x832")]
Frames = Annotated[int | None, typer.Option(help="latent frames; 21 are 81 frames of video")]
Steps = Annotated[str | None, typer.Option(help="denoising steps, such as 1000,750,500,250")]
FirstSteps = Annotated[str | None, typer.Option("--first-chunk-steps", help="other steps for the first chunk")]
Shift = Annotated[float | None, typer.Option(help="of the timestep schedule; default 5")]
Warp = Annotated[
    bool | None, typer.Option("--warp/--no-warp", help="whether the steps move along the shifted schedule")
]
Chunk = Annotated[int | None, typer.Option(help="latent frames generated together; default 3")]
Window = Annotated[int | None, typer.Option(help="latent frames a chunk attends to; default all")]
Sink = Annotated[int | None, typer.Option(help="how many of the first frames stay in the window")]
Rope = Annotated[
    str | None, typer.Option(help='"absolute", or "relative": positions count from the start of the window')
]
SinkEma = Annotated[
    float | None, typer.Option(help="weight of the old sink where chunks that leave the window are averaged into it")
]
Recompute = Annotated[
    bool | None, typer.Option("--recompute/--no-recompute", help="compute the window anew before each chunk (Krea)")
]
ZeroStep = Annotated[
    bool | None, typer.Option("--zero-step/--no-zero-step", help="end each chunk with a forward at t = 0 (Krea)")
]
CachePass = Annotated[
    bool | None, typer.Option("--cache-pass/--no-cache-pass", help="run each finished chunk once more for its keys")
]
UniPC = Annotated[
    int | None, typer.Option("--unipc-steps", help="so many steps of UniPC instead of --steps, such as 50")
]
Guidance = Annotated[float | None, typer.Option(help="scale of classifier-free guidance, such as 3; default none")]
Negative = Annotated[str | None, typer.Option(help="negative prompt of the guidance; default Wan's own")]
Lora = Annotated[list[str] | None, typer.Option(help="adapter to merge, PATH or PATH=WEIGHT; repeatable")]
Fps = Annotated[float | None, typer.Option(help="frames per second of the files; default the model's 16 or 24")]


class Sampling(NamedTuple):
    """What the options say: how to sample, how large, and which adapters."""

    config: "RolloutConfig"
    options: "GenerateOptions"
    lora: list[tuple[str, float]]
    negative: str

    def settings(self) -> dict[str, Any]:
        """Everything that changes a video, ready for JSON."""
        o = self.options
        sampler = {k: list(v) if isinstance(v, tuple) else v for k, v in self.config.sampler().items()}
        more: dict[str, Any] = {"lora": [list(item) for item in self.lora]} if self.lora else {}
        if self.config.guidance is not None:
            more["negative"] = self.negative
        return {"frames": o.frames, "height": o.height, "width": o.width, "fps": o.fps} | sampler | more


def sampling(
    student: str, base: str | None, preset: str | None, size: str | None, frames: int | None, fps: float | None,
    batch: int, lora: Sequence[str] | None, negative: str | None, **given: Any,
) -> Sampling:  # fmt: skip
    """The settings of a command: the student's own, or a preset's, with the options `given` on top (None: not given; steps
    as text). ConfigError for what cannot be sampled."""
    from afd_fast.generate import GenerateOptions, chunk_count, filling
    from afd_fast.rollout import RolloutConfig
    from afd_fast.sampler import preset as named
    from afd_fast.students.files import check_source
    from afd_fast.students.wan.checkpoints import experts_of, sampler_of
    from afd_fast.students.wan.family import SIZE, TINY_SIZE, coder_of
    from afd_fast.students.wan.text import NEGATIVE_PROMPT

    for name in ("steps", "first_chunk_steps"):
        if given.get(name) is not None:
            given[name] = _numbers(name, given[name])
    own = {} if student == "tiny" else sampler_of(student)
    start = named(preset) if preset is not None else own
    config = RolloutConfig.of(start, **{k: v for k, v in given.items() if v is not None})
    experts = None if student == "tiny" else experts_of(student)
    config.boundary_level(None if experts is None else experts.boundary)
    if (begin := config.timetable()[0]).sigma < 0.9:
        raise ConfigError(
            f"the steps begin at t = {begin.t:g}, from a video noised to level {begin.sigma:.2f}, and a command begins with pure noise: "
            "begin near 1000, or call rollout(student, text, noise=...) with such a video's latents"
        )
    if negative is not None and config.guidance is None:
        raise ConfigError("--negative is the prompt of guidance, and there is none: set --guidance, such as 3")
    adapters = [_adapter(item) for item in lora or ()]
    for path, _ in adapters:
        check_source(Path(path))
    if adapters and student == "tiny":
        raise ConfigError("--lora needs a student: tiny is a model with random weights")
    default, coder = (TINY_SIZE if student == "tiny" else SIZE), coder_of(student, base)
    height, width = (default.height, default.width) if size is None else _latents(size, coder.scale)
    if frames is None:
        frames = filling(default.frames, config)
    options = GenerateOptions(frames, height, width, coder.fps if fps is None else fps, batch)
    chunk_count(frames, config)
    return Sampling(config, options, adapters, NEGATIVE_PROMPT if negative is None else negative)


@contextlib.contextmanager
def together(found: Sampling) -> "Iterator[Ranks]":
    """torchrun's processes as one group that makes each video together; this one alone without torchrun. ConfigError for
    graphs."""
    from afd_fast.training.distributed import job

    with job() as ranks:
        if ranks.world > 1 and found.config.graphs:
            raise ConfigError("--graphs cannot hold the exchanges between torchrun's processes: leave it out")
        yield ranks.together(ranks.world)


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        option = name.replace("_", "-")
        raise ConfigError(
            f"--{option} takes numbers with commas between them, such as 1000,500; got {text!r}"
        ) from None


def _latents(size: str, scale: int) -> tuple[int, int]:
    """HEIGHTxWIDTH in pixels -> latent rows and columns, which are even."""
    sides, unit = height_width(size), 2 * scale
    if sides is None or not all(side > 0 and side % unit == 0 for side in sides):
        raise ConfigError(
            f"--size takes HEIGHTxWIDTH in multiples of {unit} pixels, such as {30 * unit}x{52 * unit}; got {size!r}"
        )
    return sides[0] // scale, sides[1] // scale


def _adapter(item: str) -> tuple[str, float]:
    path, equals, weight = item.rpartition("=")
    if not equals or Path(item).exists():
        return item, 1.0
    try:
        return path, float(weight)
    except ValueError:
        raise ConfigError(f"--lora takes PATH or PATH=WEIGHT, got {item!r}") from None


def numbers_of_seeds(text: str) -> list[int]:
    """--seeds as numbers, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) <= 2**62 for part in parts) or len(set(parts)) < len(parts):
        raise ConfigError(
            f"--seeds takes different whole numbers with commas between them, such as 0,1,2; got {text!r}"
        )
    return [int(part) for part in parts]

"""The contract of a student and the family around it: what sampling and training need, whatever the network.

`Student` is what `afd_fast.rollout` calls. `StudentModule` is an `nn.Module` with defaults for the optional half of
it. A `Family` is a student with what lies between prompts, latents and pixels. `family(config)` makes one by name.

Legend: B samples, C channels, F latent frames, f frames of a chunk, H x W latent pixels.
"""

import contextlib
import importlib
import itertools
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from afd_fast.errors import ConfigError, check_at_least, check_fields
from afd_fast.files.tensors import save_tensors
from afd_fast.reference.flow import check_float
from afd_fast.students.files import check_named
from afd_fast.video_io import VideoFormat

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # which some builds of PyTorch lack

Context = Any  # what a family's text encoder returns for B prompts: a tensor [B, ...] or a list of B tensors
Text = Any  # what `Student.encode_text` returns: a tensor, or a list, tuple, dict or dataclass of tensors
Schedule = Any  # one Text, or a list [(first frame, Text), ...] that begins at frame 0
Cache = Any  # what `Student.new_cache` returns


def map_tensors(text: Text, function: Callable[[Tensor], Tensor]) -> Text:
    """A text encoding with its tensors replaced: a tensor, or a list, tuple, dict or dataclass of such."""
    if isinstance(text, Tensor):
        return function(text)
    if isinstance(text, (list, tuple)):
        parts = (map_tensors(x, function) for x in text)
        plain = type(text) in (list, tuple)
        return type(text)(parts) if plain else type(text)(*parts)  # a NamedTuple takes its fields one by one
    if isinstance(text, dict):
        return {key: map_tensors(x, function) for key, x in text.items()}
    if is_dataclass(text) and not isinstance(text, type):
        return replace(text, **{f.name: map_tensors(getattr(text, f.name), function) for f in fields(text) if f.init})
    return text


def batch_of(text: Text) -> int:
    """Prompts in a text encoding: the first axis of its first tensor (1 without a tensor)."""
    sizes: list[int] = []

    def note(x: Tensor) -> Tensor:
        sizes.append(x.shape[0] if x.ndim else 1)
        return x

    map_tensors(text, note)
    return sizes[0] if sizes else 1


def check_text(text: Text, kind: type) -> None:
    """TypeError unless the text is of the type that a student's `encode_text` returns."""
    if not isinstance(text, kind):
        given = f"a tensor {tuple(text.shape)}" if isinstance(text, Tensor) else f"a {type(text).__name__}"
        raise TypeError(
            f"text must be a {kind.__name__}, which student.encode_text(embeddings) returns once per prompt, got {given}"
        )


def check_latents(name: str, x: Any, channels: int | None) -> None:
    """TypeError unless x is a floating-point tensor, ValueError unless it is [B, C, F, H, W] with the student's C. channels: None
    where the student does not say."""
    check_float(name, x)
    of = "" if channels is None else f" with C = {channels}"
    if x.ndim == 5 and channels not in (None, x.shape[1]) and x.shape[2] == channels:
        raise ValueError(
            f"{name} must be [B, C, F, H, W]{of}, got {tuple(x.shape)}, which is [B, F, C, H, W]: give {name}.transpose(1, 2)"
        )
    if x.ndim != 5 or channels not in (None, x.shape[1]):
        raise ValueError(f"{name} must be [B, C, F, H, W]{of}, got {tuple(x.shape)}")


def texts_of_chunks(text: Schedule, starts: Sequence[int], given: int) -> dict[int, Text]:
    """Chunk number -> the text that holds from there on. starts: the chunks' first frames; given: frames before them, which
    count as chunk -1. ValueError for a schedule that does not fit."""
    first = -1 if given else 0
    if not isinstance(text, list) or not all(isinstance(x, tuple) and len(x) == 2 and type(x[0]) is int for x in text):
        return {first: text}
    frames = [frame for frame, _ in text]
    if not frames or frames[0] != 0 or any(a >= b for a, b in itertools.pairwise(frames)):
        raise ValueError(f"a schedule of texts [(frame, text), ...] begins at frame 0 and rises, got frames {frames}")
    count = len(starts)
    chunks = [first, *(next((i for i, start in enumerate(starts) if start >= frame), count) for frame in frames[1:])]
    for frame, number, following in zip(frames, chunks, [*chunks[1:], count]):
        if number == following:
            raise ValueError(
                f"the text of frame {frame} would hold for no chunk: they start at {list(starts)}, and a text holds from the "
                "first that starts at or after its frame"
            )
    return {number: words for number, (_, words) in zip(chunks, text)}


class Student(Protocol):
    """A causal few-step student, called chunk by chunk. `t` is in 0..1000."""

    def encode_text(self, context: Context) -> Text:
        """What every later call needs of the prompts, computed once per prompt."""

    def new_cache(
        self, batch: int, frames: int, height: int, width: int, window: int | None = None, sink: int = 0
    ) -> Cache:
        """An empty history for latents of frames x height x width. A student that can have them also takes the keywords
        rope="relative" and sink_ema, which are given where a rollout sets them."""

    def timestep(self, t: float, batch: int, frames: int) -> Any:
        """What `__call__` takes for one t of a whole chunk, without gradient; computed once per distinct t of a
        rollout. A tensor [batch, frames] full of t is always right."""

    def __call__(self, x: Tensor, t: Any, text: Text, *, cache: Cache, start_frame: int = 0) -> Tensor:
        """Velocity [B, C, f, H, W] of the chunk x [B, C, f, H, W] whose first frame is start_frame, given the
        cache's earlier frames. t: [B, f] or `timestep`'s. Writes the chunk into the cache, detached; the returned
        velocity keeps its graph through this chunk alone."""


class LatentFormat(NamedTuple):
    """Size of a sample's latents."""

    channels: int
    frames: int
    height: int
    width: int


class ShardPlan(NamedTuple):
    """How FSDP2 splits a student: these modules one by one, these parameters not at all (read outside their module's
    forward), and the methods of a module or the student that need gathered weights."""

    blocks: Sequence[nn.Module]
    whole: Sequence[nn.Parameter]
    methods: Sequence[str]


class StudentModule(nn.Module):
    """Base class of students that are trained. A subclass defines `encode_text`, `new_cache` and `forward`.

    sampler: fields of `rollout.RolloutConfig` with which its checkpoint is to be sampled; empty where it does not say.
    channels: of its latents, C of [B, C, F, H, W]; None where it does not say.
    boundary: t from which on another of its two experts takes over; such a student's `forward` takes both=True for a finished
        chunk (`wan.experts.TwoExperts`). None: one network.
    """

    sampler: Mapping[str, Any] = MappingProxyType({})
    channels: int | None = None
    boundary: float | None = None

    def encode_text(self, context: Context) -> Text:
        raise NotImplementedError

    def new_cache(
        self, batch: int, frames: int, height: int, width: int, window: int | None = None, sink: int = 0
    ) -> Cache:
        raise NotImplementedError

    def timestep(self, t: float, batch: int, frames: int) -> Any:
        return torch.full((batch, frames), t, device=next(self.parameters()).device, dtype=torch.float32)

    def forward_teacher_forcing(
        self, x: Tensor, t: Tensor, text: Text, clean: Tensor, chunk: Any, *, window: int | None = None, sink: int = 0
    ) -> Tensor:
        """Velocity of all chunks at once, each given the clean chunks before it, with the history's gradient. chunk: the
        frames of a chunk, or where the student allows it of each chunk; window, sink: as of `new_cache`."""
        raise ConfigError(f'{type(self).__name__} has no forward_teacher_forcing: set update.history="detached"')

    def forward_block_causal(
        self, x: Tensor, t: Tensor, text: Text, chunk: Any, *, window: int | None = None, sink: int = 0
    ) -> Tensor:
        """Velocity of all chunks at once, each given the noised chunks before it."""
        raise ConfigError(f'{type(self).__name__} has no forward_block_causal: set update.history="detached"')

    def graphed(self) -> Student:
        """The student for many rollouts of one shape, its forwards recorded as CUDA graphs and replayed."""
        raise ConfigError(f"{type(self).__name__} cannot record CUDA graphs: set rollout.graphs=false")

    def split_sequence(self, group: "ProcessGroup | None", height: int, width: int) -> None:
        """From now on the group's ranks share the tokens of each forward (None: each rank has all): they call it together
        with equal inputs, of latents of height x width, and get the whole result; gradients of parameters add up over
        the group. ValueError for what cannot be shared evenly."""
        raise ConfigError(f"{type(self).__name__} has no split_sequence: set sequence_parallel=1")

    def shard_plan(self) -> ShardPlan:
        """See `ShardPlan`."""
        raise ConfigError(f"{type(self).__name__} has no shard_plan: set fsdp=false")


REQUIRED = ("encode_text", "new_cache", "forward")
OPTIONAL = ("timestep", "forward_teacher_forcing", "forward_block_causal", "graphed", "split_sequence", "shard_plan")


def check_student(student: nn.Module) -> None:
    """ConfigError that names the methods a student lacks."""
    if not isinstance(student, nn.Module):
        raise ConfigError(f"a student must be a torch.nn.Module, got {type(student).__name__}")
    kind, defaults = type(student), {nn.Module.forward, *filter(callable, vars(StudentModule).values())}
    missing = [name for name in REQUIRED if getattr(kind, name, nn.Module.forward) in defaults]
    missing += [name for name in OPTIONAL if not callable(getattr(kind, name, None))]
    if missing:
        raise ConfigError(
            f"the student {kind.__name__} lacks {', '.join(missing)}. A student defines encode_text, new_cache and "
            "forward; derive it from afd_fast.students.StudentModule for the rest (docs/extending.md)"
        )


def check_settings(student: StudentModule, settings: Mapping[str, str]) -> None:
    """ConfigError for a setting whose method the student leaves to `StudentModule`. settings: method -> the setting that
    calls it."""
    kind = type(student)
    for name, setting in settings.items():
        if getattr(kind, name) is getattr(StudentModule, name):
            raise ConfigError(
                f"{setting} needs {name}, which the student {kind.__name__} does not define: leave it out"
            )


class VAE(Protocol):
    """Between pixels in [0, 1] and latents."""

    def encode(self, videos: Tensor) -> Tensor:
        """[B, 3, frames, height, width] -> [B, C, F, H, W], without gradient."""

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, F, H, W] -> [B, 3, frames, height, width] in [0, 1], differentiable."""


class TrainedWeights(NamedTuple):
    """What a run leaves: the student's averaged weights with adapters merged, and the adapters by themselves."""

    merged: dict[str, Tensor]
    adapters: dict[str, Tensor]


Facts = dict[str, Any]  # a run's settings, for model cards and file headers
Save = Callable[[TrainedWeights, Facts, Path], None]


def save_weights(weights: TrainedWeights, about: Facts, folder: Path) -> None:
    """student.safetensors in the run's folder, the settings in its header."""
    save_tensors(weights.merged, folder / "student.safetensors", {"run": json.dumps(about)})


@dataclass
class Family:
    """A student and everything around it that training needs.

    text: B prompts -> what `student.encode_text` takes. chunk: latent frames generated together. video: the size of
    finished videos, the teacher's too. lora_targets: names of the linear layers that get adapters; none: train with
    student.lora_rank=0. save: writes the trained student into a run's folder. prompts: the only ones that it knows; none: any.
    """

    name: str
    student: StudentModule
    text: Callable[[list[str]], Context]
    vae: VAE
    latents: LatentFormat
    chunk: int
    video: VideoFormat
    lora_targets: Sequence[str] = ()
    save: Save = save_weights
    prompts: Collection[str] | None = None

    def __post_init__(self) -> None:
        check_student(self.student)
        if getattr(self.student, "boundary", None) is not None:
            raise ConfigError("a student of two experts is sampled and not trained: give one of the two")
        for name in ("encode", "decode"):
            if not callable(getattr(self.vae, name, None)):
                raise ConfigError(f"the VAE {type(self.vae).__name__} lacks {name} (afd_fast.students.VAE)")
        if self.chunk < 1 or self.latents.frames % self.chunk:
            raise ConfigError(
                f"{self.latents.frames} latent frames are not whole chunks of {self.chunk}: set frames to a multiple of {self.chunk}"
            )

    @property
    def device(self) -> torch.device:
        return next(self.student.parameters()).device


def check_device(name: str | None) -> None:
    """ConfigError unless it is None or a device of PyTorch's that holds numbers."""
    if name is None:
        return
    try:
        found = torch.device(name).type
    except RuntimeError:
        found = "meta"
    if found == "meta":
        raise ConfigError(f"device must be one of PyTorch's, such as cuda:1, got {name!r}")


@contextlib.contextmanager
def placing(setting: str, device: str | None) -> Iterator[None]:
    """ConfigError that names the setting where the device it asks for is not there."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        if device is None:
            raise
        raise ConfigError(f"{setting}={device}: {str(error).splitlines()[0]}") from None


@dataclass(frozen=True)
class StudentConfig:
    """Which student, how large its videos are, and how much of it is trained.

    name: toy, toy_long, lights (of three steps), lights_many (of sixteen), tiny (a random CausalWan, to try things), pixel (made by afd-fast distill), another registered family, or a
        checkpoint of a causal Wan.
    base: diffusers repository of a Wan student's text encoder and VAE; none: Wan2.1-T2V-1.3B. The file of an embedded or pixel
        student's weights, of afd-fast pretrain or a run's student.safetensors; none: the shipped one's.
    frames: latent frames of a Wan student's videos; none: 21, which are 81 frames of video.
    height: latent rows of a Wan student's videos; none: 60, which are 480 pixels.
    width: latent columns of a Wan student's videos; none: 104, which are 832 pixels.
    lora_rank: rank of the adapters; 0: every weight is trained, against a frozen copy; a half-precision student
        computes in its dtype and is trained in float32.
    device: where the family lives, such as cuda:1 or cpu; none: a Wan student on the GPU where there is one, the embedded one on the
        CPU.
    gradient_checkpointing: recompute a Wan student's blocks in backward, with update.history=teacher_forcing or block_causal.
    """

    name: str = "toy"
    base: str | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    lora_rank: int = 16
    device: str | None = None
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, 1, "frames", "height", "width")
        check_at_least(self, 0, "lora_rank")
        check_device(self.device)
        unused = [f.name for f in fields(self) if f.name not in ("name", "lora_rank", "device", *entry(self.name).keys)]
        for name in unused:
            if getattr(self, name) != getattr(StudentConfig, name):
                raise ConfigError(f"{name} has no meaning for the student {self.name!r}: leave it out")


class FamilyEntry(NamedTuple):
    """A registered family. make: (StudentConfig, chunk, seed) -> Family, or "module:function" to import it on first
    use. keys: of StudentConfig that it reads. chunk: its only chunk size, if it has one. windows: whether its cache
    can have a window, which streams need."""

    make: Callable[[StudentConfig, int, int], Family] | str
    keys: tuple[str, ...] = ()
    chunk: int | None = None
    windows: bool = False


WAN = FamilyEntry(
    "afd_fast.students.wan.family:wan_family",
    keys=("base", "frames", "height", "width", "gradient_checkpointing"),
    windows=True,
)
_TOY = FamilyEntry("afd_fast.students.toy.family:toy_family", keys=("base",), chunk=3)
_LIGHTS = FamilyEntry("afd_fast.students.toy.family:toy_family", keys=("base",), chunk=6)
FAMILIES: dict[str, FamilyEntry] = {
    "toy": _TOY,
    "toy_long": _TOY,
    "lights": _LIGHTS,
    "lights_many": _LIGHTS,
    "tiny": WAN,
    "pixel": FamilyEntry("afd_fast.students.toy.pixel:pixel_family", keys=("base",), chunk=3),
}


def register_family(name: str, entry: FamilyEntry) -> None:
    """Make `student.name=NAME` known. ConfigError for a name that is taken."""
    if name in FAMILIES:
        raise ConfigError(f"a family named {name!r} exists already")
    FAMILIES[name] = entry


def entry(name: str) -> FamilyEntry:
    """The registered family of a name; a checkpoint's is Wan's."""
    return FAMILIES.get(name, WAN)


def family(config: StudentConfig, *, chunk: int, seed: int = 0) -> Family:
    """The family a configuration names, on `config.device`. seed: of random weights ("tiny"). ConfigError for a device that
    is not there."""
    check_named("student", config.name, FAMILIES)
    make = entry(config.name).make
    if isinstance(make, str):
        module, function = make.split(":")
        make = getattr(importlib.import_module(module), function)
    with placing("student.device", config.device):
        return make(config, chunk, seed)

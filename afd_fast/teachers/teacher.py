"""The contract of a black-box teacher: prompt and seed in, a finished video out, nothing else.

Legend: F frames, H x W pixels.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor

from afd_fast.errors import ConfigError
from afd_fast.video_io import VideoFormat, checked


class Request(NamedTuple):
    """One video of a teacher."""

    prompt: str
    seed: int


class PromptSplit(NamedTuple):
    """Prompts that are trained on, and prompts that are held out for the judge."""

    train: list[str]
    held_out: list[str]


def nothing() -> None:
    """The default of `fetch`'s callback."""


class Teacher(Protocol):
    """What a run asks of a teacher. `TeacherBase` has defaults for all of it but the call."""

    name: str  # identifies the teacher in caches
    fps: float  # of its videos
    judge: str  # which judge can score its videos: "physics" or "clips"

    def __call__(self, prompt: str, seed: int) -> Tensor:
        """The video [3, F, H, W] in [0, 1]; the same for the same prompt and seed."""

    def split(self) -> PromptSplit:
        """The prompts it can be asked for."""

    def fetch(self, requests: Sequence[Request], done: Callable[[], None] = nothing) -> None:
        """Get videos that are slow or paid for, before they are asked for one by one; done() after each."""

    def seeds(self, prompt: str, wanted: Iterable[int]) -> list[int]:
        """Those of the wanted seeds that are different videos."""

    def weight(self, prompt: str, seed: int) -> float:
        """How often training draws this video, in (0, 1]: half as often as others with 0.5."""

    def file(self, prompt: str, seed: int) -> str:
        """The name of this video's file in the teacher's folder; empty where it keeps none."""

    def familiar(self, prompts: Sequence[str]) -> list[str]:
        """These prompts in the domain the base student knows, if the teacher shows another one: what the student
        forgets is measured on them. Empty where there is no other domain."""

    @property
    def problems(self) -> list[str]:
        """Videos that cannot be had, one line each."""

    def cost(self, requests: Sequence[Request]) -> str:
        """What getting these videos would cost, for a dry run; empty where it is free."""


def hold_out(prompts: Sequence[str]) -> PromptSplit:
    """The last eighth is held out; of a single prompt, none: it is trained and judged on."""
    held = max(1, len(prompts) // 8) if len(prompts) > 1 else 0
    train = list(prompts[: len(prompts) - held])
    return PromptSplit(train, list(prompts[len(train) :]) or train)


class TeacherBase:
    """Defaults of the Teacher protocol. A subclass defines `__call__` and sets `name`, `fps` and `prompts`."""

    name = "teacher"
    fps = 16.0
    judge = "clips"
    prompts: Sequence[str] = ()

    def __call__(self, prompt: str, seed: int) -> Tensor:
        raise NotImplementedError

    def split(self) -> PromptSplit:
        return hold_out(self.prompts)

    def fetch(self, requests: Sequence[Request], done: Callable[[], None] = nothing) -> None:
        for _ in requests:
            done()

    def seeds(self, prompt: str, wanted: Iterable[int]) -> list[int]:
        return list(wanted)

    def weight(self, prompt: str, seed: int) -> float:
        return 1.0

    def file(self, prompt: str, seed: int) -> str:
        return ""

    def familiar(self, prompts: Sequence[str]) -> list[str]:
        return []

    @property
    def problems(self) -> list[str]:
        return []

    def cost(self, requests: Sequence[Request]) -> str:
        return ""


class CallableTeacher(TeacherBase):
    """Any function (prompt, seed) -> video [3, F, H, W] in [0, 1]. name: identifies it in caches: change it when the
    function's videos change. ConfigError without prompts, VideoError for anything but such a video."""

    def __init__(self, function: Callable[[str, int], Tensor], prompts: Sequence[str], *, name: str, fps: float = 16.0):
        self.function, self.prompts, self.name, self.fps = function, list(dict.fromkeys(prompts)), name, fps
        if not self.prompts:
            raise ConfigError(f"the teacher {name!r} has no prompt")

    def __call__(self, prompt: str, seed: int) -> Tensor:
        return checked(self.function(prompt, seed), prompt, seed)


Open = Callable[[str, VideoFormat, Path], Teacher]  # (what follows the colon, videos' format, cache folder)
TEACHERS: dict[str, Open] = {}


def register_teacher(kind: str, open_teacher: Open) -> None:
    """Make `teacher=KIND:...` known. ConfigError for a kind that is taken."""
    if kind in TEACHERS:
        raise ConfigError(f"a teacher named {kind!r} exists already")
    TEACHERS[kind] = open_teacher

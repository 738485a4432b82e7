"""What is counted on the fake GPU: launches, bytes, FLOPs, waits, copies, by kernel and place, of everything and of each phase."""

from tests.fake_cuda.guard import ROOT  # first: before torch

# isort: split
import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

PROJECT = (f"{ROOT}/afd_fast/", f"{ROOT}/kernels/")


def place() -> str:
    """file:function of the innermost frame in the project's code."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PROJECT):
            return f"{name[len(str(ROOT)) + 1 :]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "outside"


@dataclass
class Tally:
    """Counts of a part of a program. launches, moved (bytes) and flops: by kernel. waits (the host waits for the device) and
    copies (from pageable host memory, which wait too): by what and place. faults: CPU tensors that met
    CUDA tensors, and operands of an attention that repeat a sample by a stride of 0, which no kernel promises to take."""

    launches: Counter = field(default_factory=Counter)
    moved: Counter = field(default_factory=Counter)
    flops: Counter = field(default_factory=Counter)
    waits: Counter = field(default_factory=Counter)
    copies: Counter = field(default_factory=Counter)
    copied: Counter = field(default_factory=Counter)  # bytes, by place
    faults: Counter = field(default_factory=Counter)
    wide: Counter = field(default_factory=Counter)  # of the FLOPs, those on float32 or float64, without tensor cores
    draws: Counter = field(default_factory=Counter)  # of CUDA generators, by (seed, offset)

    @property
    def light(self) -> int:
        """Bytes that kernels other than matrix products, convolutions and attention read and write."""
        return sum(n for name, n in self.moved.items() if name not in self.flops)


class Log:
    """The counts of all, and of every phase (`Run.phase`)."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.all, self.phases, self._now = Tally(), {}, []
        self.capturing = False

    @property
    def tallies(self) -> list[Tally]:
        return [self.all, *self._now[-1:]]

    def note(self, kind: str, key: object, count: int = 1) -> None:
        for tally in self.tallies:
            getattr(tally, kind)[key] += count

    def wait(self, what: str) -> None:
        if self.capturing:
            raise RuntimeError(f"{place()}: {what} is not permitted when a stream is capturing")
        self.note("waits", f"{what} {place()}")

    @contextlib.contextmanager
    def phase(self, name: str, **_: object) -> Iterator[None]:
        self._now.append(self.phases.setdefault(name, Tally()))
        try:
            yield
        finally:
            self._now.pop()


LOG = Log()

"""Stand-ins for torch.cuda's objects: generators, streams, events, graphs."""

from tests.fake_cuda.log import LOG  # first: before torch

# isort: split
import contextlib
import itertools
import weakref
from collections import Counter

import torch

CUDA = "cuda:0"


class Generator:
    """torch.Generator on the device: a seed, and how many numbers it has given since."""

    def __init__(self, device: object = None) -> None:
        self.device = torch.device(CUDA)
        self.manual_seed(0)

    def manual_seed(self, seed: int) -> "Generator":
        self.of, self.offset = seed, 0
        return self

    def initial_seed(self) -> int:
        return self.of

    def draw(self, count: int) -> None:
        LOG.note("draws", (self.of, self.offset))
        self.offset += count


class Stream:
    """torch.cuda.Stream. made: how many there have been."""

    made = 0

    def __init__(self, device: object = None, **_: object) -> None:
        Stream.made += 1
        self.device, self.cuda_stream = torch.device(CUDA), Stream.made

    def wait_stream(self, other: "Stream") -> None: ...
    def wait_event(self, event: "Event") -> None: ...
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        LOG.wait("Stream.synchronize")

    def record_event(self, event: "Event | None" = None) -> "Event":
        return event or Event()


class Event:
    """torch.cuda.Event."""

    def __init__(self, **_: object) -> None: ...
    def record(self, stream: Stream | None = None) -> None: ...
    def wait(self, stream: Stream | None = None) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "Event") -> float:
        return 1.0

    def synchronize(self) -> None:
        LOG.wait("Event.synchronize")


class Graph:
    """torch.cuda.CUDAGraph. users: living graphs by memory pool; capturing into a pool without any fails, as PyTorch's
    allocator asserts. streams: those that were captured on. captures: how many there have been."""

    captures = 0
    users: Counter = Counter()
    streams: set = set()
    _numbers = itertools.count(1)

    def __init__(self, keep_graph: bool = False) -> None:
        self.number = None

    def pool(self) -> int:
        assert self.number is not None, "pool() before a capture"
        return self.number

    def replay(self) -> None:
        assert self.number is not None, "replay() before a capture"
        LOG.note("launches", "graph replay")

    def captured(self, pool: int | None, stream: Stream | None) -> None:
        if pool is not None and not Graph.users[pool]:
            raise RuntimeError(
                f"capture into memory pool {pool}, whose graphs are all destroyed (use_count > 0 INTERNAL ASSERT)"
            )
        Graph.captures += 1
        self.number = pool or next(Graph._numbers)
        Graph.users[self.number] += 1
        Graph.streams.add(stream)
        weakref.finalize(self, Graph.users.subtract, [self.number])


@contextlib.contextmanager
def capture(graph: Graph, pool=None, stream=None, capture_error_mode="global"):
    graph.captured(pool, stream)
    LOG.capturing = True
    try:
        yield
    finally:
        LOG.capturing = False


_streams = [Stream()]


def current_stream(device: object = None) -> Stream:
    return _streams[-1]


@contextlib.contextmanager
def on_stream(stream: Stream | None):
    _streams.append(stream or _streams[-1])
    try:
        yield
    finally:
        _streams.pop()


# -- generators of both kinds ---------------------------------------------------------------------------------


def drawn(function):
    """torch.randn and its like, with generators checked."""

    def draw(*args, generator=None, **kwargs):
        if generator is not None:
            wanted, found = torch.device(kwargs.get("device") or "cpu").type, generator.device.type
            if wanted != found:
                raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{found}'")
        if not isinstance(generator, Generator):
            return function(*args, **kwargs) if generator is None else function(*args, generator=generator, **kwargs)
        out = function(*args, **kwargs)
        generator.draw(out.numel())
        return out

    return draw


def _generator(device="cpu"):
    return Generator(device) if torch.device(device).type == "cuda" else _RealGenerator(device)


_RealGenerator = torch.Generator


class _AnyGenerator(type):
    """isinstance(x, torch.Generator) holds for both kinds."""

    def __instancecheck__(cls, x: object) -> bool:
        return isinstance(x, (Generator, _RealGenerator))

    def __call__(cls, device="cpu"):
        return _generator(device)


class Generators(metaclass=_AnyGenerator):
    pass

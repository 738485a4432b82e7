"""What every benchmark reports: timed calls as tidy rows, printed and appended to a CSV file."""

import argparse
import contextlib
import csv
import datetime
import functools
import hashlib
import importlib.util
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from afd_fast.errors import AFDError

COLUMNS = (
    "case variant pass shape dtype ms ms_p20 ms_p80 host_ms peak_mib gb_s tflop_s of_peak max_err eager_err device torch "
    "triton commit date"
).split()
ROOT = Path(__file__).parent.parent
N = TypeVar("N", int, float)
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
PEAK_TFLOP_S = 990.0 if CUDA and torch.cuda.get_device_capability() == (9, 0) else None  # H100/H200, dense bfloat16
CYCLES = 2e6  # of a GPU's clock a millisecond, at most: what `torch.cuda._sleep` counts


def device_name(device: str = DEVICE) -> str:
    """The GPU's name, or cpu and the number of threads."""
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu x{torch.get_num_threads()}"


def short_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Arguments(argparse.ArgumentParser):
    """The options that every benchmark has."""

    def __init__(self, about: str | None) -> None:
        super().__init__(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--csv", type=Path, help="append the rows here")
        self.add_argument("--gpu", action="store_true", help="stop where there is no CUDA device")

    def parsed(self) -> argparse.Namespace:
        """The arguments. SystemExit for what --gpu asks for in vain."""
        arguments = self.parse_args()
        if arguments.gpu and not CUDA:
            raise SystemExit(f"{self.prog}: needs a CUDA device, and PyTorch {torch.__version__} finds none")
        return arguments


def over_seeds(values: np.ndarray) -> list[str]:
    """Mean ± standard deviation of each column of values [seeds, n]; of one seed the value alone."""
    means = values.mean(0).round(3) + 0.0  # no -0.000
    if len(values) == 1:
        return [f"{mean:.3f}" for mean in means]
    return [f"{m:.3f} ± {s:.3f}" for m, s in zip(means, values.std(0, ddof=1))]


def ranged(kind: type[N], least: float, most: float = math.inf) -> Callable[[str], N]:
    """The `type` of an option that takes a number from `least` to `most`."""

    def parse(text: str) -> N:
        try:
            value = kind(text)
        except ValueError:
            value = kind(-1)
        if not (math.isfinite(value) and least <= value <= most):
            upto = "" if most == math.inf else f" to {most:g}"
            raise argparse.ArgumentTypeError(
                f"expected {'a whole number' if kind is int else 'a number'} from {least:g}{upto}, got {text}"
            )
        return value

    return parse


def picture(text: str) -> Path:
    """The `type` of an option that names a picture to write."""
    path = Path(text)
    if path.suffix not in (".png", ".svg", ".pdf") or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file .png, .svg or .pdf in a folder that exists, got {text}")
    return path


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Around a `main`: the library's errors in one line, as its commands print them."""
    try:
        yield
    except AFDError as error:
        raise SystemExit(f"error: {error}") from None


@dataclass
class Times:
    """Milliseconds of repeated calls, of the host until a call returned, and the peak memory in MiB (CUDA)."""

    samples: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    peak_mib: float | None = None

    @property
    def ms(self) -> float:
        return statistics.median(self.samples)

    @property
    def host_ms(self) -> float | None:
        return statistics.median(self.host) if self.host else None

    def quantile(self, q: float) -> float:
        return sorted(self.samples)[min(len(self.samples) - 1, int(q * len(self.samples)))]


class Clock:
    """Times single calls with the host hidden. On a GPU a call's kernels queue up behind a busy one, so two events around
    them measure the device alone, with a cold L2; the host's time has its own column. On a CPU: the call's time."""

    def __init__(self, device: str) -> None:
        self.cuda, self.ahead = device != "cpu", 1.0
        self.flush = torch.empty(256 << 20 if self.cuda else 0, dtype=torch.uint8, device=device)

    def add(self, call: Callable[[], Any], times: Times) -> None:
        """One sample."""
        if not self.cuda:
            start = time.perf_counter()
            call()
            times.samples.append((time.perf_counter() - start) * 1e3)
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        torch.cuda._sleep(int(self.ahead * CYCLES))
        begin.record()
        start = time.perf_counter()
        call()
        times.host.append((time.perf_counter() - start) * 1e3)
        end.record()
        end.synchronize()
        times.samples.append(begin.elapsed_time(end))
        self.ahead = min(50.0, max(self.ahead, 1.5 * times.host[-1]))

    def timed(self, call: Callable[[], Any], repeats: int) -> Times:
        """Times and peak of a call, after one that warms up."""
        call()
        times = Times(peak_mib=self.peak_mib(call))
        for _ in range(repeats):
            self.add(call, times)
        return times

    def peak_mib(self, call: Callable[[], Any]) -> float | None:
        """What a call allocates at its peak; None on a CPU."""
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def timed(call: Callable[[], Any], repeats: int) -> Times:
    """Times as a user waits for them, host included, after one warm-up. The peak is of everything allocated."""
    return in_turn([call], repeats)[0]


def in_turn(calls: Sequence[Callable[[], Any]], repeats: int) -> list[Times]:
    """`timed` of several calls, sample by sample in turn: what else the machine does slows all of them down."""
    found = [Times() for _ in calls]
    for call, times in zip(calls, found):
        call()
        if CUDA:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            call()
            torch.cuda.synchronize()
            times.peak_mib = torch.cuda.max_memory_allocated() / 2**20
    for _ in range(repeats):
        for call, times in zip(calls, found):
            begin = time.perf_counter()
            call()
            if CUDA:
                times.host.append((time.perf_counter() - begin) * 1e3)
                torch.cuda.synchronize()
            times.samples.append((time.perf_counter() - begin) * 1e3)
    return found


@contextlib.contextmanager
def clocked(times: Times, cuda: bool = CUDA) -> Iterator[None]:
    """Add the block to `times`. Its peak is what it allocates above what was there before."""
    before = 0
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    begin = time.perf_counter()
    yield
    if cuda:
        times.host.append((time.perf_counter() - begin) * 1e3)
        torch.cuda.synchronize()
        times.peak_mib = max(times.peak_mib or 0.0, (torch.cuda.max_memory_allocated() - before) / 2**20)
    times.samples.append((time.perf_counter() - begin) * 1e3)


@dataclass
class Row:
    """One variant of a case, as it was timed. What a benchmark does not measure stays None: an empty cell."""

    case: str
    variant: str
    shape: str
    times: Times
    kind: str = "forward"  # the column `pass`
    dtype: str = short_name(DTYPE)
    device: str = field(default_factory=device_name)
    bytes_moved: float | None = None
    flop: float | None = None
    of_peak: float | None = None  # of what the device, or a copy, reaches
    max_err: float | None = None
    eager_err: float | None = None

    @property
    def gb_s(self) -> float | None:
        return None if self.bytes_moved is None else self.bytes_moved / self.times.ms / 1e6

    @property
    def tflop_s(self) -> float | None:
        return None if self.flop is None else self.flop / self.times.ms / 1e9

    def cells(self) -> dict[str, str]:
        """Column -> text."""
        times = self.times
        values = [
            self.case, self.variant, self.kind, self.shape, self.dtype, cell(times.ms, ".4f"), cell(times.quantile(0.2), ".4f"),
            cell(times.quantile(0.8), ".4f"), cell(times.host_ms, ".4f"), cell(times.peak_mib, ".1f"), cell(self.gb_s, ".1f"),
            cell(self.tflop_s, ".3f"), cell(self.of_peak, ".4f"), cell(self.max_err, ".2e"), cell(self.eager_err, ".2e"),
            self.device, torch.__version__, version("triton") if importlib.util.find_spec("triton") else "", commit(),
            datetime.date.today().isoformat(),
        ]  # fmt: skip
        return dict(zip(COLUMNS, values, strict=True))


class Table:
    """Rows of one benchmark, printed as they come, and appended to the file of --csv as they come: what is killed keeps
    what it had."""

    def __init__(self, csv: Path | None = None) -> None:
        self.rows: list[Row] = []
        self.csv = csv

    def add(self, row: Row) -> None:
        if row.tflop_s is not None and PEAK_TFLOP_S is not None:
            row.of_peak = row.tflop_s / PEAK_TFLOP_S
        self.rows.append(row)
        rate = (
            cell(row.tflop_s, ".3f") + " TFLOP/s"
            if row.flop
            else cell(row.gb_s, ".1f") + " GB/s"
            if row.bytes_moved
            else ""
        )
        host = f"host {row.times.host_ms:.3f} ms" if row.times.host_ms is not None else ""
        print(
            f"{row.case:22s} {row.variant:18s} {row.shape:26s} {row.times.ms:10.3f} ms  {rate:16s} {host}", flush=True
        )
        if self.csv:
            append_rows(self.csv, [row])


def cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


@functools.cache
def commit() -> str:
    """git's short hash; without git, or outside a checkout, `files-` and a hash of the sources."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    files = sorted(p for room in ("afd_fast", "kernels", "benchmarks") for p in (ROOT / room).rglob("*.py"))
    return "files-" + hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:8]


def append_rows(path: Path, rows: list[Row]) -> None:
    """The rows at the end of a CSV file; the header first where the file is new. SystemExit for a file of other columns."""
    new = not path.exists()
    if not new and (found := path.read_text().split("\n", 1)[0].strip()) != ",".join(COLUMNS):
        raise SystemExit(f"{path} has the columns {found}, not {','.join(COLUMNS)}: write the rows to another file")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(row.cells() for row in rows)

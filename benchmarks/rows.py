"""What every benchmark reports: timed calls as tidy rows, printed and appended to a CSV file."""

import contextlib
import csv
import datetime
import importlib.util
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

COLUMNS = (
    "case variant pass shape dtype ms ms_p20 ms_p80 peak_mib gb_s tflop_s of_peak max_err eager_err device torch triton "
    "commit date"
).split()
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
PEAK_TFLOP_S = 990.0 if CUDA and torch.cuda.get_device_capability() == (9, 0) else None  # H100/H200, dense bfloat16


def device_name(device: str = DEVICE) -> str:
    """The GPU's name, or cpu."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def short_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass
class Times:
    """Milliseconds of repeated calls, and the peak memory in MiB (CUDA)."""

    samples: list[float] = field(default_factory=list)
    peak_mib: float | None = None

    @property
    def ms(self) -> float:
        return statistics.median(self.samples)

    def quantile(self, q: float) -> float:
        return sorted(self.samples)[min(len(self.samples) - 1, int(q * len(self.samples)))]


def timed(call: Callable[[], Any], repeats: int) -> Times:
    """Times after one warm-up."""
    call()
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = Times()
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        if CUDA:
            torch.cuda.synchronize()
        times.samples.append((time.perf_counter() - begin) * 1e3)
    if CUDA:
        times.peak_mib = torch.cuda.max_memory_allocated() / 2**20
    return times


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
            cell(times.quantile(0.8), ".4f"), cell(times.peak_mib, ".1f"), cell(self.gb_s, ".1f"), cell(self.tflop_s, ".3f"),
            cell(self.of_peak, ".4f"), cell(self.max_err, ".2e"), cell(self.eager_err, ".2e"), self.device, torch.__version__,
            version("triton") if importlib.util.find_spec("triton") else "", commit(), datetime.date.today().isoformat(),
        ]  # fmt: skip
        return dict(zip(COLUMNS, values, strict=True))


class Table:
    """Rows of one benchmark, printed as they come."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

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
        print(f"{row.case:22s} {row.variant:18s} {row.shape:26s} {row.times.ms:10.3f} ms  {rate}", flush=True)


def cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()


def append_rows(path: Path, rows: list[Row]) -> None:
    """The rows at the end of a CSV file; the header first where the file is new."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(row.cells() for row in rows)

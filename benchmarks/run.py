"""Measure the cases and append tidy rows: python -m benchmarks.run --shape wan --batch 16 --csv benchmarks/results/x.csv

On a CPU every sample of a variant is taken next to one of the copy; on a GPU the L2 is flushed before each sample.
Nothing is timed whose gradient is wrong.
"""

import argparse
import csv
import datetime
import statistics
import subprocess
import time
from pathlib import Path

import torch

from benchmarks.cases import CASES, DTYPES, SHAPES

COLUMNS = ("case,variant,pass,shape,dtype,ms,ms_p20,ms_p80,peak_mib,gb_s,tflop_s,of_peak,max_err,eager_err,"
           "device,torch,triton,commit,date").split(",")  # fmt: skip


def sample(f, device: str, flush) -> float:
    """Seconds of one call."""
    if device == "cpu":
        start = time.perf_counter()
        f()
        return time.perf_counter() - start
    flush.zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    f()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def copy_of(size: int, device: str):
    source, target = (torch.ones(size // 2, dtype=torch.uint8, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def error(result, exact) -> float:
    """Relative to the largest exact value."""
    if exact is None:
        return float("nan")
    return ((result[: len(exact)].double() - exact).abs().max() / exact.abs().max().clamp(min=1e-300)).item()


def measure(name, shape, dtype, device, variants, seconds) -> list[dict]:
    """Rows of one case; the first is the copy of the bytes that the case moves."""
    check = shape[0] * torch.Size(shape[1:]).numel() <= 1 << 25
    case = CASES[name](shape, DTYPES[dtype], device, check)
    copy = copy_of(case.bytes_moved, device)
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=device) if device != "cpu" else None
    eager_err = (
        error(case.variants["eager"](), case.exact)
        if case.exact is not None and name != "forward_noise"
        else float("nan")
    )
    copies, rows = [], []
    for variant in [v for v in variants if v in case.variants]:
        f = case.variants[variant]
        err = error(f(), case.exact) if not (name == "forward_noise" and variant != "fused") else float("nan")
        bound = 2 * (eager_err if eager_err == eager_err else 0) + 2 * torch.finfo(DTYPES[dtype]).eps
        if variant != "eager" and err > bound:
            red = f"{name}/{variant} {shape} {dtype}: error {err:.2e} above {bound:.2e}; nothing is timed on a red test"
            if variant in ("fused", "one_launch"):
                raise SystemExit(red)
            print(red)  # somebody else's arithmetic: left out
            continue
        peak = float("nan")
        if device != "cpu":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            f()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        times, stop = [], time.perf_counter() + seconds
        while len(times) < 5 or (time.perf_counter() < stop and len(times) < 200):
            copies.append(sample(copy, device, flush))
            times.append(sample(f, device, flush))
        rows.append(row(name, variant, shape, dtype, times, case.bytes_moved, peak, err, eager_err, device))
    rows.insert(0, row(name, "copy", shape, dtype, copies, case.bytes_moved, float("nan"), 0.0, float("nan"), device))
    for r in rows:
        r["of_peak"] = round(rows[0]["ms"] / r["ms"], 4)
    return rows


def row(name, variant, shape, dtype, times, size, peak, err, eager_err, device) -> dict:
    q = statistics.quantiles(times, n=10)
    middle = statistics.median(times)
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = ""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    where = torch.cuda.get_device_name() if device != "cpu" else f"cpu x{torch.get_num_threads()}"
    values = (name, variant, "noise" if name == "forward_noise" else "loss+grad", "x".join(map(str, shape)), dtype,
              f"{middle * 1e3:.4f}", f"{q[1] * 1e3:.4f}", f"{q[7] * 1e3:.4f}", f"{peak:.1f}", f"{size / middle / 1e9:.1f}", "", 0,
              f"{err:.2e}", f"{eager_err:.2e}", where, torch.__version__, version, commit, datetime.date.today())  # fmt: skip
    return dict(zip(COLUMNS, values)) | {"ms": round(middle * 1e3, 4)}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--case", nargs="*", default=list(CASES), choices=CASES)
    p.add_argument("--shape", nargs="*", default=list(SHAPES), choices=SHAPES)
    p.add_argument("--batch", nargs="*", type=int, default=[1, 16])
    p.add_argument("--dtype", nargs="*", default=list(DTYPES), choices=DTYPES)
    p.add_argument("--variant", nargs="*", default=["fused", "one_launch", "compile", "reference", "eager"])
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--seconds", type=float, default=1.0, help="for each variant")
    p.add_argument("--csv", type=Path)
    a = p.parse_args()
    print(
        f"{'case':18}{'variant':11}{'shape':20}{'dtype':6}{'ms':>10}{'GB/s':>9}{'of copy':>9}{'max err':>10}{'MiB':>9}"
    )
    for name, shape, batch, dtype in ((n, s, b, d) for n in a.case for s in a.shape for b in a.batch for d in a.dtype):
        rows = measure(name, (batch, *SHAPES[shape]), dtype, a.device, a.variant, a.seconds)
        for r in rows:
            print(f"{r['case']:18}{r['variant']:11}{r['shape']:20}{r['dtype']:6}{r['ms']:10.3f}{r['gb_s']:>9}{r['of_peak']:9.3f}"
                  f"{r['max_err']:>10}{r['peak_mib']:>9}", flush=True)  # fmt: skip
        if a.csv:
            new = not a.csv.exists()
            with a.csv.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader() if new else None
                writer.writerows(rows)


if __name__ == "__main__":
    main()

"""Measure the cases and append tidy rows: python -m benchmarks.run --shape wan --batch 16 --csv benchmarks/results/x.csv

Every sample of a variant is taken next to one of the copy. On a GPU the L2 is flushed before each sample, and `ms` is the
device's time alone: the launches have queued up before it begins, and the host's time stands in a column apart. Nothing is
timed whose gradient is wrong.
"""

import itertools
import time
from collections.abc import Sequence

import torch

from benchmarks.cases import CASES, DTYPES, SHAPES, Case, Setting
from benchmarks.rows import DEVICE, Arguments, Clock, Row, Times, append_rows, cell, device_name, ranged

OURS = ("fused", "one_launch")


def error(case: Case, variant: str) -> float | None:
    """Of a variant's result, relative to the largest exact value; None where there is none."""
    if case.exact is None or (case.drawn and variant != "fused"):
        return None
    result = case.variants[variant]()[: len(case.exact)].double()
    return ((result - case.exact).abs().max() / case.exact.abs().max().clamp(min=1e-300)).item()


def measure(name: str, setting: Setting, variants: Sequence[str], seconds: float, red: list[str]) -> list[Row]:
    """Rows of one case; the first is the copy of the bytes that the case moves. red: takes a line for each variant of ours
    whose result is wrong."""
    torch.compiler.reset()  # a shape that was compiled before must not make this one's sizes dynamic
    case, clock = CASES[name](setting), Clock(setting.device)
    source, target = (torch.ones(case.bytes_moved // 2, dtype=torch.uint8, device=setting.device) for _ in range(2))
    eager_err = error(case, "eager")
    bound = 2 * (eager_err or 0.0) + 2 * torch.finfo(setting.dtype).eps
    device = device_name(setting.device)
    shape = "x".join(map(str, setting.shape))
    dtype = next(short for short, dtype in DTYPES.items() if dtype == setting.dtype)
    kind = "noise" if name == "forward_noise" else "loss+grad"
    copies, rows = Times(), []
    for variant in [v for v in variants if v in case.variants]:
        err = error(case, variant)
        if variant != "eager" and err is not None and not err <= bound:
            wrong = (
                f"{name}/{variant} {shape} {dtype}: error {err:.2e} above {bound:.2e}; nothing is timed on a red test"
            )
            print(wrong)
            red += [wrong] * (variant in OURS)  # somebody else's arithmetic is only left out
            continue
        call = case.variants[variant]
        call()
        times, stop = Times(peak_mib=clock.peak_mib(call)), time.perf_counter() + seconds
        while len(times.samples) < 5 or (time.perf_counter() < stop and len(times.samples) < 200):
            clock.add(lambda: target.copy_(source), copies)
            clock.add(call, times)
        rows.append(
            Row(name, variant, shape, times, kind, dtype, device, case.bytes_moved, max_err=err, eager_err=eager_err)
        )
    if not rows:
        return []
    rows.insert(0, Row(name, "copy", shape, copies, kind, dtype, device, case.bytes_moved, max_err=0.0))
    for row in rows:
        row.of_peak = copies.ms / row.times.ms
    return rows


def main() -> None:
    p = Arguments(__doc__)
    p.add_argument("--case", nargs="*", default=list(CASES), choices=CASES)
    p.add_argument("--shape", nargs="*", default=list(SHAPES), choices=SHAPES)
    p.add_argument("--batch", nargs="*", type=ranged(int, 1), default=[1, 16])
    p.add_argument("--dtype", nargs="*", default=list(DTYPES), choices=DTYPES)
    p.add_argument("--variant", nargs="*", default=[*OURS, "compile", "reference", "eager"])
    p.add_argument("--device", default=DEVICE)
    p.add_argument("--seconds", type=ranged(float, 0), default=1.0, help="per variant")
    a = p.parsed()
    print(
        f"{'case':18}{'variant':11}{'shape':20}{'dtype':6}{'ms':>10}{'host ms':>9}{'GB/s':>9}{'of copy':>9}{'max err':>10}{'MiB':>9}"
    )
    red: list[str] = []
    for name, shape, batch, dtype in itertools.product(a.case, a.shape, a.batch, a.dtype):
        rows = measure(name, Setting((batch, *SHAPES[shape]), DTYPES[dtype], a.device), a.variant, a.seconds, red)
        for r in rows:
            print(f"{r.case:18}{r.variant:11}{r.shape:20}{r.dtype:6}{r.times.ms:10.3f}{cell(r.times.host_ms, '.3f'):>9}{cell(r.gb_s, '.1f'):>9}"
                  f"{cell(r.of_peak, '.3f'):>9}{cell(r.max_err, '.2e'):>10}{cell(r.times.peak_mib, '.1f'):>9}", flush=True)  # fmt: skip
        if a.csv:
            append_rows(a.csv, rows)
    if red:
        raise SystemExit("\n".join(["wrong results:", *red]))


if __name__ == "__main__":
    main()

"""docs/performance.md from rows: python -m benchmarks.report benchmarks/results/*.csv [--out docs/performance.md]

For every device its tables and, with matplotlib, a picture next to the page: what a kernel reaches against the copy of the
same bytes. Nothing is computed that the rows do not hold; of rows with the same name the last counts.
"""

import argparse
import csv
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path

Cells = dict[str, str]  # of a row, by column
NAME = ("device", "case", "pass", "shape", "dtype")  # of what is compared; variants differ
OURS, COPY, PEER = ("fused", "one_launch"), "copy", "official"
PLAIN = ("compile", "reference", "eager")
ABOUT = """# Performance

Written by `python -m benchmarks.report` from the rows of `benchmarks/results`; `make gpu` measures them on a GPU
(`benchmarks/gpu.sh`). `ms` is a median. For kernels it is the device's time alone, `host ms` what Python and PyTorch need to
launch; for rollouts, updates and iterations it is the time that a user waits. Nothing is timed whose result is wrong.
"""
NO_GPU = "\n**No GPU has been measured.** There are rows of CPUs only, and no figure for a GPU anywhere in this repository is a measurement.\n"


def read(paths: Iterable[Path]) -> list[Cells]:
    """The rows of all files, the last of each name."""
    found: dict[tuple[str, ...], Cells] = {}
    for path in paths:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                found[(*(row[key] for key in NAME), row["variant"])] = row
    return list(found.values())


def number(row: Cells | None, column: str) -> float | None:
    """None for a missing row or an empty cell."""
    return float(row[column]) if row and row.get(column) else None


def text(x: float | None, form: str = ".3g") -> str:
    return "" if x is None else f"{x:,.0f}" if x >= 1000 else format(x, form)


def ratio(a: Cells | None, b: Cells | None) -> float | None:
    """a's time / b's time."""
    over, under = number(a, "ms"), number(b, "ms")
    return over / under if over is not None and under else None


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---" if i == 0 else "---:" for i in range(len(header))], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def groups(rows: Iterable[Cells]) -> dict[tuple[str, ...], dict[str, Cells]]:
    """Rows by what is compared, then by variant."""
    found: dict[tuple[str, ...], dict[str, Cells]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in NAME), {})[row["variant"]] = row
    return found


def kernels(rows: list[Cells]) -> str:
    """What is compared with the copy of its bytes."""
    lines = []
    for (_, case, _, shape, dtype), variants in groups(rows).items():
        copy = variants.get(COPY)
        for ours in (v for v in OURS if copy and v in variants):
            mine = variants[ours]
            others = [text(ratio(variants.get(v), mine), ".2f") for v in PLAIN]
            share = ratio(copy, mine)
            lines.append([
                case if ours == "fused" else f"{case} ({ours})", shape, dtype, text(number(mine, "ms")),
                text(number(mine, "host_ms")), text(number(mine, "gb_s")), text(share and 100 * share, ".0f"), *others,
                text(number(mine, "max_err"), ".1e"),
            ])  # fmt: skip
    header = ["kernel", "shape", "dtype", "ms", "host ms", "GB/s", "% of the copy", "compile / ours", "reference / ours",
              "eager / ours", "max error"]  # fmt: skip
    return "\n### Kernels\n\n" + table(header, lines) if lines else ""


def peers(rows: list[Cells]) -> str:
    """The official model next to ours."""
    lines = []
    for (_, case, _, shape, dtype), variants in groups(rows).items():
        if PEER in variants and "ours" in variants:
            theirs, mine = variants[PEER], variants["ours"]
            lines.append([
                case.removeprefix("peer_"), shape, dtype, text(number(theirs, "ms")), text(number(mine, "ms")),
                text(ratio(theirs, mine), ".2f"), text(number(mine, "max_err"), ".1e"),
            ])  # fmt: skip
    header = ["same weights and inputs", "shape", "dtype", "official ms", "ours ms", "official / ours", "difference"]
    return "\n### The official Self-Forcing model\n\n" + table(header, lines) if lines else ""


def whole(rows: list[Cells]) -> str:
    """Everything else: a line for each row."""
    lines = []
    for variants in groups(rows).values():
        if COPY in variants or PEER in variants:
            continue
        for name, row in variants.items():
            peak = number(row, "of_peak")
            spread = f"{text(number(row, 'ms_p20'))} to {text(number(row, 'ms_p80'))}"
            lines.append([
                f"{row['case']}: {name}", row["shape"], row["dtype"], text(number(row, "ms")), spread,
                text(number(row, "host_ms")), text(number(row, "tflop_s")), text(peak and 100 * peak, ".0f"),
                text(number(row, "peak_mib")),
            ])  # fmt: skip
    header = ["what", "shape", "dtype", "ms", "p20 to p80", "host ms", "TFLOP/s", "% of peak", "peak MiB"]
    return "\n### Rollout, VAE, training\n\n" + table(header, lines) if lines else ""


def goals(rows: list[Cells]) -> str:
    """Measured against the goals, where there is a row of a full-size network on a GPU."""
    by = {(r["case"], r["variant"], r["shape"].split(" F")[0]): r for r in rows if "104" in r["shape"]}
    plain = by.get(("rollout", "plain", "B1"))
    four = next(
        (r for r in rows if r["case"] == "four_steps" and r["variant"] == "chunk5" and "1560" in r["shape"]), None
    )
    vae = number(by.get(("vae", "chunk3", "F21 60x104")), "ms")
    detached, forced = (by.get(("update_1.3b", v, "B1")) for v in ("detached", "forced"))
    kernel = [
        (number(v["fused"], "of_peak") or 0.0)
        for (_, case, _, shape, dtype), v in groups(rows).items()
        if case == "nft_afd" and dtype == "bf16" and shape.startswith("16x21x16x60x104") and "fused" in v
    ]
    official = next((v for (_, case, *_), v in groups(rows).items() if case == "peer_rollout" and PEER in v), {})
    fps = number(plain, "ms")
    found = [
        ("rollout of 81 frames, student alone, frames per second", fps and 81e3 / fps, ">= 49 on an H200"),
        ("four steps of the sixth block, ms", number(four, "ms"), "<= 266 on an H100"),
        ("nft_loss and gradient, % of the copy", 100 * kernel[0] if kernel else None, ">= 90"),
        ("VAE, 81 frames, s", vae and vae / 1e3, "<= 0.7"),
        ("teacher forcing / our update", ratio(forced, detached), ">= 1.9"),
        ("official pipeline / our rollout", ratio(official.get(PEER), official.get("ours")), ">= 2.2"),
    ]
    lines = [[what, text(x), goal] for what, x, goal in found if x is not None]
    return "\n### Goals\n\n" + table(["what", "measured", "goal"], lines) if lines else ""


def draw(rows: list[Cells], target: Path) -> bool:
    """GB/s over bytes, a panel for each kernel, the copy as the roof. False where there is nothing to draw or no matplotlib."""
    compared = {name: v for name, v in groups(rows).items() if COPY in v and number(v[COPY], "gb_s")}
    if not compared or importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(name[1] for name in compared))
    columns = min(4, len(cases))
    figure, axes = plt.subplots(
        -(-len(cases) // columns), columns, figsize=(4 * columns, 3.2 * -(-len(cases) // columns)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    for axis, case in zip(axes.flat, cases):
        points: dict[str, list[tuple[float, float]]] = {}
        for name, variants in compared.items():
            for variant, row in variants.items():
                rate, ms = number(row, "gb_s"), number(row, "ms")
                if name[1] == case and rate and ms:
                    points.setdefault(variant, []).append((rate * ms, rate))  # GB/s x ms = MB
        for variant, found in points.items():
            line = dict(color="black", linewidth=1) if variant == COPY else dict(marker="o", linestyle="", markersize=4)
            axis.plot(*zip(*sorted(found)), label="copy (roof)" if variant == COPY else variant, **line)
        axis.set(xscale="log", yscale="log", title=case, xlabel="MB moved at least", ylabel="GB/s")
        axis.legend(fontsize=6)
    figure.savefig(target, dpi=110)
    return True


def page(rows: list[Cells], out: Path) -> str:
    """The page; the pictures are written next to `out`."""
    devices = sorted({r["device"] for r in rows}, key=lambda d: (d.startswith("cpu"), d))
    parts = [ABOUT] + ([] if any(not d.startswith("cpu") for d in devices) else [NO_GPU])
    for device in devices:
        mine = [r for r in rows if r["device"] == device]
        made = sorted({f"{r['date']}, commit {r['commit']}, torch {r['torch']}, triton {r['triton']}" for r in mine})
        parts.append(f"\n## {device}\n\n" + "\n".join(f"* {line}" for line in made) + "\n")
        parts += [goals(mine)] * (not device.startswith("cpu"))
        picture = out.with_name(f"{out.stem}-{device.replace(' ', '-')}.png")
        if draw(mine, picture):
            parts.append(
                f"\n![GB/s of the kernels on {device}, with the copy of the same bytes as the roof]({picture.name})\n"
            )
        parts += [kernels(mine), peers(mine), whole(mine)]
    return "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("docs/performance.md"))
    args = parser.parse_args()
    if missing := [str(p) for p in args.rows if not p.is_file()]:
        parser.error(f"no such file: {', '.join(missing)}; `python -m benchmarks.run --csv FILE` writes one")
    rows = read(args.rows)
    if not rows:
        parser.error("the files have no rows; `python -m benchmarks.run --csv FILE` writes some")
    args.out.write_text(page(rows, args.out), encoding="utf-8")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()

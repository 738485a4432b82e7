"""Bars of the time over the copy's time, one panel per case: python -m benchmarks.plot results.csv out.png"""

import argparse
import csv
from pathlib import Path

Cells = dict[str, str]  # of a CSV row, by column


def read_rows(path: Path) -> list[Cells]:
    """Rows that were compared with a copy or a peak, without the copies themselves."""
    with path.open(newline="") as file:
        return [r for r in csv.DictReader(file) if r["variant"] != "copy" and r["of_peak"]]


def draw(rows: list[Cells], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(r["case"] for r in rows))
    figure, axes = plt.subplots(len(names), 1, figsize=(10, 3 * len(names)), squeeze=False)
    for axis, name in zip(axes[:, 0], names):
        case = [r for r in rows if r["case"] == name]
        labels = list(dict.fromkeys(f"{r['shape']} {r['dtype']}" for r in case))
        variants = list(dict.fromkeys(r["variant"] for r in case))
        width = 0.8 / len(variants)
        for k, variant in enumerate(variants):
            ratio = {f"{r['shape']} {r['dtype']}": 1 / float(r["of_peak"]) for r in case if r["variant"] == variant}
            places, heights = [i + k * width for i in range(len(labels))], [ratio.get(x, 0) for x in labels]
            axis.bar(places, heights, width, label=variant)
        axis.set_xticks([i + 0.3 for i in range(len(labels))], labels, rotation=20, ha="right", fontsize=7)
        axis.set_yscale("log")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_ylabel("time / copy of the same bytes")
        axis.set_title(f"{name} ({case[0]['device']})")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(target, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    rows = read_rows(args.source)
    if not rows:
        parser.error(
            f"{args.source} has no rows with of_peak; `python -m benchmarks.run --csv {args.source}` writes some"
        )
    draw(rows, args.target)


if __name__ == "__main__":
    main()

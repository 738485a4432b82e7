"""Bars of the time over the copy's time, one panel a case: python -m benchmarks.plot results.csv out.png"""

import csv
import sys


def main(source: str, target: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with open(source, newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["variant"] != "copy"]
    names = list(dict.fromkeys(r["case"] for r in rows))
    figure, axes = plt.subplots(len(names), 1, figsize=(10, 3 * len(names)), squeeze=False)
    for axis, name in zip(axes[:, 0], names):
        mine = [r for r in rows if r["case"] == name]
        labels = list(dict.fromkeys(f"{r['shape']} {r['dtype']}" for r in mine))
        variants = list(dict.fromkeys(r["variant"] for r in mine))
        for k, variant in enumerate(variants):
            found = {f"{r['shape']} {r['dtype']}": 1 / float(r["of_peak"]) for r in mine if r["variant"] == variant}
            axis.bar([i + k * 0.8 / len(variants) for i in range(len(labels))], [found.get(x, 0) for x in labels],
                     0.8 / len(variants), label=variant)  # fmt: skip
        axis.set_xticks([i + 0.3 for i in range(len(labels))], labels, rotation=20, ha="right", fontsize=7)
        axis.set_yscale("log")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_ylabel("time / copy of the same bytes")
        axis.set_title(f"{name} ({mine[0]['device']})")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:3])

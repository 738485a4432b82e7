"""Every benchmark runs at its smallest. What it measures is not asserted: times belong to benchmarks/."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = {
    "run --shape tiny --batch 1 --seconds 0.01": "fused",
    "rollout forward --size tiny": "four_steps",
    "discriminator --size tiny --pairs 2 --repeats 1": "packed",
    "update --frames 6 --repeats 1": "teacher forcing",
    "step --size tiny --iterations 1": "optimiser",
    "methods --size tiny --iterations 1": "rejection",
}


def output(module: str, *words: object) -> str:
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("case", COMMANDS)
def test_runs(case: str) -> None:
    assert COMMANDS[case] in output(*case.split())


def test_rows_go_to_a_file_and_a_figure(tmp_path: Path) -> None:
    rows, figure = tmp_path / "rows.csv", tmp_path / "figure.png"
    words = "--case nft_afd --shape tiny --batch 1 --dtype fp32 --variant fused eager --seconds 0 --csv".split()
    for _ in range(2):
        output("run", *words, rows)
    with rows.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [r["variant"] for r in found] == 2 * ["copy", "fused", "eager"]
    assert all(float(r["ms"]) > 0 and float(r["of_peak"]) > 0 and r["pass"] == "loss+grad" for r in found)
    output("plot", rows, figure)
    assert figure.read_bytes().startswith(b"\x89PNG")

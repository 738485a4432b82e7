"""Every benchmark runs at its smallest. What it measures is not asserted: times belong to benchmarks/."""

import os
import subprocess
import sys

import pytest

COMMANDS = {
    "run --shape tiny --batch 1 --seconds 0.01": "fused",
    "rollout forward --size tiny": "four_steps",
    "discriminator --size tiny --pairs 2 --repeats 1": "packed",
    "update --frames 6 --repeats 1": "teacher forcing",
    "step --size tiny --iterations 1": "optimiser",
    "methods --size tiny --iterations 1": "rejection",
}


@pytest.mark.parametrize("case", COMMANDS)
def test_runs(case):
    module, *words = case.split()
    command = [sys.executable, "-m", f"benchmarks.{module}", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and COMMANDS[case] in done.stdout, done.stdout + done.stderr

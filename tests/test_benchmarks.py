"""Every benchmark runs at its smallest. What it measures is not asserted: times belong to benchmarks/."""

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


@pytest.mark.parametrize("command", COMMANDS)
def test_runs(command):
    module, *words = command.split()
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{module}", *words], capture_output=True, text=True)
    assert done.returncode == 0 and COMMANDS[command] in done.stdout, done.stdout + done.stderr

"""What docs/profiling.md says to type starts, and its ranges and kernels have the names it uses. No profiler is needed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from afd_kernels import nft, noise

from afd_fast.config import with_values
from afd_fast.teachers.dataset import Shard
from afd_fast.training.loop import train_step
from tests.runs import toy_run

ROOT = Path(__file__).parent.parent
DOC = (ROOT / "docs/profiling.md").read_text()
STUB = """#!{python}
import os, sys
words = sys.argv[1:]
print("PROFILER", *words, flush=True)
while words and words[0] != {python!r}:
    words = words[1:]
if words:
    os.execv(words[0], words)
"""


def ran(command: list[str], folder: Path, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """A command with stand-ins for nsys and ncu, which run the program behind their options."""
    for name in ("nsys", "ncu"):
        (folder / name).write_text(STUB.format(python=sys.executable))
        (folder / name).chmod(0o755)
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": sys.executable} | (environ or {})
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)


def test_profile_sh(tmp_path):
    (line,) = re.findall(r"^benchmarks/profile.sh (.+?) *#", DOC, re.M)
    words = line.replace("afd_table3 student=...", "demo").split()
    done = ran([str(ROOT / "benchmarks/profile.sh"), *words, "--dry-run"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    profile, stats = (line for line in done.stdout.splitlines() if line.startswith("PROFILER"))
    assert "--trace cuda,nvtx,osrt" in profile and "-m afd_fast train demo iterations=3" in profile
    assert "nvtx_sum,cuda_gpu_kern_sum" in stats and "profile.nsys-rep" in stats
    without = subprocess.run(
        ["/bin/bash", ROOT / "benchmarks/profile.sh"], capture_output=True, text=True, env={"PATH": "/bin"}
    )
    assert without.returncode == 2 and "needs nsys" in without.stderr


def test_ncu_lines(tmp_path):
    """Both, up to where a run would begin or a GPU is needed."""
    lines = re.findall(r"^ncu .+\\\n.+$", DOC, re.M)
    assert len(lines) == 2
    for line, end in zip(lines, (" --dry-run", " --gpu")):
        words = line.replace("\\\n", " ").partition("#")[0].replace("afd_table3 student=...", "demo") + end
        command = [sys.executable if word == "python" else word for word in shlex.split(words)]
        done = ran([str(tmp_path / command[0]), *command[1:]], tmp_path)
        assert done.stdout.startswith("PROFILER --set full --clock-control none")
        said = done.stdout + done.stderr
        assert done.returncode == 0 or "needs a CUDA device" in said, said
    kernels = re.search(r'regex:"(.+?)"', lines[1])[1].split("|")
    assert all(hasattr(nft, name) or hasattr(noise, name) for name in kernels)


def test_phases_are_ranges_of_a_profile(tiny_config):
    """Every phase of an iteration that has all of them, by the names of the page."""
    config = with_values(tiny_config, {"discriminator.warmup": 0})
    run, words = toy_run(config), ["a red ball dropped"] * 2
    shards = [Shard(0, words, torch.rand(2, 3, *run.family.video[:3]))]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train_step(run, shards)
    found = {
        event.key.removeprefix("afd_fast.") for event in profile.key_averages() if event.key.startswith("afd_fast.")
    }
    listed = DOC[DOC.index("`rollout`") : DOC.index("`encode` in SFT")]
    assert found == set(re.findall(r"`(\w+)`", listed)) == {key.partition("/")[2] for key in run.seconds}
    assert re.search(r'"afd_fast\.(\w+)/"', DOC)[1] in found

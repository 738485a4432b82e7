"""The command's OpenMP settings: made before PyTorch is loaded, following affinity and quota, and never over the user's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from afd_fast import threads

ROOT = Path(__file__).parent.parent
LINES = {  # /proc/self/cgroup, the files below /sys/fs/cgroup, and the quota in CPUs
    "v2": ("0::/a/b\n", {"a/b/cpu.max": "150000 100000\n"}, 1.5),
    "v2, of a group above": ("0::/a/b\n", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2.0),
    "v2, the lowest": ("0::/a\n", {"cpu.max": "50000 100000", "a/cpu.max": "300000 100000"}, 0.5),
    "v2, none": ("0::/\n", {"cpu.max": "max 100000\n"}, None),
    "v1": (
        "5:memory:/x\n4:cpu,cpuacct:/x\n",
        {"cpu,cpuacct/x/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n"},
        2.5,
    ),
    "v1 in a container, whose mount is the group": (
        "4:cpu,cpuacct:/docker/1\n",
        {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "50000"},
        2.0,
    ),
    "v1, none": ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    "another controller's": ("4:memory:/\n", {"memory/cpu.cfs_quota_us": "1", "memory/cpu.cfs_period_us": "1"}, None),
    "damaged": ("0::/\nnonsense\n", {"cpu.max": "a b c\n"}, None),
}


@pytest.mark.parametrize("case", LINES)
def test_quota(case, tmp_path):
    own, files, expected = LINES[case]
    for name, text in {"proc/self/cgroup": own, **{f"sys/fs/cgroup/{n}": t for n, t in files.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.quota(tmp_path) == expected


def test_no_control_groups(tmp_path):
    assert threads.quota(tmp_path) is None


@pytest.mark.parametrize(
    ("limit", "cores", "expected"), [(None, 8, 8), (2.9, 8, 2), (0.3, 8, 1), (16, 4, 4), (None, 1, 1)]
)
def test_threads_follow_the_lower_of_affinity_and_quota(limit, cores, expected, monkeypatch):
    monkeypatch.setattr(threads, "quota", lambda: limit)
    monkeypatch.setattr(threads, "affinity", lambda: cores)
    monkeypatch.setattr(threads, "_own", set())
    monkeypatch.delenv(threads.COUNT, raising=False)
    assert threads.cpus() == expected
    assert threads.share(2) == {threads.COUNT: str(max(1, expected // 2))}
    monkeypatch.setenv(threads.COUNT, "7")
    assert threads.share(2) == {}  # the user's
    monkeypatch.setattr(threads, "_own", {threads.COUNT})
    assert threads.share(2) == {threads.COUNT: str(max(1, expected // 2))}  # the command's


def environment(*command, **given):
    """OMP_* in a process started by `command` once PyTorch is about to be loaded, or at its end."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    env = clean | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"} | given
    done = subprocess.run([sys.executable, *command], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_sleeps_while_it_waits_unless_told_otherwise():
    """OpenMP reads its variables when PyTorch loads it: `env`, which loads it, must find them set."""
    said = environment("-m", "afd_fast", "env")
    assert "OMP_WAIT_POLICY=PASSIVE (default of afd-fast" in " ".join(said.split())
    said = environment("-m", "afd_fast", "env", OMP_WAIT_POLICY="ACTIVE", OMP_DISPLAY_ENV="TRUE")
    assert "OMP_WAIT_POLICY=ACTIVE (from the environment)" in " ".join(said.split())


def test_openmp_is_loaded_after_the_setting():
    """A module that stands for PyTorch notes the environment that it is imported in."""
    code = (
        "import sys, os\n"
        "class Spy:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': print(os.environ.get('OMP_WAIT_POLICY')); sys.exit()\n"
        "sys.meta_path.insert(0, Spy()); sys.argv = ['/x/bin/afd-fast', 'env']\n"
        "import afd_fast.__main__\n"
    )
    assert environment("-c", code).strip() == "PASSIVE"
    assert environment("-c", code, OMP_WAIT_POLICY="ACTIVE").strip() == "ACTIVE"
    assert environment("-c", code.replace("bin/afd-fast", "bin/python")).strip() == "None"  # a program that imports it

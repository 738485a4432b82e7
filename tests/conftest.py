import os
import random
import shlex
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: workers and the processes they start share the cores
import numpy as np
import pytest
import torch  # and of afd_fast, only what a fixture imports: the core's tests run where the extras are not installed


def pytest_addoption(parser):
    parser.addoption("--trainers", metavar="PATH", help="a folder of trainers' checkouts, for test_trainers.py")
    parser.addoption("--seed", type=int, default=0, help="of the random numbers that a test does not seed itself")
    parser.addoption("--time", action="store_true", help="test_trainers.py also prints times and memory (with -s)")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """A test's numbers are the same whatever ran before it."""
    seed = item.config.getoption("--seed")
    torch.manual_seed(seed)
    random.seed(seed)


@pytest.fixture(autouse=True)
def _threads():
    torch.set_num_threads(1)


@pytest.fixture
def say(monkeypatch, capsys, tmp_path):
    """Runs a command in an empty folder: (exit status, what it printed, in one line). A process of its own is for what must
    be killed, or must start as a user's does."""
    from afd_fast.cli import common
    from afd_fast.cli.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common.console, "width", 300)

    def command(*words):
        """A line, or its words."""
        words = shlex.split(words[0]) if len(words) == 1 else map(str, words)
        monkeypatch.setattr(sys, "argv", ["afd-fast", *words])
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        printed = capsys.readouterr()
        return status, " ".join((printed.out + printed.err).split())

    return command


@pytest.fixture
def tiny_config():
    """Four iterations, one of them warm-up: seconds, not minutes."""
    from afd_fast.config import TrainConfig, with_values

    return with_values(TrainConfig(), {
        "name": "tiny", "iterations": 4, "discriminator.warmup": 1, "teacher_clips": 1, "prompts_per_step": 3,
        "rollouts_per_prompt": 2, "evaluation.every": 2, "evaluation.rollouts": 2, "checkpoint_every": 2,
        "student.lora_rank": 4,
    })  # fmt: skip


@pytest.fixture
def few_prompts(monkeypatch):
    """The physics world with six training and two held-out prompts."""
    from afd_fast.teachers import physics
    from afd_fast.teachers.teacher import PromptSplit

    prompts = physics.all_prompts()
    monkeypatch.setattr(physics, "split_prompts", lambda **look: PromptSplit(prompts[:60:10], prompts[5:50:30]))


@pytest.fixture(scope="session")
def folder_teacher(tmp_path_factory):
    """Twelve real mp4 files, one of them too short and one broken."""
    from afd_fast.teachers.physics import FPS, all_prompts, sample_clips
    from afd_fast.video_io import write_video

    folder = tmp_path_factory.mktemp("videos")
    prompts = all_prompts()[::12][:10]
    rows = ["prompt,video"]
    for i, clip in enumerate(sample_clips(prompts, np.random.default_rng(0))):
        large = clip.repeat_interleave(4, -1).repeat_interleave(4, -2)
        write_video(folder / f"{i}.mp4", large, FPS, crf=18)
        rows.append(f'"{prompts[i]}",{i}.mp4')
    write_video(folder / "short.mp4", large[:, :3], FPS)
    (folder / "broken.mp4").write_bytes(b"no video")
    rows += ["a short one,short.mp4", "a broken one,broken.mp4"]
    (folder / "manifest.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64])
def default_dtype(request):
    """torch.set_default_dtype inside the test, which is called to switch it on."""
    before = torch.get_default_dtype()
    yield lambda: torch.set_default_dtype(request.param)
    torch.set_default_dtype(before)

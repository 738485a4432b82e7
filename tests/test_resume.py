"""What a run survives: damage, a planted pickle, a second process, a full disk; and how it is continued and extended."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from rich.console import Console

from afd_fast.config import TrainConfig, with_values
from afd_fast.errors import CheckpointError, ConfigError, TrainingError
from afd_fast.reports.run import write_report
from afd_fast.students.files import read_tensors
from afd_fast.students.lora import trainable
from afd_fast.teachers import physics
from afd_fast.teachers.teacher import PromptSplit
from afd_fast.training import checkpoint, run_folder, train
from afd_fast.training.distributed import Ranks
from afd_fast.training.lock import RUN, check_unused, locked
from tests.runs import QUIET, changed, trainer

ALONE = Ranks()
CONFIG = with_values(TrainConfig(), {
    "name": "tiny [/x]", "iterations": 4, "discriminator.warmup": 1, "teacher_clips": 1, "prompts_per_step": 3,
    "rollouts_per_prompt": 2, "evaluation.every": 2, "evaluation.rollouts": 2, "checkpoint_every": 2, "student.lora_rank": 4,
})  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _few_prompts():
    prompts = physics.all_prompts()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(physics, "split_prompts", lambda **look: PromptSplit(prompts[:60:10], prompts[5:50:30]))
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory, _few_prompts):
    """A finished run in a folder `run [/x]` with its teacher cache next to it."""
    folder = tmp_path_factory.mktemp("done")
    train(CONFIG, out=folder / "run [/x]", console=Console(file=open(os.devnull, "w"), force_terminal=True))
    return folder


@pytest.fixture
def run(done, tmp_path):
    """A copy of it."""
    shutil.copytree(done, tmp_path / "copy")
    return tmp_path / "copy" / "run [/x]"


def state(folder):
    return checkpoint.load(checkpoint.latest(folder / "checkpoints"))["state"]


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def flip(path, position):
    """Turn one bit of a file."""
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 4]))


# -- checkpoints -----------------------------------------------------------------------------------------------


def test_the_newest_checkpoint_is_the_one_of_most_steps(tmp_path):
    for step in (999_998, 999_999, 1_000_000):
        checkpoint.save(tmp_path, step, {"step": step})
    (tmp_path / "step-final.pt").touch()  # somebody's copy
    assert [p.name for p in checkpoint.saved(tmp_path, ".pt")] == ["step-1000000.pt", "step-999999.pt"]
    assert checkpoint.latest(tmp_path).name == "step-1000000.pt"


def test_a_flipped_bit_is_noticed(tmp_path):
    """Every flip is refused or harmless, in a checkpoint and in other files of torch.save."""
    payload, rng, refused = {"x": torch.randn(2000), "y": {"lr": 0.5}}, random.Random(0), 0
    path = checkpoint.save(tmp_path, 1, payload)
    size = path.stat().st_size
    for position in [rng.randrange(size) for _ in range(200)]:
        flip(path, position)
        for load in (checkpoint.load, read_tensors):
            try:
                assert equal(load(path), payload)
            except (CheckpointError, ConfigError) as error:
                refused += 1
                assert path.name in str(error) and "\n" not in str(error)
        flip(path, position)
    assert refused > 300 and equal(checkpoint.load(path), payload)


def test_a_flipped_bit_in_a_sharded_checkpoint_is_noticed(tmp_path):
    payload = {"state": {"step": 3, "x": torch.randn(100)}, "elapsed": 2.0}
    blank = lambda keys: {"state": {"step": 0, "x": torch.zeros(100)}, "elapsed": 0.0}
    path = checkpoint.save_sharded(tmp_path, 3, payload, ALONE)
    assert equal(checkpoint.load_sharded(path, blank, ALONE), payload)
    for file in [p for p in path.iterdir() if p.name != checkpoint.SUMS]:
        flip(file, file.stat().st_size // 2)
        with pytest.raises(CheckpointError, match=f"{file.name} has changed"):
            checkpoint.load_sharded(path, blank, ALONE)
        flip(file, file.stat().st_size // 2)
    assert equal(checkpoint.load_sharded(path, blank, ALONE), payload)


class Evil:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def test_no_pickle_is_run(tmp_path):
    """Planted as DCP's metadata, as one of its plain values, or as a .dcp folder in a run without FSDP."""
    bomb, blank = tmp_path / "bomb", lambda keys: {"state": {"step": 0}}
    path = checkpoint.save_sharded(tmp_path, 9, {"state": {"step": Evil(bomb)}}, ALONE)
    with pytest.raises(CheckpointError, match="cannot be read .UnpicklingError: Weights only"):
        checkpoint.load_sharded(path, blank, ALONE)
    (path / ".metadata").write_bytes(pickle.dumps(Evil(bomb)))
    (path / checkpoint.SUMS).unlink()
    checkpoint._write_sums(path)  # as whoever plants it would
    with pytest.raises(CheckpointError, match="could run code: refused"):
        checkpoint.load_sharded(path, blank, ALONE)
    assert not bomb.exists()
    assert [p.name for p in run_folder.checkpoints(tmp_path.parent, CONFIG)] == []


def test_a_damaged_checkpoint_gives_way_to_the_one_before(run, done):
    """Resuming ends at the same bits, and says so in the log and the report. A planted .dcp folder is not looked at."""
    (run / "result.json").unlink()
    newest = checkpoint.latest(run / "checkpoints")
    assert newest.name == "step-000004.pt"
    flip(newest, newest.stat().st_size // 2)
    (run / "checkpoints/step-000009.dcp").mkdir()
    (run / "checkpoints/step-000009.dcp/.metadata").write_bytes(pickle.dumps(Evil(run / "bomb")))
    lines = (run / "metrics.jsonl").read_text().split("\n")
    (run / "metrics.jsonl").write_text("\n".join([lines[0][:30], *lines[1:]]))  # torn
    (run / "evaluations.jsonl").write_text((run / "evaluations.jsonl").read_text().replace('"step": 0', '"ste": 0'))
    before = run_folder.read_rows(done / "run [/x]" / "evaluations.jsonl")
    console = Console(record=True, file=open(os.devnull, "w"), width=500)
    result = train(CONFIG, out=run, resume=True, console=console)
    said = console.export_text()
    assert "step-000004.pt.damaged, continuing from step-000002.pt" in said and "resuming after iteration 2" in said
    assert equal(checkpoint.load(run / "checkpoints/step-000004.pt")["state"], state(done / "run [/x]"))
    assert (run / "checkpoints/step-000004.pt.damaged").exists() and not (run / "bomb").exists()
    assert [row["step"] for row in run_folder.read_rows(run / "metrics.jsonl")] == [1, 2, 3]
    assert [row["step"] for row in run_folder.read_rows(run / "evaluations.jsonl")] == [0, 2, 4]
    base = result["rows"]["base"]
    assert base == {key: before[0][key] for key in base} and "residual_px" in base
    assert result["rows"]["student"] == {key: value for key, value in before[-1].items() if key != "by_prompt"}
    assert run_folder.read_rows(run / "evaluations.jsonl")[-1] == before[-1]
    assert [note.partition(":")[0] for note in result["notes"]] == ["after iteration 2"] * 2
    assert "step-000004.pt.damaged" in write_report(run).read_text()


def test_without_a_valid_checkpoint_nothing_is_touched(run):
    (run / "result.json").unlink()
    for path in (run / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=r"step-000004.*step-000002.*restore one, or start again"):
        train(CONFIG, out=run, resume=True, console=QUIET)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000002.pt", "step-000004.pt"]


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """Also at the last iteration: the run ends with an error, not with a dead student."""
    run = trainer(CONFIG, tmp_path / "run")
    name, parameter = list(trainable(run.run.state.student).items())[2]

    def poison(row):
        if row["step"] == 3:
            parameter.data.view(-1)[0] = float("inf")

    with pytest.raises(
        TrainingError, match=rf"iteration 4: student\.{name} is not finite.*step-000002.pt is still valid"
    ):
        run.train(on_step=poison)
    assert checkpoint.latest(tmp_path / "run/checkpoints").name == "step-000002.pt"
    assert not (tmp_path / "run/result.json").exists()


# -- rows and the disk -----------------------------------------------------------------------------------------


def test_damaged_rows_are_skipped_and_said(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 0}\n{"step": 1, "lo\n\x00\x00\xff\n5\n{"step": 2, "text": "\xe2\x80\xa8"}\n\n{"step": 3}'
    )
    assert [row["step"] for row in run_folder.read_rows(path)] == [0, 2, 3]
    assert "metrics.jsonl: 3 damaged lines skipped" in caplog.text
    run_folder.rewind(path, 3)
    run_folder.append(path, {"step": 3})
    caplog.clear()
    assert [row["step"] for row in run_folder.read_rows(path)] == [0, 2, 3] and not caplog.text


def test_rows_are_on_the_disk_before_their_checkpoint(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def noting(file):
        synced.append((Path(os.readlink(f"/proc/self/fd/{file}")).name, os.fstat(file).st_size))
        fsync(file)

    monkeypatch.setattr(os, "fsync", noting)
    run = trainer(changed(CONFIG, iterations=2), tmp_path / "run")
    run.train()
    size = (tmp_path / "run/metrics.jsonl").stat().st_size
    names = [name for name, _ in synced]
    assert synced.index(("metrics.jsonl", size)) < names.index("step-000002.part")
    assert names.index("evaluations.part") < names.index("step-000002.part")


FULL = """
import resource, signal, sys
from pathlib import Path
from afd_fast.cli import main as cli
from afd_fast.training.trainer import Trainer
from tests import test_resume, runs
stage, folder = sys.argv[1], Path(sys.argv[2])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

def fill(*_):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))

with test_resume.pytest.MonkeyPatch.context() as patch:
    prompts = test_resume.physics.all_prompts()
    patch.setattr(test_resume.physics, "split_prompts", lambda **look: test_resume.PromptSplit(prompts[:60:10], prompts[5:50:30]))
    if stage == "metrics":
        job = lambda: runs.trainer(test_resume.CONFIG, folder).train(on_step=lambda row: row["step"] == 2 and fill())
    else:  # the result of a run that is through
        real = Trainer._finish
        patch.setattr(Trainer, "_finish", lambda *a: (fill(), real(*a))[1])
        job = lambda: test_resume.train(test_resume.CONFIG, out=folder, resume=True, console=runs.QUIET)
    patch.setattr(cli, "app", job)
    cli.main()
"""


@pytest.mark.parametrize("stage", ["metrics", "result"])
def test_a_full_disk_is_one_line_with_a_remedy(tmp_path, run, stage):
    """The kernel refuses to write further: in the middle of the run, and when it only lacks its result."""
    folder = tmp_path / "new" if stage == "metrics" else run
    (run / "result.json").unlink()
    done = subprocess.run(
        [sys.executable, "-c", FULL, stage, str(folder)], capture_output=True, text=True,
        cwd=Path(__file__).parent.parent, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 1 and line.startswith("error: iteration") and "File too large" in line
    assert "is still valid" in line and line.endswith("continue with --resume")
    assert not (folder / "result.json").exists()


# -- continuing ------------------------------------------------------------------------------------------------


def test_a_finished_run_is_extended(run):
    """And what else has changed is noted: threads, a teacher's video."""
    before = (run / "result.json").read_bytes()
    assert train(CONFIG, out=run, resume=True, console=QUIET) == json.loads(before)
    for odd, message in (
        (changed(CONFIG, iterations=3), "is a run of 4 iterations: set iterations=4 or more, got 3"),
        (changed(CONFIG, iterations=6, seed=1), "seed=0 there and 1 here.*only iterations may grow"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(odd, out=run, resume=True, console=QUIET)
    assert (run / "result.json").read_bytes() == before
    there = json.loads((run / "environment.json").read_text()) | {"threads": 8}  # as on a larger machine
    (run / "environment.json").write_text(json.dumps(there))
    hashes = json.loads((run / "teacher.json").read_text())  # of other videos
    (run / "teacher.json").write_text(json.dumps({prompt: "0" * 64 for prompt in hashes}))
    result = train(changed(CONFIG, iterations=6), out=run, resume=True, console=QUIET)
    assert result["config"]["iterations"] == 6 and result["rows"]["student"]["step"] == 6
    assert [row["step"] for row in run_folder.read_rows(run / "metrics.jsonl")] == list(range(6))
    assert json.loads((run / "config.json").read_text())["iterations"] == 6 and state(run)["step"] == 6
    environment, iterations, teacher = result["notes"]
    assert environment.startswith("after iteration 4: ") and "threads is 1, was 8" in environment
    assert "iterations is 6, was 4, and the learning rate follows the longer cosine" in iterations
    assert "the teacher's videos or their weights have changed: 'a " in teacher
    assert "threads is 1, was 8" in write_report(run).read_text()


def test_a_damaged_config_is_one_line(run):
    (run / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not JSON"):
        train(CONFIG, out=run, resume=True, console=QUIET)


def test_damage_to_what_can_be_made_again_stops_nothing(run):
    before = (run / "result.json").read_text()
    (run / "result.json").write_text(before[:100])
    (run / "teacher.json").write_text("{")
    result = train(CONFIG, out=run, resume=True, console=QUIET)
    assert json.dumps(result["rows"]) == json.dumps(json.loads(before)["rows"])
    assert "teacher.json is not JSON" in result["notes"][0]
    assert json.loads((run / "teacher.json").read_text())


# -- one process at a time -------------------------------------------------------------------------------------

HOLD = "import sys, time; from afd_fast.training.lock import *\nwith locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"


def test_a_folder_in_use_is_refused_until_its_process_is_gone(run):
    """Also when it was killed. Nothing is read, lost or written meanwhile."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    contents = {p: zlib.crc32(p.read_bytes()) for p in run.rglob("*") if p.is_file()}
    for how in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(ConfigError, match=f"is in use by process {holder.pid} on .*stop it with kill"):
            train(changed(CONFIG, iterations=9 if "resume" in how else 4), out=run, console=QUIET, **how)
    assert contents == {p: zlib.crc32(p.read_bytes()) for p in run.rglob("*") if p.is_file()}
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    check_unused(run)
    with locked(run), pytest.raises(ConfigError, match=f"in use by process {os.getpid()} "):
        check_unused(run)
    assert train(CONFIG, out=run, resume=True, console=QUIET)["config"]["iterations"] == 4


def test_overwrite_empties_run_folders_only(tmp_path):
    foreign, own, elsewhere = tmp_path / "foreign", tmp_path / "own", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis.txt").touch()
    foreign.mkdir()
    for name in ("config.json", "environment.json", "model.safetensors"):
        (foreign / name).write_text("{}")
    with pytest.raises(ConfigError, match=f"not a run folder .no {RUN}.: --overwrite will not delete it"):
        train(CONFIG, out=foreign, overwrite=True, console=QUIET)
    assert len(list(foreign.iterdir())) == 3
    run_folder.make_folder(own, CONFIG)
    (own / "link").symlink_to(elsewhere)
    (own / "result.json").touch()
    run_folder.make_folder(own, CONFIG)
    assert sorted(p.name for p in own.iterdir()) == [RUN, "config.json", "environment.json"]
    assert (elsewhere / "thesis.txt").exists()

"""Every benchmark runs at its smallest. What it measures is not asserted: times belong to benchmarks/."""

import contextlib
import csv
import importlib
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from afd_fast.config import with_overrides
from afd_fast.errors import ConfigError
from afd_fast.training import runs
from afd_fast.training.compare import runs as planned
from benchmarks import budget, paths, report
from benchmarks.cases import Setting
from benchmarks.rows import COLUMNS, CUDA, CYCLES, Clock, Times, append_rows, commit
from benchmarks.run import measure

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "bad_clips --world lights --rate 0.3 --seeds 1 --steps 0": "| lights, 30% |",
    "run --shape tiny --batch 1 --seconds 0.01": "fused",
    "rollout forward operators --size tiny --repeats 1": "four_steps",
    "discriminator --size tiny --pairs 2 --repeats 1": "packed",
    "update --frames 6 --repeats 1": "teacher forcing",
    "step --size tiny --iterations 1": "optimiser",
    "methods --size tiny --iterations 1": "rejection",
    "regime --clips 2 --iterations 1 --seeds 2": "its own clips",
}
GPU_SUITE = (ROOT / "benchmarks/gpu.sh").read_text()
BENCHES = re.findall(r"^ +bench \d+ \S+ (.+)$", GPU_SUITE, re.M)


def output(module: str, *words: object) -> str:
    """What `python -m benchmarks.MODULE WORDS` prints, run in this process."""
    said, before = io.StringIO(), sys.argv
    sys.argv = [module, *map(str, words)]
    try:
        with contextlib.redirect_stdout(said):
            importlib.import_module(f"benchmarks.{module}").main()
    finally:
        sys.argv = before
    return said.getvalue()


@pytest.mark.parametrize("case", COMMANDS)
def test_runs(case: str) -> None:
    assert COMMANDS[case] in output(*case.split())


def test_rows_go_to_a_file_and_a_page(tmp_path: Path) -> None:
    rows, page = tmp_path / "rows.csv", tmp_path / "page.md"
    words = "--case nft_afd --shape tiny --batch 1 --dtype fp32 --variant fused eager --seconds 0 --csv".split()
    for _ in range(2):
        output("run", *words, rows)
    with rows.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [r["variant"] for r in found] == 2 * ["copy", "fused", "eager"]
    assert all(float(r["ms"]) > 0 and float(r["of_peak"]) > 0 and r["pass"] == "loss+grad" for r in found)
    output("report", rows, "--out", page)
    assert "No GPU has been measured" in page.read_text() and page.read_text().count("| nft_afd |") == 1
    assert next(tmp_path.glob("page-cpu-x*.png")).read_bytes().startswith(b"\x89PNG")


def test_budgets_are_asked_for_as_prompts_and_clips(tmp_path: Path) -> None:
    """A budget is what both methods ask their teacher for, and the picture is drawn from comparison.json's rows."""
    budgets = [16, 32, 448]
    asked = {}
    for folder, config in planned(runs.regime(), budget.variants(runs.regime(), budgets), 1, tmp_path).items():
        asked[folder.name] = (
            config.method,
            (config.teacher_prompts or 32) * config.teacher_clips,
            config.teacher_r,
        )
    assert asked == {f"{m} {n}-0": (m, n, 0.75 if m == "afd" else None) for n in budgets for m in ("sft", "afd")}
    with pytest.raises(ConfigError, match="multiple of 32"):
        budget.keys_of(100)
    few = with_overrides(runs.regime(), ["teacher_prompts=16"])  # which is no setting of a budget's
    for config in planned(few, budget.variants(few, budgets), 1, tmp_path).values():
        assert (config.teacher_prompts or 32) * config.teacher_clips == int(config.name.split()[-1])
    scores = {key: {"mean": 1.0, "values": [0.5, 1.5]} for key in budget.SCORES}
    names = [f"{m} {n}" for n in budgets for m in ("sft", "afd")]
    budget.draw(dict.fromkeys(["base", "teacher", *names], scores), budgets, tmp_path / "budget.png")
    assert (tmp_path / "budget.png").read_bytes().startswith(b"\x89PNG")


def test_what_bad_clips_cost_is_a_table_of_finished_runs(tmp_path: Path) -> None:
    keys = "iterations=1 discriminator.warmup=0 prompts_per_step=2 rollouts_per_prompt=2 evaluation.rollouts=1".split()
    words = ["--world", "lights", "--train", "planted", "--seeds", 1, "--out", tmp_path, *keys]
    rows = output("bad_clips", *words).splitlines()
    assert [row.split("|")[1].strip() for row in rows] == ["lights, 30% bad", "---", "(base student)", "planted"]
    assert re.fullmatch(r"\| planted \|( \d\S+ \|){4} \d\.\d\d to \d\.\d\d \|", rows[-1])
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/result.json")}
    assert [path.parent.name for path in made] == ["lights planted 0.3-0"]
    assert output("bad_clips", *words).splitlines() == rows  # a finished run is kept
    assert {path: path.stat().st_mtime_ns for path in made} == made
    (stopped,) = made
    stopped.unlink()  # one that was stopped before its end goes on
    before = (tmp_path / "lights planted 0.3-0/metrics.jsonl").read_text()
    assert output("bad_clips", *words).splitlines() == rows
    assert (tmp_path / "lights planted 0.3-0/metrics.jsonl").read_text() == before
    with pytest.raises(ConfigError, match="was started with another configuration .update.lr"):
        output("bad_clips", *words, "update.lr=1e-2")
    with pytest.raises(ConfigError, match="teacher_clips=8: bad clips are planted among 4 of a prompt"):
        output("bad_clips", *words, "teacher_clips=8")


@pytest.mark.parametrize("words,said", [
    ("bad_clips --rate 0", "--rate 0 of the 448 clips of physics is 0: give at least 0.011"),
    ("bad_clips --world lights --rate 0.01", "--rate 0.01 of the 128 clips of lights is 1: give at least 0.039"),
    ("bad_clips --rate nan", "argument --rate: expected a number from 0 to 1, got nan"),
    ("bad_clips --rate 2", "argument --rate: expected a number from 0 to 1, got 2"),
    ("bad_clips --seeds 0", "argument --seeds: expected a whole number from 1, got 0"),
    ("bad_clips --steps -1", "argument --steps: expected a whole number from 0, got -1"),
    ("bad_clips iterations=3", "iterations=3 is for the students' runs: give --train too"),
    ("regime --clips 0", "argument --clips: expected a whole number from 1, got 0"),
    ("regime --seeds 1.5", "argument --seeds: expected a whole number from 1, got 1.5"),
    ("regime --iterations -1", "argument --iterations: expected a whole number from 1, got -1"),
    ("regime --lr nan", "argument --lr: expected a number from 0, got nan"),
    ("regime --lr inf", "argument --lr: expected a number from 0, got inf"),
    ("methods --iterations 0", "argument --iterations: expected a whole number from 1, got 0"),
    ("budget --clips 0", "argument --clips: expected a whole number from 1, got 0"),
    ("budget teacher_clips=2 --clips 64 128", "teacher_clips=2 has no effect here"),
    ("paths x --out x.xyz", "argument --out: expected a file .png, .svg or .pdf in a folder that exists, got x.xyz"),
    ("paths x --out nodir/x.png", "argument --out: expected a file .png, .svg or .pdf in a folder that exists"),
    ("step --iterations 0", "argument --iterations: expected a whole number from 1, got 0"),
    ("rollout --repeats x", "argument --repeats: expected a whole number from 1, got x"),
])  # fmt: skip
def test_bad_options_are_one_line_before_anything_runs(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((SystemExit, ConfigError)) as stop:
        output(*words.split())
    assert said in f"{stop.value} {capsys.readouterr().err}"
    assert not any(tmp_path.iterdir())


def lights_run(folder: Path, method: str, r: float | None = None, steps: tuple[int, ...] = (0, 2, 4)) -> None:
    """What `benchmarks.paths` reads of a finished run of 4 iterations."""
    folder.mkdir(parents=True)
    scores = {"residual_px": 1.0, "diversity_px": 2.0, "general": 0.9}
    (folder / "config.json").write_text(json.dumps({"method": method, "teacher_r": r}))
    (folder / "result.json").write_text(json.dumps({"rows": {"teacher": scores}, "config": {"iterations": 4}}))
    (folder / "evaluations.jsonl").write_text("".join(json.dumps({"step": s, **scores}) + "\n" for s in steps))


def test_the_paths_of_methods_are_drawn_from_their_runs(tmp_path: Path) -> None:
    runs, picture = tmp_path / "runs", tmp_path / "p.png"
    for name, method, r in (("sft", "sft", None), ("afd 128", "afd", 0.75), ("afd 64", "afd", 0.75)):
        for seed in range(2):  # of which the second has lost a row between its ends
            lights_run(runs / f"{name}-{seed}", method, r, (0, 2, 4) if seed == 0 else (0, 4))
    said = output("paths", runs, "--out", picture)
    two = [f"AFD, teacher_r=0.75 ({runs}/afd {clips}) (2 runs)" for clips in (128, 64)]
    assert said.endswith(", ".join([*two, "SFT (2 runs)\n"]))
    assert output("paths", runs / "sft", runs / "afd 64", "--out", picture).endswith(
        "SFT (2 runs), AFD, teacher_r=0.75 (2 runs)\n"
    )
    lights_run(tmp_path / "more" / "runs" / "sft-0", "sft")  # of the same name as the others
    both = output("paths", runs / "sft", tmp_path / "more" / "runs", "--out", picture)
    assert both.endswith(f"SFT ({runs}/sft) (2 runs), SFT ({tmp_path}/more/runs/sft) (1 runs)\n")
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="no finished runs"):
        paths.methods(runs / "gan")


@pytest.mark.parametrize("file,content,said", [
    ("evaluations.jsonl", '{"step": 0}\n{"st', "has lost the scores"),
    ("evaluations.jsonl", "", "has lost the scores"),
    ("config.json", '{"method', "config.json"),
    ("result.json", '{"rows": {"teacher": {"residual_px": 1.0, "general": 1}}, "config": {"iterations": 4}}', "has no diversity_px"),
    ("result.json", "{}", "result.json holds no result of a run"),
    ("result.json", '{"ro', "result.json"),
])  # fmt: skip
def test_damaged_runs_are_named_and_not_drawn(tmp_path: Path, file: str, content: str, said: str) -> None:
    lights_run(tmp_path / "sft-0", "sft")
    (tmp_path / "sft-0" / file).write_text(content)
    with pytest.raises(ConfigError, match=said):
        output("paths", tmp_path, "--out", tmp_path / "p.png")


def row(case: str, variant: str, shape: str, ms: float, kind: str = "forward", **more: str) -> dict[str, str]:
    names = dict(
        case=case, variant=variant, shape=shape, dtype="bf16", device="NVIDIA H200", ms=str(ms), date="2030-01-01"
    )
    return dict.fromkeys(COLUMNS, "") | names | {"pass": kind} | more


def test_the_page_of_a_gpu(tmp_path: Path) -> None:
    """Ratios and goals come from the rows, a later row counts, and what was not measured is not there."""
    wan, clip = "16x21x16x60x104", "B1 F21 60x104"
    rows = [
        row("nft_afd", "copy", wan, 1.0, "loss+grad", gb_s="4000"),
        row("nft_afd", "fused", wan, 1.25, "loss+grad", gb_s="3200", of_peak="0.8", host_ms="0.3"),
        row("nft_afd", "compile", wan, 2.5, "loss+grad", gb_s="1600"),
        row("rollout", "plain", clip, 3000.0),
        row("rollout", "plain", clip, 1620.0),
        row("update_1.3b", "detached", clip, 10.0, "train"),
        row("update_1.3b", "forced", clip, 21.0, "train"),
        row("peer_rollout", "official", f"1.3b {clip}", 4400.0),
        row("peer_rollout", "ours", f"1.3b {clip}", 2000.0),
    ]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    found = report.read([tmp_path / "rows.csv"])
    assert found == [r for i, r in enumerate(rows) if i != 3]
    page = report.page(found, tmp_path / "page.md")
    assert "| nft_afd | 16x21x16x60x104 | bf16 | 1.25 | 0.3 | 3,200 | 80 | 2.00 |" in page and "No GPU" not in page
    assert "frames per second | 50 |" in page and "% of the copy | 80 |" in page and "our update | 2.1 |" in page
    assert "| rollout | 1.3b B1 F21 60x104 | bf16 | 4,400 | 2,000 | 2.20 |" in page
    assert "VAE, 81" not in page and "four steps" not in page


def test_rows_of_other_columns_are_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "old.csv").write_text("case,ms\nnft,1\n")
    with pytest.raises(SystemExit, match="write the rows to another file"):
        append_rows(tmp_path / "old.csv", [])


def test_a_row_names_its_sources_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    commit.cache_clear()
    found = commit()
    commit.cache_clear()
    assert found.startswith("files-") and len(found) == 14


def test_the_clock_hides_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: a call's kernels wait behind a busy one until the host is through, and the device's time is a row of its own."""
    log: list[str | int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...
        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("synchronize")

        def elapsed_time(self, other: "Event") -> float:
            return 3.0

    def call() -> None:
        time.sleep(0.02)
        log.append("call")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", log.append)
    clock, times = Clock("cpu"), Times()
    clock.cuda = True
    for _ in range(2):
        clock.add(call, times)
    assert [x if isinstance(x, str) else "busy" for x in log] == 2 * ["busy", "record", "call", "record", "synchronize"]
    assert times.samples == [3.0, 3.0] and min(times.host) >= 20
    assert isinstance(log[5], int) and log[5] >= 20 * CYCLES


@pytest.mark.skipif(CUDA, reason="there is a GPU")
@pytest.mark.parametrize("command", BENCHES)
def test_every_command_of_the_gpu_suite_starts(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its arguments, as far as it gets without a GPU."""
    module, *words = command.replace('"$PEER"', "peer").split()
    monkeypatch.setattr(sys, "argv", [module, "--gpu", "--csv", "x.csv", *words])
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        importlib.import_module(f"benchmarks.{module}").main()


def test_the_parts_of_the_gpu_suite_fit_ten_minutes() -> None:
    parts = re.split(r"^ +\d\)$", GPU_SUITE[GPU_SUITE.index("case $part in") :], flags=re.M)[1:]
    limits = [sum(map(int, re.findall(r"^ +(?:bench|run) (\d+)", part, re.M))) for part in parts]
    assert len(limits) == 5 and all(100 < limit <= 580 for limit in limits), limits


FAKE_PYTHON = """#!/bin/sh
case "$*" in
    *get_device_name*) echo NVIDIA-H200 ;;
    *find_spec*) exit 1 ;;
    *benchmarks.update*) exit 3 ;;
    *benchmarks.discriminator*) echo hello from discriminator ;;
esac
"""


def test_the_gpu_suite_goes_on_where_something_fails(tmp_path: Path) -> None:
    """A command that fails and two that lack a package: each has its status, and the rest runs."""
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    env = os.environ | {"PYTHON": str(python), "OUT": str(tmp_path / "out")}
    done = subprocess.run([ROOT / "benchmarks/gpu.sh", "5"], capture_output=True, text=True, env=env)
    last = done.stdout.split("part, status, command")[1].strip().splitlines()
    assert [line.split("  ")[1] for line in last] == ["exit 3", "ok", "skipped", "skipped"], done.stdout + done.stderr
    assert done.returncode == 1 and "needs diffusers" in last[2]
    assert "hello from discriminator" in (tmp_path / "out/part5.log").read_text()


def test_the_cuda_kernels_are_built_before_they_are_timed(tmp_path: Path) -> None:
    for name, body in {"python": FAKE_PYTHON, "cmake": '#!/bin/sh\necho cmake "$@"\n'}.items():
        (tmp_path / name).write_text(body.replace("*find_spec*) exit 1 ;;", "*benchmarks.run*) echo $* ;;"))
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path / "out")}
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    subprocess.run([ROOT / "benchmarks/gpu.sh", "2"], capture_output=True, env=env)
    said = (tmp_path / "out/part2.log").read_text()
    assert 0 < said.index("-DAFD_CUDA=ON") < said.index("cmake --install") < said.index("one_launch compile")


def test_every_batch_is_compiled_for_its_own_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """No dynamic graph, and none that gave up after many shapes: a compiled row is what a trainer's compiled lines cost."""
    graphs: list[list[torch.Size]] = []

    def recorded(module: torch.fx.GraphModule, inputs: list[object]) -> Callable[..., object]:
        graphs.append([x.shape for x in inputs if isinstance(x, torch.Tensor)])
        assert not any(isinstance(x, (torch.SymInt, int)) for x in inputs)
        assert all(type(size) is int for shape in graphs[-1] for size in shape)
        return module.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=recorded))
    for batch in range(1, 11):  # dynamo gives up a function after eight shapes
        red: list[str] = []
        setting = Setting((batch, 4, 2, 2, 2), torch.float32, "cpu")
        assert [row.variant for row in measure("forward_noise", setting, ["compile"], 0.0, red)] == ["copy", "compile"]
        assert len(graphs) == batch and graphs[-1][0][0] == batch

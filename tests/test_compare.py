"""`afd-fast compare` and `ablate`: real runs as child processes, stopped and gone on with, and what is refused."""

import json
import os
import re
import signal
import statistics
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from afd_fast.config import to_dict, with_overrides, with_values
from afd_fast.errors import ConfigError
from afd_fast.training import runs as named
from afd_fast.training.compare import (
    ABLATIONS,
    _check_effect,
    compare,
    log_of,
    methods,
    overrides_of,
    own_overrides,
    runs,
)
from afd_fast.training.lock import COMPARISON, RUN, check_unused, locked
from afd_fast.training.methods import METHODS
from afd_fast.training.run_folder import finished, make_folder, write_rows
from tests.runs import QUIET
from tests.test_trainer import TINY, command, wait_for_rows


def test_comparison_stops_goes_on_and_reports(tmp_path):
    out = tmp_path / "cmp"
    start = lambda: command(
        "compare", "demo", *TINY, "--methods", "base,sft", "--seeds", "2", "--jobs", "2", "--out", out
    )
    first = start()
    while len(list(out.glob("*/result.json"))) < 1:
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    assert first.wait() == 130 and "the same command continues" in first.stdout.read()
    done = {p: p.stat().st_mtime_ns for p in out.glob("*/result.json")}
    again = start()
    assert again.wait() == 0, again.stdout.read()
    assert all(p.stat().st_mtime_ns == when for p, when in done.items())  # finished runs are kept
    comparison = json.loads((out / "comparison.json").read_text())
    assert list(comparison["rows"]) == ["base", "sft", "teacher"] and comparison["seeds"] == [0, 1]
    values = [json.loads((out / f"sft-{s}/result.json").read_text())["rows"]["student"]["frechet"] for s in (0, 1)]
    row = comparison["rows"]["sft"]["frechet"]
    assert row["values"] == values and row["mean"] == pytest.approx(statistics.fmean(values))
    assert row["sd"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert values[0] != values[1]
    html = (out / "comparison.html").read_text()
    assert (
        html.count("data:video/mp4;base64,") == 6 and "<svg" in html and not re.search(r'(src|href)="(?!data:|#)', html)
    )
    with pytest.raises(ConfigError, match="another configuration .update.lr"):
        compare("demo", [*TINY, "update.lr=1"], lambda c: methods(c, ["sft"]), 1, out, console=QUIET)


def test_a_failing_run_is_named_with_its_last_words(tmp_path):
    student = f"student={tmp_path}/nowhere.pt"  # what only its own process opens
    run = command(
        "ablate", "v_old", "afd_table3", student, "discriminator=toy", "teacher=folder:v", "--out", tmp_path / "a"
    )
    assert run.wait() == 1
    assert re.search(r"update.v_old=ema-0 failed: .*nowhere.pt is neither a file", run.stdout.read().replace("\n", " "))


def test_every_method_and_setting_is_a_valid_configuration(tmp_path):
    config = named.demo()
    for rows in [lambda c: methods(c, list(METHODS)), *ABLATIONS.values()]:
        planned = runs(config, rows(config), 2, tmp_path)
        assert len(set(map(str, planned.values()))) == len(planned) >= 4
        assert len({log_of(folder) for folder in planned} | set(planned)) == 2 * len(planned)
    rates = [v.keys["discriminator.lr"] for v in ABLATIONS["disc_lr"](named.afd_table3())]
    assert rates == pytest.approx([0, 1e-6, 5e-6, 1e-5, 5e-5])  # the paper's
    assert {
        c.prompts_per_step * c.rollouts_per_prompt for c in runs(config, ABLATIONS["k"](config), 1, tmp_path).values()
    } == {48}
    with pytest.raises(ConfigError, match="unknown method 'ppo'"):
        methods(config, ["ppo"])
    with pytest.raises(ConfigError, match="update.chunked"):
        with_overrides(config, ["update.chunked=true", "update.history=block_causal"])


@pytest.mark.parametrize("run,words", [
    ("demo", "loss=afd loss.ref_coef=0.003"),
    ("demo", "loss=cosmos_rl loss.beta=0.1"),
    ("demo", "loss.ref_coef=0.1 rollout.steps=1000,500 codec_crf=23 teacher=folder:a=b"),
    ("demo_eq4", "loss=diffusionnft update.lr=1e-3"),
    ("afd_table3", "rollout=krea rollout.recompute=false rollout.zero_step=false"),
])  # fmt: skip
def test_a_runs_own_process_gets_the_configuration_that_was_planned(run, words):
    """A recipe's name on its command line takes all of the recipe, also what the named run's default is."""
    planned = with_overrides(named.get(run), words.split())
    rows = [
        *methods(planned, list(METHODS)),
        *(v for name in ("prior", "v_old") for v in ABLATIONS[name](planned)),
    ]
    for row in rows:
        config = with_values(planned, row.keys)
        assert with_overrides(named.get(run), overrides_of(run, config)) == config


def test_settings_of_one_method_alone():
    config = with_overrides(named.demo(), ["iterations=60"])
    common, own = own_overrides(
        ["teacher=folder:a=b", "afd:discriminator.width=8", "iterations=60", "sft:update.lr=1e-4"]
    )
    assert common == ["teacher=folder:a=b", "iterations=60"]
    afd, sft = methods(config, ["afd", "sft"], own)
    assert afd.keys["discriminator.width"] == 8 and afd.keys["update.lr"] == config.update.lr
    assert sft.keys["update.lr"] == 1e-4 and "discriminator.width" not in sft.keys
    assert methods(config, ["gan"])[0].keys == methods(config, ["gan", "afd"], {"afd": ["iterations=40"]})[0].keys
    for names, wrong, message in (
        (["afd"], "ppo:update.lr=1", "unknown method 'ppo'"),
        (["afd"], "sft:update.lr=1", "settings for sft, which is not compared"),
        (["sft"], "sft:update.rate=1", "unknown key 'update.rate'"),
        (["sft"], "sft:update.lr=x", "update.lr=x: expected a finite number"),
        (["sft"], "sft:method=gan", "sft:method= is not for one method alone"),
        (["sft"], "sft:seed=3", "sft:seed= is not for one method alone"),
        (["sft"], "sft:name=x", "sft:name= is not for one method alone"),
        (
            ["sft"],
            "sft:rollout.steps=1000,500",
            "sft:rollout.steps= is not for one method alone: all rows have one base student",
        ),
        (["sft"], "sft:evaluation.rollouts=4", "sft:evaluation.rollouts= is not for one method alone"),
        (["sft"], "sft:teacher=physics:dusk", "sft:teacher= is not for one method alone"),
        (["sft"], "sft:codec_crf=30", "sft:codec_crf= is not for one method alone"),
    ):
        with pytest.raises(ConfigError, match=message):
            methods(config, names, own_overrides([wrong])[1])


@pytest.mark.parametrize("override,variants,said", [
    ("method=gan", lambda c: methods(c, ["sft", "afd"]), "method=gan has no effect here"),
    ("update.v_old=self", ABLATIONS["v_old"], "update.v_old=self has no effect here"),
    ("teacher_r=0.9", ABLATIONS["teacher_r"], "teacher_r=0.9 has no effect here"),
])  # fmt: skip
def test_a_setting_that_every_row_replaces_is_refused(tmp_path, override, variants, said):
    with pytest.raises(ConfigError, match=said):
        compare("demo", [override], variants, 1, tmp_path / "c", console=QUIET)
    assert not (tmp_path / "c").exists()


def test_settings_that_rows_build_on_are_taken():
    demo = named.demo()
    for override, variants in (
        ("update.lr=1e-4", lambda c: methods(c, ["sft", "afd"])),
        ("discriminator.lr=1e-3", ABLATIONS["disc_lr"]),
        ("prompts_per_step=24", ABLATIONS["k"]),
        ("update.v_old=self", lambda c: methods(c, ["sft", "afd"])),
        ("discriminator.warmup=1", lambda c: methods(c, ["sft"])),
        ("discriminator.warmup=1", lambda c: methods(c, ["sft", "afd"])),
    ):
        _check_effect(demo, with_overrides(demo, [override]), variants)


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "afd-0").mkdir()
    (tmp_path / "afd-0/thesis.txt").write_text("years of work")
    planned = lambda: runs(named.demo(), methods(named.demo(), ["afd"]), 1, tmp_path)
    with pytest.raises(ConfigError, match="not a run folder"):
        planned()
    (tmp_path / "afd-0/thesis.txt").unlink()
    for name in (RUN, "config.part"):  # what a run leaves that is killed as it makes its folder
        (tmp_path / "afd-0" / name).touch()
    planned()
    (tmp_path / "afd-0/checkpoints").mkdir()  # its config.json is lost
    with pytest.raises(ConfigError, match="choose another --out"):
        planned()


def test_the_orphan_of_a_killed_comparison_is_found(tmp_path):
    """Its trainer goes on without it; the same command names it instead of starting a second one."""
    out = tmp_path / "cmp"
    start = lambda: command(
        "compare", "demo", *TINY[1:], "iterations=3000", "--methods", "sft", "--seeds", "1", "--out", out
    )
    first = start()
    wait_for_rows(out / "sft-0/metrics.jsonl", 1)
    first.kill()
    first.wait()
    again = start()
    output = " ".join(again.communicate()[0].split())
    orphan = int(re.search(r"sft-0 is in use by process (\d+) on", output)[1])
    try:
        assert again.returncode == 2 and "stop it with kill" in output
        assert b"train" in Path(f"/proc/{orphan}/cmdline").read_bytes()
    finally:
        os.kill(orphan, signal.SIGTERM)
    while Path(f"/proc/{orphan}/cmdline").exists() and Path(f"/proc/{orphan}/cmdline").read_bytes():
        time.sleep(0.05)
    check_unused(out / "sft-0")


def test_a_comparison_with_more_iterations_extends_its_runs(tmp_path):
    """A run is done when it has the iterations that are wanted; fewer than it has are refused."""
    config = with_values(named.demo(), {"iterations": 30})
    planned = runs(config, methods(config, ["afd"]), 1, tmp_path)
    ((folder, wanted),) = planned.items()
    make_folder(folder, wanted)
    (folder / "result.json").write_text(json.dumps({"config": to_dict(wanted)}))
    save_file({"base": torch.zeros(1)}, folder / "samples.safetensors")
    write_rows(folder / "evaluations.jsonl", [{"step": 0}, {"step": 30}])
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/step-000030.pt").touch()
    more = with_values(config, {"iterations": 40})
    ((folder, longer),) = runs(more, methods(more, ["afd"]), 1, tmp_path).items()
    assert finished(folder, wanted) and not finished(folder, longer)
    write_rows(folder / "evaluations.jsonl", [{"step": 0}, {"step": 20}])  # the last one is lost: to be judged again
    assert not finished(folder, wanted)
    write_rows(folder / "evaluations.jsonl", [{"step": 0}, {"step": 30}])
    (folder / "samples.safetensors").write_bytes((folder / "samples.safetensors").read_bytes()[:-1])
    assert not finished(folder, wanted)
    fewer = with_values(config, {"iterations": 25})
    with pytest.raises(ConfigError, match="set iterations=30 or more, got 25"):
        runs(fewer, methods(fewer, ["afd"]), 1, tmp_path)
    with locked(tmp_path, COMPARISON), pytest.raises(ConfigError, match="in use by process"):
        compare("demo", ["iterations=40"], lambda c: methods(c, ["afd"]), 1, tmp_path, console=QUIET)

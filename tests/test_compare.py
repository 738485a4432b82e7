"""`afd-fast compare` and `ablate`: real runs as child processes, stopped and gone on with, and what is refused."""

import json
import re
import signal
import statistics
import time

import pytest

from afd_fast.config import with_overrides
from afd_fast.errors import ConfigError
from afd_fast.training import runs as named
from afd_fast.training.compare import ABLATIONS, compare, log_of, methods, runs
from afd_fast.training.methods import METHODS
from tests.runs import QUIET
from tests.test_trainer import TINY, command


def test_comparison_stops_goes_on_and_reports(tmp_path):
    out = tmp_path / "cmp"
    start = lambda: command(
        "compare", "demo", *TINY, "--methods", "base,sft,afd", "--seeds", "2", "--jobs", "2", "--out", out
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
    assert list(comparison["rows"]) == ["base", "sft", "afd", "teacher"] and comparison["seeds"] == [0, 1]
    for label in ("sft", "afd"):
        values = [
            json.loads((out / f"{label}-{s}/result.json").read_text())["rows"]["student"]["frechet"] for s in (0, 1)
        ]
        row = comparison["rows"][label]["frechet"]
        assert row["values"] == values and row["mean"] == pytest.approx(statistics.fmean(values))
        assert row["sd"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert values[0] != values[1]
    html = (out / "comparison.html").read_text()
    assert (
        html.count("data:video/mp4;base64,") == 6 and "<svg" in html and not re.search(r'(src|href)="(?!data:|#)', html)
    )
    with pytest.raises(ConfigError, match="another configuration .update.lr"):
        compare("demo", [*TINY, "update.lr=1"], lambda c: methods(c, ["afd"]), 1, out, console=QUIET)


def test_a_failing_run_is_named_with_its_last_words(tmp_path):
    run = command("ablate", "v_old", "demo", *TINY, f"teacher=folder:{tmp_path}/nowhere", "--out", tmp_path / "a")
    assert run.wait() == 1
    assert re.search(r"update.v_old=ema-0 failed: .*nowhere", run.stdout.read().replace("\n", " "))


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
    } == {96}
    with pytest.raises(ConfigError, match="unknown method 'ppo'"):
        methods(config, ["ppo"])
    with pytest.raises(ConfigError, match="update.chunked"):
        with_overrides(config, ["update.chunked=true", "update.history=block_causal"])


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "afd-0").mkdir()
    (tmp_path / "afd-0/thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="not a run folder"):
        runs(named.demo(), methods(named.demo(), ["afd"]), 1, tmp_path)

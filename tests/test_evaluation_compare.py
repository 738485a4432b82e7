"""The difference of two folders, prompt by prompt, against the arithmetic of paired differences."""

import csv
import json

import numpy as np
import pytest

from afd_fast.errors import ConfigError
from afd_fast.evaluation import folder, scores, vbench, videoalign, videophy2
from afd_fast.evaluation.folder import Clip
from tests.test_evaluation_tools import command
from tests.test_evaluation_vbench import ROWS

PROMPTS, EACH = [f"prompt {i}" for i in range(60)], 3
CLIPS = [Clip(f"{i:04d}-{k}.mp4", p, EACH * i + k) for i, p in enumerate(PROMPTS) for k in range(EACH)]


def scored(out, values, clips=CLIPS):
    """A folder with VideoAlign's table: values [clips, 4]."""
    folder.start(out, clips, {"n": EACH})
    table = videoalign.results(out)
    table.parent.mkdir(parents=True)
    rows = [(clip.video, *map(float, row)) for clip, row in zip(clips, values)]
    folder.write_csv(table, ("video", *videoalign.NAMES), rows)
    return out


@pytest.fixture
def pair(tmp_path):
    """Prompts differ by 1, the two sides by 0.1 in VQ and by nothing in the others."""
    rng = np.random.default_rng(0)
    of_prompt = np.repeat(rng.normal(0, 1, (len(PROMPTS), 4)), EACH, 0)
    a, b = (of_prompt + rng.normal(0, 0.1, of_prompt.shape) for _ in range(2))
    b[:, 0] += 0.1
    return scored(tmp_path / "sft", a), scored(tmp_path / "afd", b), a, b


def test_the_interval_is_of_paired_differences(pair):
    base, other, a, b = pair
    found = {row.name.split()[1]: row for row in scores.differences(base, other)}
    gaps = (b - a).reshape(len(PROMPTS), EACH, 4).mean(1)
    for i, name in enumerate(videoalign.NAMES):
        row, half = found[name], 1.96 * gaps[:, i].std() / len(PROMPTS) ** 0.5
        assert (row.base, row.other, row.prompts) == pytest.approx((a[:, i].mean(), b[:, i].mean(), len(PROMPTS)))
        assert row.difference == pytest.approx(gaps[:, i].mean())
        assert (row.low, row.high) == pytest.approx((row.difference - half, row.difference + half), abs=0.08 * half)
    assert found["VQ"].low > 0.06
    alone = {score.name: score for score in scores.collect(base)}["VideoAlign VQ"]
    assert alone.high - alone.low > 5 * (found["VQ"].high - found["VQ"].low)  # what pairing is for


def test_the_order_of_the_other_folder_does_not_matter(pair, tmp_path):
    base, other, _, b = pair
    turned = scored(tmp_path / "turned", b[::-1], CLIPS[::-1])
    bounds = lambda folder: np.array([(row.low, row.high) for row in scores.differences(base, folder)])
    np.testing.assert_allclose(bounds(turned), bounds(other), rtol=1e-9)


def test_prompts_without_a_value_are_left_out_on_both_sides(tmp_path):
    for name, answers in (("sft", (1, 2, 0, 4)), ("afd", (3, 0, 5, 5))):
        clips = [Clip(f"{i}.mp4", p, i) for i, p in enumerate(PROMPTS[:4])]
        folder.start(tmp_path / name, clips, {"n": 1})
        for task in ("pc", "sa"):
            table = videophy2.results(tmp_path / name, task)
            table.parent.mkdir(parents=True, exist_ok=True)
            folder.write_csv(table, ("videopath", "score"), [(c.video, a) for c, a in zip(clips, answers)])
    pc, sa, joint = scores.differences(tmp_path / "sft", tmp_path / "afd")
    assert (pc.base, pc.other, pc.difference, pc.prompts, pc.note) == (2.5, 4, 1.5, 2, "2 prompts lack a value")
    assert (pc.low, pc.high) == (1, 2) and (joint.base, joint.other) == (50, 50)


def vbench_folder(out, shift, dimensions=vbench.DIMENSIONS):
    suite = out.parent / "suite.json"
    suite.write_text(json.dumps(ROWS))
    clips = vbench.clips(vbench.suite(suite), 1)
    folder.start(out, clips, {"n": 1})
    (out / vbench.SUITE).write_text(suite.read_text())
    for d in dimensions:
        rows = [
            {"video_path": video, "video_results": (1 + i + shift) % 2 if d in vbench.YES_NO else (i + shift) / 20}
            for i, (video,) in enumerate(vbench.expected(out, d).values())
        ]
        mean = sum(row["video_results"] for row in rows) / len(rows)
        if d == "imaging_quality":
            rows = [row | {"video_results": 100 * row["video_results"]} for row in rows]
        file = vbench.results(out) / d / "results_x_eval_results.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({d: [mean, rows]}))
    return out


def test_vbenchs_totals(tmp_path):
    base, other = vbench_folder(tmp_path / "base", 0), vbench_folder(tmp_path / "other", 1)
    of = lambda out: {score.name: score.value for score in scores.collect(out)}
    rows, a, b = {row.name: row for row in scores.differences(base, other)}, of(base), of(other)
    assert rows.keys() == a.keys() and len(rows) == 18
    assert {n: (r.base, r.other, r.difference) for n, r in rows.items()} == {
        n: (pytest.approx(a[n]), pytest.approx(b[n]), pytest.approx(b[n] - a[n])) for n in a
    }
    even = rows["VBench spatial_relationship"]  # 5 points more for every prompt: nothing left to chance
    assert even.difference == pytest.approx(5) and (even.low, even.high) == pytest.approx((5, 5))
    total = rows["VBench general"]  # without yes/no dimensions
    assert (total.low, total.high) == pytest.approx((5, 5)) and total.difference == pytest.approx(5)
    assert rows["VBench physics"].high - rows["VBench physics"].low > 5


def test_only_what_both_have(tmp_path):
    base = vbench_folder(tmp_path / "base", 0, ["scene", "color"])
    other = vbench_folder(tmp_path / "other", 1, ["scene", "human_action"])
    assert [row.name for row in scores.differences(base, other)] == ["VBench scene"]
    with pytest.raises(ConfigError, match="no score in common"):
        scores.differences(base, vbench_folder(tmp_path / "third", 1, ["human_action"]))


def test_other_prompts_are_refused(pair, tmp_path):
    folder.start(tmp_path / "more", [*CLIPS, Clip("x.mp4", "another", 9)], {"n": EACH})
    with pytest.raises(ConfigError, match="are of other prompts"):
        scores.differences(pair[0], tmp_path / "more")


def test_command(pair, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    base, other, a, b = pair
    said = command("compare", base, other)
    assert "sft" in said and "afd" in said and f"{(b - a)[:, 0].mean():+.3f}" in said
    rows = list(csv.DictReader((other / "differences.csv").open()))
    assert [row["name"] for row in rows] == [f"VideoAlign {name}" for name in videoalign.NAMES]
    assert float(rows[0]["low"]) > 0

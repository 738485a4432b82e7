"""VBench's naming, its tool as a real process with its known faults, its result files and the paper's totals."""

import io
import json
import os
import venv
from collections import Counter

import av
import numpy as np
import pytest
import torch

from afd_fast.errors import ConfigError, ToolError
from afd_fast.evaluation import folder, intervals, vbench
from afd_fast.video_io import write_video
from tests import official_tools

ROWS = [
    {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]},
    {"prompt_en": "In a still frame, a park", "dimension": ["temporal_flickering"]},
    *(
        {"prompt_en": f"a dog {i}", "dimension": ["subject_consistency", "dynamic_degree", "motion_smoothness"]}
        for i in range(4)
    ),
    *({"prompt_en": f"A person is {what}", "dimension": ["human_action"]} for what in ("marching", "riding a bike")),
    *({"prompt_en": f"a cup left of a plate, {i}", "dimension": ["spatial_relationship"]} for i in range(3)),
    *({"prompt_en": f"a beach, {i}", "dimension": ["scene", "background_consistency"]} for i in range(2)),
    {"prompt_en": "The bund, oil painting", "dimension": ["appearance_style"]},
    {"prompt_en": "The bund, oil painting", "dimension": ["overall_consistency", "aesthetic_quality", "imaging_quality"]},
    {"prompt_en": "a fantasy landscape", "dimension": ["overall_consistency", "aesthetic_quality", "imaging_quality"]},
    {"prompt_en": "A fantasy landscape", "dimension": ["overall_consistency", "aesthetic_quality", "imaging_quality"]},
    *({"prompt_en": f"a red car {i}", "dimension": ["color"]} for i in range(3)),
    *({"prompt_en": f"a {d}", "dimension": [d]} for d in ("object_class", "multiple_objects", "temporal_style")),
]  # fmt: skip


@pytest.fixture(scope="module")
def real_env(tmp_path_factory):
    return official_tools.environment(tmp_path_factory.mktemp("env") / "vbench")


@pytest.fixture
def env(real_env):
    yield real_env
    for name in ("calls", "misbehave"):
        (official_tools.launch_folder(real_env) / name).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    path = tmp_path_factory.mktemp("mp4") / "video.mp4"
    write_video(path, torch.rand(3, 4, 16, 16, generator=torch.Generator().manual_seed(0)), 16)
    return path.read_bytes()


def make(out, mp4, n=1, rows=ROWS):
    source = official_tools.write(out.parent / f"{out.name}.json", json.dumps(rows))
    clips = vbench.clips(vbench.suite(source), n)
    folder.start(out, clips, {"n": n})
    (out / vbench.SUITE).write_text(source.read_text())
    for clip in clips:
        (out / "videos" / clip.video).write_bytes(mp4)
    return clips


def calls(env):
    return (official_tools.launch_folder(env) / "calls").read_text().split()


def misbehave(env, how):
    official_tools.write(official_tools.launch_folder(env) / "misbehave", how)


def edit(out, dimension, change):
    """Change the tool's file of a dimension: change([mean, rows]) -> [mean, rows]."""
    (file,) = (out / "results" / "vbench" / dimension).glob("results_*_eval_results.json")
    file.write_text(json.dumps({dimension: change(*json.loads(file.read_text())[dimension])}))


class TestNames:
    def test_all_names_once(self, tmp_path):
        prompts = vbench.suite(official_tools.write(tmp_path / "s.json", json.dumps(ROWS)))
        one, five = vbench.clips(prompts, 1), vbench.clips(prompts)
        assert [clip.video for clip in one] == [f"{p}-0.mp4" for p in dict.fromkeys(row["prompt_en"] for row in ROWS)]
        count = Counter(clip.prompt for clip in five)
        assert count["In a still frame, a stop sign"] == 25 and count["a dog 1"] == 5 == count["The bund, oil painting"]
        assert "In a still frame, a park-24.mp4" in {clip.video for clip in five}
        assert {clip.seed for clip in five} == set(range(len(five)))
        with pytest.raises(ConfigError, match="n=5 .* or n=1"):
            vbench.clips(prompts, 3)

    def test_no_suite(self, tmp_path):
        for text in ("[", '[{"prompt": 1}]', '[{"prompt_en": "a", "dimension": ["colour"]}]', "3"):
            with pytest.raises(ConfigError, match="VBench"):
                vbench.suite(official_tools.write(tmp_path / "s.json", text))
        with pytest.raises(ConfigError, match="VBench"):
            vbench.suite(tmp_path / "absent.json")

    @pytest.mark.parametrize("prompt", ["a/b", "ä" * 125])
    def test_no_file_name(self, tmp_path, prompt):
        with pytest.raises(ConfigError, match="no file name"):
            folder.start(tmp_path / "out", vbench.clips({"color": [prompt]}, 1), {})


class TestFolder:
    def test_stray_file(self, tmp_path, mp4, env):
        make(tmp_path / "out", mp4)
        (tmp_path / "out" / "videos" / "manifest.csv").touch()
        with pytest.raises(ConfigError, match="do not belong there .manifest.csv"):
            vbench.run(tmp_path / "out", env)

    def test_torn_file_is_missing(self, tmp_path, mp4, env):
        clips = make(tmp_path / "out", mp4)
        (tmp_path / "out" / "videos" / clips[3].video).write_bytes(mp4[: len(mp4) // 2])
        (tmp_path / "out" / "videos" / clips[5].video).unlink()
        index_first = tmp_path / "first.mp4"
        with (
            av.open(io.BytesIO(mp4)) as source,
            av.open(str(index_first), "w", options={"movflags": "faststart"}) as to,
        ):
            stream = to.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    to.mux(packet)
        whole = index_first.read_bytes()
        (tmp_path / "out" / "videos" / clips[7].video).write_bytes(whole)
        assert folder.missing(tmp_path / "out", clips) == [clips[3], clips[5]]
        (tmp_path / "out" / "videos" / clips[7].video).write_bytes(whole[:-20])
        assert folder.missing(tmp_path / "out", clips) == [clips[3], clips[5], clips[7]]
        with pytest.raises(ConfigError, match="3 of .* videos are missing or unreadable"):
            vbench.run(tmp_path / "out", env)

    @pytest.mark.parametrize(
        "name", ["../a.mp4", "/tmp/a.mp4", "http://127.0.0.1/a.mp4", "sub/a.mp4", "a.txt", "a dog 0-0.mp4"]
    )
    def test_a_manifest_names_files_of_its_folder_once(self, tmp_path, mp4, name):
        make(tmp_path / "out", mp4)
        with (tmp_path / "out" / "manifest.csv").open("a") as file:
            file.write(f"{name},a prompt,0\n")
        with pytest.raises(ConfigError, match="each once"):
            folder.check(tmp_path / "out")

    def test_a_link_out_of_the_folder(self, tmp_path, mp4):
        clips = make(tmp_path / "out", mp4)
        file = tmp_path / "out" / "videos" / clips[0].video
        file.rename(tmp_path / "elsewhere.mp4")
        file.symlink_to(tmp_path / "elsewhere.mp4")
        with pytest.raises(ConfigError, match="leads out of"):
            folder.check(tmp_path / "out")

    def test_a_damaged_manifest(self, tmp_path, mp4):
        make(tmp_path / "out", mp4)
        table, settings = tmp_path / "out" / "manifest.csv", tmp_path / "out" / "export.json"
        head = "video,prompt,seed\r\n"
        for text, said in ((head + "a.mp4,a\r\n", "line 2"), (head + 'a.mp4,"a', "not a CSV file"), (head, "lists no video"),
                           (head + "a.mp4,a,x\r\n", "seed is not an integer")):  # fmt: skip
            table.write_text(text)
            with pytest.raises(ConfigError, match=f"manifest.csv.*{said}"):
                folder.read_manifest(tmp_path / "out")
        for text in ('{"n": "x"}', '{"n": 0}', "[" * 100_000):
            settings.write_text(text)
            with pytest.raises(ConfigError, match=r"export\.json"):
                folder.read_settings(tmp_path / "out")

    def test_one_export_a_folder(self, tmp_path, mp4):
        clips = make(tmp_path / "out", mp4)
        folder.start(tmp_path / "out", clips, {"n": 1})
        for other in ((clips[1:], {"n": 1}), (clips, {"n": 1, "student": "b"})):
            with pytest.raises(ConfigError, match="other prompts or settings"):
                folder.start(tmp_path / "out", *other)
        with pytest.raises(ConfigError, match="other things"):
            folder.start(tmp_path, clips, {})


class TestRun:
    def test_all_dimensions(self, tmp_path, mp4, env, monkeypatch):
        monkeypatch.setenv("PYTHONPATH", "ours")
        out = tmp_path / "a folder"  # the tool's own command breaks at the space
        make(out, mp4)
        vbench.run(out, env)
        assert sorted(calls(env)) == sorted(vbench.DIMENSIONS)
        vbench.run(out, env)
        assert len(calls(env)) == 16  # all there: nothing runs twice
        scores = {score.name: score for score in vbench.collect(out)}
        assert len(scores) == 18
        raw = [np.mean([(k + 0.5) / 10 for k in range(len(vbench.expected(out, d)))]) for d in vbench.PHYSICS]
        raw[2], raw[3] = 2 / 4, 1 / 2  # yes for every third video
        assert scores["VBench physics"].value == pytest.approx(20 * sum(raw))
        assert scores["VBench imaging_quality"].value == pytest.approx(15)
        dynamic = scores["VBench dynamic_degree"]
        assert dynamic.note == "2/4" and dynamic.videos == 4
        assert (dynamic.low / 100, dynamic.high / 100) == pytest.approx(intervals.wilson(2, 4))
        assert scores["VBench color"].note == "1 of 3 prompts without a video that could be scored"
        for score in scores.values():
            assert not score.low > score.value and not score.high < score.value
        assert scores["VBench physics"].low < scores["VBench physics"].value < scores["VBench physics"].high

    @pytest.mark.parametrize("second,bounds", [([0.5], (40, 60)), ([], intervals.NONE)])
    def test_one_prompt_with_videos_has_no_interval(self, second, bounds):
        score = vbench._score("color", 50.0, {"a": [0.4, 0.6], "b": second}, np.linspace(40, 60, 1001))
        assert (score.low, score.high) == pytest.approx(bounds, rel=0.05, nan_ok=True)

    def test_flickering_of_five_is_filtered_first(self, tmp_path, mp4, env):
        make(tmp_path / "out", mp4, n=5)
        vbench.run(tmp_path / "out", env, ["temporal_flickering", "dynamic_degree"])
        files = vbench.expected(tmp_path / "out", "temporal_flickering")
        assert files["In a still frame, a park"] == [f"In a still frame, a park-{i}.mp4" for i in range(5)]
        flicker, dynamic = vbench.collect(tmp_path / "out")
        assert flicker.videos == 10 and dynamic.videos == 20
        low, high = intervals.wilson(7, 20)
        assert (dynamic.low, dynamic.high) != pytest.approx((100 * low, 100 * high))  # by prompts: not independent

    @pytest.mark.parametrize(
        "how,said", [("silent", "no results file.*CUDA out of memory"), ("skip", "1 videos not scored")]
    )
    def test_exit_status_zero_is_no_success(self, tmp_path, mp4, env, how, said):
        make(tmp_path / "out", mp4)
        misbehave(env, how)
        with pytest.raises(ToolError, match=said):
            vbench.run(tmp_path / "out", env, ["scene"])
        misbehave(env, "")
        vbench.run(tmp_path / "out", env, ["scene"])
        assert [score.name for score in vbench.collect(tmp_path / "out")] == ["VBench scene"]

    def test_a_failure_does_not_stop_the_others(self, tmp_path, mp4, env):
        make(tmp_path / "out", mp4)
        misbehave(env, "skip")
        with pytest.raises(ToolError) as error:
            vbench.run(tmp_path / "out", env, ["scene", "human_action"])
        assert "scene" in str(error.value) and "human_action" in str(error.value)
        assert calls(env) == ["scene", "human_action"]

    def test_a_changed_video_is_scored_again(self, tmp_path, mp4, env):
        clips = make(tmp_path / "out", mp4)
        vbench.run(tmp_path / "out", env, ["scene"])
        os.utime(tmp_path / "out" / "videos" / clips[0].video, (4e9, 4e9))
        vbench.run(tmp_path / "out", env, ["scene"])
        assert calls(env) == ["scene", "scene"]

    def test_environment(self, tmp_path, mp4, env):
        make(tmp_path / "out", mp4)
        with pytest.raises(ConfigError, match="--env is the folder"):
            vbench.run(tmp_path / "out", tmp_path)
        venv.create(tmp_path / "empty", symlinks=True)
        with pytest.raises(ConfigError, match="no package vbench"):
            vbench.run(tmp_path / "out", tmp_path / "empty")
        with pytest.raises(ConfigError, match="no dimension colour"):
            vbench.run(tmp_path / "out", env, ["colour"])


class TestCollect:
    @pytest.fixture
    def out(self, tmp_path, mp4, env):
        make(tmp_path / "out", mp4)
        vbench.run(tmp_path / "out", env, ["scene", "imaging_quality", "dynamic_degree", "color"])
        return tmp_path / "out"

    @pytest.mark.parametrize(
        "dimension,change,said",
        [
            ("scene", lambda mean, rows: [mean, rows + [{"video_path": "/x/old-0.mp4", "video_results": mean}]], "old-0.mp4"),
            ("scene", lambda mean, rows: [mean, rows + rows[:1]], "more than once"),
            ("scene", lambda mean, rows: [mean, rows[1:]], "1 videos not scored"),
            ("scene", lambda mean, rows: [mean + 0.01, rows], "several GPUs"),
            ("scene", lambda mean, rows: [float("nan"), rows], "several GPUs"),
            ("scene", lambda mean, rows: [mean, [row | {"video_results": float("nan")} for row in rows]], "no number"),
            ("scene", lambda mean, rows: [mean], "not a results file"),
            ("imaging_quality", lambda mean, rows: [100 * mean, rows], "its videos'"),
            ("imaging_quality", lambda mean, rows: [1.2, [row | {"video_results": 120} for row in rows]], r"is in \[0, 1\]"),
            ("scene", lambda mean, rows: [-0.1, [row | {"video_results": -0.1} for row in rows]], r"is in \[0, 1\]"),
            ("dynamic_degree", lambda mean, rows: [0.3, [row | {"video_results": 0.3} for row in rows]], "neither yes nor no"),
            ("color", lambda mean, rows: [float("nan"), []], "no number"),
            ("color", lambda mean, rows: [mean, rows + [{"video_path": "/x/old-0.mp4", "video_results": mean}]], "old-0.mp4"),
        ],
    )  # fmt: skip
    def test_refuses(self, out, dimension, change, said):
        vbench.collect(out)
        edit(out, dimension, change)
        with pytest.raises(ConfigError, match=f"{dimension}: .*{said}"):
            vbench.collect(out)

    def test_two_results_files(self, out):
        official_tools.write(out / "results" / "vbench" / "scene" / "results_2027_eval_results.json", "{}")
        with pytest.raises(ConfigError, match="holds 2 results files"):
            vbench.collect(out)

    def test_no_total_without_all_its_dimensions(self, out):
        assert not [score for score in vbench.collect(out) if "physics" in score.name or "general" in score.name]


PAPER = """
68.49 98.27 97.19 91.67 46.00 9.32
58.69 96.64 97.40 44.44 34.00 20.97
83.83 99.28 98.58 61.11 79.00 81.18
81.88 99.01 98.95 52.78 81.00 77.66
87.55 98.78 98.30 79.17 80.00 81.50
86.76 98.20 97.90 87.50 76.00 74.20
76.24 99.31 99.05 29.17 78.00 75.69
83.07 98.58 98.08 66.67 76.00 76.00
82.52 99.16 98.75 58.33 77.00 79.35
88.52 98.41 97.89 88.89 80.00 77.39
"""  # arXiv 2605.26105, Table 1: Physics, then flickering, smoothness, dynamic degree, human action, spatial relationship


@pytest.mark.parametrize("line", PAPER.strip().splitlines())
def test_the_papers_totals(line):
    total, *parts = map(float, line.split())
    values = {name: part / 100 for name, part in zip(vbench.PHYSICS, parts)}
    assert vbench.totals(values).keys() == {"physics"}
    assert vbench.totals(values)["physics"] == pytest.approx(total, abs=0.01)
    general = vbench.totals(dict.fromkeys(vbench.GENERAL, 0.5) | {"scene": 1.0})
    assert general == {"general": pytest.approx(100 * (10 * 0.5 + 1) / 11)}


def test_dimensions_are_vbenchs_sixteen():
    assert len(set(vbench.DIMENSIONS)) == 16 and {d for row in ROWS for d in row["dimension"]} == set(vbench.DIMENSIONS)

"""VideoPhy-2, VideoAlign, flickering and the command itself, on stand-ins that are real processes."""

import csv
import json
from itertools import pairwise

import av
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from afd_fast.cli.main import app
from afd_fast.errors import ConfigError, ToolError
from afd_fast.evaluation import flickering, folder, intervals, vbench, videoalign, videophy2
from afd_fast.evaluation.folder import Clip
from afd_fast.video_io import write_video
from tests import official_tools

CLIPS = [
    Clip(f"000{i}-0.mp4", prompt, i)
    for i, prompt in enumerate(["a, ball", 'a "cup"', "rain", "snow", "fog", "ice", "wind", "sun"])
]


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    return official_tools.environment(tmp_path_factory.mktemp("env") / "tools")


@pytest.fixture
def out(tmp_path):
    folder.start(tmp_path / "an out", CLIPS, {"n": 1})
    for clip in CLIPS:
        video = torch.rand(3, 4, 16, 16, generator=torch.Generator().manual_seed(clip.seed))
        write_video(tmp_path / "an out" / "videos" / clip.video, video, 16)
    return tmp_path / "an out"


def edit(path, change):
    """Change the cells of a table: change(rows) -> rows, the header among them."""
    rows = list(csv.reader(path.open(newline="")))
    csv.writer(path.open("w", newline="")).writerows(change(rows))


class TestVideoPhy2:
    @pytest.fixture
    def tool(self, tmp_path, env):
        checkpoint = tmp_path / "videophy_2_auto"
        checkpoint.mkdir()
        return env, official_tools.videophy_repo(tmp_path / "videophy"), checkpoint

    def test_scores(self, out, tool):
        videophy2.run(out, *tool)
        videophy2.run(out, *tool)
        assert (tool[1] / "VIDEOPHY2" / "calls").read_text().split() == ["pc", "sa"]  # nothing twice
        pc, sa, joint = videophy2.collect(out)
        assert pc.value == 4 and pc.videos == 6  # 4, 5, 3 twice: the two zeros are no scores
        assert pc.note == "2 of 8 answers could not be parsed: dropped"
        assert (pc.low, pc.high) == intervals.bootstrap(dict(enumerate([v] for v in (4, 5, 3, 4, 5, 3))))
        assert sa.value == sa.low == sa.high == 4 and sa.videos == 8 and not sa.note
        assert joint.value == pytest.approx(100 * 4 / 6) and joint.note.startswith("4/6, 2 of 8")
        assert (joint.low, joint.high) == pytest.approx(tuple(100 * bound for bound in intervals.wilson(4, 6)))

    @pytest.mark.parametrize("how,said", [("silent", "pc.csv is not there"), ("skip", "1 videos not scored")])
    def test_exit_status_zero_is_no_success(self, out, tool, how, said):
        official_tools.write(tool[1] / "VIDEOPHY2" / "misbehave", how)
        with pytest.raises(ToolError, match=said):
            videophy2.run(out, *tool)

    @pytest.mark.parametrize(
        "change,said",
        [
            (lambda rows: rows[:-1], "not scored"),
            (lambda rows: [*rows, rows[1]], "more than once"),
            (lambda rows: [*rows, ["9", "/x/old.mp4", "a", "4.0"]], "not expected"),
            (lambda rows: [*rows[:-1], [*rows[-1][:-1], "7.0"]], "not 0, 1, ... 5"),
            (lambda rows: [*rows[:-1], [*rows[-1][:-1], ""]], "not 0, 1, ... 5"),
            (lambda rows: [row[:-1] for row in rows], "no column score"),
            (lambda rows: [rows[0], *([*row[:-1], "0.0"] for row in rows[1:])], "none of 8 answers"),
        ],
    )
    def test_refuses(self, out, tool, change, said):
        videophy2.run(out, *tool)
        edit(out / "results" / "videophy2" / "pc.csv", change)
        with pytest.raises(ConfigError, match=said):
            videophy2.collect(out)

    def test_what_is_missing_is_said(self, out, tool, tmp_path):
        env, repo, checkpoint = tool
        with pytest.raises(ConfigError, match="--repo is a clone"):
            videophy2.run(out, env, tmp_path, checkpoint)
        with pytest.raises(ConfigError, match="--checkpoint is a clone"):
            videophy2.run(out, env, repo, tmp_path / "absent")


class TestVideoAlign:
    @pytest.fixture
    def tool(self, tmp_path, env):
        checkpoint = official_tools.write(tmp_path / "VideoReward" / "model_config.json", "{}").parent
        return env, official_tools.videoalign_repo(tmp_path / "VideoAlign"), checkpoint

    def test_scores(self, out, tool):
        videoalign.run(out, *tool)
        scores = {score.name: score for score in videoalign.collect(out)}
        mean = np.mean([len(clip.prompt) / 10 for clip in CLIPS])
        assert [round(scores[f"VideoAlign {name}"].value - value, 9) for name, value in
                (("VQ", mean), ("MQ", mean + 1), ("TA", -mean), ("Overall", mean + 1))] == [0] * 4  # fmt: skip
        assert "not an independent judge" in scores["VideoAlign MQ"].note
        assert scores["VideoAlign MQ"].low < mean + 1 < scores["VideoAlign MQ"].high

    def test_a_crash_half_way(self, tmp_path, tool):
        clips = [Clip("a-0.mp4", "a", 0), Clip("a-1.mp4", "a", 1)]
        folder.start(tmp_path / "two", clips, {"n": 2})
        for clip in clips:
            write_video(tmp_path / "two" / "videos" / clip.video, torch.rand(3, 2, 16, 16), 16)
        official_tools.write(tool[1] / "misbehave")
        with pytest.raises(ToolError, match="1 videos not scored.*CUDA out of memory"):
            videoalign.run(tmp_path / "two", *tool)
        with pytest.raises(ConfigError, match="1 videos not scored"):
            videoalign.collect(tmp_path / "two")

    def test_refuses(self, out, tool, tmp_path):
        env, repo, checkpoint = tool
        with pytest.raises(ConfigError, match="--repo is a clone"):
            videoalign.run(out, env, tmp_path, checkpoint)
        with pytest.raises(ConfigError, match="model_config.json"):
            videoalign.run(out, env, repo, tmp_path)
        videoalign.run(out, *tool)
        for value in ("nan", "inf", "1e6", ""):
            edit(videoalign.results(out), lambda rows: [*rows[:-1], [rows[-1][0], value, "1", "1", "1"]])  # noqa: B023
            with pytest.raises(ConfigError, match="no number"):
                videoalign.collect(out)


class TestFlickering:
    def test_is_the_official_arithmetic(self):
        """The tool's own steps, spelt out: float32 frames, a mean over each pair, a mean over pairs."""
        frames = np.random.default_rng(0).integers(0, 256, (3, 5, 17, 13), np.uint8)
        images = [frames[:, i].transpose(1, 2, 0)[..., ::-1].astype(np.float32) for i in range(5)]  # BGR, as cv2 reads
        pairs = [np.mean(np.maximum(a, b) - np.minimum(a, b)) for a, b in pairwise(images)]
        official = (255.0 - np.mean(np.array(pairs)).item()) / 255.0
        assert flickering.temporal_flickering(frames) == pytest.approx(official, abs=1e-6)

    def test_known_values(self):
        black, white = np.zeros((3, 1, 4, 4), np.uint8), np.full((3, 1, 4, 4), 255, np.uint8)
        assert flickering.temporal_flickering(np.concatenate([black] * 3, 1)) == 1
        assert flickering.temporal_flickering(np.concatenate([black, white, black], 1)) == 0
        assert flickering.temporal_flickering(np.concatenate([black, white, white], 1)) == 0.5
        with pytest.raises(ValueError, match="F >= 2"):
            flickering.temporal_flickering(black)
        with pytest.raises(ValueError, match="uint8"):
            flickering.temporal_flickering(np.zeros((3, 2, 4, 4)))

    def test_of_files(self, out):
        flickering.run(out)
        (score,) = flickering.collect(out)
        values = []
        for clip in CLIPS:
            with av.open(str(out / "videos" / clip.video)) as container:
                images = [f.to_ndarray(format="bgr24").astype(int) for f in container.decode(video=0)]
            values.append(np.mean([255 - np.abs(b - a).mean() for a, b in pairwise(images)]) / 255)
        assert score.value == pytest.approx(100 * np.mean(values), rel=1e-9) and score.videos == 8
        edit(flickering.results(out), lambda rows: rows[:-1])
        with pytest.raises(ConfigError, match="other videos"):
            flickering.collect(out)

    @pytest.mark.parametrize("value", ["1.5", "-0.1", "nan", "inf", "x"])
    def test_a_score_out_of_range(self, out, value):
        flickering.run(out)
        edit(flickering.results(out), lambda rows: [*rows[:-1], [rows[-1][0], value]])
        with pytest.raises(ConfigError, match=r"scores\.csv: .*expected (0 to 1|a number)"):
            flickering.collect(out)

    def test_a_single_frame(self, out):
        write_video(out / "videos" / CLIPS[2].video, torch.rand(3, 1, 16, 16), 16)
        with pytest.raises(ConfigError, match="0002-0.mp4 holds a single frame"):
            flickering.run(out)

    def test_only_its_prompts_of_vbenchs(self, out):
        rows = [
            {"prompt_en": "rain", "dimension": ["temporal_flickering"]},
            {"prompt_en": "snow", "dimension": ["scene"]},
        ]
        official_tools.write(out / vbench.SUITE, json.dumps(rows))
        flickering.run(out)
        assert flickering.collect(out)[0].videos == 1


def command(*words):
    done = CliRunner().invoke(app, ["eval", *map(str, words)])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


class TestCommand:
    def test_from_prompts_to_a_table(self, tmp_path, env, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        out, rows = tmp_path / "out", [{"prompt_en": "a dog", "dimension": ["dynamic_degree"]},
                                       {"prompt_en": "a cat", "dimension": ["dynamic_degree"]}]  # fmt: skip
        suite = official_tools.write(tmp_path / "full.json", json.dumps(rows))
        make = ("export", out, "--vbench", suite, "--student", "tiny", "--frames", 3, "--n", 1)
        assert "2 of 2 videos" in command(*make)
        assert sorted(path.name for path in (out / "videos").iterdir()) == ["a cat-0.mp4", "a dog-0.mp4"]
        whole = (out / "videos" / "a cat-0.mp4").read_bytes()
        before = (out / "videos" / "a dog-0.mp4").stat().st_mtime_ns
        (out / "videos" / "a cat-0.mp4").write_bytes(whole[:900])
        command(*make)
        assert (out / "videos" / "a cat-0.mp4").read_bytes() == whole  # its own seed, whatever else is made
        assert (out / "videos" / "a dog-0.mp4").stat().st_mtime_ns == before
        with av.open(str(out / "videos" / "a cat-0.mp4")) as container:
            assert container.streams.video[0].average_rate == 16  # what dynamic degree's step is taken from
        with pytest.raises(ConfigError, match="other prompts or settings"):
            command(*make, "--seed", 1)
        command("run", "vbench", out, "--env", env)
        assert "1/2" in command("collect", out)
        (row,) = csv.DictReader((out / "scores.csv").open())
        assert row["name"] == "VBench dynamic_degree" and float(row["value"]) == 50 and row["videos"] == "2"

    def test_nothing_to_collect(self, out):
        with pytest.raises(ConfigError, match="holds no results"):
            command("collect", out)

    def test_manifest_without_a_student(self, tmp_path):
        prompts = official_tools.write(tmp_path / "p.txt", "a ball / a cup\n\na ball / a cup\nrain\n")
        assert "0 of 4 videos" in command("export", tmp_path / "out", "--prompts", prompts, "--n", 2)
        names = [clip.video for clip in folder.read_manifest(tmp_path / "out")]
        assert names == ["0000-a-ball-a-cup-0.mp4", "0000-a-ball-a-cup-1.mp4", "0001-rain-0.mp4", "0001-rain-1.mp4"]

    def test_a_kill_at_a_write_blocks_no_export(self, tmp_path, monkeypatch):
        """What it leaves of the manifest, and half of a copy or of the settings, is no other export."""
        suite = official_tools.write(
            tmp_path / "full.json", json.dumps([{"prompt_en": "a dog", "dimension": ["color"]}])
        )
        out, make = tmp_path / "out", ("export", tmp_path / "out", "--vbench", suite, "--n", 1)
        (out / "videos").mkdir(parents=True)
        (out / "manifest.csv.77.part").write_text("vid")

        def half(source, target):
            target.write_text("[{")
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("afd_fast.cli.evaluate.shutil.copyfile", half)
            CliRunner().invoke(app, ["eval", *map(str, make)])
        (out / "export.json").unlink()
        (out / "export.part").write_text("{")
        assert "0 of 1 videos" in command(*make)
        assert (out / vbench.SUITE).read_bytes() == suite.read_bytes() and folder.read_settings(out)["n"] == 1

    def test_prompts_of_any_editor(self, tmp_path):
        """A byte order mark is no part of a prompt, a line separator of Unicode splits none, Latin-1 is one clear line."""
        (tmp_path / "p.txt").write_bytes("\ufeffa red\u2028ball\r\n\r\n=1+1\r\n".encode())
        command("export", tmp_path / "out", "--prompts", tmp_path / "p.txt")
        assert [clip.prompt for clip in folder.read_manifest(tmp_path / "out")] == ["a red\u2028ball", "=1+1"]
        assert "'=1+1" in (tmp_path / "out" / "manifest.csv").read_text()  # which a spreadsheet does not run
        (tmp_path / "p.txt").write_bytes("one\ncaf\u00e9\n".encode("latin-1"))
        with pytest.raises(ConfigError, match=r"p\.txt is not text in UTF-8 \(byte 0xe9 in line 2\)"):
            command("export", tmp_path / "out", "--prompts", tmp_path / "p.txt")

    @pytest.mark.parametrize("wrong", [("--student", "absent.pt"), ("--student", "tiny", "--batch", 0)])
    def test_a_wrong_option_leaves_no_folder(self, tmp_path, wrong):
        prompts = official_tools.write(tmp_path / "p.txt", "a ball\n")
        with pytest.raises(ConfigError):
            command("export", tmp_path / "out", "--prompts", prompts, "--frames", 3, *wrong)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "words,said",
        [
            (("export", "o"), "either --vbench"),
            (("export", "o", "--prompts", "absent.txt"), "at least one prompt"),
            (("run", "vbench", "o"), "--env PATH"),
            (("run", "fvd", "o", "--env", "e"), "--env PATH"),
            (("run", "videophy2", "o", "--env", "e"), "--checkpoint PATH"),
            (("run", "flickering", "o"), "o is not there: give a folder that `afd-fast eval export` made"),
            (("collect", "o"), "eval export"),
        ],
    )
    def test_errors(self, tmp_path, monkeypatch, words, said):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ConfigError, match=said):
            command(*words)

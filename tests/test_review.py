"""Bad clips of a teacher: weights in a manifest that training honours, and what finds the clips."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from afd_fast.cli.main import app
from afd_fast.config import TrainConfig, with_values
from afd_fast.discriminators import Discriminator
from afd_fast.errors import ConfigError
from afd_fast.files.durable import checksum
from afd_fast.files.tables import read_csv
from afd_fast.judges.defects import defects
from afd_fast.students.toy.text import tokenize
from afd_fast.teachers import physics
from afd_fast.teachers.api import from_file
from afd_fast.teachers.dataset import BatchPlan, TeacherVideos, collect
from afd_fast.teachers.folder import Entry, FolderTeacher, read_manifest, write_manifest
from afd_fast.teachers.physics import PhysicsTeacher
from afd_fast.teachers.pipeline import write_folder
from afd_fast.teachers.records import Record
from afd_fast.training import review as review_module
from afd_fast.training.resume import check_teacher
from afd_fast.training.review import review
from afd_fast.training.rollouts import clip as own_clip
from afd_fast.training.rollouts import sample_policy
from afd_fast.training.trainer import new_run
from afd_fast.video_io import to_uint8, write_video

FIT, SCORES = review_module._fit, review_module._Clips.scores
PROMPTS = physics.all_prompts()
THROWN = next(prompt for prompt in PROMPTS if "thrown left" in prompt)  # it never stands still
PLAN = BatchPlan(seed=3, prompts=5, rollouts=4, shards=1)


def data(count=8, clips=3, weights=None):
    """Videos whose one pixel is their number."""
    prompts = [f"prompt {i}" for i in range(count)]
    videos = {p: torch.arange(clips, dtype=torch.uint8).view(clips, 1, 1, 1, 1).expand(-1, 3, 1, 1, 1) for p in prompts}
    return TeacherVideos(None, prompts, prompts[:1], None, videos, weights=weights or {})


def drawn(found, steps):
    """How often each (prompt, number) was drawn, in rows."""
    batches = [found.batch(PLAN, step, [0])[0] for step in range(steps)]
    return Counter(key for batch in batches for key in batch.keys)


class TestWeightedDraws:
    def test_weights_of_one_change_no_draw(self):
        """The batches are those that a run without weights has always had."""
        rng = np.random.default_rng([PLAN.seed, 11])
        chosen = [f"prompt {i}" for i in rng.permutation(8)[:5]]
        prompts = [p for p in chosen for _ in range(4)]
        picks = [int(rng.integers(3)) for _ in prompts]
        for weights in ({}, {p: [1.0] * 3 for p in data().videos}):
            (shard,) = data(weights=weights).batch(PLAN, 11, [0])
            assert (shard.prompts, shard.picks) == (prompts, picks)
            assert shard.pixels[:, 0, 0, 0, 0].tolist() == picks

    def test_a_clip_is_drawn_by_its_weight_among_its_prompts(self):
        count = drawn(data(weights={"prompt 2": [0.2, 1.0, 0.8]}), 600)
        rows = np.array([count["prompt 2", i] for i in range(3)])
        assert abs(rows / rows.sum() - np.array([0.1, 0.5, 0.4])).max() < 0.04  # 4 deviations of some 1500 rows: 0.05
        uniform = np.array([count["prompt 3", i] for i in range(3)])
        assert abs(uniform / uniform.sum() - 1 / 3).max() < 0.05

    def test_a_prompt_is_drawn_by_its_largest_weight(self):
        count = drawn(data(clips=1, weights={"prompt 2": [0.2]}), 600)
        rows = {p: count[p, 0] / 4 / 600 for p in data().videos}
        others = [share for p, share in rows.items() if p != "prompt 2"]
        assert 0.08 < rows["prompt 2"] < 0.17  # 0.2 of 5/8
        assert min(others) > 0.6

    def test_every_batch_is_full(self):
        """Where the others do not fill it, with those that were passed over."""
        found = data(count=5, weights={f"prompt {i}": [0.01] * 3 for i in range(5)})
        assert len(set(found.batch(PLAN, 0, [0])[0].prompts)) == 5


class TestManifestWeights:
    FIT = {"frames": 12, "size": (16, 16), "fps": 10}

    @pytest.fixture
    def videos(self, tmp_path):
        return write_folder(PhysicsTeacher(), PhysicsTeacher().split().train[:3], tmp_path / "v", fps=10, per_prompt=2)

    def weigh(self, folder, weights):
        entries = read_manifest(folder)
        return write_manifest(folder, [entry._replace(weight=w) for entry, w in zip(entries, weights)])

    def test_a_weight_reaches_the_videos_of_a_run(self, videos):
        self.weigh(videos, [0.25, 1, 0, 0, 0, 0.5])
        teacher = FolderTeacher(videos, **self.FIT)
        a, b, c = PhysicsTeacher().split().train[:3]
        assert teacher.prompts == [a, c]
        assert [line.split("/")[-1] for line in teacher.problems] == [
            f"{name}.mp4 has the weight 0 in the manifest" for name in ("00001-0", "00001-1", "00002-0")
        ]
        found = collect(teacher, 2, None, lambda items, about: items)
        assert found.weights == {a: [0.25, 1.0], c: [0.5]}

    def test_no_column_without_weights(self, videos):
        before = (videos / "manifest.csv").read_bytes()
        self.weigh(videos, [1] * 6)
        assert (videos / "manifest.csv").read_bytes() == before

    @pytest.mark.parametrize("kind", ["csv", "jsonl"])
    def test_other_columns_stay(self, tmp_path, kind):
        rows = [{"prompt": "=a", "model": "x,1", "video": "a.mp4"}, {"prompt": "b", "model": "y", "video": "b.mp4"}]
        if kind == "csv":
            (tmp_path / "manifest.csv").write_text('prompt,model,video\n\'=a,"x,1",a.mp4\nb,y,b.mp4\n')
        else:
            (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = self.weigh(tmp_path, [1, 0.5])
        assert path.name == f"manifest.{kind}" and [x.name for x in tmp_path.iterdir()] == [path.name]
        assert read_manifest(tmp_path) == [Entry("=a", "a.mp4", 1.0), Entry("b", "b.mp4", 0.5)]
        if kind == "csv":
            assert path.read_text().splitlines() == ["prompt,video,model,weight", '\'=a,a.mp4,"x,1",1', "b,b.mp4,y,0.5"]
        else:
            kept = [json.loads(line) for line in path.read_text().splitlines()]
            assert kept == [{**row, "weight": w} for row, w in zip(rows, (1, 0.5))]

    def test_writing_the_folder_again_keeps_the_weights(self, videos):
        self.weigh(videos, [0.25, 1, 1, 1, 1, 1])
        write_folder(PhysicsTeacher(), PhysicsTeacher().split().train[:3], videos, fps=10, per_prompt=2)
        assert [entry.weight for entry in read_manifest(videos)] == [0.25, 1, 1, 1, 1, 1]

    @pytest.mark.parametrize("given", ["-0.1", "1.5", "nan", "inf", "much"])
    def test_a_weight_out_of_range(self, tmp_path, given):
        (tmp_path / "manifest.csv").write_text(f"prompt,video,weight\na,a.mp4,\nb,b.mp4,{given}\n")
        with pytest.raises(
            ConfigError, match=rf"manifest.csv: row 2 has the weight '{given}', expected a number from 0"
        ):
            read_manifest(tmp_path)
        (tmp_path / "manifest.csv").write_text("prompt,video,weight\na,a.mp4,\n")
        assert read_manifest(tmp_path) == [Entry("a", "a.mp4", 1.0)]

    def test_a_resumed_run_says_that_weights_have_changed(self, tmp_path):
        notes = []
        for weights in ({}, {"prompt 2": [1.0, 1.0, 1.0]}, {"prompt 2": [0.5, 1.0, 1.0]}):
            check_teacher(tmp_path, data(weights=weights), notes.append)
        assert notes == ["the teacher's videos or their weights have changed: 'prompt 2'"]


def discs(seed, prompt=THROWN, **wrong):
    """A clip of the physics world, uint8 [3, F, H, W]."""
    return physics.sample_clips([prompt], np.random.default_rng(seed), **wrong)[0].numpy()


class TestDefects:
    """By construction, among sixteen sound clips of several prompts."""

    SOUND = [discs(seed, PROMPTS[9 * seed]) for seed in range(12)]

    def of(self, clip):
        (*others, found) = defects([*self.SOUND, clip])
        assert not any(one.reasons for one in others) and [one.copy for one in others] == list(range(12))
        return found

    def test_a_sound_clip(self):
        found = self.of(discs(50))
        assert found.reasons == [] and (found.flat, found.still, found.copy) == (0, 0, 12)

    @pytest.mark.parametrize("from_frame", [0, 6])
    def test_frozen(self, from_frame):
        clip = discs(50).copy()
        clip[:, from_frame:] = clip[:, from_frame : from_frame + 1]
        found = self.of(clip)
        assert found.still == pytest.approx((11 - from_frame) / 11)
        assert found.reasons == [f"frozen in {found.still:.0%} of its steps"]

    @pytest.mark.parametrize("value", [0, 90, 255])
    def test_no_picture(self, value):
        clip = discs(50).copy()
        clip[:, 5:] = value
        assert self.of(clip).reasons == ["no picture in 58% of its frames"]

    def test_a_cut(self):
        clip = np.concatenate([discs(51, PROMPTS[3])[:, :6], discs(52, PROMPTS[70])[:, 6:]], 1)
        found = self.of(clip)
        assert found.cut > 5 and found.reasons == [f"a cut ({found.cut:.1f})"]

    def test_a_flash_is_no_motion(self):
        """All pixels brighter from one frame on: nothing has moved more suddenly than before."""
        clip = discs(50)
        brighter = np.concatenate([clip[:, :6], (clip[:, 6:] // 2 + 60)], 1)
        assert self.of(brighter).reasons == []

    def test_a_copy_survives_another_encoding(self):
        noise = np.random.default_rng(0).integers(-2, 3, self.SOUND[4].shape)
        copy = (self.SOUND[4].astype(int) + noise).clip(0, 255).astype(np.uint8)
        assert self.of(copy).copy == 4 and self.of(discs(50, PROMPTS[36])).copy == 12

    def test_black_clips_are_not_copies_of_each_other(self):
        black = np.zeros_like(self.SOUND[0])
        assert [one.copy for one in defects([*self.SOUND, black, black])][-2:] == [12, 13]

    @pytest.mark.parametrize("shape", [(3, 1, 16, 16), (3, 2, 16, 16), (3, 3, 7, 5)])
    def test_small_clips(self, shape):
        clips = np.random.default_rng(0).integers(0, 256, (3, *shape)).astype(np.uint8)
        assert all(one.reasons == [] and one.copy == i for i, one in enumerate(defects(clips)))
        assert defects([]) == []


class Colours(Discriminator):
    """D = the mean colour . a vector for the prompt: what a clip must have is learnt in a few steps."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(1021, 3)
        nn.init.zeros_(self.words.weight)
        self.trained_on = []

    def score(self, videos, prompts):
        if torch.is_grad_enabled():
            self.trained_on[-1].append((videos.mean((1, 2, 3, 4)) * 255).tolist())
        return (videos.mean((2, 3, 4)) * self.words(tokenize(list(prompts))).sum(1)).sum(1)


NAMES = {"red": 0, "green": 1, "blue": 2}  # colour -> channel


@pytest.fixture(scope="module")
def boxes():
    """Boxes of the colour that the prompt says, brighter than the base student's balls; but one of "green" is red, and one
    of "blue" the base student's. Every clip has a level of its own."""
    config = with_values(TrainConfig(), {"discriminator.lr": 0.02, "discriminator.instance_noise": 0.0})
    run = new_run(config, discriminator=Colours())
    videos = {}
    for name, channel in NAMES.items():
        prompt = f"a large {name} ball dropped, low bounce"
        clips = np.full((8, 3, 12, 16, 16), 20, np.uint8)
        for clip, level in zip(clips, range(180, 256, 10)):
            for frame in range(12):
                clip[channel, frame, 4:14, frame % 6 : frame % 6 + 10] = level
        videos[prompt] = torch.from_numpy(clips)
    _, green, blue = videos
    videos[green][6] = videos[green][6][[1, 0, 2]]
    own = sample_policy(run, [blue], torch.Generator().manual_seed(5), average=False)
    videos[blue][7] = to_uint8(own_clip(run, own))[0]
    run.discriminator.trained_on.clear()
    data = TeacherVideos(None, list(videos), [], None, videos, names={p: list("abcdefgh") for p in videos})
    fits, scored = [], []
    patch = pytest.MonkeyPatch()

    def fit(clips, seen, *rest):
        run.discriminator.trained_on.append([])
        fits.append(set(seen))
        return FIT(clips, seen, *rest)

    def scores(clips, keys):
        scored.append((len(fits), set(keys)))
        return SCORES(clips, keys)

    patch.setattr(review_module, "_fit", fit)
    patch.setattr(review_module._Clips, "scores", scores)
    yield review(run, data, lambda items, about: items, steps=30), fits, scored
    patch.undo()


class TestReview:
    def test_what_looks_wrong_comes_first(self, boxes):
        listed, _, _ = boxes
        wrong, like_student = sorted(listed[:2], key=lambda one: one.name)
        assert ("green" in wrong.prompt, wrong.name) == (True, "g") and (
            "blue" in like_student.prompt,
            like_student.name,
        ) == (True, "h")
        assert any(reason.startswith("does not show its prompt (-") for reason in wrong.reasons)
        assert any(reason.startswith("moves like the base student (-") for reason in like_student.reasons)
        assert wrong.weight < 0.5 and like_student.weight < 0.5
        assert sum(bool(one.reasons) for one in listed[2:]) <= 2  # of 22 sound ones

    def test_no_clip_is_scored_by_a_fit_that_has_seen_it(self, boxes):
        listed, fits, scored = boxes
        assert len(fits) == 8
        of_teacher = [(number, {key for key in keys if key.seed >= 0}) for number, keys in scored]
        for number, keys in of_teacher:
            assert not keys & fits[number - 1]
        for half in (slice(0, 4), slice(4, 8)):  # a fit without each part, which is scored
            parts = [keys for number, keys in of_teacher if keys and number - 1 in range(8)[half]]
            assert len(parts) == 4 and sum(map(len, parts)) == len(set().union(*parts)) == len(listed)

    def test_too_few_clips(self):
        videos = {"a": torch.from_numpy(np.stack([discs(i) for i in range(7)]))}
        data = TeacherVideos(None, ["a"], [], None, videos, names={"a": list("abcdefg")})
        with pytest.raises(ConfigError, match="7 clips look sound, and a discriminator needs 8 .* --steps 0"):
            review(None, data, lambda items, about: items, steps=1)
        assert [one.scores for one in review(None, data, lambda items, about: items, steps=0)] == [{}] * 7

    def test_copies(self):
        """Of its own prompt a copy is left out; of another one both may be right."""
        clips = np.stack([discs(i) for i in range(6)])
        videos = {"a": torch.from_numpy(clips[[0, 1, 2, 1]]), "b": torch.from_numpy(clips[[3, 2, 4]])}
        data = TeacherVideos(None, list("ab"), [], None, videos, names={"a": list("pqrs"), "b": list("xyz")})
        listed = review(None, data, lambda items, about: items, steps=0)
        assert [(x.prompt, x.name, x.weight, x.reasons) for x in listed if x.reasons] == [
            ("a", "s", 0.0, ["a copy of q of 'a'"]), ("b", "y", 1.0, ["a copy of r of 'a'"])
        ]  # fmt: skip


class TestCommand:
    @pytest.fixture
    def videos(self, tmp_path):
        """Twelve clips: one frozen, one black, one a copy; and one too short."""
        of, rows = PhysicsTeacher(), ["prompt,video,note"]
        for i, prompt in enumerate(of.split().train[:6]):
            for seed in range(2):
                clip = of(prompt, 0 if (i, seed) == (3, 1) else seed)
                clip = clip[:, :1].expand_as(clip) if (i, seed) == (1, 0) else clip * ((i, seed) != (2, 1))
                write_video(tmp_path / f"{i}-{seed}.mp4", clip, 10, crf=10)
                rows.append(f'"{prompt}",./{i}-{seed}.mp4,n{i}')
        write_video(tmp_path / "short.mp4", clip[:, :3], 10)
        (tmp_path / "manifest.csv").write_text("\n".join([*rows, "a short one,short.mp4,x"]))
        return tmp_path

    def call(self, *arguments):
        return CliRunner().invoke(app, ["review", "demo", *map(str, arguments)], catch_exceptions=False)

    def test_from_a_folder_to_its_weights(self, videos):
        out = videos / "review"
        result = self.call(f"teacher=folder:{videos}", "--steps", 1, "--weights", "--out", out)
        said = "".join(result.output.split())  # a long path is broken where the line ends
        assert result.exit_code == 0, result.output
        for line in ("short.mp4: 3 frames at 10 fps, 12 are needed", "Of no use at all: 1 more."):
            assert "".join(line.split()) in said
        rows = read_csv(out / "clips.csv", ("prompt", "video", "weight", "reasons", "physics_score", "prompt_score"))
        assert len(rows) == 13 and "3 frames at 10 fps" in rows[0]["reasons"]
        gone = {row["video"]: row["reasons"] for row in rows[1:] if float(row["weight"]) == 0}
        assert gone["1-0.mp4"] == "frozen in 100% of its steps" and gone["2-1.mp4"].startswith("no picture in 100%")
        assert gone["3-1.mp4"].startswith("a copy of 3-0.mp4 of ")
        assert sum(row["physics_score"] != "" for row in rows) == 9  # no fit sees what has defects
        page = (out / "clips.html").read_text()
        assert "1-0.mp4: frozen in 100% of its steps" in page and page.count("<video") == sum(
            row["reasons"] != "" for row in rows[1:]
        )
        kept = read_csv(videos / "manifest.csv", ("prompt", "video", "note", "weight"))
        assert [row["note"] for row in kept[:4]] == ["n0", "n0", "n1", "n1"]
        weights = {row["video"].removeprefix("./"): float(row["weight"]) for row in kept}
        assert weights == {row["video"]: float(row["weight"]) for row in rows[1:]} | {"short.mp4": 1.0}
        teacher = FolderTeacher(videos, frames=12, size=(16, 16), fps=10)
        assert {"1-0.mp4", "2-1.mp4", "3-1.mp4"} < {name.rpartition("/")[2] for name in teacher.left_out}

    def test_the_same_seed_gives_the_same_list(self, videos):
        for name in ("a", "b"):
            self.call(f"teacher=folder:{videos}", "--steps", 1, "--out", videos / name)
        assert (videos / "a/clips.csv").read_bytes() == (videos / "b/clips.csv").read_bytes()

    @pytest.fixture
    def paid(self, tmp_path):
        """An API with six prompts, five of them bought and the third black. No key, no server: whatever asked for a video would fail."""
        prompts = PhysicsTeacher().split().train[:6]
        (tmp_path / "prompts.txt").write_text("\n".join(prompts))
        about = {
            "base_url": "http://127.0.0.1:9",
            "model": "m",
            "usd_per_video": 1,
            "max_usd": 99,
            "prompts": "prompts.txt",
        }
        (tmp_path / "paid.json").write_text(json.dumps(about))
        api = from_file(tmp_path / "paid.json", frames=12, size=(16, 16), fps=10)
        api.folder.mkdir()
        for i, prompt in enumerate(prompts[:5]):
            path = api.folder / api.file(prompt, 0)
            clip = PhysicsTeacher()(prompt, 0)
            write_video(path, clip * (i != 2), 10, crf=10)
            api._ledger.add(path.stem, Record(prompt, 0, "done", usd=1.0, sha256=checksum(path)))
        return api

    def weigh(self, tmp_path):
        result = self.call(
            f"teacher=api:{tmp_path / 'paid.json'}", "--steps", 0, "--weights", "--out", tmp_path / "out"
        )
        assert result.exit_code == 0, result.output
        return result.output

    def test_an_apis_videos_get_a_manifest_and_none_is_bought(self, tmp_path, paid):
        api, prompts = paid, paid.prompts
        self.weigh(tmp_path)
        entries = read_manifest(api.folder)
        assert [entry.prompt for entry in entries] == prompts[:5]
        assert [entry.weight for entry in entries] == [1, 1, 0, 1, 1]
        assert FolderTeacher(api.folder, frames=12, size=(16, 16), fps=10).prompts == [
            p for p in prompts[:5] if p != prompts[2]
        ]

    def test_what_an_apis_manifest_holds_stays(self, tmp_path, paid):
        """Lower weights, rows of videos that are not looked at and other columns were overwritten."""
        file, (a, b, c, d, e, f) = paid.file, paid.prompts
        (paid.folder / "manifest.csv").write_text(
            f'prompt,video,note,weight\n"{f}",old.mp4,mine,0.5\n"{b}",{file(b, 0)},dull,0.25\n"{c}",{file(c, 0)},,0.75\n'
        )
        self.weigh(tmp_path)
        kept = [("old.mp4", 0.5), (file(b, 0), 0.25), (file(c, 0), 0.0)]
        new = [(file(p, 0), 1.0) for p in (a, d, e)]
        assert [entry[1:] for entry in read_manifest(paid.folder)] == kept + new
        rows = read_csv(paid.folder / "manifest.csv", ("prompt", "video", "note", "weight"))
        assert [row["note"] for row in rows] == ["mine", "dull", "", "", "", ""]
        assert "needs no column" not in self.weigh(tmp_path)

    @pytest.mark.parametrize("arguments,said", [
        (["--weights"], "--weights needs videos that are files: teacher=physics has none"),
        (["teacher=[folder:a, folder:b]", "--weights"], "review the teachers one at a time"),
        (["teacher=folder:/nowhere", "--weights"], "/nowhere is not there"),
        (["teacher=film"], "teacher must be"),
        (["--out", f"{__file__}/out"], "cannot be made, as .* is a file"),
    ])  # fmt: skip
    def test_bad_input(self, arguments, said):
        with pytest.raises(ConfigError, match=said):
            self.call(*arguments)

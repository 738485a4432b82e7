"""Bad clips of a teacher: weights in a manifest that training honours, and what finds the clips."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from afd_fast.errors import ConfigError
from afd_fast.teachers.dataset import BatchPlan, TeacherVideos, collect
from afd_fast.teachers.folder import Entry, FolderTeacher, read_manifest, write_manifest
from afd_fast.teachers.physics import PhysicsTeacher
from afd_fast.teachers.pipeline import write_folder
from afd_fast.training.resume import check_teacher

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

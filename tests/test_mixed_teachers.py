"""Several teachers in one run: which prompt is whose, what they cost, and that no teacher's look becomes the reward."""

import re

import pytest
import torch

from afd_fast.config import with_overrides
from afd_fast.errors import ConfigError
from afd_fast.reports.run import write_report
from afd_fast.teachers import mixed
from afd_fast.teachers.dataset import open_teacher
from afd_fast.teachers.mixed import MixedTeacher
from afd_fast.teachers.physics import PhysicsTeacher
from afd_fast.teachers.teacher import TEACHERS, PromptSplit, Request, TeacherBase, register_teacher
from afd_fast.training import credit, runs, train
from afd_fast.training.rollouts import Rollouts
from afd_fast.video_io import VideoFormat
from tests.runs import QUIET, changed, toy_run

VIDEO = VideoFormat(12, 16, 16, 10)


class Of(TeacherBase):
    """A teacher with prompts, whose videos are of one value."""

    fps = 10.0

    def __init__(self, name, prompts, value=0.5, price=""):
        self.name, self.prompts, self.value, self.price, self.asked = name, prompts, value, price, []

    def __call__(self, prompt, seed):
        return torch.full((3, 12, 16, 16), self.value)

    def fetch(self, requests, done=lambda: None):
        self.asked += requests
        super().fetch(requests, done)

    def cost(self, requests):
        return f"{len(requests)} for {self.price}" if self.price else ""


def words(n, name="p"):
    return [f"{name} {i}" for i in range(n)]


class TestSpecs:
    @pytest.mark.parametrize("spec,shares", [
        ("[folder:a, api:b.json]", {"folder:a": 0.5, "api:b.json": 0.5}),
        ('["folder:a,b", "mine:x]"]', {"folder:a,b": 0.5, "mine:x]": 0.5}),
        ('{"folder:a": 0.7, "b": 0.3}', {"folder:a": 0.7, "b": 0.3}),
        ("folder:[a]", None),
    ])  # fmt: skip
    def test_what_is_written(self, spec, shares):
        assert mixed.parse(spec) == shares
        assert with_overrides(runs.demo(), [f"teacher={spec}"]).teacher == spec

    @pytest.mark.parametrize("spec,said", [
        ("[folder:a]", "must name two teachers or more"),
        ("[]", "must name two teachers or more"),
        ("[folder:a,]", "must name two teachers or more"),
        ("[folder:a,folder:a]", "each once"),
        ("[folder:a, folder:./b/../a]", "each once"),
        ('{"folder:a": 0.3, "folder:a": 0.4, "folder:b": 0.3}', "each once"),
        ('{"folder:a": 0.5, "folder:./a": 0.5}', "each once"),
        ("[1, 2]", "must name two teachers"),
        ("[folder:a,folder:b", "is no list of teachers"),
        ("{folder:a: 1}", "is no list of teachers"),
        ('{"folder:a": 0.7, "folder:b": 0.4}', "positive numbers with the sum 1"),
        ('{"folder:a": 1.5, "folder:b": -0.5}', "positive numbers with the sum 1"),
        ('{"folder:a": "0.5", "folder:b": 0.5}', "positive numbers with the sum 1"),
        ("[physics,film]", "teacher must be .*, got 'film'"),
        ("[physics,[lights,physics]]", "is no list|must be"),
        ("[physics,lights]", "teacher=lights makes videos of 24x24 pixels, and this student of 16x16"),
        ("[physics,physics:dusk]", "another look"),
    ])  # fmt: skip
    def test_bad_input_before_anything_is_bought(self, tmp_path, spec, said):
        with pytest.raises(ConfigError, match=said):
            open_teacher(spec, VIDEO, tmp_path)


class TestDivision:
    def of(self, shares, *lists, **more):
        teachers = {f"t{i}": Of(f"t{i}", prompts, **more) for i, prompts in enumerate(lists)}
        return MixedTeacher(teachers, shares or dict.fromkeys(teachers, 1 / len(teachers)))

    def test_prompts_of_one_list_are_its_teachers(self):
        found = self.of(None, words(8, "a"), words(16, "b"))
        assert {spec: next(p for p, s in found.owner.items() if s == spec)[0] for spec in ("t0", "t1")} == {
            "t0": "a",
            "t1": "b",
        }
        train, held_out = found.split()
        assert held_out == ["b 14", "a 7", "b 15"] and len(train) == 21
        assert [p[0] for p in train[:6]] == list("babbab")  # teacher_prompts=6 takes of both

    @pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
    def test_common_prompts_are_divided_by_the_shares(self, share):
        found = self.of({"t0": share, "t1": 1 - share}, words(40), [*words(40), *words(5, "more")])
        common = [found.owner[p] for p in words(40)]
        assert common.count("t0") == 40 * share and all(found.owner[p] == "t1" for p in words(5, "more"))
        again = self.of({"t0": share, "t1": 1 - share}, words(40)[::-1], [*words(40), *words(5, "more")])
        assert again.owner == found.owner

    def test_of_a_common_prompt_the_teacher_with_better_clips(self):
        """By the mean weight of its clips, however many; shares divide what is left, and a clip that is not there yet counts as 1."""

        class Weighted(Of):
            def __init__(self, name, prompts, weights):
                super().__init__(name, prompts)
                self.weights = weights

            def seeds(self, prompt, wanted):
                return [seed for seed in wanted if seed < len(self.weights.get(prompt, ()))]

            def weight(self, prompt, seed):
                return self.weights[prompt][seed]

        prompts = words(20)
        a = Weighted(
            "a", prompts, {"p 0": [0.9, 0.5], "p 1": [0.2], "p 2": [0.3, 0.3], **{p: [1.0] for p in prompts[4:]}}
        )
        b = Weighted("b", [*prompts, "q"], {"p 0": [0.6], "p 1": [0.1, 0.4], "p 2": [0.3], "q": [0.1]})
        owners = []
        for teachers in ({"a": a, "b": b}, {"b": b, "a": a}):
            found = MixedTeacher(teachers, {"a": 0.5, "b": 0.5})
            owners.append(found.owner)
            assert (found.owner["p 0"], found.owner["p 1"], found.owner["q"]) == ("a", "b", "b")
            assert [found.owner[p] for p in prompts[2:]].count("a") == 9
        assert sum(owners[0][p] != owners[1][p] for p in prompts[:2]) == 0
        with pytest.raises(ConfigError, match="t1 is left without a prompt: .* its clips larger weights"):
            MixedTeacher(
                {"t0": Of("t0", ["p 0"]), "t1": Weighted("t1", ["p 0"], {"p 0": [0.5]})}, {"t0": 0.5, "t1": 0.5}
            )

    def test_each_prompt_has_one_teacher_and_one_role(self):
        found = self.of(None, words(30), words(30)[::-1], words(20))
        train, held_out = found.split()
        assert sorted(train + held_out) == sorted(words(30)) and not set(train) & set(held_out)

    def test_every_question_goes_to_the_prompts_teacher(self):
        a, b = Of("a", words(8, "a"), 0.25, price="3 USD"), Of("b", words(8, "b"), 0.75)
        found = MixedTeacher({"a": a, "b": b}, {"a": 0.5, "b": 0.5})
        requests = [Request(p, s) for p in ("a 1", "b 2", "b 3") for s in (0, 1)]
        ticks = []
        found.fetch(requests, lambda: ticks.append(1))
        assert (a.asked, b.asked, len(ticks)) == (requests[:2], requests[2:], 6)
        assert found("a 1", 0).mean() == 0.25 and found("b 1", 0).mean() == 0.75
        assert found.cost(requests) == "a (2 videos): 2 for 3 USD; b (4 videos): free"
        assert found.counts(found.split()) == {"a": "7 trained on, 1 held out", "b": "7 trained on, 1 held out"}
        with pytest.raises(ConfigError, match="no teacher of .* knows the prompt 'c'"):
            found("c", 0)

    def test_what_cannot_be_divided(self):
        with pytest.raises(ConfigError, match="no prompt in common to share"):
            self.of({"t0": 0.7, "t1": 0.3}, words(4, "a"), words(4, "b"))
        with pytest.raises(ConfigError, match="teacher=t0 is left without a prompt"):
            self.of({"t0": 0.01, "t1": 0.99}, words(8), words(8))
        with pytest.raises(ConfigError, match="judged by physics and by clips, expected one judge"):
            MixedTeacher({"physics": PhysicsTeacher(), "b": Of("b", words(4))}, {"physics": 0.5, "b": 0.5})


def advantages(config, teachers, scores):
    run = toy_run(config)
    run.teachers = teachers
    prompts = [p for p in scores for _ in range(2)]
    rewards = torch.tensor([x for pair in scores.values() for x in pair])
    shard = Rollouts(0, prompts, torch.zeros(len(prompts), 3, 12, 16, 16), torch.zeros(len(prompts), 3, 12, 16, 16))
    shard.scores = rewards
    credit.assign_credit(run, [shard])
    return shard.r.flatten()


class TestCalibration:
    SCORES = {"a": (0.0, 0.1), "a # 1": (0.0, 0.2), "b": (50.0, 90.0), "c": (60.0, 80.0)}
    TEACHERS = {"a": "A", "a # 1": "A", "b": "B", "c": "B"}

    @pytest.mark.parametrize("shift,scale", [(0, 1), (1000, 1), (0, 0.001), (-70, 1000)])
    def test_the_level_and_scale_of_one_teachers_scores_do_not_touch_the_others(self, tiny_config, shift, scale):
        config = changed(tiny_config, rollouts_per_prompt=2, global_std=True)
        plain = advantages(config, self.TEACHERS, self.SCORES)
        moved = {
            p: tuple(shift + scale * x for x in pair) if self.TEACHERS[p] == "B" else pair
            for p, pair in self.SCORES.items()
        }
        other = advantages(config, self.TEACHERS, moved)
        assert torch.equal(other[:4], plain[:4]) and (plain[:4] - 0.5).abs().min() > 0.02
        together = advantages(config, {}, self.SCORES)  # as one teacher: A's advantages vanish
        assert (together[:4] - 0.5).abs().max() < 1e-3

    def test_nothing_changes_where_the_scale_is_the_prompts(self, tiny_config):
        config = changed(tiny_config, rollouts_per_prompt=2)
        assert torch.equal(advantages(config, self.TEACHERS, self.SCORES), advantages(config, {}, self.SCORES))


@pytest.fixture
def two():
    """`left:` and `right:`, which know the physics world's prompts and are judged alike."""

    class Half(PhysicsTeacher):
        def split(self):
            train, held_out = super().split()
            return PromptSplit(train[:6], held_out[:4])

    for name in ("left", "right"):
        register_teacher(name, lambda rest, video, cache: Half())
    yield "[left:x,right:y]"
    for name in ("left", "right"):
        del TEACHERS[name]


def test_a_run_of_two_teachers_says_whose_its_prompts_are(two, tiny_config, tmp_path):
    config = changed(tiny_config, teacher=two, evaluation__every=4)
    result = train(config, out=tmp_path / "run", console=QUIET)
    teachers = result["teachers"]
    assert list(teachers) == ["left:x", "right:y"] or list(teachers) == ["right:y", "left:x"]
    assert (
        sum(row["train"] for row in teachers.values()) == 6 and sum(row["held_out"] for row in teachers.values()) == 4
    )
    total = sum(row.get("residual_px", 0) * row["held_out"] for row in teachers.values()) / 4
    assert total == pytest.approx(result["rows"]["student"]["residual_px"], rel=1e-4)
    page = write_report(tmp_path / "run").read_text()
    assert all(re.search(rf"<th scope=\"row\">{name}</th>", page) for name in teachers)
    assert train(config, out=tmp_path / "run", resume=True, console=QUIET)["teachers"] == teachers

"""What docs/extending.md promises: own students, teachers, discriminators and methods by registration alone, and one clear
error for what they lack."""

import pytest
import torch
from torch import nn

from afd_fast.config import METHOD_NAMES, TrainConfig, with_overrides
from afd_fast.discriminators import Discriminator, DiscriminatorEntry, register_discriminator
from afd_fast.discriminators.config import DISCRIMINATORS
from afd_fast.errors import ConfigError, VideoError
from afd_fast.students import Family, FamilyEntry, LatentFormat, StudentModule, register_family
from afd_fast.students.student import FAMILIES, check_student
from afd_fast.students.toy import shipped
from afd_fast.students.toy.family import of_student
from afd_fast.teachers import CallableTeacher, register_teacher
from afd_fast.teachers.teacher import TEACHERS
from afd_fast.training import methods, train
from afd_fast.training.methods import METHODS, Method, register_method
from afd_fast.video_io import VideoFormat
from tests.runs import QUIET, changed

FEW = [
    "iterations=2", "discriminator.warmup=1", "evaluation.every=2", "evaluation.rollouts=2", "rollouts_per_prompt=2",
    "prompts_per_step=2", "teacher_clips=1", "student.lora_rank=4",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _registries():
    tables = (FAMILIES, DISCRIMINATORS, TEACHERS, METHODS, METHOD_NAMES)
    kept = [dict(table) for table in tables]
    yield
    for table, before in zip(tables, kept):
        table.clear()
        table.update(before)


class Mean(Discriminator):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def score(self, videos, prompts):
        return (videos.mean((2, 3, 4)) * self.weight).sum(1)


def flat(prompt, seed):
    return torch.full((3, 12, 16, 16), 0.2 + 0.1 * seed)


def test_everything_by_name(tmp_path):
    seen = []

    def iteration(run, shards):
        seen.append(type(run.discriminator).__name__)
        return {"loss": 1.0}

    register_family("own", FamilyEntry(lambda config, chunk, seed: of_student(shipped.load()), chunk=3))
    register_discriminator("mean", DiscriminatorEntry(lambda config, video: Mean()))
    register_teacher(
        "flat", lambda rest, video, cache: CallableTeacher(flat, ["a", "b", "c"], name=f"flat-{rest}", fps=10)
    )
    register_method(Method("mine", iteration))
    keys = ["student=own", "discriminator=mean", "teacher=flat:1", "method=mine"]
    result = train(with_overrides(TrainConfig(), [*FEW, *keys]), out=tmp_path / "run", console=QUIET)
    assert seen == ["Mean", "Mean"] and result["prompts"] == {"train": 2, "held_out": 1}
    for again in (
        lambda: register_family("own", FAMILIES["own"]),
        lambda: register_discriminator("mean", DISCRIMINATORS["mean"]),
        lambda: register_teacher("flat", TEACHERS["flat"]),
        lambda: methods.register_method(METHODS["mine"]),
    ):
        with pytest.raises(ConfigError, match="exists already"):
            again()


def test_objects_in_place_of_names(tmp_path):
    teacher = CallableTeacher(flat, ["a", "b", "c", "a"], name="flat", fps=10)
    config = with_overrides(TrainConfig(), FEW)
    train(config, of_student(shipped.load()), tmp_path / "run", teacher=teacher, discriminator=Mean(), console=QUIET)
    assert (tmp_path / "run/result.json").exists() and len(list((tmp_path / "teacher-cache").glob("*.mp4"))) == 3


def test_a_teacher_whose_videos_are_too_short_is_named_with_the_prompt(tmp_path):
    teacher = CallableTeacher(
        flat, ["a", "b", "c"], name="flat", fps=16
    )  # 12 frames are 8 at 10 fps: 0 .. 0.7 s of 0.75
    with pytest.raises(VideoError, match="'flat' gave a video of 'a' that does not fit: .* 8 frames at 10 fps"):
        train(with_overrides(TrainConfig(), FEW), out=tmp_path / "run", teacher=teacher, console=QUIET)
    assert list((tmp_path / "teacher-cache").glob("*.mp4"))  # and is kept


class Half(StudentModule):
    def encode_text(self, context):
        return context


def test_a_student_is_named_with_the_methods_it_lacks():
    with pytest.raises(ConfigError, match="Half lacks new_cache, forward"):
        check_student(Half())
    with pytest.raises(ConfigError, match="Linear lacks encode_text, new_cache, timestep"):
        check_student(nn.Linear(1, 1))
    with pytest.raises(ConfigError, match=r"must be a torch.nn.Module, got str"):
        check_student("toy")


@pytest.mark.parametrize("change, message", [
    ({"vae": None}, "NoneType lacks encode"),
    ({"chunk": 5}, "12 latent frames are not whole chunks of 5"),
])  # fmt: skip
def test_a_family_that_does_not_fit_is_refused(change, message):
    good = of_student(shipped.load())
    parts = {"name": "x", "student": good.student, "text": good.text, "vae": good.vae, "chunk": 3,
             "latents": LatentFormat(3, 12, 16, 16), "video": VideoFormat(12, 16, 16, 10)}  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        Family(**parts | change)


@pytest.mark.parametrize("keys, message", [
    (["student.lora_rank=4"], "names no layers for adapters: set student.lora_rank=0"),
    (["rollout.chunk=4", "student=own"], "rollout.chunk=4, but the family's chunk is 3"),
    (["student=own", "student.frames=9"], "no meaning with a family"),
    (["rollout.graphs=true"], "rollout.graphs=true needs graphed, which the student ToyStudent does not define"),
])  # fmt: skip
def test_settings_that_do_not_fit_the_family_are_refused_before_a_folder_is_made(tmp_path, keys, message):
    made = of_student(shipped.load())
    made.lora_targets = ()
    with pytest.raises(ConfigError, match=message):
        train(with_overrides(TrainConfig(), [*FEW, *keys]), made, tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()


def test_refused_prompts_stop_before_a_folder_is_made(tmp_path):
    """All of them in one line, of the text encoder and of the discriminator."""
    made = of_student(shipped.load())

    def text(prompts):
        if "c" in prompts:
            raise ValueError("too long")
        return torch.zeros(len(prompts), 12, dtype=torch.long)

    made.text = text

    class Picky(Mean):
        def check_prompt(self, prompt):
            if prompt == "a":
                raise ValueError("a special token")

    teacher = CallableTeacher(flat, ["a", "b", "c"], name="flat", fps=10)
    with pytest.raises(ConfigError, match="2 of 3 prompts cannot be used: 'a': a special token; 'c': too long"):
        train(
            with_overrides(TrainConfig(), FEW), made, tmp_path / "run", teacher=teacher, discriminator=Picky(),
            console=QUIET,
        )  # fmt: skip
    assert not (tmp_path / "run").exists() and not list((tmp_path / "teacher-cache").glob("*"))


def test_shards_that_the_prompts_cannot_fill_are_refused_first(tmp_path):
    config = changed(with_overrides(TrainConfig(), FEW), prompts_per_step=4, shards=4)
    teacher = CallableTeacher(flat, ["a", "b", "c"], name="flat", fps=10)
    with pytest.raises(ConfigError, match="2 training prompts cannot be split into shards=4"):
        train(config, out=tmp_path / "run", teacher=teacher, console=QUIET)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["student", "discriminator"])
def test_a_misspelt_name_is_refused_with_the_names_that_there_are(key, tmp_path):
    with pytest.raises(ConfigError, match=f"{key}=tinny is none of .*toy.* neither a file, a folder"):
        train(with_overrides(TrainConfig(), [f"{key}.name=tinny"]), out=tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()

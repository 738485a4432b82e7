"""What a run's evaluations compare with what, and the learning rate between them."""

from types import SimpleNamespace

import pytest
import torch

from afd_fast.config import TrainConfig, with_overrides
from afd_fast.judges.clips import dynamic
from afd_fast.teachers.dataset import TeacherVideos
from afd_fast.training.evaluate import Evaluator
from afd_fast.training.loop import set_learning_rate
from afd_fast.training.methods import METHODS
from tests.runs import toy_run

HELD_OUT = ["a small red ball dropped", "a large blue ball thrown left"]


def evaluator(counts, rollouts=4):
    """Of real videos, so many for each held-out prompt."""
    config = with_overrides(TrainConfig(), [f"evaluation.rollouts={rollouts}", "rollout.steps=1000"])
    teacher = SimpleNamespace(judge="clips", familiar=lambda prompts: [])
    rng = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(0, 256, (n, 3, 12, 16, 16), dtype=torch.uint8, generator=rng)
    data = TeacherVideos(teacher, HELD_OUT, HELD_OUT, None, {p: draw(n) for p, n in zip(HELD_OUT, counts)})
    return Evaluator(toy_run(config), data, lambda items, description: items)


def test_the_discriminators_accuracy_is_over_all_of_a_prompts_clips():
    found, asked = evaluator((2, 2)), []
    encoded = found.run.encoded
    found.run.encoded = lambda keys, pixels: asked.extend(keys) or encoded(keys, pixels)
    found.evaluate()
    assert asked == [(prompt, clip) for clip in (0, 1, 0, 1) for prompt in HELD_OUT]


def test_a_teachers_prompts_count_alike_however_many_clips_they_have():
    found = evaluator((3, 1))
    means = [dynamic(found.data.videos[p].numpy()).mean() for p in HELD_OUT]
    assert abs(means[0] - means[1]) > 1e-3
    assert found.teacher_row()["dynamic"] == pytest.approx(sum(means) / 2)


@pytest.mark.parametrize("method", METHODS)
def test_the_learning_rate_falls_from_the_students_first_update_on(method):
    run = toy_run(with_overrides(TrainConfig(), [f"method={method}", "discriminator.warmup=10", "iterations=30"]))
    first, rates = 10 if METHODS[method].uses_discriminator else 0, []
    for run.state.step in range(30):
        set_learning_rate(run)
        rates.append(run.state.optimizer.param_groups[0]["lr"])
    assert set(rates[: first + 1]) == {run.config.update.lr} and sorted(rates, reverse=True)[first:] == rates[first:]
    assert len(set(rates[first:])) == 30 - first

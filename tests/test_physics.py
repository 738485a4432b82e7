import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch

from afd_fast.judges import clips as real_videos
from afd_fast.judges.physics import (
    by_day,
    evaluate,
    frechet,
    measured_bounce,
    measured_gravity,
    physics_residual,
    track,
)
from afd_fast.students.toy import pretrain
from afd_fast.teachers import TeacherBase
from afd_fast.teachers.physics import (
    BACKGROUND,
    BOUNCES,
    COLORS,
    FPS,
    GRAVITY,
    RADII,
    PhysicsTeacher,
    all_prompts,
    parse,
    render,
    sample_clips,
    simulate,
    split_prompts,
)  # fmt: skip

PROMPTS = all_prompts()[::5]


def test_the_judge_of_real_videos_has_one_clip_in_floats_at_a_time():
    rng = np.random.default_rng(0)
    videos, reference = (rng.integers(low, 256, (12, 3, 9, 32, 32), dtype=np.uint8) for low in (0, 60))
    tracemalloc.start()
    found = real_videos.evaluate(videos, reference)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * 8 * videos[0].size
    x, y = videos / 255, reference / 255
    change = lambda a: np.abs(np.diff(a, axis=2)).mean((1, 3, 4))
    features = lambda a: np.concatenate([a.mean((3, 4)).reshape(12, -1), change(a)], 1)
    expected = {
        "dynamic": 100 * change(x).mean(), "brightness": x.mean(), "contrast": x.std(),
        "frechet": frechet(features(x), features(y)),
    }  # fmt: skip
    assert found == pytest.approx(expected, rel=1e-5)
    assert np.isnan(real_videos.evaluate(videos[:1], reference)["frechet"])


def clips(prompts, seed=0, **physics):
    return sample_clips(prompts, np.random.default_rng(seed), **physics).numpy() / 255


def test_teacher_is_a_function_of_prompt_and_seed():
    teacher = PhysicsTeacher()
    missing = [name for name in TeacherBase.__dict__ if not name.startswith("__") and not hasattr(teacher, name)]
    assert not missing and teacher.split().train
    video = teacher(PROMPTS[0], 1)
    assert video.shape == (3, 12, 16, 16) and 0 <= video.min() and video.max() <= 1
    assert torch.equal(video, teacher(PROMPTS[0], 1)) and not torch.equal(video, teacher(PROMPTS[0], 2))
    other_color = PROMPTS[0].replace("red", "blue")
    start = lambda prompt: track(teacher(prompt, 1).numpy()[None])[0][0, 0]
    assert abs(start(PROMPTS[0]) - start(other_color)).max() > 0.02, "a seed must not fix the start for every prompt"


def test_prompt_from_outside_the_world_is_refused():
    assert parse("a small red ball thrown right, low bounce").elasticity == BOUNCES["low"]
    with pytest.raises(ValueError, match="low|high"):
        PhysicsTeacher()("a cat", 0)


def test_free_fall_is_a_parabola():
    """Against the closed form y0 + v t - g t^2 / 2, before the floor."""
    centres = simulate(0.1, (0.5, 0.9, 0.1, 0.2), GRAVITY, 0.5, frames=5, substeps=400)
    t = np.arange(5) / FPS
    np.testing.assert_allclose(centres[:, 1], 0.9 + 0.2 * t - GRAVITY * t**2 / 2, atol=1e-3)
    np.testing.assert_allclose(centres[:, 0], 0.5 + 0.1 * t, atol=1e-6)


def test_tracker_finds_the_rendered_centre():
    truth = np.stack([np.linspace(0.25, 0.7, 12), np.linspace(0.3, 0.75, 12)], -1)
    found, spread = track(render(truth, RADII["small"], COLORS["cyan"])[None] / 255)
    np.testing.assert_allclose(found[0], truth, atol=0.01)
    np.testing.assert_allclose(spread[0], RADII["small"] / np.sqrt(2), rtol=0.15)


def test_judge_accepts_the_truth_and_rejects_the_wrong_world():
    right, wrong = clips(PROMPTS), clips(PROMPTS, gravity=(0.5, 1.5))
    assert physics_residual(right, PROMPTS).mean() < 0.1 < 1.0 < physics_residual(wrong, PROMPTS).mean()


def test_residual_depends_on_the_prompts_bounce():
    prompt = "a small red ball dropped, high bounce"
    video = clips([prompt] * 8)
    said_low = prompt.replace("high", "low")
    assert physics_residual(video, [prompt] * 8).mean() < 0.1 < 0.2 < physics_residual(video, [said_low] * 8).mean()


@pytest.mark.parametrize("gravity", [1.0, 3.0])
def test_gravity_is_measured(gravity):
    prompts = [p for p in all_prompts() if "tossed" in p]
    radius = np.array([parse(p).radius for p in prompts])
    heights = track(clips(prompts, gravity=(gravity, gravity)))[0][..., 1]
    assert np.nanmedian(measured_gravity(heights, radius)) == pytest.approx(gravity, rel=0.1)


@pytest.mark.parametrize("elasticity", [0.3, 0.75])
def test_bounce_is_measured(elasticity):
    prompts = [p for p in all_prompts() if "dropped, high" in p]
    radius = np.array([parse(p).radius for p in prompts])
    heights = track(clips(prompts, elasticity={"high": (elasticity, elasticity)}))[0][..., 1]
    assert np.nanmedian(measured_bounce(heights, radius)) == pytest.approx(elasticity, abs=0.1)


def test_general_quality_falls_with_each_kind_of_damage():
    video = clips(PROMPTS)
    scores = evaluate(video, PROMPTS, video)
    assert scores["general"] > 0.97 and abs(scores["frechet"]) < 1e-6
    assert evaluate(video[:, [1, 2, 0]], PROMPTS, video)["color"] < 0.5
    mirrored = evaluate(video[..., ::-1], PROMPTS, video)
    assert mirrored["motion"] < 0.7 and mirrored["color"] == scores["color"]
    noisy = evaluate(np.clip(video + np.random.default_rng(0).normal(0, 0.2, video.shape), 0, 1), PROMPTS, video)
    assert noisy["flicker"] > 5 * scores["flicker"] and noisy["general"] < scores["general"]
    smaller = [p.replace("large", "small") for p in PROMPTS]
    assert evaluate(clips(smaller), PROMPTS, video)["size"] < 0.7


def test_frechet_of_gaussians():
    """Against the closed form for diagonal Gaussians: |m1 - m2|^2 + sum (s1 - s2)^2."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (200_000, 2)), rng.normal([1, 0], [2, 1], (200_000, 2))
    assert frechet(a, b) == pytest.approx(2.0, rel=0.03)


def test_dusk_is_day_in_another_look():
    prompts = all_prompts()[:6]
    dusk = [f"{p}, dusk" for p in prompts]
    rng = lambda: np.random.default_rng(0)
    day, late = (sample_clips(p, rng()).numpy() / 255 for p in (prompts, dusk))
    assert np.median(day) == pytest.approx(BACKGROUND, abs=2e-3) and np.median(late) == pytest.approx(0.15, abs=2e-3)
    assert abs(by_day(late, dusk) - day).max() < 6e-3 and by_day(day, prompts) is day  # 8 bits
    scores = evaluate(late, dusk, late)
    plain = evaluate(day, prompts, day)
    assert scores["background"] == pytest.approx(0.15, abs=2e-3)
    assert all(scores[k] == pytest.approx(plain[k], abs=0.02) for k in ("residual_px", "general", "gravity"))
    assert evaluate(day, dusk, late)["background"] == pytest.approx(BACKGROUND, abs=2e-3)  # not adapted: seen
    with pytest.raises(ValueError, match="dusk"):
        parse(f"{prompts[0]}, dawn")
    train, held_out = split_prompts(look="dusk")
    assert [p.removesuffix(", dusk") for p in held_out] == split_prompts()[1] and len(train) == 112


def test_both_looks_are_mixed_whatever_the_prompt_says():
    world = replace(pretrain.LOOKS, clips=500)
    videos, prompts = pretrain.wrong_world_clips(world)
    dusk = videos[:, :, 0].flatten(1).float().quantile(0.1, 1) / 255 > 0.1
    said = torch.tensor([prompt.endswith("dusk") for prompt in prompts])
    assert 0.4 < said.float().mean() < 0.6
    for of in (said, ~said):
        assert 0.05 < dusk[of].float().mean() < 0.15

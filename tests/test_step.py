"""The loss and gradient of the step against method's closed form, in float64."""

import pytest
import torch

from afd_fast.config import TrainConfig
from afd_fast.errors import TrainingError
from afd_fast.reference.advantage import PerPromptStatTracker
from afd_fast.reference.nft import nft_recipe
from afd_fast.students.lora import disabled, trainable
from afd_fast.students.toy.text import tokenize
from afd_fast.teachers.dataset import Shard
from afd_fast.teachers.physics import all_prompts
from afd_fast.training.loop import train_step
from afd_fast.training.methods import afd
from afd_fast.training.rollouts import delivered, sample_policy
from afd_fast.training.state import generator
from afd_fast.training.update import Targets, policy_recipe, student_backward, update_student
from tests.runs import changed, student_velocity, toy_run

CONFIG = changed(
    TrainConfig(), loss=nft_recipe("afd", ref_coef=0.05), update__v_old="self", student__lora_rank=4,
    discriminator__width=8,
)  # fmt: skip
LAGGED = changed(CONFIG, loss=nft_recipe("diffusionnft", beta=0.1, ref_coef=0.05), update__v_old="ema")
PROMPTS = all_prompts()[:4]


def double_run(config):
    run = toy_run(config)
    student, ema = run.family.student, run.state.ema
    student.double()
    for p in trainable(student).values():
        torch.nn.init.normal_(p, std=0.05, generator=generator(0, 0, "test"))
    for name, p in trainable(student).items():
        ema.shadow[name] = p.detach() * 0.9
    return run


def targets(x0, r):
    return Targets(x0, r[:, None], PROMPTS, 0)


def backward(run, x0, r, scale=1.0):
    return student_backward(run, targets(x0, r), policy_recipe(run), generator(0, 0, "update"), scale)


def inputs():
    g = torch.Generator().manual_seed(3)
    return torch.randn(4, 3, 12, 16, 16, generator=g, dtype=torch.float64), torch.rand(
        4, generator=g, dtype=torch.float64
    )


def drawn(config, x0):
    """t [B, F], one level per chunk, and noise as the step draws them."""
    g = generator(0, 0, "update")
    grid = torch.tensor(config.rollout.steps, dtype=torch.float64) / 1000
    t = grid[torch.randint(len(grid), (4, 4), generator=g)].repeat_interleave(3, 1)
    return t, torch.randn(x0.shape, generator=g, dtype=torch.float64)


def wide(a):
    """[B] or [B, F] against [B, C, F, H, W]."""
    return a.view(-1, 1, 1, 1, 1) if a.ndim == 1 else a[:, None, :, None, None]


def test_loss_and_gradient_are_equation_4_and_5():
    run, (x0, r) = double_run(CONFIG), inputs()
    t, noise = drawn(CONFIG, x0)
    found = backward(run, x0, r, scale=0.5)
    parameters = list(trainable(run.family.student).values())
    gradient = [2 * p.grad for p in parameters]

    x_t = (1 - wide(t)) * x0 + wide(t) * noise
    text = run.family.student.encode_text(tokenize(PROMPTS))
    v = student_velocity(run.family.student, x_t, t, text, x0, 3)
    with torch.no_grad(), disabled(run.family.student):
        v_ref = student_velocity(run.family.student, x_t, t, text, x0, 3)
    error, gap = v - (noise - x0), v - v_ref
    expected_loss = error.square().sum() + 0.05 * (wide(r) * gap.square()).sum()
    expected_dv = 2 * CONFIG.loss.beta * (2 * wide(r) - 1) * error + 2 * 0.05 * wide(r) * gap
    expected = torch.autograd.grad(v, parameters, expected_dv.detach())
    ratio = (v.flatten(1).norm(dim=1) / v_ref.flatten(1).norm(dim=1)).mean()
    square = error.square().sum((1, 2, 3, 4))
    assert found == pytest.approx({
        "loss": expected_loss.item(), "policy_loss": square.sum().item(), "signal": ((2 * r - 1) * square).mean().item(),
        "prior_loss": (wide(r) * gap.square()).sum().item(), "velocity_norm_ratio": ratio.item(),
    }, rel=1e-12)  # fmt: skip
    for got, want in zip(gradient, expected):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * want.abs().max().item())


def test_equal_rewards_give_no_policy_gradient():
    config = changed(CONFIG, loss__ref_coef=0.0)
    run, (x0, r) = double_run(config), inputs()
    backward(run, x0, torch.full_like(r, 0.5))
    assert all(p.grad.abs().max() < 1e-9 for p in trainable(run.family.student).values())


def test_lagged_policy_gradient_has_the_trust_region_term():
    """d/dv with a distinct v_old: 2 beta c/d [r e+/W+ - (1 - r) e-/W-] (-t) in x0 space."""
    config = changed(LAGGED, loss__ref_coef=0.0)
    run, (x0, r) = double_run(config), inputs()
    t, noise = drawn(config, x0)
    backward(run, x0, r)
    parameters = list(trainable(run.family.student).values())
    gradient = [p.grad for p in parameters]
    x_t = (1 - wide(t)) * x0 + wide(t) * noise
    student = run.family.student
    text = student.encode_text(tokenize(PROMPTS))
    v = student_velocity(student, x_t, t, text, x0, 3)
    with torch.no_grad(), run.state.ema.applied(student):
        old = student_velocity(student, x_t, t, text, x0, 3)
    beta, each = config.loss.beta, (1, 2, 3, 4)
    e_pos = x_t - wide(t) * (beta * v + (1 - beta) * old) - x0
    e_neg = x_t - wide(t) * ((1 + beta) * old - beta * v) - x0
    w_pos, w_neg = (e.abs().mean(each, keepdim=True) for e in (e_pos, e_neg))
    dv = (
        -wide(t)
        * 2
        * beta
        * (5 / beta)
        / (4 * x0[0].numel())
        * (wide(r) * e_pos / w_pos - (1 - wide(r)) * e_neg / w_neg)
    )
    expected = torch.autograd.grad(v, parameters, dv.detach())
    for got, want in zip(gradient, expected):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8 * want.abs().max().item())


def small(**keys):
    return changed(TrainConfig(), prompts_per_step=2, student__lora_rank=4, **keys)


def test_step_feeds_back_the_tracker_and_trains_both(monkeypatch):
    """One whole iteration: the r the loss sees is tracker -> clip -> [0, 1] of this discriminator's scores."""
    config = small(discriminator__warmup=0, rollouts_per_prompt=3)
    run, seen = toy_run(config), {}
    real = afd.update_student
    monkeypatch.setattr(afd, "update_student", lambda r, parts: (seen.update(x0=parts[0].x0, r=parts[0].r), real(r, parts))[1])  # fmt: skip
    prompts = [p for p in all_prompts()[:2] for _ in range(3)]
    student, discriminator = run.family.student, run.discriminator
    weights = {k: p.clone() for k, p in trainable(student).items()}
    judge = {k: p.clone() for k, p in discriminator.state_dict().items()}
    metrics = train_step(run, [Shard(0, prompts, torch.rand(6, 3, 12, 16, 16))])
    videos = ((seen["x0"] + 1) / 2).clamp(0, 1).mul(255).round().div(255)
    with torch.no_grad():
        scores = discriminator.score(videos, prompts)
    advantage = PerPromptStatTracker(config.global_std).update(prompts, scores)
    torch.testing.assert_close(seen["r"][:, 0].double(), (advantage.clamp(-5, 5) / 10 + 0.5), atol=1e-5, rtol=0)
    assert metrics["r_std"] > 0 and run.state.step == 1
    assert {
        "seconds/rollout",
        "seconds/reference",
        "seconds/backward",
        "seconds/optimiser",
        "health/level",
    } <= metrics.keys()
    assert any(not torch.equal(p, weights[k]) for k, p in trainable(student).items())
    assert all(not torch.equal(p, judge[k]) for k, p in discriminator.state_dict().items() if "convs" in k)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_teachers_clip_joins_the_rollouts_of_its_prompt(monkeypatch, shards):
    """As the VAE encodes it, with r = teacher_r; the rollouts and their r are those of a run without it."""
    config = small(discriminator__warmup=0, rollouts_per_prompt=3, teacher_r=0.75, shards=shards)
    run, plain, seen, alone = toy_run(config), toy_run(changed(config, teacher_r=None)), [], []
    monkeypatch.setattr(afd, "update_student", lambda r, parts: (seen if r is run else alone).extend(parts) or {})
    prompts, clips = [p for p in all_prompts()[:2] for _ in range(3)], torch.rand(6, 3, 12, 16, 16)
    size = 6 // shards
    batch = [Shard(i, prompts[i * size :][:size], clips[i * size :][:size]) for i in range(shards)]
    train_step(run, batch), train_step(plain, batch)
    for joined, usual, shard in zip(seen, alone, batch, strict=True):
        assert torch.equal(joined.x0[:size], usual.x0) and torch.equal(joined.r[:size], usual.r)
        assert torch.equal(joined.x0[size:], run.family.vae.encode(shard.pixels[::3]))
        assert joined.r[size:].flatten().tolist() == [0.75] * (2 // shards)
        assert joined.prompts == shard.prompts + shard.prompts[::3] and joined.index == shard.index


def test_warmup_leaves_the_student_alone():
    run = toy_run(small(discriminator__warmup=1, rollouts_per_prompt=2))
    student = run.family.student
    weights = {k: p.clone() for k, p in trainable(student).items()}
    prompts = [p for p in PROMPTS[:2] for _ in range(2)]
    metrics = train_step(run, [Shard(0, prompts, torch.rand(4, 3, 12, 16, 16))])
    assert "loss" not in metrics and all(torch.equal(p, weights[k]) for k, p in trainable(student).items())


@pytest.mark.parametrize("average", [True, False])
def test_policy_samples_from_the_weights_it_names(average):
    run = toy_run(CONFIG)
    with torch.no_grad():
        for p in (run.state.ema.shadow if average else trainable(run.family.student)).values():
            p.normal_(std=0.3, generator=generator(0, 0, "test"))
    draw = lambda run, avg: sample_policy(run, PROMPTS, generator(0, 0, "x"), average=avg)
    moved, same = draw(run, average), draw(run, not average)
    initial = draw(toy_run(CONFIG), average)
    assert torch.allclose(same, initial, atol=1e-5) and not torch.allclose(moved, initial, atol=1e-2)


@pytest.mark.parametrize("chunked, update_batch", [(True, None), (True, 1), (True, 3), (False, 3)])
@pytest.mark.parametrize("v_old", ["self", "ema"])
def test_chunked_update_is_the_same_step(v_old, chunked, update_batch):
    config = CONFIG if v_old == "self" else LAGGED
    whole, parts, (x0, r) = double_run(config), double_run(changed(config, update__chunked=chunked, update__batch=update_batch)), inputs()  # fmt: skip
    a, b = (update_student(run, [targets(x0, r)]) for run in (whole, parts))
    assert b == pytest.approx(a, rel=1e-9) and {"signal", "velocity_norm_ratio"} <= a.keys()
    pairs = zip(trainable(whole.family.student).values(), trainable(parts.family.student).values(), strict=True)
    for x, y in pairs:
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-9)


def test_reference_every_nth_iteration_has_the_same_weight_on_average():
    config = changed(CONFIG, update__ref_every=3)
    run, (x0, r) = double_run(config), inputs()
    weights = []
    for run.state.step in range(6):
        weights.append(policy_recipe(run).ref_coef)
    assert weights == [3 * config.loss.ref_coef, 0, 0] * 2
    run.state.step = 1
    assert "prior_loss" not in update_student(run, [targets(x0, r)])


def test_without_adapters_every_weight_is_trained_against_a_frozen_copy():
    run = toy_run(changed(CONFIG, student__lora_rank=0, loss__ref_coef=3.0))
    student, reference = run.family.student, run.state.reference
    assert set(trainable(student)) == {n for n, _ in student.named_parameters()}
    student.double(), reference.double()
    with torch.no_grad():
        for p in student.parameters():
            p += 0.01 * torch.randn(p.shape, generator=generator(0, 0, "test"))
    (x0, r), frozen = inputs(), {n: p.clone() for n, p in reference.named_parameters()}
    t, noise = drawn(CONFIG, x0)
    loss = backward(run, x0, r)["loss"]
    x_t = (1 - wide(t)) * x0 + wide(t) * noise
    of = lambda m: student_velocity(m, x_t, t, m.encode_text(tokenize(PROMPTS)), x0, 3)
    with torch.no_grad():
        v, v_ref = of(student), of(reference)
        expected = (v - (noise - x0)).square().sum() + 3.0 * (wide(r) * (v - v_ref).square()).sum()
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    run.state.ema.shadow = {n: p.detach().clone() for n, p in trainable(student).items()}
    update_student(run, [targets(x0, r)])
    assert all(torch.equal(p, frozen[n]) for n, p in reference.named_parameters())


def test_videos_that_are_not_finite_stop_the_run_with_its_iteration(tiny_config):
    pixels = torch.rand(1, 3, 4, 8, 8)
    pixels[0, 0, 1, 2, 3] = float("nan")
    with pytest.raises(TrainingError, match="iteration 0, the student's videos: .* NaN or infinite.*lower update.lr"):
        delivered(toy_run(tiny_config), pixels)

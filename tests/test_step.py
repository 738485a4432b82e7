"""The loss and gradient of the step against method's closed form, in float64."""

from dataclasses import replace

import pytest
import torch

from afd_fast.config import TrainConfig
from afd_fast.reference.advantage import PerPromptStatTracker
from afd_fast.students.lora import disabled, trainable
from afd_fast.students.toy import shipped as base_student
from afd_fast.students.toy.text import tokenize
from afd_fast.teachers.dataset import Shard
from afd_fast.teachers.physics import all_prompts
from afd_fast.training import step as step_module
from afd_fast.training.state import generator, new_state, toy_system
from afd_fast.training.step import loss_recipe, sample_policy, student_backward, student_update, train_step
from afd_fast.training.update import student_velocity

CONFIG = TrainConfig(recipe="afd", v_old="self", prior_weight=0.05, lora_rank=4, disc_width=8)
PROMPTS = all_prompts()[:4]


def double_state(config):
    state = new_state(config, toy_system(base_student.load()))
    state.student.double()
    for p in trainable(state.student).values():
        torch.nn.init.normal_(p, std=0.05, generator=generator(0, 0, "test"))
    for name, p in trainable(state.student).items():
        state.ema.shadow[name] = p.detach() * 0.9
    return state


def inputs():
    g = torch.Generator().manual_seed(3)
    return torch.randn(4, 3, 12, 16, 16, generator=g, dtype=torch.float64), torch.rand(
        4, generator=g, dtype=torch.float64
    )


def drawn(config, x0):
    """t [B, F], one level a chunk, and noise as the step draws them."""
    g = generator(0, 0, "update")
    grid = torch.tensor(config.steps, dtype=torch.float64) / 1000
    t = grid[torch.randint(len(grid), (4, 4), generator=g)].repeat_interleave(3, 1)
    return t, torch.randn(x0.shape, generator=g, dtype=torch.float64)


def wide(a):
    """[B] or [B, F] against [B, C, F, H, W]."""
    return a.view(-1, 1, 1, 1, 1) if a.ndim == 1 else a[:, None, :, None, None]


def test_loss_and_gradient_are_equation_4_and_5():
    state, (x0, r) = double_state(CONFIG), inputs()
    t, noise = drawn(CONFIG, x0)
    found = student_backward(state, CONFIG, x0, r, PROMPTS, generator(0, 0, "update"), scale=0.5)
    parameters = list(trainable(state.student).values())
    gradient = [2 * p.grad for p in parameters]

    x_t = (1 - wide(t)) * x0 + wide(t) * noise
    text = state.student.encode_text(tokenize(PROMPTS))
    v = student_velocity(state.student, x_t, t, text, x0, 3)
    with torch.no_grad(), disabled(state.student):
        v_ref = student_velocity(state.student, x_t, t, text, x0, 3)
    error, gap = v - (noise - x0), v - v_ref
    expected_loss = error.square().sum() + 0.05 * (wide(r) * gap.square()).sum()
    expected_dv = 2 * CONFIG.beta * (2 * wide(r) - 1) * error + 2 * 0.05 * wide(r) * gap
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
    config = replace(CONFIG, prior_weight=0.0)
    state, (x0, r) = double_state(config), inputs()
    student_backward(state, config, x0, torch.full_like(r, 0.5), PROMPTS, generator(0, 0, "update"))
    assert all(p.grad.abs().max() < 1e-9 for p in trainable(state.student).values())


def test_lagged_policy_gradient_has_the_trust_region_term():
    """d/dv with a distinct v_old: 2 beta c/d [r e+/W+ - (1 - r) e-/W-] (-t) in x0 space."""
    config = replace(CONFIG, recipe="diffusionnft", v_old="ema", prior_weight=0.0)
    state, (x0, r) = double_state(config), inputs()
    t, noise = drawn(config, x0)
    student_backward(state, config, x0, r, PROMPTS, generator(0, 0, "update"))
    parameters = list(trainable(state.student).values())
    gradient = [p.grad for p in parameters]
    x_t = (1 - wide(t)) * x0 + wide(t) * noise
    run = lambda: student_velocity(state.student, x_t, t, state.student.encode_text(tokenize(PROMPTS)), x0, 3)
    v = run()
    with torch.no_grad(), state.ema.applied(state.student):
        old = run()
    beta, each = config.beta, (1, 2, 3, 4)
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


def test_step_feeds_back_the_tracker_and_trains_both(monkeypatch):
    """One whole iteration: the r the loss sees is tracker -> clip -> [0, 1] of this discriminator's scores."""
    config = TrainConfig(disc_warmup=0, prompts_per_step=2, rollouts_per_prompt=3, lora_rank=4)
    state = new_state(config, toy_system(base_student.load()))
    seen = {}
    real = step_module.student_update
    monkeypatch.setattr(
        step_module,
        "student_update",
        lambda s, c, parts, *a: (seen.update(x0=parts[0][0], r=parts[0][1]), real(s, c, parts, *a))[1],
    )
    prompts = [p for p in all_prompts()[:2] for _ in range(3)]
    weights = {k: p.clone() for k, p in trainable(state.student).items()}
    judge = {k: p.clone() for k, p in state.discriminator.state_dict().items()}
    metrics = train_step(state, config, [Shard(0, prompts, torch.rand(6, 3, 12, 16, 16))])
    videos = ((seen["x0"] + 1) / 2).clamp(0, 1).mul(255).round().div(255)
    with torch.no_grad():
        scores = state.discriminator.score(videos, prompts)
    advantage = PerPromptStatTracker(config.global_std).update(prompts, scores)
    torch.testing.assert_close(seen["r"].double(), (advantage.clamp(-5, 5) / 10 + 0.5), atol=1e-5, rtol=0)
    assert metrics["r_std"] > 0 and state.step == 1
    assert any(not torch.equal(p, weights[k]) for k, p in trainable(state.student).items())
    assert all(not torch.equal(p, judge[k]) for k, p in state.discriminator.state_dict().items() if "convs" in k)


def test_warmup_leaves_the_student_alone():
    config = TrainConfig(disc_warmup=1, prompts_per_step=2, rollouts_per_prompt=2, lora_rank=4)
    state = new_state(config, toy_system(base_student.load()))
    weights = {k: p.clone() for k, p in trainable(state.student).items()}
    metrics = train_step(
        state, config, [Shard(0, [p for p in PROMPTS[:2] for _ in range(2)], torch.rand(4, 3, 12, 16, 16))]
    )
    assert "loss" not in metrics and all(torch.equal(p, weights[k]) for k, p in trainable(state.student).items())


@pytest.mark.parametrize("average", [True, False])
def test_policy_samples_from_the_weights_it_names(average):
    state = new_state(CONFIG, toy_system(base_student.load()))
    with torch.no_grad():
        for p in (state.ema.shadow if average else trainable(state.student)).values():
            p.normal_(std=0.3, generator=generator(0, 0, "test"))
    draw = lambda avg: sample_policy(state, CONFIG, PROMPTS, generator(0, 0, "x"), average=avg)
    changed, unchanged = draw(average), draw(not average)
    fresh = new_state(CONFIG, toy_system(base_student.load()))
    initial = sample_policy(fresh, CONFIG, PROMPTS, generator(0, 0, "x"), average=average)
    assert torch.allclose(unchanged, initial, atol=1e-5) and not torch.allclose(changed, initial, atol=1e-2)


@pytest.mark.parametrize("chunked, update_batch", [(True, None), (True, 1), (True, 3), (False, 3)])
@pytest.mark.parametrize("v_old", ["self", "ema"])
def test_chunked_update_is_the_same_step(v_old, chunked, update_batch):
    config = replace(CONFIG, recipe="afd" if v_old == "self" else "diffusionnft", v_old=v_old)
    whole, parts, (x0, r) = double_state(config), double_state(config), inputs()
    part = lambda: [(x0, r, PROMPTS, generator(0, 0, "update"))]
    a = student_update(whole, config, part())
    b = student_update(parts, replace(config, chunked_update=chunked, update_batch=update_batch), part())
    assert b == pytest.approx(a, rel=1e-9) and {"signal", "velocity_norm_ratio"} <= a.keys()
    for x, y in zip(trainable(whole.student).values(), trainable(parts.student).values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-9)


def test_reference_every_nth_iteration_has_the_same_weight_on_average():
    config = replace(CONFIG, ref_every=3)
    weights = [loss_recipe(config, step).ref_coef for step in range(6)]
    assert weights == [3 * config.prior_weight, 0, 0] * 2
    state, (x0, r) = double_state(config), inputs()
    state.step = 1
    assert "prior_loss" not in student_update(state, config, [(x0, r, PROMPTS, generator(0, 0, "update"))])


def test_without_adapters_every_weight_is_trained_against_a_frozen_copy():
    config = replace(CONFIG, lora_rank=0, prior_weight=3.0)
    state = new_state(config, toy_system(base_student.load()))
    assert set(trainable(state.student)) == {n for n, _ in state.student.named_parameters()}
    state.student.double(), state.reference.double()
    with torch.no_grad():
        for p in state.student.parameters():
            p += 0.01 * torch.randn(p.shape, generator=generator(0, 0, "test"))
    (x0, r), frozen = inputs(), {n: p.clone() for n, p in state.reference.named_parameters()}
    t, noise = drawn(config, x0)
    loss = student_backward(state, config, x0, r, PROMPTS, generator(0, 0, "update"))["loss"]
    x_t = (1 - wide(t)) * x0 + wide(t) * noise
    run = lambda m: student_velocity(m, x_t, t, m.encode_text(tokenize(PROMPTS)), x0, 3)
    with torch.no_grad():
        v, v_ref = run(state.student), run(state.reference)
        expected = (v - (noise - x0)).square().sum() + 3.0 * (wide(r) * (v - v_ref).square()).sum()
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    state.ema.shadow = {n: p.detach().clone() for n, p in trainable(state.student).items()}
    student_update(state, config, [(x0, r, PROMPTS, generator(0, 0, "update"))])
    assert all(torch.equal(p, frozen[n]) for n, p in state.reference.named_parameters())

"""Each baseline's gradient against a closed form or finite differences, in float64."""

from dataclasses import replace

import pytest
import torch

from afd_fast.config import TrainConfig
from afd_fast.errors import ConfigError
from afd_fast.reference.adversarial import bt_loss
from afd_fast.rollout import RolloutConfig, rollout
from afd_fast.students.lora import trainable
from afd_fast.students.toy import shipped as base_student
from afd_fast.students.toy.model import ToyConfig, ToyStudent, decode_video, encode_video
from afd_fast.students.toy.text import tokenize
from afd_fast.teachers.dataset import Shard
from afd_fast.teachers.physics import PhysicsTeacher, all_prompts
from afd_fast.training.methods import baselines
from afd_fast.training.state import generator, new_state, toy_system
from afd_fast.training.update import student_velocity
from afd_fast.video_io import deliver

CONFIG = TrainConfig(
    method="sft", v_old="self", lora_rank=4, disc_width=8, disc_warmup=0, rollouts_per_prompt=2, prompts_per_step=2, r1=0.0
)  # fmt: skip
PROMPTS = [p for p in all_prompts()[:2] for _ in range(2)]


def double_state(config, student=None):
    state = new_state(config, toy_system(student or base_student.load()))
    state.student.double()
    for p in trainable(state.student).values():
        torch.nn.init.normal_(p, std=0.05, generator=generator(0, 0, "test"))
    for name, p in trainable(state.student).items():
        state.ema.shadow[name] = p.detach().clone()
    return state


def shard(frames=12):
    videos = torch.stack([PhysicsTeacher(frames)(p, i) for i, p in enumerate(PROMPTS)])
    return Shard(0, PROMPTS, videos)


@pytest.fixture
def gradient_of(monkeypatch):
    """What a step hands to the optimiser, by parameter; no weight is changed."""
    found = {}

    def keep(state, config, ranks):
        found.update({n: p.grad.clone() for n, p in trainable(state.student).items()})
        return 0.0

    monkeypatch.setattr(baselines, "optimise", keep)
    monkeypatch.setattr("afd_fast.training.step.optimise", keep)

    def of(state, config, shards):
        baselines.STEPS[config.method](state, config, shards)
        return found

    return of


def regression(state, config, x0, prompts):
    """The gradient of mean |v - (eps - x0)|^2 over the same draws, written out."""
    g = generator(0, 0, "update")
    grid = torch.tensor(config.steps, dtype=torch.float64) / 1000
    t = grid[torch.randint(len(grid), (len(x0), 4), generator=g)].repeat_interleave(3, 1)
    noise = torch.randn(x0.shape, generator=g, dtype=torch.float64)
    wide = t[:, None, :, None, None]
    x_t = (1 - wide) * x0 + wide * noise
    v = student_velocity(state.student, x_t, t, state.student.encode_text(tokenize(prompts)), x0, 3)
    loss = (v - (noise - x0)).square().mean()
    return dict(
        zip(trainable(state.student), torch.autograd.grad(loss, list(trainable(state.student).values())), strict=True)
    )


def assert_close(got, want, tolerance=1e-10):
    scale = max(w.abs().max() for w in want.values())
    assert scale > 1e-8
    for name, w in want.items():
        assert (got[name] - w).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("chunked", [False, True])
def test_sft_is_flow_matching_on_teacher_videos_and_prefixes(gradient_of, chunked):
    config, part = replace(CONFIG, chunked_update=chunked), shard()
    state = double_state(config)
    x0 = (part.teacher.double() * 2 - 1).float().double()
    want = regression(state, config, x0, PROMPTS)
    state.optimizer.zero_grad()
    assert_close(gradient_of(state, config, [part]), want)


def test_rejection_regresses_on_the_best_rollout_of_each_prompt(gradient_of, monkeypatch):
    config, part = replace(CONFIG, method="rejection"), shard()
    state = double_state(config)
    videos = torch.randn(4, 3, 12, 16, 16, generator=generator(0, 0, "x"), dtype=torch.float64)
    scores = torch.tensor([0.1, 0.3, 5.0, 2.0])  # the second of the first prompt, the first of the second
    monkeypatch.setattr(baselines, "on_policy", lambda *a: ([videos], [scores], {}))
    want = regression(state, config, videos[[1, 2]], PROMPTS[1:3])
    assert_close(gradient_of(state, config, [part]), want)


@pytest.mark.parametrize("method, disc_loss", [("gan", "bt"), ("gan", "gan"), ("dmd", "bt")])
def test_generator_gradient_is_that_of_the_rollout_by_finite_differences(gradient_of, method, disc_loss):
    """One chunk, one step: nothing is detached, and <gradient, direction> is the slope of the loss along it."""
    torch.manual_seed(0)
    config = replace(CONFIG, method=method, steps=(750,), disc_lr=0.0, disc_loss=disc_loss)
    student = ToyStudent(ToyConfig(frames=3, dim=32, heads=2, layers=2, hidden=32)).double()
    for p in student.parameters():
        torch.nn.init.normal_(p, std=0.1)
    state, part = double_state(config, student), shard(3)
    got = gradient_of(state, config, [part])

    noise = torch.randn(4, 3, 3, 16, 16, generator=generator(0, 0, "rollout")).double()
    text = tokenize(PROMPTS)

    @torch.no_grad()
    def pixels():
        return decode_video(rollout(student, student.encode_text(text), noise, RolloutConfig((750,), 1.0, 3)))

    leaf, real = deliver(pixels()).requires_grad_(), part.teacher
    a, b = real, leaf
    if method == "dmd":
        g = generator(0, 0, "diffuse")
        t = torch.rand((4, 1, 1, 1, 1), generator=g)
        a, b = (((1 - t) * (2 * x - 1) + t * torch.randn(x.shape, generator=g) + 1) / 2 for x in (a, b))
    of_teacher, of_student = state.discriminator.score(a, PROMPTS).detach(), state.discriminator.score(b, PROMPTS)
    loss = torch.log1p((-of_student).exp()).mean() if disc_loss == "gan" else bt_loss(of_student, of_teacher)
    (slope,) = torch.autograd.grad(loss, leaf)

    parameters = trainable(student)
    direction = {n: torch.randn(p.shape, dtype=torch.float64) for n, p in parameters.items()}

    def moved(step):
        with torch.no_grad():
            for n, p in parameters.items():
                p += step * direction[n]
        return (pixels() * slope).sum()

    h = 1e-5
    want = (moved(h) - moved(-2 * h)) / (2 * h)
    assert want.abs() > 1e-7
    torch.testing.assert_close(sum((got[n] * direction[n]).sum() for n in got), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("exit_step", [1, 3])
def test_generator_gradient_goes_through_the_last_call_of_every_chunk_only(exit_step):
    """The rollout's last call is x0 = x_t - t v(x_t, t | own clean history); everything before is data."""
    config = replace(CONFIG, method="gan")
    state = double_state(config)
    student, inputs = state.student, []
    hook = student.register_forward_pre_hook(lambda m, a, k: inputs.append((a[0], a[1], torch.is_grad_enabled())), with_kwargs=True)  # fmt: skip
    x0 = baselines.differentiable_rollout(state, config, PROMPTS, generator(0, 0, "r"), exit_step)
    hook.remove()
    weights = torch.randn(x0.shape, dtype=torch.float64)
    parameters = trainable(student)
    got = torch.autograd.grad((x0 * weights).sum(), list(parameters.values()))

    last = [(x, t / 1000) for x, t, grad in inputs if grad]
    assert len(last) == 4 and all((t == config.steps[exit_step - 1] / 1000).all() for _, t in last)
    x_t, t = torch.cat([x for x, _ in last], 2), torch.cat([t for _, t in last], 1).double()
    v = student_velocity(student, x_t, t, student.encode_text(tokenize(PROMPTS)), x0.detach(), 3)
    again = x_t - t[:, None, :, None, None] * v
    torch.testing.assert_close(again, x0, rtol=0, atol=1e-10)
    want = torch.autograd.grad((again * weights).sum(), list(parameters.values()))
    assert_close(dict(zip(parameters, got)), dict(zip(parameters, want)))


def test_dmd_discriminator_sees_both_sides_at_the_same_noise_level():
    real, fake = torch.rand(6, 3, 2, 4, 4), torch.rand(6, 3, 2, 4, 4)
    a, b = baselines.diffused(real, real, generator(0, 0, "d"))
    t = torch.rand((6, 1, 1, 1, 1), generator=generator(0, 0, "d"))
    for x in (a, b):  # what is left after the signal is noise of deviation t
        left = (2 * x - 1) - (1 - t) * (2 * real - 1)
        assert ((left / t).flatten(1).std(1) - 1).abs().max() < 0.35
    assert not torch.equal(a, b)
    assert torch.equal(encode_video(decode_video(encode_video(fake))), encode_video(fake))


def test_unknown_method_is_refused():
    with pytest.raises(ConfigError, match='"afd" or "sft"'):
        TrainConfig(method="ppo")

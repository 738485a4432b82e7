"""Each baseline's gradient against a closed form or finite differences, in float64."""

import pytest
import torch

from afd_fast.config import TrainConfig
from afd_fast.errors import ConfigError
from afd_fast.reference.adversarial import bt_loss
from afd_fast.rollout import RolloutConfig, rollout
from afd_fast.students.lora import trainable
from afd_fast.students.toy.model import ToyConfig, ToyStudent, decode_video, encode_video
from afd_fast.students.toy.text import tokenize
from afd_fast.teachers.dataset import Shard
from afd_fast.teachers.physics import PhysicsTeacher, all_prompts
from afd_fast.training.loop import train_step
from afd_fast.training.methods import gan, rejection
from afd_fast.training.rollouts import Rollouts
from afd_fast.training.state import generator
from afd_fast.training.update import Pair
from afd_fast.training.velocity import Chunking, velocity
from afd_fast.video_io import deliver
from tests.runs import changed, toy_run

CONFIG = changed(
    TrainConfig(), method="sft", update__v_old="self", student__lora_rank=4, discriminator__width=8,
    discriminator__warmup=0, discriminator__r1=0.0, rollouts_per_prompt=2, prompts_per_step=2,
)  # fmt: skip
PROMPTS = [p for p in all_prompts()[:2] for _ in range(2)]


def double_run(config, student=None):
    run = toy_run(config, student)
    run.family.student.double()
    for p in trainable(run.family.student).values():
        torch.nn.init.normal_(p, std=0.05, generator=generator(0, 0, "test"))
    for name, p in trainable(run.family.student).items():
        run.state.ema.shadow[name] = p.detach().clone()
    return run


def shard(frames=12):
    videos = torch.stack([PhysicsTeacher(frames)(p, i) for i, p in enumerate(PROMPTS)])
    return Shard(0, PROMPTS, videos)


@pytest.fixture
def gradient_of(monkeypatch):
    """What a step hands to the optimiser, by parameter; no weight is changed."""
    found = {}

    def keep(run):
        found.update({n: p.grad.clone() for n, p in trainable(run.family.student).items()})
        return 0.0

    monkeypatch.setattr(gan, "optimise", keep)
    monkeypatch.setattr("afd_fast.training.update.optimise", keep)

    def of(run, shards):
        train_step(run, shards)
        return found

    return of


def regression(run, x0, prompts):
    """The gradient of mean |v - (eps - x0)|^2 over the same draws, written out."""
    g = generator(0, 0, "update")
    grid = torch.tensor(run.sampler.steps, dtype=torch.float64) / 1000
    t = grid[torch.randint(len(grid), (len(x0), 4), generator=g)].repeat_interleave(3, 1)
    noise = torch.randn(x0.shape, generator=g, dtype=torch.float64)
    wide = t[:, None, :, None, None]
    x_t = (1 - wide) * x0 + wide * noise
    student = run.family.student
    v = velocity(student, x_t, t, student.encode_text(tokenize(prompts)), x0, Chunking(3))
    loss = (v - (noise - x0)).square().mean()
    parameters = trainable(student)
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def assert_close(got, want, tolerance=1e-10):
    scale = max(w.abs().max() for w in want.values())
    assert scale > 1e-8
    for name, w in want.items():
        assert (got[name] - w).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("chunked", [False, True])
def test_sft_is_flow_matching_on_teacher_videos_and_prefixes(gradient_of, chunked):
    run, part = double_run(changed(CONFIG, update__chunked=chunked)), shard()
    x0 = (part.teacher("cpu").double() * 2 - 1).float().double()
    want = regression(run, x0, PROMPTS)
    run.state.optimizer.zero_grad()
    assert_close(gradient_of(run, [part]), want)


def test_rejection_regresses_on_the_best_rollout_of_each_prompt(gradient_of, monkeypatch):
    run, part = double_run(changed(CONFIG, method="rejection")), shard()
    videos = torch.randn(4, 3, 12, 16, 16, generator=generator(0, 0, "x"), dtype=torch.float64)
    scores = torch.tensor([0.1, 0.3, 5.0, 2.0])  # the second of the first prompt, the first of the second
    found = Rollouts(0, PROMPTS, videos, part.teacher("cpu"))
    monkeypatch.setattr(rejection, "sample", lambda *a: found)
    monkeypatch.setattr(rejection, "score", lambda run, x: setattr(x, "scores", scores))
    want = regression(run, videos[[1, 2]], PROMPTS[1:3])
    assert_close(gradient_of(run, [part]), want)


@pytest.mark.parametrize("method, disc_loss", [("gan", "bt"), ("gan", "gan"), ("dmd", "bt")])
def test_generator_gradient_is_that_of_the_rollout_by_finite_differences(gradient_of, method, disc_loss):
    """One chunk, one step: nothing is detached, and <gradient, direction> is the slope of the loss along it."""
    torch.manual_seed(0)
    config = changed(CONFIG, method=method, rollout__steps=(750,), discriminator__lr=0.0, discriminator__loss=disc_loss)
    student = ToyStudent(ToyConfig(frames=3, dim=32, heads=2, layers=2, hidden=32)).double()
    for p in student.parameters():
        torch.nn.init.normal_(p, std=0.1)
    run, part = double_run(config, student), shard(3)
    got = gradient_of(run, [part])

    noise = torch.randn(4, 3, 3, 16, 16, generator=generator(0, 0, "rollout")).double()
    text = tokenize(PROMPTS)

    @torch.no_grad()
    def pixels():
        return decode_video(rollout(student, student.encode_text(text), noise, RolloutConfig((750,), 1.0, 3)))

    leaf, real = deliver(pixels()).requires_grad_(), part.teacher("cpu")
    a, b = real, leaf
    if method == "dmd":
        g = generator(0, 0, "diffuse")
        t = torch.rand((4, 1, 1, 1, 1), generator=g)
        a, b = (((1 - t) * (2 * x - 1) + t * torch.randn(x.shape, generator=g) + 1) / 2 for x in (a, b))
    of_teacher, of_student = run.discriminator.score(a, PROMPTS).detach(), run.discriminator.score(b, PROMPTS)
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
    run = double_run(changed(CONFIG, method="gan"))
    student, inputs = run.family.student, []
    hook = student.register_forward_pre_hook(lambda m, a, k: inputs.append((a[0], a[1], torch.is_grad_enabled())), with_kwargs=True)  # fmt: skip
    x0 = gan.differentiable_rollout(run, shard(), exit_step)
    hook.remove()
    weights = torch.randn(x0.shape, dtype=torch.float64)
    parameters = trainable(student)
    got = torch.autograd.grad((x0 * weights).sum(), list(parameters.values()))

    last = [(x, t / 1000) for x, t, grad in inputs if grad]
    assert len(last) == 4 and all((t == run.sampler.steps[exit_step - 1] / 1000).all() for _, t in last)
    x_t, t = torch.cat([x for x, _ in last], 2), torch.cat([t for _, t in last], 1).double()
    v = velocity(student, x_t, t, student.encode_text(tokenize(PROMPTS)), x0.detach(), Chunking(3))
    again = x_t - t[:, None, :, None, None] * v
    torch.testing.assert_close(again, x0, rtol=0, atol=1e-10)
    want = torch.autograd.grad((again * weights).sum(), list(parameters.values()))
    assert_close(dict(zip(parameters, got)), dict(zip(parameters, want)))


def test_dmd_discriminator_sees_both_sides_at_the_same_noise_level():
    real, fake = torch.rand(6, 3, 2, 4, 4), torch.rand(6, 3, 2, 4, 4)
    a, b = gan.diffused(Pair(real, real), generator(0, 0, "d"))
    t = torch.rand((6, 1, 1, 1, 1), generator=generator(0, 0, "d"))
    for x in (a, b):  # what is left after the signal is noise of deviation t
        left = (2 * x - 1) - (1 - t) * (2 * real - 1)
        assert ((left / t).flatten(1).std(1) - 1).abs().max() < 0.35
    assert not torch.equal(a, b)
    assert torch.equal(encode_video(decode_video(encode_video(fake))), encode_video(fake))


def test_unknown_method_is_refused():
    with pytest.raises(ConfigError, match='"afd" or "sft"'):
        changed(CONFIG, method="ppo")

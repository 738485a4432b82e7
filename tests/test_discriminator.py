"""Discriminators learn what they should and nothing else; losses, regularisers and statistics by their definitions."""

import math

import pytest
import torch

from afd_fast.discriminators import Discriminator, DiscriminatorConfig, Objective
from afd_fast.discriminators.config import new_discriminator
from afd_fast.discriminators.discriminator import check_discriminator, shake
from afd_fast.discriminators.toy import ToyDiscriminator
from afd_fast.discriminators.videoalign.model import RewardSettings
from afd_fast.errors import ConfigError
from afd_fast.reference import adversarial as reference
from afd_fast.students.toy.model import ToyConfig
from afd_fast.video_io import VideoFormat, deliver
from tests import tiny_videoalign as tiny

SMALL = RewardSettings(min_pixels=28 * 28, max_pixels=56 * 56)
COLOURS = {"red": (0.8, 0.2, 0.2), "blue": (0.2, 0.2, 0.8)}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def coloured(names, g, size=28, frames=4):
    base = torch.tensor([COLOURS[n] for n in names]).view(-1, 3, 1, 1, 1)
    return (base + 0.05 * torch.randn(len(names), 3, frames, size, size, generator=g)).clamp(0, 1)


def pairs(kind, n, g, **shape):
    """(teacher, student, prompts): students with stripes, of the same distribution, or of the other colour."""
    names = [list(COLOURS)[i] for i in torch.randint(2, (n,), generator=g).tolist()]
    teacher, student = coloured(names, g, **shape), coloured(names, g, **shape)
    if kind == "separable":
        student = (student + 0.15 * torch.sin(torch.arange(student.shape[-1]) * 2.0)).clamp(0, 1)
    elif kind == "prompt":
        student = coloured(["blue" if name == "red" else "red" for name in names], g, **shape)
    return teacher, student, names


def train(model, kind, steps, batch, lr, g, **shape):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr)
    for _ in range(steps):
        loss = model.paired_loss(*pairs(kind, batch, g, **shape)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model, kind, g, n=256, shuffle=False, **shape):
    """On clips it has not seen."""
    teacher, student, prompts = pairs(kind, n, g, **shape)
    if shuffle:
        prompts = [prompts[i] for i in torch.randperm(n, generator=g)]
    return reference.pair_accuracy(*model.pair_scores(teacher, student, prompts)).item()


@pytest.mark.parametrize(
    "kind, steps, lr, low, high",
    [("separable", 20, 4e-3, 0.95, 1), ("identical", 30, 4e-3, 0.4, 0.6), ("prompt", 70, 2e-3, 0.95, 1)],
)
def test_reward_model_learns(kind, steps, lr, low, high):
    model = tiny.reward_model(0, lora=16, settings=SMALL, checkpointing=False)
    g = rng(1)
    train(model, kind, steps, 12, lr, g)  # at 4e-3 the prompt is learnt and forgotten, on some CPUs at the end
    assert low <= accuracy(model, kind, g) <= high
    if kind == "prompt":
        assert accuracy(model, kind, g, shuffle=True) < 0.65


@pytest.mark.parametrize("kind, low, high", [("separable", 0.95, 1), ("identical", 0.4, 0.6), ("prompt", 0.95, 1)])
def test_small_variants_learn(kind, low, high):
    torch.manual_seed(0)
    model, g = ToyDiscriminator(ToyConfig(frames=4, height=16, width=16), width=16, dim=32), rng(2)
    train(model, kind, 60, 16, 2e-3, g, size=16)
    assert low <= accuracy(model, kind, g, size=16) <= high
    if kind == "prompt":
        assert accuracy(model, kind, g, shuffle=True, size=16) < 0.65


def test_toy_takes_a_full_students_clips():
    model = ToyDiscriminator()
    video = torch.rand(2, 3, 81, 48, 80, generator=rng())
    assert model.score(video, ["a", "b"]).shape == (2,)
    flat = torch.full((1, 3, 24, 32, 48), 0.3)
    assert torch.allclose(model.reduce(flat), torch.full((1, 3, 12, 16, 16), 0.3))
    with pytest.raises(ValueError, match="smaller"):
        model.score(video[:, :, :5], ["a", "b"])
    with pytest.raises(ValueError, match="2 videos and 1 prompts"):
        model.score(video, ["a"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_bt_loss_is_exact_at_any_margin(dtype):
    """Margins to +-1e4 (and, formed in the wide dtype, far beyond): loss and gradient by exact arithmetic."""
    halves = [(m / 2, -m / 2) for m in (0.0, 1.0, -1.0, 16.625, -20.0, 88.75, -88.75, 1e4, -1e4, 8e4, -8e4)]
    for first, second in [*halves, (1.0, 1e4), (0.5, 300.0), (300.0, 301.5)]:  # whose difference bf16 would round
        teacher = torch.tensor([first], dtype=dtype).requires_grad_()
        student = torch.tensor([second], dtype=dtype).requires_grad_()
        exact = teacher.double().item() - student.double().item()
        loss = reference.bt_loss(teacher, student)
        loss.backward()
        wanted = math.log1p(math.exp(-exact)) if exact > -700 else -exact
        assert loss.item() == pytest.approx(wanted, rel=3e-7 if dtype != torch.float64 else 1e-15, abs=1e-37)
        slope = -1 / (1 + math.exp(min(exact, 700)))
        eps = torch.finfo(dtype).eps
        assert teacher.grad.item() == pytest.approx(slope, rel=2 * eps, abs=1e-37 if eps < 1e-4 else 1e-7)
        assert student.grad.item() == -teacher.grad.item()


def test_smoothing_is_the_mixture_and_caps_the_margin():
    teacher, student = torch.randn(9, generator=rng()).double(), torch.randn(9, generator=rng(1)).double()
    s, plain = 0.05, reference.bt_loss
    wanted = (1 - s) * plain(teacher, student) + s * plain(student, teacher)
    assert torch.allclose(plain(teacher, student, smoothing=s), wanted, rtol=1e-14)
    m = torch.tensor([math.log((1 - s) / s)], dtype=torch.float64, requires_grad=True)
    plain(m, torch.zeros(1).double(), smoothing=s).backward()
    assert abs(m.grad.item()) < 1e-15 and math.isclose(m.item(), 2.944, abs_tol=1e-3)


def test_centring():
    a, b = torch.tensor([3.0, -1.0], dtype=torch.bfloat16), torch.tensor([-3.0, 2.0], dtype=torch.bfloat16)
    assert reference.centring_penalty(a, b).item() == 0.5


def test_penalty_is_the_gradients_norm():
    """The finite difference estimates sigma-averaged |dD/dx|^2: exact in the mean for a linear D."""
    w = torch.randn(5000, generator=rng()).double()
    x, n = torch.zeros(5000).double(), torch.randn(400, 5000, generator=rng(1)).double()
    estimate = reference.approximate_gradient_penalty((x @ w).expand(400), (x + 0.1 * n) @ w, 0.1)
    assert abs(estimate / w.square().sum() - 1) < 0.2


def test_health():
    teacher, student = torch.tensor([1.0, 0.0, 9.0]), torch.tensor([0.0, 0.0, 0.0])
    stats = reference.pair_health(teacher, student)
    assert stats["accuracy"].item() == pytest.approx(2.5 / 3) and stats["saturated"].item() == pytest.approx(1 / 3)
    r = torch.sigmoid(student - teacher)
    assert torch.allclose(stats["pair_r"], r.mean()) and torch.allclose(stats["pair_r_std"], r.std(unbiased=False))
    assert reference.pair_health(student, student)["loss_ratio"].item() == pytest.approx(1)
    assert reference.pair_health(student, student)["accuracy"].item() == 0.5


def test_objective():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0])
    assert torch.equal(Objective()(a, b), reference.bt_loss(a, b))
    assert torch.equal(Objective("gan")(a, b), reference.gan_loss(a, b))
    wanted = reference.bt_loss(a, b, smoothing=0.1) + 0.5 * reference.centring_penalty(a, b)
    assert torch.equal(Objective(smoothing=0.1, centring=0.5)(a, b), wanted)
    for bad in (
        dict(loss="wgan"),
        dict(smoothing=0.5),
        dict(loss="gan", smoothing=0.1),
        dict(r1=-1.0),
        dict(r1_sigma=0.0),
    ):
        with pytest.raises(ValueError, match="loss|smoothing|r1"):
            Objective(**bad)


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_penalty_works_on_cached_features(noise):
    model = tiny.reward_model(settings=SMALL)
    objective = Objective(r1=0.5, r1_sigma=0.1, instance_noise=noise)
    teacher, student, prompts = pairs("separable", 2, rng())
    features = model.encode(teacher)
    loss = model.paired_loss(features, model.encode(student), prompts, objective, rng=rng(5)).loss
    again = model.paired_loss(features, student, prompts, objective, rng=rng(5)).loss
    g = rng(5)
    sides = [features, model.encode(student)]
    if noise:
        sides = [shake(side, noise, g) for side in sides]
    scores = model.pair_scores(*sides, prompts)
    both = sides[0] + sides[1]
    shaken = model.score(shake(both, 0.1, g), prompts * 2).chunk(2)
    wanted = reference.bt_loss(*scores) + 0.5 * sum(
        reference.approximate_gradient_penalty(a, b, 0.1) for a, b in zip(scores, shaken)
    )
    assert torch.equal(loss, again) and torch.allclose(loss, wanted, rtol=1e-4)
    assert loss > reference.bt_loss(*scores)


def high_frequencies(video):
    spectrum = torch.fft.rfft2(video - video.mean((-2, -1), keepdim=True)).abs().square()
    ring = (torch.fft.fftfreq(video.shape[-2])[:, None] ** 2 + torch.fft.rfftfreq(video.shape[-1]) ** 2).sqrt()
    return spectrum[..., ring > 0.25].sum().item()


def test_the_same_codec_on_both_sides_leaves_no_tell():
    """A teacher that comes as mp4 against a student that does not is told by its missing high frequencies alone."""
    g = rng()
    clean = torch.rand(2, 3, 4, 64, 64, generator=g)
    teacher, student = deliver(clean, 28), clean.flip(0)
    told = high_frequencies(student) / high_frequencies(teacher)
    fair = high_frequencies(deliver(student, 28)) / high_frequencies(teacher)
    assert told > 1.02 and abs(fair - 1) < 0.01


def test_reference_scores_are_those_before_training():
    """What tells that a reward model is being gamed: VideoAlign's own scores, whatever the adapters have become."""
    model = tiny.reward_model(settings=SMALL)
    teacher, student, prompts = pairs("separable", 4, rng())
    before = model.reference_scores(student, prompts)
    assert set(before) == {"VQ", "MQ", "TA", "Overall"}
    first = model.score(student, prompts)
    train(model, "separable", 4, 4, 1e-2, rng(1))
    assert (model.score(student, prompts) - first).abs().max() > 1e-3
    after = model.reference_scores(student, prompts)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert ToyDiscriminator().reference_scores(student, prompts) == {}


def test_a_discriminator_is_named_with_what_it_lacks():
    class Silent(Discriminator):
        pass

    with pytest.raises(ConfigError, match="Silent lacks score"):
        check_discriminator(Silent())
    with pytest.raises(ConfigError, match="Linear is no discriminator"):
        check_discriminator(torch.nn.Linear(1, 1))


def test_device_that_is_not_there_is_one_line():
    config = DiscriminatorConfig(device="cuda:7")
    with pytest.raises(ConfigError, match="discriminator.device=cuda:7"):
        new_discriminator(config, VideoFormat(12, 16, 16, 10), torch.device("cpu"))

"""Discriminators learn what they should and nothing else; losses, regularisers and statistics by their definitions."""

import math

import pytest
import torch

from afd_fast.discriminators.augment import codec_like, paired_augment
from afd_fast.discriminators.discriminator import Features, FrozenFeatureHead, Objective
from afd_fast.discriminators.health import Health, Replay
from afd_fast.discriminators.toy import ToyDiscriminator
from afd_fast.discriminators.videoalign.model import RewardSettings
from afd_fast.reference import adversarial as reference
from afd_fast.students.toy.model import ToyConfig
from afd_fast.video_io import codec_round_trip, deliver
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
        loss = model.loss(*pairs(kind, batch, g, **shape))
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
    "kind, steps, low, high", [("separable", 20, 0.95, 1), ("identical", 30, 0.4, 0.6), ("prompt", 55, 0.95, 1)]
)
def test_reward_model_learns(kind, steps, low, high):
    model = tiny.reward_model(0, lora=16, settings=SMALL, checkpointing=False)
    g = rng(1)
    train(model, kind, steps, 12, 4e-3, g)
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


def test_frozen_feature_head_learns_and_leaves_the_trunk_alone():
    trunk = tiny.reward_model(0, settings=SMALL)
    model, g = FrozenFeatureHead(trunk, 64), rng(3)
    before = {k: v.clone() for k, v in trunk.state_dict().items()}
    train(model, "separable", 25, 12, 3e-3, g)
    assert accuracy(model, "separable", g, 128) > 0.95
    assert all(torch.equal(v, before[k]) for k, v in trunk.state_dict().items())
    assert {name.split(".")[0] for name in model.state_dict()} == {"head"}
    features = model.encode(pairs("separable", 2, g)[0])
    assert torch.allclose(model.score(features, ["red", "blue"])[1:], model.score(features[1:], ["blue"]), atol=1e-5)


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


def test_teacher_baseline_cancels_what_bt_leaves_free():
    """c(y) moves no Bradley-Terry loss; a mean over the batch turns it into advantage, the teacher's score does not."""
    prompts = ["a", "a", "b", "b", "c", "c"]
    g = rng()
    teacher, student = torch.randn(6, generator=g).double(), torch.randn(6, generator=g).double()
    offset = torch.tensor([9.0, 9.0, -4.0, -4.0, 0.0, 0.0]).double()
    assert torch.allclose(reference.bt_loss(teacher + offset, student + offset), reference.bt_loss(teacher, student))
    honest = reference.teacher_baseline(student + offset, teacher + offset, prompts)
    assert torch.allclose(honest, reference.teacher_baseline(student, teacher, prompts))
    assert torch.allclose(honest[:2], student[:2] - teacher[:2].mean())
    leaky = (student + offset) - (student + offset).mean()
    assert (leaky - (student - student.mean())).abs().max() > 3
    with pytest.raises(ValueError, match="6 prompts"):
        reference.teacher_baseline(student[:5], teacher, prompts)


def test_centring():
    a, b = torch.tensor([3.0, -1.0], dtype=torch.bfloat16), torch.tensor([-3.0, 2.0], dtype=torch.bfloat16)
    assert reference.centring_penalty(a, b).item() == 0.5


def test_penalty_is_the_gradients_norm():
    """The finite difference estimates sigma-averaged |dD/dx|^2: exact in the mean for a linear D."""
    w = torch.randn(5000, generator=rng()).double()
    x, n = torch.zeros(5000).double(), torch.randn(400, 5000, generator=rng(1)).double()
    estimate = reference.approximate_gradient_penalty((x @ w).expand(400), (x + 0.1 * n) @ w, 0.1)
    assert abs(estimate / w.square().sum() - 1) < 0.2


def test_health_and_drift():
    teacher, student = torch.tensor([1.0, 0.0, 9.0]), torch.tensor([0.0, 0.0, 0.0])
    stats = reference.pair_health(teacher, student)
    assert stats["accuracy"].item() == pytest.approx(2.5 / 3) and stats["saturated"].item() == pytest.approx(1 / 3)
    r = torch.sigmoid(student - teacher)
    assert torch.allclose(stats["r"], r.mean()) and torch.allclose(stats["r_std"], r.std(unbiased=False))
    assert reference.pair_health(student, student)["loss_ratio"].item() == pytest.approx(1)
    assert reference.pair_health(student, student)["accuracy"].item() == 0.5
    moved = reference.probe_drift(teacher + 2, teacher)
    assert moved["shift"].item() == 2 and moved["change"].item() == 0 and moved["turned"].item() == 0
    assert reference.probe_drift(-teacher, teacher)["turned"].item() == 1


def test_objective():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0])
    assert torch.equal(Objective()(a, b), reference.bt_loss(a, b))
    assert torch.equal(Objective("gan")(a, b), reference.gan_loss(a, b))
    wanted = reference.bt_loss(a, b, smoothing=0.1) + 0.5 * reference.centring_penalty(a, b)
    assert torch.equal(Objective(smoothing=0.1, centring=0.5)(a, b), wanted)
    for bad in (dict(kind="wgan"), dict(smoothing=0.5), dict(kind="gan", smoothing=0.1)):
        with pytest.raises(ValueError, match="kind|smoothing"):
            Objective(**bad)


def test_penalty_works_on_cached_features():
    model = tiny.reward_model(settings=SMALL, objective=Objective(penalty=1.0, penalty_sigma=0.1))
    teacher, student, prompts = pairs("separable", 2, rng())
    features = model.encode(teacher)
    loss = model.loss(features, model.encode(student), prompts, rng=rng(5))
    again = model.loss(features, model.encode(student), prompts, rng=rng(5))
    scores = model.pair_scores(features, student, prompts)
    g = rng(5)
    shaken = model.pair_scores(features.shaken(0.1, g), model.encode(student).shaken(0.1, g), prompts)
    wanted = reference.bt_loss(*scores) + sum(
        reference.approximate_gradient_penalty(a, b, 0.1) for a, b in zip(scores, shaken)
    )
    assert torch.equal(loss, again) and torch.allclose(loss, wanted, rtol=1e-4)
    assert loss > reference.bt_loss(*scores)


@pytest.mark.parametrize("options", [dict(crop=0.3), dict(flip=0.5), dict(phase=3), dict(crop=0.3, flip=0.5, phase=2)])
def test_augmentation_is_paired(options):
    teacher = torch.rand(6, 3, 8, 16, 24, generator=rng())
    a, b = paired_augment(teacher, teacher.clone(), rng(3), **options)
    assert torch.equal(a, b)
    assert a.shape != teacher.shape or (a - teacher).abs().max() > 0.1
    c, d = paired_augment(teacher, teacher[:, :, :, ::2, ::2], rng(3), **options)
    assert c.shape[2] == d.shape[2] and d.shape[3:] == (8, 12) and torch.equal(a, c)


def test_augmentation_details():
    video = torch.rand(4, 3, 4, 16, 16, generator=rng())
    flipped, _ = paired_augment(video, video, rng(), flip=1.0)
    assert torch.allclose(flipped, video.flip(-1), atol=1e-5)
    same, _ = paired_augment(video, video, rng())
    assert torch.equal(same, video)
    with pytest.raises(ValueError, match="phase"):
        paired_augment(video, video, rng(), phase=4)
    with pytest.raises(ValueError, match="not pairs"):
        paired_augment(video, video[:3], rng())


def high_frequencies(video):
    spectrum = torch.fft.rfft2(video - video.mean((-2, -1), keepdim=True)).abs().square()
    ring = (torch.fft.fftfreq(video.shape[-2])[:, None] ** 2 + torch.fft.rfftfreq(video.shape[-1]) ** 2).sqrt()
    return spectrum[..., ring > 0.25].sum().item()


def test_codec_like_takes_high_frequencies_from_both_sides():
    """As the codec does; more with a larger step; nothing but chroma at step 0; the gradient passes."""
    g = rng()
    wave = 0.5 + 0.3 * torch.sin(torch.arange(80) / 9)[:, None] * torch.cos(torch.arange(80) / 7)
    grey = wave + 0.03 * torch.randn(1, 1, 4, 80, 80, generator=g)  # fine texture on something smooth
    video = grey.clamp(0, 1).expand(1, 3, 4, 80, 80)
    left = [high_frequencies(codec_like(video, step=s)) / high_frequencies(video) for s in (0.0, 4.0, 8.0, 16.0)]
    assert left == sorted(left, reverse=True) and left[2] < 0.9
    assert high_frequencies(codec_round_trip(video[0], 23)) < 0.9 * high_frequencies(video)
    assert torch.allclose(codec_like(video, step=0), video, atol=1e-5)
    once = codec_like(video)
    assert (codec_like(once) - once).abs().mean() < 0.1 * (once - video).abs().mean()  # rounded already
    red = torch.rand(1, 3, 4, 80, 80, generator=g)
    assert (codec_like(red, step=0) - red).abs().mean() > 0.05
    odd = video[..., :70, :50].clone().requires_grad_()
    codec_like(odd).sum().backward()
    assert odd.grad.isfinite().all() and odd.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="even"):
        codec_like(video[..., :71, :])


def test_the_same_codec_on_both_sides_leaves_no_tell():
    """A teacher that comes as mp4 against a student that does not is told by its missing high frequencies alone."""
    g = rng()
    clean = torch.rand(2, 3, 4, 64, 64, generator=g)
    teacher, student = deliver(clean, 28), clean.flip(0)
    told = high_frequencies(student) / high_frequencies(teacher)
    fair = high_frequencies(deliver(student, 28)) / high_frequencies(teacher)
    assert told > 1.02 and abs(fair - 1) < 0.01


@pytest.mark.parametrize("features", [False, True])
def test_replay(features):
    """Only earlier clips of the same prompt and shape, about the share asked for, deterministic."""
    wrap = (lambda x: Features(tuple(x))) if features else (lambda x: x)
    prompts = ["a", "b"] * 50
    batch = lambda value: torch.tensor([value, -value] * 50).view(-1, 1, 1).expand(-1, 2, 2).contiguous()
    replay = Replay(keep=3)
    first = replay.mix(wrap(batch(1.0)), prompts, 0.25, rng())
    flat = lambda x: torch.stack(x.clips if features else list(x))[:, 0, 0]
    assert torch.equal(flat(first), batch(1.0)[:, 0, 0])  # nothing to exchange yet
    second = flat(replay.mix(wrap(batch(2.0)), prompts, 0.25, rng()))
    old = second.abs() == 1
    assert torch.equal(second.sign(), batch(1.0)[:, 0, 0].sign()) and 10 < old.sum() < 40
    third = flat(replay.mix(wrap(batch(3.0)), prompts, 0.0, rng()))
    assert torch.equal(third, batch(3.0)[:, 0, 0]) and {len(v) for v in replay.kept.values()} == {3}
    assert all(c.abs().max() == 3 for c in replay.kept["a"])
    with pytest.raises(ValueError, match="share"):
        replay.mix(wrap(batch(1.0)), prompts, 1.5, rng())


def test_health_of_a_reward_model():
    model = tiny.reward_model(settings=SMALL)
    teacher, student, prompts = pairs("separable", 4, rng())
    health = Health(model, held_out=(teacher, student, prompts), probe=(teacher, prompts))
    scores = [s.detach() for s in model.pair_scores(teacher, student, prompts)]
    before = health(*scores, student, prompts)
    assert before["held_out_accuracy"] == before["accuracy"] and before["probe_change"] == 0
    train(model, "separable", 4, 4, 1e-2, rng(1))
    after = health(*(s.detach() for s in model.pair_scores(teacher, student, prompts)), student, prompts)
    assert after["probe_change"] + abs(after["probe_shift"]) > 1e-3
    for name in ("VQ", "MQ", "TA", "Overall"):
        assert after[f"frozen_{name}"] == before[f"frozen_{name}"]
    assert not math.isclose(after["level"], before["level"], abs_tol=1e-3)

"""What the field uses beyond the ten recipes, each against its formula written out as its users write it. float64."""

import pytest
import torch
from torch.nn.functional import softplus

import afd_fast
from afd_fast import nft_loss, nft_recipe, nft_terms
from afd_fast.reference import nft as reference

B, SHAPE = 3, (4, 5, 6)
BETA, AXES = 0.7, (1, 2, 3)


class Case:
    """A batch as a trainer has it, and the lines that its losses share (x0 space, one level per sample)."""

    def __init__(self, dtype=torch.float64, seed=13):
        g = torch.Generator().manual_seed(seed)
        n = lambda scale=1.0: scale * torch.randn(B, *SHAPE, dtype=torch.float64, generator=g)
        u = lambda *shape: torch.rand(shape, dtype=torch.float64, generator=g)
        x0, noise = n(), n()
        old = noise - x0 + n(0.3)
        self.v, self.ref = ((old + n(0.05)).to(dtype) for _ in range(2))
        self.x0, self.noise, self.old = x0.to(dtype), noise.to(dtype), old.to(dtype)
        self.v.requires_grad_()
        self.r, self.t = u(B), 0.1 + 0.8 * u(B)
        self.each, self.frames, self.element = u(B, *SHAPE), u(B, SHAPE[1]), 0.1 + u(B, 1, *SHAPE[1:])
        self.sample, self.prior = u(B), u(B)
        wide = self.t.view(-1, 1, 1, 1)
        self.x_t = ((1 - wide) * self.x0 + wide * self.noise).to(dtype)
        self.given = {"x_t": self.x_t, "v_old": self.old, "v_ref": self.ref}

    def errors(self, v=None):
        """(e+, e-) in x0 space."""
        v, t = self.v if v is None else v, self.t.view(-1, 1, 1, 1)
        pos, neg = BETA * v + (1 - BETA) * self.old, (1 + BETA) * self.old - BETA * v
        return self.x_t - t * pos - self.x0, self.x_t - t * neg - self.x0

    def weights(self, detach=True):
        return [(e.detach() if detach else e).abs().mean(AXES).clamp(min=1e-5) for e in self.errors()]

    def energies(self, v=None):
        """mean e+-^2 / W+-."""
        return [e.square().mean(AXES) / w for e, w in zip(self.errors(v), self.weights())]

    def gap(self):
        return (self.v - self.ref).square()


RECIPE = {"beta": BETA, "ref_coef": 0.3, "divide_by_beta": False, "scale": "none"}


def dense(c, r):
    e_pos, e_neg = c.errors()
    w_pos, w_neg = (w.view(-1, 1, 1, 1) for w in c.weights())
    return (r * e_pos**2 / w_pos + (1 - r) * e_neg**2 / w_neg).mean() + 0.3 * c.gap().mean()


def per_sample(c):
    pos, neg = c.energies()
    return c.r * pos + (1 - c.r) * neg


def weighted_elements(c):
    m = c.element.expand(B, *SHAPE)
    mean = lambda x: (m * x).sum(AXES) / m.sum(AXES)
    e_pos, e_neg = c.errors()
    pos, neg = (mean(e**2) / mean(e.detach().abs()) for e in (e_pos, e_neg))
    return (c.r * pos + (1 - c.r) * neg).mean() + 0.3 * mean(c.gap()).mean()


def undetached(c):
    pos, neg = (e.square().mean(AXES) / w for e, w in zip(c.errors(), c.weights(detach=False)))
    return (c.r * pos + (1 - c.r) * neg).mean() + 0.3 * c.gap().mean()


def shared(c):
    (e_pos, e_neg), (w, _) = c.errors(), c.weights()
    return ((c.r * e_pos.square().mean(AXES) + (1 - c.r) * e_neg.square().mean(AXES)) / w).mean() + 0.3 * c.gap().mean()


def step_nft(c, limit=0.4, sharpness=1.3):
    """pi-StepNFT, RLinf: softplus of the energies' difference, v - v_old held to a norm (the gradient sees the norm)."""
    drift = c.v - c.old
    scale = (limit / drift.flatten(1).norm(dim=1)).clamp(max=1).view(-1, 1, 1, 1)
    e_pos, e_neg = c.errors(c.old + scale * drift)
    difference = e_pos.square().mean(AXES) - e_neg.square().mean(AXES)
    return softplus(sharpness / 2 * (2 * c.r - 1) * difference).mean() + 0.3 * c.gap().mean()


def pessimistic(c, ratio=0.032):
    """RLinf: the larger of the loss and the loss of v - v_old cut to a ratio of ||v_old||, without a gradient."""
    norm = lambda x: x.flatten(1).norm(dim=1)
    scale = (ratio * norm(c.old) / norm(c.v - c.old)).clamp(max=1)
    cut = torch.where((scale < 1).view(-1, 1, 1, 1), (c.old + scale.view(-1, 1, 1, 1) * (c.v - c.old)).detach(), c.v)
    pos, neg = c.energies(cut)
    least, most = per_sample(c), c.r * pos + (1 - c.r) * neg
    assert (scale < 1).sum() == 2 and (
        most > least
    ).sum() == 1  # within the limit, beyond it, and where it is the larger
    return torch.maximum(least, most).mean() + 0.3 * c.gap().mean()


def token_prior(c):
    m = c.element.expand(B, *SHAPE) > 0.5
    mean = lambda x: (m * x).sum(AXES) / m.sum(AXES)
    pos, neg = (mean(e**2) / mean(e.detach().abs()) for e in c.errors())
    return (c.r * pos + (1 - c.r) * neg).mean() + 0.3 * c.gap()[m].mean()


OPTIONS = {  # name: (inputs, fields of the recipe, the formula)
    "r per voxel": (lambda c: {"r": c.each}, {}, lambda c: dense(c, c.each)),
    "r per frame": (lambda c: {"r": c.frames, "frame_dim": 2}, {}, lambda c: dense(c, c.frames[:, None, :, None])),
    "r per frame, broadcast": (lambda c: {"r": c.each[:, :1, :, :1]}, {}, lambda c: dense(c, c.each[:, :1, :, :1])),
    "r [B, 1, 1, 1]": (lambda c: {"r": c.r.view(-1, 1, 1, 1)}, {}, lambda c: dense(c, c.r.view(-1, 1, 1, 1))),
    "r weighs the prior": (lambda c: {"r": c.each}, {"ref_weight": "r"},
                           lambda c: dense(c, c.each) + 0.3 * ((c.each - 1) * c.gap()).mean()),
    "time weights": (lambda c: {"policy_weight": c.t**2, "prior_weight": (1 / c.t**2).clamp(max=100)}, {},
                     lambda c: (c.t**2 * per_sample(c)).mean() + 0.3 * ((1 / c.t**2).clamp(max=100) * c.gap().mean(AXES)).mean()),
    "sample weights": (lambda c: {"sample_mask": c.sample}, {},
                       lambda c: (c.sample * (per_sample(c) + 0.3 * c.gap().mean(AXES))).sum() / c.sample.sum()),
    "element weights": (lambda c: {"element_mask": c.element}, {}, weighted_elements),
    "undetached W": (lambda c: {}, {"weight_grad": True}, undetached),
    "shared W": (lambda c: {}, {"shared_weight": True}, shared),
    "dpo, norm clip": (lambda c: {}, {"form": "dpo", "dpo_beta": 1.3, "drift_clip": 0.4, "weighting": "none"}, step_nft),
    "max, ratio clip": (lambda c: {}, {"drift_clip": 0.032, "drift_limit": "ratio", "drift_clip_by": "max"}, pessimistic),
    "prior over the kept elements of the batch": (
        lambda c: {"element_mask": c.element > 0.5}, {"ref_reduction": "batch"}, token_prior),
}  # fmt: skip


def compute(c, inputs, fields):
    call = {"r": c.r} | c.given | inputs(c)
    loss = nft_loss(c.v, c.x0, call.pop("r"), c.t, **call, recipe=nft_recipe("diffusionnft", **RECIPE | fields))
    return loss.detach(), torch.autograd.grad(loss, c.v)[0]


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_is_its_formula(name):
    inputs, fields, formula = OPTIONS[name]
    c = Case()
    loss, grad = compute(c, inputs, fields)
    expected = formula(c)
    (slope,) = torch.autograd.grad(expected, c.v)
    assert abs(loss - expected.detach()) <= 1e-12 * abs(expected.detach())
    assert (grad - slope).norm() <= 1e-12 * slope.norm()
    if name != "r [B, 1, 1, 1]":  # it changes something
        _, plain = compute(c, lambda c: {}, {})
        assert (grad - plain).norm() > 1e-3 * plain.norm()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_an_option_in_low_precision(name, dtype):
    inputs, fields, _ = OPTIONS[name]
    low, wide = Case(dtype), Case(dtype)
    for field in ("v", "x0", "old", "ref", "x_t"):
        setattr(wide, field, getattr(wide, field).detach().double())
    wide.v.requires_grad_()
    wide.given = {"x_t": wide.x_t, "v_old": wide.old, "v_ref": wide.ref}
    loss, grad = compute(low, inputs, fields)
    exact_loss, exact = compute(wide, inputs, fields)
    assert grad.dtype == dtype and loss.dtype == torch.float32
    assert abs(loss - exact_loss) <= 1e-5 * abs(exact_loss)
    assert (grad.double() - exact).norm() <= {torch.bfloat16: 2e-3, torch.float16: 4e-4, torch.float32: 1e-5}[
        dtype
    ] * exact.norm()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("recipe", ["afd", "diffusionnft", "astrolabe"])
def test_closed_form_equals_autograd(name, recipe):
    inputs, fields, _ = OPTIONS[name]
    fields = dict(fields)
    if fields.get("weight_grad") or fields.get("shared_weight"):
        fields["weighting"] = "adaptive"
    c = Case()
    call = {"r": c.r, "t": c.t, "v": c.v, "x0": c.x0, "recipe": nft_recipe(recipe, **fields)} | c.given | inputs(c)
    (expected,) = torch.autograd.grad(reference.nft_loss(**call), c.v)
    assert (reference.nft_grad(**call) - expected).norm() <= 1e-12 * expected.norm()


def test_packed_tokens_take_an_r_per_token():
    c = Case()
    rows = lambda x: x.reshape(B * SHAPE[0], -1)
    cu = torch.arange(B + 1, dtype=torch.int32) * SHAPE[0]
    per_token = c.each[:, :, 0, 0]
    recipe = nft_recipe("diffusionnft", **RECIPE)
    packed = nft_loss(rows(c.v), rows(c.x0), per_token.reshape(-1, 1), c.t, cu_seqlens=cu, recipe=recipe,
                      **{k: rows(x) for k, x in c.given.items()})  # fmt: skip
    whole = dense(c, per_token[:, :, None, None])
    torch.testing.assert_close(packed, whole, rtol=1e-12, atol=0)


def test_terms_add_up_and_have_gradients_apart():
    c = Case()
    recipe = nft_recipe("diffusionnft", **RECIPE)
    terms = nft_terms(c.v, c.x0, c.r, c.t, **c.given, recipe=recipe, return_stats=True)
    loss, stats = nft_loss(c.v, c.x0, c.r, c.t, **c.given, recipe=recipe, return_stats=True)
    grad = lambda x: torch.autograd.grad(x, c.v, retain_graph=True)[0]
    torch.testing.assert_close(terms.policy + 0.3 * terms.prior, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad(terms.policy) + 0.3 * grad(terms.prior), grad(loss), rtol=1e-12, atol=1e-18)
    torch.testing.assert_close(grad(terms.prior), 2 * (c.v - c.ref).detach() / c.v.numel(), rtol=1e-12, atol=0)
    assert terms.stats.policy_loss == stats.policy_loss and afd_fast.NFTTerms is type(terms)


def test_statistics_of_an_r_per_element():
    c = Case()
    _, s = nft_loss(c.v, c.x0, c.each, c.t, **c.given, recipe=nft_recipe("diffusionnft", **RECIPE), return_stats=True)
    pos, neg = c.energies()
    e_pos, e_neg = c.errors()
    w_pos, w_neg = (w.view(-1, 1, 1, 1) for w in c.weights())
    torch.testing.assert_close(s.pos_loss, pos.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(s.neg_loss, neg.detach(), rtol=1e-12, atol=0)
    signal = ((2 * c.each - 1) * (e_pos**2 / w_pos + e_neg**2 / w_neg) / 2).mean()
    torch.testing.assert_close(s.signal, signal.detach(), rtol=1e-12, atol=0)
    keep = c.element.expand(B, *SHAPE) > 0.5
    _, s = nft_loss(c.v, c.x0, c.each, c.t, **c.given, element_mask=keep, recipe="diffusionnft", return_stats=True)
    expected = torch.stack([r[m].mean() for r, m in zip(c.each, keep)]).mean()
    torch.testing.assert_close(s.r_mean, expected, rtol=1e-12, atol=0)


def test_integer_masks_only_select():
    c = Case()
    recipe = nft_recipe("diffusionnft", **RECIPE)
    call = lambda **masks: nft_loss(c.v, c.x0, c.r, c.t, **c.given, **masks, recipe=recipe)
    keep = torch.tensor([2, 0, 7])
    assert call(sample_mask=keep) == call(sample_mask=keep != 0)
    each = (c.element > 0.5).int() * 3
    assert call(element_mask=each) == call(element_mask=each != 0)


def test_a_float_mask_of_zeros_and_ones_is_a_mask():
    c = Case()
    c.x0.data[1] = float("nan")
    keep = torch.tensor([True, False, True])
    element = keep.view(-1, 1, 1, 1).expand(B, *SHAPE)
    for recipe in ("afd", "diffusionnft"):
        call = lambda m: nft_loss(c.v, c.x0, c.r, c.t, **c.given, element_mask=m, recipe=recipe)  # noqa: B023
        assert call(element).isfinite()
        torch.testing.assert_close(call(element.double()), call(element), rtol=1e-12, atol=0)


@pytest.mark.parametrize("change,message", [
    ({"r": torch.rand(B, 1)}, r"a \[B, 1\] r would broadcast"),
    ({"r": torch.rand(B, 5), "frame_dim": 1}, r"r must be \[B\]"),
    ({"r": torch.rand(B, 4, 5, 6) + 0.5}, r"r must lie in \[0, 1\]"),
    ({"policy_weight": torch.ones(B, 1)}, r"policy_weight must be \[B\]"),
    ({"policy_weight": -torch.ones(B)}, "policy_weight must be finite and at least 0"),
    ({"prior_weight": torch.full((B,), float("nan"))}, "prior_weight must be finite and at least 0"),
    ({"prior_weight": 2.0}, r"prior_weight must be a tensor \[B\], got float"),
    ({"sample_mask": -torch.ones(B)}, "sample_mask must be finite and at least 0"),
    ({"element_mask": torch.full((B, 1, 1, 1), float("inf"))}, "element_mask must be finite and at least 0"),
    ({"v_old": None, "recipe": nft_recipe("diffusionnft", drift_clip=0.1)}, "drift_clip limits v - v_old"),
    ({"r": torch.rand(B, *SHAPE), "recipe": nft_recipe("diffusionnft", form="dpo")}, 'form="dpo" compares'),
    ({"out": torch.empty(B, *SHAPE, dtype=torch.float64), "recipe": nft_recipe("diffusionnft", weight_grad=True)}, "out= is for"),
])  # fmt: skip
def test_bad_options(change, message):
    c = Case()
    with pytest.raises((ValueError, TypeError), match=message):
        nft_loss(**{"v": c.v, "x0": c.x0, "r": c.r, "t": c.t, "recipe": "diffusionnft"} | c.given | change)


@pytest.mark.parametrize("fields,message", [
    ({"weighting": "none", "weight_grad": True}, "about W"), ({"weighting": "none", "shared_weight": True}, "about W"),
    ({"dpo_beta": 0.0}, "must be positive"), ({"drift_clip": -1.0}, "must be positive"), ({"form": "bce"}, "form must be"),
    ({"drift_limit": "max"}, "drift_limit must be"), ({"drift_clip_by": "norm"}, "drift_clip_by must be"),
    ({"ref_reduction": "token"}, "ref_reduction must be"), ({"drift_clip": float("nan")}, "drift_clip must be"),
])  # fmt: skip
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        nft_recipe("diffusionnft", **fields)

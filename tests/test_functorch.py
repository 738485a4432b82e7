"""torch.func over nft_loss, forward_noise, bt_loss and the block's operators: values in float64, and what is refused."""

import pytest
import torch
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp, vmap

import afd_fast
from afd_fast.ops import transformer
from afd_fast.reference import nft as reference

B, SHAPE = 3, (3, 4, 5)
SOURCES = {"noise": {}, "seed": {"noise": None, "seed": 7}, "x_t": {"noise": None, "x_t": True}}
OPTIONS = {
    "plain": {},
    "no v_old, no v_ref": {"v_old": None, "v_ref": None},
    "masks": {
        "sample_mask": torch.tensor([True, False, True]), "ref_mask": torch.tensor([True, True, False]),
        "element_mask": torch.rand(3, 1, 5, generator=torch.Generator().manual_seed(1)) > 0.3,
    },
    "frames": {"t": torch.rand(3, 4, generator=torch.Generator().manual_seed(2)).double() * 0.8 + 0.1, "frame_dim": 1},
    "packed": {"r": torch.tensor([0.2, 0.9]).double(), "t": 0.4, "cu_seqlens": torch.tensor([0, 1, 3])},
}  # fmt: skip


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def make(**change):
    inputs = {name: rand(*SHAPE, seed=seed) for seed, name in enumerate(("v", "x0", "noise", "v_old", "v_ref"))}
    inputs |= {"r": torch.tensor([0.1, 0.5, 0.8]).double(), "t": torch.tensor([0.2, 0.5, 0.9]).double()} | change
    return inputs | ({"x_t": rand(*SHAPE, seed=9)} if change.get("x_t") is True else {})


def split(inputs):
    """(v, the loss as a function of it)."""
    rest = {name: x for name, x in inputs.items() if name != "v"}
    return inputs["v"], lambda v, **change: afd_fast.nft_loss(v, **{**rest, **change})


def autograd(f, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


@pytest.mark.parametrize("recipe", ["afd", "astrolabe", "diffusionnft"])
@pytest.mark.parametrize("source", SOURCES)
def test_grad_of_every_source(recipe, source):
    v, f = split(make(**SOURCES[source], recipe=recipe))
    expected = autograd(f, v)
    assert torch.equal(grad(f)(v), expected) and expected.norm() > 0
    assert torch.equal(jacrev(f)(v), expected)
    (pulled,) = vjp(f, v)[1](torch.tensor(3.0).double())
    torch.testing.assert_close(pulled, 3 * expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("recipe", ["afd", "diffusionnft"])
@pytest.mark.parametrize("options", OPTIONS)
def test_grad_with_options(recipe, options):
    v, f = split(make(**OPTIONS[options], recipe=recipe))
    expected = autograd(f, v)
    assert torch.equal(grad(f)(v), expected)
    moved = v.transpose(1, 2).contiguous().transpose(1, 2)  # walked in memory order
    torch.testing.assert_close(grad(f)(moved), expected, rtol=1e-12, atol=1e-12)


def test_grad_of_a_networks_parameters_with_stats():
    inputs = make(recipe="diffusionnft", return_stats=True)
    v, f = split(inputs)
    net = torch.nn.Linear(5, 5, dtype=torch.float64)
    loss = lambda parameters: f(functional_call(net, parameters, v))
    gradients, (value, stats) = grad_and_value(loss, has_aux=True)(dict(net.named_parameters()))
    expected, expected_stats = f(net(v))
    assert torch.equal(value, expected.detach()) and torch.equal(stats.pos_loss, expected_stats.pos_loss)
    for name, p in net.named_parameters():
        assert torch.equal(gradients[name], torch.autograd.grad(expected, p, retain_graph=True)[0])


@pytest.mark.parametrize("recipe", ["afd", "diffusionnft"])
def test_vmap_is_a_loop(recipe):
    v, f = split(make(recipe=recipe))
    population = torch.stack([v, 2 * v, v - 1], 1)
    each = population.unbind(1)
    assert torch.equal(vmap(f, in_dims=1)(population), torch.stack([f(x) for x in each]))
    assert torch.equal(vmap(grad(f), in_dims=1)(population), torch.stack([autograd(f, x) for x in each]))
    _, stats = vmap(lambda v: f(v, return_stats=True), in_dims=1)(population)
    expected = [f(x, return_stats=True)[1] for x in each]
    for name in stats._fields:
        assert torch.equal(getattr(stats, name), torch.stack([getattr(s, name) for s in expected])), name
    rewards = torch.rand(4, B, dtype=torch.float64)
    assert torch.equal(vmap(lambda r: f(v, r=r))(rewards), torch.stack([f(v, r=r) for r in rewards]))
    levels = 0.1 + 0.8 * torch.rand(4, B, dtype=torch.float64)
    assert torch.equal(vmap(lambda t: f(v, t=t))(levels), torch.stack([f(v, t=t) for t in levels]))
    # gradients through an ordinary graph, and a mapped axis in the low precision of the kernels
    leaf = population.clone().requires_grad_()
    (through,) = torch.autograd.grad(vmap(f, in_dims=1)(leaf).sum(), leaf)
    assert torch.equal(through, torch.stack([autograd(f, x) for x in each], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_runs_the_kernels(dtype):
    inputs = {k: x.to(dtype) if x.ndim == 3 else x.float() for k, x in make().items()}
    v, f = split(inputs)
    assert torch.equal(grad(f)(v), autograd(f, v)) and grad(f)(v).dtype == dtype


@pytest.mark.parametrize("recipe", ["afd", "diffusionnft"])
def test_second_derivatives_and_forward_mode_are_refused(recipe):
    """Zeros would be a wrong answer; the reference has the right one."""
    v, f = split(make(recipe=recipe))
    square = lambda v: grad(f)(v).square().sum()
    for second in (grad(square), jacrev(grad(f)), lambda v: autograd(square, v)):
        with pytest.raises(RuntimeError, match=r"no second derivative.*reference\.nft\.nft_loss"):
            second(v)
    leaf = v.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(leaf) ** 2, leaf, create_graph=True)
    torch.testing.assert_close(first, 2 * f(v) * autograd(f, v), rtol=1e-14, atol=0)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()
    for forward in (lambda: jvp(f, (v,), (v,)), lambda: hessian(f)(v)):
        with pytest.raises(NotImplementedError, match="forward mode AD"):
            forward()


def test_the_reference_has_second_derivatives():
    inputs = make(v_old=None, recipe=afd_fast.nft_recipe("afd", ref_coef=0.25))
    v = inputs.pop("v")
    found = hessian(lambda v: reference.nft_loss(v, **inputs))(v).reshape(v.numel(), v.numel())
    # v_old is stop-grad(v): L = r (beta dv + a)^2 + (1 - r) (beta dv - a)^2 at dv = 0, and the prior
    r = inputs["r"].repeat_interleave(v.numel() // B)
    torch.testing.assert_close(found, torch.diag(2 * 0.1**2 + 2 * 0.25 * r))
    population = torch.stack([v, 2 * v])
    each = torch.stack([reference.nft_loss(x, **inputs) for x in population])
    torch.testing.assert_close(vmap(lambda v: reference.nft_loss(v, **inputs))(population), each)


def test_refusals():
    v, f = split(make())
    with pytest.raises(ValueError, match="out= is for eager calls"):
        grad(lambda v: f(v, out=torch.empty(SHAPE, dtype=torch.float64)))(v)
    with pytest.raises(ValueError, match="check before the vmap"):
        vmap(lambda v: f(v, check_nan=True))(v[None])
    with pytest.raises(ValueError, match="size 0"):
        vmap(f)(torch.empty(0, *SHAPE, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"r must lie in \[0, 1\]"):  # still checked where values can be read
        grad(lambda v: f(v, r=torch.tensor([0.1, 0.5, 1.5])))(v)


def test_compiled_transforms_are_right_or_refused():
    v, f = split(make())
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="cannot trace a transform|exception is raised"):
        torch.compile(grad(f), backend="aot_eager", fullgraph=True)(v)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(grad(f), backend="aot_eager")(v), autograd(f, v))  # a graph break
    torch._dynamo.reset()


def noised(x0, t, **source):
    return afd_fast.forward_noise(x0, t, **source)


@pytest.mark.parametrize("source", [{"noise": rand(3, 4, 5, seed=5)}, {"seed": 3}], ids=lambda s: next(iter(s)))
def test_forward_noise(source):
    x0, t = rand(3, 4, 5), torch.tensor([0.2, 0.5, 0.9]).double()
    f = lambda x0, t: (noised(x0, t, **source) ** 2).sum()
    for argument in (0, 1):
        g = (lambda x: f(x, t)) if argument == 0 else (lambda x: f(x0, x))
        x = (x0, t)[argument]
        expected = autograd(g, x)
        assert torch.equal(grad(g)(x), expected) and torch.equal(jacrev(g)(x), expected)
        torch.testing.assert_close(jacfwd(g)(x), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(hessian(g)(x), torch.autograd.functional.hessian(g, x))
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(grad(g), backend="aot_eager", fullgraph=True)(x), expected)
    value, tangent = jvp(lambda x0: noised(x0, t, **source), (x0,), (torch.ones_like(x0),))
    assert torch.equal(value, noised(x0, t, **source))
    torch.testing.assert_close(tangent, (1 - t).view(-1, 1, 1).expand(x0.shape))
    batch, levels = torch.stack([x0, 2 * x0]), torch.stack([t, 1 - t])
    each = torch.stack([noised(*pair, **source) for pair in zip(batch, levels)])
    torch.testing.assert_close(vmap(lambda x0, t: noised(x0, t, **source))(batch, levels), each, rtol=1e-14, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bt_loss(smoothing):
    teacher, student = rand(6), rand(6, seed=1)
    f = lambda teacher: afd_fast.bt_loss(teacher, student, smoothing=smoothing)
    expected = autograd(f, teacher)
    assert torch.equal(grad(f)(teacher), expected) and torch.equal(jacrev(f)(teacher), expected)
    torch.testing.assert_close(jacfwd(f)(teacher), expected)
    torch.testing.assert_close(hessian(f)(teacher), torch.autograd.functional.hessian(f, teacher))
    batch = torch.stack([teacher, -teacher, 3 * teacher])
    torch.testing.assert_close(vmap(f)(batch), torch.stack([f(x) for x in batch]))
    torch.testing.assert_close(vmap(grad(f))(batch), torch.stack([autograd(f, x) for x in batch]))


def test_the_blocks_operators_follow_forward_mode():
    x, weight, row = rand(2, 6, 8), rand(8), rand(2, 3, 8)
    for f in (
        lambda x: transformer.rms_norm(x, weight),
        lambda x: transformer.norm_modulate(x, row, row),
        lambda x: transformer.residual_norm(x, x, row, scale=row, shift=row)[1],
    ):
        tangent = rand(2, 6, 8, seed=4)
        expected = (jacrev(f)(x) * tangent).sum((-3, -2, -1))
        torch.testing.assert_close(jvp(f, (x,), (tangent,))[1], expected)
        assert expected.norm() > 0

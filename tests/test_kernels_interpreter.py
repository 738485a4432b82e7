"""The Triton kernels, executed on the CPU: values, noise bits, bounds, races, traffic.

Needs its own process: TRITON_INTERPRET=1 pytest tests/test_kernels_interpreter.py
"""

import os

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

import triton
import triton.language as tl
from afd_kernels import nft as kernels
from afd_kernels import noise as noise_kernels
from afd_kernels.layout import COEFFICIENTS, Frames, Row

import afd_fast
from afd_fast.ops import nft_operators as ops
from afd_fast.reference import flow
from tests.interpreter import fused_multiply_add, install, sanitize

install()
TENSORS = ["v_ptr", "x0_ptr", "old_ptr", "ref_ptr"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(shape=(2, 5000), dtype=torch.float32, recipe="diffusionnft", source="noise", frames=1, seed=0, **change):
    """Inputs of the operators; the number of tiles differs from the number of samples."""
    g = torch.Generator().manual_seed(seed)
    n = lambda: torch.randn(*shape, generator=g).to(dtype)
    count = shape[1] if len(shape) > 1 else 1
    recipe = afd_fast.nft_recipe(recipe) if isinstance(recipe, str) else recipe
    values = dict(
        v=n(), x0=n(), r=torch.rand(shape[0], generator=g), t=0.1 + 0.8 * torch.rand(shape[0], frames, generator=g),
        noise=n() if source == "noise" else None, seed=0x123456789ABCDEF if source == "seed" else None,
        x_t=n() if source == "x_t" else None, v_old=n(), v_ref=n(), sigma=None, sample_mask=None, ref_mask=None,
        element_mask=None, each=None, policy_weight=None, prior_weight=None, cu_seqlens=None, inner=count // frames, recipe=recipe.key, stats=True,
    )  # fmt: skip
    return ops.Inputs(**values | change)


def error(a, exact):
    return (a.double() - exact.double()).abs().max().item()


def check(i, scale=3.0, watch=True):
    """All four launchers against the reference, under the sanitizer."""
    tensors = [n for n, x in zip(TENSORS, (i.v, i.x0, i.v_old, i.v_ref)) if x is not None]
    tensors += [] if i.noise is None and i.x_t is None else ["y_ptr"]
    loss, totals, rows = ops._sums(i)
    exact, apart = (ops._gradient(pair, i._replace(v=i.v.float())).double() for pair in ((1.0, 1.0), (scale, -2.0)))
    with sanitize() as report:
        found = kernels.nft_loss(*i)
    report.check(read_once=tensors if watch else ())
    grad = torch.full_like(i.v, float("nan"))
    with sanitize() as report:
        both = kernels.nft_loss_with_grad(*i, grad)
    report.check(read_once=tensors if watch else (), written_once=["grad_ptr"])
    for got in (found, both):
        torch.testing.assert_close(got[0], loss, rtol=2e-6, atol=0)
        torch.testing.assert_close(got[1], totals, rtol=2e-6, atol=1e-6)  # the signal is a difference of terms near 1
        torch.testing.assert_close(got[2][:COEFFICIENTS], rows[:COEFFICIENTS], rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(got[2][COEFFICIENTS:], found[2][COEFFICIENTS:], rtol=1e-6, atol=0)
    top = exact.abs().max().item()
    info = torch.finfo(i.v.dtype)
    bound = (info.eps * 0.51 + 2e-6) * top + info.smallest_normal * info.eps
    assert error(grad, exact) <= bound
    go = torch.tensor(scale).expand(2)
    with sanitize() as report:
        alone = kernels.nft_loss_backward(go, found[2], *i)
    report.check(read_once=tensors if watch else (), written_once=["grad_ptr"])
    assert error(alone, scale * exact) <= scale * bound
    assert error(kernels.nft_loss_backward(torch.tensor([scale, -2.0]), found[2], *i), apart) <= 2 * scale * bound
    kept = grad.clone()
    with sanitize() as report:
        kernels.nft_loss_redo(torch.tensor(1.0).expand(2), found[2], *i, grad)
    report.check()
    assert (
        torch.equal(grad, kept)
        and not report.regions["grad_ptr"].writes.any()
        and not report.regions["v_ptr"].reads.any()
    )
    kernels.nft_loss_redo(go, found[2], *i, grad)
    assert torch.equal(grad, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe,source", [("afd", "noise"), ("afd", "seed"), ("afd", "x_t"), ("diffusionnft", "noise"),
                                           ("diffusionnft", "seed"), ("astrolabe", "x_t"), ("gardo", "noise")])  # fmt: skip
def test_recipes(recipe, source, dtype):
    check(make(recipe=recipe, source=source, dtype=dtype))


@pytest.mark.parametrize("change", [
    {"v_old": None}, {"v_ref": None}, {"v_old": None, "v_ref": None, "stats": False},
    {"sample_mask": torch.tensor([True, False])}, {"ref_mask": torch.tensor([False, True])},
    {"ref_mask": torch.tensor([False, False])}, {"element_mask": torch.rand(2, 5000) > 0.3},
    {"sigma": torch.tensor([[0.3], [0.6]])},
], ids=lambda c: ",".join(c))  # fmt: skip
@pytest.mark.parametrize("recipe", ["afd", "gardo"])
def test_options(change, recipe):
    if change.get("stats") is False:
        i = make(recipe=recipe, **change)
        torch.testing.assert_close(kernels.nft_loss(*i)[0], ops._sums(i)[0], rtol=2e-6, atol=0)
    else:
        check(make(recipe=recipe, source="seed" if "element_mask" in change else "noise", **change))


def _each(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("change", [
    {"each": _each(2, 5000)}, {"each": _each(2, 5000), "v_old": None, "element_mask": _each(2, 5000) > 0.3},
    {"each": _each(2, 5000), "element_mask": _each(2, 5000)}, {"element_mask": _each(2, 5000) * (_each(2, 5000) > 0.3)},
    {"policy_weight": _each(2), "prior_weight": 3 * _each(2)}, {"sample_mask": _each(2), "ref_mask": 0.1 * _each(2)},
], ids=lambda c: ",".join(c))  # fmt: skip
@pytest.mark.parametrize("recipe", ["afd", "gardo"])
def test_weights_and_dense_r(change, recipe):
    check(make(recipe=recipe, dtype=torch.bfloat16 if "policy_weight" in change else torch.float32, **change))


@pytest.mark.parametrize(
    "change", [{}, {"element_mask": _each(2, 5000) > 0.3}, {"v_old": None}], ids=lambda c: ",".join(c)
)
@pytest.mark.parametrize("fields", [
    {"form": "dpo", "dpo_beta": 1.3}, {"form": "dpo", "dpo_beta": 40.0, "weighting": "none"}, {"shared_weight": True},
    {"ref_reduction": "batch"}, {"ref_reduction": "batch", "sample_reduction": "sum", "batch_reduction": "sum"},
], ids=str)  # fmt: skip
def test_fields(fields, change):
    check(make(recipe=afd_fast.nft_recipe("diffusionnft", **fields), **change))


@pytest.mark.parametrize("batch,size", [(3, 7), (2, 4097)])
def test_clean_space(batch, size):
    recipe = afd_fast.nft_recipe("astrolabe", space="clean", ref_space="v")
    check(make((batch, size), recipe=recipe, source=None, element_mask=torch.rand(batch, size) > 0.3))
    check(make((batch, size), recipe=recipe, source=None, dtype=torch.bfloat16))


@pytest.mark.parametrize("batch,size", [(1, 1), (3, 7), (1, 4095), (3, 4096), (1, 4097), (2, 13001)])
def test_sizes(batch, size):
    check(make((batch, size), seed=size))


@pytest.mark.parametrize("frames,inner", [(5, 1000), (5, 100), (5000, 1), (5, 1032), (3, 1027)])
@pytest.mark.parametrize("source", ["noise", "seed"])
def test_frames(frames, inner, source):
    sigma = 0.1 + 0.8 * torch.rand(2, frames, generator=torch.Generator().manual_seed(1))
    shape = (2, frames * inner * -(-5000 // (frames * inner)))  # whole periods, two tiles or more
    check(make(shape, recipe="astrolabe", source=source, frames=frames, inner=inner, sigma=sigma))


def test_packed():
    lengths = torch.tensor([300, 0, 1, 700, 5])
    cu = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    i = make((1006, 13), recipe="diffusionnft", r=torch.rand(5), t=0.1 + 0.8 * torch.rand(5, 1), inner=1)
    for dtype in (torch.int32, torch.int64):
        check(i._replace(cu_seqlens=cu.to(dtype)))
    check(i._replace(cu_seqlens=cu, element_mask=torch.rand(1006, 13) > 0.4))


@pytest.mark.parametrize("offsets", [[0, 2, 100_000], [0, -5_000_000, 6], [0, 6, 2], [0, 7, 6], [1, 3, 6], [0, 3, 5], [9, 0, 6],
                                     [0, 1 << 62, 6], [-(1 << 63), (1 << 63) - 1, 6]])  # fmt: skip
def test_bad_offsets_stay_inside_and_give_nan(offsets):
    """No value can be checked on a GPU without waiting for it."""
    i = make((6, 700), recipe="diffusionnft", r=torch.rand(2), t=0.1 + 0.8 * torch.rand(2, 1), inner=1)
    i = i._replace(cu_seqlens=torch.tensor(offsets))
    grad = torch.zeros_like(i.v)
    with sanitize() as report:  # raises outside of a tensor
        loss, _, rows = kernels.nft_loss_with_grad(*i, grad)
        kernels.nft_loss_backward(torch.ones(2), rows, *i)
    assert loss.isnan() and not report.errors


@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize(
    "name,value", [("t", 750.0), ("t", -0.1), ("t", float("nan")), ("r", 1.1), ("r", -1.0), ("r", float("nan"))]
)
@pytest.mark.parametrize("recipe", ["afd", "diffusionnft"])
def test_numbers_out_of_range_give_nan(recipe, name, value, frames):
    """One of them, in the last sample. No value can be checked on a GPU without waiting for it."""
    i = make((3, 40), recipe=recipe, frames=frames, inner=40 // frames)
    getattr(i, name).view(-1)[-1] = value
    grad = torch.zeros_like(i.v)
    loss, _, rows = kernels.nft_loss_with_grad(*i, grad)
    assert loss.isnan() and grad[-1].isnan().all()
    assert kernels.nft_loss_backward(torch.ones(2), rows, *i)[-1].isnan().all()


def test_an_r_per_element_out_of_range_gives_nan():
    i = make((2, 40), each=_each(2, 40))
    i.each[1, 7] = 1.5
    grad = torch.zeros_like(i.v)
    loss, _, _ = kernels.nft_loss_with_grad(*i, grad)
    assert loss.isnan() and grad[1, 7].isnan() and grad.isnan().sum() == 1


def test_strides():
    """A batch-strided slice is read where it lies; an expanded sample is read through stride 0."""
    wide, i = torch.randn(2, 3, 5000), make()
    check(i._replace(v=wide[:, 1], v_ref=torch.randn(1, 5000).expand(2, 5000)), watch=False)


@pytest.mark.parametrize("name,field", [("x0", "X0_SQUARE_MAX"), ("v", "OLD_DEVIATION_MAX")])
def test_a_maximum_does_not_lose_a_nan(name, field):
    i = make()
    getattr(i, name)[1, 17] = float("nan")
    rows = kernels.nft_loss(*i)[2]
    assert rows[Row[field]].isnan().tolist() == [False, True]


def test_more_samples_than_lanes():
    check(make((67, 40), seed=3))


def test_weight_floor():
    """A perfect student: W is the floor on both sides."""
    i = make(recipe=afd_fast.nft_recipe("diffusionnft", weight_floor=10.0))
    check(i)
    half = i._replace(r=torch.full((2,), 0.5), v_ref=None)
    rows = kernels.nft_loss(*half)[2]
    assert (rows[Row.DIFFERENCE] == 0).all()  # no rounding noise is left at zero advantage


@pytest.mark.parametrize(
    "shape,frames,inner",
    [((2, 5000), 1, 5000), ((1, 3), 1, 3), ((3, 4097), 1, 4097), ((2, 5000), 5, 100), ((2, 6192), 2, 1032)],
)
@pytest.mark.parametrize("seed", [0, -7, 2**63 - 1])
def test_noise_bits(shape, frames, inner, seed):
    t, x0 = torch.rand(shape[0], frames), torch.randn(*shape)
    view = (shape[0], shape[1] // (frames * inner), frames, inner)
    for x in (x0, x0.bfloat16()):
        with sanitize() as report:
            found = noise_kernels.forward_noise(x, t, None, seed, inner)
        report.check(read_once=["x0_ptr"], written_once=["out_ptr"])
        expected = flow.forward_noise(x.view(view), t.view(-1, 1, frames, 1), seed=seed).view(shape)
        assert torch.equal(found, expected)
    noise = torch.randn(*shape)
    with sanitize() as report:
        found = noise_kernels.forward_noise(x0, t, noise, None, inner)
    report.check(read_once=["x0_ptr", "y_ptr"], written_once=["out_ptr"])
    assert torch.equal(
        found, flow.forward_noise(x0.view(view), t.view(-1, 1, frames, 1), noise=noise.view(view)).view(shape)
    )


def test_kinds_of_frames():
    assert [Frames.of(*x) for x in ((1, 8, 1), (2, 1024, 1), (2, 1016, 1), (2, 1028, 1), (2, 1024, 2**23), (2, 1024, 2**23 + 1))] == [
        Frames.ONE, Frames.LONG, Frames.SHORT, Frames.SHORT, Frames.LONG, Frames.SHORT
    ]  # fmt: skip


def test_fma_is_rounded_once():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).numpy()
    y, near = x[::-1].copy(), -(x * x[::-1])
    left = fused_multiply_add(x, y, near)  # what a float32 product loses
    assert (left == x.astype(float) * y + near).all() and (left != 0).mean() > 0.9
    one, two = np.float32(1 + 2**-18) / 4096, np.float32(1 - 2**-18) / 4096
    odd = np.float32([1 + 2**-23])  # the sum lies 2^-60 below a midpoint, where float64 sees the midpoint
    assert fused_multiply_add(one + 0 * odd, two + 0 * odd, odd) == odd


@triton.jit
def _copy(x, o, n, BUG: tl.constexpr):
    p = tl.program_id(0)
    i = p * 32 + tl.arange(0, 32)
    m = i < n
    if BUG == 1:
        m = i <= n  # off by one
    a = tl.load(x + i, mask=m)
    if BUG == 2:
        tl.store(o + tl.arange(0, 32), a, mask=m)  # every program writes the same elements
    elif BUG == 3:
        tl.store(o + i // 2, a, mask=m)  # lanes collide
    elif BUG == 4:
        tl.store(x + (n - 1 - i), a, mask=m)  # writes what another program reads
    else:
        tl.store(o + i, a, mask=m)
    if BUG == 5:
        tl.store(o + i, tl.load(x + i, mask=m), mask=m)  # reads and writes twice
    if BUG == 6:
        tl.store(o + i, a + a, mask=m)  # bfloat16 arithmetic


@pytest.mark.parametrize("bug", range(7))
def test_sanitizer_catches(bug):
    x = torch.randn(100).to(torch.bfloat16 if bug == 6 else torch.float32)
    caught = False
    try:
        with sanitize() as report:
            _copy[(4,)](x, torch.empty_like(x), 100, BUG=bug)
        report.check(read_once=["x"], written_once=["o"])
    except Exception:
        caught = True
    assert caught == (bug > 0)

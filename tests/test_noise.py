"""The noise stream: known answers, bits equal everywhere, distribution; forward_noise and its errors."""

import hashlib

import pytest
import torch

import afd_fast
from afd_fast.ops import native
from afd_fast.reference import flow
from afd_fast.reference.noise import normal_noise, philox

STREAM = "8775b61528c7fc757ab63b454c9b5171240bcf3db39ed17f4338e59e1a7c6dcc"
KNOWN = [  # Random123 kat_vectors, philox4x32 10
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]  # fmt: skip


@pytest.mark.parametrize("counter,key,words", KNOWN)
def test_philox_known_answers(counter, key, words):
    assert tuple(int(w) for w in philox(*(torch.tensor(c) for c in counter), key)) == words


def test_stream_does_not_change():
    """A seed written into a checkpoint must mean the same noise for ever."""
    bits = normal_noise((2, 9000), 0x123456789ABCDEF0).numpy().tobytes()
    assert hashlib.sha256(bits).hexdigest() == STREAM


@pytest.mark.skipif(native.library() is None, reason="the C++ library is not built")
@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345, -(2**63)])
@pytest.mark.parametrize("shape", [(1, 1), (3, 4095), (2, 4097), (2, 3, 50, 61)])
def test_cpp_bits_equal_pytorch_bits(seed, shape):
    zero, one = torch.zeros(shape), torch.ones(shape[0])
    noise = afd_fast.forward_noise(zero, one, seed=seed)  # (1 - 1) 0 + 1 eps
    assert torch.equal(noise, normal_noise(shape, seed))
    x0, t = torch.randn(shape), torch.rand(shape[0])
    for dtype in (torch.float32, torch.bfloat16):
        expected = flow.forward_noise(x0.to(dtype), t, seed=seed)
        assert torch.equal(afd_fast.forward_noise(x0.to(dtype), t, seed=seed), expected)


def test_a_sample_does_not_depend_on_the_batch():
    assert torch.equal(normal_noise((4, 5000), 9)[:2], normal_noise((2, 5000), 9))
    assert torch.equal(normal_noise((1, 9000), 9)[:, :5000], normal_noise((1, 5000), 9))


def test_distribution():
    x = normal_noise((8, 1 << 17), 3).double()
    n = x.numel()
    assert abs(x.mean()) < 4 / n**0.5 and abs(x.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((x**3).mean()) < 4 * (15 / n) ** 0.5 and abs((x**4).mean() - 3) < 4 * (96 / n) ** 0.5
    for k, p in ((1, 0.31731), (2, 0.0455), (3, 0.0026998)):
        assert abs((x.abs() > k).double().mean() - p) < 4 * (p / n) ** 0.5
    assert abs((x[0] * x[1]).mean()) < 4 / (1 << 17) ** 0.5  # samples are independent
    assert abs((x[:, :-1024] * x[:, 1024:]).mean()) < 4 / n**0.5  # so are the outputs of one counter


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_forward_noise_rounds_once(dtype):
    x0, noise, t = torch.randn(3, 7, 11).to(dtype), torch.randn(3, 7, 11).to(dtype), torch.rand(3, dtype=torch.float64)
    t = t if dtype == torch.float64 else t.float()
    clean, noisy = (1 - t.double())[:, None, None] * x0.double(), t.double()[:, None, None] * noise.double()
    exact, size = clean + noisy, clean.abs() + noisy.abs()
    x_t = afd_fast.forward_noise(x0, t, noise=noise)
    inside = torch.finfo(t.dtype).eps * 1.51 * size  # 1 - t, the products and their sum: half an ulp each at most
    info = torch.finfo(dtype)
    rounded = 0 if dtype == t.dtype else info.eps * 0.5 * (exact.abs() + inside).clamp(info.smallest_normal)
    assert x_t.dtype == dtype and ((x_t.double() - exact).abs() <= inside + rounded).all()


def test_forward_noise_layouts_and_gradient():
    x0, noise, t = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5), torch.rand(2, 4)
    expected = afd_fast.forward_noise(x0, t, noise=noise, frame_dim=2)
    moved = lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(afd_fast.forward_noise(moved(x0), t, noise=moved(noise), frame_dim=2), expected)
    assert torch.equal(
        afd_fast.forward_noise(moved(x0), t, seed=4, frame_dim=-2), afd_fast.forward_noise(x0, t, seed=4, frame_dim=2)
    )
    tracked = x0.clone().requires_grad_()
    afd_fast.forward_noise(tracked, t, noise=noise, frame_dim=2).sum().backward()
    torch.testing.assert_close(tracked.grad, (1 - t)[:, None, :, None].expand_as(x0))
    assert afd_fast.forward_noise(x0, 0.0, noise=noise).equal(x0) and afd_fast.forward_noise(
        x0, 1.0, noise=noise
    ).equal(noise)
    assert afd_fast.forward_noise(torch.empty(0, 3), 0.5, seed=1).shape == (0, 3)


@pytest.mark.parametrize("change,error,message", [
    ({"x0": torch.ones(2, 3, dtype=torch.long)}, TypeError, "floating-point"),
    ({"x0": torch.ones(())}, ValueError, "batch axis"),
    ({"seed": 1}, ValueError, "exactly one"), ({"noise": None}, ValueError, "exactly one"),
    ({"noise": None, "seed": 0.5}, TypeError, "integer"), ({"noise": torch.ones(2, 4)}, ValueError, "x0's shape"),
    ({"noise": torch.ones(2, 3, dtype=torch.long)}, TypeError, "floating-point"),
    ({"noise": torch.ones(2, 3, device="meta")}, ValueError, "noise is on meta"),
    ({"t": 1.1}, ValueError, "divide network timesteps by 1000"), ({"t": torch.tensor([0.1, float("nan")])}, ValueError, "t must lie"),
    ({"t": torch.rand(3)}, ValueError, "3 values for a batch of 2"), ({"t": torch.rand(2, 2), "frame_dim": 1}, ValueError, "frame_dim"),
])  # fmt: skip
def test_bad_input(change, error, message):
    good = {"x0": torch.rand(2, 3), "t": 0.5, "noise": torch.rand(2, 3)}
    with pytest.raises(error, match=message):
        afd_fast.forward_noise(**good | change)


def test_schedules():
    sigma = flow.shift_sigma(torch.tensor([1.0, 0.75, 0.5, 0.25]), 5.0)
    torch.testing.assert_close(sigma, torch.tensor([1.0, 0.9375, 0.8333333, 0.625]))

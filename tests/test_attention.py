"""The attention dispatcher: the choice for each GPU, refusals, and the numbers of what runs here."""

import sys
import types

import pytest
import torch

from afd_fast.ops import attention as module
from afd_fast.ops.attention import BACKENDS, attention, attention_varlen, choose_backend, resolve_backend
from afd_fast.reference import transformer as reference

EVERYTHING = set(BACKENDS)


@pytest.mark.parametrize(
    "capability, installed, expected",
    [
        (9, EVERYTHING, "fa3"),
        (9, {"cudnn", "fa4", "fa2", "sdpa"}, "cudnn"),
        (9, {"fa4", "fa2", "sdpa"}, "fa4"),
        (9, {"fa2", "sdpa"}, "fa2"),
        (9, {"sdpa"}, "sdpa"),
        (10, EVERYTHING, "fa4"),
        (10, {"cudnn", "fa2", "sdpa"}, "cudnn"),
        (8, EVERYTHING, "fa2"),
        (8, {"cudnn", "sdpa"}, "sdpa"),
        (12, EVERYTHING, "cudnn"),
        (7, {"sdpa"}, "sdpa"),
        (None, EVERYTHING, "sdpa"),
    ],
)
def test_auto(capability, installed, expected):
    assert choose_backend("auto", capability, True, installed.__contains__) == expected


def test_auto_never_takes_fa2_on_hopper_while_a_hopper_kernel_is_there():
    for hopper in ("fa3", "cudnn", "fa4"):
        assert choose_backend("auto", 9, True, {hopper, "fa2", "sdpa"}.__contains__) == hopper


def test_wide_tensors_go_to_sdpa():
    assert choose_backend("auto", 9, False, EVERYTHING.__contains__) == "sdpa"


def test_explicit_requests_never_fall_back():
    assert [choose_backend(b, 9, True, EVERYTHING.__contains__) for b in BACKENDS] == list(BACKENDS)
    for backend, package in (
        ("fa3", "flash-attn-3"),
        ("fa4", "flash-attn-4"),
        ("fa2", "flash-attn"),
        ("cudnn", "cuDNN"),
    ):
        with pytest.raises(ImportError, match=package):
            choose_backend(backend, 9, True, {"sdpa"}.__contains__)
    with pytest.raises(ValueError, match="compute capability 8"):
        choose_backend("fa3", 8, True, EVERYTHING.__contains__)
    with pytest.raises(ValueError, match="float16 or bfloat16 CUDA"):
        choose_backend("fa3", None, True, EVERYTHING.__contains__)
    with pytest.raises(ValueError, match="is not one of"):
        choose_backend("flash", 9, True, EVERYTHING.__contains__)
    with pytest.raises(ValueError, match="float16 or bfloat16 CUDA"):
        attention(*(torch.randn(1, 2, 1, 4),) * 3, backend="fa2")


def test_resolved_once_and_logged(caplog):
    module._resolve.cache_clear()
    with caplog.at_level("INFO", "afd_fast"):
        for _ in range(3):
            resolve_backend("auto", torch.device("cpu"), torch.float32)
    assert [r.getMessage() for r in caplog.records] == ["attention=auto: sdpa for torch.float32 on cpu"]


@pytest.mark.parametrize("lq, lk", [(1, 1), (7, 7), (5, 31), (64, 129)])
@pytest.mark.parametrize("dim", [16, 128])
def test_equals_the_definition_over_cache_views(lq, lk, dim):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, lq, 3, dim, generator=g, dtype=torch.float64)
    cache = torch.randn(2, 2, lk + 9, 3, dim, generator=g, dtype=torch.float64)
    k, v = cache[:, :, :lk]  # strided: the batch stride is the whole buffer's
    expected, expected_lse = reference.attention(q, k, v)
    out, lse = attention(q, k, v, return_lse=True)
    assert out.shape == q.shape and (out - expected).abs().max() < 1e-13
    assert lse.shape == (2, 3, lq) and (lse - expected_lse).abs().max() < 1e-13
    assert (attention(q, k, v) - expected).abs().max() < 1e-13
    one = attention(q, k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1))  # one prompt for the batch
    assert (one - reference.attention(q, k[:1].expand_as(k), v[:1].expand_as(v))[0]).abs().max() < 1e-13


def test_gradient():
    torch.manual_seed(0)
    args = [torch.randn(1, n, 2, 8, dtype=torch.float64, requires_grad=True) for n in (3, 5, 5)]
    assert torch.autograd.gradcheck(attention, args)
    out, lse = attention(*args, return_lse=True)
    assert out.requires_grad and torch.allclose(lse, reference.attention(*args)[1])


def test_two_segments_merge_by_lse():
    """What the LSE is for: softmax over a split history."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 8, dtype=torch.float64) for n in (3, 9, 9))
    (a, la), (b, lb) = (
        attention(q, k[:, :4], v[:, :4], return_lse=True),
        attention(q, k[:, 4:], v[:, 4:], return_lse=True),
    )
    wa = torch.sigmoid(la - lb).transpose(1, 2)[..., None]
    assert (wa * a + (1 - wa) * b - attention(q, k, v)).abs().max() < 1e-14


def test_compiles():
    torch._dynamo.reset()
    q, k, v = (torch.randn(1, 4, 2, 8) for _ in range(3))
    compiled = torch.compile(lambda q, k, v: attention(q, k, v), backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(q, k, v), attention(q, k, v))


def test_shapes():
    q = torch.randn(1, 2, 2, 8)
    for k in (torch.randn(2, 2, 2, 8), torch.randn(1, 2, 1, 8), torch.randn(1, 2, 2, 4)):
        with pytest.raises(ValueError, match="fit together"):
            attention(q, k, k)
    with pytest.raises(ValueError, match="fit together"):
        attention(q, q, q[:, :1])


@pytest.mark.parametrize("returns_tuple", [True, False])
def test_flash_packages_call(monkeypatch, returns_tuple):
    """The flash functions get [B, L, H, d] as is and may return a tuple (old FA3, FA4) or a tensor."""
    seen = {}

    def flash_attn_func(q, k, v, **options):
        seen.update(options, strides=k.stride())
        out, lse = reference.attention(q, k, v)
        return (out, lse) if returns_tuple or options else out

    fake = types.ModuleType("flash_attn_interface")
    fake.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn_interface", fake)
    monkeypatch.setattr(module, "resolve_backend", lambda *a: "fa3")
    module._flash_function.cache_clear()
    cache = torch.randn(2, 12, 3, 8)
    q, k = torch.randn(2, 4, 3, 8), cache[:, :7]
    assert torch.allclose(attention(q, k, k), reference.attention(q, k, k)[0]) and seen == {"strides": k.stride()}
    assert torch.allclose(attention(q, k, k, return_lse=True)[1], reference.attention(q, k, k)[1])
    module._flash_function.cache_clear()


def segments(lengths, heads=4, kv_heads=2, dim=16, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    rows = lambda h: torch.randn(sum(lengths), h, dim, generator=g, dtype=dtype, requires_grad=True)
    return rows(heads), rows(kv_heads), rows(kv_heads)


def by_definition(q, k, v, lengths, causal):
    """One dense softmax over all rows with a mask of segments."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = owner[:, None] == owner
    if causal:
        mask = mask & torch.ones_like(mask).tril()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("lengths", [(7,), (5, 5, 5), (3, 8, 8, 1, 3), (1, 1), (31, 2)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_varlen_is_the_definition(lengths, causal, kv_heads):
    q, k, v = segments(lengths, kv_heads=kv_heads)
    out, wanted = attention_varlen(q, k, v, lengths, causal=causal), by_definition(q, k, v, lengths, causal)
    assert torch.allclose(out, wanted, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, wanted))):
        assert torch.allclose(a, b, atol=1e-11)


def test_varlen_runs_of_equal_segments_are_one_call(monkeypatch):
    seen = []
    original = module._dense
    monkeypatch.setattr(module, "_dense", lambda b, q, k, v, c: seen.append(tuple(q.shape)) or original(b, q, k, v, c))
    attention_varlen(*segments((6, 6, 6, 2, 2, 6)), (6, 6, 6, 2, 2, 6))
    assert seen == [(3, 4, 6, 16), (2, 4, 2, 16), (1, 4, 6, 16)]


@pytest.mark.parametrize("wants_max", [True, False])
def test_varlen_flash_packages_get_cumulative_lengths(monkeypatch, wants_max):
    """A stand-in with the packages' signature: FA2, FA3 and later FA4 take maximum lengths, early FA4 does not."""
    seen = {}

    def with_max(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
        assert (max_seqlen_q, max_seqlen_k) == (4, 4)
        return without(q, k, v, cu_seqlens_q, cu_seqlens_k, causal), None

    def without(q, k, v, cu_seqlens_q, cu_seqlens_k, causal):
        assert cu_seqlens_q is cu_seqlens_k and cu_seqlens_q.dtype == torch.int32
        seen["lengths"] = tuple(cu_seqlens_q.diff().tolist())
        return by_definition(q, k, v, seen["lengths"], causal)

    package = types.SimpleNamespace(flash_attn_varlen_func=with_max if wants_max else without)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    monkeypatch.setattr(module, "resolve_backend", lambda *a, **k: "fa3")
    module._flash_varlen.cache_clear()
    q, k, v = segments((3, 4, 1))
    out = attention_varlen(q, k, v, (3, 4, 1), causal=True)
    module._flash_varlen.cache_clear()
    assert seen["lengths"] == (3, 4, 1) and torch.allclose(out, by_definition(q, k, v, (3, 4, 1), True))


def test_varlen_auto_passes_fa3_over_for_a_vision_towers_heads(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "resolve_backend", lambda *a, without="": asked.append(without) or "sdpa")
    for dim in (80, 128, 64):
        attention_varlen(*segments((3,), dim=dim), (3,))
    assert asked == ["fa3", "", ""]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(module, "_is_installed", lambda name: name in ("fa3", "fa2", "sdpa"))
    module._resolve.cache_clear()
    try:
        choose = lambda request, without: module._resolve(request, torch.device("cuda"), torch.bfloat16, without)
        assert [choose("auto", ""), choose("auto", "fa3"), choose("fa3", "fa3")] == ["fa3", "fa2", "fa3"]
        with pytest.raises(ImportError, match="flash-attn-4"):
            choose("fa4", "fa3")
    finally:
        module._resolve.cache_clear()


def test_varlen_refuses_what_does_not_fit():
    q, k, v = segments((3, 4))
    for args in ((q, k, v, (3, 3)), (q, k[:-1], v[:-1], (3, 4)), (q[:, :3], k, v, (3, 4)), (q[None], k, v, (3, 4))):
        with pytest.raises(ValueError, match="do not fit"):
            attention_varlen(*args)
    with pytest.raises(ValueError, match="float16 or bfloat16 CUDA"):
        attention_varlen(q, k, v, (3, 4), backend="fa2")


@pytest.mark.parametrize("lengths", [(100, 90, 128), (100, 127)])
def test_padded_segments_are_the_same_function(lengths, monkeypatch):
    """What cuDNN gets, by SDPA on this CPU: one dense call of a size that repeats, values and gradients unchanged."""
    calls = []

    def dense(backend, q, k, v, causal):
        calls.append((tuple(q.shape), causal))
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )

    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), h, 8, generator=g, dtype=torch.float64).requires_grad_() for h in (4, 2, 2))
    expected = attention_varlen(q, k, v, lengths, causal=True, backend="sdpa")
    weight = torch.randn(expected.shape, generator=g, dtype=torch.float64)
    gradients = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    monkeypatch.setattr(module, "_dense", dense)
    monkeypatch.setattr(module, "resolve_backend", lambda *_, **__: "cudnn")
    found = attention_varlen(q, k, v, lengths, causal=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad((found * weight).sum(), (q, k, v)), gradients, rtol=1e-12, atol=1e-12
    )
    assert calls == [((len(lengths), 4, 128, 8), True)]
    calls.clear()
    attention_varlen(q, k, v, lengths)  # without causality a key behind the end would be seen
    attention_varlen(q, k, v, (len(q) - 5, 5), causal=True)  # too much of it would be padding
    assert len(calls) == len(lengths) + 2

"""Identities between CausalWan's own paths in float64, sizes, operator counts, and what it refuses."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from afd_fast.students import CausalWan, CausalWanConfig

EXACT = 1e-12
SIZES = {
    "tiny": dict(dim=64, ffn_dim=160, num_heads=4, num_layers=2, text_len=12, text_dim=24, freq_dim=32),
    "head128": dict(dim=256, ffn_dim=96, num_heads=2, num_layers=2, text_len=5, text_dim=8, freq_dim=16),
}


@pytest.fixture(scope="module", params=SIZES)
def model(request):
    torch.manual_seed(0)
    return CausalWan(**SIZES[request.param]).double()


def inputs(model, frames=9, batch=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    c = model.config
    x, clean = torch.randn(2, batch, 16, frames, 4, 6, generator=g, dtype=torch.float64)
    context = torch.randn(batch, c.text_len, c.text_dim, generator=g, dtype=torch.float64)
    t = torch.rand(batch, frames, generator=g) * 1000
    return x, clean, t, model.encode_text(context)


def chunked(model, x, clean, t, text, chunk, **options):
    cache = model.new_cache(x.shape[0], x.shape[2], *x.shape[3:], **options)
    out = []
    for start in range(0, x.shape[2], chunk):
        part = slice(start, start + chunk)
        out.append(model(x[:, :, part], t[:, part], text, cache=cache, start_frame=start))
        model(clean[:, :, part], torch.zeros_like(t[:, part]), text, cache=cache, start_frame=start)
    return torch.cat(out, 2)


def recomputed(model, x, clean, t, text, chunk, window=None, sink=0):
    """Without any cache: for every block the clean history and the block itself, from scratch."""
    out = []
    for start in range(0, x.shape[2], chunk):
        part = slice(start, start + chunk)
        both = torch.cat([clean[:, :, :start], x[:, :, part]], 2)
        times = torch.cat([torch.zeros_like(t[:, :start]), t[:, part]], 1)
        full = model.forward_block_causal(both, times, text, chunk=chunk, window=window, sink=sink)
        out.append(full[:, :, start:])
    return torch.cat(out, 2)


@torch.no_grad()
@pytest.mark.parametrize(
    "chunk, window, sink", [(3, None, 0), (1, None, 0), (3, 6, 0), (3, 7, 1), (1, 4, 2), (1, 1, 0)]
)
def test_chunked_is_teacher_forced_is_recomputed(model, chunk, window, sink):
    """With a window the ring wraps up to twelve times; it equals a recomputation without any cache."""
    x, clean, t, text = inputs(model, frames=12)
    cached = chunked(model, x, clean, t, text, chunk, window=window, sink=sink)
    forced = model.forward_teacher_forcing(x, t, text, clean, chunk=chunk, window=window, sink=sink)
    again = recomputed(model, x, clean, t, text, chunk, window, sink)
    assert (cached - forced).abs().max() < EXACT
    assert (cached - again).abs().max() < EXACT
    if window is not None:
        assert (cached - chunked(model, x, clean, t, text, chunk)).abs().max() > 1e-6  # the window matters


def test_gradient_of_the_cached_forward(model):
    """(B) of the training design: the same numbers with and without a graph, with and without writing, and the
    gradient of teacher forcing with a detached clean half."""
    x, clean, t, text = inputs(model, frames=6)
    text = text.map(torch.Tensor.detach)
    cache = model.new_cache(2, 6, 4, 6)
    with torch.no_grad():
        for start in (0, 3):
            part = slice(start, start + 3)
            model(clean[:, :, part], torch.zeros(2, 3), text, cache=cache, start_frame=start)
    before = [a.clone() for a in cache.ordered(1)]
    x = x.requires_grad_()
    outs = [model(x[:, :, s : s + 3], t[:, s : s + 3], text, cache=cache, start_frame=s, write=False) for s in (3, 0)]
    assert all(torch.equal(a, b) for a, b in zip(before, cache.ordered(1)))  # nothing written
    flow = torch.cat(outs[::-1], 2)
    with torch.no_grad():
        expected = chunked(model, x, clean, t, text, 3)
    assert (flow - expected).abs().max() < EXACT
    forced = model.forward_teacher_forcing(x, t, text, clean, chunk=3)
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (flow, forced)]
    assert (grads[0] - grads[1]).abs().max() < 1e-10  # through x the two are the same function


@torch.no_grad()
def test_first_chunk_is_bidirectional(model):
    x, _, t, text = inputs(model, frames=3)
    cache = model.new_cache(2, 3, 4, 6)
    assert (model(x, t, text, cache=cache) - model(x, t, text)).abs().max() < EXACT


@torch.no_grad()
def test_batch_is_its_samples(model):
    x, clean, t, text = inputs(model)
    for forward in (
        lambda x, clean, t, text: model(x, t, text),
        lambda x, clean, t, text: model.forward_teacher_forcing(x, t, text, clean),
        lambda x, clean, t, text: chunked(model, x, clean, t, text, 3),
    ):
        both = forward(x, clean, t, text)
        for b in range(2):
            one = forward(*(a[b : b + 1] for a in (x, clean, t, text)))
            assert (both[b : b + 1] - one).abs().max() < EXACT


@torch.no_grad()
def test_beyond_1024_frames(model):
    """Positions are computed, not looked up: a window that starts at frame 1200 works and is the same function of
    relative positions (RoPE), up to the angles' rounding."""
    x, clean, t, text = inputs(model, frames=6)

    def at(first):
        cache = model.new_cache(2, 6, 4, 6, window=6)
        cache.slot_frames = [None] * 6
        cache._slot = lambda f: (f - first) % 6  # as if the earlier frames had left the window
        cache.history = lambda start, end: [(0, start - first)] if start > first else []
        cache.mark = lambda start, end: end - first
        model(clean[:, :, :3], torch.zeros(2, 3), text, cache=cache, start_frame=first, write=True)
        return model(x[:, :, 3:], t[:, 3:], text, cache=cache, start_frame=first + 3)

    assert (at(0) - at(1200)).abs().max() < 1e-9


@torch.no_grad()
def test_conditioning_tables_are_the_same_numbers(model):
    x, _, _, text = inputs(model, frames=3)
    direct = model(x, torch.full((2, 3), 937.5), text)
    assert (model(x, model.conditioning(937.5, tables=True), text) - direct).abs().max() < EXACT


@torch.no_grad()
def test_bfloat16_rounding_modes():
    """Both run in bfloat16 and stay near float64; the official roundings are the default."""
    torch.manual_seed(0)
    wide = CausalWan(**SIZES["tiny"]).double()
    x, _, t, _ = inputs(wide, frames=3)
    context = torch.randn(2, 12, 24, generator=torch.Generator().manual_seed(3)).bfloat16()
    exact = wide(x.bfloat16().double(), t, wide.encode_text(context))
    errors = {}
    for official in (True, False):
        half = CausalWan(**SIZES["tiny"], official_rounding=official)
        half.load_state_dict(wide.state_dict())
        half = half.bfloat16()
        out = half(x.bfloat16(), t, half.encode_text(context))
        assert out.dtype == torch.bfloat16
        errors[official] = (out.double() - exact).abs().max() / exact.abs().max()
    assert max(errors.values()) < 0.05 and errors[False] != errors[True]


def test_1_3b_sizes():
    with torch.device("meta"):
        model = CausalWan(CausalWanConfig.wan_1_3b())
        state = model.state_dict()
        cache = model.to(torch.bfloat16).new_cache(1, 21, 60, 104)
    assert len(state) == 825 and sum(p.numel() for p in state.values()) == 1_418_996_800
    assert sum(p.numel() for p in model.blocks[0].parameters()) == 46_440_704
    assert cache.tokens == 1560 and cache.nbytes == 2 * 30 * 32760 * 1536 * 2  # 6.04 GB


@torch.no_grad()
def test_1_3b_forward_does_no_work_twice():
    """Shapes and matrix products of the released size, without computing: the last chunk's forward is 40.4 TFLOP
    (11.7 linear, 28.3 self-attention over 32760 keys, 0.4 cross-attention)."""
    from torch.utils.flop_counter import FlopCounterMode

    import afd_fast.estimate.meters  # noqa: F401  (counts the product that applies GELU)

    with torch.device("meta"):
        model = CausalWan(CausalWanConfig.wan_1_3b()).to(torch.bfloat16)
        text = model.encode_text(torch.empty(1, 512, 4096))
        table = model.conditioning(937.5, tables=True)
        cache = model.new_cache(1, 21, 60, 104)
        cache.slot_frames = list(range(21))
        x = torch.empty(1, 16, 3, 60, 104, dtype=torch.bfloat16)
        with FlopCounterMode(display=False) as counter:
            out = model(x, table, text, cache=cache, start_frame=18)
    assert out.shape == x.shape and abs(counter.get_total_flops() / 1e12 - 40.4) < 0.1


class _Count(TorchDispatchMode):
    """Operators that do work; views, allocations and reads of scalars left out (as in benchmarks/peers.py)."""

    FREE = ("view", "_unsafe_view", "unsqueeze", "transpose", "permute", "slice", "select", "expand", "unbind", "detach",
            "split", "t", "alias", "empty", "as_strided", "squeeze", "new_empty", "empty_like", "lift_fresh")  # fmt: skip

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name not in self.FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


# Self-Forcing 33593df on the same two-layer config and chunk of 3, attention as one call (its flash-attn path
# takes more): `python -m benchmarks.peers CHECKOUT --count`; 179 at batch 2
OFFICIAL_OPERATORS = 159


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_operators_per_forward(batch):
    """A rollout's forward launches at most a third of the official model's operators, at any batch."""
    torch.manual_seed(0)
    model = CausalWan(**SIZES["tiny"])
    text = model.encode_text(torch.randn(batch, 12, 24))
    cache, table = model.new_cache(batch, 6, 6, 10), model.conditioning(937.5, tables=True)
    x = torch.randn(batch, 16, 3, 6, 10)
    for start in (0, 3):
        model(x, table, text, cache=cache, start_frame=start)
        with _Count() as count:
            model(x, table, text, cache=cache, start_frame=start)
        assert len(count.names) <= OFFICIAL_OPERATORS // 3, count.names


def refuse(error, match, call):
    with pytest.raises(error, match=match):
        call()


@torch.no_grad()
def test_refusals():
    torch.manual_seed(0)
    model = CausalWan(**SIZES["tiny"])
    x, t = torch.randn(1, 16, 3, 4, 6), torch.full((1, 3), 500.0)
    text = model.encode_text(torch.randn(1, 12, 24))
    cache = model.new_cache(1, 6, 4, 6)
    refuse(ValueError, "x must be", lambda: model(x[:, :8], t, text))
    refuse(ValueError, "x must be", lambda: model(x[0], t, text))
    refuse(ValueError, "even", lambda: model(x[..., :5], t, text))
    refuse(ValueError, "even", lambda: model.new_cache(1, 6, 5, 6))
    refuse(ValueError, "t must be", lambda: model(x, t[:, :2], text))
    refuse(ValueError, "0..1000", lambda: model(x, t + 900, text))
    refuse(ValueError, "0..1000", lambda: model(x, t * float("nan"), text))
    refuse(TypeError, "float64", lambda: model(x.double(), t, text))
    refuse(TypeError, "encode it again", lambda: model(x, t, text.map(torch.Tensor.double)))
    refuse(TypeError, "cache is", lambda: model.double()(x.double(), t, text.map(torch.Tensor.double), cache=cache))
    model.float()
    refuse(ValueError, "prompts", lambda: model(x.repeat(3, 1, 1, 1, 1), t.repeat(3, 1), text[[0, 0]]))
    refuse(ValueError, "longer than text_len", lambda: model.encode_text(torch.randn(1, 13, 24)))
    refuse(ValueError, "prompt embeddings", lambda: model.encode_text(torch.randn(1, 12, 23)))
    refuse(ValueError, "made for", lambda: model(x.repeat(2, 1, 1, 1, 1), t.repeat(2, 1), text, cache=cache))
    refuse(ValueError, "made for", lambda: model(x[..., :4], t, text, cache=cache))
    refuse(ValueError, "earlier chunks", lambda: model(x, t, text, cache=cache, start_frame=3))
    refuse(ValueError, "larger one", lambda: model(x, t, text, cache=cache, start_frame=6))
    refuse(ValueError, "does not fit a window", lambda: model(x, t, text, cache=model.new_cache(1, 6, 4, 6, window=2)))
    refuse(ValueError, "need a cache", lambda: model(x, t, text, start_frame=3))
    refuse(ValueError, "add up", lambda: model(x, t, text, cache=cache, blocks=(1, 1)))
    refuse(ValueError, "divide", lambda: model.forward_block_causal(x, t, text, chunk=2))
    refuse(ValueError, "clean", lambda: model.forward_teacher_forcing(x, t, text, x[:, :, :2]))
    refuse(ValueError, "not both", lambda: CausalWan(CausalWanConfig.tiny(), dim=32))
    refuse(ValueError, "even", lambda: CausalWanConfig(dim=30, num_heads=4))
    refuse(RuntimeError, "Missing key", lambda: model.load_state_dict({}, strict=True))


@torch.no_grad()
def test_a_cached_forward_is_one_graph():
    """No graph break, no read of a device value: what torch.compile and CUDA graphs need (the official forward
    breaks about six times per layer)."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = CausalWan(**SIZES["tiny"])
    text, table = model.encode_text(torch.randn(1, 12, 24)), model.conditioning(937.5, tables=True)
    caches, x = [model.new_cache(1, 6, 4, 6) for _ in range(2)], torch.randn(1, 16, 3, 4, 6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for start in (0, 3):
        expected = model(x, table, text, cache=caches[0], start_frame=start)
        torch.testing.assert_close(compiled(x, table, text, cache=caches[1], start_frame=start), expected)
    torch.testing.assert_close(caches[0].ordered(1), caches[1].ordered(1))

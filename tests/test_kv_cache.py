"""The ring, its positions, its refusals, and forks that copy on the first write."""

import pytest
import torch

from afd_fast.students import CausalWan, CausalWanConfig
from afd_fast.students.wan.cache import KVCache


def make(frames=6, **options):
    cache = KVCache(
        layers=2, batch=2, frames=frames, height=1, width=2, heads=1, head_dim=2, dtype=torch.float32, **options
    )
    for layer in cache._layers:
        layer.k.fill_(float("nan"))
        layer.v.fill_(float("nan"))
    return cache


def put(cache, start, count, offset=0.0):
    """Write frames whose keys are their number (values its negative) into both layers."""
    cache.history(start, start + count)
    slots = cache.mark(start, start + count)
    frames = torch.arange(start, start + count, dtype=torch.float32).repeat_interleave(cache.tokens) + offset
    k = frames[None, :, None, None].expand(cache.batch, -1, 1, 2)
    for layer in range(2):
        cache.write(layer, start, k, -k)
    return slots


def held(cache, layer=0):
    return cache.ordered(layer)[0][0, :: cache.tokens, 0, 0].tolist()


@pytest.mark.parametrize(
    "window, sink, expected",
    [
        (6, 0, [6, 7, 8, 9, 10, 11]),
        (6, 1, [0, 7, 8, 9, 10, 11]),
        (7, 3, [0, 1, 2, 8, 9, 10, 11]),
        (None, 0, list(range(12))),
    ],
)
def test_ring_keeps_sink_and_recent(window, sink, expected):
    cache = make(frames=12, window=window, sink=sink)
    for start in range(0, 12, 3):
        slots = put(cache, start, 3)
        seen = cache._layers[1].k[:, : slots * cache.tokens]
        assert seen.isfinite().all()  # nothing unwritten is ever attended to
    assert held(cache) == expected and torch.equal(cache.ordered(1)[1], -cache.ordered(1)[0])
    assert cache._layers[0].k.shape[1] == len(expected) * cache.tokens


def test_buffers_never_move():
    cache = make(frames=30, window=6)
    pointers = [layer.k.data_ptr() for layer in cache._layers]
    for start in range(0, 30, 3):
        put(cache, start, 3)
    assert pointers == [layer.k.data_ptr() for layer in cache._layers]


def test_rewriting_a_chunk_and_starting_again():
    cache = make(frames=12, window=6)
    for start in (0, 3, 6):
        put(cache, start, 3)
        put(cache, start, 3, offset=0.5)
    assert held(cache) == [3.5, 4.5, 5.5, 6.5, 7.5, 8.5]
    with pytest.raises(ValueError, match="frame 0"):  # evicted
        cache.history(3, 6)
    put(cache, 0, 3)
    with pytest.raises(ValueError, match="frame 3"):  # still in its slot, but of the rollout before
        cache.history(6, 9)
    cache.reset()
    with pytest.raises(ValueError, match="earlier chunks"):
        cache.history(3, 6)


def test_history_of_a_wrapped_ring():
    cache = make(frames=12, window=5, sink=1)
    for start in (0, 2, 4):
        put(cache, start, 2)
    # slots: 0 -> frame 0, 1 -> 5, 2 -> 2, 3 -> 3, 4 -> 4; the block of frames 6, 7 sees 0, 4, 5
    assert cache.slot_frames == [0, 5, 2, 3, 4]
    assert cache.history(6, 8) == [(0, 1), (4, 5), (1, 2)]


def test_refusals():
    for options in ({"sink": 1}, {"window": 2, "sink": 2}, {"window": 2, "sink": -1}):
        with pytest.raises(ValueError, match="sink"):
            make(**options)
    with pytest.raises(ValueError, match="positive"):
        make(frames=0)
    with pytest.raises(ValueError, match="larger one"):
        make(frames=4).history(0, 6)
    with pytest.raises(ValueError, match="larger one"):
        make(frames=4, window=6).history(0, 6)
    with pytest.raises(ValueError, match="window of 4"):
        make(window=4, sink=2).history(3, 6)
    with pytest.raises(ValueError, match="start_frame"):
        make().history(-1, 2)
    with pytest.raises(ValueError, match="fork"):
        make().fork(0)


def test_bytes():
    cache = make(frames=6)
    assert cache.nbytes == 2 * 2 * (2 * 6 * 2 * 1 * 2) * 4 and "6 x 2 tokens" in repr(cache)


def test_fork_shares_until_a_write():
    cache = make()
    put(cache, 0, 3)
    fork = cache.fork(2)
    shared = cache._layers[0]
    assert fork.batch == 4 and fork._layers[0] is shared and held(fork) == [0, 1, 2]
    put(fork, 3, 3)
    assert fork._layers[0] is not shared and held(fork) == [0, 1, 2, 3, 4, 5] and held(cache) == [0, 1, 2]
    pointer = cache._layers[0].k.data_ptr()
    put(cache, 0, 3, offset=0.5)  # its only owner again: in place
    assert cache._layers[0].k.data_ptr() == pointer and held(fork)[:3] == [0, 1, 2]


def test_source_may_write_first():
    cache = make()
    put(cache, 0, 3)
    fork = cache.fork(1)
    put(cache, 0, 3, offset=0.5)
    assert held(cache) == [0.5, 1.5, 2.5] and held(fork) == [0, 1, 2]
    second = fork.fork(3)
    assert second.batch == 6 and second.ordered(0)[0].shape[0] == 6
    put(second, 3, 1)
    assert second._layers[0].k.shape[0] == 6


@torch.no_grad()
def test_forked_rollouts_equal_separate_ones():
    """K continuations of one history: forking the cache = running the history K times."""
    torch.manual_seed(0)
    model = CausalWan(CausalWanConfig.tiny()).double()
    text = model.encode_text(torch.randn(1, 12, 24, dtype=torch.float64))
    clean = torch.randn(1, 16, 3, 4, 6, dtype=torch.float64)
    x, t, zero = torch.randn(3, 16, 3, 4, 6, dtype=torch.float64), torch.full((3, 3), 625.0), torch.zeros(3, 3)
    cache = model.new_cache(1, 6, 4, 6)
    model(clean, zero[:1], text, cache=cache)
    forked = cache.fork(3)
    read_only = model(x, t, text, cache=cache.fork(3), start_frame=3, write=False)
    out = model(x, t, text, cache=forked, start_frame=3)
    separate = model.new_cache(3, 6, 4, 6)
    model(clean.expand(3, -1, -1, -1, -1), zero, text, cache=separate)
    expected = model(x, t, text, cache=separate, start_frame=3)
    assert (out - expected).abs().max() < 1e-12 and (read_only - expected).abs().max() < 1e-12
    assert cache.slot_frames[3] is None and cache.batch == 1


@torch.no_grad()
@pytest.mark.parametrize("blocks", [None, (1, 2)])
def test_a_failed_forward_leaves_its_frames_unheld(blocks):
    """The frames that a forward was writing when it failed are not there, whether they were before or not."""
    torch.manual_seed(0)
    model = CausalWan(CausalWanConfig.tiny())
    text = model.encode_text(torch.randn(1, 12, 24))
    x, t = torch.randn(1, 16, 3, 4, 6), torch.full((1, 3), 625.0)
    cache = model.new_cache(1, 9, 4, 6)
    model(x, t, text, cache=cache)
    model(x, t, text, cache=cache, start_frame=3)

    def interrupt(*_):
        raise KeyboardInterrupt

    for start in (6, 3):  # new frames, and frames written again
        failing = model.blocks[-1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(x, t, text, cache=cache, start_frame=start, blocks=blocks)
        failing.remove()
        with pytest.raises(ValueError, match=f"does not hold frame {start}"):
            model(x[:, :, :1], t[:, :1], text, cache=cache, start_frame=start + 2)
        model(x, t, text, cache=cache, start_frame=start, blocks=blocks)
        assert cache.slot_frames[: start + 3] == list(range(start + 3))

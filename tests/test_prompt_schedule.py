"""Prompts that change within a video: which text each forward is given, what is cached again, and what is refused."""

from dataclasses import replace

import pytest
import torch

from afd_fast.rollout import RolloutConfig, rollout, stream
from afd_fast.students import CausalWan, CausalWanConfig
from afd_fast.students.wan.graphs import GraphedStudent
from tests.test_graphs import Recorder

WINDOW = RolloutConfig(steps=(1000, 500), window=9, sink=3)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return CausalWan(CausalWanConfig.tiny()).double().requires_grad_(False)


def inputs(model, frames=24, batch=1):
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(batch, 16, frames, 4, 6, generator=g, dtype=torch.float64)
    draws = torch.randn(2 * frames, batch, 16, 3, 4, 6, generator=g, dtype=torch.float64)
    context = torch.randn(3, batch, 12, 24, generator=g, dtype=torch.float64)
    return noise, draws, [model.encode_text(c) for c in context]


class Watched:
    """The student, with a note of each call: (first frame, frames, t, which text)."""

    def __init__(self, model, texts):
        self.model, self.texts, self.calls = model, texts, []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def timestep(self, t, batch, frames):
        return torch.full((batch, frames), t)

    def __call__(self, x, t, text, *, cache, start_frame=0, **options):
        which = next(i for i, known in enumerate(self.texts) if known is text)
        self.calls.append((start_frame, x.shape[2], round(t[0, -1].item()), which))
        return self.model(x, t, text, cache=cache, start_frame=start_frame, **options)


def test_which_text_each_forward_is_given(model):
    noise, draws, texts = inputs(model, frames=15)
    schedule = [(0, texts[0]), (4, texts[1]), (12, texts[2])]
    steps = lambda start, text: [(start, 3, 1000, text), (start, 3, 833, text)]
    plain, again = Watched(model, texts), Watched(model, texts)
    rollout(plain, schedule, noise, replace(WINDOW, sink=0), renoise=draws)
    assert plain.calls == [
        *steps(0, 0), (0, 3, 0, 0), *steps(3, 0), (3, 3, 0, 0),  # a chunk is cached under its own text
        *steps(6, 1), (6, 3, 0, 1), *steps(9, 1), (9, 3, 0, 1), *steps(12, 2),
    ]  # fmt: skip
    rollout(again, schedule, noise, WINDOW, renoise=draws, recache=True)
    assert again.calls == [
        *steps(0, 0), (0, 3, 0, 0), *steps(3, 0), (0, 6, 0, 1),  # at once, sink and all: nothing has left the window
        *steps(6, 1), (6, 3, 0, 1), *steps(9, 1), (6, 6, 0, 2), *steps(12, 2),  # but for the sink
    ]  # fmt: skip
    again.calls.clear()
    rollout(again, schedule, noise, WINDOW, renoise=draws, recache="sink")
    assert (3, 9, 0, 2) in again.calls  # the whole window, whose first frames are the new sink


def test_frames_that_are_given(model):
    noise, draws, texts = inputs(model, frames=9)
    watched = Watched(model, texts)
    given = torch.randn(1, 16, 6, 4, 6, dtype=torch.float64)
    schedule = [(0, texts[0]), (6, texts[1]), (12, texts[2])]
    config = replace(WINDOW, steps=(1000,))
    video = rollout(watched, schedule, noise, config, renoise=draws, initial_latent=given, recache=True)
    assert video.shape[2] == 15
    assert watched.calls == [
        (0, 3, 0, 0), (3, 3, 0, 0), (0, 6, 0, 1), (6, 3, 1000, 1), (6, 3, 0, 1), (9, 3, 1000, 1), (6, 6, 0, 2),
        (12, 3, 1000, 2),
    ]  # fmt: skip
    same = rollout(model, [(0, texts[0]), (12, texts[2])], noise, config, renoise=draws, initial_latent=given)
    one = rollout(model, texts[0], noise, config, renoise=draws, initial_latent=given)
    assert torch.equal(same[:, :, :12], one[:, :, :12]) and not torch.equal(same[:, :, 12:], one[:, :, 12:])


@pytest.mark.parametrize("recache", [False, True, "sink"])
@pytest.mark.parametrize("more", [{}, {"rope": "relative"}, {"rope": "relative", "sink_ema": 0.9}], ids=str)
def test_batches_fused_passes_and_graphs(model, recache, more):
    noise, draws, texts = inputs(model, batch=2)
    schedule, config = [(0, texts[0]), (6, texts[1]), (15, texts[2])], replace(WINDOW, **more)
    expected = rollout(model, schedule, noise, config, renoise=draws, recache=recache)
    fused = rollout(model, schedule, noise, replace(config, fuse_cache_pass=True), renoise=draws, recache=recache)
    assert (fused - expected).abs().max() < 1e-12
    graphed = GraphedStudent(model, recorder=Recorder())
    for _ in range(2):
        replayed = rollout(graphed, schedule, noise, config, renoise=draws, recache=recache)
        assert (replayed - expected).abs().max() < 1e-11
    one = [(frame, text[:1]) for frame, text in schedule]
    alone = rollout(model, one, noise[:1], config, renoise=draws[:, :1], recache=recache)
    assert (alone - expected[:1]).abs().max() < 1e-12


@pytest.mark.parametrize("recache", [False, True])
@pytest.mark.parametrize("sink_ema", [None, 0.9])
def test_scene_cuts_in_batches_fused_passes_and_graphs(model, recache, sink_ema):
    """A cut's chunk alone is far away: its frames are near again for what follows, whoever computes it."""
    noise, draws, texts = inputs(model, batch=2)
    config = replace(WINDOW, rope="relative", sink_ema=sink_ema)
    schedule, cuts = [(0, texts[0]), (12, texts[1]), (18, texts[2])], (9, 12, 21)
    options = {"renoise": draws, "recache": recache}
    expected = rollout(model, schedule, noise, config, scene_cuts=cuts, **options)
    plain = rollout(model, schedule, noise, config, **options)
    assert torch.equal(expected[:, :, :9], plain[:, :, :9]) and (expected - plain)[:, :, 9:].abs().max() > 1e-3
    fused = rollout(model, schedule, noise, replace(config, fuse_cache_pass=True), scene_cuts=cuts, **options)
    assert (fused - expected).abs().max() < 1e-12
    graphed = GraphedStudent(model, recorder=Recorder())
    for _ in range(2):
        replayed = rollout(graphed, schedule, noise, config, scene_cuts=cuts, **options)
        assert (replayed - expected).abs().max() < 1e-11
    one = [(frame, text[:1]) for frame, text in schedule]
    alone = rollout(model, one, noise[:1], config, scene_cuts=cuts, renoise=draws[:, :1], recache=recache)
    assert (alone - expected[:1]).abs().max() < 1e-12


def test_the_keys_of_a_cut_are_turned_back(model):
    """In the first layer, where keys depend on the frame alone, a chunk that was far away leaves those of one that was not."""
    _, _, texts = inputs(model)
    x = torch.randn(1, 16, 6, 4, 6, dtype=torch.float64)
    near, far = (model.new_cache(1, 12, 4, 6, window=9, sink=3, rope="relative") for _ in range(2))
    for cache, options in ((near, {}), (far, {"rope": model.rope(45, 48, 2, 3)})):
        model(x[:, :, :3], torch.zeros(1, 3), texts[0], cache=cache)
        model(x[:, :, 3:], torch.zeros(1, 3), texts[0], cache=cache, start_frame=3, **options)
    assert (near.ordered(0).k - far.ordered(0).k).abs().max() > 0.1
    far.turn(3, 6, -42)
    assert (near.ordered(0).k - far.ordered(0).k).abs().max() < 1e-12


def test_without_a_window_all_frames_are_cached_again(model):
    noise, draws, texts = inputs(model, frames=12)
    watched = Watched(model, texts)
    rollout(watched, [(0, texts[0]), (9, texts[1])], noise, RolloutConfig(), renoise=draws, recache=True)
    assert (0, 9, 0, 1) in watched.calls


def test_refusals(model):
    noise, _, (a, b, c) = inputs(model, frames=9)

    def refused(match, text, config=WINDOW, **options):
        with pytest.raises(ValueError, match=match):
            stream(model, text, noise, config, **options)

    relative = replace(WINDOW, rope="relative")
    refused("needs a CausalWan, rope=", a, scene_cuts=(3,))
    refused("no guidance", a, replace(relative, guidance=3.0), scene_cuts=(3,), negative=b)
    refused("begins at frame 4 of scene_cuts", a, relative, scene_cuts=(3, 4))
    refused("begins at frame 0 of scene_cuts", a, relative, scene_cuts=(0,))
    refused("window of 48 reaches beyond", a, replace(relative, window=48), scene_cuts=(3,))
    refused("begins at frame 0", [(3, a), (6, b)])
    refused("rises", [(0, a), (6, b), (6, c)])
    refused("text of frame 9 would hold for no chunk", [(0, a), (9, b)])
    refused("text of frame 4 would hold for no chunk", [(0, a), (4, b), (5, c)])
    refused("frames \\[\\]", [])
    refused("schedule of several", a, recache=True)
    refused("recache must be", [(0, a), (3, b)], recache="all")
    refused("has none", [(0, a), (3, b)], replace(WINDOW, sink=0), recache="sink")

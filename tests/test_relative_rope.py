"""rope="relative": positions counted from the start of the window, against keys kept before rotation; the averaged sink; and
what training and recordings make of both."""

from dataclasses import replace

import pytest
import torch

from afd_fast.errors import ConfigError
from afd_fast.reference.transformer import apply_rope, rms_norm, rope_tables, visible_frames
from afd_fast.rollout import RolloutConfig, rollout
from afd_fast.students import CausalWan, CausalWanConfig
from afd_fast.students.wan.graphs import GraphedStudent
from afd_fast.training import runs
from afd_fast.training.velocity import Chunking, velocity
from tests.runs import changed
from tests.test_causal_wan_exact import chunked
from tests.test_graphs import Recorder

EXACT = 1e-12
RELATIVE = RolloutConfig(window=12, sink=3, rope="relative")
AVERAGED = RolloutConfig(window=9, sink=3, rope="relative", sink_ema=0.9)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return CausalWan(CausalWanConfig.tiny()).double().requires_grad_(False)


def inputs(model, frames, batch=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    x, clean = torch.randn(2, batch, 16, frames, 4, 6, generator=g, dtype=torch.float64)
    context = torch.randn(batch, 12, 24, generator=g, dtype=torch.float64)
    return x, clean, torch.rand(batch, frames, generator=g) * 1000, model.encode_text(context)


class RawKeys:
    """The definition: a layer's keys are kept before rotation; a block's visible frames, sink first, have positions 0, 1, ...,
    and its queries the last of them. Frames that leave are averaged into the sink one by one, as Reward-Forcing has it."""

    def __init__(self, model, window, sink, ema=None):
        self.model, self.window, self.sink, self.ema = model, window, sink, ema
        self.layers = [{} for _ in model.blocks]  # frame -> its (k, v)
        self.gone = [sink] * len(model.blocks)

    def run(self, x, t, text, start):
        self.block = range(start, start + x.shape[2])
        return self.model._unpatchify(self.model._transform(self.model._patchify(x), t, text, self), x)

    def __call__(self, layer, attn, q, k, v):
        end, kept, heads = self.block.stop, self.layers[layer], (attn.heads, q.shape[2] // attn.heads)
        q = rms_norm(q, attn.norm_q.weight).unflatten(-1, heads)
        pair = rms_norm(k, attn.norm_k.weight).unflatten(-1, heads), v.unflatten(-1, heads)
        while self.ema is not None and self.gone[layer] < end - self.window + self.sink:
            frame = self.gone[layer]
            slot = (frame - self.sink) % self.sink
            kept[slot] = tuple(self.ema * old + (1 - self.ema) * new for old, new in zip(kept[slot], kept[frame]))
            self.gone[layer] += 1
        for i, frame in enumerate(self.block):
            kept[frame] = tuple(a[:, i * 6 : (i + 1) * 6] for a in pair)
        seen = [f for a, b in visible_frames(end, self.window, self.sink) for f in range(a, b)]
        keys, values = (torch.cat([kept[f][i] for f in seen], 1) for i in (0, 1))
        tables = rope_tables(heads[1], (0, len(seen)), 2, 3, dtype=torch.float64)
        own = [table[-q.shape[1] :] for table in tables]
        return attn.attend(apply_rope(q, *own), apply_rope(keys, *tables), values)


def defined(model, x, clean, t, text, chunk, window, sink, ema=None):
    raw, out = RawKeys(model, window, sink, ema), []
    for start in range(0, x.shape[2], chunk):
        part = slice(start, start + chunk)
        out.append(raw.run(x[:, :, part], t[:, part], text, start))
        raw.run(clean[:, :, part], torch.zeros_like(t[:, part]), text, start)
    return torch.cat(out, 2)


@torch.no_grad()
@pytest.mark.parametrize("chunk, window, sink", [(3, 9, 3), (3, 7, 1), (1, 4, 2), (2, 5, 1), (3, 6, 0)])
def test_every_path_is_the_definition(model, chunk, window, sink):
    x, clean, t, text = inputs(model, frames=18)
    expected = defined(model, x, clean, t, text, chunk, window, sink)
    settings = {"window": window, "sink": sink, "rope": "relative"}
    cached = chunked(model, x, clean, t, text, chunk, **settings)
    assert (cached - expected).abs().max() < EXACT
    forced = model.forward_teacher_forcing(x, t, text, clean, chunk=chunk, **settings)
    assert (forced - expected).abs().max() < EXACT
    again = [
        model.forward_block_causal(
            torch.cat([clean[:, :, :start], x[:, :, start : start + chunk]], 2),
            torch.cat([torch.zeros_like(t[:, :start]), t[:, start : start + chunk]], 1),
            text, chunk, **settings,
        )[:, :, start:]
        for start in range(0, 18, chunk)
    ]  # fmt: skip
    assert (torch.cat(again, 2) - expected).abs().max() < EXACT
    absolute = (chunked(model, x, clean, t, text, chunk, window=window, sink=sink) - expected).abs().max()
    assert absolute > 1e-6 if sink else absolute < EXACT  # without a sink only differences of positions are seen


@torch.no_grad()
def test_averaged_sink_is_the_definition(model):
    x, clean, t, text = inputs(model, frames=24)
    cached = chunked(model, x, clean, t, text, 3, window=9, sink=3, rope="relative", sink_ema=0.9)
    assert (cached - defined(model, x, clean, t, text, 3, 9, 3, 0.9)).abs().max() < EXACT
    assert (cached - defined(model, x, clean, t, text, 3, 9, 3)).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("config", [RELATIVE, AVERAGED], ids=("relative", "averaged"))
def test_a_cache_that_is_used_again_forked_or_interrupted(model, config):
    """What is kept about the sink follows the buffers: a second stream in the same cache, two continuations of one history,
    a forward that failed and came again, a forward that writes nothing."""
    frames = 24
    x, clean, t, text = inputs(model, frames)
    expected = chunked(model, x, clean, t, text, 3, **config.history)
    cache = model.new_cache(2, frames, 4, 6, **config.history)

    def interrupt(*_):
        raise KeyboardInterrupt

    def step(cache, x, clean, start):
        part, one = slice(start, start + 3), slice(0, len(x))
        out = model(x[:, :, part], t[one, part], text[one], cache=cache, start_frame=start)
        if config.sink_ema is None:
            silent = model(x[:, :, part], t[one, part], text[one], cache=cache, start_frame=start, write=False)
            assert (silent - out).abs().max() < EXACT
        model(clean[:, :, part], torch.zeros(len(x), 3), text[one], cache=cache, start_frame=start)
        return out

    for _ in range(2):  # the second time over the first one's frames
        found = []
        for start in range(0, frames, 3):
            failing = model.blocks[-1].register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                step(cache, x, clean, start)
            failing.remove()
            found.append(step(cache, x, clean, start))
        assert (torch.cat(found, 2) - expected).abs().max() < EXACT

    rows, tail = [0, 0, 1, 1], torch.randn(4, 16, frames - 15, 4, 6, dtype=torch.float64)
    pair = [a.clone() for a in (x, clean)]
    shared = model.new_cache(2, frames, 4, 6, **config.history)
    for start in range(0, 15, 3):
        step(shared, *pair, start)
    text, t, clean, x = text[rows], t[rows], clean[rows], torch.cat([x[rows, :, :15], tail], 2)
    forked = shared.fork(2)
    together = torch.cat([step(forked, x, clean, start) for start in range(15, frames, 3)], 2)
    expected = chunked(model, x, clean, t, text, 3, **config.history)[:, :, 15:]
    assert (together - expected).abs().max() < EXACT


@torch.no_grad()
@pytest.mark.parametrize("config", [RELATIVE, AVERAGED], ids=("relative", "averaged"))
def test_fused_cache_pass(model, config):
    x, _, _, text = inputs(model, 24)
    draws = torch.randn(24, 2, 16, 3, 4, 6, dtype=torch.float64)
    plain = rollout(model, text, x, config, renoise=draws)
    fused = replace(config, fuse_cache_pass=True)
    assert (rollout(model, text, x, fused, renoise=draws) - plain).abs().max() < EXACT


@pytest.mark.parametrize("config", [RELATIVE, AVERAGED], ids=("relative", "averaged"))
def test_the_update_sees_the_samplers_positions(config):
    """The last denoising call of every chunk of a rollout, done again by the update from the finished latents."""
    torch.manual_seed(0)
    model = CausalWan(CausalWanConfig.tiny()).double()
    x, _, _, text = inputs(model, 24)
    text, calls = text.map(torch.Tensor.detach), []

    class Watched:
        def __getattr__(self, name):
            return getattr(model, name)

        def __call__(self, x, t, text, **options):
            v = model(x, t, text, **options)
            calls.append((x, v))
            return v

    with torch.no_grad():
        one = replace(config, steps=(500,))
        latents = rollout(Watched(), text, x, one)
    x_t, sampled = (torch.cat([call[i] for call in calls[::2]], 2) for i in (0, 1))  # every other call fills the cache
    sigma = 5 * 0.5 / (1 + 4 * 0.5)
    t = torch.full((2, 24), sigma, dtype=torch.float32).double()
    chunking = Chunking.of(3, config)
    v = velocity(model, x_t, t, text, latents, chunking)
    assert v.requires_grad and (v - sampled).abs().max() < 1e-6
    absolute = velocity(model, x_t, t, text, latents, Chunking(3, config.window, config.sink))
    assert (absolute - sampled).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("rope, frames", [("relative", 168), ("absolute", 45)])
def test_a_windowed_stream_replays_a_handful_of_graphs(rope, frames):
    """15 recordings for 168 latent frames: 3 places in the ring, 5 timesteps. And the numbers of the model."""
    torch.manual_seed(0)
    model = CausalWan(replace(CausalWanConfig.tiny(), num_layers=1)).double()
    x, _, _, text = inputs(model, frames, batch=1)
    config, recorder = RolloutConfig(window=12, sink=3, rope=rope), Recorder()
    draws = torch.randn(frames, 1, 16, 3, 4, 6, dtype=torch.float64)
    replayed = rollout(GraphedStudent(model, recorder=recorder), text, x, config, renoise=draws)
    assert (
        recorder.recorded == 15 and recorder.replayed == (frames // 3 - 6) * 5 - 1
    )  # six chunks until the ring is round
    assert (replayed - rollout(model, text, x, config, renoise=draws)).abs().max() < 1e-11


@torch.no_grad()
def test_averaged_sinks_in_graphs(model):
    x, _, _, text = inputs(model, 30, batch=1)
    graphed = GraphedStudent(model, recorder=Recorder())
    draws = torch.randn(30, 1, 16, 3, 4, 6, dtype=torch.float64)
    expected = rollout(model, text, x, AVERAGED, renoise=draws)
    for _ in range(2):
        assert (rollout(graphed, text, x, AVERAGED, renoise=draws) - expected).abs().max() < 1e-11


def test_refusals(model):
    for settings in (
        {"rope": "relative"},
        {"rope": "relativistic", "window": 6},
        {"sink_ema": 0.9, "window": 9, "sink": 3},
        {"sink_ema": 0.9, "window": 9, "sink": 1, "rope": "relative"},
        {"sink_ema": 0.9, "window": 10, "sink": 3, "rope": "relative"},
        {"sink_ema": 1.5, "window": 9, "sink": 3, "rope": "relative"},
        {"sink_ema": 0.9, "window": 9, "sink": 3, "rope": "relative", "independent_first_frame": True},
    ):
        with pytest.raises(ConfigError, match="rope|sink_ema"):
            RolloutConfig(**settings)
    for settings in ({"rope": "relative"}, {"rope": "x", "window": 6}, {"sink_ema": 0.9, "window": 9, "sink": 3}):
        with pytest.raises(ValueError, match="rope|sink_ema"):
            model.new_cache(1, 9, 4, 6, **settings)
    x, clean, t, text = inputs(model, 12, batch=1)
    with torch.no_grad(), pytest.raises(ValueError, match="sink_ema averages sink=3 frames"):
        chunked(model, x, clean, t, text, 2, window=9, sink=3, rope="relative", sink_ema=0.9)
    with pytest.raises(ConfigError, match="needs update.history=detached"):
        changed(runs.afd_table3(), rollout=AVERAGED, update__history="teacher_forcing", update__chunked=False)
    with pytest.raises(ValueError, match="set window"):
        model.forward_block_causal(x, t, text, rope="relative")

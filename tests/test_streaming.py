"""Streaming long tuning: shared prefixes, a reward for each clip, its gradient, constant memory, and the command."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from afd_fast import nft_loss
from afd_fast.errors import ConfigError
from afd_fast.reference.advantage import PerPromptStatTracker, reward_to_r
from afd_fast.students import CausalWan, CausalWanConfig
from afd_fast.students.lora import disabled, trainable
from afd_fast.students.wan.family import wan_system
from afd_fast.teachers.dataset import Shard
from afd_fast.training import checkpoint
from afd_fast.training import runs as recipes
from afd_fast.training.methods import streaming
from afd_fast.training.run_folder import read_rows
from afd_fast.training.state import generator, new_state
from afd_fast.training.step import loss_recipe, rollout_config
from afd_fast.training.update import student_velocity
from benchmarks.update import saved_bytes
from tests.test_trainer import command, same
from tests.test_wan_training import TINY, teacher  # noqa: F401  (a fixture)

CONFIG = replace(
    recipes.afd_table3(), student="tiny", discriminator="toy", disc_width=8, frames=6, height=6, width=10, stream=24,
    active_clips=2, window=9, sink=3, lora_rank=4, prompts_per_step=2, rollouts_per_prompt=2, shards=1, disc_warmup=0,
    prior_weight=0.1,
)  # fmt: skip
PROMPTS = ["a cat", "a cat", "a dog", "a dog"]


def make_state(config, double=False):
    system = wan_system(config)
    if double:
        torch.manual_seed(0)
        system.student = CausalWan(replace(CausalWanConfig.tiny(), num_layers=2)).double().requires_grad_(False)
        encode, decode = system.encode, system.decode
        system.encode = lambda prompts: [x.double() for x in encode(prompts)]
        system.decode = lambda latents: decode(latents.float())
    state = new_state(config, system)
    for p in trainable(state.student).values():
        p.data = p.data.to(next(state.student.parameters()).dtype)
        torch.nn.init.normal_(p, std=0.05, generator=generator(0, 0, "adapters"))
    state.ema.shadow = {n: p.detach().clone() for n, p in trainable(state.student).items()}
    return state


def shard(system):
    g = torch.Generator().manual_seed(0)
    return Shard(0, PROMPTS, torch.rand(4, 3, *system.video, generator=g))


def test_continuations_share_their_prefix_and_are_the_samplers():
    state = make_state(CONFIG)
    x = streaming.continuations(state, CONFIG, PROMPTS, generator(0, 0, "r"), range(12, 24))
    assert x.shape == (4, 16, 24, 6, 10)
    assert torch.equal(x[0, :, :12], x[1, :, :12]) and torch.equal(x[2, :, :12], x[3, :, :12])
    assert not torch.equal(x[0, :, :12], x[2, :, :12])
    for a, b in ((0, 1), (2, 3)):
        assert all(not torch.equal(x[a, :, f], x[b, :, f]) for f in range(12, 24))
    first = streaming.continuations(state, CONFIG, PROMPTS, generator(0, 0, "r"), range(0, 12))
    assert first.shape[2] == 12 and not torch.equal(first[0], first[1])


def test_clips_are_as_long_as_the_teachers_and_see_the_frames_before():
    state = make_state(CONFIG)
    x = torch.randn(1, 16, 24, 6, 10)
    whole, part = (streaming.clip(state.system, CONFIG, x, first) for first in (0, 6))
    assert whole.shape == part.shape == (1, 3, *state.system.video)
    x[:, :, 5] += 1  # the decoder's history, not the clip itself
    assert not torch.equal(streaming.clip(state.system, CONFIG, x, 6), part)


@pytest.mark.parametrize("v_old", ["self", "ema"])
def test_gradient_is_that_of_the_active_clips_with_rewards_of_their_own(monkeypatch, v_old):
    recipe = {"self": "afd", "ema": "diffusionnft"}[v_old]
    config = replace(CONFIG, v_old=v_old, recipe=recipe)
    state = make_state(config, double=True)
    if v_old == "ema":
        state.ema.shadow = {n: p * 0.5 for n, p in state.ema.shadow.items()}
    system, student = state.system, state.student
    found = {}

    def keep(state, config, ranks):
        found.update({n: p.grad.clone() for n, p in trainable(state.student).items()})
        return 0.0

    monkeypatch.setattr("afd_fast.training.step.optimise", keep)
    monkeypatch.setattr(state.discriminator, "score", lambda v, p: v.detach().flatten(1).sum(1) + 0 * state.discriminator.head.weight.sum())  # fmt: skip
    config = replace(config, r1=0.0, instance_noise=0.0)
    part = shard(system)
    state.step = next(s for s in range(9) if torch.randint(3, (), generator=generator(config.seed, s, "place")) == 1)
    rng = lambda purpose: generator(config.seed, state.step, purpose)
    active, step = range(6, 18), state.step
    x0 = streaming.continuations(state, config, PROMPTS, rng("rollout"), active)
    metrics = streaming.stream_step(state, config, [part])
    assert metrics["place"] == 6
    state.step = step

    videos = [streaming.clip(system, config, x0, first) for first in (6, 12)]
    rewards = torch.stack([v.flatten(1).sum(1) for v in videos], 1)  # [b, A]
    r = torch.empty(4, 2)
    tracker = PerPromptStatTracker(config.global_std)
    names = [f"{p}{c}" for c in range(2) for p in PROMPTS]
    r = reward_to_r(tracker.update(names, rewards.T.flatten()).float(), clip=5.0).view(2, 4).T
    assert (r[0] - r[1]).abs().min() > 1e-3 and (r[:, 0] - r[:, 1]).abs().max() > 1e-3

    g = rng("update")
    t = (torch.rand(4, 6, generator=g, dtype=torch.float64) * 0.96 + 0.04).repeat_interleave(3, 1)
    noise = torch.randn(x0.shape, generator=g, dtype=torch.float64)
    wide = t[:, None, :, None, None]
    x_t = (1 - wide) * x0 + wide * noise
    run = lambda: student_velocity(
        student, x_t, t, student.encode_text(system.encode(PROMPTS)), x0, 3, active=active, window=9, sink=3
    )
    with torch.no_grad():
        with disabled(student):
            v_ref = run()
        with state.ema.applied(student):
            v_old_ = run() if v_old == "ema" else None
    v, loss = run(), 0
    for c in range(2):
        here, there = slice(6 * c, 6 * c + 6), slice(6 + 6 * c, 12 + 6 * c)
        own = nft_loss(
            v[:, :, here], x0[:, :, there], r[:, c], t[:, there], frame_dim=2, noise=noise[:, :, there],
            v_ref=v_ref[:, :, here], v_old=None if v_old_ is None else v_old_[:, :, here], recipe=loss_recipe(config),
        )  # fmt: skip
        loss = loss + (own / 3 if loss_recipe(config).batch_reduction == "mean" else own)  # 3 clips up to there
    parameters = trainable(student)
    want = torch.autograd.grad(loss, list(parameters.values()))
    scale = max(w.abs().max() for w in want)
    assert scale > 1e-6
    for name, w in zip(parameters, want):
        assert (found[name] - w).abs().max() <= 1e-9 * scale, name


def test_memory_does_not_grow_with_the_stream(monkeypatch):
    """The most bytes kept for backward in a whole iteration, and the cache's, at the end of 12 and of 66 latent frames."""
    caches, sizes = [], {}
    new_cache = CausalWan.new_cache
    monkeypatch.setattr(CausalWan, "new_cache", lambda *a, **k: caches.append(new_cache(*a, **k)) or caches[-1])
    monkeypatch.setattr(streaming.torch, "randint", lambda high, *a, **k: torch.tensor(high - 1))  # the last place
    for frames in (12, 66):
        config = replace(CONFIG, stream=frames, active_clips=1)
        state = make_state(config)
        caches.clear()
        kept = saved_bytes(partial(streaming.stream_step, state, config, [shard(state.system)]))
        sizes[frames] = kept, max(cache.nbytes for cache in caches)
        assert all(torch.isfinite(p).all() for p in trainable(state.student).values())
    latents = 4 * 16 * 66 * 6 * 10 * 4
    assert sizes[66][0] <= sizes[12][0] + latents and sizes[66][1] == sizes[12][1]


def test_command_trains_resumes_and_refuses(tmp_path, teacher):  # noqa: F811
    keys = [*TINY, teacher, "stream=18", "window=9", "sink=3", "active_clips=2"]
    run = lambda out, *more: command("train", "afd_table3", *keys, "--out", out, *more)
    whole, stopped = run(tmp_path / "whole"), run(tmp_path / "stopped")
    while not list((tmp_path / "stopped").glob("checkpoints/step-*.pt")):
        assert stopped.poll() is None, stopped.stdout.read()
    stopped.kill()
    stopped.wait()
    assert whole.wait() == 0, whole.stdout.read()
    again = run(tmp_path / "stopped", "--resume")
    assert again.wait() == 0, again.stdout.read()
    state = lambda name: checkpoint.load(checkpoint.latest(tmp_path / name / "checkpoints"))["state"]
    assert same(state("whole"), state("stopped"))
    rows = read_rows(tmp_path / "whole/metrics.jsonl")
    assert len({row["place"] for row in rows}) > 1 and rows[-1]["grad_norm"] > 0
    for bad in ({"stream": 20}, {"active_clips": 9}, {"method": "gan"}):
        with pytest.raises(ConfigError):
            replace(CONFIG, **bad)
    refused = command("train", "demo", "stream=42", "--out", tmp_path / "x")
    assert refused.wait() == 2 and "need a Wan student" in refused.stdout.read()


def test_window_of_training_is_the_samplers():
    assert (rollout_config(CONFIG, 3).window, rollout_config(CONFIG, 3).sink) == (9, 3)

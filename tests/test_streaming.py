"""Streaming long tuning: shared prefixes, a reward for each clip, its gradient, constant memory, and the command."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from afd_fast import nft_loss, nft_recipe
from afd_fast.errors import ConfigError
from afd_fast.reference.advantage import PerPromptStatTracker, reward_to_r
from afd_fast.students import CausalWan, CausalWanConfig
from afd_fast.students.lora import disabled, trainable
from afd_fast.students.student import family
from afd_fast.teachers.dataset import Shard
from afd_fast.training import checkpoint, rollouts, runs
from afd_fast.training.loop import train_step
from afd_fast.training.run import Run
from afd_fast.training.run_folder import read_rows
from afd_fast.training.state import generator, new_state
from afd_fast.training.velocity import velocity
from benchmarks.update import saved_bytes
from tests.runs import changed
from tests.test_trainer import command, same, wait_for_checkpoint
from tests.test_wan_training import TINY, teacher  # noqa: F401  (a fixture)

CONFIG = changed(
    runs.afd_table3(), student__name="tiny", discriminator__name="toy", discriminator__width=8, student__frames=6,
    student__height=6, student__width=10, stream__frames=24, stream__active_clips=2, rollout__window=9, rollout__sink=3,
    student__lora_rank=4, prompts_per_step=2, rollouts_per_prompt=2, shards=1, loss__ref_coef=0.1,
)  # fmt: skip
PROMPTS = ["a cat", "a cat", "a dog", "a dog"]


def make_run(config, double=False):
    made = family(config.student, chunk=3, seed=config.seed)
    if double:
        torch.manual_seed(0)
        made.student = CausalWan(replace(CausalWanConfig.tiny(), num_layers=2)).double().requires_grad_(False)
        encode, decode = made.text, made.vae.decode
        made.text = lambda prompts: [x.double() for x in encode(prompts)]
        made.vae.decode = lambda latents: decode(latents.float())
    run = Run(config, new_state(config, made))
    for p in trainable(made.student).values():
        p.data = p.data.to(next(made.student.parameters()).dtype)
        torch.nn.init.normal_(p, std=0.05, generator=generator(0, 0, "adapters"))
    run.state.ema.shadow = {n: p.detach().clone() for n, p in trainable(made.student).items()}
    return run


def shard(run):
    g = torch.Generator().manual_seed(0)
    return Shard(0, PROMPTS, torch.rand(4, 3, *run.family.video[:3], generator=g))


def test_continuations_share_their_prefix_and_are_the_samplers():
    run = make_run(CONFIG)
    draw = lambda active: rollouts.continuations(run, PROMPTS, generator(0, 0, "r"), active)
    x = draw(range(12, 24))
    assert x.shape == (4, 16, 24, 6, 10)
    assert torch.equal(x[0, :, :12], x[1, :, :12]) and torch.equal(x[2, :, :12], x[3, :, :12])
    assert not torch.equal(x[0, :, :12], x[2, :, :12])
    for a, b in ((0, 1), (2, 3)):
        assert all(not torch.equal(x[a, :, f], x[b, :, f]) for f in range(12, 24))
    first = draw(range(0, 12))
    assert first.shape[2] == 12 and not torch.equal(first[0], first[1])


def test_clips_are_as_long_as_the_teachers_and_see_the_frames_before():
    run = make_run(CONFIG)
    x = torch.randn(1, 16, 24, 6, 10)
    whole, part = (rollouts.clip(run, x, first) for first in (0, 6))
    assert whole.shape == part.shape == (1, 3, *run.family.video[:3])
    x[:, :, 5] += 1  # the decoder's history, not the clip itself
    assert not torch.equal(rollouts.clip(run, x, 6), part)


@pytest.mark.parametrize("v_old", ["self", "ema"])
def test_gradient_is_that_of_the_active_clips_with_rewards_of_their_own(monkeypatch, v_old):
    recipe = nft_recipe({"self": "afd", "ema": "diffusionnft"}[v_old], beta=0.1, ref_coef=0.1)
    rope = {"self": "absolute", "ema": "relative"}[v_old]
    config = changed(CONFIG, update__v_old=v_old, loss=recipe, rollout__rope=rope)
    run = make_run(config, double=True)
    state, student = run.state, run.family.student
    if v_old == "ema":
        state.ema.shadow = {n: p * 0.5 for n, p in state.ema.shadow.items()}
    found = {}

    def keep(run):
        found.update({n: p.grad.clone() for n, p in trainable(run.family.student).items()})
        return 0.0

    monkeypatch.setattr("afd_fast.training.update.optimise", keep)
    monkeypatch.setattr(state.discriminator, "score", lambda v, p: v.detach().flatten(1).sum(1) + 0 * state.discriminator.head.weight.sum())  # fmt: skip
    part = shard(run)
    state.step = next(s for s in range(9) if torch.randint(3, (), generator=generator(config.seed, s, "place")) == 1)
    rng = lambda purpose: generator(config.seed, state.step, purpose)
    active, step = range(6, 18), state.step
    x0 = rollouts.continuations(run, PROMPTS, rng("rollout"), active)
    metrics = train_step(run, [part])
    assert metrics["place"] == 6
    state.step = step

    videos = [rollouts.clip(run, x0, first) for first in (6, 12)]
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
    compute = lambda: velocity(student, x_t, t, student.encode_text(run.family.text(PROMPTS)), x0, run.chunking(active))
    with torch.no_grad():
        with disabled(student):
            v_ref = compute()
        with state.ema.applied(student):
            v_old_ = compute() if v_old == "ema" else None
    v, loss = compute(), 0
    for c in range(2):
        there = slice(6 + 6 * c, 12 + 6 * c)
        own = nft_loss(
            v[:, :, there], x0[:, :, there], r[:, c], t[:, there], frame_dim=2, noise=noise[:, :, there],
            v_ref=v_ref[:, :, there], v_old=None if v_old_ is None else v_old_[:, :, there], recipe=recipe,
        )  # fmt: skip
        loss = loss + (own / 3 if recipe.batch_reduction == "mean" else own)  # 3 clips up to there
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
    monkeypatch.setattr(rollouts.torch, "randint", lambda high, *a, **k: torch.tensor(high - 1))  # the last place
    for frames in (12, 66):
        run = make_run(changed(CONFIG, stream__frames=frames, stream__active_clips=1))
        caches.clear()
        kept = saved_bytes(partial(train_step, run, [shard(run)]))
        sizes[frames] = kept, max(cache.nbytes for cache in caches)
        assert all(torch.isfinite(p).all() for p in trainable(run.family.student).values())
    latents = 4 * 16 * 66 * 6 * 10 * 4
    assert sizes[66][0] <= sizes[12][0] + latents and sizes[66][1] == sizes[12][1]


def test_command_trains_resumes_and_refuses(say, tmp_path, teacher):  # noqa: F811
    keys = [*TINY, teacher, "stream.frames=18", "rollout.window=9", "rollout.sink=3", "stream.active_clips=2"]
    words = lambda out: ["train", "afd_table3", *keys, "--out", out]
    stopped = command(*words(tmp_path / "stopped"))
    wait_for_checkpoint(tmp_path / "stopped", stopped)
    stopped.kill()
    stopped.wait()
    assert say(*words(tmp_path / "whole"))[0] == 0
    assert say(*words(tmp_path / "stopped"), "--resume")[0] == 0
    state = lambda name: checkpoint.load(checkpoint.latest(tmp_path / name / "checkpoints"))["state"]
    assert same(state("whole"), state("stopped"))
    rows = read_rows(tmp_path / "whole/metrics.jsonl")
    assert len({row["place"] for row in rows}) > 1 and rows[-1]["grad_norm"] > 0
    for bad in ({"stream__frames": 20}, {"stream__active_clips": 9}, {"method": "gan"}):
        with pytest.raises(ConfigError, match="stream"):
            make_run(changed(CONFIG, **bad))
    status, said = say("train demo stream.frames=42")
    assert status == 2 and "need a Wan student" in said


def test_window_of_training_is_the_samplers():
    run = make_run(CONFIG)
    assert (run.sampler.window, run.sampler.sink) == (run.chunking().window, run.chunking().sink) == (9, 3)

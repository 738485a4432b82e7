"""AFD on long rollouts, a part at a time: streaming long tuning with a rolling cache.

One iteration: a place in the stream is drawn -> the prefix up to it, rolled out once a prompt -> K continuations of every
prompt that share it, so that what follows alone tells them apart -> every clip of theirs is judged against a teacher's
video and gets an r of its own -> the gradient of these clips, over the prefix as detached history.

Memory does not grow with the stream beyond its latents: the cache holds `window` frames (`sink` of them the first ones), the
update one chunk's activations, the decoder one clip. Time grows with the place only through passes without gradient.

Legend: b rows of a shard, K of them a prompt, A active clips of f = `frames` latent frames; F0 frames of the prefix.
"""

import torch
from torch import Tensor

from afd_fast.config import TrainConfig
from afd_fast.teachers.dataset import Shard
from afd_fast.training.distributed import Ranks
from afd_fast.training.state import System, TrainState, generator
from afd_fast.training.step import (
    discriminator_update,
    optimality,
    phase,
    sample_policy,
    set_learning_rate,
    student_update,
)
from afd_fast.video_io import deliver


def stream_step(
    state: TrainState, config: TrainConfig, shards: list[Shard], ranks: Ranks = Ranks()
) -> dict[str, float]:
    """One iteration on this rank's shards. Returns metrics, averaged over all ranks; `place` is the first active frame."""
    seconds: dict[str, float] = {}
    rng = lambda purpose, shard=0: generator(config.seed, state.step, purpose, shard)
    learning_student = set_learning_rate(state, config)
    places = config.stream // config.frames - config.active_clips + 1
    start = config.frames * int(torch.randint(places, (), generator=rng("place")))
    active = range(start, start + config.frames * config.active_clips)
    with phase("rollout", seconds):
        x0 = [continuations(state, config, s.prompts, rng("rollout", s.index), active) for s in shards]
    home = next(state.discriminator.parameters()).device
    with phase("decode", seconds):  # clip by clip: [A * b, 3, ...]
        firsts = range(active.start, active.stop, config.frames)
        videos = [torch.cat([clip(state.system, config, x, a) for a in firsts]).to(home) for x in x0]
    with phase("discriminator", seconds):
        noises = [rng("discriminator", s.index) for s in shards]
        pairs = [
            (s.teacher.to(home).repeat(config.active_clips, 1, 1, 1, 1), video, s.prompts * config.active_clips, noise)
            for s, video, noise in zip(shards, videos, noises)
        ]
        for _ in range(config.disc_steps):
            metrics = discriminator_update(state, config, pairs, ranks)
    with phase("score", seconds), torch.no_grad():
        scores = [state.discriminator.score(video, words) for _, video, words, _ in pairs]
    r, rewards = optimality(state, config, shards, scores, ranks, config.active_clips)
    metrics |= rewards | {"place": float(start)}
    if learning_student:
        with phase("update", seconds):
            parts = []
            for s, x, own in zip(shards, x0, r):
                of_clips = own.view(config.active_clips, -1).T.to(x.device)  # [b, A]
                before = of_clips.new_zeros(len(x), start // config.frames)  # of the prefix, not trained
                parts.append((x, torch.cat([before, of_clips], 1), s.prompts, rng("update", s.index)))
            metrics |= student_update(state, config, parts, ranks, active=active)
    state.step += 1
    return ranks.mean(metrics | seconds)


def continuations(state: TrainState, config: TrainConfig, prompts: list[str], rng, active: range) -> Tensor:
    """Latents [b, C, F0 + A f, H, W] of prompts [b], K rows a prompt that are the same up to the active frames."""
    lagged, k, rows = config.v_old == "ema", config.rollouts_per_prompt, []
    for prompt in prompts[::k]:
        prefix = None
        if active.start:
            prefix = sample_policy(state, config, [prompt], rng, lagged, frames=active.start)
        own = sample_policy(state, config, [prompt] * k, rng, lagged, frames=len(active), history=prefix)
        rows.append(own if prefix is None else torch.cat([prefix.expand(k, -1, -1, -1, -1), own], 2))
    return torch.cat(rows)


def clip(system: System, config: TrainConfig, latents: Tensor, first: int) -> Tensor:
    """The finished video [b, 3, F, H, W] of a clip's latent frames from `first` on, as long as a teacher's. The chunk
    before goes through the decoder with them, for its history, and is cut off."""
    before = min(first, system.chunk)
    pixels = system.decode(latents[:, :, first - before : first + system.shape[1]])
    return deliver(pixels[:, :, -system.video[0] :], config.codec_crf)

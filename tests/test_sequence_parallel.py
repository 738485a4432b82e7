"""Ranks that share the tokens and heads of a student: four real gloo processes give what one gives, forward and backward."""

import json
import multiprocessing
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from afd_fast.config import with_overrides
from afd_fast.errors import ConfigError
from afd_fast.rollout import RolloutConfig, rollout
from afd_fast.students import CausalWan, CausalWanConfig, TwoExperts
from afd_fast.students.student import Family, LatentFormat
from afd_fast.teachers.dataset import Shard
from afd_fast.training import runs
from afd_fast.training.distributed import Ranks
from afd_fast.training.loop import train_step
from afd_fast.training.run import Run
from afd_fast.training.state import new_state
from afd_fast.training.velocity import Chunking, velocity
from afd_fast.video_io import VideoFormat
from tests.runs import changed

SIZE = (8, 8)  # latents: 16 tokens per frame
ROLLOUTS = {
    "chunks": RolloutConfig(steps=(1000, 500)),
    "window": RolloutConfig(steps=(1000, 500), chunk=1, window=4, sink=1, rope="relative"),
    "fused cache pass": RolloutConfig(steps=(1000, 500), fuse_cache_pass=True),
    "guidance": RolloutConfig(steps=(1000, 500), guidance=2.0),
    "recomputed": RolloutConfig(steps=(1000, 500), window=6, recompute=True),
}
HISTORIES = ("detached", "teacher_forcing", "block_causal")
CONFIG = changed(
    runs.afd_table3(), student__name="tiny", student__frames=6, student__height=8, student__width=8, student__lora_rank=0,
    discriminator__name="toy", discriminator__width=8, stream__frames=12, rollout__window=9, rollout__sink=3,
    prompts_per_step=2, rollouts_per_prompt=2, shards=2, loss__ref_coef=0.1, loss__batch_reduction="mean",
)  # fmt: skip
CLIPS = torch.rand(2, 2, 3, 21, 64, 64, generator=torch.Generator().manual_seed(0))
SHARDS = [Shard(i, [f"a {name}"] * 2, CLIPS[i]) for i, name in enumerate(("cat", "dog"))]


class Enlarged:
    """In the place of a VAE: three channels of the latents, larger."""

    def encode(self, videos):
        raise NotImplementedError

    def decode(self, latents):
        size = (4 * latents.shape[2] - 3, 64, 64)
        return torch.nn.functional.interpolate(latents[:, :3].float(), size=size).sigmoid()


def numbers(pair, context, noise, add_up):
    """Rollouts, velocities and their gradients [P], by name."""
    found, student = {}, pair.high
    with torch.no_grad():
        rng = torch.Generator().manual_seed(2)
        found["two experts"] = rollout(pair, pair.encode_text(context), noise, ROLLOUTS["chunks"], generator=rng)
        text, negative = student.encode_text(context), student.encode_text(context[:1] + 1)
        for name, config in ROLLOUTS.items():
            more = {} if config.guidance is None else {"negative": negative}
            rng = torch.Generator().manual_seed(2)
            found[name] = rollout(student, text, noise, config, generator=rng, **more)
    for history in HISTORIES:
        student.zero_grad()
        t = torch.tensor([0.1, 0.9], dtype=torch.float64).repeat_interleave(3).expand(2, -1)
        v = velocity(student, noise, t, student.encode_text(context), 0.5 * noise, Chunking(3), history)
        v.square().sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in student.parameters()])
        add_up(gradient)
        found |= {history: v.detach(), f"{history}, gradient": gradient}
    return found


def forwards(groups):
    """The largest difference of each group's numbers from one process's, relative."""
    torch.manual_seed(0)
    pair = TwoExperts(*(CausalWan(CausalWanConfig.tiny()).double() for _ in range(2)), 875)
    for p in pair.parameters():
        p.data = torch.randn(p.shape, dtype=p.dtype) * (0.3 if p.ndim == 1 else p.shape[1:].numel() ** -0.5)
    noise = torch.randn(2, 16, 6, *SIZE, dtype=torch.float64)
    context = torch.randn(2, 5, 24, dtype=torch.float64)
    alone = numbers(pair, context, noise, lambda gradient: None)
    found = []
    for group in groups:
        pair.split_sequence(group, *SIZE)
        shared = numbers(pair, context, noise, partial(dist.all_reduce, group=group))
        found.append(max(((shared[k] - alone[k]).abs().max() / alone[k].abs().max()).item() for k in alone))
    return found


def tiny():
    """A family whose networks need no other library."""
    torch.manual_seed(0)
    student = CausalWan(CausalWanConfig.tiny()).requires_grad_(False)
    for p in student.parameters():
        torch.nn.init.normal_(p, std=0.1)
    words = {f"a {name}": torch.randn(5, 24) for name in ("cat", "dog")}
    return Family(
        "tiny", student, lambda prompts: [words[p] for p in prompts], Enlarged(), LatentFormat(16, 6, *SIZE), 3,
        VideoFormat(21, 64, 64, 16.0),
    )  # fmt: skip


def iteration(config, ranks):
    """An iteration's metrics and the student after it."""
    made = tiny()
    run = Run(config, new_state(config, made), ranks)
    ranks.split_sequence(*SIZE, made.student, run.state.reference)
    metrics = train_step(run, [SHARDS[i] for i in ranks.share(config.shards)])
    weights = torch.cat([p.detach().flatten() for p in run.state.weights.values()])
    return {k: v for k, v in metrics.items() if not k.startswith("seconds")}, weights


def child(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=4)
    two, _ = dist.new_subgroups(2)
    found = dict(zip(("two", "four"), forwards([two, dist.group.WORLD])))
    ranks = Ranks(rank, 4).together(2)
    for config in (CONFIG, changed(CONFIG, method="gan", stream__frames=None)):
        metrics, weights = iteration(config, Ranks())
        shared_metrics, shared_weights = iteration(changed(config, sequence_parallel=2), ranks)
        away = [abs(metrics[k] - shared_metrics[k]) / (abs(metrics[k]) + 1e-3) for k in metrics]
        step = (
            weights - shared_weights
        ).abs().max().item() / CONFIG.update.lr  # AdamW enlarges tiny gradients' rounding
        found[config.method] = (max(away), step, metrics["grad_norm"])
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_four_processes_are_one(tmp_path):
    """Two and four ranks on one sequence in float64; then two groups of two on a shard each, which stream (afd) or not (gan),
    train every weight against a frozen copy and judge: the iteration of one process."""
    multiprocessing.set_forkserver_preload([__name__])
    torch.multiprocessing.start_processes(child, (tmp_path,), nprocs=4, start_method="forkserver")
    for rank in range(4):
        row = json.loads((tmp_path / f"{rank}.json").read_text())
        assert row["two"] < 1e-13 and row["four"] < 1e-13, row
        for method in ("afd", "gan"):
            away, step, grad_norm = row[method]
            assert away < 1e-4 and step < 0.1 and grad_norm > 1e-3, row


def test_what_cannot_be_shared_is_refused(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda group: 3)
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    student = CausalWan(CausalWanConfig.tiny())
    with pytest.raises(ValueError, match="3 ranks cannot share 4 heads"):
        student.split_sequence("group", *SIZE)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 4)
    made = tiny()
    with pytest.raises(
        ConfigError, match=r"sequence_parallel=4: 4 ranks cannot share the 15 tokens of a frame \(3x5\)"
    ):
        Ranks(0, 4, split=4, peers="group").split_sequence(6, 10, made.student)
    made.student.split_sequence("group", *SIZE)
    with pytest.raises(ValueError, match="cannot share the 15 tokens"):
        made.student.new_cache(1, 3, 6, 10)
    with pytest.raises(ConfigError, match="leave out graphs"):
        made.student.graphed()
    assert Ranks().together(4) == Ranks()  # one process is a group of its own
    with pytest.raises(ConfigError, match="sequence_parallel=4 cannot be formed by 6 processes"):
        Ranks(0, 6).together(4)
    with pytest.raises(ConfigError, match="shards=3 cannot be shared by 2 groups of 2 processes: set shards=2"):
        Ranks(0, 4, split=2).share(3)
    with pytest.raises(ConfigError, match="graphs cannot hold"):
        with_overrides(runs.afd_table3(), ["rollout.graphs=true", "sequence_parallel=2"])

"""Two real gloo processes under torchrun are one process with two shards, bit for bit; and they resume."""

import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file

from afd_fast.config import TrainConfig
from afd_fast.discriminators import Discriminator
from afd_fast.errors import ConfigError
from afd_fast.students.toy import shipped
from afd_fast.teachers.dataset import Shard
from afd_fast.training import checkpoint, distributed, rollouts, runs, update
from afd_fast.training.distributed import PATIENCE, Ranks, local, whole
from afd_fast.training.loop import train_step
from afd_fast.training.run import Run
from afd_fast.training.run_folder import read_rows
from afd_fast.training.state import new_state
from afd_fast.training.update import Targets
from tests.runs import changed, toy_run
from tests.test_sequence_parallel import tiny as tiny_family
from tests.test_trainer import TINY, same, wait_for_rows

TWO = [a for a in TINY if not a.startswith("prompts_per_step")] + ["prompts_per_step=4", "shards=2"]


def run(out, folder_teacher, *more, processes=1):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    start = ["-m"] if processes == 1 else torchrun
    return subprocess.Popen(
        [sys.executable, *start, "afd_fast", "train", "demo", *TWO, f"teacher=folder:{folder_teacher}", "--out", out, *more],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def final_state(out):
    return checkpoint.load(checkpoint.latest(out / "checkpoints"))["state"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, folder_teacher):
    """The folder of one process's run."""
    out = tmp_path_factory.mktemp("alone") / "run"
    job = run(out, folder_teacher)
    assert job.wait() == 0, job.stdout.read()
    return out


def test_two_processes_are_one_also_after_a_stop(tmp_path, folder_teacher, alone):
    together, stopped = tmp_path / "together", tmp_path / "stopped"
    job = run(together, folder_teacher, processes=2)
    assert job.wait() == 0, job.stdout.read()
    assert final_state(alone)["step"] == 6 and same(final_state(alone), final_state(together))
    numbers = lambda out: [
        {k: v for k, v in row.items() if "seconds" not in k and k != "elapsed"}
        for row in read_rows(out / "metrics.jsonl")
    ]
    for a, b in zip(numbers(alone), numbers(together), strict=True):
        assert a.keys() == b.keys() and all(abs(a[k] - b[k]) <= 1e-5 * abs(a[k]) + 1e-7 for k in a)

    job = run(stopped, folder_teacher, processes=2)
    wait_for_rows(stopped / "metrics.jsonl", 3)
    job.send_signal(signal.SIGTERM)  # torchrun passes it on
    assert job.wait() != 0
    assert final_state(stopped)["step"] < 6
    job = run(stopped, folder_teacher, "--resume")  # on another number of processes
    assert job.wait() == 0, job.stdout.read()
    assert same(final_state(alone), final_state(stopped))


def test_shards_are_shared_out_evenly_or_refused():
    assert [list(Ranks(rank, 2).share(4)) for rank in (0, 1)] == [[0, 1], [2, 3]]
    with pytest.raises(ConfigError, match="set shards=3"):
        Ranks(0, 3).share(4)


def test_alone_nothing_is_exchanged():
    rewards = torch.rand(3)
    assert (
        Ranks().gather(["a", "b", "c"], rewards)[1] is rewards
        and Ranks().any(True)
        and Ranks().mean({"x": 2}) == {"x": 2}
    )


PATIENT = """
import datetime, sys, time
import torch.distributed.distributed_c10d as c10d
c10d._get_default_timeout = lambda backend: datetime.timedelta(seconds=3)  # gloo's 30 minutes, NCCL's 10, scaled down
from afd_fast.errors import AFDError
from afd_fast.training.distributed import job
with job() as ranks:
    work = lambda: ranks.lead and time.sleep(5)
    with ranks.lead_first():
        work()
    with ranks.led():
        work()
    work()
    ranks.wait()
    print(f"alive {ranks.rank} {ranks.any(ranks.rank == 1)}\\n", end="", flush=True)  # one write: two processes share a pipe
    try:
        with ranks.led():
            assert not ranks.lead, "out of paper"
    except (AFDError, AssertionError) as error:
        print(f"{type(error).__name__} {error}\\n", end="", flush=True)
"""


def test_ranks_wait_for_rank_0_beyond_the_timeout_and_hear_of_its_failure(tmp_path):
    (tmp_path / "child.py").write_text(PATIENT)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *torchrun, str(tmp_path / "child.py")], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        "AssertionError out of paper", "TrainingError rank 0 stopped: out of paper", "alive 0 True", "alive 1 True"
    ]  # fmt: skip


def test_with_nccl_too_ranks_wait_for_rank_0_in_a_gloo_group(monkeypatch):
    """NCCL's timeout runs from the start of a collective, so none may be queued while rank 0 works."""
    begun, made, groups = [], [], []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name, stand_in in {
        "init_process_group": begun.append, "destroy_process_group": lambda: None, "get_rank": lambda: 1,
        "get_world_size": lambda: 2, "new_group": lambda **options: made.append(options) or "patient",
        "broadcast_object_list": lambda told, src, group=None: groups.append(group),
        "barrier": lambda group=None: groups.append(group), "all_reduce": lambda *a, **k: groups.append("default"),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.distributed, name, stand_in)
    with distributed.job() as ranks:
        with ranks.lead_first():
            pass
        with ranks.led():
            pass
        ranks.wait()
    assert begun == ["nccl"] and made == [{"backend": "gloo", "timeout": PATIENCE}] and groups == ["patient"] * 3


def test_every_shard_draws_its_own_numbers(monkeypatch):
    seen = []
    for place, name in ((rollouts, "sample_policy"), (Discriminator, "paired_loss"), (update, "student_backward")):
        real = getattr(place, name)
        note = lambda *a, real=real, **k: (
            seen.append(next(x for x in (*a, *k.values()) if isinstance(x, torch.Generator)).initial_seed()),
            real(*a, **k),
        )[1]
        monkeypatch.setattr(place, name, note)
    config = changed(
        TrainConfig(), discriminator__warmup=0, prompts_per_step=2, rollouts_per_prompt=2, shards=2,
        student__lora_rank=4, discriminator__width=8,
    )  # fmt: skip
    shards = [Shard(i, ["a red ball dropped"] * 2, torch.rand(2, 3, 12, 16, 16)) for i in (0, 1)]
    train_step(toy_run(config), shards)
    assert len(seen) == 6 and len(set(seen)) == 6


def test_sharded_parameters_are_the_whole_ones(tmp_path, folder_teacher, alone):
    """FSDP2 and DCP: two processes against one, a stop, and a resume on another number of processes."""
    together, stopped = tmp_path / "together", tmp_path / "stopped"
    job = run(together, folder_teacher, "fsdp=true", processes=2)
    assert job.wait() == 0, job.stdout.read()
    assert checkpoint.latest(together / "checkpoints").suffix == ".dcp"
    student = lambda out: load_file(out / "student.safetensors")
    a, b = student(alone), student(together)
    assert all(torch.allclose(a[n], b[n], rtol=0, atol=2e-6 * a[n].abs().max().item() + 1e-9) for n in a)
    base = shipped.load().state_dict()
    assert any((a[n] - base[n]).abs().max() > 1e-4 for n in a)

    job = run(stopped, folder_teacher, "fsdp=true", processes=2)
    wait_for_rows(stopped / "metrics.jsonl", 3)
    job.send_signal(signal.SIGTERM)
    assert job.wait() != 0
    assert not (stopped / "result.json").exists()
    job = run(stopped, folder_teacher, "fsdp=true", "--resume")
    assert job.wait() == 0, job.stdout.read()
    again = student(stopped)
    assert all(torch.allclose(b[n], again[n], rtol=0, atol=2e-6 * a[n].abs().max().item() + 1e-9) for n in a)


CHANGED = changed(
    runs.afd_table3(), student__name="tiny", student__lora_rank=0, student__frames=6, student__height=8, student__width=8,
    discriminator__name="toy", shards=2, update__v_old="ema", rollouts_per_prompt=2, prompts_per_step=2,
)  # fmt: skip


def masters_after_a_step(config, ranks):
    """The float32 gradients and weights of a half-precision student whose every weight is trained, by name, put together."""
    family = tiny_family()
    family.student.bfloat16()
    run = Run(config, new_state(config, family), ranks)
    x0 = torch.randn(2, 1, 16, 6, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = [Targets(x0[i], torch.tensor([[float(i)]]), [f"a {('cat', 'dog')[i]}"], i) for i in ranks.share(2)]
    update.update_student(run, targets)
    weights, student = run.state.weights, dict(family.student.named_parameters())
    assert {p.dtype for p in weights.values()} == {torch.float32} and {p.dtype for p in student.values()} == {
        torch.bfloat16
    }
    assert all(p.grad is None and torch.equal(local(p), local(weights[n]).bfloat16()) for n, p in student.items())
    return {n: whole(p.grad) for n, p in weights.items()}, {n: whole(p.detach()) for n, p in weights.items()}


def sharded_masters(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = masters_after_a_step(changed(CHANGED, fsdp=True), Ranks(rank, 2))
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()


def test_masters_are_sharded_with_their_weights(tmp_path):
    """student.lora_rank=0 of a half-precision student under FSDP2: two ranks' gradients and step are one process's."""
    multiprocessing.set_forkserver_preload([__name__])
    torch.multiprocessing.start_processes(sharded_masters, (tmp_path,), nprocs=2, start_method="forkserver")
    gradients, weights = torch.load(tmp_path / "found.pt", weights_only=True)
    expected, stepped = masters_after_a_step(CHANGED, Ranks())
    flat = lambda x: torch.cat([x[n].flatten() for n in expected])
    assert flat(expected).norm() > 1e-3
    assert (flat(gradients) - flat(expected)).norm() < 0.01 * flat(expected).norm()
    before = {n: p.detach().bfloat16().float() for n, p in tiny_family().student.named_parameters()}
    moves = flat(weights) - flat(before), flat(stepped) - flat(before)
    assert torch.nn.functional.cosine_similarity(*moves, 0) > 0.99

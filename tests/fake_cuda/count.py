"""Launches, bytes, FLOPs, waits and copies of a part of the library, counted on the fake GPU.

    python -m tests.fake_cuda.count WHAT [--size tiny|1.3b] [--layers N] [--batch B] [--frames F] [--top N] [key=value ...]

WHAT: forward, rollout, vae, update, reference, discriminator, score (VideoReward), step (an iteration by phase; takes keys of
the configuration). Sizes are those of one clip: 21 latent frames of 60 x 104 for 1.3b. bytes: read and written by kernels
other than matrix products, convolutions and attention, every operand once. A foreach operator counts as one launch.
"""

import argparse
from collections.abc import Callable

from tests.fake_cuda.device import CUDA, Log, Tally, fake_cuda  # first: before torch

# isort: split
import torch

from afd_fast.discriminators.objective import Objective
from afd_fast.rollout import RolloutConfig, rollout
from afd_fast.students.lora import add_lora, trainable
from afd_fast.students.wan.family import LORA_TARGETS
from tests.fake_cuda import scenes


def line(name: str, t: Tally) -> str:
    """A row of the table."""
    triton = sum(n for key, n in t.launches.items() if key.endswith("_kernel"))
    return (
        f"{name:20}{sum(t.launches.values()):9,}{triton:9,}{sum(t.flops.values()) / 1e9:14,.2f}{t.light / 1e6:14,.2f}"
        f"{sum(t.waits.values()):7}{sum(t.copies.values()):8}{sum(t.copied.values()) / 1e6:11,.2f}"
    )


def show(log: Log, top: int) -> None:
    """The table of all and of the phases, what moves most, where the host waits and copies."""
    print(
        f"{'phase':20}{'launches':>9}{'Triton':>9}{'GFLOP':>14}{'MB moved':>14}{'waits':>7}{'copies':>8}{'MB copied':>11}"
    )
    for name, tally in (*log.phases.items(), ("all", log.all)):
        print(line(name, tally))
    rows = sorted(((n, name) for name, n in log.all.moved.items() if name not in log.all.flops), reverse=True)
    for n, name in rows[:top]:
        print(f"    {n / 1e6:14,.2f} MB {log.all.launches[name]:8,} x {name}")
    for kind in ("waits", "copies", "faults"):
        for at, n in getattr(log.all, kind).most_common():
            print(f"    {kind:7}{n:5} x {at}")


def forward(args: argparse.Namespace, log: Log) -> None:
    """Cached forwards of three frames, chunk by chunk."""
    model = scenes.student(args.size, args.layers)
    text, x = scenes.text_and_noise(model, args.size, args.batch, args.frames)
    with torch.no_grad():
        table, cache = model.conditioning(900.0, tables=True), model.new_cache(args.batch, args.frames, *x.shape[3:])
        log.clear()
        for start in range(0, args.frames, 3):
            with log.phase(f"chunk {start // 3}"):
                model(x[:, :, start : start + 3], table, text, cache=cache, start_frame=start)


def whole_rollout(args: argparse.Namespace, log: Log) -> None:
    """A rollout of four steps per chunk."""
    model = scenes.student(args.size, args.layers)
    text, x = scenes.text_and_noise(model, args.size, args.batch, args.frames)
    log.clear()
    rollout(model, text, x, RolloutConfig(shift=5.0), generator=torch.Generator(CUDA))


def vae(args: argparse.Namespace, log: Log) -> None:
    """The decoder's chunks."""
    decode = scenes.decoder(args.size).stream()
    latents = torch.randn(args.batch, 16, args.frames, *scenes.sizes(args.size), device=CUDA, dtype=torch.bfloat16)
    log.clear()
    with torch.no_grad():
        for part in latents.split(3, 2):
            with log.phase(f"chunk of {part.shape[2]}" if log.phases else "first chunk"):
                decode(part)


def update(args: argparse.Namespace, log: Log) -> None:
    """One chunk of the update: forward with gradient over a full history, and backward, which adds to the gradients of the
    chunks before; adapters of rank 256."""
    model = scenes.student(args.size, args.layers)
    add_lora(model, 256 if args.size == "1.3b" else 4, list(LORA_TARGETS))
    text, x = scenes.text_and_noise(model, args.size, args.batch, args.frames)
    cache = model.new_cache(args.batch, args.frames, *x.shape[3:])
    time = torch.full((args.batch, args.frames), 500.0, device=CUDA)
    last = args.frames - 3
    with torch.no_grad():
        for start in range(0, last, 3):
            model(x[:, :, start : start + 3], time[:, :3] * 0, text, cache=cache, start_frame=start)
    for p in trainable(model).values():
        p.grad = torch.zeros_like(p)
    log.clear()
    with log.phase("forward"):
        v = model(x[:, :, last:], time[:, last:], text, cache=cache, start_frame=last)
    with log.phase("backward"):
        v.backward(torch.ones_like(v))


def discriminator(args: argparse.Namespace, log: Log) -> None:
    """VideoReward's step on pairs: encode, loss, backward, optimiser; and scores of features."""
    model = scenes.video_reward(args.size, args.layers)
    teacher, student, prompts = scenes.pairs(model, args.size, max(args.batch, 2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-5)
    log.clear()
    with log.phase("encode"), torch.no_grad():
        teacher, student = model.encode(teacher), model.encode(student)
    with log.phase("loss"):
        loss = model.paired_loss(teacher, student, prompts, Objective()).loss
    with log.phase("backward"):
        loss.backward()
    with log.phase("optimiser"):
        optimizer.step()
    with log.phase("score"), torch.no_grad():
        model.score(student, prompts)


def step(args: argparse.Namespace, log: Log) -> None:
    """The second iteration of a run, by phase."""
    size = args.size
    more = [f"student.frames={args.frames}"] if size == "1.3b" else []
    run, data = scenes.new(size, *more, *args.keys, layers=args.layers, reward=args.reward)
    scenes.iteration(run, data)
    log.clear()
    scenes.iteration(run, data)


PARTS: dict[str, Callable[[argparse.Namespace, Log], None]] = {
    "forward": forward, "rollout": whole_rollout, "vae": vae, "update": update, "discriminator": discriminator, "step": step,
}  # fmt: skip


def counted(what: str, log: Log, **options: object) -> Log:
    """The log after a part with its options, as the command takes them."""
    defaults = {"size": "tiny", "layers": 30, "batch": 1, "frames": 9, "keys": [], "reward": False}
    PARTS[what](argparse.Namespace(**defaults | options), log)
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=PARTS)
    parser.add_argument("--size", choices=("tiny", "1.3b"), default="tiny")
    parser.add_argument("--layers", type=int, default=30, help="of the 1.3b networks")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--frames", type=int, help="latent frames; 9, or 21 for 1.3b")
    parser.add_argument("--top", type=int, default=12, help="kernels shown")
    parser.add_argument("--reward", action="store_true", help="step: VideoReward in place of the toy discriminator")
    parser.add_argument("keys", nargs="*", metavar="key=value", help="step: of the configuration")
    args = parser.parse_args()
    args.frames = args.frames or (21 if args.size == "1.3b" else 9)
    with fake_cuda() as log:
        PARTS[args.what](args, log)
        show(log, args.top)


if __name__ == "__main__":
    main()

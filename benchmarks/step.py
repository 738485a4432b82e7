"""Times of one training iteration by phase: the real `train_step` on a causal Wan student with random weights.

    python -m benchmarks.step [--size tiny|1.3b] [--device cpu|cuda] [--iterations 5] [--csv FILE]

Nothing is downloaded. Medians after a warm-up iteration. teacher: drawing this iteration's clips from the collected
videos; reference: v_ref and v_old; backward: the policy's forward too. The floor is that of `afd-fast estimate`, on the GPUs it knows; of_peak
is floor / time. The discriminator is the toy one (VideoReward: benchmarks.discriminator). UMT5 encodes no prompts.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from afd_fast.config import TrainConfig, with_overrides
from afd_fast.estimate import estimate
from afd_fast.estimate.formulas import GPUS
from afd_fast.students import CausalWan, CausalWanConfig, Family
from afd_fast.students.wan.family import HashText, wan_family
from afd_fast.students.wan.vae import WanDecoder
from afd_fast.teachers.dataset import collect
from afd_fast.teachers.teacher import CallableTeacher
from afd_fast.training import runs
from afd_fast.training.loop import train_step
from afd_fast.training.run import Metrics, Run
from afd_fast.training.state import new_state
from afd_fast.training.teacher import batch_plan
from afd_fast.video_io import VideoFormat
from benchmarks.rows import CUDA, DEVICE, Arguments, Row, Times, append_rows, device_name, ranged

PHASES = {  # rows of the table: the phases of `train_step` that each adds up
    "rollout": ["rollout"],
    "decode": ["decode"],
    "discriminator": ["discriminator"],
    "score": ["score"],
    "reference": ["reference"],
    "backward": ["backward"],
    "optimiser": ["optimiser"],
}
DEVICES = {"h100": "H100 80GB HBM3", "h200": "H200", "a100": "A100-SXM4-80GB", "rtx4090": "RTX 4090"}
SIZES = {  # one shard of two samples: 1.3b with 12 latent frames fits 80 GB (`afd-fast estimate`)
    "tiny": [
        "student=tiny", "student.frames=6", "student.height=6", "student.width=10", "student.lora_rank=4",
        "discriminator.width=8",
    ],
    "1.3b": ["student=1.3b, random weights", "student.frames=12"],
}  # fmt: skip
COMMON = [
    "discriminator=toy", "discriminator.warmup=0", "shards=1", "prompts_per_step=1", "rollouts_per_prompt=2", "teacher_clips=1",
]  # fmt: skip


def config_of(size: str) -> TrainConfig:
    """The paper's run at a size of `SIZES`."""
    return with_overrides(runs.afd_table3(), [*COMMON, *SIZES[size]])


def build(config: TrainConfig, device: str) -> Family:
    """The family of a configuration of `config_of`, with random weights, on the device."""
    from diffusers import AutoencoderKLWan

    family = wan_family(replace(config.student, name="tiny"))
    assert isinstance(family.vae, WanDecoder)
    if config.student.name == "tiny":
        family.student.to(device)
        family.vae = WanDecoder(family.vae.vae.to(device))
        return family
    frames = config.student.frames or 21
    with torch.device(device):
        student = CausalWan(CausalWanConfig.wan_1_3b()).bfloat16().requires_grad_(False)
        vae: Any = AutoencoderKLWan()
    return replace(
        family,
        student=student,
        text=HashText(student.config.text_dim, student.config.text_len),
        vae=WanDecoder(vae.bfloat16()),
        latents=family.latents._replace(frames=frames, height=60, width=104),
        video=VideoFormat(4 * frames - 3, 480, 832, family.video.fps),
    )


def noise_teacher(video: VideoFormat) -> CallableTeacher:
    """Videos of coarse noise, for two prompts of which one is held out. No file, so no FFmpeg is needed."""

    def make(prompt: str, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        small = torch.randint(
            0, 255, (3, video.frames, video.height // 8, video.width // 8), generator=g, dtype=torch.uint8
        )
        return small.repeat_interleave(8, 2).repeat_interleave(8, 3)

    return CallableTeacher(make, ["a red ball", "a blue ball"], name="noise", fps=video.fps)


def untracked(items: Sequence, description: str) -> Iterable:
    """No progress bar."""
    return items


@dataclass
class Measured:
    """Milliseconds of every phase of `PHASES`, one sample per iteration, and the peak in MiB (CUDA)."""

    phases: dict[str, list[float]]
    peak_mib: float | None


def measure(config: TrainConfig, device: str, count: int) -> Measured:
    """`count` iterations after a first one."""
    family = build(config, device)
    data = collect(noise_teacher(family.video), config.teacher_clips, None, untracked)
    run = Run(config, new_state(config, family))
    samples: dict[str, list[float]] = {phase: [] for phase in ("teacher", *PHASES)}
    for iteration in range(count + 1):
        if iteration == 1 and device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        batch = data.batch(batch_plan(config), iteration, range(config.shards))
        took = {"teacher": time.perf_counter() - begin}
        metrics: Metrics = train_step(run, batch)
        took |= {name: sum(metrics[f"seconds/{phase}"] for phase in phases) for name, phases in PHASES.items()}
        if iteration:
            for name, seconds in took.items():
                samples[name].append(seconds * 1e3)
    samples["all"] = [sum(parts) for parts in zip(*samples.values())]
    return Measured(samples, torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None)


def floors(config: TrainConfig, name: str) -> dict[str, float]:
    """The least milliseconds of every phase on a device, and the estimated peak printed; nothing for unknown devices."""
    gpu = next((GPUS[key] for key, mark in DEVICES.items() if mark in name), None)
    if gpu is None:
        return {}
    found = estimate(config)
    elsewhere = next(n for what, n, _ in found.memory if what.startswith("text encoder"))
    print(f"estimated peak: at least {(found.peak[0] - elsewhere) / 2**20:.0f} MiB, in {found.peak[1]}")
    least = {phase: work.seconds(gpu) * 1e3 for phase, work in found.phases.items() if phase != "prompts"}
    return least | {"all": sum(least.values())}


def report(config: TrainConfig, size: str, measured: Measured, device: str) -> list[Row]:
    """Print the table; its rows."""
    s, name, peak = config.student, device_name(device), measured.peak_mib
    shape = f"B{config.prompts_per_step * config.rollouts_per_prompt} F{s.frames} {s.height or 60}x{s.width or 104}"
    memory = "" if peak is None else f", peak {peak:.0f} MiB"
    print(f"step {size}, {shape}, {name}, {len(measured.phases['all'])} iterations{memory}")
    least, whole, rows = floors(config, name), Times(measured.phases["all"]).ms, []
    print(f"{'phase':15}{'ms':>12}{'p20':>12}{'p80':>12}{'share':>8}{'floor ms':>12}{'floor/ms':>10}")
    for phase, samples in measured.phases.items():
        times, floor = Times(samples, peak_mib=peak), least.get(phase)
        row = Row(f"step_{size}", phase, shape, times, "train", "bfloat16" if size == "1.3b" else "float32", name)
        row.of_peak = floor / times.ms if floor else None
        last = f"{floor:12.3f}{row.of_peak:10.3f}" if floor else ""
        p20, p80 = times.quantile(0.2), times.quantile(0.8)
        print(f"{phase:15}{times.ms:12.3f}{p20:12.3f}{p80:12.3f}{times.ms / whole:8.1%}{last}")
        rows.append(row)
    return rows


def main() -> None:
    parser = Arguments(__doc__)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=DEVICE)
    parser.add_argument("--iterations", type=ranged(int, 1), default=5)
    args = parser.parsed()
    if args.device == "cuda" and not CUDA:
        parser.error("--device cuda needs a CUDA device, and there is none: use --device cpu")
    torch.manual_seed(0)
    config = config_of(args.size)
    rows = report(config, args.size, measure(config, args.device, args.iterations), args.device)
    if args.csv:
        append_rows(args.csv, rows)


if __name__ == "__main__":
    main()

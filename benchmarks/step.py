"""Times of one training iteration by phase: the real `train_step` on a causal Wan student with random weights.

    python -m benchmarks.step [--size tiny|1.3b] [--device cpu|cuda] [--iterations 5] [--csv FILE]

Nothing is downloaded. Medians after a warm-up iteration. teacher: drawing this iteration's clips from the collected
videos; update: v_ref, v_old, forward and backward. The floor is that of `afd-fast estimate`, on the GPUs it knows; of_peak
is floor / time. The discriminator is the toy one (VideoReward: benchmarks.discriminator). UMT5 encodes no prompts.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from afd_fast.config import TrainConfig, with_overrides
from afd_fast.estimate import estimate
from afd_fast.estimate.formulas import GPUS
from afd_fast.students import CausalWan, CausalWanConfig, Family
from afd_fast.students.wan.family import HashText, wan_family
from afd_fast.students.wan.vae import WanDecoder
from afd_fast.teachers.dataset import collect, open_teacher
from afd_fast.training import runs
from afd_fast.training.loop import train_step
from afd_fast.training.run import Metrics, Run
from afd_fast.training.state import new_state
from afd_fast.training.trainer import batch_plan
from afd_fast.video_io import VideoFormat, write_video
from benchmarks.rollout import FIELDS, Rows

PHASES = {  # rows of the table: the phases of `train_step` that each adds up
    "rollout": ["rollout"],
    "decode": ["decode"],
    "discriminator": ["discriminator"],
    "score": ["score"],
    "update": ["reference", "backward"],
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
    if config.student.name == "tiny":
        family.student.to(device)
        family.vae = WanDecoder(family.vae.vae.to(device))
        return family
    frames = config.student.frames or 21
    with torch.device(device):
        student = CausalWan(CausalWanConfig.wan_1_3b()).bfloat16().requires_grad_(False)
        vae = AutoencoderKLWan().bfloat16()
    return replace(
        family,
        student=student,
        text=HashText(student.config.text_dim, student.config.text_len),
        vae=WanDecoder(vae),
        latents=family.latents._replace(frames=frames, height=60, width=104),
        video=VideoFormat(4 * frames - 3, 480, 832, family.video.fps),
    )


def noise_videos(folder: Path, video: VideoFormat) -> None:
    """A teacher's folder with two videos of coarse noise, one of which is held out."""
    for name in ("a", "b"):
        small = torch.randint(0, 255, (3, video.frames, video.height // 8, video.width // 8), dtype=torch.uint8)
        write_video(folder / f"{name}.mp4", small.repeat_interleave(8, 2).repeat_interleave(8, 3), video.fps)
    (folder / "manifest.csv").write_text("prompt,video\na red ball,a.mp4\na blue ball,b.mp4\n")


def untracked(items: Sequence, description: str) -> Iterable:
    """No progress bar."""
    return items


def iterations(config: TrainConfig, device: str, count: int) -> dict[str, list[float]]:
    """Milliseconds of every phase in `count` iterations after the first."""
    family = build(config, device)
    with tempfile.TemporaryDirectory() as folder:
        noise_videos(Path(folder), family.video)
        teacher = open_teacher(f"folder:{folder}", family.video, Path(folder) / "cache")
        data = collect(teacher, config.teacher_clips, None, untracked)
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
    return samples


def report(config: TrainConfig, size: str, samples: dict[str, list[float]], device: str) -> Rows:
    """Print the table; its rows."""
    count = len(samples["teacher"])
    samples = samples | {"all": [sum(parts) for parts in zip(*samples.values())]}
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    gpu = next((GPUS[key] for key, mark in DEVICES.items() if mark in name), None)
    found = estimate(config) if gpu else None
    peak = f"{torch.cuda.max_memory_allocated() / 2**20:.0f}" if device == "cuda" else ""
    s, rows = config.student, Rows(count)
    shape = f"B{config.prompts_per_step * config.rollouts_per_prompt} F{s.frames} {s.height or 60}x{s.width or 104}"
    common = rows.common | {"device": name, "pass": "train", "dtype": "bfloat16" if size == "1.3b" else "float32"}
    print(f"step {size}, {shape}, {name}, {count} iterations" + (f", peak {peak} MiB" if peak else ""))
    floors: dict[str, float] = {}
    if found and gpu:
        elsewhere = next(n for what, n, _ in found.memory if what.startswith("text encoder"))
        print(f"estimated peak: at least {(found.peak[0] - elsewhere) / 2**20:.0f} MiB, in {found.peak[1]}")
        floors = {phase: w.seconds(gpu) * 1e3 for phase, w in found.phases.items() if phase != "prompts"}
        floors["all"] = sum(floors.values())
    print(f"{'phase':15}{'ms':>12}{'p20':>12}{'p80':>12}{'share':>8}{'floor ms':>12}{'floor/ms':>10}")
    whole = statistics.median(samples["all"])
    for phase, unsorted in samples.items():
        times, ms = sorted(unsorted), statistics.median(unsorted)
        p20, p80 = (times[min(len(times) - 1, int(q * len(times)))] for q in (0.2, 0.8))
        floor = floors.get(phase)
        last = f"{floor:12.3f}{floor / ms:10.3f}" if floor else ""
        print(f"{phase:15}{ms:12.3f}{p20:12.3f}{p80:12.3f}{ms / whole:8.1%}{last}")
        row = dict.fromkeys(FIELDS, "") | common
        row |= {"case": f"step_{size}", "variant": phase, "shape": shape, "ms": f"{ms:.4f}", "ms_p20": f"{p20:.4f}",
                "ms_p80": f"{p80:.4f}", "peak_mib": peak, "of_peak": f"{floor / ms:.4f}" if floor else ""}  # fmt: skip
        rows.rows.append(row)
    return rows


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--csv", type=Path, help="append the rows here")
    args = parser.parse_args()
    if args.iterations < 1:
        parser.error("--iterations must be at least 1")
    if args.device == "cuda" and not cuda:
        parser.error("there is no CUDA device here")
    torch.manual_seed(0)
    config = config_of(args.size)
    rows = report(config, args.size, iterations(config, args.device, args.iterations), args.device)
    if args.csv:
        rows.append_to(args.csv)


if __name__ == "__main__":
    main()

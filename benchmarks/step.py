"""Times of one training iteration by phase: the real `train_step` on a causal Wan student with random weights, no download.

    python -m benchmarks.step [--size tiny|1.3b] [--device cpu|cuda] [--iterations 5] [--csv FILE]

Medians after a warm-up iteration; `update` is without the optimiser and the EMA, which have a row of their own; teacher:
this iteration's clips from the collected videos. The floor is `afd-fast estimate`'s, given on GPUs it knows; of_peak is floor /
time. The discriminator is the toy one (VideoReward: benchmarks.discriminator), prompts are not encoded by UMT5.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from afd_fast.estimate.estimate import GPUS, estimate
from afd_fast.training.step import train_step

from afd_fast.config import with_overrides
from afd_fast.generate import HashText
from afd_fast.students import CausalWan, CausalWanConfig
from afd_fast.students.wan.family import discriminator, wan_system
from afd_fast.students.wan.vae import WanDecoder
from afd_fast.teachers.dataset import collect
from afd_fast.training import runs as recipes
from afd_fast.training.state import new_state
from afd_fast.video_io import write_video
from benchmarks.rollout import FIELDS, Rows

PHASES = ("teacher", "rollout", "decode", "discriminator", "score", "update", "optimiser")
DEVICES = {"h100": "H100 80GB HBM3", "h200": "H200", "a100": "A100-SXM4-80GB", "rtx4090": "RTX 4090"}
SIZES = {  # one shard of two samples: 1.3b with 12 latent frames fits 80 GB (`afd-fast estimate`)
    "tiny": [
        "student=tiny",
        "student.frames=6",
        "student.height=6",
        "student.width=10",
        "student.lora_rank=4",
        "discriminator.width=8",
    ],
    "1.3b": ["student=1.3b, random weights", "student.frames=12"],
}
COMMON = [
    "discriminator=toy",
    "discriminator.warmup=0",
    "shards=1",
    "prompts_per_step=1",
    "rollouts_per_prompt=2",
    "teacher_clips=1",
]


def build(config, device: str):
    """The System of a configuration with random weights on the device."""
    from diffusers import AutoencoderKLWan

    system = wan_system(replace(config, student="tiny"))
    student, vae, encode = system.student, system.decode.vae, system.encode
    if config.student != "tiny":
        sizes = CausalWanConfig.wan_1_3b()
        with torch.device(device):
            student, vae = CausalWan(sizes).bfloat16(), AutoencoderKLWan().bfloat16()
        encode = HashText(sizes.text_dim, sizes.text_len)
    decode = WanDecoder(vae.to(device))
    return replace(
        system, student=student.to(device).requires_grad_(False), encode=encode, decode=decode, encode_video=decode.encode,
        new_discriminator=lambda c: discriminator(c).to(device),
    )  # fmt: skip


def teacher(folder: Path, video: tuple[int, int, int], fps: float) -> str:
    """Two videos of coarse noise, one of which is held out."""
    frames, height, width = video
    for name in ("a", "b"):
        small = torch.randint(0, 255, (3, frames, height // 8, width // 8), dtype=torch.uint8)
        write_video(folder / f"{name}.mp4", small.repeat_interleave(8, 2).repeat_interleave(8, 3), fps)
    (folder / "manifest.csv").write_text("prompt,video\na red ball,a.mp4\na blue ball,b.mp4\n")
    return f"folder:{folder}"


class Clock:
    """Seconds between `start` and `stop`, added up until `take`; on a GPU until its work is done."""

    def __init__(self, device: str):
        self.wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        self.seconds = 0.0

    def start(self, *_):
        self.wait()
        self.since = time.perf_counter()

    def stop(self, *_):
        self.wait()
        self.seconds += time.perf_counter() - self.since

    def take(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def around(self, call):
        def timed(*args):
            self.start()
            call(*args)
            self.stop()

        return timed


def iterations(config, device: str, count: int) -> dict[str, list[float]]:
    """Milliseconds of every phase in `count` iterations after the first."""
    system, clock = build(config, device), Clock(device)
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, teacher=teacher(Path(folder), system.video, system.fps))
        data = collect(config, system, Path(folder) / "cache", lambda items, _: items)
        state = new_state(config, system)
        state.optimizer.register_step_pre_hook(clock.start)
        state.optimizer.register_step_post_hook(clock.stop)
        state.ema.update = clock.around(state.ema.update)
        samples = {phase: [] for phase in PHASES}
        for iteration in range(count + 1):
            if iteration == 1 and device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
            batch = data.batch(config, iteration, range(config.shards))
            took = {"teacher": time.perf_counter() - begin}
            metrics = train_step(state, config, batch)
            took |= {phase: metrics[f"seconds/{phase}"] for phase in PHASES[1:-1]}
            took["optimiser"] = clock.take()
            took["update"] -= took["optimiser"]
            for phase, seconds in took.items():
                samples[phase] += [seconds * 1e3] if iteration else []
    return samples


def main(argv=None):
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--csv", type=Path, help="append the rows here")
    args = parser.parse_args(argv)
    if args.iterations < 1 or (args.device == "cuda" and not cuda):
        parser.error("--iterations must be at least 1" if args.iterations < 1 else "there is no CUDA device here")
    torch.manual_seed(0)
    config = with_overrides(recipes.afd_table3(), [*COMMON, *SIZES[args.size]])
    samples = iterations(config, args.device, args.iterations)
    samples["all"] = [sum(parts) for parts in zip(*samples.values())]
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    gpu = next((GPUS[key] for key, mark in DEVICES.items() if mark in name), None)
    found = estimate(config) if gpu else None
    peak = f"{torch.cuda.max_memory_allocated() / 2**20:.0f}" if args.device == "cuda" else ""
    rows, samples_each = Rows(args.iterations), config.prompts_per_step * config.rollouts_per_prompt
    shape = f"B{samples_each} F{config.frames} {config.height}x{config.width}"
    common = rows.common | {"device": name, "pass": "train", "dtype": "bfloat16" if args.size == "1.3b" else "float32"}
    print(f"step {args.size}, {shape}, {name}, {args.iterations} iterations" + (f", peak {peak} MiB" if peak else ""))
    if found:
        elsewhere = next(n for what, n, _ in found.memory if what.startswith("text encoder"))
        print(f"estimated peak: at least {(found.peak[0] - elsewhere) / 2**20:.0f} MiB, in {found.peak[1]}")
    print(f"{'phase':15}{'ms':>12}{'p20':>12}{'p80':>12}{'share':>8}{'floor ms':>12}{'floor/ms':>10}")
    whole = statistics.median(samples["all"])
    floors = {phase: w.seconds(gpu) * 1e3 for phase, w in found.phases.items() if phase != "prompts"} if found else {}
    floors |= {"all": sum(floors.values())} if found else {}
    for phase, times in samples.items():
        times, ms = sorted(times), statistics.median(times)
        p20, p80 = (times[min(len(times) - 1, int(q * len(times)))] for q in (0.2, 0.8))
        floor = floors.get(phase)
        beside = f"{floor:12.3f}{floor / ms:10.3f}" if floor else ""
        print(f"{phase:15}{ms:12.3f}{p20:12.3f}{p80:12.3f}{ms / whole:8.1%}{beside}")
        row = dict.fromkeys(FIELDS, "") | common
        row |= {"case": f"step_{args.size}", "variant": phase, "shape": shape, "ms": f"{ms:.4f}", "ms_p20": f"{p20:.4f}",
                "ms_p80": f"{p80:.4f}", "peak_mib": peak, "of_peak": f"{floor / ms:.4f}" if floor else ""}  # fmt: skip
        rows.rows.append(row)
    if args.csv:
        rows.append_to(args.csv)


if __name__ == "__main__":
    main()

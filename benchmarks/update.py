"""The student update: KV-detached, chunk by chunk, against teacher forcing with checkpointing.

    python -m benchmarks.update [--size small|1.3b] [--frames 21] [--repeats 5] [--csv FILE]      random weights, no download

FLOPs by torch's counter (matrix products and attention), forward and backward of the policy alone; times are medians of
one interleaved run; memory is the peak above the weights (CUDA). Gradients are compared before anything is timed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from afd_fast import nft_loss, nft_recipe
from afd_fast.students import CausalWan, CausalWanConfig
from afd_fast.training.velocity import Chunking, LossInputs, nft_backward
from benchmarks.rows import CUDA, DEVICE, DTYPE, Arguments, Row, Table, Times, clocked, ranged

aten = torch.ops.aten
CPU_FLASH = {  # which the counter does not know
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
        g, q, k, v
    ),
}


class Kept:
    """A tensor kept for backward, counted while it lives."""

    live = peak = 0

    def __init__(self, x: Tensor) -> None:
        self.x = x
        Kept.live += x.nbytes
        Kept.peak = max(Kept.peak, Kept.live)

    def __del__(self) -> None:
        Kept.live -= self.x.nbytes


def saved_bytes(run: Callable[[], None]) -> int:
    """The most bytes kept for backward at any time (what several operators keep is counted several times)."""
    Kept.live = Kept.peak = 0
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.x):
        run()
    return Kept.peak


def small() -> CausalWanConfig:
    return CausalWanConfig(dim=256, ffn_dim=1024, num_heads=4, num_layers=4, text_len=16, text_dim=64)


SIZES = {"small": (small, (16, 24)), "1.3b": (CausalWanConfig.wan_1_3b, (60, 104))}
CHUNK = 3
LABELS = {"detached": "KV-detached, chunk by chunk", "forced": "teacher forcing + checkpointing"}


@dataclass
class Counted:
    """FLOPs, and the gradient of the head's weight: no path to it leads through the history, so both ways agree."""

    flops: int
    gradient: Tensor


class Update:
    """A student with random weights and one sample's loss, to be differentiated in two ways."""

    def __init__(self, size: str, frames: int) -> None:
        make, (height, width) = SIZES[size]
        config = make()
        with torch.device(DEVICE):
            torch.manual_seed(0)
            self.model = CausalWan(config).to(DTYPE)
            self.context = torch.randn(1, config.text_len, config.text_dim, dtype=DTYPE)
            x0, noise, v_ref = (torch.randn(1, 16, frames, height, width, dtype=DTYPE) for _ in range(3))
            t = torch.rand(1, frames // CHUNK).repeat_interleave(CHUNK, 1)
            r = torch.rand(1, 1)
        self.model.gradient_checkpointing = True  # for teacher forcing; the activations of a chunk need none
        level = t[:, None, :, None, None]
        x_t = ((1 - level) * x0 + level * noise).to(DTYPE)
        self.inputs = LossInputs(x0, x_t, noise, t, r, nft_recipe("afd", beta=0.1, ref_coef=1e-4), v_ref=v_ref)

    def detached(self) -> None:
        nft_backward(self.model, self.model.encode_text(self.context), self.inputs, Chunking(CHUNK))

    def forced(self) -> None:
        i, text = self.inputs, self.model.encode_text(self.context)
        v = self.model.forward_teacher_forcing(i.x_t, i.t * 1000, text, i.x0, chunk=CHUNK)
        nft_loss(v, i.x0, i.r[:, 0], i.t, noise=i.noise, v_ref=i.v_ref, recipe=i.recipe, frame_dim=2).backward()

    def counted(self, call: Callable[[], None]) -> Counted:
        with FlopCounterMode(display=False, custom_mapping=CPU_FLASH) as counter:
            call()
        weight = self.model.head.head.weight
        assert weight.grad is not None
        gradient = weight.grad.double().clone()
        self.model.zero_grad()
        return Counted(counter.get_total_flops(), gradient)


def main() -> None:
    p = Arguments(__doc__)
    p.add_argument("--size", default="small", choices=SIZES)
    p.add_argument("--frames", type=ranged(int, 1), default=21)
    p.add_argument("--repeats", type=ranged(int, 1), default=5)
    a = p.parsed()
    if a.frames % CHUNK:
        p.error(f"--frames must be a multiple of {CHUNK}, got {a.frames}")
    update = Update(a.size, a.frames)
    calls = {"detached": update.detached, "forced": update.forced}
    counts = {name: update.counted(call) for name, call in calls.items()}
    detached, forced = counts["detached"], counts["forced"]
    error = ((detached.gradient - forced.gradient).norm() / forced.gradient.norm()).item()
    if error > (2e-2 if CUDA else 1e-4):
        raise SystemExit(f"gradients of the head differ by {error:.1e}; nothing is timed on a red test")
    times = {name: Times() for name in calls}
    for _ in range(a.repeats):
        for name, call in calls.items():
            with clocked(times[name]):
                call()
            update.model.zero_grad()
    size = "x".join(map(str, SIZES[a.size][1]))
    print(
        f"update {a.size}, {a.frames} latent frames of {size}, {DEVICE} {DTYPE}, head gradients differ by {error:.1e}"
    )
    table = Table(a.csv)
    for name, label in LABELS.items():
        shape = f"B1 F{a.frames} {size}"
        table.add(Row(f"update_{a.size}", name, shape, times[name], "train", flop=counts[name].flops, max_err=error))
        peak = times[name].peak_mib
        memory = "" if peak is None else f"{peak / 1024:8.2f} GiB"
        print(f"{label:34}{counts[name].flops / 1e12:10.3f} TFLOP{times[name].ms:12.1f} ms{memory}")
    ratio = times["forced"].ms / times["detached"].ms
    print(f"{'ratio':34}{forced.flops / detached.flops:10.2f}      {ratio:12.2f}")


if __name__ == "__main__":
    main()

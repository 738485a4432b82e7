"""The student update: KV-detached, chunk by chunk, against teacher forcing with checkpointing.

    python -m benchmarks.update [--size small|1.3b] [--frames 21] [--repeats 5]      random weights, no download

FLOPs by torch's counter (matrix products and attention), forward and backward of the policy alone; times are medians of
one interleaved run; memory is the peak above the weights (CUDA). Gradients are compared before anything is timed.
"""

import argparse
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from afd_fast import nft_loss, nft_recipe
from afd_fast.students import CausalWan, CausalWanConfig
from afd_fast.training.update import nft_backward

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

    def __init__(self, x):
        self.x = x
        Kept.live += x.nbytes
        Kept.peak = max(Kept.peak, Kept.live)

    def __del__(self):
        Kept.live -= self.x.nbytes


def saved_bytes(run) -> int:
    """The most bytes kept for backward at any time (what several operators keep is counted several times)."""
    Kept.live = Kept.peak = 0
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.x):
        run()
    return Kept.peak


SIZES = {
    "small": (
        lambda: CausalWanConfig(dim=256, ffn_dim=1024, num_heads=4, num_layers=4, text_len=16, text_dim=64),
        (16, 24),
    ),
    "1.3b": (CausalWanConfig.wan_1_3b, (60, 104)),
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--size", default="small", choices=SIZES)
    p.add_argument("--frames", type=int, default=21)
    p.add_argument("--repeats", type=int, default=5)
    a = p.parse_args()
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    make, (height, width) = SIZES[a.size]
    config, chunk = make(), 3
    with torch.device(device):
        torch.manual_seed(0)
        model = CausalWan(config).to(dtype)
        context = torch.randn(1, config.text_len, config.text_dim, dtype=dtype)
        x0, noise, v_ref = (torch.randn(1, 16, a.frames, height, width, dtype=dtype) for _ in range(3))
        t = torch.rand(1, a.frames // chunk).repeat_interleave(chunk, 1)
        r = torch.rand(1)
    model.gradient_checkpointing = True  # of the teacher-forcing pass; a chunk's activations need none
    x_t = ((1 - t[:, None, :, None, None]) * x0 + t[:, None, :, None, None] * noise).to(dtype)
    given = {"noise": noise, "v_ref": v_ref, "recipe": nft_recipe("afd", beta=0.1, ref_coef=1e-4)}

    def detached():
        nft_backward(model, x_t, t, model.encode_text(context), x0, chunk, r=r, **given)

    def forced():
        v = model.forward_teacher_forcing(x_t, t * 1000, model.encode_text(context), x0, chunk=chunk)
        nft_loss(v, x0, r, t, frame_dim=2, **given).backward()

    flops, gradients = {}, {}
    for name, run in (("detached", detached), ("forced", forced)):
        with FlopCounterMode(display=False, custom_mapping=CPU_FLASH) as counter:
            run()
        flops[name] = counter.get_total_flops()
        gradients[name] = (
            model.head.head.weight.grad.double().clone()
        )  # nothing flows through history: the same in both
        model.zero_grad()
    error = (gradients["detached"] - gradients["forced"]).norm() / gradients["forced"].norm()
    if error > (2e-2 if cuda else 1e-4):
        raise SystemExit(f"gradients of the head differ by {error:.1e}; nothing is timed on a red test")
    times, peak = {"detached": [], "forced": []}, {}
    for _ in range(a.repeats):
        for name, run in (("detached", detached), ("forced", forced)):
            before = 0
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            run()
            if cuda:
                torch.cuda.synchronize()
                peak[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
            times[name].append(time.perf_counter() - start)
            model.zero_grad()
    print(
        f"update {a.size}, {a.frames} latent frames of {height}x{width}, {device} {dtype}, head gradients differ by {error:.1e}"
    )
    for name, label in (("detached", "KV-detached, chunk by chunk"), ("forced", "teacher forcing + checkpointing")):
        memory = f"{peak[name]:8.2f} GiB" if peak else ""
        print(f"{label:34}{flops[name] / 1e12:10.3f} TFLOP{statistics.median(times[name]) * 1e3:12.1f} ms{memory}")
    ratio = statistics.median(times["forced"]) / statistics.median(times["detached"])
    print(f"{'ratio':34}{flops['forced'] / flops['detached']:10.2f}      {ratio:12.2f}")


if __name__ == "__main__":
    main()

"""Times of the student: forwards by chunk index, rollouts by batch, window and length, attention, fused operators, VAE.

    python -m benchmarks.rollout [CASE ...] [--size tiny|1.3b] [--csv FILE]     random weights, no download
    cases: forward rollout batch window length attention operators vae (default: all but vae)

Every row names what was timed. FLOPs are counted from the shapes (matrix products only); of_peak is against
990 TFLOP/s (H100/H200 dense bfloat16) and left empty on other devices. Medians of --repeats after a warm-up.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from afd_fast.ops import transformer as ops
from afd_fast.ops.attention import BACKENDS, attention
from afd_fast.reference import transformer as reference
from afd_fast.rollout import RolloutConfig, rollout, stream
from afd_fast.students import CausalWan, CausalWanConfig
from afd_fast.students.student import Student
from afd_fast.students.wan.graphs import GraphedStudent
from afd_fast.students.wan.layers import WanText
from benchmarks.rows import CUDA, DEVICE, DTYPE, Row, Table, append_rows, timed

FRAMES = 21  # latent frames of a clip
CHUNK = 3


def flops(c: CausalWanConfig, tokens: int, keys: int, batch: int = 1) -> float:
    """Matrix products of one cached forward: `tokens` queries over `keys` keys."""
    linear = 2 * tokens * (6 * c.dim**2 + 2 * c.dim * c.ffn_dim)
    return batch * c.num_layers * (linear + 4 * tokens * c.dim * (keys + c.text_len))


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


class Bench:
    """A student with random weights; every case is a method."""

    def __init__(self, size: str, repeats: int) -> None:
        torch.manual_seed(0)
        with torch.device(DEVICE):
            self.config = CausalWanConfig.wan_1_3b() if size == "1.3b" else CausalWanConfig.tiny()
            self.model = CausalWan(self.config).to(DTYPE).eval()
        self.size, self.repeats, self.table = size, repeats, Table()
        self.height, self.width = (60, 104) if size == "1.3b" else (12, 20)
        self.tokens = self.height * self.width // 4  # per latent frame

    def add(
        self,
        case: str,
        variant: str,
        shape: str,
        call: Callable[[], Any],
        flop: float | None = None,
        bytes_moved: int | None = None,
        max_err: float | None = None,
    ) -> Row:
        """Time a call; its row."""
        times = timed(call, self.repeats)
        row = Row(case, variant, shape, times, flop=flop, bytes_moved=bytes_moved, max_err=max_err)
        self.table.add(row)
        return row

    def text(self, batch: int) -> WanText:
        return self.model.encode_text(randn(batch, self.config.text_len, self.config.text_dim))

    def noise(self, batch: int, frames: int) -> Tensor:
        return randn(batch, 16, frames, self.height, self.width)

    def forward(self) -> None:
        """One forward per chunk index, and the four steps of the sixth block (published: 344 ms on H100, DiT only)."""
        text, table = self.text(1), self.model.conditioning(937.5, tables=True)
        cache, x = self.model.new_cache(1, FRAMES, self.height, self.width), self.noise(1, FRAMES)
        queries = CHUNK * self.tokens

        def steps(index: int, count: int) -> None:
            start = CHUNK * index
            for _ in range(count):
                self.model(x[:, :, start : start + CHUNK], table, text, cache=cache, start_frame=start)

        for index in range(FRAMES // CHUNK):
            flop = flops(self.config, queries, (index + 1) * queries)
            self.add("forward", f"chunk{index}", f"B1 3x{self.tokens}", partial(steps, index, 1), flop=flop)
        for index in (5, 6):
            flop = 4 * flops(self.config, queries, (index + 1) * queries)
            self.add("four_steps", f"chunk{index}", f"B1 4 x 3x{self.tokens}", partial(steps, index, 4), flop=flop)

    def _rollout(
        self,
        case: str,
        variant: str,
        batch: int,
        frames: int,
        config: RolloutConfig = RolloutConfig(),
        student: Student | None = None,
    ) -> None:
        text, noise = self.text(batch), self.noise(batch, frames)
        flop, passes = 0.0, len(config.steps) + 1
        for start in range(0, frames, config.chunk):
            keys = min(start + config.chunk, config.window or frames) * self.tokens
            last = start + config.chunk == frames
            flop += (passes - last) * flops(self.config, config.chunk * self.tokens, keys, batch)
        call = partial(rollout, student or self.model, text, noise, config)
        row = self.add(case, variant, f"B{batch} F{frames} {self.height}x{self.width}", call, flop=flop)
        rate = batch * (4 * frames - 3) / row.times.ms * 1e3
        print(f"{'':22s} DiT only: {rate:.2f} frames of video per second")

    def rollout(self) -> None:
        self._rollout("rollout", "plain", 1, FRAMES)
        self._rollout("rollout", "fused_cache_pass", 1, FRAMES, RolloutConfig(fuse_cache_pass=True))
        self._rollout("rollout", "framewise", 1, FRAMES, RolloutConfig(chunk=1))
        if CUDA:
            self._rollout("rollout", "graphs", 1, FRAMES, student=GraphedStudent(self.model))
            graphed = GraphedStudent(self.model)
            self._rollout("rollout", "framewise_graphs", 1, FRAMES, RolloutConfig(chunk=1), graphed)
        text, noise = self.text(1), self.noise(1, FRAMES)
        shape = f"B1 F3 {self.height}x{self.width}"
        self.add("first_chunk", "latency", shape, lambda: next(stream(self.model, text, noise)))

    def batch(self) -> None:
        for batch in (1, 2, 4, 8):
            self._rollout("rollout_batch", f"B{batch}", batch, FRAMES)

    def window(self) -> None:
        for window, sink in ((None, 0), (12, 3), (9, 3), (6, 0)):
            name = "all" if window is None else f"window{window}_sink{sink}"
            self._rollout("rollout_window", name, 1, 42, RolloutConfig(window=window, sink=sink))

    def length(self) -> None:
        for frames in (21, 42, 84, 168):
            self._rollout("rollout_length", f"F{frames}_window12", 1, frames, RolloutConfig(window=12, sink=3))

    def attention(self) -> None:
        c, queries = self.config, CHUNK * self.tokens
        shape = (1, FRAMES * self.tokens, c.num_heads, c.dim // c.num_heads)
        k, v = randn(*shape), randn(*shape)
        q = k[:, :queries].clone()
        for backend in ("auto", *BACKENDS):
            try:
                attention(q, k, v, backend=backend)
            except (ImportError, ValueError) as error:
                print(f"{'attention':22s} {backend:18s} not here: {error}")
                continue
            for chunk in (0, 3, 6):
                keys = queries * (chunk + 1)
                call = partial(attention, q, k[:, :keys], v[:, :keys], backend=backend)
                self.add("attention", backend, f"{queries} x {keys} keys", call, flop=4 * queries * keys * c.dim)

    def operators(self) -> None:
        """Each fused operator, the reference, and torch.compile of the reference."""
        c, length = self.config, CHUNK * self.tokens
        x, y, k, w = (*(randn(1, length, c.dim) for _ in range(3)), randn(c.dim))
        shift, scale, gate = randn(1, 1, 6, c.dim).unbind(2)[:3]
        cos, sin = self.model.rope(0, CHUNK, self.height // 2, self.width // 2)
        cases: list[tuple[str, int, Callable[[ModuleType], Any]]] = [  # tensors read or written
            ("norm_modulate", 2, lambda m: m.norm_modulate(x, scale, shift)),
            ("residual_norm", 4, lambda m: m.residual_norm(x, y, gate, scale=scale, shift=shift)),
            ("rms_norm", 2, lambda m: m.rms_norm(x, w)),
            ("qk_norm_rope", 4, lambda m: m.qk_norm_rope(x, k, w, w, cos, sin)),
        ]
        for name, tensors, call in cases:
            fused, plain = partial(call, ops), partial(call, reference)
            error = (first(fused()).double() - first(plain()).double()).abs().max().item()
            shape, moved = f"{length}x{c.dim}", tensors * x.nbytes
            self.add(name, "fused", shape, fused, bytes_moved=moved, max_err=error)
            self.add(name, "reference", shape, plain, bytes_moved=moved)
            self.add(name, "compile", shape, torch.compile(plain), bytes_moved=moved)

    def vae(self) -> None:
        """Wan's decoder with random weights; three latent frames per call, and one as in diffusers."""
        from diffusers import AutoencoderKLWan

        from afd_fast.students.wan.vae import WanDecoder

        vae: Any = AutoencoderKLWan() if self.size == "1.3b" else AutoencoderKLWan(base_dim=8)
        vae.to(DEVICE, DTYPE)
        latents = self.noise(1, FRAMES)
        for chunk in (1, 3):
            call = partial(WanDecoder(vae, chunk=chunk), latents)
            self.add("vae", f"chunk{chunk}", f"F{FRAMES} {self.height}x{self.width}", call)


def first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


CASES: dict[str, Callable[[Bench], None]] = {
    "forward": Bench.forward, "rollout": Bench.rollout, "batch": Bench.batch, "window": Bench.window,
    "length": Bench.length, "attention": Bench.attention, "operators": Bench.operators, "vae": Bench.vae,
}  # fmt: skip


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", default=[name for name in CASES if name != "vae"])
    parser.add_argument("--size", choices=("tiny", "1.3b"), default="1.3b" if CUDA else "tiny")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path, help="append the rows here")
    args = parser.parse_args()
    if unknown := sorted(set(args.cases) - set(CASES)):
        parser.error(f"unknown cases {', '.join(unknown)}; known: {', '.join(CASES)}")
    bench = Bench(args.size, args.repeats)
    for case in args.cases:
        CASES[case](bench)
    if args.csv:
        append_rows(args.csv, bench.table.rows)


if __name__ == "__main__":
    main()

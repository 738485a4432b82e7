"""Times of the student: forwards by chunk index, rollouts by batch, window and length, attention, fused operators, VAE.

    python benchmarks/rollout.py [CASE ...] [--size tiny|1.3b] [--csv FILE]     random weights, no download
    cases: forward rollout batch window length attention operators vae (default: all but vae)

Every row says what it timed. FLOPs are counted from the shapes (matrix products only); of_peak is against
990 TFLOP/s (H100/H200 dense bfloat16) and left empty on other devices. Medians of --repeats after a warm-up.
"""

import argparse
import csv
import datetime
import subprocess
import time
from pathlib import Path

import torch

from afd_fast.ops import transformer as ops
from afd_fast.ops.attention import BACKENDS, attention
from afd_fast.reference import transformer as reference
from afd_fast.rollout import RolloutConfig, rollout, stream
from afd_fast.students import CausalWan, CausalWanConfig
from afd_fast.students.wan.graphs import GraphedStudent

FIELDS = (
    "case variant pass shape dtype ms ms_p20 ms_p80 peak_mib gb_s tflop_s of_peak max_err eager_err device torch triton "
    "commit date"
).split()
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
PEAK = 990.0 if CUDA and torch.cuda.get_device_capability() == (9, 0) else None


def timed(call, repeats: int) -> tuple[list[float], float]:
    """Sorted milliseconds after one warm-up, and the peak memory in MiB (CUDA)."""
    call()
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    samples = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        if CUDA:
            torch.cuda.synchronize()
        samples.append((time.perf_counter() - begin) * 1e3)
    return sorted(samples), torch.cuda.max_memory_allocated() / 2**20 if CUDA else float("nan")


class Rows:
    def __init__(self, repeats: int):
        self.repeats, self.rows = repeats, []
        run = lambda *c: subprocess.run(c, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
        try:
            import triton

            version = triton.__version__
        except ImportError:
            version = ""
        self.common = {
            "device": torch.cuda.get_device_name() if CUDA else "cpu", "torch": torch.__version__, "triton": version,
            "commit": run("git", "rev-parse", "--short", "HEAD"), "date": datetime.date.today().isoformat(), "pass": "forward",
        }  # fmt: skip

    def add(self, case, variant, shape, call, *, flop=None, bytes_moved=None, note="", error=None, scale=1.0):
        """Time `call` and print one row; scale divides the time (calls inside it)."""
        samples, peak = timed(call, self.repeats)
        at = lambda q: samples[min(len(samples) - 1, int(q * len(samples)))] / scale
        ms = at(0.5)
        row = dict.fromkeys(FIELDS, "") | self.common
        row |= {"case": case, "variant": variant, "shape": shape, "dtype": str(DTYPE).removeprefix("torch."), "ms": f"{ms:.4f}",
                "ms_p20": f"{at(0.2):.4f}", "ms_p80": f"{at(0.8):.4f}", "peak_mib": f"{peak:.0f}"}  # fmt: skip
        if flop is not None:
            rate = flop / ms / 1e9
            row |= {"tflop_s": f"{rate:.3f}", "of_peak": f"{rate / PEAK:.3f}" if PEAK else ""}
        if bytes_moved is not None:
            row["gb_s"] = f"{bytes_moved / ms / 1e6:.1f}"
        if error is not None:
            row["max_err"] = f"{error:.2e}"
        self.rows.append(row)
        rate = f"{row['tflop_s']} TFLOP/s" if row["tflop_s"] else f"{row['gb_s']} GB/s" if row["gb_s"] else ""
        print(f"{case:22s} {variant:18s} {shape:26s} {ms:10.3f} ms  {rate:16s} {note}", flush=True)

    def append_to(self, path: Path) -> None:
        """The rows at the end of a CSV file; the header first where the file is new."""
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if new:
                writer.writeheader()
            writer.writerows(self.rows)


def flops(c: CausalWanConfig, tokens: int, keys: int, batch: int = 1) -> float:
    """Matrix products of one cached forward: `tokens` queries over `keys` keys."""
    linear = 2 * tokens * (6 * c.dim**2 + 2 * c.dim * c.ffn_dim)
    return batch * c.num_layers * (linear + 4 * tokens * c.dim * (keys + c.text_len))


class Bench:
    def __init__(self, size: str, rows: Rows):
        self.rows = rows
        torch.manual_seed(0)
        with torch.device(DEVICE):
            config = CausalWanConfig.wan_1_3b() if size == "1.3b" else CausalWanConfig.tiny()
            self.model = CausalWan(config).to(DTYPE).eval()
        self.c, self.size = config, size
        self.h, self.w = (60, 104) if size == "1.3b" else (12, 20)
        self.tokens = self.h * self.w // 4

    def text(self, batch):
        c = self.c
        return self.model.encode_text(torch.randn(batch, c.text_len, c.text_dim, device=DEVICE, dtype=DTYPE))

    def noise(self, batch, frames):
        return torch.randn(batch, 16, frames, self.h, self.w, device=DEVICE, dtype=DTYPE)

    def forward(self):
        """One forward per chunk index, and the four steps of the sixth block (published: 344 ms on H100, DiT only)."""
        text, table = self.text(1), self.model.conditioning(937.5, tables=True)
        cache, x = self.model.new_cache(1, 21, self.h, self.w), self.noise(1, 21)
        for index, start in enumerate(range(0, 21, 3)):
            call = lambda s=start: self.model(x[:, :, s : s + 3], table, text, cache=cache, start_frame=s)
            flop = flops(self.c, 3 * self.tokens, (start + 3) * self.tokens)
            self.rows.add("forward", f"chunk{index}", f"B1 3x{self.tokens}", call, flop=flop)
        for index in (5, 6):
            four = lambda s=3 * index: [
                self.model(x[:, :, s : s + 3], table, text, cache=cache, start_frame=s) for _ in range(4)
            ]
            flop = 4 * flops(self.c, 3 * self.tokens, 3 * (index + 1) * self.tokens)
            self.rows.add("four_steps", f"chunk{index}", f"B1 4 x 3x{self.tokens}", four, flop=flop)

    def _rollout(self, case, variant, batch, frames, config=RolloutConfig(), model=None):
        text, noise = self.text(batch), self.noise(batch, frames)
        flop, passes = 0.0, len(config.steps) + 1
        for start in range(0, frames, config.chunk):
            keys = min(start + config.chunk, config.window or frames) * self.tokens
            last = start + config.chunk == frames
            flop += (passes - last) * flops(self.c, config.chunk * self.tokens, keys, batch)
        call = lambda: rollout(model or self.model, text, noise, config)
        self.rows.add(case, variant, f"B{batch} F{frames} {self.h}x{self.w}", call, flop=flop)
        ms = float(self.rows.rows[-1]["ms"])
        print(f"{'':22s} DiT only: {batch * (4 * frames - 3) / ms * 1e3:.2f} frames of video a second")

    def rollout(self):
        self._rollout("rollout", "plain", 1, 21)
        self._rollout("rollout", "fused_cache_pass", 1, 21, RolloutConfig(fuse_cache_pass=True))
        self._rollout("rollout", "framewise", 1, 21, RolloutConfig(chunk=1))
        if CUDA:
            self._rollout("rollout", "graphs", 1, 21, model=GraphedStudent(self.model))
            self._rollout("rollout", "framewise_graphs", 1, 21, RolloutConfig(chunk=1), GraphedStudent(self.model))
        text, noise = self.text(1), self.noise(1, 21)
        self.rows.add(
            "first_chunk", "latency", f"B1 F3 {self.h}x{self.w}", lambda: next(stream(self.model, text, noise))
        )

    def batch(self):
        for batch in (1, 2, 4, 8):
            self._rollout("rollout_batch", f"B{batch}", batch, 21)

    def window(self):
        for window, sink in ((None, 0), (12, 3), (9, 3), (6, 0)):
            name = "all" if window is None else f"window{window}_sink{sink}"
            self._rollout("rollout_window", name, 1, 42, RolloutConfig(window=window, sink=sink))

    def length(self):
        for frames in (21, 42, 84, 168):
            self._rollout("rollout_length", f"F{frames}_window12", 1, frames, RolloutConfig(window=12, sink=3))

    def attention(self):
        c, queries = self.c, 3 * self.tokens
        shape = (1, 21 * self.tokens, c.num_heads, c.dim // c.num_heads)
        k, v = (torch.randn(shape, device=DEVICE, dtype=DTYPE) for _ in range(2))
        q = k[:, :queries].clone()
        for backend in ("auto", *BACKENDS):
            try:
                attention(q, k, v, backend=backend)
            except (ImportError, ValueError) as error:
                print(f"{'attention':22s} {backend:18s} not here: {error}")
                continue
            for chunk in (0, 3, 6):
                keys = queries * (chunk + 1)
                call = lambda b=backend, n=keys: attention(q, k[:, :n], v[:, :n], backend=b)
                self.rows.add("attention", backend, f"{queries} x {keys} keys", call, flop=4 * queries * keys * c.dim)

    def operators(self):
        """Each fused operator, the reference, and torch.compile of the reference."""
        c, length = self.c, 3 * self.tokens
        make = lambda *s: torch.randn(s, device=DEVICE, dtype=DTYPE)
        x, y, k, table, w = (
            make(1, length, c.dim),
            make(1, length, c.dim),
            make(1, length, c.dim),
            make(1, 1, 6, c.dim),
            make(c.dim),
        )
        shift, scale, gate = table.unbind(2)[:3]
        cos, sin = self.model.rope(0, 3, self.h // 2, self.w // 2)
        cases = {
            "norm_modulate": (lambda m: m.norm_modulate(x, scale, shift), 2),
            "residual_norm": (lambda m: m.residual_norm(x, y, gate, scale=scale, shift=shift), 4),
            "rms_norm": (lambda m: m.rms_norm(x, w), 2),
            "qk_norm_rope": (lambda m: m.qk_norm_rope(x, k, w, w, cos, sin), 4),
        }
        for name, (call, tensors) in cases.items():
            first = lambda out: out[0] if isinstance(out, tuple) else out
            error = (first(call(ops)).double() - first(call(reference)).double()).abs().max().item()
            size = tensors * x.nbytes
            self.rows.add(name, "fused", f"{length}x{c.dim}", lambda f=call: f(ops), bytes_moved=size, error=error)
            self.rows.add(name, "reference", f"{length}x{c.dim}", lambda f=call: f(reference), bytes_moved=size)
            compiled = torch.compile(lambda f=call: f(reference))
            self.rows.add(name, "compile", f"{length}x{c.dim}", compiled, bytes_moved=size)

    def vae(self):
        """Wan's decoder with random weights; three latent frames a call, and one as diffusers does."""
        from diffusers import AutoencoderKLWan

        from afd_fast.students.wan.vae import WanDecoder

        small = {} if self.size == "1.3b" else {"base_dim": 8}
        vae = AutoencoderKLWan(**small).to(DEVICE, DTYPE)
        latents = self.noise(1, 21)
        for chunk in (1, 3):
            self.rows.add(
                "vae", f"chunk{chunk}", f"F21 {self.h}x{self.w}", lambda n=chunk: WanDecoder(vae, chunk=n)(latents)
            )


CASES = ("forward", "rollout", "batch", "window", "length", "attention", "operators", "vae")


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", default=CASES[:-1])
    parser.add_argument("--size", choices=("tiny", "1.3b"), default="1.3b" if CUDA else "tiny")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path, help="append the rows here")
    args = parser.parse_args(argv)
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"unknown cases {sorted(unknown)}; there are {CASES}")
    rows = Rows(args.repeats)
    bench = Bench(args.size, rows)
    for case in args.cases:
        getattr(bench, case)()
    if args.csv:
        rows.append_to(args.csv)


if __name__ == "__main__":
    main()

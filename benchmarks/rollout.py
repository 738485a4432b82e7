"""Times of the student: forwards by chunk index, rollouts by batch, window and length, attention, fused operators, VAE.

    python -m benchmarks.rollout [CASE ...] [--size tiny|1.3b] [--csv FILE]     random weights, no download
    cases: forward rollout batch window length attention operators vae video (default: all but vae and video)

Every row names what was timed. Forwards, attention and operators: the device's time, the host's apart (`rows.Clock`);
rollouts, VAE and video: the time a user waits. video: `afd_fast.generate`, student and VAE overlapped, without text encoder
and files. FLOPs are counted from the shapes (matrix products only); of_peak is against 990 TFLOP/s (H100/H200 dense
bfloat16) and left empty on other devices. Medians of --repeats after a warm-up. What is compared first and is wrong is not
timed, and the exit status is 1.
"""

import tempfile
import traceback
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from afd_fast.generate import GenerateOptions, GenerateStats, generate, jobs
from afd_fast.ops import transformer as ops
from afd_fast.ops.attention import BACKENDS, attention
from afd_fast.reference import transformer as reference
from afd_fast.rollout import RolloutConfig, rollout, stream
from afd_fast.students import CausalWan, CausalWanConfig
from afd_fast.students.student import Student
from afd_fast.students.wan.family import HashText, Networks
from afd_fast.students.wan.graphs import GraphedStudent
from afd_fast.students.wan.layers import WanText
from afd_fast.students.wan.vae import WanDecoder
from benchmarks.rows import CUDA, DEVICE, DTYPE, Arguments, Clock, Row, Table, Times, ranged, timed

FRAMES = 21  # latent frames of a clip
CHUNK = 3
EPS = torch.finfo(DTYPE).eps


def flops(c: CausalWanConfig, tokens: int, keys: int, batch: int = 1) -> float:
    """Matrix products of one cached forward: `tokens` queries over `keys` keys."""
    linear = 2 * tokens * (6 * c.dim**2 + 2 * c.dim * c.ffn_dim)
    return batch * c.num_layers * (linear + 4 * tokens * c.dim * (keys + c.text_len))


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def off(x: Tensor, exact: Tensor) -> float:
    """The largest difference, relative to the largest exact value."""
    return ((x.double() - exact.double()).abs().max() / exact.double().abs().max()).item()


class Wrong(Exception):
    """A result that is further from the exact one than twice PyTorch's own (style: no timing on a red test)."""


def check(name: str, error: float, eager: float) -> float:
    """The error itself; eager: that of PyTorch's operators in the same dtype."""
    if not error <= 2 * (eager + EPS):
        raise Wrong(f"{name}: error {error:.2e}, PyTorch's own is {eager:.2e}; nothing is timed on a red test")
    return error


class Bench:
    """A student with random weights; every case is a method."""

    def __init__(self, size: str, repeats: int, csv: Path | None = None) -> None:
        torch.manual_seed(0)
        with torch.device(DEVICE):
            self.config = CausalWanConfig.wan_1_3b() if size == "1.3b" else CausalWanConfig.tiny()
            self.model = CausalWan(self.config).to(DTYPE).eval()
        self.size, self.repeats, self.table, self.clock = size, repeats, Table(csv), Clock(DEVICE)
        self.height, self.width = (60, 104) if size == "1.3b" else (12, 20)
        self.tokens = self.height * self.width // 4  # per latent frame
        self.error: float | None = None  # of a forward

    def add(
        self,
        case: str,
        variant: str,
        shape: str,
        call: Callable[[], Any],
        flop: float | None = None,
        bytes_moved: int | None = None,
        max_err: float | None = None,
        waited: bool = False,
    ) -> Row:
        """Time a call; its row. waited: by the clock on the wall, not the device's."""
        times = timed(call, self.repeats) if waited else self.clock.timed(call, self.repeats)
        return self.row(case, variant, shape, times, flop=flop, bytes_moved=bytes_moved, max_err=max_err)

    def row(self, case: str, variant: str, shape: str, times: Times, **figures: Any) -> Row:
        row = Row(case, variant, shape, times, **figures)
        self.table.add(row)
        return row

    def checked(self) -> float:
        """The error of a chunk's cached forward. Exact: the reference's operators in float32."""
        if self.error is None:
            x, t, text = self.noise(1, CHUNK), torch.full((1, CHUNK), 937.5, device=DEVICE), self.text(1)
            cache = partial(self.model.new_cache, 1, CHUNK, self.height, self.width)
            with torch.enable_grad():  # with a gradient the operators are the reference
                eager = self.model(x, t, text, cache=cache()).detach()
                wide = deepcopy(self.model).float()
                cache32 = wide.new_cache(1, CHUNK, self.height, self.width)
                exact = wide(x.float(), t, text.map(Tensor.float), cache=cache32).detach()
            self.error = check("forward", off(self.model(x, t, text, cache=cache()), exact), off(eager, exact))
        return self.error

    def text(self, batch: int) -> WanText:
        return self.model.encode_text(randn(batch, self.config.text_len, self.config.text_dim))

    def noise(self, batch: int, frames: int) -> Tensor:
        return randn(batch, 16, frames, self.height, self.width)

    def forward(self) -> None:
        """One forward per chunk index, and the four steps of the sixth block (index 5) and of the last one (published:
        344 ms on H100, DiT only)."""
        error = self.checked()
        text, table = self.text(1), self.model.conditioning(937.5, tables=True)
        cache, x = self.model.new_cache(1, FRAMES, self.height, self.width), self.noise(1, FRAMES)
        queries = CHUNK * self.tokens

        def steps(index: int, count: int) -> None:
            start = CHUNK * index
            for _ in range(count):
                self.model(x[:, :, start : start + CHUNK], table, text, cache=cache, start_frame=start)

        for index in range(FRAMES // CHUNK):
            flop = flops(self.config, queries, (index + 1) * queries)
            self.add("forward", f"chunk{index}", f"B1 3x{self.tokens}", partial(steps, index, 1), flop, max_err=error)
        for index in (5, 6):
            flop = 4 * flops(self.config, queries, (index + 1) * queries)
            self.add(
                "four_steps", f"chunk{index}", f"B1 4 x 3x{self.tokens}", partial(steps, index, 4), flop, max_err=error
            )

    def _rollout(
        self,
        case: str,
        variant: str,
        batch: int,
        frames: int,
        config: RolloutConfig = RolloutConfig(),
        student: Student | None = None,
    ) -> None:
        """student: whose rollout must equal the model's."""
        error = self.checked()
        text, noise = self.text(batch), self.noise(batch, frames)
        flop, passes = 0.0, len(config.steps) + 1
        for start in range(0, frames, config.chunk):
            keys = min(start + config.chunk, config.window or frames) * self.tokens
            last = start + config.chunk == frames
            flop += (passes - last) * flops(self.config, config.chunk * self.tokens, keys, batch)
        if student is not None:
            draws = self.renoise(batch, frames, config)
            plain, ours = (rollout(m, text, noise, config, renoise=draws) for m in (self.model, student))
            again = rollout(student, text, noise, config, renoise=draws)  # the first records
            if (error := max(off(ours, plain), off(again, plain))) > 16 * EPS:
                raise Wrong(f"{variant}: differs from the plain rollout by {error:.2e}; nothing is timed on a red test")
        call = partial(rollout, student or self.model, text, noise, config)
        shape = f"B{batch} F{frames} {self.height}x{self.width}"
        row = self.add(case, variant, shape, call, flop, max_err=error, waited=True)
        print(f"{'':22s} DiT only: {self.fps(batch, frames, row):.2f} frames of video per second")

    @staticmethod
    def fps(batch: int, frames: int, row: Row) -> float:
        return batch * (4 * frames - 3) / row.times.ms * 1e3

    def renoise(self, batch: int, frames: int, config: RolloutConfig) -> Tensor:
        """The noise of every draw of a rollout."""
        draws = frames // config.chunk * (len(config.steps) - 1)
        return randn(draws, batch, 16, config.chunk, self.height, self.width)

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
        self.add("first_chunk", "latency", shape, lambda: next(stream(self.model, text, noise)), waited=True)

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
        wide = torch.float32 if DTYPE == torch.bfloat16 else torch.float64
        exact = reference.attention(q.to(wide), k.to(wide), v.to(wide))[0]
        eager = off(reference.attention(q, k, v)[0], exact)
        for backend in ("auto", *BACKENDS):
            try:
                error = check(f"attention {backend}", off(attention(q, k, v, backend=backend), exact), eager)
            except (ImportError, ValueError) as missing:
                print(f"{'attention':22s} {backend:18s} not here: {missing}")
                continue
            for chunk in (0, 3, 6):
                keys = queries * (chunk + 1)
                call = partial(attention, q, k[:, :keys], v[:, :keys], backend=backend)
                name, flop = f"{queries} x {keys} keys", 4 * queries * keys * c.dim
                self.add("attention", backend, name, call, flop, max_err=error)

    def operators(self) -> None:
        """Each fused operator, the reference, and torch.compile of the reference."""
        c, length = self.config, CHUNK * self.tokens
        given = {name: randn(1, length, c.dim) for name in "xyk"} | {"w": randn(c.dim)}
        given |= zip(("shift", "scale", "gate"), randn(1, 1, 6, c.dim).unbind(2))
        given |= zip(("cos", "sin"), self.model.rope(0, CHUNK, self.height // 2, self.width // 2))
        wide = {name: a.double() for name, a in given.items()}
        cases: list[tuple[str, int, Callable[[ModuleType, dict[str, Tensor]], Any]]] = [  # tensors read or written
            ("norm_modulate", 2, lambda m, i: m.norm_modulate(i["x"], i["scale"], i["shift"])),
            ("residual_norm", 4, lambda m, i: m.residual_norm(i["x"], i["y"], i["gate"], scale=i["scale"], shift=i["shift"])),
            ("rms_norm", 2, lambda m, i: m.rms_norm(i["x"], i["w"])),
            ("qk_norm_rope", 4, lambda m, i: m.qk_norm_rope(i["x"], i["k"], i["w"], i["w"], i["cos"], i["sin"])),
        ]  # fmt: skip
        for name, tensors, call in cases:
            torch.compiler.reset()
            shape, moved = f"{length}x{c.dim}", tensors * given["x"].nbytes
            source, target = (torch.ones(moved // 2, dtype=torch.uint8, device=DEVICE) for _ in range(2))
            copy = self.add(name, "copy", shape, partial(target.copy_, source), bytes_moved=moved)
            exact = first(call(reference, wide))
            eager = off(first(call(reference, given)), exact)
            variants: dict[str, Callable[[], Any]] = {
                "fused": partial(call, ops, given),
                "reference": partial(call, reference, given),
            }
            variants["compile"] = torch.compile(partial(call, reference, given), dynamic=False)
            for variant, made in variants.items():
                error = off(first(made()), exact)
                if variant == "fused":
                    check(name, error, eager)
                times = self.clock.timed(made, self.repeats)
                of_copy = copy.times.ms / times.ms
                self.row(
                    name, variant, shape, times, bytes_moved=moved, of_peak=of_copy, max_err=error, eager_err=eager
                )

    def _decoder(self, chunk: int = 3) -> WanDecoder:
        """Wan's, with random weights."""
        from diffusers import AutoencoderKLWan

        with torch.device(DEVICE):
            torch.manual_seed(0)
            vae: Any = AutoencoderKLWan() if self.size == "1.3b" else AutoencoderKLWan(base_dim=4, num_res_blocks=1)
        return WanDecoder(vae.to(DTYPE), chunk=chunk)

    def vae(self) -> None:
        """A clip decoded alone: three latent frames per call, and one as in diffusers."""
        frames = FRAMES if self.size == "1.3b" else 2 * CHUNK
        latents, pixels = self.noise(1, frames), {}
        for chunk in (1, 3):
            decoder = self._decoder(chunk)
            pixels[chunk] = decoder(latents)
            error = (pixels[chunk] - pixels[1]).abs().mean().item()
            if error > EPS:  # of values in [0, 1]
                raise Wrong(f"vae: chunks of {chunk} differ from one frame at a time by {error:.1e} on average")
            shape = f"F{frames} {self.height}x{self.width}"
            self.add("vae", f"chunk{chunk}", shape, partial(decoder, latents), max_err=error, waited=True)

    def video(self) -> None:
        """Pixels from prompts, as `generate` makes them: all frames, and the first chunk alone."""
        text, decoder = HashText(self.config.text_dim, self.config.text_len), self._decoder()
        networks = Networks(self.model, text, decoder)
        frames, batches = (FRAMES, (1, 2, 4, 8)) if self.size == "1.3b" else (2 * CHUNK, (1, 2))
        for batch in batches:
            options = GenerateOptions(frames, self.height, self.width, batch=batch)
            call = partial(generate, networks, jobs(["a ball"] * batch), tempfile.gettempdir(), options, write=no_file)
            call()
            runs: list[GenerateStats] = [call() for _ in range(self.repeats)]
            shape = f"B{batch} F{frames} {self.height}x{self.width}"
            row = self.row("video", "with VAE", shape, Times([r.video_seconds * 1e3 for r in runs]))
            print(f"{'':22s} with VAE: {self.fps(batch, frames, row):.2f} frames of video per second")
            self.row("video", "first chunk", shape, Times([r.first_chunk_seconds[0] * 1e3 for r in runs]))


def no_file(path: Path, pixels: Tensor, fps: float) -> None:
    """In the place of `write_video`: files are not timed."""


def first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


CASES: dict[str, Callable[[Bench], None]] = {
    "forward": Bench.forward, "rollout": Bench.rollout, "batch": Bench.batch, "window": Bench.window,
    "length": Bench.length, "attention": Bench.attention, "operators": Bench.operators, "vae": Bench.vae,
    "video": Bench.video,
}  # fmt: skip


@torch.no_grad()
def main() -> None:
    parser = Arguments(__doc__)
    default = [name for name in CASES if name not in ("vae", "video")]
    parser.add_argument("cases", nargs="*", metavar="CASE", default=default)
    parser.add_argument("--size", choices=("tiny", "1.3b"), default="1.3b" if CUDA else "tiny")
    parser.add_argument("--repeats", type=ranged(int, 1), default=5)
    args = parser.parsed()
    if unknown := sorted(set(args.cases) - set(CASES)):
        parser.error(f"unknown cases {', '.join(unknown)}; known: {', '.join(CASES)}")
    bench, failed = Bench(args.size, args.repeats, args.csv), []
    for case in args.cases:
        try:
            CASES[case](bench)
        except Exception:  # the other cases still run
            traceback.print_exc()
            failed.append(case)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

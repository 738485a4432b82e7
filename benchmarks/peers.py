"""The official Self-Forcing model against CausalWan: same random weights, same run, same inputs.

    python -m benchmarks.peers PATH_TO_SELF_FORCING_CHECKOUT [--size tiny|small|1.3b] [--batch 1] [--frames 21] [--csv FILE]
    python -m benchmarks.peers PATH --count        # operators of one cached forward, any machine

Every chunk's cached forward, and a whole rollout: four steps, re-noising and the cache pass of each chunk, as
`pipeline/causal_inference.py` has them. Needs no weights, both models get the same random ones, and of the checkout's packages
diffusers and einops. Where flash-attn is missing the official model's attention calls go to PyTorch SDPA (named in the
output).
"""

import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from afd_fast.reference.schedule import step_table
from afd_fast.rollout import RolloutConfig, rollout
from afd_fast.students import CausalWan, CausalWanConfig
from benchmarks.rows import CUDA, DEVICE, DTYPE, Arguments, Row, Table, Times, in_turn, ranged

FREE = ("view", "_unsafe_view", "unsqueeze", "transpose", "permute", "slice", "select", "expand", "unbind", "detach",
        "split", "t", "alias", "empty", "as_strided", "squeeze", "new_empty", "empty_like", "lift_fresh", "_reshape_alias",
        "view_as_complex", "view_as_real", "split_with_sizes", "_local_scalar_dense", "chunk", "item")  # fmt: skip
CHUNK = 3
CONFIG = RolloutConfig()
SIZES = {
    "tiny": CausalWanConfig.tiny(),
    "small": CausalWanConfig(dim=512, ffn_dim=2048, num_heads=4, num_layers=6),
    "1.3b": CausalWanConfig.wan_1_3b(),
}


class CountOperators(TorchDispatchMode):
    """Counts the operators that do work; views, allocations and reads of scalars are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name.split("::")[1] not in FREE
        return func(*args, **(kwargs or {}))


def operators(call: Callable[[], Any]) -> int:
    with CountOperators() as counter:
        call()
    return counter.count


def sdpa(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    """The official attention call through PyTorch."""
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


def not_compiled(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
    return function


@dataclass
class Checkout:
    """The official CausalWanModel class, imported without its inference packages, and the attention it calls."""

    model: type[torch.nn.Module]
    attention: str


def load_official(checkout: Path) -> Checkout:
    for name in ("wan", "wan.modules"):
        package = types.ModuleType(name)
        package.__path__ = [str(checkout / name.replace(".", "/"))]
        sys.modules[name] = package
    attention: Any = importlib.import_module("wan.modules.attention")
    compiled = torch.compile
    torch.compile = not_compiled  # type: ignore[assignment]  # FlexAttention is compiled at import, and not used here
    try:
        module: Any = importlib.import_module("wan.modules.causal_model")
    finally:
        torch.compile = compiled
    flash = CUDA and (attention.FLASH_ATTN_2_AVAILABLE or attention.FLASH_ATTN_3_AVAILABLE)
    if not flash:
        base: Any = importlib.import_module("wan.modules.model")
        module.attention = base.flash_attention = sdpa
    return Checkout(module.CausalWanModel, "flash-attn" if flash else "sdpa")


@dataclass
class Inputs:
    """Of a whole clip."""

    x: Tensor  # [B, C, F, H, W]
    t: Tensor  # [B, f] of a chunk
    context: Tensor  # [B, words, width]

    def chunk(self, start: int) -> Tensor:
        return self.x[:, :, start : start + CHUNK]


class Official:
    """The official model with the weights of a CausalWan: one cached forward per chunk."""

    def __init__(self, cls: Callable[..., torch.nn.Module], ours: CausalWan, inputs: Inputs) -> None:
        c, (batch, _, frames, height, width) = ours.config, inputs.x.shape
        with torch.device(ours.device):
            model = cls(
                dim=c.dim, ffn_dim=c.ffn_dim, num_heads=c.num_heads, num_layers=c.num_layers, text_len=c.text_len,
                text_dim=c.text_dim, freq_dim=c.freq_dim, in_dim=c.in_dim, out_dim=c.out_dim, cross_attn_norm=True,
            )  # fmt: skip
            self.model = model.to(ours.dtype).eval()
            self.model.load_state_dict(ours.state_dict())
            self.inputs, self.tokens = inputs, height * width // 4
            self.length = frames * self.tokens
            shape = (batch, self.length, c.num_heads, c.dim // c.num_heads)
            self.kv = [
                {name: torch.zeros(shape, dtype=ours.dtype) for name in ("k", "v")}
                | {name: torch.zeros(1, dtype=torch.long) for name in ("global_end_index", "local_end_index")}
                for _ in range(c.num_layers)
            ]
        self.cross: list[dict[str, Any]] = [{"is_init": False} for _ in range(c.num_layers)]

    def forward(self, start: int, x: Tensor | None = None, t: Tensor | None = None) -> Tensor:
        """x [B, C, f, H, W] at t [B, f]; the inputs' where not given."""
        x, t = self.inputs.chunk(start) if x is None else x, self.inputs.t if t is None else t
        return self.model(
            x, t=t, context=list(self.inputs.context), seq_len=self.length, kv_cache=self.kv, crossattn_cache=self.cross,
            current_start=start * self.tokens,
        )  # fmt: skip

    def rollout(self, renoise: Tensor) -> Tensor:
        """Latents of the whole clip; renoise [draws, B, C, f, H, W]."""
        for cache in self.kv:
            cache["global_end_index"].zero_(), cache["local_end_index"].zero_()
        for cross in self.cross:
            cross["is_init"] = False
        draws, steps, done = iter(renoise), step_table(CONFIG.steps, CONFIG.shift), []
        for start in range(0, self.inputs.x.shape[2], CHUNK):
            x = self.inputs.chunk(start)
            for index, (time, sigma) in enumerate(steps):
                v = self.forward(start, x, torch.full_like(self.inputs.t, time))
                x0 = (x.double() - sigma * v.double()).to(x.dtype)
                if index + 1 < len(steps):
                    sigma = steps[index + 1].sigma
                    x = ((1 - sigma) * x0.float() + sigma * next(draws).float()).to(x.dtype)
            self.forward(start, x0, torch.zeros_like(self.inputs.t))
            done.append(x0)
        return torch.cat(done, 2)


class Ours:
    """CausalWan the same way."""

    def __init__(self, model: CausalWan, inputs: Inputs) -> None:
        self.model, self.inputs = model, inputs
        self.text, self.table = model.encode_text(inputs.context), model.conditioning(937.5, tables=True)
        batch, _, frames, height, width = inputs.x.shape
        self.cache = model.new_cache(batch, frames, height, width)

    def forward(self, start: int) -> Tensor:
        return self.model(self.inputs.chunk(start), self.table, self.text, cache=self.cache, start_frame=start)

    def rollout(self, renoise: Tensor) -> Tensor:
        return rollout(self.model, self.text, self.inputs.x, CONFIG, renoise=renoise)


@dataclass
class Pair:
    """A chunk's cached forward by both: operators or times, and the largest difference of the results."""

    difference: float
    counts: list[int] = field(default_factory=list)
    times: list[Times] = field(default_factory=list)

    @property
    def figures(self) -> list[float]:
        return [float(n) for n in self.counts] or [t.ms for t in self.times]


def compare(calls: list[Callable[[], Tensor]], repeats: int | None) -> Pair:
    """The same of both, officially and ours. repeats: timed calls; none: operators are counted. SystemExit where the results
    differ by more than bfloat16's rounding explains."""
    theirs, mine = (call().float() for call in calls)
    pair = Pair(((theirs - mine).abs().max() / theirs.abs().max()).item())
    if not pair.difference < (0.1 if CUDA else 1e-3):
        raise SystemExit(f"the results differ by {pair.difference:.1e} of the largest; nothing is timed on a red test")
    if repeats is None:
        pair.counts = [operators(call) for call in calls]
    else:
        pair.times = in_turn(calls, repeats)
    return pair


@torch.no_grad()
def main() -> None:
    parser = Arguments(__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--size", choices=SIZES, default="1.3b" if CUDA else "tiny")
    parser.add_argument("--batch", type=ranged(int, 1), default=1)
    parser.add_argument("--frames", type=ranged(int, 1), default=21)
    parser.add_argument("--repeats", type=ranged(int, 1), default=5)
    parser.add_argument("--count", action="store_true", help="count operators instead of timing")
    args = parser.parsed()
    if args.count and args.csv:
        parser.error("--csv is for timed runs: leave out --count")
    height, width = (60, 104) if args.size == "1.3b" else (6, 10)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        config = SIZES[args.size]
        model = CausalWan(config).to(DTYPE).eval()
        x = torch.randn(args.batch, 16, args.frames, height, width, dtype=DTYPE)
        context = torch.randn(args.batch, config.text_len, config.text_dim, dtype=DTYPE)
        inputs = Inputs(x, torch.full((args.batch, CHUNK), 937.5), context)
    checkout = load_official(args.checkout)
    official, ours = Official(checkout.model, model, inputs), Ours(model, inputs)
    starts = range(0, args.frames, CHUNK)
    repeats = None if args.count else args.repeats
    pairs = {
        f"forward_chunk{start // CHUNK}": compare([partial(x.forward, start) for x in (official, ours)], repeats)
        for start in starts
    }
    draws = torch.randn(len(starts) * (len(CONFIG.steps) - 1), *inputs.chunk(0).shape, device=DEVICE, dtype=DTYPE)
    pairs["rollout"] = compare([partial(x.rollout, draws) for x in (official, ours)], repeats)
    unit = "operators" if args.count else "ms"
    print(
        f"cached forwards and a rollout, {args.size}, batch {args.batch}, {DTYPE}, {DEVICE}, official attention: {checkout.attention}"
    )
    print(f"{'':15} {'official ' + unit:>18} {'CausalWan ' + unit:>19} {'ratio':>6} {'max difference':>15}")
    for name, pair in pairs.items():
        theirs, mine = pair.figures
        print(f"{name:15} {theirs:18.2f} {mine:19.2f} {theirs / mine:6.2f} {pair.difference:15.2e}")
    if args.csv:
        shape = f"B{args.batch} F{args.frames} {height}x{width}"
        table = Table(args.csv)
        for name, pair in pairs.items():
            for variant, times in zip(("official", "ours"), pair.times):
                table.add(Row(f"peer_{name}", variant, f"{args.size} {shape}", times, max_err=pair.difference))


if __name__ == "__main__":
    main()

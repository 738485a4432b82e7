"""The official Self-Forcing model against CausalWan: same random weights, same run, same inputs.

    python benchmarks/peers.py PATH_TO_SELF_FORCING_CHECKOUT [--size tiny|1.3b] [--batch 1] [--frames 21]
    python benchmarks/peers.py PATH --count        # operators of one cached forward, any machine

Prints a table and, with --csv FILE, appends tidy rows. Needs no weights: both models get the same random ones.
Where flash-attn is missing the official model's attention calls go to PyTorch SDPA (named in the output).
"""

import argparse
import csv
import importlib
import sys
import time
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from afd_fast.students import CausalWan, CausalWanConfig

FREE = ("view", "_unsafe_view", "unsqueeze", "transpose", "permute", "slice", "select", "expand", "unbind", "detach",
        "split", "t", "alias", "empty", "as_strided", "squeeze", "new_empty", "empty_like", "lift_fresh", "_reshape_alias",
        "view_as_complex", "view_as_real", "split_with_sizes", "_local_scalar_dense", "chunk", "item")  # fmt: skip


class CountOperators(TorchDispatchMode):
    """Names of the operators that do work; views, allocations and reads of scalars are left out."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name not in FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def load_official(checkout: Path):
    """The official CausalWanModel class from a checkout, imported without its inference packages; (class, attention)."""
    for name in ("wan", "wan.modules"):
        package = types.ModuleType(name)
        package.__path__ = [str(checkout / name.replace(".", "/"))]
        sys.modules[name] = package
    attention = importlib.import_module("wan.modules.attention")
    compiled, torch.compile = torch.compile, lambda f, **_: f  # FlexAttention is compiled at import, and not used here
    try:
        module = importlib.import_module("wan.modules.causal_model")
    finally:
        torch.compile = compiled
    flash = attention.FLASH_ATTN_2_AVAILABLE or attention.FLASH_ATTN_3_AVAILABLE
    if not (flash and torch.cuda.is_available()):

        def sdpa(q, k, v, *args, **kwargs):
            q, k, v = (a.transpose(1, 2) for a in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()

        module.attention = sdpa
        importlib.import_module("wan.modules.model").flash_attention = sdpa
    return module.CausalWanModel, "flash-attn" if flash else "sdpa"


class Official:
    """The official model behind CausalWan's call: one cached forward per chunk."""

    def __init__(self, cls, ours: CausalWan, batch: int, frames: int, tokens: int):
        c = ours.config
        with torch.device(ours.device):
            self.model = cls(
                dim=c.dim, ffn_dim=c.ffn_dim, num_heads=c.num_heads, num_layers=c.num_layers, text_len=c.text_len,
                text_dim=c.text_dim, freq_dim=c.freq_dim, in_dim=c.in_dim, out_dim=c.out_dim, cross_attn_norm=True,
            ).to(ours.dtype).eval()  # fmt: skip
        self.model.load_state_dict(ours.state_dict())
        self.tokens, self.length = tokens, frames * tokens
        shape = (batch, self.length, c.num_heads, c.dim // c.num_heads)
        new = lambda *s: torch.zeros(s, dtype=ours.dtype, device=ours.device)
        index = lambda: torch.zeros(1, dtype=torch.long, device=ours.device)
        self.kv = [
            {"k": new(*shape), "v": new(*shape), "global_end_index": index(), "local_end_index": index()}
            for _ in range(c.num_layers)
        ]
        self.cross = [{"is_init": False} for _ in range(c.num_layers)]

    def __call__(self, x, t, context, start_frame):
        return self.model(
            x, t=t, context=context, seq_len=self.length, kv_cache=self.kv, crossattn_cache=self.cross,
            current_start=start_frame * self.tokens,
        )  # fmt: skip


def timed(call, repeats: int, cuda: bool) -> float:
    """Median milliseconds."""
    samples = []
    for _ in range(repeats):
        if cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            samples.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            call()
            samples.append((time.perf_counter() - begin) * 1e3)
    return sorted(samples)[len(samples) // 2]


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--size", choices=("tiny", "1.3b"), default="1.3b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--frames", type=int, default=21)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--count", action="store_true", help="count operators instead of timing")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    height, width = (60, 104) if args.size == "1.3b" else (6, 10)
    torch.manual_seed(0)
    with torch.device(device):
        ours = CausalWan(CausalWanConfig.wan_1_3b() if args.size == "1.3b" else CausalWanConfig.tiny()).to(dtype).eval()
    cls, attention = load_official(args.checkout)
    official = Official(cls, ours, args.batch, args.frames, height * width // 4)
    x = torch.randn(args.batch, 16, args.frames, height, width, device=device, dtype=dtype)
    context = torch.randn(args.batch, ours.config.text_len, ours.config.text_dim, device=device, dtype=dtype)
    text, table = ours.encode_text(context), ours.conditioning(937.5, tables=True)
    cache = ours.new_cache(args.batch, args.frames, height, width)
    t = torch.full((args.batch, 3), 937.5, device=device)
    rows = []
    for index, start in enumerate(range(0, args.frames, 3)):
        part = x[:, :, start : start + 3]
        theirs = lambda: official(part, t, list(context), start)  # noqa: B023
        mine = lambda: ours(part, table, text, cache=cache, start_frame=start)  # noqa: B023
        difference = (theirs().float() - mine().float()).abs().max().item()
        if args.count:
            counts = []
            for call in (theirs, mine):
                with CountOperators() as count:
                    call()
                counts.append(len(count.names))
            rows.append((index, *counts, counts[0] / counts[1], difference))
        else:
            times = [timed(call, args.repeats, cuda) for call in (theirs, mine)]
            rows.append((index, *times, times[0] / times[1], difference))
    unit = "operators" if args.count else "ms"
    print(f"one cached forward, {args.size}, batch {args.batch}, {dtype}, {device}, official attention: {attention}")
    print(f"{'chunk':>5} {'official ' + unit:>18} {'CausalWan ' + unit:>19} {'ratio':>6} {'max difference':>15}")
    for index, theirs, mine, ratio, difference in rows:
        print(f"{index:5d} {theirs:18.2f} {mine:19.2f} {ratio:6.2f} {difference:15.2e}")
    if args.csv:
        with args.csv.open("a", newline="") as file:
            writer = csv.writer(file)
            for index, *values, _, difference in rows:
                for variant, value in zip(("official", "ours"), values):
                    writer.writerow(
                        [f"forward_chunk{index}", variant, args.size, args.batch, str(dtype), unit, value, difference]
                    )


if __name__ == "__main__":
    main()

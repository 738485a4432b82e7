# ruff: noqa: E402
"""Box-Muller of the Triton kernels against the reference, for every argument that can make a difference.

python tests/exhaust_noise.py     (minutes; not part of `make test`)
A word only enters through its float32, so the words that float32 holds are all there is: 84 million for the radius,
117 million for the angle. Runs the kernels' source in the interpreter, whose rsqrt is not the GPU's: that the GPU's
square root rounds correctly is shown by test_compiles.py (the instructions of sqrt.rn.f32).
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch
import triton
import triton.language as tl
from afd_kernels.noise import box_muller
from torch import Tensor

from afd_fast.reference import noise
from tests.interpreter import install

install()
MANY = 1 << 20


@triton.jit
def _normals(a_ptr, b_ptr, first_ptr, second_ptr, n: tl.constexpr):
    i = tl.arange(0, n)
    a, b = tl.load(a_ptr + i).to(tl.uint32, bitcast=True), tl.load(b_ptr + i).to(tl.uint32, bitcast=True)
    first, second = box_muller(a, b)
    tl.store(first_ptr + i, first)
    tl.store(second_ptr + i, second)


def integers(bits: int) -> Iterator[Tensor]:
    """An integer below 2^bits for every float32 that one rounds to, at most `MANY` at a time (int64)."""
    yield from torch.arange(1 << 24).split(MANY)
    for k in range(24, bits):
        yield from ((torch.arange(1 << 23, 1 << 24)) << (k - 23)).split(MANY)
    yield torch.tensor([(1 << bits) - 1])  # rounds up to 2^bits


def wrong(a: Tensor, b: Tensor) -> int:
    """The pairs of words (int64) whose normals differ in a bit."""
    a, b = (torch.nn.functional.pad(x, (0, MANY - x.numel())) for x in (a, b))
    found = torch.empty(2, MANY)
    words = [torch.where(x < 1 << 31, x, x - (1 << 32)).to(torch.int32) for x in (a, b)]
    _normals[(1,)](*words, found[0], found[1], MANY)
    expected = torch.stack(noise.box_muller(a, b))
    return int((found.view(torch.int32) != expected.view(torch.int32)).any(0).sum())


def main() -> None:
    start, total, bad = time.time(), 0, 0
    spread = torch.arange(MANY) * 2654435761 & noise.MASK  # the other word: anything
    for a in integers(32):
        total, bad = total + a.numel(), bad + wrong(a, spread[: a.numel()])
    print(f"radius: {total} words, {bad} wrong, {time.time() - start:.0f} s", flush=True)
    count = 0
    for turn, rest in enumerate(integers(29)):
        for sign in (1, -1):
            b = (sign * rest + (turn % 4 << 30)) & noise.MASK
            count, bad = count + b.numel(), bad + wrong(spread[: b.numel()], b)
    print(f"angle: {count} words, {bad} wrong in all, {time.time() - start:.0f} s")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()

"""Formulas for the FLOPs and bytes of a causal student's rollout and update, and a roofline.

They follow `students/wan/model.py`, `students/toy/model.py`, `rollout.py` and `training/velocity.py` as they are and equal PyTorch's
counter on the real modules (tests/test_estimate.py): 2 FLOPs a multiply-add, every operand read and every
result written once. What other kernels move is counted by `meters.py`; VideoReward's is in the table `PASSES`.

Legend: b samples, N tokens of a chunk, (i, o) a linear from width i to o, r rank of an adapter.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

from afd_fast.config import TrainConfig
from afd_fast.sampler import RolloutConfig
from afd_fast.students.toy.model import ToyConfig
from afd_fast.students.wan.layers import PATCH, CausalWanConfig

T5_LAYER, T5_LAYERS, T5_WIDTH = 4 * 4096**2 + 3 * 4096 * 10240, 24, 4096  # google/umt5-xxl/config.json
T5_PARAMETERS = 5_680_910_336  # of its encoder, embedding included
ATTENTION_BACKWARD = 2.5  # of its forward: five products for two, as flash kernels recompute the scores

LIKELY = (0.6, 0.9)  # of a GPU's products and bandwidth, in a time that is no floor

# VideoReward's kernels that are no products: how often a layer's rows [rows, width] are read or written in bfloat16, and a
# clip's pixels in float32. Of `python -m tests.fake_cuda.count discriminator --size 1.3b`; tests/fake_cuda compares them.
PASSES = {"pixels": 5.8, "tower": 110.5, "forward": 98.7, "backward": 365.0}

Linears: TypeAlias = tuple[tuple[int, int], ...]  # (inputs, outputs) of each


@dataclass(frozen=True)
class GPU:
    """Published figures: FLOP/s of dense bfloat16 products and of float32 ones (without TF32, PyTorch's default), bytes/s
    and bytes of memory. Data sheets of NVIDIA H100 SXM5, H200 SXM, A100 SXM4 80 GB; Ada architecture paper (RTX 4090)."""

    name: str
    half: float
    single: float
    bandwidth: float
    memory: float

    def likely(self) -> "GPU":
        """What kernels commonly reach of it: an assumption, no measurement."""
        products, bandwidth = LIKELY
        half, single = products * self.half, products * self.single
        return replace(self, half=half, single=single, bandwidth=bandwidth * self.bandwidth)


GPUS = {
    "h100": GPU("H100 SXM", 989e12, 67e12, 3.35e12, 80e9),
    "h200": GPU("H200", 989e12, 67e12, 4.8e12, 141e9),
    "a100": GPU("A100 80 GB", 312e12, 19.5e12, 2.04e12, 80e9),
    "rtx4090": GPU("RTX 4090", 165.2e12, 82.6e12, 1.008e12, 24e9),
}


@dataclass(frozen=True)
class Work:
    """FLOPs on bfloat16 (half) and float32 (single) operands, bytes moved by those products, and by all other kernels
    (light), which run before and after them."""

    half: float = 0.0
    single: float = 0.0
    bytes: float = 0.0
    light: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.half + other.half, self.single + other.single, self.bytes + other.bytes, self.light + other.light
        )

    def __rmul__(self, n: float) -> "Work":
        return Work(n * self.half, n * self.single, n * self.bytes, n * self.light)

    @property
    def flops(self) -> float:
        return self.half + self.single

    def seconds(self, gpu: GPU) -> float:
        """The roofline: max(time of the products at the published peaks, time of their bytes), then the other kernels."""
        return max(self.compute(gpu), self.bytes / gpu.bandwidth) + self.light / gpu.bandwidth

    def compute(self, gpu: GPU) -> float:
        return self.half / gpu.half + self.single / gpu.single

    def bound(self, gpu: GPU) -> str:
        """What takes more than half of the time."""
        return "compute" if 2 * self.compute(gpu) > self.seconds(gpu) else "bandwidth"


def work(flops: float, elements: float, size: int) -> Work:
    """Operands of `size` bytes: 2 are half precision, 4 single."""
    return Work(flops if size == 2 else 0.0, flops if size == 4 else 0.0, size * elements)


def product(rows: float, i: int, o: int, size: int) -> Work:
    """[rows, i] @ [i, o]."""
    return work(2 * rows * i * o, rows * (i + o) + i * o, size)


def total(works: Iterable[Work]) -> Work:
    """Their sum."""
    return sum(works, Work())


@dataclass(frozen=True)
class Stack:
    """Transformer blocks whose linears carry adapters of any rank: forward and backward of the adapters' training.

    linears: (i, o) of a block on every row, the first `entry` of them on the block's input; width, kv_width: of the
    queries and of the keys; size, adapter: bytes of a weight and of what the adapters compute in.
    """

    layers: int
    linears: Linears
    entry: int
    width: int
    kv_width: int
    size: int
    adapter: int = 4

    def adapters(self, rows: float, rank: int, linears: Linears | None = None) -> Work:
        """Both products of every adapter."""
        if not rank:
            return Work()
        chosen = self.linears if linears is None else linears
        return total(product(rows, i, rank, self.adapter) + product(rows, rank, o, self.adapter) for i, o in chosen)

    def attention(self, rows: float, pairs: float, keys: float) -> Work:
        """Queries [rows] over [keys], `pairs` of them: scores and values."""
        return work(4 * pairs * self.width, 2 * rows * self.width + 2 * keys * self.kv_width, self.size)

    def forward(self, rows: float, pairs: float, keys: float, rank: int = 0) -> Work:
        linear = total(product(rows, i, o, self.size) for i, o in self.linears)
        return self.layers * (linear + self.adapters(rows, rank) + self.attention(rows, pairs, keys))

    def backward(self, rows: float, pairs: float, keys: float, rank: int) -> Work:
        """Frozen weights pass a gradient to their input and have none themselves, adapters have both; the first block's
        input is no function of an adapter and gets none."""
        attention = self.attention(rows, pairs, keys)
        attention = replace(
            2 * attention, **{k: ATTENTION_BACKWARD * getattr(attention, k) for k in ("half", "single")}
        )
        linear = total(product(rows, o, i, self.size) for i, o in self.linears)
        unused = [product(rows, o, i, self.size) for i, o in self.linears[: self.entry]]
        unused += [product(rows, rank, i, self.adapter) for i, _ in self.linears[: self.entry]]
        return self.layers * (linear + 2 * self.adapters(rows, rank) + attention) + -1 * total(unused)


@dataclass(frozen=True)
class Student:
    """A causal student's formulas.

    before, after: linears on every token around the blocks; time: on a timestep's row, `rows` of them a sample and chunk
    (tabled: one for a distinct t of a rollout); text, pooled: on a prompt's tokens and on the prompt; text_linears: in
    every block on a prompt's tokens, with adapters if text_adapted.
    """

    stack: Stack
    chunks: int
    tokens: int  # of a chunk
    text_len: int
    before: Linears = ()
    after: Linears = ()
    time: Linears = ()
    rows: int = 1
    tabled: bool = False
    text: Linears = ()
    pooled: Linears = ()
    text_linears: Linears = ()
    text_adapted: bool = False

    def plain(self, rows: float, linears: Iterable[tuple[int, int]]) -> Work:
        return total(product(rows, i, o, self.stack.size) for i, o in linears)

    def _shape(self, b: int, index: int) -> tuple[float, float, float]:
        keys = (index + 1) * self.tokens + self.text_len
        return b * self.tokens, b * self.tokens * keys, b * keys

    def forward(self, b: int, index: int, rank: int = 0, times: int | None = None) -> Work:
        """Chunk `index` over the cache of the chunks before it."""
        times = b * self.rows if times is None else times
        around = self.plain(b * self.tokens, self.before + self.after) + self.plain(times, self.time)
        return around + self.stack.forward(*self._shape(b, index), rank)

    def backward(self, b: int, index: int, rank: int) -> Work:
        """The history is detached: its keys are operands of the attention and nothing else."""
        return self.plain(b * self.tokens, [(o, i) for i, o in self.after]) + self.stack.backward(
            *self._shape(b, index), rank
        )

    def encode(self, b: int, rank: int = 0, backward: bool = False) -> Work:
        """A prompt's cross-attention keys and values; their gradient ends in the adapters."""
        s, rows, rank = self.stack, b * self.text_len, rank if self.text_adapted else 0
        if backward:
            unused = total(product(rows, rank, i, s.adapter) for i, _ in self.text_linears) if rank else Work()
            return s.layers * (2 * s.adapters(rows, rank, self.text_linears) + -1 * unused)
        inside = self.plain(rows, self.text_linears) + s.adapters(rows, rank, self.text_linears)
        return self.plain(rows, self.text) + self.plain(b, self.pooled) + s.layers * inside

    def merge(self, rank: int) -> Work:
        """W + B A of every adapted linear, in float32."""
        linears = self.stack.linears + (self.text_linears if self.text_adapted else ())
        return self.stack.layers * total(product(o, rank, i, 4) for i, o in linears)

    def rollout(self, b: int, config: RolloutConfig, rank: int) -> Work:
        """Denoising steps and the cache pass of every chunk but the last, adapters merged; the prompt is encoded before."""
        first = config.first_chunk_steps or config.steps
        passes = [len(config.steps if index else first) + (index + 1 < self.chunks) for index in range(self.chunks)]
        times, known = 0 if self.tabled else None, len({*config.steps, *first}) if self.chunks > 1 else len(first)
        tables = self.plain(known + (self.chunks > 1), self.time) if self.tabled else Work()
        run = total(n * self.forward(b, index, times=times) for index, n in enumerate(passes))
        return self.encode(b, rank) + self.merge(rank) + tables + run

    def velocity(self, b: int, rank: int = 0) -> Work:
        """Every noised chunk over the clean ones before it, without the text."""
        return total((1 + (index + 1 < self.chunks)) * self.forward(b, index, rank) for index in range(self.chunks))

    def policy(self, b: int, config: TrainConfig) -> Work:
        """The policy's part of `student_backward`: forward and backward."""
        rank = config.student.lora_rank
        back = total(self.backward(b, index, rank) for index in range(self.chunks)) + self.encode(b, rank, True)
        twice = config.update.chunked and config.loss.weighting != "none"  # first without a graph
        return (1 + twice) * self.velocity(b, rank) + self.encode(b, rank) + back

    def update(self, b: int, config: TrainConfig) -> Work:
        """`student_backward`: policy, reference where the prior has weight, lagged policy where asked."""
        out, frozen = self.policy(b, config), self.velocity(b) + self.encode(b)
        if config.loss.ref_coef:
            out += 1 / config.update.ref_every * frozen
        merges = math.ceil(b / (config.update.batch or b))  # one for each backward
        return out + merges * self.merge(config.student.lora_rank) + frozen if config.update.v_old == "ema" else out

    @property
    def cache_bytes(self) -> int:
        """Keys and values of every frame of a sample (ToyStudent's cache grows to this)."""
        return 2 * self.stack.layers * self.chunks * self.tokens * self.stack.kv_width * self.stack.size


def wan(c: CausalWanConfig, frames: int, height: int, width: int, chunk: int, size: int) -> Student:
    """CausalWan on latents of frames x height x width, its weights of `size` bytes (2 or 4)."""
    d, patch = c.dim, PATCH**2
    linears = (*[(d, d)] * 6, (d, c.ffn_dim), (c.ffn_dim, d))  # self q k v o, cross q o, MLP
    return Student(
        Stack(c.num_layers, linears, 3, d, d, size, adapter=size), frames // chunk, chunk * height * width // patch, c.text_len,
        before=((patch * c.in_dim, d),), after=((d, patch * c.out_dim),),
        time=((c.freq_dim, d), (d, d), (d, 6 * d)), rows=chunk, tabled=True,
        text=((c.text_dim, d), (d, d)), text_linears=((d, d), (d, d)), text_adapted=True,
    )  # fmt: skip


def toy(c: ToyConfig) -> Student:
    """ToyStudent, in float32."""
    d, tubelet = c.dim, 3 * c.chunk * c.patch**2
    linears = ((d, 3 * d), (d, d), (d, 4 * d), (4 * d, d))  # qkv, proj, up, down
    return Student(
        Stack(c.layers, linears, 1, d, d, 4), c.frames // c.chunk, (c.height // c.patch) * (c.width // c.patch), c.text_len,
        before=((tubelet, c.hidden), (c.hidden, d)), after=((d, c.hidden), (c.hidden, tubelet)),
        time=(*[(d, d)] * 2, *[(d, 6 * d)] * c.layers, (d, 2 * d)),
        pooled=((d, d), (d, d)), text_linears=((d, 2 * d),),
    )  # fmt: skip


def vision_tower(c: Any, clips: int, grid: tuple[int, int, int], size: int = 2) -> Work:
    """Qwen2-VL's tower, forward. c: its vision config; grid: patches (t, h, w) of a clip, which attend within one t."""
    e, rows = c.embed_dim, clips * grid[0] * grid[1] * grid[2]
    wide, patch = c.spatial_merge_size**2 * e, c.in_channels * c.temporal_patch_size * c.patch_size**2
    blocks = Stack(c.depth, ((e, 3 * e), (e, e), (e, c.mlp_ratio * e), (c.mlp_ratio * e, e)), 1, e, e, size)
    merged = rows / c.spatial_merge_size**2
    merger = product(merged, wide, wide, size) + product(merged, wide, c.hidden_size, size)
    return product(rows, patch, e, size) + blocks.forward(rows, rows * grid[1] * grid[2], rows) + merger


def language_model(c: Any, size: int = 2) -> Stack:
    """Qwen2-VL's decoder blocks with adapters on every linear, which compute in the trunk's precision. c: its text config."""
    d, kv = c.hidden_size, c.hidden_size // c.num_attention_heads * c.num_key_value_heads
    linears = (
        (d, d),
        (d, kv),
        (d, kv),
        (d, d),
        (d, c.intermediate_size),
        (d, c.intermediate_size),
        (c.intermediate_size, d),
    )
    return Stack(c.num_hidden_layers, linears, 3, d, kv, size, adapter=size)


class RewardTraffic(NamedTuple):
    """What VideoReward's kernels move that are no products: preparing pixels and the tower, the language model's forward,
    and its backward with the forward that checkpointing runs again."""

    encode: Work
    forward: Work
    backward: Work


def reward_traffic(
    c: Any, clips: int, video: tuple[int, int, int], grid: tuple[int, int, int], length: int
) -> RewardTraffic:
    """c: Qwen2-VL's config; video: frames, height, width of a clip; grid as of `vision_tower`; length: tokens of a clip."""
    text, vision, patches = c.get_text_config(), c.vision_config, math.prod(grid)
    tower = PASSES["tower"] * 2 * vision.depth * patches * vision.embed_dim
    layers = 2 * text.num_hidden_layers * length * text.hidden_size
    return RewardTraffic(
        Work(light=clips * (tower + PASSES["pixels"] * 4 * 3 * math.prod(video))),
        Work(light=clips * layers * PASSES["forward"]),
        Work(light=clips * layers * PASSES["backward"]),
    )


def causal(clips: int, length: int) -> tuple[int, float, int]:
    """(rows, pairs, keys) of clips of `length` tokens each, a token seeing itself and those before it."""
    return clips * length, clips * length * (length + 1) / 2, clips * length


def text_encoder(prompts: int, tokens: int) -> Work:
    """UMT5-XXL on padded prompts, in bfloat16, attention unfused as transformers has it."""
    rows, d = prompts * tokens, T5_WIDTH
    layer = work(2 * rows * T5_LAYER + 4 * rows * tokens * d, T5_LAYER + 10 * rows * d, 2)
    return T5_LAYERS * layer

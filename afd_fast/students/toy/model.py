"""The small student and discriminator of the embedded task, with the call surface of the real ones.

ToyStudent is a causal block-autoregressive rectified-flow transformer: a chunk of frames is one block, a
token is a (chunk x patch x patch) tubelet, a block attends to the prompt's tokens, to the clean earlier
blocks (KV cache) and to itself. It predicts x0 and returns the velocity (x_t - x0) / t.

Legend: B samples, C channels, F frames, H x W pixels, K chunks, N tokens per chunk, D width, L text tokens.
Latents are pixels in [-1, 1]: the toy's "VAE" is `encode_video` / `decode_video`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd_fast.errors import ConfigError, check_at_least, check_fields, field_types
from afd_fast.students.student import ShardPlan, StudentModule, check_text
from afd_fast.students.toy.text import PromptEmbedding


@dataclass(frozen=True)
class ToyConfig:
    """Sizes of the student. `chunk` frames are generated at a time."""

    frames: int = 12
    height: int = 16
    width: int = 16
    chunk: int = 3
    patch: int = 8
    dim: int = 96
    heads: int = 4
    layers: int = 4
    hidden: int = 256
    text_len: int = 12

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, 1, *field_types(type(self)))
        for whole, part in (("height", "patch"), ("width", "patch"), ("dim", "heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ConfigError(f"{whole} must be a multiple of {part}, got {self}")


def encode_video(video: Tensor) -> Tensor:
    """Pixels in [0, 1] -> latents in [-1, 1]."""
    return video * 2 - 1


def decode_video(latents: Tensor) -> Tensor:
    """Latents in [-1, 1] -> pixels in [0, 1]."""
    return ((latents + 1) / 2).clamp(0, 1)


def _mlp(d_in: int, hidden: int, d_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d_in, hidden), nn.GELU(), nn.Linear(hidden, d_out))


def _zero(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


@dataclass(frozen=True)
class ToyText:
    """A prompt, encoded once: pooled embedding and every block's cross keys and values."""

    pooled: Tensor  # [B, D]
    keys: list[Tensor]  # per block [B, heads, L, D / heads]
    values: list[Tensor]


class KeysValues(NamedTuple):
    """What a block attends to besides the prompt: [B, heads, tokens, D / heads] each, and a mask [N, L + tokens]."""

    k: Tensor
    v: Tensor
    mask: Tensor | None = None


class ToyCache:
    """Keys and values of the clean chunks so far. held: tokens that every layer has, host integer."""

    def __init__(self, layers: int):
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers
        self.held = 0

    def begin(self, start: int) -> None:
        """A forward is about to write tokens from `start` on: until it is through, what it may overwrite is not held."""
        if self.held < start:
            raise ValueError(f"the cache holds no history up to token {start}: run the earlier chunks first")
        self.held = start

    def write(self, layer: int, k: Tensor, v: Tensor, start: int) -> "KeysValues":
        """Put this chunk's keys and values at token `start`; return the history with them appended.

        The history is detached, the returned tail keeps its graph: the KV-detached update needs just that.
        """
        past_k, past_v = self.keys[layer], self.values[layer]
        if start and past_k is not None and past_v is not None:
            k = torch.cat([past_k[:, :, :start], k], 2)
            v = torch.cat([past_v[:, :, :start], v], 2)
        self.keys[layer], self.values[layer] = k.detach(), v.detach()
        return KeysValues(k, v)


class Block(nn.Module):
    """Modulated attention over [prompt | history | own chunk] and a modulated MLP."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.text_kv = nn.Linear(dim, 2 * dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.modulation = _zero(nn.Linear(dim, 6 * dim))

    def split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """[B, N, parts * D] -> parts tensors [B, heads, N, D / heads]."""
        batch, length, width = x.shape
        return x.view(batch, length, parts, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def encode_text(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """The prompt's keys and values [B, heads, L, D / heads]."""
        return self.split(self.text_kv(tokens), 2)

    def forward(
        self, x: Tensor, cond: Tensor, text_k: Tensor, text_v: Tensor, attend: Callable[[Tensor, Tensor], KeysValues]
    ) -> Tensor:
        """attend: puts this call's keys and values behind the history."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond).chunk(6, -1)
        q, k, v = self.split(self.qkv(self.norm1(x) * (1 + scale1) + shift1), 3)
        k, v, mask = attend(k, v)
        k, v = torch.cat([text_k, k], 2), torch.cat([text_v, v], 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + gate1 * self.proj(out.transpose(1, 2).reshape(x.shape))
        return x + gate2 * self.down(F.gelu(self.up(self.norm2(x) * (1 + scale2) + shift2)))


class ToyStudent(StudentModule):
    """See the module docstring. `forward` is called chunk by chunk, as CausalWan's."""

    channels = 3

    def __init__(self, config: ToyConfig = ToyConfig()):
        super().__init__()
        c = self.config = config
        self.chunks = c.frames // c.chunk
        self.tokens = (c.height // c.patch) * (c.width // c.patch)  # per chunk
        tubelet = 3 * c.chunk * c.patch**2
        self.embed = _mlp(tubelet, c.hidden, c.dim)
        self.position = nn.Parameter(torch.randn(self.chunks, self.tokens, c.dim) * 0.02)
        self.text = PromptEmbedding(c.dim)
        self.time = nn.Sequential(nn.Linear(c.dim, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim))
        self.blocks = nn.ModuleList(Block(c.dim, c.heads) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.dim, elementwise_affine=False)
        self.head_modulation = _zero(nn.Linear(c.dim, 2 * c.dim))
        self.head = _mlp(c.dim, c.hidden, tubelet)
        last = self.head[2]
        assert isinstance(last, nn.Linear)
        nn.init.constant_(_zero(last).bias, -0.88)  # the background of the physics world

    def encode_text(self, ids: Tensor) -> ToyText:
        """Word ids [B, L] of `tokenize` -> what every later call needs of the prompt."""
        tokens, pooled = self.text(ids.to(self.position.device))
        pairs = [block.encode_text(tokens) for block in self.blocks if isinstance(block, Block)]
        return ToyText(pooled, [k for k, _ in pairs], [v for _, v in pairs])

    def shard_plan(self) -> ShardPlan:
        """Block by block."""
        return ShardPlan(list(self.blocks), (), ("encode_text", "forward_teacher_forcing", "forward_block_causal"))

    def new_cache(
        self, batch: int, frames: int, height: int, width: int, window: int | None = None, sink: int = 0
    ) -> ToyCache:
        """An empty cache; sizes are checked against the configuration. ValueError for a window, which it cannot have."""
        c = self.config
        if window is not None:
            raise ValueError("this student's cache has no window")
        if (frames, height, width) != (c.frames, c.height, c.width):
            raise ValueError(
                f"this student makes {c.frames} frames of {c.height}x{c.width}, not {(frames, height, width)}"
            )
        return ToyCache(c.layers)

    def patchify(self, x: Tensor) -> Tensor:
        """[B, 3, k * chunk, H, W] -> [B, k * N, tubelet]."""
        c, batch = self.config, x.shape[0]
        x = x.reshape(batch, 3, -1, c.chunk, c.height // c.patch, c.patch, c.width // c.patch, c.patch)
        return x.permute(0, 2, 4, 6, 3, 1, 5, 7).reshape(batch, -1, 3 * c.chunk * c.patch**2)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Inverse of `patchify`."""
        c, batch = self.config, x.shape[0]
        x = x.view(batch, -1, c.height // c.patch, c.width // c.patch, c.chunk, 3, c.patch, c.patch)
        return x.permute(0, 5, 1, 4, 2, 6, 3, 7).reshape(batch, 3, -1, c.height, c.width)

    def condition(self, t: Tensor, text: ToyText) -> Tensor:
        """t [B, K] in 0..1000 -> [B, K, D]."""
        half = self.config.dim // 2
        freq = torch.exp(-math.log(1000.0) * torch.arange(half, device=t.device, dtype=torch.float32) / half) / 100
        angle = t[..., None] * freq.to(text.pooled.dtype)
        return F.silu(self.time(torch.cat([angle.sin(), angle.cos()], -1)) + text.pooled[:, None])

    def predict(self, x: Tensor, cond: Tensor) -> Tensor:
        shift, scale = self.head_modulation(cond).chunk(2, -1)
        return self.head(self.norm(x) * (1 + scale) + shift)

    def forward(self, x: Tensor, t: Tensor, text: ToyText, *, cache: ToyCache, start_frame: int = 0) -> Tensor:
        """Velocity of one chunk and, as a side effect, its keys and values in the cache.

        x: [B, 3, chunk, H, W]; t: [B, chunk] in 0..1000, equal within the chunk; returns x's shape.
        """
        if x.shape[2] != self.config.chunk or start_frame % self.config.chunk:
            raise ValueError(
                f"ToyStudent works in chunks of {self.config.chunk} frames, got {x.shape[2]} at {start_frame}"
            )
        check_text(text, ToyText)
        index = start_frame // self.config.chunk
        start = index * self.tokens
        cache.begin(start)
        cond = self.condition(t[:, :1], text)  # [B, 1, D]
        h = self.embed(self.patchify(x)) + self.position[index]
        for layer, block in enumerate(self.blocks):
            attend = partial(cache.write, layer, start=start)
            h = block(h, cond, text.keys[layer], text.values[layer], attend)
        cache.held = start + self.tokens
        return self.velocity(x, t, self.unpatchify(self.predict(h, cond)))

    def forward_teacher_forcing(
        self,
        x: Tensor,
        t: Tensor,
        text: ToyText,
        clean: Tensor,
        chunk: int | None = None,
        *,
        window: int | None = None,
        sink: int = 0,
    ) -> Tensor:
        """All chunks at once: [clean || noisy] under the teacher-forcing mask, the full-gradient twin of
        the cached forward. x, clean: [B, 3, F, H, W]; t: [B, F] in 0..1000. Returns the velocity of x."""
        self._check_options(chunk, window)
        check_text(text, ToyText)
        history = (self.chunks - 1) * self.tokens  # nobody attends to the last clean chunk
        position = self.position.flatten(0, 1)
        h_clean = self.embed(self.patchify(clean))[:, :history] + position[:history]
        h = torch.cat([h_clean, self.embed(self.patchify(x)) + position], 1)
        t_chunk = t[:, :: self.config.chunk]  # [B, K]
        cond = self.condition(torch.cat([torch.zeros_like(t_chunk[:, 1:]), t_chunk], 1), text)
        cond = cond.repeat_interleave(self.tokens, 1)
        mask = self._teacher_forcing_mask(text.keys[0].shape[2]).to(x.device)
        for layer, block in enumerate(self.blocks):
            h = block(h, cond, text.keys[layer], text.values[layer], partial(KeysValues, mask=mask))
        return self.velocity(x, t, self.unpatchify(self.predict(h[:, history:], cond[:, history:])))

    def forward_block_causal(
        self, x: Tensor, t: Tensor, text: ToyText, chunk: int | None = None, *, window: int | None = None, sink: int = 0
    ) -> Tensor:
        """All chunks at once, each given itself and the *noised* chunks before it: not the sampling function, but what
        Astrolabe trains. x: [B, 3, F, H, W]; t: [B, F] in 0..1000. Returns the velocity of x."""
        self._check_options(chunk, window)
        check_text(text, ToyText)
        h = self.embed(self.patchify(x)) + self.position.flatten(0, 1)
        cond = self.condition(t[:, :: self.config.chunk], text).repeat_interleave(self.tokens, 1)
        index = torch.arange(self.chunks, device=x.device).repeat_interleave(self.tokens)
        seen = torch.ones(len(index), text.keys[0].shape[2], dtype=torch.bool, device=x.device)
        mask = torch.cat([seen, index[:, None] >= index], 1)
        for layer, block in enumerate(self.blocks):
            h = block(h, cond, text.keys[layer], text.values[layer], partial(KeysValues, mask=mask))
        return self.velocity(x, t, self.unpatchify(self.predict(h, cond)))

    def _check_options(self, chunk: int | None, window: int | None) -> None:
        if window is not None:
            raise ValueError("this student's history has no window")
        if chunk not in (None, self.config.chunk):
            raise ValueError(f"ToyStudent's chunk is {self.config.chunk}, not {chunk}")

    def _teacher_forcing_mask(self, text_len: int) -> Tensor:
        noisy = torch.arange(self.chunks).repeat_interleave(self.tokens)
        clean = noisy[: -self.tokens]
        top = torch.cat([clean[:, None] >= clean, torch.zeros(len(clean), len(noisy), dtype=torch.bool)], 1)
        bottom = torch.cat([noisy[:, None] > clean, noisy[:, None] == noisy], 1)
        mask = torch.cat([top, bottom])
        return torch.cat([torch.ones(len(mask), text_len, dtype=torch.bool), mask], 1)

    @staticmethod
    def velocity(x: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """v = (x_t - x0) / t, Eq. 3 solved for v; t in 0..1000 [B, F]."""
        return (x - x0) / (t[:, None, :, None, None] / 1000).clamp(min=1e-3)

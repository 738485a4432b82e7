"""The parts of CausalWan: sizes, conditioning, attention, block, head, with the original weights' names.

Source of the equations: Self-Forcing `wan/modules/{model,causal_model}.py` at 33593df; line numbers refer to it.

Legend: B samples, F latent frames, L tokens, D width, H heads, d = D / H.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor, nn

from afd_fast.errors import ConfigError, check_at_least, check_fields, field_types
from afd_fast.ops import transformer as ops
from afd_fast.ops.attention import attention
from afd_fast.students.joined import join, linears
from afd_fast.students.wan.cache import KeysValues

PATCH = 2  # side of a token in latent pixels; Wan's patch is (1, 2, 2)
Settings = Mapping[str, Any]  # "attention": backend of `ops.attention`; "official_rounding": as `CausalWan`


@dataclass(frozen=True)
class CausalWanConfig:
    """Sizes; the defaults are Wan2.1-T2V-1.3B's (wan/configs/wan_t2v_1_3B.py). text_len: tokens per padded prompt."""

    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    text_len: int = 512
    text_dim: int = 4096
    freq_dim: int = 256
    in_dim: int = 16
    out_dim: int = 16
    eps: float = 1e-6

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, 1, *(name for name in field_types(type(self)) if name != "eps"))
        if self.eps <= 0:
            raise ConfigError(f"eps must be positive, got {self.eps}")
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2 or self.freq_dim % 2:
            raise ConfigError(f"got {self}; dim / num_heads and freq_dim must be even integers")

    @classmethod
    def wan_1_3b(cls) -> "CausalWanConfig":
        return cls()

    @classmethod
    def wan_14b(cls) -> "CausalWanConfig":
        return cls(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)

    @classmethod
    def tiny(cls) -> "CausalWanConfig":
        """Two layers of width 64: for tests and for trying things without a GPU."""
        return cls(dim=64, ffn_dim=160, num_heads=4, num_layers=2, text_len=12, text_dim=24, freq_dim=32)


@dataclass(frozen=True)
class WanText:
    """A batch of prompts, encoded once: the cross-attention keys and values [B, text_len, H, d] of every block."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def batch(self) -> int:
        return self.keys[0].shape[0]

    def map(self, function: Callable[[Tensor], Tensor]) -> "WanText":
        """The same with `function` applied to every tensor (`.detach()`, `.to(...)`, indexing samples)."""
        return WanText(tuple(map(function, self.keys)), tuple(map(function, self.values)))

    def __getitem__(self, samples: Any) -> "WanText":
        return self.map(lambda a: a[samples])


@dataclass(frozen=True)
class Conditioning:
    """The timestep's part of the modulation: e [b, f, D] for the head, e0 [b, f, 6, D] for the blocks, b in
    (1, B), f in (1, F); `tables` holds e0 + modulation per block if it was computed before a rollout."""

    e: Tensor
    e0: Tensor
    tables: tuple[Tensor, ...] | None = None


class Rounding(TypedDict):
    """Arguments that every fused operator takes."""

    eps: float
    official_rounding: bool


class Residual(NamedTuple):
    """The stream between two blocks: x [B, L, D] with y [B, L, D] and gate [b, f, D] still to add, x' = x + gate y."""

    x: Tensor
    y: Tensor
    gate: Tensor


def time_sinusoid(t: Tensor, dim: int) -> Tensor:
    """[cos, sin] of t over geometric frequencies, in float64 (model.py:15-25). t: any shape -> [..., dim]."""
    frequency = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64, device=t.device) / (dim // 2))
    angle = t.double()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


class RMSNorm(nn.Module):
    """A learned weight [dim]; `ops.transformer.rms_norm` does the arithmetic."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class Attention(nn.Module):
    """Projections of one attention layer; the patterns read `heads` and `rounding`."""

    def __init__(self, config: CausalWanConfig, settings: Settings):
        super().__init__()
        self.heads, self.eps, self.settings = config.num_heads, config.eps, settings
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(config.dim), RMSNorm(config.dim)

    @property
    def rounding(self) -> Rounding:
        return Rounding(eps=self.eps, official_rounding=self.settings["official_rounding"])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, Lq, H, d] over [B, Lk, H, d] with the model's backend."""
        out = attention(q, k, v, backend=self.settings["attention"])
        assert isinstance(out, Tensor)  # a pair only with return_lse
        return out

    def self_attention(self, h: Tensor, layer: int, pattern: "Pattern") -> Tensor:
        return self.o(pattern(layer, self, *linears(h, (self.q, self.k, self.v))).flatten(2))

    def cross_attention(self, h: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = ops.rms_norm(self.q(h), self.norm_q.weight, **self.rounding).unflatten(-1, (self.heads, -1))
        if k.shape[0] == 1:  # one prompt: without a mask, a batch is a longer row of queries
            return self.o(self.attend(q.flatten(0, 1)[None], k, v).view(q.shape).flatten(2))
        return self.o(self.attend(q, k, v).flatten(2))


class Pattern(Protocol):
    """Self-attention of a whole forward: who attends to whom (`afd_fast.students.wan.attention`)."""

    tokens: int  # of a frame

    def __call__(self, layer: int, attn: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Projections q, k, v [B, L, D] of one layer -> the attended values [B, L, H, d]."""


class Block(nn.Module):
    """Self-attention, cross-attention to the prompt, MLP (causal_model.py:238-335).

    The next block adds the last residual of a block, in the same pass as its norm: a block takes and returns the
    stream x with a pending y and gate (`Residual`).
    """

    def __init__(self, config: CausalWanConfig, settings: Settings):
        super().__init__()
        dim = config.dim
        self.self_attn = Attention(config, settings)
        self.norm3 = nn.LayerNorm(dim, eps=config.eps)
        self.cross_attn = Attention(config, settings)
        self.ffn = nn.Sequential(nn.Linear(dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def encode_text(self, text: Tensor) -> KeysValues:
        """Embedded prompt [B, text_len, D] -> cross-attention keys (normalised) and values [B, text_len, H, d]."""
        attn = self.cross_attn
        k, v = linears(text, (attn.k, attn.v))
        k = ops.rms_norm(k, attn.norm_k.weight, **attn.rounding)
        return KeysValues(k.unflatten(-1, (attn.heads, -1)), v.unflatten(-1, (attn.heads, -1)))

    def join(self) -> None:
        """The weights of projections with one input next to each other (`linears`)."""
        join((self.self_attn.q, self.self_attn.k, self.self_attn.v))
        join((self.cross_attn.k, self.cross_attn.v))

    def forward(
        self,
        layer: int,
        x: Tensor,
        y: Tensor | None,
        gate: Tensor | None,
        conditioning: Conditioning,
        text_k: Tensor,
        text_v: Tensor,
        pattern: Pattern,
    ) -> Residual:
        """x [B, L, D], pending y (None before the first block) and gate -> the same three after this block."""
        table = conditioning.tables[layer] if conditioning.tables else self.modulation[:, None] + conditioning.e0
        shift1, scale1, gate1, shift2, scale2, gate2 = table.unbind(2)  # each [b, f, D]
        rounding = self.self_attn.rounding
        if y is None:
            h = ops.norm_modulate(x, scale1, shift1, **rounding)
        else:
            x, h = ops.residual_norm(x, y, gate, scale=scale1, shift=shift1, **rounding)
        y = self.self_attn.self_attention(h, layer, pattern)
        x, h = ops.residual_norm(x, y, gate1, weight=self.norm3.weight, bias=self.norm3.bias, **rounding)
        y = self.cross_attn.cross_attention(h, text_k, text_v)
        x, h = ops.residual_norm(x, y, scale=scale2, shift=shift2, **rounding)
        return Residual(x, self.feed_forward(h, rolled=conditioning.tables is not None), gate2)

    def feed_forward(self, h: Tensor, rolled: bool) -> Tensor:
        """The MLP. rolled: a rollout's, where on CUDA the first product applies GELU to its float32 sums before it rounds them;
        what is trained, and compared with what is trained, rounds first, as officially."""
        first: Any = self.ffn[0]
        base = getattr(first, "base_layer", first)
        plain = type(base) is nn.Linear and (first is base or first.disable_adapters) and not first._forward_hooks
        if not (rolled and plain) or h.device.type == "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.ffn(h)
        rows = torch._addmm_activation(base.bias, h.flatten(0, -2), base.weight.t(), use_gelu=True)  # tanh on CUDA
        return self.ffn[2](rows.unflatten(0, h.shape[:-1]))


class Head(nn.Module):
    """The last norm, modulated by e itself, and the projection to patches (causal_model.py:340-366)."""

    def __init__(self, config: CausalWanConfig, settings: Settings):
        super().__init__()
        self.eps, self.settings = config.eps, settings
        self.head = nn.Linear(config.dim, PATCH**2 * config.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, y: Tensor, gate: Tensor, e: Tensor) -> Tensor:
        shift, scale = (self.modulation[:, None] + e[:, :, None]).unbind(2)
        rounding = Rounding(eps=self.eps, official_rounding=self.settings["official_rounding"])
        return self.head(ops.residual_norm(x, y, gate, scale=scale, shift=shift, **rounding)[1])

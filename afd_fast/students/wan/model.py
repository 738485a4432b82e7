"""CausalWan: Wan2.1's video transformer, bidirectional or block-causal, with the weights' own names.

One module for what Self-Forcing and Causal-Forcing spread over several: bidirectional, chunk by chunk over a KV
cache, teacher forcing and block-causal training forwards. Every pattern is dense attention over ranges of
frames, so one attention kernel serves all and no block mask is built.
Source of the equations: Self-Forcing `wan/modules/{model,causal_model}.py` at 33593df; line numbers refer to it.

Legend: B samples, C channels, F latent frames, H x W latent pixels, N = H W / 4 tokens per frame, L = F N, D width.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from afd_fast.errors import ConfigError
from afd_fast.reference.flow import kind_of
from afd_fast.reference.transformer import rope_tables, split_blocks
from afd_fast.students.student import ShardPlan, Student, StudentModule, check_latents, check_text
from afd_fast.students.wan.attention import Bidirectional, BlockCausal, Cached, Roped, TeacherForcing
from afd_fast.students.wan.cache import KVCache
from afd_fast.students.wan.layers import (
    PATCH,
    Block,
    CausalWanConfig,
    Conditioning,
    Head,
    Pattern,
    WanText,
    time_sinusoid,
)
from afd_fast.students.wan.parallel import SequenceSplit


class CausalWan(StudentModule):
    """The student. `CausalWan(CausalWanConfig.wan_1_3b())`, or `CausalWan(dim=..., ...)`.

    attention: backend name of `ops.attention`. official_rounding: round intermediates in bfloat16 where the
    official code does (True, its exact function but for a rollout's GELU on CUDA, `Block.feed_forward`) or once per
    fused operator (False, more accurate).
    gradient_checkpointing (attribute): recompute each block in the backward pass of the forwards without a
    cache (a cached forward has one chunk's activations, and its history is gone when it would be recomputed).
    State dicts are in the original Wan layout (825 tensors for 1.3B). Under FSDP2 register `encode_text` of
    the model and of each block with `register_fsdp_forward_method`.
    """

    def __init__(
        self,
        config: CausalWanConfig | None = None,
        *,
        attention: str = "auto",
        official_rounding: bool = True,
        **sizes: Any,
    ):
        super().__init__()
        if config is not None and sizes:
            raise ValueError(f"give a config or sizes, not both: {sorted(sizes)}")
        c = self.config = config or CausalWanConfig(**sizes)
        self._settings = {"attention": attention, "official_rounding": official_rounding}
        self.gradient_checkpointing = False
        self.channels = c.in_dim
        self.patch_embedding = nn.Conv3d(c.in_dim, c.dim, (1, PATCH, PATCH), (1, PATCH, PATCH))
        self.text_embedding = nn.Sequential(nn.Linear(c.text_dim, c.dim), nn.GELU("tanh"), nn.Linear(c.dim, c.dim))
        self.time_embedding = nn.Sequential(nn.Linear(c.freq_dim, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 6 * c.dim))
        self.blocks = nn.ModuleList(Block(c, self._settings) for _ in range(c.num_layers))
        self.head = Head(c, self._settings)
        self._rope: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}
        self._graphed: Student | None = None
        self._split: SequenceSplit | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    def _each_block(self) -> Iterator[Block]:
        """The blocks with their type, which a ModuleList does not keep."""
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block

    def join(self) -> None:
        """Weights whose products are one product next to each other in memory. Every new text and cache see to it, and not every
        forward: the look takes 2 ms for 30 layers. Where FSDP owns the memory they stay where they are."""
        if torch.compiler.is_compiling():
            return
        if not any(hasattr(module, "_get_fsdp_state") for module in (self, *self.blocks)):
            for block in self._each_block():
                block.join()

    # ------------------------------------------------------------------ inputs

    def encode_text(self, context: Tensor | list[Tensor]) -> WanText:
        """Prompt embeddings -> what every later call needs of them; once per prompt.

        context: [B, n, text_dim] or a list of [n_i, text_dim], n <= text_len, zeros after the prompt's end; it
        is padded with zeros to text_len, and padding is attended to, as officially (causal_model.py:784-790).
        Raises ValueError for longer prompts, another width or shape, and without a prompt; TypeError for what is no tensor of
        floating point, such as prompts or token ids.
        """
        c = self.config
        if isinstance(context, Tensor) and context.ndim == 2:
            raise ValueError(
                f"context must be [B, n, {c.text_dim}] or a list of [n, {c.text_dim}], got {tuple(context.shape)}: one prompt is "
                "context[None]"
            )
        rows = list(context) if isinstance(context, (Tensor, list, tuple)) else [context]
        for row in rows:
            if not isinstance(row, Tensor) or not row.is_floating_point():
                raise TypeError(
                    f"context must be the text encoder's embeddings, floating-point tensors [n, {c.text_dim}], got "
                    f"{kind_of('context', row)} (students.wan.text.TextEncoder makes them from prompts)"
                )
            if row.ndim != 2 or row.shape[1] != c.text_dim:
                raise ValueError(f"prompt embeddings must be [tokens, {c.text_dim}], got {tuple(row.shape)}")
            if row.shape[0] > c.text_len:
                raise ValueError(f"a prompt of {row.shape[0]} tokens is longer than text_len={c.text_len}")
        if not rows:
            raise ValueError(f"context holds no prompt: give [B, n, {c.text_dim}] with B at least 1")
        self.join()
        padded = torch.stack([F.pad(row, (0, 0, 0, c.text_len - row.shape[0])) for row in rows])
        text = self.text_embedding(padded.to(self.device, self.dtype))
        pairs = [block.encode_text(text) for block in self._each_block()]
        return WanText(tuple(k for k, _ in pairs), tuple(v for _, v in pairs))

    def new_cache(
        self, batch: int, frames: int, height: int, width: int, window: int | None = None, sink: int = 0,
        rope: str = "absolute", sink_ema: float | None = None,
    ) -> KVCache:  # fmt: skip
        """An empty cache for latents of frames x height x width; see `KVCache`. Raises ValueError for odd sizes."""
        self._check_size(height, width)
        self.join()
        return KVCache(
            layers=self.config.num_layers,
            batch=batch,
            frames=frames,
            height=height // PATCH,
            width=width // PATCH,
            heads=self.config.num_heads if self._split is None else self._split.heads,
            head_dim=self.config.dim // self.config.num_heads,
            window=window,
            sink=sink,
            rope=rope,
            sink_ema=sink_ema,
            dtype=self.dtype,
            device=self.device,
        )

    def conditioning(self, t: Tensor | float, *, tables: bool = False) -> Conditioning:
        """Time MLP of t in 0..1000: a number, or [B, F]. tables: add the blocks' modulations now (no gradient
        wanted), so that a rollout does it once for each of its few distinct t; pass the result as `t`."""
        if not isinstance(t, Tensor):
            t = torch.full((1, 1), t, device=self.device, dtype=torch.float32)  # a tensor of the host would be copied
        t = t.to(self.device).reshape(1, 1) if t.ndim == 0 else t.to(self.device)
        e = self.time_embedding(time_sinusoid(t, self.config.freq_dim).to(self.dtype))
        e0 = self.time_projection(e).unflatten(-1, (6, -1))
        made = tuple(b.modulation[:, None] + e0 for b in self._each_block()) if tables else None
        return Conditioning(e, e0, made)

    @torch.no_grad()
    def timestep(self, t: float, batch: int, frames: int) -> Conditioning:
        """`conditioning` of one t with the blocks' tables, for any batch and frames."""
        return self.conditioning(t, tables=True)

    def graphed(self) -> Student:
        """See `GraphedStudent`."""
        from afd_fast.students.wan.graphs import CudaRecorder, GraphedStudent

        if self._split is not None:
            raise ConfigError("CUDA graphs do not hold exchanges between ranks: leave out graphs or split_sequence")
        if self._graphed is None:
            self._graphed = GraphedStudent(self, recorder=CudaRecorder())  # which refuses where there is no GPU
        return self._graphed

    def split_sequence(self, group: "dist.ProcessGroup | None", height: int, width: int) -> None:
        """See `StudentModule` and `parallel.SequenceSplit`."""
        split = None
        if group is not None and dist.get_world_size(group) > 1:
            split = SequenceSplit(group, self.config.num_heads)
            split.check(height // PATCH, width // PATCH)
        self._split = split

    def shard_plan(self) -> ShardPlan:
        """Block by block; the `modulation` tables, which are read between blocks, stay whole."""
        tables = [b.modulation for b in self._each_block()]
        methods = ("encode_text", "conditioning", "timestep", "forward_teacher_forcing", "forward_block_causal")
        return ShardPlan(list(self.blocks), tables, methods)

    def rope(self, first: int, end: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Cached `rope_tables` of frames [first, end) on this device; height, width in tokens."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        key = (first, end, height, width, dtype, self.device)
        if key not in self._rope:
            if len(self._rope) >= 64:  # a long rollout walks through positions once
                self._rope.pop(next(iter(self._rope)))
            head_dim = self.config.dim // self.config.num_heads
            self._rope[key] = rope_tables(head_dim, (first, end), height, width, dtype=dtype, device=self.device)
        return self._rope[key]

    # ------------------------------------------------------------------ forwards

    def forward(
        self,
        x: Tensor,
        t: Tensor | Conditioning,
        text: WanText,
        *,
        cache: KVCache | None = None,
        start_frame: int = 0,
        write: bool = True,
        blocks: tuple[int, ...] | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Velocity [B, C, F, H, W] of x, of the same shape.

        t: [B, F] in 0..1000 (or [B], or a `Conditioning`). text: of `encode_text`, batch B or 1.
        Without a cache every frame attends to every frame. With one, x holds the frames from `start_frame` on,
        which attend to the cache's earlier frames and to each other, and their keys and values are written to it
        (write=False leaves it alone). The history is detached: gradient flows through a block's own frames only.
        blocks: sizes in frames that x splits into, each seeing itself and what comes before; None: one block.
        rope: `self.rope` of x's frames, where the caller keeps it.
        Raises ValueError for sizes, batches, or frames the cache lacks, TypeError for mixed dtypes.
        """
        frames = self._check(x, text)
        height, width = x.shape[3] // PATCH, x.shape[4] // PATCH
        if rope is None:
            rope = self.rope(start_frame, start_frame + frames, height, width)
        if cache is None:
            if blocks is not None or start_frame:
                raise ValueError("blocks and start_frame need a cache; see forward_block_causal")
            pattern: Pattern = Bidirectional(*self._own(rope, frames), height * width, self._split)
            return self._unpatchify(self._transform(self._patchify(x), self._times(t, x), text, pattern), x)
        self._check_cache(cache, x)
        ranges = split_blocks(frames, blocks if blocks is not None else (frames,))
        spans = [(start_frame + a, start_frame + b) for a, b in ranges]
        cached = Cached(*self._own(rope, frames), cache, spans, write, self._split)
        out = self._unpatchify(self._transform(self._patchify(x), self._times(t, x), text, cached), x)
        cached.finish()
        return out

    def forward_block_causal(
        self, x: Tensor, t: Tensor, text: WanText, chunk: int | tuple[int, ...] = 3,
        *, independent_first_frame: bool = False, window: int | None = None, sink: int = 0, rope: str = "absolute",
    ) -> Tensor:  # fmt: skip
        """Blocks of `chunk` frames (or these sizes) attend to themselves and to the noised earlier blocks:
        diffusion forcing (causal_model.py:506-561), Astrolabe's function. Shapes and errors as `forward`."""
        frames = self._check(x, text)
        blocks = split_blocks(frames, chunk, independent_first_frame)
        size = (x.shape[3] // PATCH, x.shape[4] // PATCH)
        tables = self._own(self.rope(0, frames, *size), frames)
        pattern = BlockCausal(*tables, blocks, size[0] * size[1], window, sink, rope, self._split)
        return self._unpatchify(self._transform(self._patchify(x), self._times(t, x), text, pattern), x)

    def forward_teacher_forcing(
        self, x: Tensor, t: Tensor, text: WanText, clean: Tensor, chunk: int | tuple[int, ...] = 3,
        *, aug_t: Tensor | None = None, independent_first_frame: bool = False,
        window: int | None = None, sink: int = 0, rope: str = "absolute",
    ) -> Tensor:  # fmt: skip
        """Velocity of x when block b attends to itself and to the clean blocks before it: [clean || noisy]
        (causal_model.py:564-649), equal to the cached forwards but with gradient through the history.

        clean: x's shape; aug_t: [B, F] timesteps of the clean half, None for 0. Else as `forward`.
        The last clean block, which nobody attends to, is not computed.
        """
        frames = self._check(x, text)
        if clean.shape != x.shape or clean.dtype != x.dtype:
            raise ValueError(f"clean {tuple(clean.shape)} {clean.dtype} must be as x {tuple(x.shape)} {x.dtype}")
        blocks = split_blocks(frames, chunk, independent_first_frame)
        history = blocks[-1][0]
        t = self._times(t, x)
        past = torch.zeros_like(t) if aug_t is None else self._times(aug_t, x).to(t)
        size = (x.shape[3] // PATCH, x.shape[4] // PATCH)
        tokens = size[0] * size[1]
        cos, sin = (torch.cat([a[: history * tokens], a]) for a in self.rope(0, frames, *size))
        tables = self._own((cos, sin), history + frames)
        pattern = TeacherForcing(*tables, blocks, tokens, window, sink, rope, self._split)
        both = self._patchify(torch.cat([clean[:, :, :history], x], 2))
        times = torch.cat([past[:, :history], t], 1)
        out = self._transform(both, times, text, pattern, drop=history)
        return self._unpatchify(out, x)

    def _transform(
        self, patches: Tensor, t: Tensor | Conditioning, text: WanText, pattern: Pattern, drop: int = 0
    ) -> Tensor:
        """Patches [B, L, 4 C] -> head output; the first `drop` frames are left out of it."""
        split, frames = self._split, 0
        if split is not None:
            assert isinstance(pattern, Roped)
            frames = patches.shape[1] // pattern.tokens
            patches = split.own(patches, frames)
        weight = self.patch_embedding.weight
        x = F.linear(patches, weight.flatten(1), self.patch_embedding.bias)
        conditioning = t if isinstance(t, Conditioning) else self.conditioning(t)
        y: Any = None  # the residual and its gate, which the next block or the head adds
        gate: Any = None
        for layer, block in enumerate(self.blocks):
            args = (layer, x, y, gate, conditioning, text.keys[layer], text.values[layer], pattern)
            if self.gradient_checkpointing and torch.is_grad_enabled() and not isinstance(pattern, Cached):
                x, y, gate = checkpoint(block, *args, use_reentrant=False)
            else:
                x, y, gate = block(*args)
        e = conditioning.e
        if drop:
            tokens = x.shape[1] // e.shape[1]
            x, y, gate, e = x[:, drop * tokens :], y[:, drop * tokens :], gate[:, drop:], e[:, drop:]
        out = self.head(x, y, gate, e)
        return out if split is None else split.whole(out, frames - drop)

    def _own(self, tables: tuple[Tensor, Tensor], frames: int) -> tuple[Tensor, Tensor]:
        """RoPE's tables [L, d / 2] of this rank's tokens."""
        if self._split is None:
            return tables
        cos, sin = (self._split.own(a[None], frames)[0] for a in tables)
        return cos, sin

    # ------------------------------------------------------------------ shapes

    def _patchify(self, x: Tensor) -> Tensor:
        """[B, C, F, H, W] -> [B, F N, 4 C], in the order of the convolution's weight."""
        b, c = x.shape[:2]
        x = x.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH))
        return x.permute(0, 2, 3, 5, 1, 4, 6).reshape(b, -1, c * PATCH**2)

    def _unpatchify(self, out: Tensor, x: Tensor) -> Tensor:
        """[B, F N, 4 C] -> [B, C, F, H, W]; channels are innermost in the head's output (causal_model.py:1027-1034)."""
        b, _, f, h, w = x.shape
        out = out.view(b, f, h // PATCH, w // PATCH, PATCH, PATCH, -1)
        return out.permute(0, 6, 1, 2, 4, 3, 5).reshape(b, -1, f, h, w)

    def _times(self, t: Any, x: Tensor) -> Any:
        if isinstance(t, Conditioning):
            return t
        shape = (x.shape[0], x.shape[2])
        if t.ndim == 1 and t.shape[0] == shape[0]:
            t = t[:, None].expand(shape)
        if t.shape != shape:
            raise ValueError(f"t must be [B, F] = {shape}, got {tuple(t.shape)}")
        if t.device.type == "cpu" and not bool(((t >= 0) & (t <= 1000)).all()):  # NaN too
            raise ValueError(f"t must lie in 0..1000, got {t.min():g} .. {t.max():g}")
        return t

    def _check_size(self, height: int, width: int) -> None:
        if height % PATCH or width % PATCH or height < 1 or width < 1:
            raise ValueError(f"latent height and width must be even, got {height}x{width}")
        if self._split is not None:
            self._split.check(height // PATCH, width // PATCH)

    def _check(self, x: Tensor, text: WanText) -> int:
        check_latents("x", x, self.channels)
        if x.shape[2] < 1:
            raise ValueError(f"x must hold at least one frame, got {tuple(x.shape)}")
        check_text(text, WanText)
        self._check_size(x.shape[3], x.shape[4])
        if x.dtype != self.dtype:
            raise TypeError(f"x is {x.dtype}, the weights are {self.dtype}: convert one of them")
        if text.keys[0].dtype != self.dtype:
            raise TypeError(
                f"the text was encoded in {text.keys[0].dtype}, the weights are {self.dtype}: encode it again"
            )
        if text.batch not in (1, x.shape[0]):
            raise ValueError(f"{text.batch} prompts for a batch of {x.shape[0]}")
        return x.shape[2]

    def _check_cache(self, cache: KVCache, x: Tensor) -> None:
        want = (x.shape[0], x.shape[3] // PATCH, x.shape[4] // PATCH)
        if (cache.batch, cache.height, cache.width) != want:
            have = (cache.batch, cache.height, cache.width)
            raise ValueError(f"the cache was made for (batch, height, width) = {have} tokens, this call has {want}")
        if cache.dtype != x.dtype or cache.device != x.device:
            raise TypeError(f"the cache is {cache.dtype} on {cache.device}, x is {x.dtype} on {x.device}")

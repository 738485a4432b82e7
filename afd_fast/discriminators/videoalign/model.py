"""VideoAlign's reward model as an online discriminator: Qwen2-VL, three reward tokens, a linear head, LoRA.

The published network (KwaiVGI/VideoAlign 219ab9d, `trainer.py`) on today's transformers: the text positions are
1-D (M-RoPE's axes all count tokens), the video's features are the merger's output, the prompt stands after the VQ
and MQ tokens, so that of the three scores only TA can see it. There is no lm_head; clips are packed one behind the
other without padding; only the rows of the reward tokens meet the head, in float32.

Legend: B clips, n_i video tokens of clip i, L packed tokens of all clips, D width of the language model.
"""

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd_fast.discriminators.discriminator import Clips, Discriminator, Features, check_counts, check_finite
from afd_fast.discriminators.videoalign.inputs import MERGE, PromptTokens, patch_positions, to_patches
from afd_fast.errors import extra
from afd_fast.ops.attention import attention_varlen
from afd_fast.students.lora import disabled, inject

with extra("train"):
    from transformers import Qwen2VLConfig, Qwen2VLModel
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

log = logging.getLogger("afd_fast")

ATTENTION = "afd_flash_varlen"  # transformers hands the vision tower's segments over only to names with "flash"
LORA_TARGETS = r".*layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
NAMES = ("VQ", "MQ", "TA")


def _segment_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    segments: Any,
    backend: Any,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface, [1, H, L, d] in and [1, L, H, d] out, through this library's backends."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return attention_varlen(q, k, v, segments, causal=module.is_causal, backend=backend)[None], None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _segment_attention)


@dataclass(frozen=True)
class RewardSettings:
    """What `model_config.json` says about a checkpoint; the defaults are the published one's."""

    fps: float = 2.0  # frames per second that the model sees
    min_pixels: int = 100_352  # a frame, after resizing
    max_pixels: int = 200_704
    output_dim: int = 1  # rows of the head; 3: each score has its own
    mean: tuple[float, float, float] = (3.6757, 1.1646, 2.8105)  # of VQ, MQ, TA
    std: tuple[float, float, float] = (2.2476, 1.3811, 2.5121)


@dataclass(frozen=True)
class RewardOptions:
    """How the network is used. weights: D = sum of weights * (VQ, MQ, TA), raw logits. clip_fps: frames per second of
    the videos handed in. freeze_vision: the tower gives features, the language model's adapters learn."""

    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    clip_fps: float = 16.0
    freeze_vision: bool = True
    checkpointing: bool = True
    attention: str = "auto"


def qwen2_vl_2b(vocab_size: int = 151660) -> Qwen2VLConfig:
    """Qwen2-VL-2B-Instruct with VideoAlign's vocabulary (2.2 G parameters)."""
    text = dict(
        vocab_size=vocab_size, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, rms_norm_eps=1e-6, max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    )  # fmt: skip
    return Qwen2VLConfig(text_config=text, vision_config={"hidden_size": 1536})


class VideoReward(Discriminator):
    """D(video, prompt) and VideoAlign's VQ, MQ, TA. `load_video_reward` makes one from a checkpoint.

    config: of the backbone; tokenizer: a transformers tokenizer with the reward tokens; template: the text around the
    prompt (`read_template`); dtype: of the trunk. Head and adapters are float32 whatever the trunk is, as bf16
    weights hardly move at a discriminator's learning rates. Cast nothing afterwards with `.to(dtype)`.
    """

    def __init__(
        self, config: Qwen2VLConfig, tokenizer: Any, template: str, settings: RewardSettings = RewardSettings(),
        options: RewardOptions = RewardOptions(), dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        super().__init__()
        if settings.output_dim not in (1, 3):
            raise ValueError(f"output_dim must be 1 or 3, got {settings.output_dim}")
        self.settings, self.options = settings, options
        self.prompts = PromptTokens(tokenizer, template)
        self.backbone = Qwen2VLModel._from_config(copy.deepcopy(config), attn_implementation="sdpa")
        for module in (self.backbone, self.backbone.visual, self.backbone.language_model):
            # only now: at construction a name with "flash" makes transformers look for the flash-attn package
            module.config._attn_implementation_internal = ATTENTION
        for parameter in self.backbone.parameters():  # not .to(dtype), which would round the rotary frequencies too
            parameter.data = parameter.data.to(dtype)
        text: Any = config.text_config
        self.rm_head = nn.Linear(text.hidden_size, settings.output_dim, bias=False, dtype=torch.float32)
        self.first_head: Tensor
        self.register_buffer("first_head", self.rm_head.weight.detach().clone(), persistent=False)
        self.lora: tuple[int, float] | None = None  # rank, alpha
        self.backbone.requires_grad_(False)
        self.backbone.visual.requires_grad_(not options.freeze_vision)
        if options.checkpointing:
            lm = self.backbone.language_model  # the method's name changed in transformers 5.2x
            enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        if not options.weights[2]:
            log.warning("weights=%s leave TA out: VQ and MQ cannot see the prompt, nor can this D", options.weights)

    @property
    def freeze_vision(self) -> bool:
        """Whether the vision tower is left as it is."""
        return self.options.freeze_vision

    @property
    def keeps_features(self) -> bool:  # type: ignore[override]  # decided per model here
        return self.options.freeze_vision

    @torch.no_grad()
    def check_prompt(self, prompt: str) -> None:
        self.prompts.suffix(prompt)

    def reference_scores(self, videos: Clips, prompts: Sequence[str]) -> dict[str, Tensor]:
        """VideoAlign's own VQ, MQ, TA and Overall [B]: `rewards` of the model before training."""
        with self.frozen():
            return self.rewards(videos, prompts)

    def add_lora(self, rank: int, alpha: float) -> None:
        """Adapters on every linear layer of the language model, zero at first, float32; once per model."""
        if self.lora:
            raise ValueError(f"the model has adapters of rank {self.lora[0]} already")
        inject(self.backbone.language_model, LORA_TARGETS, rank, alpha)
        self.lora = rank, alpha

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside the block this is the model without adapters and with the head it began with: VideoAlign itself
        where its own adapter was merged (`load_video_reward(lora_rank=...)`)."""
        trained = self.rm_head.weight.data
        with disabled(self.backbone.language_model):
            try:
                self.rm_head.weight.data = self.first_head
                yield
            finally:
                self.rm_head.weight.data = trained

    def encode(self, videos: Clips | Sequence[Tensor]) -> Features:
        """Videos -> the vision tower's merged features, one packed call for all of them.

        videos: [B, 3, F, H, W] in [0, 1], or a list of [3, F, H, W] of any sizes; `Features` come back as they are.
        There is a graph where videos require gradients or the tower is trained. Raises ValueError for a wrong shape
        or range, fewer than 2 frames.
        """
        if isinstance(videos, Features):
            return videos
        groups = [videos] if isinstance(videos, Tensor) else [video[None] for video in videos]
        if not groups:
            raise ValueError("no videos")
        visual, s = self.backbone.visual, self.settings
        device = visual.patch_embed.proj.weight.device
        graph = not self.freeze_vision or any(v.requires_grad for v in groups)
        with torch.set_grad_enabled(torch.is_grad_enabled() and graph):
            patches, grids = [], []
            for group in groups:
                x, grid = to_patches(
                    group, clip_fps=self.options.clip_fps, fps=s.fps, min_pixels=s.min_pixels,
                    max_pixels=s.max_pixels, device=device,
                )  # fmt: skip
                patches.append(x.flatten(0, 1))
                grids += [grid] * len(group)
            return self.encode_patches(torch.cat(patches), grids)

    def encode_patches(self, patches: Tensor, grids: Sequence[tuple[int, int, int]]) -> Features:
        """The same from patches [sum t h w, 1176] and each clip's grid (t, h, w)."""
        visual = self.backbone.visual
        segments = tuple(h * w for t, h, w in grids for _ in range(t))  # attention within a temporal patch
        bounds = torch.tensor((0, *segments)).cumsum(0, dtype=torch.int32)
        with self._autocast():
            out = visual(
                patches.to(visual.patch_embed.proj.weight.dtype), grid_thw=torch.tensor(grids), cu_seqlens=bounds,
                max_seqlen=max(segments), position_ids=patch_positions(grids, patches.device), segments=segments,
                backend=self.options.attention,
            )  # fmt: skip
        merged = out.pooler_output  # last_hidden_state is what goes into the merger, four times the rows
        lengths = [t * h * w // MERGE**2 for t, h, w in grids]
        if len(merged) != sum(lengths):
            raise RuntimeError(f"the vision tower gave {len(merged)} features for {sum(lengths)} video tokens")
        return Features(merged.split(lengths))

    def _autocast(self) -> torch.autocast:
        """The trunk's dtype, also inside somebody else's autocast; float32 adapters compute in it."""
        weight = self.backbone.visual.patch_embed.proj.weight
        half = weight.dtype != torch.float32
        return torch.autocast(weight.device.type, dtype=weight.dtype if half else None, enabled=half)

    def reward_states(self, videos: Clips | Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """The reward tokens' last hidden states [B, 3, D], in the order VQ, MQ, TA."""
        check_counts(prompts, videos=videos)
        return self.states_of(self.encode(videos), [self.prompts.suffix(p) for p in prompts], self.prompts.prefix)

    def states_of(self, features: Features, suffixes: Sequence[tuple[int, ...]], prefix: tuple[int, ...]) -> Tensor:
        """`reward_states` from token ids: prefix before every video, suffixes[i] behind video i.

        Tokens of equal prompts are looked up once. No more can be shared between clips: the video stands first and
        the model is causal, so that every hidden state after the prefix depends on it.
        """
        lm = self.backbone.language_model
        device = lm.embed_tokens.weight.device
        table = {ids: lm.embed_tokens(torch.tensor(ids, device=device)) for ids in {prefix, *suffixes}}
        parts: list[Tensor] = []
        lengths: list[int] = []
        rows: list[list[int]] = []
        for clip, ids in zip(features.clips, suffixes):
            begin = sum(lengths) + len(prefix) + len(clip)
            rows.append([begin + ids.index(i) for i in self.prompts.reward_ids])
            parts += [table[prefix], clip.to(table[ids]), table[ids]]
            lengths.append(len(prefix) + len(clip) + len(ids))
        x = torch.cat(parts)[None]  # [1, L, D]
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])
        with self._autocast():
            hidden = lm(
                inputs_embeds=x, position_ids=positions.expand(3, 1, -1), attention_mask={"full_attention": None},
                use_cache=False, segments=tuple(lengths), backend=self.options.attention,
            ).last_hidden_state  # fmt: skip
        return hidden[0, torch.tensor(rows, device=device)]

    def logits(self, states: Tensor) -> Tensor:
        """The head: states [B, 3, D] -> raw VQ, MQ, TA [B, 3] in float32, whatever autocast is on."""
        with torch.autocast(states.device.type, enabled=False):
            out = F.linear(states.float(), self.rm_head.weight.float())  # [B, 3, output_dim]
        return out[..., 0] if self.settings.output_dim == 1 else out.diagonal(dim1=1, dim2=2)

    def score(self, videos: Clips | Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """D [B] in float32. videos: as `encode`, or Features. Raises ValueError for different counts, special tokens
        in a prompt, or as `encode`; FloatingPointError naming the samples whose score is not finite."""
        logits = self.logits(self.reward_states(videos, prompts))
        return check_finite((logits * logits.new_tensor(self.options.weights)).sum(1), prompts)

    @torch.no_grad()
    def rewards(
        self, videos: Clips | Sequence[Tensor], prompts: Sequence[str], *, normalise: bool = True
    ) -> dict[str, Tensor]:
        """VideoAlign's scores: {"VQ", "MQ", "TA", "Overall": their sum}, [B] each; normalised by its constants."""
        logits = self.logits(self.reward_states(videos, prompts))
        if normalise:
            logits = (logits - logits.new_tensor(self.settings.mean)) / logits.new_tensor(self.settings.std)
        check_finite(logits.sum(1), prompts)
        return dict(zip(NAMES, logits.unbind(1))) | {"Overall": logits.sum(1)}

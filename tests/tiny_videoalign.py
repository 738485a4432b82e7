"""A reward model small enough for tests: VideoAlign's layout, a byte tokenizer with its special tokens."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig

from afd_fast.discriminators.videoalign.model import RewardOptions, RewardSettings, VideoReward

GOLDEN = Path(__file__).parent / "golden/videoalign_tiny"
TEMPLATE = "\nlook: <|VQ_reward|>\nmove: <|MQ_reward|>  \ntext {text_prompt}\n<|TA_reward|>\nEND\n"
SPECIAL = {  # the golden model's ids
    300: "<|image_pad|>", 301: "<|video_pad|>", 302: "<|vision_start|>", 303: "<|vision_end|>", 304: "<|im_start|>",
    305: "<|im_end|>", 306: "<|endoftext|>", 307: "<|a|>", 308: "<|b|>", 309: "<|c|>",
    310: "<|VQ_reward|>", 311: "<|MQ_reward|>", 312: "<|TA_reward|>",
}  # fmt: skip
SETTINGS = RewardSettings(min_pixels=56 * 56, max_pixels=112 * 112)


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, filled up to 300, then the special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(letters)} | {f"unused{i}": i for i in range(len(letters), 300)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    out = PreTrainedTokenizerFast(tokenizer_object=inner)
    out.add_special_tokens({"additional_special_tokens": list(SPECIAL.values())})
    assert all(out.convert_tokens_to_ids(token) == i for i, token in SPECIAL.items())
    return out


def config() -> Qwen2VLConfig:
    """The golden backbone: width 64, 3 layers, a vision tower of width 32."""
    out = Qwen2VLConfig(**json.loads((GOLDEN / "config.json").read_text()))
    out.text_config.vocab_size = 313
    return out


def reward_model(seed: int = 0, *, lora: int = 4, dtype=torch.float32, settings=SETTINGS, **options) -> VideoReward:
    """Random weights, adapters of rank `lora` (0: none)."""
    torch.manual_seed(seed)
    model = VideoReward(config(), tokenizer(), TEMPLATE, settings, RewardOptions(**options), dtype)
    if lora:
        model.add_lora(lora, 2 * lora)
    return model


def clips(n: int = 2, frames: int = 8, size: tuple[int, int] = (56, 84), seed: int = 0):
    return torch.rand(n, 3, frames, *size, generator=torch.Generator().manual_seed(seed))

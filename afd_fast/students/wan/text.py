"""UMT5 prompt embeddings, each prompt encoded once and kept on disk.

As in the official code (Wan2.1 `wan/modules/{t5,tokenizers}.py`): text cleaned with ftfy, padded to 512
tokens with an attention mask, the padding's rows dropped (they are zeros in the student's input).
"""

import hashlib
import html
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from afd_fast.errors import ConfigError, extra
from afd_fast.students.files import first_line, loading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("afd_fast")

# the negative prompt of Wan's own settings (Wan2.1 `wan/configs/shared_config.py`: sample_neg_prompt), which the projects use
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，"
    "畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


def clean_prompt(prompt: str) -> str:
    """As the official tokenizer does it: ftfy repairs encoding, quotes, width and ligatures; HTML entities are resolved twice;
    runs of whitespace become one space."""
    with extra("train"):
        import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


class TextEncoder:
    """Prompts to embeddings. encoder: a transformers UMT5EncoderModel, None to read only the cache; tokenizer: its
    tokenizer; name: identifies the weights in the keys of the cache; cache_dir: folder of the cache, None for no cache."""

    def __init__(
        self,
        encoder: "PreTrainedModel | None",
        tokenizer: "PreTrainedTokenizerBase | None",
        *,
        name: str,
        text_len: int = 512,
        cache_dir: str | Path | None = None,
    ):
        self.encoder, self.tokenizer, self.name, self.text_len = encoder, tokenizer, name, text_len
        self.cache_dir = Path(cache_dir) if cache_dir is not None else None
        if encoder is not None:
            encoder.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cuda",
        cache_dir: str | Path | None = None,
        text_len: int = 512,
    ) -> "TextEncoder":
        """From a diffusers Wan folder or repository (`text_encoder` and `tokenizer` subfolders). Raises ConfigError that
        names the folder or repository if they cannot be loaded."""
        with extra("train"):
            from transformers import AutoTokenizer, UMT5EncoderModel

        with loading("text_encoder", path):
            encoder = UMT5EncoderModel.from_pretrained(
                path, subfolder="text_encoder", dtype=dtype, trust_remote_code=False
            )
        with loading("tokenizer", path):
            tokenizer = AutoTokenizer.from_pretrained(path, subfolder="tokenizer", trust_remote_code=False)
        encoder.to(device)  # type: ignore[arg-type]  # the decorator of PreTrainedModel.to hides its signature
        return cls(encoder, tokenizer, name=f"{path}@{dtype}", text_len=text_len, cache_dir=cache_dir)

    def _file(self, folder: Path, prompt: str) -> Path:
        key = hashlib.sha256(f"{self.name}\n{self.text_len}\n{prompt}".encode()).hexdigest()
        return folder / key[:2] / f"{key}.safetensors"

    def __call__(self, prompts: list[str]) -> list[Tensor]:
        """Embeddings [n_i, width] of the tokens of each prompt, on the encoder's device, ready for
        `CausalWan.encode_text`. Raises ConfigError for a prompt of more than text_len tokens: none is truncated."""
        prompts = [clean_prompt(p) for p in prompts]
        found: dict[str, Tensor] = {}
        for prompt in dict.fromkeys(prompts):
            kept = _load(self._file(self.cache_dir, prompt)) if self.cache_dir is not None else None
            if kept is not None:
                found[prompt] = kept
        missing = [p for p in dict.fromkeys(prompts) if p not in found]
        if missing:
            found.update(self._encode(missing))
        device = self.encoder.device if self.encoder is not None else "cpu"
        return [found[p].to(device) for p in prompts]

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        if self.encoder is None or self.tokenizer is None:
            raise RuntimeError(
                f"{len(prompts)} prompts are not in {self.cache_dir} and there is no encoder: use TextEncoder.from_pretrained"
            )
        tokens = self.tokenizer(prompts, padding="max_length", max_length=self.text_len, return_tensors="pt")
        lengths = tokens["attention_mask"].sum(1).tolist()
        for prompt, length in zip(prompts, lengths):
            if length > self.text_len:
                raise ConfigError(
                    f"a prompt has {length} tokens, more than text_len={self.text_len}; shorten it: {prompt[:60]!r}..."
                )
        ids, mask = (tokens[k].to(self.encoder.device) for k in ("input_ids", "attention_mask"))
        hidden = self.encoder(ids, attention_mask=mask).last_hidden_state
        result = {p: h[:n].clone() for p, h, n in zip(prompts, hidden, lengths)}
        if self.cache_dir is not None:
            for prompt, embedding in result.items():
                _save(self._file(self.cache_dir, prompt), embedding)
        return result


def _load(file: Path) -> Tensor | None:
    """The embedding in a file of the cache; None where there is none, and with a warning where it is damaged."""
    with extra("train"):
        from safetensors import safe_open

    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as contents:
            embedding, expected = contents.get_tensor("embedding"), (contents.metadata() or {}).get("sha256")
        if _sum(embedding) == expected:
            return embedding
        reason = "its checksum differs"
    except Exception as error:  # safetensors raises many types
        reason = first_line(error)
    log.warning("%s is damaged (%s): the prompt is encoded again", file, reason)
    return None


def _sum(embedding: Tensor) -> str:
    return hashlib.sha256(embedding.view(torch.uint8).numpy().tobytes()).hexdigest()


def _save(file: Path, embedding: Tensor) -> None:
    """Write to a temporary file and rename it, so that another process never reads half a file."""
    with extra("train"):
        from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    embedding = embedding.cpu().contiguous()
    save_file({"embedding": embedding}, temporary, {"sha256": _sum(embedding)})
    os.fsync(handle)
    os.close(handle)
    os.replace(temporary, file)

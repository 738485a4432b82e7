"""UMT5 prompt embeddings, each prompt encoded once and kept on disk.

As officially (Wan2.1 `wan/modules/{t5,tokenizers}.py`): whitespace and HTML entities cleaned, padded to 512
tokens with an attention mask, the padding's rows dropped (they are zeros in the student's input).
"""

import hashlib
import html
import os
import re
import tempfile
from pathlib import Path

import torch
from torch import Tensor


def clean_prompt(prompt: str) -> str:
    """HTML entities resolved twice, runs of whitespace to one space. Encoding errors are not guessed at (ftfy)."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()


class TextEncoder:
    """Prompts to embeddings. encoder: a transformers UMT5EncoderModel; tokenizer: its tokenizer; name: what
    identifies the weights in the cache's keys; cache_dir: folder of the cache, None for none."""

    def __init__(self, encoder, tokenizer, *, name: str, text_len: int = 512, cache_dir: str | Path | None = None):
        self.encoder, self.tokenizer, self.name, self.text_len = encoder, tokenizer, name, text_len
        self.cache_dir = Path(cache_dir) if cache_dir is not None else None
        if encoder is not None:
            encoder.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, path: str, *, dtype=torch.bfloat16, device="cuda", cache_dir=None, text_len: int = 512):
        """From a diffusers Wan folder or repository (`text_encoder` and `tokenizer` subfolders)."""
        from transformers import AutoTokenizer, UMT5EncoderModel

        encoder = UMT5EncoderModel.from_pretrained(path, subfolder="text_encoder", dtype=dtype).to(device)
        tokenizer = AutoTokenizer.from_pretrained(path, subfolder="tokenizer")
        return cls(encoder, tokenizer, name=f"{path}@{dtype}", text_len=text_len, cache_dir=cache_dir)

    def _file(self, prompt: str) -> Path:
        key = hashlib.sha256(f"{self.name}\n{self.text_len}\n{prompt}".encode()).hexdigest()
        return self.cache_dir / key[:2] / f"{key}.safetensors"

    def __call__(self, prompts: list[str]) -> list[Tensor]:
        """Embeddings [n_i, width] of each prompt's own tokens, on the encoder's device, ready for
        `CausalWan.encode_text`. Prompts longer than text_len tokens are an error, not cut in silence."""
        from safetensors.torch import load_file

        prompts = [clean_prompt(p) for p in prompts]
        found: dict[str, Tensor] = {}
        for prompt in dict.fromkeys(prompts):
            if self.cache_dir is not None and (file := self._file(prompt)).exists():
                found[prompt] = load_file(file)["embedding"]
        missing = [p for p in dict.fromkeys(prompts) if p not in found]
        if missing:
            found.update(self._encode(missing))
        device = self.encoder.device if self.encoder is not None else "cpu"
        return [found[p].to(device) for p in prompts]

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        if self.encoder is None:
            raise RuntimeError(f"{len(prompts)} prompts are not in {self.cache_dir} and there is no encoder")
        tokens = self.tokenizer(prompts, padding="max_length", max_length=self.text_len, return_tensors="pt")
        lengths = tokens["attention_mask"].sum(1).tolist()
        for prompt, length in zip(prompts, lengths):
            if length > self.text_len:
                raise ValueError(
                    f"a prompt has {length} tokens, more than text_len={self.text_len}: {prompt[:60]!r}..."
                )
        ids, mask = (tokens[k].to(self.encoder.device) for k in ("input_ids", "attention_mask"))
        hidden = self.encoder(ids, attention_mask=mask).last_hidden_state
        result = {p: h[:n].clone() for p, h, n in zip(prompts, hidden, lengths)}
        if self.cache_dir is not None:
            for prompt, embedding in result.items():
                self._save(self._file(prompt), embedding)
        return result

    def _save(self, file: Path, embedding: Tensor) -> None:
        """Written beside and renamed, so that another process never reads half a file."""
        from safetensors.torch import save_file

        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
        os.close(handle)
        save_file({"embedding": embedding.cpu().contiguous()}, temporary)
        os.replace(temporary, file)

"""Prompts of the embedded task: hashed words and their embedding.

Legend: B prompts, L words, D width.
"""

import re
import zlib

import torch
from torch import Tensor, nn

VOCAB = 1021  # hash buckets; prime, and without a collision among the physics world's words (tested)


def tokenize(prompts: list[str], text_len: int = 12) -> Tensor:
    """Prompts -> word ids [B, L]; 0 is padding, words are hashed, so any text is accepted."""
    ids = torch.zeros(len(prompts), text_len, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        words = re.findall(r"\w+", prompt.lower())[:text_len]
        ids[row, : len(words)] = torch.tensor([1 + zlib.crc32(w.encode()) % (VOCAB - 1) for w in words])
    return ids


class PromptEmbedding(nn.Module):
    """Word ids [B, L] -> (tokens [B, L, D], pooled [B, D])."""

    def __init__(self, dim: int):
        super().__init__()
        self.words = nn.Embedding(VOCAB, dim, padding_idx=0)
        nn.init.normal_(self.words.weight, std=0.3)
        with torch.no_grad():
            self.words.weight[0].zero_()
        self.pool = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.words(ids)
        return tokens, self.pool(tokens.sum(1))

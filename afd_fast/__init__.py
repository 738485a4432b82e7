"""Adversarial Flow Distillation: distil a black-box video teacher into a causal autoregressive student."""

# ruff: noqa: E402

__version__ = "0.1.0"

from afd_fast import threads

threads.configure()  # before PyTorch, which loads OpenMP

from afd_fast import dropin
from afd_fast.ops import NFTStats, NFTTerms, bt_loss, forward_noise, nft_loss, nft_terms
from afd_fast.ops.module import NFTLoss
from afd_fast.reference.advantage import PerPromptStatTracker, reward_to_r
from afd_fast.reference.nft import NFTRecipe, nft_recipe

__all__ = [
    "NFTLoss",
    "NFTRecipe",
    "NFTStats",
    "NFTTerms",
    "PerPromptStatTracker",
    "bt_loss",
    "dropin",
    "forward_noise",
    "nft_loss",
    "nft_recipe",
    "nft_terms",
    "reward_to_r",
]

"""The operators. Each name is the reference's, found again in kernels/, tests/ and benchmarks/."""

from afd_fast.ops.nft import nft_loss
from afd_fast.ops.noise import forward_noise
from afd_fast.reference.adversarial import bt_loss
from afd_fast.reference.nft import NFTStats

__all__ = ["NFTStats", "bt_loss", "forward_noise", "nft_loss"]

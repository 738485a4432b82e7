"""The operators. Each name is the reference's, found again in kernels/, tests/ and benchmarks/."""

from afd_fast.reference.adversarial import bt_loss
from afd_fast.reference.flow import forward_noise
from afd_fast.reference.nft import NFTStats, nft_loss

__all__ = ["NFTStats", "bt_loss", "forward_noise", "nft_loss"]


def backends() -> dict[str, str]:
    """Which implementation serves each operator on this machine."""
    return {name: "reference (PyTorch)" for name in ("bt_loss", "forward_noise", "nft_loss")}

"""The operators. Each name is the reference's, found again in kernels/, tests/ and benchmarks/."""

import importlib.util

from afd_fast.ops import native
from afd_fast.ops._register import old_triton
from afd_fast.ops.nft import nft_loss, nft_terms
from afd_fast.ops.noise import forward_noise
from afd_fast.reference.adversarial import bt_loss
from afd_fast.reference.nft import NFTStats, NFTTerms

__all__ = ["NFTStats", "NFTTerms", "backends", "bt_loss", "forward_noise", "nft_loss", "nft_terms"]


def backends() -> dict[str, str]:
    """Operator -> what serves it on this machine, by device and dtype."""
    cpp = "C++ for float32, bfloat16 and float16, PyTorch for the rest" if native.library() else (
        "PyTorch (the C++ library is not built: pip install -e . with cmake and a C++ compiler on the PATH)")  # fmt: skip
    triton = "Triton" if importlib.util.find_spec("triton") else "none (pip install triton)"
    if old := old_triton():
        triton = f"PyTorch (Triton {old} is too old for the kernels)"
    served = f"CPU: {cpp}; CUDA: {triton}, PyTorch for float64"
    return {"nft_loss": served, "forward_noise": served, "bt_loss": "PyTorch"}

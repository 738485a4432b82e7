"""The opt-in CUDA C++ kernel (AFD_BUILD_CUDA=1): loss and gradient of an adaptive recipe in one launch. Unmeasured.

No operator calls it. It becomes the CUDA implementation if it is 10 % faster than the two Triton sweeps, or goes.
"""

import ctypes
import functools
from pathlib import Path

import afd_kernels
import torch
from torch import Tensor

from afd_fast.ops import native
from afd_fast.ops.nft import Inputs


@functools.cache
def library() -> ctypes.CDLL | None:
    path = next((p for p in (Path(place) / "libafd_cuda.so" for place in afd_kernels.__path__) if p.exists()), None)
    if path is None:
        return None
    lib = ctypes.CDLL(str(path))
    lib.afd_cuda_error.restype = ctypes.c_char_p
    if lib.afd_cuda_abi() != ctypes.sizeof(native._Call):
        raise ImportError(f"{path} was built from other sources: reinstall with AFD_BUILD_CUDA=1")
    return lib


@functools.cache
def _ticket(device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)  # counts samples, and is back at zero after every call


def nft_loss_with_grad(i: Inputs, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, totals, rows) and the gradient for grad_output 1 into `grad`. RuntimeError for what it does not serve."""
    f = native._fill(i, grad)
    new = lambda *shape, dtype=torch.float32: torch.zeros(shape, dtype=dtype, device=i.v.device)
    loss, totals, rows = new(), new(3), new(native.ROWS, i.r.shape[0])
    for field, x in (("loss", loss), ("totals", totals), ("rows", rows)):
        f.point(field, x)
    terms = new(i.r.shape[0], 3, dtype=torch.float64)
    stream = ctypes.c_void_p(torch.cuda.current_stream(i.v.device).cuda_stream)
    code = library().afd_cuda_nft_loss(
        ctypes.byref(f.c), ctypes.c_void_p(terms.data_ptr()), ctypes.c_void_p(_ticket(i.v.device).data_ptr()), stream
    )
    if code:
        raise RuntimeError(library().afd_cuda_error(code).decode())
    return loss, totals, rows

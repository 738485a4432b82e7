"""The opt-in CUDA C++ kernel (AFD_BUILD_CUDA=1): loss and gradient of an adaptive recipe in one launch. Unmeasured.

No operator calls it. It becomes the CUDA implementation if it is 10 % faster than the two Triton sweeps, or goes.
"""

import ctypes
import functools
from pathlib import Path

import afd_kernels
import torch
from afd_kernels.layout import Row, Total
from torch import Tensor

from afd_fast.ops import native
from afd_fast.ops.inputs import Inputs


@functools.cache
def library() -> ctypes.CDLL | None:
    """None where it was not built."""
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


def gradient(i: Inputs, grad: Tensor) -> Tensor:
    """The gradient for grad_output 1, written into `grad` next to the loss and its statistics. RuntimeError for a call
    that the kernel does not handle."""
    lib, samples = library(), i.r.shape[0]
    assert lib is not None, "cases.py asks for the library first"
    f = native._fill(i, grad)
    for field, size in (("loss", ()), ("totals", (len(Total),)), ("rows", (len(Row), samples))):
        f.point(field, torch.zeros(size, device=i.v.device), torch.float32)
    terms = torch.zeros(samples, 3, dtype=torch.float64, device=i.v.device)
    stream = ctypes.c_void_p(torch.cuda.current_stream(i.v.device).cuda_stream)
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (terms, _ticket(i.v.device)))
    if code := lib.afd_cuda_nft_loss(ctypes.byref(f.c), *pointers, stream):
        raise RuntimeError(lib.afd_cuda_error(code).decode())
    return grad

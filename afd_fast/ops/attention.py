"""Attention over [B, L, H, d] views, dense or in packed segments, through the fastest installed kernel of others.

backend: "fa3" (flash_attn_interface) | "cudnn" (PyTorch's cuDNN SDPA) | "fa4" (flash_attn.cute) | "fa2"
(flash_attn) | "sdpa" (PyTorch's own choice; any dtype and device) | "auto". Keys and values may be strided
views of a cache: no backend copies them. Order by compute capability: Hopper (9.x) fa3, cudnn, fa4, fa2;
datacentre Blackwell (10.x) fa4, cudnn, fa2; Ampere and Ada (8.x) fa2; sdpa last. PyTorch's default order takes
FlashAttention 2 on Hopper, where cuDNN and FA3 run at about twice its speed (pytorch issue #142132).
"""

import functools
import importlib.util
import inspect
import itertools
import logging
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_fast.reference import transformer as reference

log = logging.getLogger("afd_fast")

Backend = Literal["fa3", "cudnn", "fa4", "fa2", "sdpa"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
_PACKAGES = {
    "fa3": ("flash_attn_interface", "flash-attn-3: build hopper/ of github.com/Dao-AILab/flash-attention"),
    "fa4": ("flash_attn.cute", "flash-attn-4: pip install --pre flash-attn-4"),
    "fa2": ("flash_attn", "flash-attn 2: pip install --no-build-isolation 'afd-fast[flash]'"),
    "cudnn": ("cudnn", "a CUDA build of PyTorch with cuDNN >= 9"),
}
_ORDER: dict[int, tuple[Backend, ...]] = {
    8: ("fa2", "sdpa"),
    9: ("fa3", "cudnn", "fa4", "fa2", "sdpa"),
    10: ("fa4", "cudnn", "fa2", "sdpa"),
}
_LSE_FLAG = {"fa2": "return_attn_probs", "fa3": "return_attn_probs", "fa4": "return_lse"}
_CAPABILITY = {"fa3": (9,), "fa4": (9, 10, 11), "fa2": (8, 9, 10, 11, 12), "cudnn": (8, 9, 10, 11, 12)}


def _is_installed(backend: str) -> bool:
    if backend == "sdpa":
        return True
    if backend == "cudnn":
        return torch.backends.cudnn.is_available() and (torch.backends.cudnn.version() or 0) >= 90000
    module = _PACKAGES[backend][0]
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # the parent package of flash_attn.cute
        return False
    if backend == "fa2" and found:  # flash-attn-4 alone also makes a `flash_attn` namespace
        return importlib.util.find_spec("flash_attn.flash_attn_interface") is not None
    return found is not None


def choose_backend(requested: str, capability: int | None, half: bool, installed: Callable[[Backend], bool]) -> Backend:
    """The backend for a compute capability's major number (None: not CUDA).

    requested: "auto" or a `Backend`. half: whether the tensors are float16 or bfloat16, which is all the flash kernels
    take. Raises ValueError for an unknown name or tensors that a named backend cannot take, ImportError naming the
    package that is missing.
    """
    named = next((name for name in BACKENDS if name == requested), None)
    if requested != "auto" and named is None:
        raise ValueError(f"attention={requested!r} is not one of {('auto', *BACKENDS)}")
    if named == "sdpa":
        return "sdpa"
    if named is not None:
        if capability is None or not half:
            raise ValueError(f'attention="{requested}" needs float16 or bfloat16 CUDA tensors; use "sdpa" or "auto"')
        if capability not in _CAPABILITY[named]:
            raise ValueError(f'attention="{named}" does not run on compute capability {capability}.x; use "auto"')
        if not installed(named):
            raise ImportError(f'attention="{named}" needs {_PACKAGES[named][1]}')
        return named
    if capability is None or not half:
        return "sdpa"
    order: tuple[Backend, ...] = _ORDER.get(capability, ("cudnn", "sdpa"))
    return next(name for name in order if installed(name))


def resolve_backend(requested: str, device: torch.device, dtype: torch.dtype, without: str = "") -> Backend:
    """`choose_backend` for this machine; "auto" never chooses `without`. Resolved once per argument set and logged."""
    return _resolve(requested, device, dtype, without)


# what torch.compiler.assume_constant_result does; calling that would import dynamo, and triton with it
resolve_backend.__dict__["_dynamo_marked_constant"] = True


@functools.cache
def _resolve(requested: str, device: torch.device, dtype: torch.dtype, without: str) -> Backend:
    capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None

    def installed(name: Backend) -> bool:
        return not (requested == "auto" and name == without) and _is_installed(name)

    chosen = choose_backend(requested, capability, dtype in (torch.float16, torch.bfloat16), installed)
    log.info("attention=%s: %s for %s on %s", requested, chosen, dtype, device)
    return chosen


class _Out(NamedTuple):
    out: Tensor
    lse: Tensor | None  # where it was asked for


def _sdpa(q: Tensor, k: Tensor, v: Tensor, lse: bool) -> _Out:
    if lse and q.device.type != "cpu":
        return _Out(*reference.attention(q, k, v))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if not lse:
        return _Out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2), None)
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return _Out(out.transpose(1, 2), log_sum)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, lse: bool) -> _Out:
    needs_lse = lse or (torch.is_grad_enabled() and any(a.requires_grad for a in (q, k, v)))
    args = (a.transpose(1, 2) for a in (q, k, v))
    out, log_sum = torch.ops.aten._scaled_dot_product_cudnn_attention(*args, None, needs_lse)[:2]
    return _Out(out.transpose(1, 2), log_sum)


@functools.cache
def _flash_function(backend: Backend) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    return importlib.import_module(_PACKAGES[backend][0]).flash_attn_func


def _flash(backend: Backend, q: Tensor, k: Tensor, v: Tensor, lse: bool) -> _Out:
    # the three packages, and their versions, differ in whether a tuple comes back and in the flag's name
    result = _flash_function(backend)(q, k, v, **({_LSE_FLAG[backend]: True} if lse else {}))
    return _Out(result[0], result[1]) if isinstance(result, tuple) else _Out(result, None)


@overload
def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str = ..., return_lse: Literal[False] = ...) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, backend: str = ..., return_lse: Literal[True]
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, backend: str = ..., return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto", return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d)) v without a mask, which neither the rollout nor training needs.

    q: [B, Lq, H, d]; k, v: [B, Lk, H, d], any strides with a contiguous last axis. backend: "auto" or a `Backend`.
    Returns [B, Lq, H, d]; with return_lse also the log-sum-exp [B, H, Lq] (float32; float64 for float64), through which
    no gradient flows.
    """
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit together")
    chosen = resolve_backend(backend, q.device, q.dtype)
    if chosen == "sdpa":
        out, lse = _sdpa(q, k, v, return_lse)
    elif chosen == "cudnn":
        out, lse = _cudnn(q, k, v, return_lse)
    else:
        out, lse = _flash(chosen, q, k, v, return_lse)
    if not return_lse:
        return out
    if lse is None:
        raise RuntimeError(f'attention="{chosen}": the installed version returns no log-sum-exp')
    return out, lse.squeeze(-1) if lse.ndim == 4 else lse


def _dense(backend: Backend, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """[n, H, L, d] of n segments of one length through SDPA or cuDNN."""
    if backend == "cudnn":  # has no grouped queries
        k, v = (a.repeat_interleave(q.shape[1] // a.shape[1], 1) for a in (k, v))
        needs_lse = torch.is_grad_enabled() and any(a.requires_grad for a in (q, k, v))
        return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, needs_lse, 0.0, causal)[0]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


@functools.cache
def _flash_varlen(backend: Backend) -> tuple[Callable[..., Tensor | tuple[Tensor, ...]], bool]:
    """The package's variable-length function and whether it takes maximum lengths (early FA4 does not)."""
    function = importlib.import_module(_PACKAGES[backend][0]).flash_attn_varlen_func
    return function, "max_seqlen_q" in inspect.signature(function).parameters


def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], *, causal: bool = False, backend: str = "auto"
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v within each segment of consecutive rows; no padding, no mask.

    q: [L, H, d]; k, v: [L, Hk, d], Hk divides H; lengths: the segments' host integers, their sum is L. Returns
    [L, H, d]. Neighbouring segments of equal length are one dense call of SDPA or cuDNN; the flash packages get
    cumulative lengths. Causal segments of several lengths are one call of cuDNN, each filled up behind its end, which
    no row of it sees, to a multiple of 64: cuDNN plans every new shape anew, and prompts have many lengths. "auto" does not choose FA3 for head widths that are no multiple of 64, where it was measured
    at a third of FA2's speed (verl PR #4670, H100, d = 80).
    """
    if q.ndim != 3 or k.shape != v.shape or q.shape[1] % k.shape[1] or sum(lengths) != len(q) or len(q) != len(k):
        raise ValueError(
            f"attention_varlen: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} and {len(lengths)} segments "
            f"of {sum(lengths)} rows do not fit together"
        )
    chosen = resolve_backend(backend, q.device, q.dtype, without="fa3" if q.shape[-1] % 64 else "")
    if chosen == "cudnn" and causal and len(set(lengths)) > 1 and _padded_rows(lengths) <= 1.25 * len(q):
        n, (filled, back) = len(lengths), _padding(lengths, q.device)
        queries, keys, values = (a.index_select(0, filled).unflatten(0, (n, -1)).transpose(1, 2) for a in (q, k, v))
        return _dense(chosen, queries, keys, values, causal).transpose(1, 2).flatten(0, 1).index_select(0, back)
    if chosen in ("sdpa", "cudnn"):
        parts, begin = [], 0
        for length, run in itertools.groupby(lengths):
            n = len(list(run))
            rows = slice(begin, begin := begin + n * length)
            queries, keys, values = (a[rows].unflatten(0, (n, length)).transpose(1, 2) for a in (q, k, v))
            parts.append(_dense(chosen, queries, keys, values, causal).transpose(1, 2).flatten(0, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    function, wants_max = _flash_varlen(chosen)
    cu = _cumulative(lengths, q.device)
    most = {"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)} if wants_max else {}
    out = function(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=causal, **most)
    return out[0] if isinstance(out, tuple) else out


def _padded_rows(lengths: tuple[int, ...]) -> int:
    """Rows of all segments, each as long as the longest one rounded up to a multiple of 64."""
    return len(lengths) * (-(-max(lengths) // 64) * 64)


@functools.lru_cache(maxsize=64)
def _padding(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The packed row in every row of the filled-up segments (the last one again behind the end), and the way back."""
    size = _padded_rows(lengths) // len(lengths)
    starts = itertools.accumulate(lengths, initial=0)
    rows = [start + torch.arange(size, device=device).clamp(max=n - 1) for start, n in zip(starts, lengths)]
    back = [i * size + torch.arange(n, device=device) for i, n in enumerate(lengths)]
    return torch.cat(rows), torch.cat(back)


@functools.lru_cache(maxsize=64)  # every layer of a forward asks for the same one
def _cumulative(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor((0, *itertools.accumulate(lengths)), dtype=torch.int32, device=device)

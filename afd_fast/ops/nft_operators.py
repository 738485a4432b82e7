"""The operators of nft_loss: schemas, and what serves them on a CPU.

Legend: B samples, T packed rows, F frames, w the working dtype (float32, float64 for float64).
`rows` [15, B] holds the results per sample, in the order of `Row`; the last three are the gradient's coefficients, see
kernels/csrc/afd_core.h. grad_output [2] multiplies the gradients of policy and prior.
"""

import functools
from typing import Any

import torch
from afd_kernels.layout import COEFFICIENTS, Row, Total
from torch import Tensor

from afd_fast.ops import native
from afd_fast.ops._register import operator
from afd_fast.ops.inputs import SCHEMA, Inputs
from afd_fast.reference import nft as reference
from afd_fast.reference.nft_inputs import NFTInputs
from afd_fast.reference.recipes import NFTRecipe, recipe_from_key

STATISTICS = [row.name.lower() for row in Row if row < COEFFICIENTS]  # fields of NFTStats
Sums = tuple[Tensor, Tensor, Tensor]  # what the operators return: loss, totals [4], rows [15, B]


class _Plain(NFTInputs):
    """The reference's arguments."""

    v: Tensor
    x0: Tensor
    r: Tensor
    t: Tensor
    recipe: NFTRecipe


def _reshaped(x: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    return None if x is None else x.reshape(shape)


def _plain(i: Inputs) -> _Plain:
    """The same call in the reference's arguments."""
    shape, t, sigma = tuple(i.v.shape), i.t, i.sigma
    if i.cu_seqlens is None:
        frames = t.shape[1]
        count = i.v[0].numel() if shape[0] else 0
        shape = (shape[0], count // (frames * i.inner) if count else 0, frames, i.inner)
        t, sigma = t.view(-1, 1, frames, 1), _reshaped(sigma, (-1, 1, frames, 1))
    else:
        t, sigma = t[:, 0], None if sigma is None else sigma[:, 0]
    return {
        "v": i.v.reshape(shape), "x0": i.x0.reshape(shape), "r": i.r if i.each is None else i.each.reshape(shape), "t": t, "noise": _reshaped(i.noise, shape),
        "seed": i.seed, "x_t": _reshaped(i.x_t, shape), "v_old": _reshaped(i.v_old, shape),
        "v_ref": _reshaped(i.v_ref, shape), "sigma": sigma, "sample_mask": i.sample_mask, "ref_mask": i.ref_mask,
        "element_mask": _reshaped(i.element_mask, shape), "policy_weight": i.policy_weight, "prior_weight": i.prior_weight,
        "cu_seqlens": i.cu_seqlens,
        "recipe": recipe_from_key(i.recipe),
    }  # fmt: skip


def _sums(i: Inputs) -> Sums:
    """The reference's loss, totals and rows; zero where the rows are coefficients, which it does not need."""
    with torch.no_grad():
        loss, s = reference.nft_loss(**_plain(i), return_stats=True)
        none = torch.zeros_like(s.pos_loss)
        rows = [getattr(s, name) for name in STATISTICS] + [none] * (len(Row) - COEFFICIENTS)
        return loss.clone(), torch.stack([s.policy_loss, s.prior_loss, s.signal, s.r_mean]), torch.stack(rows)


def _gradient(grad_output: tuple[float, float], i: Inputs) -> Tensor:
    policy, prior = grad_output
    with torch.no_grad():
        if policy == prior:
            grad = reference.nft_grad(**_plain(i)) * policy
        else:
            grad = reference.nft_grad(**_plain(i), scales=grad_output)
        return grad.to(i.v.dtype).view(i.v.shape)


def _pair(grad_output: Tensor) -> tuple[float, float]:
    policy, prior = grad_output.tolist()
    return policy, prior


def _is_native(i: Inputs) -> bool:
    return native.serves(i.v, i.x0, i.noise, i.x_t, i.v_old, i.v_ref)


def _cpu_loss(*args: Any) -> Sums:
    i = Inputs(*args)
    return native.nft_loss(i, None) if _is_native(i) else _sums(i)


def _with_buffer(args: tuple[Any, ...]) -> tuple[Inputs, Tensor, float]:
    """(inputs, grad, scale); PyTorch leaves out a scale that is the schema's default."""
    count = len(Inputs._fields)
    grad, scale = args[count], args[count + 1] if len(args) > count + 1 else 1.0
    return Inputs(*args[:count]), grad, scale


def _cpu_loss_with_grad(*args: Any) -> Sums:
    i, grad, scale = _with_buffer(args)
    if _is_native(i):
        return native.nft_loss(i, grad, scale)
    grad.copy_(_gradient((scale, scale), i))
    return _sums(i)


def _cpu_backward(grad_output: Tensor, rows: Tensor, *args: Any) -> Tensor:
    i = Inputs(*args)
    if not _is_native(i):
        return _gradient(_pair(grad_output), i)
    grad = empty_gradient(i.v)
    native.nft_gradient(grad_output, rows, i, grad)
    return grad


def _cpu_redo(grad_output: Tensor, rows: Tensor, *args: Any) -> None:
    i, grad, scale = _with_buffer(args)
    if _pair(grad_output) == (scale, scale):
        return
    if _is_native(i):
        native.nft_gradient(grad_output, rows, i, grad)
    else:
        grad.copy_(_gradient(_pair(grad_output), i))


def empty_gradient(v: Tensor) -> Tensor:
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


def _fake_loss(*args: Any) -> Sums:
    i = Inputs(*args[: len(Inputs._fields)])
    new = functools.partial(i.v.new_empty, dtype=torch.promote_types(i.v.dtype, torch.float32))
    return new(()), new(len(Total)), new((len(Row), i.r.shape[0]))


def _fake_backward(grad_output: Tensor, rows: Tensor, *args: Any) -> Tensor:
    return empty_gradient(args[0])


def _fake_redo(*args: Any) -> None:
    return None


loss = operator(f"nft_loss({SCHEMA}) -> (Tensor, Tensor, Tensor)", cpu=_cpu_loss, cuda="nft:nft_loss", fake=_fake_loss)
loss_with_grad = operator(  # grad: for grad_output = scale, which is 1 on a GPU
    f"nft_loss_with_grad({SCHEMA}, Tensor(a!) grad, float scale=1.0) -> (Tensor, Tensor, Tensor)",
    cpu=_cpu_loss_with_grad, cuda="nft:nft_loss_with_grad", fake=_fake_loss,
)  # fmt: skip
backward = operator(
    f"nft_loss_backward(Tensor grad_output, Tensor rows, {SCHEMA}) -> Tensor",
    cpu=_cpu_backward, cuda="nft:nft_loss_backward", fake=_fake_backward,
)  # fmt: skip
redo = operator(  # grad holds the gradient for grad_output = scale; rewrites it where grad_output is another number
    f"nft_loss_redo(Tensor grad_output, Tensor rows, {SCHEMA}, Tensor(a!) grad, float scale=1.0) -> ()",
    cpu=_cpu_redo, cuda="nft:nft_loss_redo", fake=_fake_redo,
)  # fmt: skip

"""nft_loss as operators: one sweep for the sums, one for the gradient, or both at once where the recipe allows.

Legend: B samples, T packed rows, F frames, w the working dtype (float32, float64 for float64).
`rows` [11, B] holds the results per sample, in the order of `Row`; the last three are the gradient's coefficients:
dL/dv = s [(c+ - c-) a + (c+ + c-) d] + c_ref m (v - v_ref), see kernels/csrc/afd_core.h.
"""

import functools
import inspect
from typing import Any, Literal, overload

import torch
from afd_kernels.layout import COEFFICIENTS, Row, Total
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import increment_version
from typing_extensions import Unpack

from afd_fast.ops import native
from afd_fast.ops._register import operator
from afd_fast.ops.buffer import check_out, is_own
from afd_fast.ops.inputs import SCHEMA, Inputs
from afd_fast.ops.layout import Walk, memory_order, noise_levels
from afd_fast.ops.noise import wrap_seed
from afd_fast.reference import nft as reference
from afd_fast.reference import nft_inputs as checks
from afd_fast.reference.flow import check_sigma, check_t
from afd_fast.reference.nft import NFTStats, NFTTerms
from afd_fast.reference.nft_inputs import NFTInputs
from afd_fast.reference.recipes import NFTRecipe, RecipeName, as_recipe, recipe_from_key
from afd_fast.reference.transforms import under_func

STATISTICS = [row.name.lower() for row in Row if row < COEFFICIENTS]  # fields of NFTStats
Sums = tuple[Tensor, Tensor, Tensor]  # what the operators return: loss, totals [3], rows [11, B]


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
        "v": i.v.reshape(shape), "x0": i.x0.reshape(shape), "r": i.r, "t": t, "noise": _reshaped(i.noise, shape),
        "seed": i.seed, "x_t": _reshaped(i.x_t, shape), "v_old": _reshaped(i.v_old, shape),
        "v_ref": _reshaped(i.v_ref, shape), "sigma": sigma, "sample_mask": i.sample_mask, "ref_mask": i.ref_mask,
        "element_mask": _reshaped(i.element_mask, shape), "cu_seqlens": i.cu_seqlens,
        "recipe": recipe_from_key(i.recipe),
    }  # fmt: skip


def _sums(i: Inputs) -> Sums:
    """The reference's loss, totals and rows; zero where the rows are coefficients, which it does not need."""
    with torch.no_grad():
        loss, s = reference.nft_loss(**_plain(i), return_stats=True)
        none = torch.zeros_like(s.pos_loss)
        rows = [getattr(s, name) for name in STATISTICS] + [none] * (len(Row) - COEFFICIENTS)
        return loss.clone(), torch.stack([s.policy_loss, s.prior_loss, s.signal]), torch.stack(rows)


def _gradient(grad_output: Tensor | float, i: Inputs) -> Tensor:
    with torch.no_grad():
        return (reference.nft_grad(**_plain(i)) * grad_output).to(i.v.dtype).view(i.v.shape)


def _is_native(i: Inputs) -> bool:
    return native.serves(i.v, i.x0, i.noise, i.x_t, i.v_old, i.v_ref)


def _cpu_loss(*args: Any) -> Sums:
    i = Inputs(*args)
    return native.nft_loss(i, None) if _is_native(i) else _sums(i)


def _cpu_loss_with_grad(*args: Any) -> Sums:
    i, grad = Inputs(*args[:-1]), args[-1]
    if _is_native(i):
        return native.nft_loss(i, grad)
    grad.copy_(_gradient(1.0, i))
    return _sums(i)


def _cpu_backward(grad_output: Tensor, rows: Tensor, *args: Any) -> Tensor:
    i = Inputs(*args)
    if not _is_native(i):
        return _gradient(grad_output, i)
    grad = _empty_gradient(i.v)
    native.nft_gradient(grad_output, rows, i, grad)
    return grad


def _cpu_redo(grad_output: Tensor, rows: Tensor, *args: Any) -> None:
    i, grad = Inputs(*args[:-1]), args[-1]
    if float(grad_output) == 1.0:
        return
    if _is_native(i):
        native.nft_gradient(grad_output, rows, i, grad)
    else:
        grad.copy_(_gradient(grad_output, i))


def _version(buffer: Tensor | None) -> int | None:
    """How often the buffer was written; None where that is not counted."""
    return None if buffer is None or buffer.is_inference() else buffer._version


def _empty_gradient(v: Tensor) -> Tensor:
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


def _fake_loss(*args: Any) -> Sums:
    i = Inputs(*args[: len(Inputs._fields)])
    new = functools.partial(i.v.new_empty, dtype=torch.promote_types(i.v.dtype, torch.float32))
    return new(()), new(len(Total)), new((len(Row), i.r.shape[0]))


def _fake_backward(grad_output: Tensor, rows: Tensor, *args: Any) -> Tensor:
    return _empty_gradient(args[0])


def _fake_redo(*args: Any) -> None:
    return None


_loss = operator(f"nft_loss({SCHEMA}) -> (Tensor, Tensor, Tensor)", cpu=_cpu_loss, cuda="nft:nft_loss", fake=_fake_loss)
_loss_with_grad = operator(
    f"nft_loss_with_grad({SCHEMA}, Tensor(a!) grad) -> (Tensor, Tensor, Tensor)",
    cpu=_cpu_loss_with_grad, cuda="nft:nft_loss_with_grad", fake=_fake_loss,
)  # fmt: skip
_backward = operator(
    f"nft_loss_backward(Tensor grad_output, Tensor rows, {SCHEMA}) -> Tensor",
    cpu=_cpu_backward, cuda="nft:nft_loss_backward", fake=_fake_backward,
)  # fmt: skip
_redo = operator(  # grad holds the gradient for grad_output 1; rewrites it where grad_output is another number
    f"nft_loss_redo(Tensor grad_output, Tensor rows, {SCHEMA}, Tensor(a!) grad) -> ()",
    cpu=_cpu_redo, cuda="nft:nft_loss_redo", fake=_fake_redo,
)  # fmt: skip


def _one_by_one(function: type[Function], info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> list:
    """The rule of vmap: one call per entry of the mapped axis, since an operator takes one batch. Stacks each output."""
    if info.batch_size == 0:
        raise ValueError("afd_fast.nft_loss under torch.func.vmap: the mapped axis has size 0, expected at least 1")
    calls = [
        function.apply(*(x if dim is None else x.select(dim, entry) for x, dim in zip(args, in_dims)))
        for entry in range(info.batch_size)
    ]
    return [torch.stack(outputs) for outputs in zip(*(c if isinstance(c, tuple) else (c,) for c in calls))]


class _NFTLoss(Function):
    """(loss, totals, rows) of (buffer, *Inputs). Into the buffer, if there is one, goes the gradient in the same call."""

    @staticmethod
    def forward(buffer: Tensor | None, *args: Any) -> Sums:
        if buffer is None:
            return _loss(*args)
        if not buffer.is_inference():
            increment_version(buffer)  # an earlier loss that still needs this buffer will notice
        return _loss_with_grad(*args, buffer)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Sums) -> None:
        ctx.grad, *args = inputs
        ctx.version = _version(ctx.grad)
        _, totals, rows = output
        ctx.save_for_backward(rows, *(x if isinstance(x, Tensor) else None for x in args))
        ctx.plain = [None if isinstance(x, Tensor) else x for x in args]
        ctx.mark_non_differentiable(totals, rows)
        ctx.set_materialize_grads(False)  # two fills less in every backward

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        rows, *tensors = ctx.saved_tensors
        args = [a if b is None else b for a, b in zip(ctx.plain, tensors)]
        grad, ctx.grad = ctx.grad, None  # handed over once; a second backward computes a new one
        if _version(grad) != ctx.version and grad is not None:
            raise RuntimeError(
                "afd_fast.nft_loss: its out= buffer was written after the forward pass. Give every loss a separate buffer "
                "until its backward has run"
            )
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True, or torch.func
            grad = _NFTGradient.apply(grad_output, rows, *args)
        else:
            with torch.no_grad():
                if grad is None:
                    grad = _backward(grad_output, rows, *args)
                else:
                    _redo(grad_output, rows, *args, grad)
        return None, grad, *[None] * (len(args) - 1)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Sums, tuple[int, int, int]]:
        loss, totals, rows = _one_by_one(_NFTLoss, info, in_dims, args)
        return (loss, totals, rows), (0, 0, 0)


class _NFTGradient(Function):
    """dL/dv as a node of a graph that is to be differentiated again, which it refuses: zeros would be a wrong answer."""

    @staticmethod
    def forward(grad_output: Tensor, rows: Tensor, *args: Any) -> Tensor:
        return _backward(grad_output, rows, *args)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: FunctionCtx, *_: Tensor) -> Any:
        raise RuntimeError(
            "afd_fast.nft_loss has no second derivative: its kernels compute dL/dv only. Use "
            "afd_fast.reference.nft.nft_loss, the same loss in plain PyTorch"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        (grad,) = _one_by_one(_NFTGradient, info, in_dims, args)
        return grad, 0


for _function in (_NFTLoss, _NFTGradient):  # `apply` asks for it at every call, and deriving it takes 20 us
    _function.forward.__dict__["__signature__"] = inspect.signature(_function.forward)


def _is_fused(
    recipe: NFTRecipe, r: Tensor, masks: tuple[Tensor | None, ...], weights: tuple[Tensor | None, ...]
) -> bool:
    """Whether the sweeps know this loss. The others run in plain PyTorch, in at least float32 too."""
    plain = recipe.form == "mse" and recipe.drift_clip is None and recipe.ref_reduction == "sample"
    weighted = any(x is not None and x.is_floating_point() for x in masks) or any(x is not None for x in weights)
    return plain and not (recipe.weight_grad or recipe.shared_weight or weighted) and r.ndim == 1


@overload
def nft_loss(
    v: Tensor, x0: Tensor, r: Tensor, t: Tensor | float, *, recipe: RecipeName | NFTRecipe = ...,
    return_stats: Literal[False] = ..., out: Tensor | None = ..., **inputs: Unpack[NFTInputs],
) -> Tensor: ...  # fmt: skip
@overload
def nft_loss(
    v: Tensor, x0: Tensor, r: Tensor, t: Tensor | float, *, recipe: RecipeName | NFTRecipe = ...,
    return_stats: Literal[True], out: Tensor | None = ..., **inputs: Unpack[NFTInputs],
) -> tuple[Tensor, NFTStats]: ...  # fmt: skip
@overload
def nft_loss(
    v: Tensor, x0: Tensor, r: Tensor, t: Tensor | float, *, recipe: RecipeName | NFTRecipe = ...,
    return_stats: bool, out: Tensor | None = ..., **inputs: Unpack[NFTInputs],
) -> Tensor | tuple[Tensor, NFTStats]: ...  # fmt: skip
def nft_loss(
    v: Tensor,
    x0: Tensor,
    r: Tensor,
    t: Tensor | float,
    *,
    noise: Tensor | None = None,
    seed: int | None = None,
    x_t: Tensor | None = None,
    v_old: Tensor | None = None,
    v_ref: Tensor | None = None,
    sigma: Tensor | float | None = None,
    sample_mask: Tensor | None = None,
    ref_mask: Tensor | None = None,
    element_mask: Tensor | None = None,
    policy_weight: Tensor | None = None,
    prior_weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    frame_dim: int | None = None,
    recipe: RecipeName | NFTRecipe = "afd",
    return_stats: bool = False,
    out: Tensor | None = None,
    check_nan: bool = False,
) -> Tensor | tuple[Tensor, NFTStats]:
    """The NFT + prior loss of a flow-matching student on its own rollouts (AFD Eq. 4-5). Only v gets a gradient.

    Args:
        v: [B, ...] the student's velocity at x_t; packed [T, ...] with cu_seqlens.
        x0: like v; the rollouts.
        r: [B] optimality in [0, 1] (`reward_to_r`); [B, F] with frame_dim; or as many axes as v, broadcastable, for an r
            per frame, voxel or token.
        t: noise level in [0, 1]; a number, [B], or [B, F] with frame_dim.
        noise / seed / x_t: where the noised state comes from: eps itself, the seed of `forward_noise`, or x_t.
            x0-space recipes need one of the three, velocity-space recipes noise or seed (or x_t with t > 0).
        v_old: velocity of the data-collecting policy; None is stop-grad(v), the paper's reading.
        v_ref: velocity of the frozen initial student; None leaves the prior out.
        sigma: velocity -> x0 coefficient where it is not t (Astrolabe's scheduler table); shapes as t.
        sample_mask: [B] samples that count; ref_mask: [B] samples in the prior. Floating point: weights of the mean.
        element_mask: as many axes as v, broadcastable; elements that count. Means and weights run over them. Floating
            point: weights of those means.
        policy_weight, prior_weight: [B] factors of a sample's policy loss and prior, after the means (time weights).
        cu_seqlens: int [B + 1], samples are rows cu[b] .. cu[b+1] of v; with noise= or x_t=.
        frame_dim: axis of x0 that t's second axis runs over (2 for [B, C, F, H, W]).
        recipe: a name (`RecipeName`) or an `NFTRecipe`.
        return_stats: also return `NFTStats`, from the same sweep.
        out: like v; a buffer for the gradient. This call writes the gradient for grad_output 1 into it, the first
            backward the one for its grad_output, and hands it to autograd. Saves the allocation, which costs a CPU more
            than the work.
        check_nan: search every input for NaN first and name the samples; synchronises a GPU.

    Returns: a scalar in float32 (float64 for float64 v), and the stats.
    Internals are float32 (float64), rounded once where the gradient is stored; grad_output enters before that.
    Recipes without adaptive weights write the gradient in the forward sweep, and again only where grad_output is
    not 1. Nothing synchronises a GPU; r, t and cu_seqlens are range-checked where they are on the CPU.
    torch.func: grad, vjp, jacrev and vmap work (vmap calls the operator once per entry of the mapped axis). Forward mode
    and second derivatives raise; `afd_fast.reference.nft.nft_loss` has both.
    Raises: TypeError, ValueError: as `NFTRecipe`, `forward_noise`, and for r outside [0, 1] or of another shape.
    """
    recipe = as_recipe(recipe)
    inputs: NFTInputs = {
        "noise": noise, "seed": seed, "x_t": x_t, "v_old": v_old, "v_ref": v_ref, "sigma": sigma,
        "sample_mask": sample_mask, "ref_mask": ref_mask, "element_mask": element_mask, "policy_weight": policy_weight,
        "prior_weight": prior_weight, "cu_seqlens": cu_seqlens, "frame_dim": frame_dim, "check_nan": check_nan,
    }  # fmt: skip
    checks.check_nft(v, x0, r, inputs)
    checks.check_recipe(recipe, r, inputs)
    r = checks.expand_r(r, v, frame_dim, cu_seqlens)
    if not _is_fused(recipe, r, (element_mask, sample_mask, ref_mask), (policy_weight, prior_weight)):
        if out is not None:
            raise ValueError(
                "out= is for the losses that the sweeps compute: this recipe, r or mask runs in plain PyTorch"
            )
        return reference.nft_loss(v, x0, r, t, recipe=recipe, return_stats=return_stats, **inputs)
    sample_mask, ref_mask = (None if x is None else checks.as_weights(x) for x in (sample_mask, ref_mask))
    noise, seed, x_t = checks.choose_source(noise, seed, x_t, recipe)
    check_out(out, v, (x0, r, t, noise, x_t, v_old, v_ref, sigma, sample_mask, ref_mask, element_mask, cu_seqlens))
    if "x0" not in (recipe.space, recipe.ref_space):
        sigma = None
    order = None
    if cu_seqlens is not None:
        checks.check_packed(t, sigma, cu_seqlens, seed, frame_dim)
    elif seed is None:  # the elements of a seed's noise are numbered in logical order
        order = memory_order(v)
    levels, coefficients = noise_levels(t, sigma, Walk(v, frame_dim, order, cu_seqlens))
    check_t(levels.t)
    if coefficients is not None:
        check_sigma(coefficients)
    checks.check_target(levels.t, x_t, recipe)
    mask = None if element_mask is None else checks.expand_mask(element_mask, v)
    if order is not None:
        v, x0 = v.permute(order), x0.permute(order)
        noise, x_t, v_old, v_ref, mask, out = (
            None if x is None else x.permute(order) for x in (noise, x_t, v_old, v_ref, mask, out)
        )
    if out is not None and not (out.is_contiguous() if cu_seqlens is not None else is_own(out)):
        raise ValueError("out must have v's memory layout: every sample contiguous, and none over another")
    v_old, v_ref = (None if x is None else x.detach() for x in (v_old, v_ref))
    compiling, transformed = torch.compiler.is_compiling(), under_func()
    if compiling and transformed:  # dynamo would trace past the autograd.Function, to a gradient of zero
        raise RuntimeError(
            "torch.compile cannot trace a transform of torch.func over afd_fast.nft_loss: compile the network alone, or "
            "use afd_fast.reference.nft.nft_loss"
        )
    eager = not compiling and not transformed
    if out is None and eager and torch.is_grad_enabled() and v.requires_grad and recipe.weighting == "none":
        out = _empty_gradient(v)  # one sweep; inside torch.func and torch.compile this buffer would go unused
    loss, totals, rows = _NFTLoss.apply(out, *Inputs(
        v, x0, r, levels.t, noise, wrap_seed(seed), x_t, v_old, v_ref, coefficients, sample_mask, ref_mask, mask,
        cu_seqlens, levels.inner, recipe.key, return_stats,
    ))  # fmt: skip
    if not return_stats:
        return loss
    policy, prior, signal = totals.unbind()
    named = dict(zip(STATISTICS, rows.unbind()))
    return loss, NFTStats(policy_loss=policy, prior_loss=prior, signal=signal, **named)


def nft_terms(
    v: Tensor, x0: Tensor, r: Tensor, t: Tensor | float, *, recipe: RecipeName | NFTRecipe = "afd",
    return_stats: bool = False, **inputs: Unpack[NFTInputs],
) -> NFTTerms:  # fmt: skip
    """The two halves of `nft_loss`, each differentiable in v: nft_loss = policy + recipe.ref_coef * prior.

    For a trainer that weighs, logs or projects their gradients apart. Arguments and errors as `nft_loss`, without out=;
    runs in plain PyTorch, in at least float32.
    """
    return reference.nft_terms(v, x0, r, t, recipe=recipe, return_stats=return_stats, **inputs)

"""nft_loss for autograd: one sweep for the sums, one for the gradient, or both at once where the recipe allows.

Legend: B samples, F frames.
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import increment_version
from typing_extensions import Never, Unpack

from afd_fast.ops import nft_operators as operators
from afd_fast.ops.buffer import check_out, is_own
from afd_fast.ops.inputs import Inputs
from afd_fast.ops.layout import Walk, memory_order, noise_levels
from afd_fast.ops.noise import wrap_seed
from afd_fast.reference import nft as reference
from afd_fast.reference import nft_inputs as checks
from afd_fast.reference.flow import check_sigma, check_t
from afd_fast.reference.nft import NFTStats, NFTTerms
from afd_fast.reference.nft_inputs import NFTInputs
from afd_fast.reference.recipes import NFTRecipe, RecipeName, as_recipe
from afd_fast.reference.transforms import under_func


def _version(buffer: Tensor | None) -> int | None:
    """How often the buffer was written; None where that is not counted."""
    return None if buffer is None or buffer.is_inference() else buffer._version


def _one_by_one(function: type[Function], info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> list:
    """The rule of vmap: one call per entry of the mapped axis, since an operator takes one batch. Stacks each output."""
    if info.batch_size == 0:
        raise ValueError("afd_fast.nft_loss under torch.func.vmap: the mapped axis has size 0, expected at least 1")
    calls = [
        function.apply(*(x if dim is None else x.select(dim, entry) for x, dim in zip(args, in_dims)))
        for entry in range(info.batch_size)
    ]
    return [torch.stack(outputs) for outputs in zip(*(c if isinstance(c, tuple) else (c,) for c in calls))]


def _keep(ctx: Any, rows: Tensor, args: Sequence[Any]) -> None:
    """Have ctx hold an operator's arguments and rows for backward.

    Autograd refuses what was made under torch.inference_mode; nothing can change or track that, so it is held as it is.
    """
    compiling = torch.compiler.is_compiling()
    saved = [x if isinstance(x, Tensor) and (compiling or not x.is_inference()) else None for x in args]
    ctx.save_for_backward(rows, *saved)
    ctx.plain = [x if kept is None else None for x, kept in zip(args, saved)]


def _kept(ctx: Any) -> list[Any]:
    """rows and the arguments that `_keep` took."""
    rows, *tensors = ctx.saved_tensors
    return [rows, *(a if b is None else b for a, b in zip(ctx.plain, tensors))]


class _NFTLoss(Function):
    """(loss, totals, rows) of (buffer, scale, *Inputs). Into the buffer, if there is one, goes the gradient for grad_output =
    scale in the same call."""

    expected = 1.0  # the last grad_output on a CPU: a loss scale or 1 / accumulation stays the same for many steps

    @staticmethod
    def forward(buffer: Tensor | None, scale: float, *args: Any) -> operators.Sums:
        if buffer is None:
            return operators.loss(*args)
        if not buffer.is_inference():
            increment_version(buffer)  # an earlier loss that still needs this buffer will notice
        return operators.loss_with_grad(*args, buffer, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: operators.Sums) -> None:
        ctx.grad, ctx.scale, *args = inputs
        ctx.version = _version(ctx.grad)
        _, totals, rows = output
        _keep(ctx, rows, args)
        ctx.mark_non_differentiable(totals, rows)
        ctx.set_materialize_grads(False)  # two fills less in every backward

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        if grad_output is None:  # nobody used the loss
            return (None,) * (len(ctx.plain) + 2)
        rows, *args = _kept(ctx)
        grad, ctx.grad = ctx.grad, None  # handed over once; a second backward computes a new one
        if _version(grad) != ctx.version and grad is not None:
            raise RuntimeError(
                "afd_fast.nft_loss: its out= buffer was written after the forward pass. Give every loss a separate buffer "
                "until its backward has run"
            )
        pair = grad_output.expand(2)  # of policy and prior
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True, or torch.func
            grad = _NFTGradient.apply(pair, rows, *args)
        else:
            with torch.no_grad():
                if grad is None:
                    grad = operators.backward(pair, rows, *args)
                else:
                    operators.redo(pair, rows, *args, grad, ctx.scale)
                    if grad.device.type == "cpu":
                        _NFTLoss.expected = grad_output.item()
        return None, None, grad, *[None] * (len(args) - 1)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[operators.Sums, tuple[int, int, int]]:
        loss, totals, rows = _one_by_one(_NFTLoss, info, in_dims, args)
        return (loss, totals, rows), (0, 0, 0)


class _EagerNFTLoss(Function):
    """_NFTLoss of (v, buffer, scale, Inputs) outside torch.compile and torch.func: a third of the time for the same."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, buffer: Tensor | None, scale: float, inputs: Inputs) -> operators.Sums:
        output = _NFTLoss.forward(buffer, scale, *inputs)
        _NFTLoss.setup_context(ctx, (buffer, scale, *inputs), output)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        return _NFTLoss.backward(ctx, *grad_outputs)[2], None, None, None


class _NFTTerms(Function):
    """(policy, prior, totals, rows) of Inputs whose recipe has ref_coef 1."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        _, totals, rows = operators.loss(*args)
        return totals[0].clone(), totals[1].clone(), totals, rows

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _keep(ctx, output[3], inputs)
        ctx.mark_non_differentiable(*output[2:])

    @staticmethod
    def backward(ctx: Any, policy: Tensor, prior: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        rows, *args = _kept(ctx)
        return _NFTGradient.apply(torch.stack((policy, prior)), rows, *args), *[None] * (len(args) - 1)


class _NFTGradient(Function):
    """dL/dv as a node of a graph that is to be differentiated again, which it refuses: zeros would be a wrong answer."""

    @staticmethod
    def forward(grad_output: Tensor, rows: Tensor, *args: Any) -> Tensor:
        return operators.backward(grad_output, rows, *args)

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


for _function in (_NFTLoss, _NFTTerms, _NFTGradient):  # `apply` asks for it at every call, and deriving it takes 20 us
    _function.forward.__dict__["__signature__"] = inspect.signature(_function.forward)


def _is_fused(recipe: NFTRecipe) -> bool:
    """Whether the sweeps know this loss. The others run in plain PyTorch, in at least float32 too."""
    return recipe.drift_clip is None and not recipe.weight_grad


class _Call(NamedTuple):
    """A call, checked and brought to memory order."""

    inputs: Inputs
    out: Tensor | None


def _call(
    v: Tensor, x0: Tensor, r: Tensor, t: Tensor | float, given: NFTInputs, recipe: NFTRecipe, stats: bool,
    out: Tensor | None,
) -> _Call:  # fmt: skip
    noise, seed, x_t = checks.choose_source(given.get("noise"), given.get("seed"), given.get("x_t"), recipe)
    frame_dim, cu_seqlens = given.get("frame_dim"), given.get("cu_seqlens")
    sigma = given.get("sigma") if "x0" in (recipe.space, recipe.ref_space) else None
    order = None
    if cu_seqlens is not None:
        checks.check_packed(t, sigma, cu_seqlens, seed, frame_dim)
    elif seed is None:  # the elements of a seed's noise are numbered in logical order
        order = memory_order(v)
    levels, coefficients = noise_levels(t, sigma, Walk(v, frame_dim, order, cu_seqlens))
    check_t(levels.t, bool(given.get("check_nan")))
    if coefficients is not None:
        check_sigma(coefficients)
    checks.check_target(levels.t, x_t, recipe)
    mask, each = given.get("element_mask"), None
    mask = None if mask is None else checks.expand_mask(mask, v)
    r = checks.expand_r(r.detach(), v, frame_dim, cu_seqlens)
    if r.ndim > 1:
        each = r.to(torch.promote_types(v.dtype, torch.float32)).expand(v.shape)
        samples = len(v) if cu_seqlens is None else len(cu_seqlens) - 1
        r = torch.zeros(samples, dtype=each.dtype, device=v.device)
    v_old, v_ref = given.get("v_old"), given.get("v_ref")
    if order is not None:
        v, x0 = v.permute(order), x0.permute(order)
        noise, x_t, v_old, v_ref, mask, each, out = (
            None if x is None else x.permute(order) for x in (noise, x_t, v_old, v_ref, mask, each, out)
        )
    if out is not None and not (out.is_contiguous() if cu_seqlens is not None else is_own(out)):
        raise ValueError("out must have v's memory layout: every sample contiguous, and none over another")
    v_old, v_ref = (None if x is None else x.detach() for x in (v_old, v_ref))
    sample_mask, ref_mask = (
        None if x is None else checks.as_weights(x) for x in (given.get("sample_mask"), given.get("ref_mask"))
    )
    return _Call(Inputs(
        v, x0, r, levels.t, noise, wrap_seed(seed), x_t, v_old, v_ref, coefficients, sample_mask, ref_mask, mask, each,
        given.get("policy_weight"), given.get("prior_weight"), cu_seqlens, levels.inner, recipe.key, stats,
    ), out)  # fmt: skip


def _stats(totals: Tensor, rows: Tensor) -> NFTStats:
    policy, prior, signal, r_mean = totals.unbind()
    named = dict(zip(operators.STATISTICS, rows.unbind()))
    return NFTStats(policy_loss=policy, prior_loss=prior, signal=signal, r_mean=r_mean, **named)


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
    **unknown: Never,
) -> Tensor | tuple[Tensor, NFTStats]:
    """The NFT + prior loss of a flow-matching student on its own rollouts (AFD Eq. 4-5). Only v gets a gradient.

    Args:
        v: [B, ...] the student's velocity at x_t; packed [T, ...] with cu_seqlens.
        x0: like v; the rollouts.
        r: [B] optimality in [0, 1] (`reward_to_r`); [B, F] with frame_dim; or as many axes as v, broadcastable, for an r
            per frame, voxel or token.
        t: noise level in [0, 1]; a number, [B], or [B, F] with frame_dim.
        noise / seed / x_t: where the noised state comes from: eps itself, the seed of `forward_noise`, or x_t.
            x0-space recipes need one of the three, velocity-space recipes noise or seed (or x_t with t > 0), clean-space
            recipes none.
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
        check_nan: search every input for NaN first and name the samples, and check the ranges of r and t on a GPU too, which
            waits for it.

    Returns: a scalar in float32 (float64 for float64 v), and the stats.
    Internals are float32 (float64), rounded once where the gradient is stored; grad_output enters before that.
    Recipes without adaptive weights, and on a CPU all, write the gradient in the forward pass, and again only where grad_output
    is not 1 (on a CPU: not the last one). Nothing synchronises a GPU: there an r or t outside [0, 1] gives a NaN loss and gradient, whose cause check_nan=True, or
    CUDA_LAUNCH_BLOCKING=1 in the environment, names. On a CPU r, t and cu_seqlens are always checked.
    torch.func: grad, vjp, jacrev and vmap work (vmap calls the operator once per entry of the mapped axis). Forward mode
    and second derivatives raise; `afd_fast.reference.nft.nft_loss` has both.
    Raises: TypeError, ValueError: as `NFTRecipe`, `forward_noise`, and for r outside [0, 1] or of another shape.
    """
    for name in unknown:
        raise checks.no_such_input(name)
    inputs: NFTInputs = {
        "noise": noise, "seed": seed, "x_t": x_t, "v_old": v_old, "v_ref": v_ref, "sigma": sigma,
        "sample_mask": sample_mask, "ref_mask": ref_mask, "element_mask": element_mask, "policy_weight": policy_weight,
        "prior_weight": prior_weight, "cu_seqlens": cu_seqlens, "frame_dim": frame_dim, "check_nan": check_nan,
    }  # fmt: skip
    recipe = as_recipe(recipe)
    if not _is_fused(recipe):
        if out is not None:
            raise ValueError(
                "out= is for losses that the sweeps compute: drift_clip and weight_grad run in plain PyTorch"
            )
        return reference.nft_loss(v, x0, r, t, recipe=recipe, return_stats=return_stats, **inputs)
    loss, totals, rows = nft_sums(v, x0, r, t, inputs, recipe, return_stats, out)
    return (loss, _stats(totals, rows)) if return_stats else loss


def nft_sums(
    v: Tensor, x0: Tensor, r: Tensor, t: Tensor | float, inputs: NFTInputs, recipe: NFTRecipe, stats: bool = True,
    out: Tensor | None = None,
) -> operators.Sums:  # fmt: skip
    """The loss, and what `NFTStats` is made of: totals [4] in the order of `Total`, rows [15, B] in that of `Row`.

    Arguments as `nft_loss`. For recipes that the sweeps compute.
    """
    checks.check_nft(v, x0, r, inputs)
    checks.check_recipe(recipe, r, inputs)
    check_out(out, v, (x0, r, t, *inputs.values()))
    call = _call(v, x0, r, t, inputs, recipe, stats, out)
    compiling, transformed = torch.compiler.is_compiling(), under_func()
    if compiling and transformed:  # dynamo would trace past the autograd.Function, to a gradient of zero
        raise RuntimeError(
            "torch.compile cannot trace a transform of torch.func over afd_fast.nft_loss: compile the network alone, or "
            "use afd_fast.reference.nft.nft_loss"
        )
    out, ahead = call.out, v.device.type == "cpu" or (recipe.weighting == "none" and recipe.form == "mse")
    if compiling or transformed:  # a buffer would go unused
        return _NFTLoss.apply(out, 1.0, *call.inputs)
    scale = 1.0
    if out is None and ahead and torch.is_grad_enabled() and v.requires_grad:
        out = operators.empty_gradient(call.inputs.v)
        scale = _NFTLoss.expected if out.device.type == "cpu" else 1.0
    return _EagerNFTLoss.apply(call.inputs.v, out, scale, call.inputs)


def nft_terms(
    v: Tensor, x0: Tensor, r: Tensor, t: Tensor | float, *, recipe: RecipeName | NFTRecipe = "afd",
    return_stats: bool = False, **inputs: Unpack[NFTInputs],
) -> NFTTerms:  # fmt: skip
    """The two halves of `nft_loss`, each differentiable in v: nft_loss = policy + recipe.ref_coef * prior.

    For a trainer that weighs, logs or projects their gradients apart. Arguments and errors as `nft_loss`, without out=.
    Under torch.func it runs in plain PyTorch.
    """
    recipe = as_recipe(recipe)
    if not _is_fused(recipe) or under_func():
        return reference.nft_terms(v, x0, r, t, recipe=recipe, return_stats=return_stats, **inputs)
    checks.check_nft(v, x0, r, inputs)
    checks.check_recipe(recipe, r, inputs)
    call = _call(v, x0, r, t, inputs, replace(recipe, ref_coef=1.0), return_stats, None)
    policy, prior, totals, rows = _NFTTerms.apply(*call.inputs)
    return NFTTerms(policy, prior, _stats(totals, rows) if return_stats else None)

"""nft_loss as operators: one sweep for the sums, one for the gradient, or both at once where the recipe allows.

Legend: B samples, T packed rows, F frames, w the working dtype (float32, float64 for float64).
`rows` [11, B] holds what a call knows about each sample, in the order of ROWS; the last three are the gradient's
coefficients: dL/dv = s [(c+ - c-) a + (c+ + c-) d] + c_ref m (v - v_ref), see kernels/csrc/afd_core.h.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from afd_fast.ops import native
from afd_fast.ops._register import operator
from afd_fast.ops.layout import frame_table, memory_order, rows_contiguous, same_table
from afd_fast.ops.noise import wrap_seed
from afd_fast.reference import nft as reference
from afd_fast.reference.flow import check_t
from afd_fast.reference.nft import NFTRecipe, NFTStats, nft_recipe, recipe_from_key

ROWS = ("pos_loss", "neg_loss", "weight_pos", "weight_neg", "prior", "old_deviation", "v_norm", "v_ref_norm",
        "difference", "total", "reference")  # fmt: skip


class Inputs(NamedTuple):
    """Arguments that every operator of this file takes, in the schema's order."""

    v: Tensor  # [B, ...] or packed [T, ...]
    x0: Tensor
    r: Tensor  # [B]
    t: Tensor  # [B, F], w
    noise: Tensor | None  # exactly one of noise, seed, x_t
    seed: int | None
    x_t: Tensor | None
    v_old: Tensor | None
    v_ref: Tensor | None
    sigma: Tensor | None  # [B, F]; None is t
    sample_mask: Tensor | None
    ref_mask: Tensor | None
    element_mask: Tensor | None  # bool, like v
    cu_seqlens: Tensor | None
    inner: int  # element n of a sample belongs to frame (n // inner) % F
    recipe: str  # NFTRecipe.key
    stats: bool


_ARGS = (
    "Tensor v, Tensor x0, Tensor r, Tensor t, Tensor? noise, int? seed, Tensor? x_t, Tensor? v_old, Tensor? v_ref, "
    "Tensor? sigma, Tensor? sample_mask, Tensor? ref_mask, Tensor? element_mask, Tensor? cu_seqlens, SymInt inner, "
    "str recipe, bool stats"
)


def _work(i: Inputs) -> torch.dtype:
    return torch.promote_types(i.v.dtype, torch.float32)


def _plain(i: Inputs) -> dict:
    """The same call in the reference's arguments."""
    shape, t, sigma = i.v.shape, i.t, i.sigma
    if i.cu_seqlens is None:
        frames = t.shape[1]
        count = i.v[0].numel() if shape[0] else 0
        shape = (shape[0], count // (frames * i.inner) if count else 0, frames, i.inner)
        t, sigma = (None if x is None else x.view(-1, 1, frames, 1) for x in (t, sigma))
    else:
        t, sigma = (None if x is None else x[:, 0] for x in (t, sigma))
    like = lambda x: None if x is None else x.reshape(shape)
    return dict(
        v=like(i.v), x0=like(i.x0), r=i.r, t=t, noise=like(i.noise), seed=i.seed, x_t=like(i.x_t), v_old=like(i.v_old),
        v_ref=like(i.v_ref), sigma=sigma, sample_mask=i.sample_mask, ref_mask=i.ref_mask,
        element_mask=like(i.element_mask), cu_seqlens=i.cu_seqlens, recipe=recipe_from_key(i.recipe),
    )  # fmt: skip


def _sums(i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Reference: loss, (policy, prior, signal), rows."""
    with torch.no_grad():
        loss, s = reference.nft_loss(**_plain(i), return_stats=True)
        none = torch.zeros_like(s.pos_loss)
        rows = [getattr(s, name) for name in ROWS[:8]] + [none] * 3
        return loss.clone(), torch.stack([s.policy_loss, s.prior_loss, s.signal]), torch.stack(rows)


def _gradient(grad_output: Tensor | float, i: Inputs) -> Tensor:
    with torch.no_grad():
        return (reference.nft_grad(**_plain(i)) * grad_output).to(i.v.dtype).view(i.v.shape)


def _cpu_loss(*args):
    i = Inputs(*args)
    return native.nft_loss(i, None) if native.serves(i.v, *_floats(i)) else _sums(i)


def _cpu_loss_with_grad(*args):
    i, grad = Inputs(*args[:-1]), args[-1]
    if native.serves(i.v, *_floats(i)):
        return native.nft_loss(i, grad)
    grad.copy_(_gradient(1.0, i))
    return _sums(i)


def _cpu_backward(grad_output, rows, *args):
    i = Inputs(*args)
    if not native.serves(i.v, *_floats(i)):
        return _gradient(grad_output, i)
    grad = _empty_gradient(i.v)
    native.nft_gradient(grad_output, rows, i, grad)
    return grad


def _cpu_redo(grad_output, rows, *args):
    i, grad = Inputs(*args[:-1]), args[-1]
    if float(grad_output) == 1.0:
        return
    if native.serves(i.v, *_floats(i)):
        native.nft_gradient(grad_output, rows, i, grad)
    else:
        grad.copy_(_gradient(grad_output, i))


def _floats(i: Inputs) -> tuple:
    return i.x0, i.noise, i.x_t, i.v_old, i.v_ref


def _empty_gradient(v: Tensor) -> Tensor:
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


def _fake_loss(*args):
    i = Inputs(*args[: len(Inputs._fields)])
    new = lambda *shape: i.v.new_empty(shape, dtype=_work(i))
    return new(), new(3), new(len(ROWS), i.r.shape[0])


_loss = operator(f"nft_loss({_ARGS}) -> (Tensor, Tensor, Tensor)", cpu=_cpu_loss, cuda="nft:nft_loss", fake=_fake_loss)
_loss_with_grad = operator(
    f"nft_loss_with_grad({_ARGS}, Tensor(a!) grad) -> (Tensor, Tensor, Tensor)",
    cpu=_cpu_loss_with_grad, cuda="nft:nft_loss_with_grad", fake=_fake_loss,
)  # fmt: skip
_backward = operator(
    f"nft_loss_backward(Tensor grad_output, Tensor rows, {_ARGS}) -> Tensor",
    cpu=_cpu_backward, cuda="nft:nft_loss_backward", fake=lambda g, rows, *args: _empty_gradient(args[0]),
)  # fmt: skip
_redo = operator(  # grad holds the gradient for grad_output = 1; rewrites it where grad_output is another number
    f"nft_loss_redo(Tensor grad_output, Tensor rows, {_ARGS}, Tensor(a!) grad) -> ()",
    cpu=_cpu_redo, cuda="nft:nft_loss_redo", fake=lambda *args: None,
)  # fmt: skip


class _NFTLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, one_sweep, *args):
        i = Inputs(*args)
        if one_sweep:
            ctx.grad = _empty_gradient(i.v) if out is None else out
            loss, totals, rows = _loss_with_grad(*i, ctx.grad)
        else:
            ctx.grad = None
            loss, totals, rows = _loss(*i)
        ctx.save_for_backward(rows, *(x if isinstance(x, Tensor) else None for x in i))
        ctx.plain = [None if isinstance(x, Tensor) else x for x in i]
        ctx.mark_non_differentiable(totals, rows)
        return loss, totals, rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output, *_):
        rows, *tensors = ctx.saved_tensors
        args = [a if b is None else b for a, b in zip(ctx.plain, tensors)]
        grad, ctx.grad = ctx.grad, None  # handed over once; a second backward computes its own
        if grad is None:
            grad = _backward(grad_output, rows, *args)
        else:
            _redo(grad_output, rows, *args, grad)
        return None, None, grad, *[None] * (len(args) - 1)


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
    cu_seqlens: Tensor | None = None,
    frame_dim: int | None = None,
    recipe: str | NFTRecipe = "afd",
    return_stats: bool = False,
    out: Tensor | None = None,
    check_nan: bool = False,
) -> Tensor | tuple[Tensor, NFTStats]:
    """The NFT + prior loss of a flow-matching student on its own rollouts (AFD Eq. 4-5). Only v gets a gradient.

    Args:
        v: [B, ...] the student's velocity at x_t; packed [T, ...] with cu_seqlens.
        x0: like v; the rollouts.
        r: [B] optimality in [0, 1] (`reward_to_r`).
        t: noise level in [0, 1]; a number, [B], or [B, F] with frame_dim.
        noise / seed / x_t: where the noised state came from: eps itself, the seed of `forward_noise`, or x_t.
            x0-space recipes need one of the three, velocity-space recipes noise or seed (or x_t with t > 0).
        v_old: velocity of the data-collecting policy; None is stop-grad(v), the paper's reading.
        v_ref: velocity of the frozen initial student; None leaves the prior out.
        sigma: velocity -> x0 coefficient where it is not t (Astrolabe's scheduler table); shapes as t.
        sample_mask: [B] samples that count; ref_mask: [B] samples in the prior.
        element_mask: as many axes as v, broadcastable; elements that count. Means and weights run over them.
        cu_seqlens: int [B + 1], samples are rows cu[b] .. cu[b+1] of v; with noise= or x_t=.
        frame_dim: axis of x0 that t's second axis runs over (2 for [B, C, F, H, W]).
        recipe: a name of `RECIPES` or an `NFTRecipe`.
        return_stats: also return `NFTStats`, from the same sweep.
        out: like v; filled with the gradient (for grad_output 1 at once, after backward for the one that arrived)
            and handed to autograd by the first backward. Saves the allocation, which costs a CPU more than the work.
        check_nan: look for NaN in every input first and name the sample; synchronises a GPU.

    Returns: a scalar in float32 (float64 for float64 v), and the stats.
    Internals are float32 (float64), rounded once where the gradient is stored; grad_output enters before that.
    Recipes without adaptive weights write the gradient in the forward sweep, and again only where grad_output is
    not 1. Nothing synchronises a GPU; r, t and cu_seqlens are range-checked where they are on the CPU.
    Raises: TypeError, ValueError: as `NFTRecipe`, `forward_noise`, and for r outside [0, 1] or not [B].
    """
    recipe = nft_recipe(recipe) if isinstance(recipe, str) else recipe
    like = {"noise": noise, "x_t": x_t, "v_old": v_old, "v_ref": v_ref}
    reference.check_nft(v, x0, r, like, {"sample_mask": sample_mask, "ref_mask": ref_mask}, cu_seqlens, check_nan)
    noise, seed, x_t = reference.choose_source(noise, seed, x_t, recipe)
    _check_out(out, v)
    order = None if seed is not None or cu_seqlens is not None else memory_order(v)
    table, other, inner = _levels(t, sigma, v, frame_dim, order, cu_seqlens, seed, recipe)
    check_t(table)
    reference.check_target(table, x_t, recipe)
    mask = None if element_mask is None else reference.expand_mask(element_mask, v)
    tensors = (v, x0, noise, x_t, v_old, v_ref, mask, out)
    if order is not None:
        tensors = [None if x is None else x.permute(order) for x in tensors]
    v, x0, noise, x_t, v_old, v_ref, mask, out = tensors
    if out is not None and not rows_contiguous(out):
        raise ValueError("out must have v's memory layout: every sample contiguous")
    v_old, v_ref = (None if x is None else x.detach() for x in (v_old, v_ref))
    wanted = torch.is_grad_enabled() and v.requires_grad and not torch.compiler.is_compiling()
    one_sweep = out is not None or (wanted and recipe.weighting == "none")
    loss, totals, rows = _NFTLoss.apply(
        out, one_sweep, v, x0, r, table, noise, wrap_seed(seed), x_t, v_old, v_ref, other, sample_mask, ref_mask, mask,
        cu_seqlens, inner, recipe.key, return_stats,
    )  # fmt: skip
    if not return_stats:
        return loss
    policy, prior, signal = totals.unbind()
    named = dict(zip(ROWS[:8], rows[:8].unbind()))
    return loss, NFTStats(policy_loss=policy, prior_loss=prior, signal=signal, **named)


def _check_out(out: Tensor | None, v: Tensor) -> None:
    if out is None:
        return
    if torch.compiler.is_compiling():
        raise ValueError("out= is for eager calls: a compiled graph plans its own memory")
    if out.shape != v.shape or out.dtype != v.dtype or out.device != v.device:
        raise ValueError(
            f"out must be like v: {tuple(v.shape)} {v.dtype} on {v.device}, got {tuple(out.shape)} {out.dtype}"
        )
    if out.requires_grad or out.data_ptr() == v.data_ptr() != 0:
        raise ValueError("out must be a buffer of its own, without requires_grad")


def _levels(t, sigma, v, frame_dim, order, cu_seqlens, seed, recipe) -> tuple[Tensor, Tensor | None, int]:
    """(t [B, F], sigma [B, F] or None, inner); sigma is dropped where neither loss nor prior uses it."""
    if recipe.space == "v" and recipe.ref_space == "v":
        sigma = None
    if cu_seqlens is not None:
        reference.packed_rows(t, sigma, v, cu_seqlens, seed, frame_dim)  # its errors
        batch, wide = len(cu_seqlens) - 1, torch.promote_types(v.dtype, torch.float32)
        full = lambda x: x.to(v.device, wide).reshape(-1, 1).expand(batch, 1).contiguous() if isinstance(x, Tensor) else (
            v.new_full((batch, 1), float(x), dtype=wide))  # fmt: skip
        return full(t), None if sigma is None else full(sigma), 1
    table, inner = frame_table(t, v, frame_dim, order)
    if sigma is None:
        return table, None, inner
    other, other_inner = frame_table(sigma, v, frame_dim, order)
    return same_table(table, inner, other, other_inner, v[0].numel() if len(v) else 0)

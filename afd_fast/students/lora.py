"""LoRA through peft: adapters added, switched off (the frozen reference), and merged into the weights for a rollout and
taken out bit for bit; PEFT state dicts merged for good.

Legend: W [out, in] a linear's weight, A [rank, in], B [out, rank]; W' = W + scale B A.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd_fast.errors import extra

log = logging.getLogger("afd_fast")


def merge_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale B A, summed in at least float32 and rounded once to W's dtype."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + scale * (b.to(weight.device, wide) @ a.to(weight.device, wide))).to(weight.dtype)


def _active_layers(model: nn.Module) -> list[Any]:
    """PEFT's LoRA layers with an active, unmerged adapter."""
    return [
        m
        for m in lora_layers(model)
        if not m.disable_adapters and not m.merged and any(n in m.lora_A for n in m.active_adapters)
    ]


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Adapters off inside the block: the frozen initial model."""
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no adapters to disable: keep a frozen copy as the reference instead")
    for layer in layers:
        layer._disable_adapters = True  # PEFT's flag; its setter would also touch requires_grad
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextlib.contextmanager
def merged_lora(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context the model's PEFT LoRA layers run as plain linears with W' (rank 256 on every linear
    costs 24 % more FLOPs and about a thousand launches a forward otherwise); after it they hold the very same W.

    W is copied and written back, not subtracted from, so nothing is lost to rounding. The weights change in place: CUDA
    graphs that were recorded on them stay valid, and FSDP2 gathers from the same memory. Raises NotImplementedError for
    adapters that are not plain LoRA on a linear (DoRA, lora bias, convolutions).
    """
    layers = _active_layers(model)
    for layer in layers:
        base = layer.base_layer
        if not isinstance(base, nn.Linear) or any(
            layer.use_dora.get(n) or getattr(layer, "lora_bias", {}).get(n) for n in layer.active_adapters
        ):
            raise NotImplementedError("only plain LoRA on nn.Linear can be merged for a rollout: set merge_lora=False")
    kept: list[tuple[Any, Tensor]] = []
    try:
        with torch.no_grad():
            for layer in layers:
                weight = layer.base_layer.weight
                merged = weight.data
                for name in layer.active_adapters:
                    if name in layer.lora_A:
                        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                        merged = merge_weight(merged, a, b, layer.scaling[name])
                kept.append((layer, weight.detach().clone()))
                weight.copy_(merged)
                layer._disable_adapters = True  # PEFT's flag; its setter would also touch requires_grad
        yield model
    finally:
        for layer, original in kept:
            with torch.no_grad():
                layer.base_layer.weight.copy_(original)
            layer._disable_adapters = False


class Product(NamedTuple):
    """An adapter's addition to one linear layer: scale B A, with A [rank, in] and B [out, rank]."""

    a: Tensor
    b: Tensor
    scale: float


def fitted(state: Mapping[str, Tensor], adapter: Mapping[str, Product]) -> dict[str, Product]:
    """An adapter's products under the keys of the weights that they change. Raises ValueError for a layer that the state lacks
    and for sizes that do not fit."""
    flat = {
        f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}": key for key in state if key.endswith(".weight")
    }
    found = {}
    for name, product in adapter.items():
        key = flat.get(name, f"{name}.weight")
        if key not in state:
            raise ValueError(
                f"the adapter changes {name}, which the student does not have: it was made for another model"
            )
        wanted, made = tuple(state[key].shape), (product.b.shape[0], product.a.shape[1])
        if wanted != made:
            raise ValueError(
                f"the adapter is for a {name} of {made}, the student's is {wanted}: it was made for another model"
            )
        found[key] = product
    return found


def merge_products(state: dict[str, Tensor], adapters: Sequence[Mapping[str, Product]]) -> dict[str, Tensor]:
    """A state dict with adapters added, which are `fitted` to it; each weight is rounded once."""
    merged = dict(state)
    layers: dict[str, list[Product]] = {}
    for adapter in adapters:
        for key, product in adapter.items():
            layers.setdefault(key, []).append(product)
    for key, products in layers.items():
        weight = state[key]
        total = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for a, b, scale in products:
            total = merge_weight(total, a, b, scale)
        merged[key] = total.to(weight.dtype)
    scales = sorted({product.scale for products in layers.values() for product in products})
    log.info("merged LoRA into %d linears with scales %s", len(layers), ", ".join(f"{s:g}" for s in scales))
    return merged


def merge_lora_state(state: dict[str, Tensor], lora: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A state dict with a PEFT LoRA state dict merged in.

    lora: keys `<linear>.lora_A.weight` / `<linear>.lora_B.weight`, also with an adapter's name before `.weight`,
    named as in `state`. Raises ValueError for a half pair, an unknown linear or any other key.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, value in lora.items():
        name, found, tail = key.partition(".lora_")
        if not found or tail[:1] not in ("A", "B") or not tail.endswith("weight"):
            raise ValueError(f"not a LoRA weight: {key}")
        pairs.setdefault(name, {})[tail[0]] = value
    for name, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(f"{name} has lora_{next(iter(pair))} only")
    adapter = {name: Product(pair["A"], pair["B"], scale) for name, pair in pairs.items()}
    return merge_products(state, [fitted(state, adapter)])


class _LoraProducts(torch.autograd.Function):
    """x W_i^T + bias_i + scale (x A_i^T) B_i^T of x [L, in] for n layers: a product of x with all weights W [n out, in] and one
    with all A, to which every B adds in place; backward likewise, without sums of gradients of x. x, W and bias have one
    dtype, which the adapters are cast to. The results after the first n are kept for backward."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, *adapters: Tensor) -> tuple[Tensor, ...]:
        downs, ups = adapters[::2], [b.to(x.dtype) for b in adapters[1::2]]
        if len(downs) == 1:
            a = downs[0].to(x.dtype)
        else:
            a = torch.empty(sum(map(len, downs)), x.shape[1], dtype=x.dtype, device=x.device)
            for part, source in zip(a.split([len(p) for p in downs]), downs):
                part.copy_(source)
        hidden = F.linear(x, a)
        outs = F.linear(x, weight, bias).split([len(b) for b in ups], 1)
        for out, inner, b in zip(outs, hidden.split([len(p) for p in downs], 1), ups):
            torch.addmm(out, inner, b.t(), alpha=scale, out=out)
        return (*outs, hidden, a, *ups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, _, ctx.scale, *adapters = inputs
        kept = output[len(adapters) // 2 :]
        ctx.dtypes = [p.dtype for p in adapters]
        ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(x, weight, *kept)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, hidden, a, *ups = ctx.saved_tensors
        given, need = [*grads[: len(ups)]], ctx.needs_input_grad
        if all(g is None for g in given):
            return (None,) * len(need)
        outer = [
            g if g is not None else torch.zeros(len(x), len(b), dtype=x.dtype, device=x.device)
            for g, b in zip(given, ups)
        ]
        ranks = [b.shape[1] for b in ups]
        inner = torch.empty_like(hidden)  # the gradients of x A^T
        for g, b, part in zip(outer, ups, inner.split(ranks, 1)):
            torch.mm(g, b, out=part)
        inner = inner if ctx.scale == 1 else inner * ctx.scale
        dx = dw = dbias = None
        if need[0]:
            first, *others = zip(outer, weight.split([len(b) for b in ups]))
            dx = first[0] @ first[1]
            for g, w in (*others, (inner, a)):
                dx = torch.addmm(dx, g, w, out=dx)
        if need[1] or need[2]:
            whole = torch.cat(outer, 1)
            dw, dbias = whole.t() @ x if need[1] else None, whole.sum(0) if need[2] else None
        downs = (inner.t() @ x).to(ctx.dtypes[0]).split(ranks)
        of_ups = [g.t() @ h for g, h in zip(outer, hidden.split(ranks, 1))]
        of_ups = [(g if ctx.scale == 1 else g * ctx.scale).to(t) for g, t in zip(of_ups, ctx.dtypes[1::2])]
        return dx, dw, dbias, None, *(g for pair in zip(downs, of_ups) for g in pair)


def lora_products(x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence[Product]) -> tuple[Tensor, ...]:
    """x W_i^T + bias_i + scale (x A_i^T) B_i^T [..., out_i] of x [..., in] for every adapter. weight, bias: of all layers, one
    after the other. All adapters have one scale."""
    rows, flat = x.flatten(0, -2), [p for adapter in adapters for p in (adapter.a, adapter.b)]
    found = _LoraProducts.apply(rows, weight, bias, adapters[0].scale, *flat)
    return tuple(y.unflatten(0, x.shape[:-1]) for y in found[: len(adapters)])


@functools.cache
def _layer_class() -> Any:
    """PEFT's LoRA layer of a linear, with one adapter computed by `lora_products`; PEFT is imported when it is needed."""
    with extra("train"):
        from peft.tuners.lora import Linear

    class LoraLinear(Linear):
        @property
        def only_adapter(self) -> Product | None:
            """The adapter, where this layer is a linear with exactly one."""
            active = [name for name in self.active_adapters if name in self.lora_A]
            if self.disable_adapters or self.merged or len(active) != 1:
                return None
            a: Any = self.lora_A[active[0]]
            b: Any = self.lora_B[active[0]]
            return Product(a.weight, b.weight, self.scaling[active[0]])

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            adapter = self.only_adapter
            if adapter is None or args or kwargs:
                return super().forward(x, *args, **kwargs)
            base: Any = self.base_layer
            kind = x.device.type
            cast_to_half = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
            dtype = torch.get_autocast_dtype(kind) if cast_to_half else base.weight.dtype
            bias = None if base.bias is None else base.bias.to(dtype)
            return lora_products(x.to(dtype), base.weight.to(dtype), bias, [adapter])[0]

    return LoraLinear


def inject(model: nn.Module, targets: list[str] | str, rank: int, alpha: float) -> None:
    """Put adapters of `rank` (scale alpha / rank, dropout 0) on linear layers of `model`; everything else is frozen. targets:
    names, or one regular expression, as PEFT takes them. Adapters are float32, as an update of 1e-5 is below bfloat16's
    resolution, and compute in the layer's dtype: PEFT's casts would keep a float32 copy of every layer's input."""
    with extra("train"):
        from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=cast(int, alpha), target_modules=targets), model)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
    for layer in lora_layers(model):
        layer.__class__ = _layer_class()


def add_lora(model: nn.Module, rank: int, targets: list[str]) -> None:
    """`inject` with alpha = rank: the adapters' product is added as it is."""
    inject(model, targets, rank, rank)


def lora_layers(model: nn.Module) -> list[Any]:
    """PEFT's LoRA layers, in order; their type needs PEFT, which a rollout does not import."""
    return [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer") and hasattr(m, "scaling")]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters the optimiser sees, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}

"""Linear layers over one input as one matrix product, their weights next to each other in memory.

Every layer keeps its own parameters under their own names, as views of the shared memory: state dicts, merged adapters
and optimisers see what they always saw.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd_fast.reference.transforms import under_func
from afd_fast.students.lora import Product, lora_products


def _whole(parts: Sequence[Tensor]) -> Tensor | None:
    """Tensors [n_i, ...] that follow each other in one memory as one tensor [sum n_i, ...]; None if they do not."""
    first = parts[0]
    memory, end = first.untyped_storage()._cdata, first.storage_offset()
    for part in parts:
        if part.storage_offset() != end or part.untyped_storage()._cdata != memory or not part.is_contiguous():
            return None
        end += part.numel()
    return first.detach().as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


def _base(layer: Any) -> Any:
    """The linear under an adapter, or the layer itself."""
    return getattr(layer, "base_layer", layer)


def join(layers: Sequence[nn.Module]) -> None:
    """Move the weights of linears with one input, and their biases, next to each other; nothing where they are or where their
    memory is not theirs to move (DTensors). Not for FSDP's modules: it owns what it gathers."""
    bases = [_base(layer) for layer in layers]
    if any(type(base) is not nn.Linear for base in bases):
        return
    for name in ("weight", "bias"):
        parts: list[Any] = [getattr(base, name) for base in bases]
        first = parts[0]
        if any(
            not isinstance(p, nn.Parameter)
            or hasattr(p, "device_mesh")
            or (p.dtype, p.device, p.shape[1:]) != (first.dtype, first.device, first.shape[1:])
            for p in parts
        ):
            return
        if _whole(parts) is None:
            with torch.no_grad():
                whole = torch.cat([p.data for p in parts])
            for p, part in zip(parts, whole.split([len(p) for p in parts])):
                p.data = part


def linears(x: Tensor, layers: Sequence[nn.Module]) -> Sequence[Tensor]:
    """[layer(x) for layer in layers]: one product where the weights are joined and not trained, with the adapters' products
    where every layer has one."""
    found = _joined(x, layers)
    return [layer(x) for layer in layers] if found is None else found


def _joined(x: Tensor, layers: Sequence[Any]) -> Sequence[Tensor] | None:
    kind = x.device.type
    if torch.compiler.is_compiling() or under_func():
        return None
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return None
    bases, trained = [_base(layer) for layer in layers], torch.is_grad_enabled()
    adapters: list[Product] = []
    for layer, base in zip(layers, bases):
        if type(base) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
            return None
        if base.weight.dtype != x.dtype or base.bias is None or (trained and base.weight.requires_grad):
            return None
        if layer is not base and not layer.disable_adapters:
            adapter = getattr(layer, "only_adapter", None)
            if adapter is None:
                return None
            adapters.append(adapter)
    weight, bias = _whole([base.weight for base in bases]), _whole([base.bias for base in bases])
    if weight is None or bias is None:
        return None
    if not adapters:
        return F.linear(x, weight, bias).split([base.out_features for base in bases], -1)
    if len(adapters) < len(layers) or len({adapter.scale for adapter in adapters}) > 1:
        return None
    return lora_products(x, weight, bias, adapters)

"""LoRA through peft: adapters on, the trained parameters, and the frozen reference (adapters off).

Merged weights for rollouts are `afd_fast.models.lora.merged_lora`."""

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from afd_fast.models.lora import disabled

__all__ = ["add_lora", "disabled", "lora_layers", "trainable"]


class _InputDtypeLinear(nn.Linear):
    """A linear without bias that computes in its input's dtype, whatever its weight's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def add_lora(model: nn.Module, rank: int, targets: list[str]) -> None:
    """Put adapters of `rank` (alpha = rank, dropout 0) on the named linear layers; everything else is frozen. Adapters are
    float32 and compute in the layer's dtype: PEFT's own casts keep a float32 copy of every layer's input for backward."""
    model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), model)
    for p in model.parameters():
        if p.requires_grad:  # an update of 1e-5 is below bfloat16's resolution
            p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
    for layer in lora_layers(model):
        layer.cast_input_dtype_enabled = False
        for adapter in (*layer.lora_A.values(), *layer.lora_B.values()):
            adapter.__class__ = _InputDtypeLinear


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    """Every adapted layer, in order."""
    return [m for m in model.modules() if isinstance(m, LoraLayer)]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters the optimiser sees, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}

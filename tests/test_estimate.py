"""The formulas against PyTorch's counter on the real code, and sizes against the real objects."""

import pytest
import torch
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from afd_fast import flops, recipes
from afd_fast.config import with_overrides
from afd_fast.models.toy import ToyConfig, ToyStudent
from afd_fast.training.state import generator, new_state, toy_system
from afd_fast.training.step import sample_policy, student_loss
from afd_fast.training.wan import wan_system

PROMPTS = ["a red ball", "a blue ball"]
aten = torch.ops.aten
CPU_FLASH = {  # which the counter does not know
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, **kw: flop_counter.sdpa_flop_count(
        q, k, v
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, *args, **kw: flop_counter.sdpa_backward_flop_count(g, q, k, v)
    ),
}


def counted(call) -> int:
    with FlopCounterMode(display=False, custom_mapping=CPU_FLASH) as counter:
        call()
    return counter.get_total_flops()


def wan_case(overrides):
    small = ["student=tiny", "discriminator=toy", "disc_width=8", "frames=9", "height=6", "width=10", "lora_rank=4"]
    config = with_overrides(recipes.afd_table3(), [*small, *overrides])
    system = wan_system(config)
    return config, system, flops.wan(system.student.config, 9, 6, 10, 3, 4)


def toy_case(overrides):
    config = with_overrides(recipes.demo(), ["lora_rank=4", *overrides])
    system = toy_system(ToyStudent(ToyConfig(dim=32, heads=2, layers=3, hidden=40)))
    return config, system, flops.toy(system.student.config)


@pytest.mark.parametrize("make", [wan_case, toy_case])
@pytest.mark.parametrize("overrides", [["v_old=ema"], ["v_old=self", "steps=1000,500"]])
def test_rollout(make, overrides):
    config, system, formula = make(overrides)
    state = new_state(config, system)
    call = lambda: sample_policy(state, config, PROMPTS, generator(0, 0, "test"), average=config.v_old == "ema")
    assert formula.rollout(2, len(config.steps), 4).flops == counted(call)


@pytest.mark.parametrize("make", [wan_case, toy_case])
@pytest.mark.parametrize(
    "overrides",
    [
        ["v_old=self", "recipe=afd", "chunked_update=true"],
        ["v_old=ema", "recipe=diffusionnft", "chunked_update=true"],
        ["v_old=ema", "recipe=diffusionnft", "chunked_update=false"],
        ["v_old=self", "recipe=afd", "chunked_update=true", "prior_weight=0"],
    ],
)
def test_update(make, overrides):
    config, system, formula = make(overrides)
    state = new_state(config, system)
    x0, r = torch.randn(2, *system.shape), torch.tensor([0.1, 0.9])

    def call():
        backward = 1.0 if config.chunked_update else None
        loss, _ = student_loss(state, config, x0, r, PROMPTS, generator(0, 0, "test"), backward=backward)
        if backward is None:
            loss.backward()

    assert formula.update(2, config).flops == counted(call)

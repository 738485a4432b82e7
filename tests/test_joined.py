"""Linears over one input as one product (`afd_fast.students.joined`), and one prompt for a batch: against layer by layer."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from afd_fast.students import CausalWan, CausalWanConfig
from afd_fast.students.joined import _whole, join, linears
from afd_fast.students.lora import add_lora, disabled, lora_layers, merged_lora, trainable
from afd_fast.students.wan.family import LORA_TARGETS

WIDTHS = (6, 4, 6)


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(5, n, dtype=torch.float64) for n in WIDTHS)

    @property
    def layers(self):
        return self.q, self.k, self.v


def is_joined(layers) -> bool:
    bases = [getattr(layer, "base_layer", layer) for layer in layers]
    return _whole([base.weight for base in bases]) is not None


def three(rank: int = 0) -> Three:
    torch.manual_seed(0)
    net = Three()
    if rank:
        add_lora(net, rank, ["q", "k", "v"])
        for p in trainable(net).values():
            nn.init.normal_(p)
    return net.requires_grad_(False) if not rank else net


def counted(monkeypatch) -> list[int]:
    """How many weights' products there were, by their number of rows."""
    rows, plain = [], torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w, b=None: rows.append(len(w)) or plain(x, w, b))
    return rows


@pytest.mark.parametrize("state", ["plain", "active", "disabled", "merged"])
def test_equals_layer_by_layer(state, monkeypatch):
    """Results and every gradient, in float64, with one product of the joined weights."""
    net = three(rank=0 if state == "plain" else 3)
    around = {"disabled": disabled, "merged": merged_lora}.get(state, lambda m: torch.enable_grad())
    grads = []
    for joined in (False, True):
        if joined:
            names = list(net.state_dict())
            join(net.layers)
            assert is_joined(net.layers) and list(net.state_dict()) == names
        x = torch.randn(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with monkeypatch.context() as patch, around(net):
            rows = counted(patch)
            outs = linears(x, net.layers)
            assert rows.count(sum(WIDTHS)) == joined
            loss = sum((i + 1) * out.sin().sum() for i, out in enumerate(outs))
            parameters = list(trainable(net).values()) if state == "active" else []
            grads.append([*outs, *torch.autograd.grad(loss, [x, *parameters])])
    for expected, found in zip(*grads):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_a_result_that_nobody_reads():
    """The gradient where one layer's is not wanted, and a scale that is not 1."""
    net = three(rank=3)
    join(net.layers)
    for layer in net.layers:
        layer.scaling["default"] = 0.5
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    parameters = [x, *trainable(net.q).values(), *trainable(net.v).values()]
    q, _, v = linears(x, net.layers)
    found = torch.autograd.grad(q.sin().sum() + v.cos().sum(), parameters)
    expected = torch.autograd.grad(net.q(x).sin().sum() + net.v(x).cos().sum(), parameters)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_what_falls_back_to_layers(monkeypatch):
    """Trained weights, hooks, other adapters and weights that were moved."""
    x = torch.randn(7, 5, dtype=torch.float64)
    rows = counted(monkeypatch)
    for spoil in (
        lambda net: net.q.requires_grad_(True),
        lambda net: net.k.register_forward_hook(lambda *_: None),
        lambda net: setattr(net.v, "weight", nn.Parameter(net.v.weight.clone(), requires_grad=False)),
        lambda net: add_lora(net, 2, ["q", "v"]),
    ):
        net = three()
        join(net.layers)
        spoil(net)
        linears(x, net.layers)
    assert sum(WIDTHS) not in rows
    net = three().requires_grad_(True)
    join(net.layers)
    with torch.no_grad():  # nothing is trained by a rollout
        linears(x, net.layers)
    assert rows[-1] == sum(WIDTHS)


def student() -> CausalWan:
    torch.manual_seed(0)
    return CausalWan(CausalWanConfig.tiny()).eval().requires_grad_(False)


def forward(model: CausalWan, prompts: int = 1, batch: int = 2) -> torch.Tensor:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 16, 3, 4, 6, generator=g)
    text = torch.randn(2, 5, model.config.text_dim, generator=g)[:prompts]
    with torch.no_grad():
        cache = model.new_cache(batch, 3, 4, 6)
        return model(x, torch.full((batch, 3), 500.0), model.encode_text(text), cache=cache)


def test_a_student_is_joined_again_after_every_move(tmp_path):
    """Its numbers and its state dict's names never change."""
    model = student()
    names, layers = list(model.state_dict()), lambda m: [(a.q, a.k, a.v) for a in (b.self_attn for b in m.blocks)]
    expected = forward(model)
    save_file(model.state_dict(), tmp_path / "student.safetensors")
    moved = copy.deepcopy(model)
    loaded = student()
    loaded.load_state_dict(load_file(tmp_path / "student.safetensors"), assign=True)
    for other in (model, moved, loaded, copy.deepcopy(model).double().float()):
        assert torch.equal(forward(other), expected)
        assert all(is_joined(one) for one in layers(other)) and list(other.state_dict()) == names
    add_lora(model, 4, list(LORA_TARGETS))
    for layer in lora_layers(model):
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    with merged_lora(model):
        merged = forward(model)
    assert all(is_joined(one) for one in layers(model)) and not torch.equal(merged, expected)
    with disabled(model):
        assert torch.equal(forward(model), expected)
    torch.testing.assert_close(forward(model), merged, rtol=1e-4, atol=1e-4)


def test_fsdp_keeps_its_memory():
    model = student()
    model.blocks[1]._get_fsdp_state = lambda: None
    before = [p.data_ptr() for p in model.parameters()]
    forward(model)
    assert [p.data_ptr() for p in model.parameters()] == before


def test_one_prompt_for_a_batch():
    """As the prompt once for every sample, without a copy of its keys."""
    model = student()
    text = torch.randn(1, 5, model.config.text_dim, generator=torch.Generator().manual_seed(3))
    x = torch.randn(3, 16, 3, 4, 6, generator=torch.Generator().manual_seed(4))
    t = torch.full((3, 3), 500.0)
    one, each = model.encode_text(text), model.encode_text(text.expand(3, -1, -1))
    torch.testing.assert_close(model(x, t, one), model(x, t, each), rtol=1e-5, atol=1e-5)

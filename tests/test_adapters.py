"""LoRA files against what PEFT itself merges, layer by layer, in every layout and with every setting of ranks and scales."""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from afd_fast.errors import ConfigError
from afd_fast.students import CausalWan, CausalWanConfig, load_student
from afd_fast.students.wan.checkpoints import to_diffusers

CONFIG = CausalWanConfig(dim=128, ffn_dim=96, num_heads=1, num_layers=2, text_len=512, text_dim=24, freq_dim=32)
LINEARS = ("q", "k", "o", "ffn.0", "ffn.2")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return CausalWan(CONFIG).eval()


@pytest.fixture
def base(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "base.pt")
    return tmp_path / "base.pt"


def adapted(model, folder, seed=1, **settings):
    """A folder that PEFT saved, and the state that PEFT merges from it."""
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": list(LINEARS)} | settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuned = get_peft_model(copy.deepcopy(model), config)
        for name, p in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, 0, 0.2)
    tuned.save_pretrained(folder)
    merged = PeftModel.from_pretrained(copy.deepcopy(model), folder).merge_and_unload()
    return merged.state_dict()


def agree(student, expected, base):
    """float32 sums in another order; and something was merged."""
    loaded = student.state_dict()
    assert set(loaded) == set(expected)
    for key, value in expected.items():
        assert torch.allclose(loaded[key], value, atol=2e-6), key
    assert any(not torch.equal(loaded[key], value) for key, value in base.state_dict().items())


PATTERNS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"ffn.0": 2, "blocks.1.self_attn.q": 7, "self_attn.q": 3}},
    "alpha_pattern": {"alpha_pattern": {"blocks.0.*o": 12, "k": 1}},
    "both, rslora": {"rank_pattern": {"ffn.[02]": 9}, "alpha_pattern": {"ffn.2": 5}, "use_rslora": True},
}


@pytest.mark.parametrize("name", PATTERNS)
def test_ranks_and_scales(model, base, tmp_path, name):
    expected = adapted(model, tmp_path / "adapter", **PATTERNS[name])
    agree(load_student(base, lora=tmp_path / "adapter"), expected, model)
    file = tmp_path / "adapter" / "adapter_model.safetensors"  # finds the settings beside it
    agree(load_student(base, lora=file, lora_scale=9.0), expected, model)


def test_a_prefix_in_the_names(model, base, tmp_path):
    """Patterns match the end of a name, which FSDP and wrappers make longer."""
    expected = adapted(model, tmp_path / "adapter", rank_pattern={"blocks.1.self_attn.q": 7})
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    longer = {
        k.replace("base_model.model.", "base_model.model.model._fsdp_wrapped_module."): v
        for k, v in load_file(file).items()
    }
    save_file(longer, file)
    agree(load_student(base, lora=file), expected, model)


def test_diffusers_patterns(tmp_path):
    """A file of diffusers' save_lora_adapter with ranks of its layers: what diffusers computes."""
    from diffusers import WanTransformer3DModel
    from peft import LoraConfig

    torch.manual_seed(1)
    theirs = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=16, out_channels=16, text_dim=24, freq_dim=32,
        ffn_dim=96, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path / "base")
    settings = dict(rank_pattern={"attn1.to_q": 6}, alpha_pattern={"ffn.net.2": 3})
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_out.0", "ffn.net.2"], **settings))
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, 0, 0.2)
    theirs.save_lora_adapter(tmp_path)
    theirs.fuse_lora()
    fused = {k.replace(".base_layer", ""): v for k, v in theirs.state_dict().items() if "lora_" not in k}
    loaded = to_diffusers(
        load_student(tmp_path / "base", lora=tmp_path / "pytorch_lora_weights.safetensors").state_dict()
    )
    assert set(loaded) == set(fused) and all(torch.allclose(loaded[k], fused[k], atol=2e-6) for k in fused)


def pair(model, name, rank, seed):
    g = torch.Generator().manual_seed(seed)
    out, inner = model.state_dict()[f"{name}.weight"].shape
    return torch.randn(rank, inner, generator=g), torch.randn(out, rank, generator=g)


@pytest.mark.parametrize("layout", ["diffusion_model.", "lora_unet_"])
def test_alphas_layer_by_layer(model, base, tmp_path, layout):
    """ComfyUI's trainers: each layer its own alpha and rank; one without alpha counts as alpha = rank."""
    layers = {"blocks.0.self_attn.q": (4, 2.0), "blocks.1.ffn.0": (3, 7.0), "blocks.1.cross_attn.o": (5, None)}
    flat, expected = {}, dict(model.state_dict())
    for seed, (name, (rank, alpha)) in enumerate(layers.items()):
        a, b = pair(model, name, rank, seed)
        key = layout + (name.replace(".", "_") if layout == "lora_unet_" else name)
        flat |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
        if alpha is not None:
            flat[f"{key}.alpha"] = torch.tensor(alpha)
        expected[f"{name}.weight"] = expected[f"{name}.weight"] + (alpha or rank) / rank * b @ a
    save_file(flat, tmp_path / "lora.safetensors")
    loaded = load_student(base, lora=tmp_path / "lora.safetensors").state_dict()
    assert all(torch.allclose(loaded[k], expected[k], atol=1e-5) for k in expected)


def test_several_with_weights(model, base, tmp_path):
    """The sum of each adapter's addition; a bfloat16 weight is rounded once."""
    merges = [adapted(model, tmp_path / f"adapter{seed}", seed, r=seed + 2) for seed in (1, 2)]
    first, second = (tmp_path / f"adapter{seed}" for seed in (1, 2))
    state = model.state_dict()
    expected = {k: v + 0.5 * (merges[0][k] - v) - 2 * (merges[1][k] - v) for k, v in state.items()}
    loaded = load_student(base, lora=[(first, 0.5), (str(second), -2)]).state_dict()
    assert all(torch.allclose(loaded[k], expected[k], atol=1e-5) for k in expected)
    half = {k: v.bfloat16() for k, v in state.items()}
    torch.save(half, base)
    both = load_student(base, lora=[first, second]).state_dict()
    assert all(p.dtype == torch.bfloat16 for p in both.values())
    for key, value in both.items():
        exact = half[key].float() + sum(merged[key] - state[key] for merged in merges)
        half_ulp = 2.0 ** (exact.abs().clamp(min=2**-20).log2().floor() - 8)
        assert ((value.float() - exact).abs() <= half_ulp * 1.01).all()  # one rounding
    for weight in (float("nan"), "2", True):
        with pytest.raises(ConfigError, match="weight of the LoRA .* must be a finite number"):
            load_student(base, lora=[(first, weight)])


def test_refused(model, base, tmp_path):
    """What is more than W + scale B A, by name, before the student is read."""
    adapted(model, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    saved = json.loads(config.read_text())
    for change, match in (
        ({"use_dora": True}, r"use_dora=True \(a DoRA\), which is more than"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"modules_to_save": ["head"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"peft_type": "LOHA"}, "is a LOHA, not a LORA"),
        ({"r": 5}, "has rank 4, its settings say 5"),
        ({"rank_pattern": {"q": 3}}, "attn.q has rank 4, its settings say 3"),
        ({"lora_alpha": None}, "no usable r and lora_alpha"),
        ({"alpha_pattern": {"(": 3}}, "no usable r and lora_alpha"),
        ({"rank_pattern": 3}, "no usable r and lora_alpha"),
    ):
        config.write_text(json.dumps(saved | change))
        with pytest.raises(ConfigError, match="adapter_model.safetensors: .*" + match):
            load_student(tmp_path / "not read.pt", lora=tmp_path / "adapter")
    config.write_text(json.dumps(saved))
    a, b = pair(model, "blocks.0.self_attn.q", 4, 0)
    for key, kind in (
        ("blocks.0.self_attn.q.lora_magnitude_vector", "a DoRA"), ("lora_unet_blocks_0_self_attn_q.dora_scale", "a DoRA"),
        ("blocks.0.self_attn.q.diff_b", "differences of biases"), ("blocks.0.self_attn.q.diff", "differences of whole weights"),
        ("blocks.0.self_attn.q.lora_B.bias", "trained biases"), ("blocks.0.self_attn.q.hada_w1_a", "a LoHa"),
        ("blocks.0.self_attn.q.lokr_w1", "a LoKr"),
    ):  # fmt: skip
        torch.save(
            {"blocks.0.self_attn.q.lora_A.weight": a, "blocks.0.self_attn.q.lora_B.weight": b, key: b},
            tmp_path / "l.pt",
        )
        with pytest.raises(ConfigError, match=f"l.pt: the adapter is .*{kind}, which is more than .*{re.escape(key)}"):
            load_student(base, lora=tmp_path / "l.pt")
    with pytest.raises(FileNotFoundError, match="adapter_config.json is missing"):
        load_student(base, lora=tmp_path)

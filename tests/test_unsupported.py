"""Checkpoints that are no text-to-video Wan are named as what they are, before weights are read."""

import json
from functools import partial

import pytest
import torch

from afd_fast.errors import ConfigError
from afd_fast.students import CausalWan, CausalWanConfig, load_student, save_student
from afd_fast.students.wan.family import coder_of, load_networks
from afd_fast.students.wan.vae import WanDecoder

CONFIG = CausalWanConfig(dim=128, ffn_dim=96, num_heads=1, num_layers=1, text_dim=24, freq_dim=32)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return CausalWan(CONFIG).eval()


@pytest.fixture(autouse=True)
def weights_unread(monkeypatch, request):
    """Folders are judged by their JSON files."""
    if "folder" in request.node.name:
        monkeypatch.setattr("afd_fast.students.wan.checkpoints.read_tensors", lambda path: pytest.fail(f"read {path}"))


def write(path, contents):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents))


@pytest.mark.parametrize("settings,match", [
    ({"_class_name": "LTXVideoTransformer3DModel"}, "its class is LTXVideoTransformer3DModel, which is not supported"),
    ({"_class_name": "WanVACETransformer3DModel"}, "WanVACETransformer3DModel"),
    ({"_class_name": "WanModel", "model_type": "vace", "dim": 128}, "made for VACE"),
    ({"_class_name": "WanModel", "model_type": "i2v", "in_dim": 36, "out_dim": 16}, "made for image-to-video .model_type='i2v'"),
    ({"_class_name": "WanTransformer3DModel", "in_channels": 36, "out_channels": 16}, "takes 36 channels and makes 16: an image-to-video"),
    ({"_class_name": "WanTransformer3DModel", "in_channels": 48, "out_channels": 16}, "Fun-Control"),
    ({"_class_name": "WanTransformer3DModel", "in_channels": 16, "out_channels": 16, "image_dim": 1280}, "image branch is not supported"),
])  # fmt: skip
def test_folder_of_a_transformer(settings, match, tmp_path):
    for inside in ("config.json", "transformer/config.json"):
        write(tmp_path / inside.replace("/", "-") / inside, settings)
        (tmp_path / inside.replace("/", "-") / inside).with_name("model.safetensors").touch()
        with pytest.raises(ConfigError, match=match):
            load_student(tmp_path / inside.replace("/", "-"))


@pytest.mark.parametrize("pipeline", ["CogVideoXPipeline", "HunyuanVideoPipeline", "LTXPipeline", "WanImageToVideoPipeline", "WanVACEPipeline"])  # fmt: skip
def test_folder_of_a_pipeline(pipeline, tmp_path):
    write(tmp_path / "model_index.json", {"_class_name": pipeline, "transformer": ["diffusers", "x"]})
    with pytest.raises(ConfigError, match=f"holds a {pipeline}, which is not supported; expected a text-to-video Wan"):
        load_student(tmp_path)


@pytest.mark.parametrize("names,settings,match", [
    (("transformer", "transformer_2"), {"in_channels": 36, "out_channels": 16}, "takes 36 channels and makes 16: an image-to-video"),
    (("high_noise_model", "low_noise_model"), {"_class_name": "WanModel", "model_type": "i2v"}, "made for image-to-video"),
])  # fmt: skip
def test_folder_with_two_experts_of_image_to_video(names, settings, match, tmp_path):
    """Wan2.2-I2V-A14B; the T2V one's folders are in test_experts.py."""
    for name in names:
        write(tmp_path / name / "config.json", settings)
    write(tmp_path / "model_index.json", {"boundary_ratio": 0.9})
    with pytest.raises(ConfigError, match=f"{names[0]}: this Wan .*{match}"):
        load_student(tmp_path)
    write(tmp_path / "model_index.json", {"_class_name": "WanImageToVideoPipeline", "boundary_ratio": 0.9})
    with pytest.raises(ConfigError, match="holds a WanImageToVideoPipeline, which is not supported"):
        load_student(tmp_path)


def test_one_expert_and_wan_pipelines_load(model, tmp_path):
    save_student(model, tmp_path / "p" / "transformer")
    write(tmp_path / "p/model_index.json", {"_class_name": "WanPipeline", "transformer_2": [None, None]})
    assert load_student(tmp_path / "p").config == CONFIG
    (tmp_path / "p/transformer_2").mkdir()
    assert load_student(tmp_path / "p/transformer").config == CONFIG


@pytest.mark.parametrize("name,meaning", [
    ("img_emb.proj.0.weight", "image-to-video Wan 2.1"), ("vace_blocks.0.norm3.bias", "a VACE Wan"),
    ("double_blocks.0.img_mod.linear.weight", "a HunyuanVideo"), ("transformer_blocks.0.attn1.to_q.weight", "an LTX-Video, CogVideoX"),
    ("condition_embedder.image_embedder.norm1.bias", "image-to-video Wan 2.1"), ("ref_conv.weight", "a Fun-Control Wan"),
])  # fmt: skip
def test_files(model, tmp_path, name, meaning):
    for prefix in ("", "model.", "model.diffusion_model."):
        state = {prefix + key: value for key, value in model.state_dict().items()} | {prefix + name: torch.zeros(1)}
        torch.save(state, tmp_path / "m.pt")
        with pytest.raises(ConfigError, match=f"m.pt: this is {meaning}|m.pt: this is an {meaning}"):
            load_student(tmp_path / "m.pt")


def test_files_with_more_channels(model, tmp_path):
    state = dict(model.state_dict())
    state["patch_embedding.weight"] = torch.zeros(128, 36, 1, 2, 2)
    torch.save(state, tmp_path / "i2v.pt")
    with pytest.raises(ConfigError, match="takes 36 channels and makes 16: an image-to-video"):
        load_student(tmp_path / "i2v.pt")


@pytest.mark.parametrize("tables", ["freqs", "model.freqs", "rope.freqs_cos"])
def test_a_module_entry_and_tables_of_rope(model, tmp_path, tables):
    state = {**model.state_dict(), tables: torch.zeros(4, 2, dtype=torch.complex128)}
    torch.save({"module": state, "optimizer": {"lr": 1}}, tmp_path / "m.pt")
    loaded = load_student(tmp_path / "m.pt").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())


def test_the_vae_of_another_model(model, tmp_path):
    write(tmp_path / "base/vae/config.json", {"_class_name": "AutoencoderKLHunyuanVideo"})
    with pytest.raises(ConfigError, match="VAE of another model .AutoencoderKLHunyuanVideo"):
        WanDecoder.from_pretrained(tmp_path / "base", device="cpu")
    with pytest.raises(ConfigError, match="VAE of another model .AutoencoderKLHunyuanVideo"):
        coder_of("student.pt", tmp_path / "base")
    write(tmp_path / "base/vae/config.json", {"_class_name": "AutoencoderKLWan", "z_dim": 48, "patch_size": 2})
    torch.save(model.state_dict(), tmp_path / "m.pt")
    with pytest.raises(ConfigError, match="latents of 16 channels, the decoder of .* has 48"):
        load_networks(str(tmp_path / "m.pt"), str(tmp_path / "base"), device="cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="has no vae/config.json"):
        coder_of("student.pt", str(tmp_path / "empty"))


def test_missing_paths(tmp_path, monkeypatch):
    """Relative and absolute: named as missing, never looked for on the network."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for name in ("gone.pt", "here/gone", "./gone", "../gone/student", "here/gone/student.pt", str(tmp_path / "gone")):
        for load in (load_student, partial(coder_of, "student.pt")):
            with pytest.raises(FileNotFoundError, match="gone"):
                load(name)

"""The published checkpoint format: strict on the way in, bit for bit on the way out."""

import json
import shutil

import pytest
import torch

from afd_fast.discriminators.videoalign import model as video_reward
from afd_fast.discriminators.videoalign.checkpoints import load_video_reward, save_video_reward
from afd_fast.discriminators.videoalign.model import qwen2_vl_2b
from tests import tiny_videoalign as tiny

PROMPTS = ["a red ball", "two dogs in the snow"]


def load(folder=tiny.GOLDEN, dtype=torch.float32, **options):
    return load_video_reward(folder, dtype=dtype, template=tiny.TEMPLATE, tokenizer=tiny.tokenizer(), **options)


def edited(tmp_path, change):
    """The golden folder with its tensors changed."""
    folder = tmp_path / "edited"
    shutil.copytree(tiny.GOLDEN, folder)
    file = folder / "checkpoint-1/model.pth"
    state = torch.load(file, weights_only=True)
    torch.save(change(state) or state, file)
    return folder


def without(key):
    return lambda state: {k: v for k, v in state.items() if k != key}


def test_loading_is_strict(tmp_path):
    """Trap 4: a loader that drops the language model, or a tensor, is an error with names."""
    for change, message in (
        (without("base_model.model.model.norm.weight"), r"1 \(language_model.norm.weight\) tensors missing"),
        (lambda s: s.update(extra=torch.ones(1)), r"1 \(extra\) unexpected"),
        (without("base_model.model.model.layers.1.mlp.up_proj.lora_B.default.weight"), "lora_B.weight"),
        (lambda s: {k.replace("base_model.model.model.", "base_model.model."): v for k, v in s.items()}, "another backbone"),
        (lambda s: {k: v for k, v in s.items() if "visual" not in k}, "another backbone"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load(edited(tmp_path, change))
        shutil.rmtree(tmp_path / "edited")


def test_checkpoint_of_another_backbone(tmp_path):
    folder = shutil.copytree(tiny.GOLDEN, tmp_path / "a")
    (folder / "config.json").unlink()  # then it should be Qwen2-VL-2B
    with pytest.raises(ValueError, match=r"another backbone: \d+ \(.*\) tensors missing.*of another shape"):
        load(folder)
    for key, value in (("reward_token", "last"), ("output_dim", 2)):
        saved = json.loads((tiny.GOLDEN / "model_config.json").read_text())
        saved["model_config"][key] = value
        (folder / "model_config.json").write_text(json.dumps(saved))
        with pytest.raises(ValueError, match=key):
            load(folder)
    (folder / "model_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="model_config.json"):
        load(folder)


def test_export_is_the_published_format_bit_for_bit(tmp_path):
    save_video_reward(load(), tmp_path / "out", step=7)
    before = torch.load(tiny.GOLDEN / "checkpoint-1/model.pth", weights_only=True)
    after = torch.load(tmp_path / "out/checkpoint-7/model.pth", weights_only=True)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    wanted, written = (json.loads((f / "model_config.json").read_text()) for f in (tiny.GOLDEN, tmp_path / "out"))
    assert {k: wanted[k] for k in ("data_config", "peft_lora_config", "inference_config")} == {
        k: written[k] for k in ("data_config", "peft_lora_config", "inference_config")
    }


def test_trained_model_survives_export(tmp_path):
    model = tiny.reward_model(lora=3)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    save_video_reward(model, tmp_path, dtype=torch.float32)
    again = load_video_reward(tmp_path, dtype=torch.float32)  # tokenizer and template from the folder
    video = tiny.clips(2, size=(320, 320))
    model.settings = again.settings  # the file has no lower limit of the size
    assert torch.equal(model.score(video, PROMPTS), again.score(video, PROMPTS))


def test_2b_has_the_published_tensors():
    """1123 keys: 391 visual, 28 x (12 + 14) + 1 + 1 language model, lm_head, rm_head; 2.2 G parameters."""
    with torch.device("meta"):
        model = video_reward.VideoReward(qwen2_vl_2b(), tiny.tokenizer(), tiny.TEMPLATE)
    names = model.backbone.state_dict()
    assert sum(n.startswith("visual.") for n in names) == 391 and len(names) == 391 + 2 + 28 * 12
    assert sum(p.numel() for p in model.backbone.visual.parameters()) == 665_271_296
    embedding = names["language_model.embed_tokens.weight"].numel()
    assert sum(p.numel() for p in model.backbone.parameters()) - embedding == 2_208_985_600 - 151936 * 1536

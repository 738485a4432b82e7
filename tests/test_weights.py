"""Every public checkpoint layout, on files made here in their exact format, and diffusers' own model both ways."""

import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from afd_fast.discriminators.videoalign.checkpoints import load_video_reward
from afd_fast.errors import ConfigError, MissingFileError
from afd_fast.files import tensors
from afd_fast.students import CausalWan, CausalWanConfig, load_student, save_student
from afd_fast.students.toy import shipped
from afd_fast.students.wan.checkpoints import clean_keys, from_diffusers, to_diffusers
from afd_fast.students.wan.family import load_networks
from afd_fast.students.wan.text import TextEncoder
from afd_fast.students.wan.vae import WanDecoder
from tests import tiny_videoalign

CONFIG = CausalWanConfig(dim=128, ffn_dim=96, num_heads=1, num_layers=2, text_len=512, text_dim=24, freq_dim=32)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return CausalWan(CONFIG).eval()


@pytest.fixture
def state(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def prefixed(state, prefix):
    return {prefix + k: v for k, v in state.items()}


def same(student, state):
    loaded = student.state_dict()
    assert list(loaded) == list(state) and all(torch.equal(loaded[k], state[k]) for k in state)


def fsdp(state):
    """Keys as FSDP1 with activation checkpointing and compile leave them in Self-Forcing's training."""
    named = {}
    for key, value in state.items():
        if key.startswith("blocks."):
            _, index, rest = key.split(".", 2)
            key = f"blocks.{index}._fsdp_wrapped_module._checkpoint_wrapped_module.{rest}"
        named["model._fsdp_wrapped_module._orig_mod." + key] = value
    return named


LAYOUTS = {
    "original": lambda s: s,
    "self_forcing": lambda s: {"generator": prefixed(s, "model.")},
    "critic_too": lambda s: {"generator": prefixed(s, "model."), "critic": {"a": torch.ones(1)}, "step": 3},
    "ema": lambda s: {"generator": prefixed({k: v + 1 for k, v in s.items()}, "model."), "generator_ema": fsdp(s)},
    "ema_only": lambda s: {"generator_ema": prefixed(s, "model._fsdp_wrapped_module.")},
    "fsdp": lambda s: fsdp(s),
    "compiled_ddp": lambda s: prefixed(s, "module._orig_mod."),
    "net": lambda s: prefixed(s, "net."),
    "state_dict": lambda s: {"state_dict": prefixed(s, "model.")},
    "diffusers_keys": to_diffusers,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pt_layouts(layout, state, tmp_path):
    torch.save(LAYOUTS[layout](state), tmp_path / "model.pt")
    same(load_student(tmp_path / "model.pt"), state)
    same(load_student(tmp_path), state)  # a folder with that one file


def test_choice_of_weights(state, tmp_path):
    torch.save(LAYOUTS["ema"](state), tmp_path / "model.pt")
    generator = load_student(tmp_path / "model.pt", weights="generator")
    same(generator, {k: v + 1 for k, v in state.items()})
    with pytest.raises(ValueError, match=r"no 'critic'; it holds \['generator', 'generator_ema'\]"):
        load_student(tmp_path / "model.pt", weights="critic")


def test_old_torch_format(state, tmp_path):
    torch.save({"generator": prefixed(state, "model.")}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    same(load_student(tmp_path / "old.pt"), state)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_safetensors(state, tmp_path, prefix):
    save_file(prefixed(state, prefix), tmp_path / "m.safetensors")
    student = load_student(tmp_path / "m.safetensors", dtype=torch.bfloat16)
    assert student.dtype == torch.bfloat16 and not student.training
    same(student, {k: v.bfloat16() for k, v in state.items()})


def test_original_folder_with_shards(state, tmp_path):
    names = list(state)
    save_file({k: state[k] for k in names[:20]}, tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors")
    save_file({k: state[k] for k in names[20:]}, tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors")
    sizes = {
        "dim": 128,
        "ffn_dim": 96,
        "num_heads": 1,
        "num_layers": 2,
        "text_dim": 24,
        "freq_dim": 32,
        "model_type": "t2v",
    }
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    same(load_student(tmp_path), state)


def test_meta_free_and_trainable(state, tmp_path):
    torch.save(state, tmp_path / "model.pt")
    student = load_student(tmp_path / "model.pt", attention="sdpa", official_rounding=False)
    assert all(p.requires_grad and p.device.type == "cpu" for p in student.parameters())
    with torch.no_grad():
        student.patch_embedding.weight.zero_()  # not a view of the file
    same(load_student(tmp_path / "model.pt"), state)


class TestLoRA:
    """LongLive: a base and a PEFT LoRA (rank 256, alpha 256: scale 1)."""

    @pytest.fixture
    def lora(self, state):
        g = torch.Generator().manual_seed(1)
        return {
            name: (
                torch.randn(4, state[name + ".weight"].shape[1], generator=g),
                torch.randn(state[name + ".weight"].shape[0], 4, generator=g),
            )
            for name in ("blocks.0.self_attn.q", "blocks.1.ffn.2", "blocks.1.cross_attn.o")
        }

    @pytest.mark.parametrize("key", ["base_model.model.{}.lora_{}.weight", "base_model.model.{}.lora_{}.default.weight",
                                     "model._fsdp_wrapped_module.base_model.model.{}.lora_{}.weight"])  # fmt: skip
    def test_longlive(self, state, lora, tmp_path, key):
        torch.save({"generator": prefixed(state, "model.")}, tmp_path / "longlive_base.pt")
        flat = {key.format(n, letter): m for n, pair in lora.items() for letter, m in zip("AB", pair)}
        torch.save({"generator_lora": flat}, tmp_path / "lora.pt")
        student = load_student(tmp_path / "longlive_base.pt", lora=tmp_path / "lora.pt", lora_scale=0.5)
        expected = dict(state)
        for name, (a, b) in lora.items():
            expected[name + ".weight"] = state[name + ".weight"] + 0.5 * b @ a
        loaded = student.state_dict()
        assert all(torch.allclose(loaded[k], expected[k], atol=1e-6) for k in expected)
        assert not torch.equal(loaded["blocks.1.ffn.2.weight"], state["blocks.1.ffn.2.weight"])

    @pytest.mark.parametrize("layout", ["comfy", "kohya", "diffusers", "diffusers pipeline"])
    def test_other_layouts(self, state, lora, tmp_path, layout):
        """The same adapter as ComfyUI, its trainers and diffusers write it: merged as PEFT would, with alpha 2, rank 4."""
        flat = {f"{n}.lora_{letter}.weight": m for n, pair in lora.items() for letter, m in zip("AB", pair)}
        metadata = None
        if layout.startswith("diffusers"):
            prefix = "transformer." if layout != "diffusers" else ""
            flat = prefixed(to_diffusers(flat), prefix)
            metadata = {"lora_adapter_metadata": json.dumps({prefix + "r": 4, prefix + "lora_alpha": 2})}
            assert any("attn1.to_q" in key for key in flat) and any("ffn.net.2" in key for key in flat)
        else:
            flat |= {f"{n}.alpha": torch.tensor(2.0) for n in lora}
            flat = prefixed(flat, "diffusion_model.")
        if layout == "kohya":
            flat = {k.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): v for k, v in flat.items()}
        save_file({k: v.contiguous() for k, v in flat.items()}, tmp_path / "lora.safetensors", metadata)
        torch.save(state, tmp_path / "base.pt")
        loaded = load_student(tmp_path / "base.pt", lora=tmp_path / "lora.safetensors").state_dict()
        for name, (a, b) in lora.items():
            assert torch.allclose(loaded[name + ".weight"], state[name + ".weight"] + 0.5 * b @ a, atol=1e-6)

    def test_what_diffusers_saves(self, theirs, tmp_path):
        """A file of `save_lora_adapter`: the merged student computes what diffusers computes."""
        import copy

        from peft import LoraConfig

        theirs.save_pretrained(tmp_path / "base")
        adapted = copy.deepcopy(theirs)
        adapted.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_out.0", "ffn.net.2"]))
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, 0, 0.1)
        adapted.save_lora_adapter(tmp_path)
        student = load_student(tmp_path / "base", lora=tmp_path / "pytorch_lora_weights.safetensors")
        TestDiffusers().outputs_agree(student, adapted)

    def test_peft_folder(self, model, state, tmp_path):
        """A folder PEFT itself wrote: the merged student computes what the PEFT model computes."""
        import copy

        from peft import LoraConfig, get_peft_model

        peft_model = get_peft_model(
            copy.deepcopy(model), LoraConfig(r=4, lora_alpha=2, target_modules=["q", "v", "ffn.0"])
        )
        for name, p in peft_model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p)
        peft_model.save_pretrained(tmp_path / "adapter")
        torch.save(state, tmp_path / "base.pt")
        student = load_student(tmp_path / "base.pt", lora=tmp_path / "adapter")
        x, t, context = torch.randn(1, 16, 2, 4, 4), torch.full((1, 2), 500.0), torch.randn(1, 5, 24)
        with torch.no_grad():
            expected = peft_model(x, t, peft_model.encode_text(context))
            assert (student(x, t, student.encode_text(context)) - expected).abs().max() < 1e-4 * expected.abs().max()

    def test_refusals(self, state, lora, tmp_path):
        torch.save(state, tmp_path / "base.pt")
        a, b = lora["blocks.0.self_attn.q"]
        for bad, match in (
            ({"blocks.0.self_attn.q.lora_A.weight": a}, "lora_A only"),
            (
                {"blocks.0.self_attn.q.lora_A.weight": a, "blocks.0.self_attn.q.lora_B.weight": b[:, 1:]},
                "has A .* and B .*, expected",
            ),
            ({"blocks.9.self_attn.q.lora_A.weight": a, "blocks.9.self_attn.q.lora_B.weight": b}, "blocks.9"),
            (
                {"blocks.0.self_attn.q.lora_A.weight": a[:, 1:], "blocks.0.self_attn.q.lora_B.weight": b},
                "is for a blocks.0.self_attn.q of",
            ),
            ({"something": a}, "something"),
            ({"blocks.0.self_attn.q.alpha": torch.ones(())}, "belongs to no LoRA layer"),
        ):
            torch.save(bad, tmp_path / "lora.pt")
            with pytest.raises(ValueError, match=match) as error:
                load_student(tmp_path / "base.pt", lora=tmp_path / "lora.pt")
            assert "lora.pt: " in str(error.value) and "base.pt" not in str(
                error.value
            )  # the adapter's fault, not the base's


@pytest.fixture(scope="module")
def theirs():
    from diffusers import WanTransformer3DModel

    torch.manual_seed(1)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=16, out_channels=16, text_dim=24, freq_dim=32,
        ffn_dim=96, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
    ).eval()  # fmt: skip
    for p in transformer.parameters():  # norm weights off one, zero-initialised ones off zero
        torch.nn.init.normal_(p, 0.5 if p.ndim == 1 else 0.0, 0.1)
    return transformer


class TestDiffusers:
    @torch.no_grad()
    def outputs_agree(self, ours, theirs):
        g = torch.Generator().manual_seed(2)
        x = torch.randn(2, 16, 3, 6, 4, generator=g)
        context, t = torch.randn(2, 512, 24, generator=g), torch.tensor([937.5, 250.0])
        expected = theirs(x, t, context, return_dict=False)[0]
        out = ours(x, t, ours.encode_text(context))
        # diffusers' sinusoid is float32, the official one float64: 1.3e-5 measured at these sizes
        assert (out - expected).abs().max() < 5e-5 * expected.abs().max()

    def test_folder_in(self, theirs, tmp_path):
        theirs.save_pretrained(tmp_path / "pipe" / "transformer")
        for folder in (tmp_path / "pipe", tmp_path / "pipe" / "transformer"):
            student = load_student(folder)
            assert student.config.num_heads == 2 and student.config.dim == 48
            self.outputs_agree(student, theirs)

    def test_folder_out(self, model, tmp_path):
        from diffusers import WanTransformer3DModel

        save_student(model, tmp_path)
        self.outputs_agree(model, WanTransformer3DModel.from_pretrained(tmp_path).eval())
        same(load_student(tmp_path), dict(model.state_dict()))

    def test_mapping_is_a_bijection_for_1_3b(self):
        from diffusers import WanTransformer3DModel

        with torch.device("meta"):
            ours = CausalWan(CausalWanConfig.wan_1_3b()).state_dict()
            theirs = WanTransformer3DModel(
                num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30, text_dim=4096
            ).state_dict()
        mapped = to_diffusers(ours)
        assert {k: v.shape for k, v in mapped.items()} == {k: v.shape for k, v in theirs.items()}
        assert list(from_diffusers(mapped)) == list(ours) and len(mapped) == 825

    def test_image_to_video_is_refused(self, theirs, tmp_path):
        theirs.save_pretrained(tmp_path)
        settings = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(settings | {"image_dim": 1280}))
        with pytest.raises(ValueError, match="image"):
            load_student(tmp_path)


class _Code:
    def __reduce__(self):
        return (print, ("code ran",))


class _Plant:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.write_text, (self.mark, "code ran"))


class TestPlantedCode:
    """Code in every place that is loaded, and somebody who answers every question with yes: nothing runs."""

    @pytest.fixture(autouse=True)
    def mark(self, tmp_path, monkeypatch):
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 99))
        mark = tmp_path / "code ran"
        yield mark
        assert not mark.exists()

    @pytest.fixture
    def plant(self, mark):
        """Writes the pickle into a file, bare and as torch.save does: plant(path) yields between them."""

        def into(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pickle.dumps({"a": _Plant(mark)}))
            yield
            torch.save({"a": _Plant(mark)}, path)
            yield

        return into

    @pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.bin", "m.ckpt", "m.safetensors", "folder/m.bin"])
    def test_student(self, tmp_path, plant, name):
        for _ in plant(tmp_path / "w" / name):
            with pytest.raises(ConfigError, match="could run code|cannot be read"):
                load_student(tmp_path / "w" / name.partition("/m")[0])

    @pytest.mark.parametrize("name", ["lora.pt", "adapter/adapter_model.bin", "adapter/adapter_model.safetensors"])
    def test_lora(self, tmp_path, plant, state, name):
        torch.save(state, tmp_path / "base.pt")
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 4}')
        for _ in plant(tmp_path / name):
            with pytest.raises(ConfigError, match="could run code|cannot be read"):
                load_student(tmp_path / "base.pt", lora=tmp_path / name.partition("/")[0])

    @pytest.mark.parametrize("name", ["text_encoder/pytorch_model.bin", "text_encoder/model.safetensors"])
    def test_text_encoder(self, tmp_path, plant, name):
        from transformers import UMT5Config

        tiny = UMT5Config(vocab_size=64, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=3)
        tiny.save_pretrained(tmp_path / "text_encoder")
        for _ in plant(tmp_path / name):
            with pytest.raises(ConfigError, match="no text_encoder that can be loaded"):
                TextEncoder.from_pretrained(tmp_path, device="cpu")

    @pytest.mark.parametrize("name", ["vae/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.safetensors"])
    def test_vae(self, tmp_path, plant, name):
        from diffusers import AutoencoderKLWan

        AutoencoderKLWan(base_dim=4, num_res_blocks=1).save_config(tmp_path / "vae")
        for _ in plant(tmp_path / name):
            with pytest.raises(ConfigError, match="no vae that can be loaded"):
                WanDecoder.from_pretrained(tmp_path, device="cpu")

    def test_tokenizers(self, tmp_path, mark):
        from transformers import UMT5Config, UMT5EncoderModel

        tiny = UMT5Config(vocab_size=64, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=3)
        UMT5EncoderModel(tiny).save_pretrained(tmp_path / "text_encoder")
        reward = shutil.copytree(tiny_videoalign.GOLDEN, tmp_path / "reward")
        for folder in (tmp_path / "tokenizer", reward / "checkpoint-1" / "tokenizer"):
            folder.mkdir(exist_ok=True)
            code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
            (folder / "own.py").write_text(code + "from transformers import PreTrainedTokenizer as Own\n")
            settings = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
            (folder / "config.json").write_text(
                json.dumps({"auto_map": {"AutoConfig": "own.Own"}, "model_type": "own"})
            )
        with pytest.raises(ConfigError, match="no tokenizer that can be loaded"):
            TextEncoder.from_pretrained(tmp_path, device="cpu")
        with pytest.raises(ConfigError, match="no tokenizer that can be loaded"):
            load_video_reward(reward, template=tiny_videoalign.TEMPLATE)

    def test_reward_model(self, tmp_path, plant, mark):
        reward = shutil.copytree(tiny_videoalign.GOLDEN, tmp_path / "reward")
        options = {"tokenizer": tiny_videoalign.tokenizer()}
        for _ in plant(reward / "checkpoint-1" / "model.pth"):
            with pytest.raises(ConfigError, match="could run code|cannot be read"):
                load_video_reward(reward, template=tiny_videoalign.TEMPLATE, **options)
        (reward / "prompt_template.txt").unlink(missing_ok=True)
        (reward / "prompt_template.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
        with pytest.raises(ConfigError, match="does not hold the template"):
            load_video_reward(reward, **options)


@pytest.mark.parametrize("content", [b"", b"no tensors", None])
def test_a_file_that_is_no_toy_student_is_named(tmp_path, content):
    if content is None:
        save_file({"a": torch.ones(1)}, tmp_path / "own.safetensors")
    else:
        (tmp_path / "own.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=r"own\.safetensors has no toy student"):
        shipped.load(tmp_path / "own.safetensors")


def test_a_file_of_tensors_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    """Also with an older safetensors, which writes in place."""
    file = tmp_path / "student.safetensors"
    tensors.save_tensors({"a": torch.zeros(4)}, file)
    before = file.read_bytes()

    def full(contents, path, about):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(tensors, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        tensors.save_tensors({"a": torch.ones(4)}, file)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_a_missing_path_is_no_repository(tmp_path, monkeypatch):
    """A folder that exists here makes what follows it a path; a pathlib.Path is one anyway."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for missing in (
        "runs/student",
        "./student",
        "runs/demo/student",
        "runs/a.pt",
        "/nowhere/student",
        Path("a/b"),
        "~/a.pt",
    ):
        for load in (load_student, load_video_reward, TextEncoder.from_pretrained, WanDecoder.from_pretrained):
            with pytest.raises(MissingFileError, match="check the path") as error:
                load(missing)
            assert str(missing) in str(error.value)


def test_refusals(state, tmp_path, capsys):
    path = tmp_path / "bad.pt"

    def refused(contents, match, error=ValueError, **options):
        torch.save(contents, path)
        with pytest.raises(error, match=match):
            load_student(path, **options)

    refused({**state, "extra.weight": torch.ones(1)}, "unexpected: extra.weight")
    refused({k: v for k, v in state.items() if k != "blocks.1.norm3.bias"}, "missing: blocks.1.norm3.bias")
    refused({**state, "blocks.0.ffn.2.bias": torch.ones(7)}, r"blocks.0.ffn.2.bias \(7,\), not \(128,\)")
    refused({**state, "model.blocks.0.ffn.2.bias": torch.ones(128)}, "twice")
    refused({"a": torch.ones(1)}, "not a Wan transformer")
    refused({"critic": {"a": torch.ones(1)}}, "no student")
    refused(torch.ones(3), "Tensor, not a state dict")
    refused(CausalWan(CausalWanConfig.tiny()).state_dict(), "pass config=")
    refused(state, "other shapes", config=CausalWanConfig(**{**CONFIG.__dict__, "ffn_dim": 64}))
    refused({"generator": _Code()}, "could run code")
    with path.open("wb") as file:
        pickle.dump({"generator": _Code()}, file)
    with pytest.raises(ValueError, match="could run code"):
        load_student(path)
    assert "code ran" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="neither"):
        load_student(tmp_path / "nothing" / "here" / "at all.pt")
    (tmp_path / "two").mkdir()
    for name in ("a.pt", "b.pt"):
        torch.save(state, tmp_path / "two" / name)
    with pytest.raises(ValueError, match="2 checkpoints"):
        load_student(tmp_path / "two")


def test_tiny_with_a_config(tmp_path):
    torch.manual_seed(0)
    tiny = CausalWan(CausalWanConfig.tiny())
    torch.save({"generator": prefixed(tiny.state_dict(), "model.")}, tmp_path / "tiny.pt")
    same(load_student(tmp_path / "tiny.pt", config=CausalWanConfig.tiny()), dict(tiny.state_dict()))


def test_prefixes_in_any_order():
    names = [
        "model.module._orig_mod.head.modulation",
        "_fsdp_wrapped_module.model._checkpoint_wrapped_module.head.modulation",
    ]
    assert [list(clean_keys({n: torch.ones(1)})) for n in names] == [["head.modulation"]] * 2


def test_a_missing_student_is_named_before_its_base_is_downloaded():
    with pytest.raises(MissingFileError, match=r"nope\.pt is neither a file"):
        load_networks("nope.pt")

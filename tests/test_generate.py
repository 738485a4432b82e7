"""Decoding in chunks, the prompt cache, and prompts to files, on tiny random models."""

import copy

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from afd_fast.cli.main import app
from afd_fast.errors import ConfigError, VideoError
from afd_fast.generate import GenerateOptions, GenerateStats, Job, file_name, generate, jobs
from afd_fast.rollout import rollout
from afd_fast.students.wan.family import tiny
from afd_fast.students.wan.text import TextEncoder, clean_prompt
from afd_fast.students.wan.vae import WanDecoder, channels_last


@pytest.fixture(scope="module")
def vae():
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    return AutoencoderKLWan(base_dim=4, num_res_blocks=1).eval()


@pytest.fixture(scope="module")
def latents():
    return torch.randn(2, 16, 7, 4, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def official(vae, latents):
    """diffusers' own decode, one latent frame at a time, each sample alone; in float32, and in float64 arithmetic
    without diffusers' rounding to float32 where it upsamples."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanUpsample

    shape = (1, -1, 1, 1, 1)
    z = latents * torch.tensor(vae.config.latents_std).view(shape) + torch.tensor(vae.config.latents_mean).view(shape)
    outs = {}
    for dtype in (torch.float64, torch.float32):
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            if dtype == torch.float64:
                patch.setattr(WanUpsample, "forward", torch.nn.Upsample.forward)
            outs[dtype] = torch.cat([vae.to(dtype).decode(one[None].to(dtype)).sample.float() for one in z])
    return {dtype: (video + 1) / 2 for dtype, video in outs.items()}


class TestDecoder:
    """Any split is the same function: every pixel's float32 equal when computed in float64. In float32 the
    convolution library may sum in another order for another shape, and only one frame at a time is equal bit by bit."""

    @pytest.mark.parametrize("chunk", [1, 2, 3, 6])
    def test_chunks(self, vae, latents, official, chunk):
        out = WanDecoder(vae.double(), chunk=chunk)(latents)
        assert out.shape == (2, 3, 25, 32, 48) and torch.equal(out, official[torch.float64])
        narrow = WanDecoder(vae.float(), chunk=chunk)(latents)
        assert (narrow - official[torch.float32]).abs().max() < 2e-5

    def test_frame_by_frame_is_bit_identical_in_float32(self, vae, latents, official):
        assert torch.equal(WanDecoder(vae.float(), chunk=1)(latents[:1]), official[torch.float32][:1])

    def test_channels_last(self, vae, latents, official):
        """The layout of a GPU; every step keeps it."""
        decoder = WanDecoder(copy.deepcopy(vae).double())
        channels_last(decoder.vae)  # 2-D convolutions are among them
        convolutions = [m for m in decoder.vae.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))]
        forms = {4: torch.channels_last, 5: torch.channels_last_3d}
        assert {m.weight.ndim for m in convolutions} == {4, 5}
        assert all(m.weight.is_contiguous(memory_format=forms[m.weight.ndim]) for m in convolutions)
        stream = decoder.stream()
        assert torch.equal(stream(latents), official[torch.float64])
        assert all(
            x.is_contiguous(memory_format=forms[5]) for (_, conv), x in stream.past.items() if conv.in_channels > 16
        )

    def test_gradient(self, vae, latents, monkeypatch):
        """The same video with and without a gradient, and diffusers' own gradient."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanUpsample

        decoder, z = WanDecoder(vae.double()), latents[:1, :, :3].clone().requires_grad_()
        video = decoder(z)
        assert torch.equal(video.detach(), decoder(z.detach()))
        weight = torch.randn(video.shape)
        (gradient,) = torch.autograd.grad((video * weight).sum(), z)
        monkeypatch.setattr(WanUpsample, "forward", torch.nn.Upsample.forward)
        theirs = (vae.decode((z * decoder.std + decoder.mean).double()).sample.float() + 1) / 2
        (official,) = torch.autograd.grad((theirs * weight).sum(), z)
        torch.testing.assert_close(gradient, official, rtol=1e-5, atol=1e-5 * official.abs().max().item())

    @pytest.mark.parametrize("sizes", [(3, 3, 1), (1, 6), (2, 1, 4)])
    def test_stream(self, vae, latents, official, sizes):
        stream = WanDecoder(vae.double()).stream()
        assert torch.equal(torch.cat([stream(part) for part in latents.split(sizes, 2)], 2), official[torch.float64])

    def test_refusals(self, vae, latents):
        stream = WanDecoder(vae.float()).stream()
        stream(latents[:, :, :1])
        with pytest.raises(ValueError, match="start a new one"):
            stream(latents[:1, :, 1:])
        with pytest.raises(ValueError, match="latents must be"):
            stream(latents[:, :8])
        with pytest.raises(ValueError, match="chunk"):
            WanDecoder(vae, chunk=0)


class _Tokenizer:
    """Words to ids, padded, as a transformers tokenizer returns them."""

    def __call__(self, prompts, padding, max_length, return_tensors):
        assert (padding, return_tensors) == ("max_length", "pt")
        length = max(max_length, *(len(p.split()) + 1 for p in prompts))
        ids = torch.zeros(len(prompts), length, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            words = [2 + sum(w.encode()) % 60 for w in prompt.split()] + [1]
            ids[row, : len(words)] = torch.tensor(words)
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


@pytest.fixture(scope="module")
def umt5():
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    return UMT5EncoderModel(
        UMT5Config(vocab_size=64, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3, is_encoder_decoder=False)
    )


class TestText:
    def test_rows_of_the_prompt_only(self, umt5):
        encode = TextEncoder(umt5, _Tokenizer(), name="tiny", text_len=12)
        short, long = encode(["a ball", "one two three four five six"])
        assert short.shape == (3, 24) and long.shape == (7, 24)
        alone = TextEncoder(umt5, _Tokenizer(), name="tiny", text_len=3)(["a ball"])[0]  # padding has no influence
        assert (short - alone).abs().max() < 1e-5

    def test_cache(self, umt5, tmp_path):
        encode = TextEncoder(umt5, _Tokenizer(), name="tiny", text_len=12, cache_dir=tmp_path)
        first = encode(["a ball", "two", "a  ball "])
        assert torch.equal(first[0], first[2]) and len(list(tmp_path.rglob("*.safetensors"))) == 2
        cached = TextEncoder(None, None, name="tiny", text_len=12, cache_dir=tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(cached(["two", "a ball"]), (first[1], first[0])))
        with pytest.raises(RuntimeError, match="no encoder"):
            TextEncoder(None, None, name="other", text_len=12, cache_dir=tmp_path)(["two"])
        assert not list(tmp_path.rglob("*.tmp"))

    def test_a_damaged_file_of_the_cache_is_made_again(self, umt5, tmp_path, caplog):
        encode = TextEncoder(umt5, _Tokenizer(), name="tiny", text_len=12, cache_dir=tmp_path)
        (first,) = encode(["a ball"])
        (file,) = tmp_path.rglob("*.safetensors")
        whole = file.read_bytes()
        for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:40], b""):
            file.write_bytes(damaged)
            with pytest.raises(RuntimeError, match="no encoder"):
                TextEncoder(None, None, name="tiny", text_len=12, cache_dir=tmp_path)(["a ball"])
            caplog.clear()
            assert torch.equal(encode(["a ball"])[0], first) and file.read_bytes() == whole
            assert f"{file} is damaged" in caplog.text

    def test_too_long(self, umt5):
        with pytest.raises(ValueError, match="more than text_len=4"):
            TextEncoder(umt5, _Tokenizer(), name="tiny", text_len=4)(["one two three four five"])

    @pytest.mark.parametrize("prompt,clean", [
        (" a &amp;amp; b\n\tc ", "a & b c"), ("the man’s hat", "the man's hat"), ("a “red” ball", 'a "red" ball'),
        ("一只猫，在草地上奔跑。", "一只猫,在草地上奔跑。"), ("ｗｉｄｅ", "wide"), ("ﬁne", "fine"), ("schÃ¶n", "schön"),
        ("cafe\u0301", "café"), ("\ufeffA cat", "A cat"), ("red\x1b[31m x", "red x"), ("3–5 — dash…", "3–5 — dash…"),
    ])  # fmt: skip
    def test_clean(self, prompt, clean):
        """What the official `basic_clean` and `whitespace_clean` make of it."""
        assert clean_prompt(prompt) == clean


def test_generate_writes_a_video_per_prompt(tmp_path):
    networks, written, ticks = tiny(), {}, []
    todo = jobs(["A red ball.", "", "two cubes fall", "third"], seed=7)
    stats = generate(
        networks, todo, tmp_path / "out", GenerateOptions(frames=6, height=4, width=6, batch=2),
        write=lambda path, video, fps: written.update({path.name: (video, fps)}), progress=lambda *a: ticks.append(a),
    )  # fmt: skip
    assert list(written) == ["0000-a-red-ball.mp4", "0001-two-cubes-fall.mp4", "0002-third.mp4"]
    assert all(v.shape == (3, 21, 32, 48) and 0 <= v.min() and v.max() <= 1 and f == 16 for v, f in written.values())
    assert (stats.videos, stats.frames, ticks) == (3, 63, [(1, 4), (2, 4), (3, 4), (4, 4)])
    assert 0 < stats.dit_seconds < stats.video_seconds and len(stats.first_chunk_seconds) == 2
    for part in ("DiT only", "with VAE", "first chunk after", "not counted"):
        assert part in stats.line()
    g = torch.Generator().manual_seed(7 + 2)  # a video depends on its own seed, not on its batch
    noise = torch.randn(1, 6, 16, 4, 6, generator=g).transpose(1, 2)  # drawn as the official inference draws it
    with torch.no_grad():
        text = networks.student.encode_text(networks.text(["third"]))
        alone = networks.vae(rollout(networks.student, text, noise, generator=[g]))
    assert torch.allclose(alone[0], written["0002-third.mp4"][0], atol=1e-5)


def test_a_broken_network_writes_no_black_video(tmp_path):
    networks = tiny()
    networks.vae.vae.post_quant_conv.bias.data.fill_(float("nan"))
    with pytest.raises(VideoError, match="'a red ball' with seed 5 has pixels that are NaN"):
        generate(networks, jobs(["a red ball"], 5), tmp_path / "out", GenerateOptions(3, 4, 6))
    assert not list(tmp_path.rglob("*.mp4"))


def test_a_prompt_that_is_too_long_is_found_first(tmp_path, umt5):
    networks = tiny()
    networks.text = TextEncoder(umt5, _Tokenizer(), name="tiny", text_len=4)
    with pytest.raises(ConfigError, match="6 tokens, more than text_len=4.*'one two"):
        generate(networks, jobs(["a ball", "one two three four five"]), tmp_path / "out", GenerateOptions(3, 4, 6))
    assert not (tmp_path / "out").exists()


def rollout_command(tmp_path, *words):
    call = ["rollout", "--config", "tiny", "--prompts", tmp_path / "p.txt", "--out", tmp_path / "o", *words]
    done = CliRunner().invoke(app, list(map(str, call)))
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def test_the_command_says_what_is_wrong_and_leaves_no_folder(tmp_path):
    file = tmp_path / "p.txt"
    for content, said in (
        (None, "p.txt is not a file"),
        (b"\xef\xbb\xbf \r\n", "holds no prompt"),
        (b"caf\xe9", "in line 1"),
    ):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(ConfigError, match=said):
            rollout_command(tmp_path)
    file.write_bytes(b"\xef\xbb\xbfa ball\r\n")
    with pytest.raises(ConfigError, match="20 latent frames do not divide"):
        rollout_command(tmp_path, "--frames", 20)
    assert not (tmp_path / "o").exists()
    assert "1 video, 9 frames" in rollout_command(tmp_path, "--frames", 3)
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["0000-a-ball.mp4"]


def test_the_encoder_drops_no_pixels(vae):
    coder = WanDecoder(vae.float())
    assert coder.encode(torch.rand(1, 3, 5, 16, 24)).shape == (1, 16, 2, 2, 3)
    for size in ((6, 16, 24), (5, 17, 24), (5, 16, 20)):
        with pytest.raises(ValueError, match="4 F - 3"):
            coder.encode(torch.rand(1, 3, *size))


def test_generate_refuses(tmp_path):
    with pytest.raises(ConfigError, match="no prompts"):
        jobs([" "])
    for bad in ({"batch": 0}, {"frames": 0}, {"fps": float("nan")}, {"fps": float("inf")}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            GenerateOptions(**bad)
    with pytest.raises(ConfigError, match="5 latent frames do not divide into chunks of 3: 3 or 6 do"):
        generate(tiny(), [Job("a", "a.mp4", 0)], tmp_path / "out", GenerateOptions(5, 4, 6))
    assert not (tmp_path / "out").exists()
    assert GenerateStats().line() == "no videos" and file_name(3, "!") == "0003-video.mp4"


def test_models_import_neither_transformers_nor_diffusers():
    import subprocess
    import sys

    code = (
        "import sys, afd_fast, afd_fast.students, afd_fast.rollout, afd_fast.generate\n"
        "from afd_fast.students import CausalWan, CausalWanConfig, load_student\n"
        "import afd_fast.students.wan.vae, afd_fast.students.wan.text\n"
        "assert not {'transformers', 'diffusers', 'triton', 'peft'} & set(sys.modules), set(sys.modules) & {'transformers', 'diffusers', 'triton', 'peft'}\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

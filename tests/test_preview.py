"""The preview decoder: TAEHV's own numbers on random weights, streams, and what it is not for."""

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from afd_fast.cli.main import app
from afd_fast.errors import ConfigError
from afd_fast.students.student import Family, LatentFormat
from afd_fast.students.wan.family import load_networks, tiny
from afd_fast.students.wan.preview import PreviewDecoder, _expected
from afd_fast.video_io import VideoFormat

# pixels [0, :, ::4, 5, 7] and their mean over the video, of taehv.py at 1f14a56 with the weights and latents made here
OFFICIAL = {
    (16, 3): ([0.44286, 0.5743, 0.50633, 0.30182, 0.08227, 0.12207, 0.36791, 0.33969, 0.37537], 0.3814787),
    (48, 12): ([0.63792, 0.57753, 0.62711, 0.42182, 0.38551, 0.32874, 0.51668, 0.4238, 0.4499], 0.5066314),
}
WIDTHS = (256, 128, 64, 64)


def weights(channels=16, colours=3, widths=WIDTHS):
    """Random weights and a generator to go on with."""
    g = torch.Generator().manual_seed(0)
    shapes = {f"decoder.{key}": shape for key, shape in _expected(channels, widths, colours).items()}
    state = {}
    for key in sorted(shapes):
        fan = torch.Size(shapes[key][1:]).numel()
        state[key] = torch.randn(shapes[key], generator=g) * (1.4 / fan**0.5 if len(shapes[key]) > 1 else 0.1)
    state["decoder.22.weight"] *= 0.01
    state["decoder.22.bias"] = torch.full((colours,), 0.5)
    return state, g


@pytest.mark.parametrize("channels,colours", OFFICIAL)
def test_official_numbers(tmp_path, channels, colours):
    state, g = weights(channels, colours)
    torch.save(state | {"encoder.0.weight": torch.ones(1)}, tmp_path / "taew.pth")
    z = torch.randn(1, channels, 3, 2, 3, generator=g)
    decoder = PreviewDecoder.from_file(tmp_path / "taew.pth", dtype=torch.float32, device="cpu")
    pixels = decoder(z)
    values, mean = OFFICIAL[channels, colours]
    assert pixels.shape == (1, 3, 9, 2 * decoder.scale, 3 * decoder.scale)
    assert (pixels[0, :, ::4, 5, 7].flatten() - torch.tensor(values)).abs().max() < 2e-5
    assert abs(pixels.double().mean().item() - mean) < 1e-6


@pytest.fixture
def small(tmp_path):
    """A decoder a few channels wide."""
    save_file(weights(widths=(8, 6, 4, 4))[0], tmp_path / "taew2_1.safetensors")
    return tmp_path / "taew2_1.safetensors"


def test_streams_and_batches(small):
    decoder = PreviewDecoder.from_file(small, dtype=torch.float64, device="cpu")
    z = torch.randn(2, 16, 5, 2, 3, generator=torch.Generator().manual_seed(1))
    whole, stream = decoder(z), decoder.stream()
    assert (torch.cat([stream(part) for part in z.split((2, 1, 2), 2)], 2) - whole).abs().max() < 1e-6
    assert (decoder(z[1:]) - whole[1:]).abs().max() < 1e-6
    with pytest.raises(ValueError, match="start a new one"):
        stream(z[:1])
    with pytest.raises(ValueError, match=r"latents must be \[B, 16"):
        decoder(z[:, :8])


def test_a_video_by_the_command(small, tmp_path):
    (tmp_path / "p.txt").write_text("a red ball\n")
    words = ["rollout", "--config", "tiny", "--prompts", tmp_path / "p.txt", "--frames", 3, "--size", "32x48", "--out"]
    done = CliRunner().invoke(app, [*map(str, words), str(tmp_path / "o"), "--preview", str(small)])
    assert done.exit_code == 0, done.output
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["0000-a-red-ball.mp4"]


def test_refused(small, tmp_path):
    state, _ = weights(widths=(8, 6, 4, 4))
    for change, match in (
        ({"decoder.0.weight": torch.ones(1)}, "super variant"),
        ({"decoder.9.conv.2.bias": torch.ones(5)}, "decoder.9.conv.2.bias is not as expected"),
        ({"decoder.9.conv.2.bias": None}, "decoder.9.conv.2.bias is not as expected"),
        ({"decoder.23.weight": torch.ones(1)}, "decoder.23.weight is not as expected"),
        ({"decoder.14.weight": None}, "no preview decoder: expected weights in TAEHV's format"),
    ):
        torch.save({k: v for k, v in (state | change).items() if v is not None}, tmp_path / "bad.pth")
        with pytest.raises(ConfigError, match=match):
            load_networks("tiny", preview=tmp_path / "bad.pth", device="cpu")
    torch.save(weights(channels=48, colours=12, widths=(8, 6, 4, 4))[0], tmp_path / "taew2_2.pth")
    with pytest.raises(ConfigError, match="latents of 16 channels, the decoder of .*taew2_2.pth has 48"):
        load_networks("tiny", preview=tmp_path / "taew2_2.pth", device="cpu")
    with pytest.raises(FileNotFoundError, match="gone.pth"):
        load_networks("tiny", preview=tmp_path / "gone.pth", device="cpu")


def test_no_rewards_from_a_preview(small):
    networks = tiny()
    with pytest.raises(ConfigError, match="the VAE PreviewDecoder lacks encode"):
        Family("wan", networks.student, networks.text, PreviewDecoder.from_file(small, device="cpu"),
               LatentFormat(16, 3, 4, 4), 3, VideoFormat(9, 32, 32, 16))  # fmt: skip

"""A preview of latents as pixels: a tiny decoder with weights in TAEHV's format (taew2_1, taew2_2), a fraction of the VAE's work.

Its pixels only resemble the VAE's. It has no encoder here, so that a family, whose rewards need the VAE's pixels, refuses it.
Source: madebyollin/taehv 1f14a56, taehv.py (`TAEHV`, base decoder). The layers are convolutions over single frames; a
memory block also reads its input of the frame before, zeros at the video's start. The first three frames are dropped.

Legend: B samples, C channels, F latent frames, H x W latent pixels, s = 8 (Wan 2.2: 16).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_fast.errors import ConfigError
from afd_fast.students.files import read_tensors

TRIM = 3  # frames of video before the first one
BLOCKS = ((3, 4, 5), (9, 10, 11), (15, 16, 17))  # memory blocks of each of the three levels, by place in the decoder
GROW = (7, 13, 19)  # the layers that make several frames of one
FRAMES = (1, 2, 2)  # that many


def _expected(channels: int, widths: tuple[int, ...], colours: int) -> dict[str, tuple[int, ...]]:
    """The decoder's tensors and their shapes. widths: of the three levels and of the last convolution's input."""
    shapes: dict[str, tuple[int, ...]] = {"1.weight": (widths[0], channels, 3, 3), "1.bias": (widths[0],)}
    for level, places in enumerate(BLOCKS):
        n = widths[level]
        for place in places:
            for index, given in ((0, 2 * n), (2, n), (4, n)):
                shapes |= {f"{place}.conv.{index}.weight": (n, given, 3, 3), f"{place}.conv.{index}.bias": (n,)}
        shapes |= {f"{GROW[level]}.conv.weight": (FRAMES[level] * n, n, 1, 1)}
        shapes |= {f"{GROW[level] + 1}.weight": (widths[level + 1], n, 3, 3)}
    return shapes | {"22.weight": (colours, widths[3], 3, 3), "22.bias": (colours,)}


class PreviewDecoder:
    """The decoder with `weights`, its tensors without `decoder.` before their names. Called as `WanDecoder` is."""

    def __init__(self, weights: dict[str, Tensor]):
        self.weights = weights
        self.channels = weights["1.weight"].shape[1]
        self.patch = round((len(weights["22.weight"]) / 3) ** 0.5)
        self.scale = 8 * self.patch  # s

    @classmethod
    def from_file(
        cls, path: str | Path, *, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cuda"
    ) -> "PreviewDecoder":
        """From a file of weights (taew2_1.pth, taew2_2.pth, or safetensors). ConfigError for other files."""
        contents = read_tensors(Path(path))
        found = {}
        if isinstance(contents, dict):
            found = {k.removeprefix("decoder."): v for k, v in contents.items() if str(k).startswith("decoder.")}
        if "0.weight" in found:
            raise ConfigError(
                f"{path} is TAEHV's super variant, which is not supported: give the base weights, such as taew2_1.pth"
            )
        if not {"1.weight", "8.weight", "14.weight", "20.weight", "22.weight"} <= set(found):
            raise ConfigError(f"{path} is no preview decoder: expected weights in TAEHV's format, such as taew2_1.pth")
        widths = (len(found["1.weight"]), *(len(found[f"{place + 1}.weight"]) for place in GROW))
        shapes = _expected(found["1.weight"].shape[1], widths, len(found["22.weight"]))
        for place in GROW:  # files made for more frames hold those of the last ones at the end
            key = f"{place}.conv.weight"
            if key in found:
                found[key] = found[key][-shapes[key][0] :]
        wrong = sorted(k for k in set(shapes) | set(found) if k not in found or tuple(found[k].shape) != shapes.get(k))
        if wrong or len(found["22.weight"]) not in (3, 12):
            raise ConfigError(
                f"{path} is no preview decoder of Wan: decoder.{(wrong or ['22.weight'])[0]} is not as expected"
            )
        return cls({key: value.to(device, dtype, copy=True) for key, value in found.items()})

    def stream(self) -> "PreviewStream":
        """A decoder that keeps the state of the earlier frames: call it with the chunks of `rollout.stream` in order."""
        return PreviewStream(self)

    def __call__(self, latents: Tensor) -> Tensor:
        """Latents [B, C, F, H, W], as the student makes them, to pixels [B, 3, 4 F - 3, s H, s W] in [0, 1], float32."""
        return self.stream()(latents)


class PreviewStream:
    """The state over one batch of videos: the last input of every memory block. Call it with [B, C, f, H, W]."""

    def __init__(self, decoder: PreviewDecoder):
        self.decoder = decoder
        self.past: dict[int, Tensor] = {}
        self.shape: tuple[int, ...] | None = None

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Pixels in [0, 1] of these latent frames. Raises ValueError if the channels, batch or size are others."""
        decoder, w = self.decoder, self.decoder.weights
        if latents.ndim != 5 or latents.shape[1] != decoder.channels:
            raise ValueError(f"got latents {tuple(latents.shape)}; latents must be [B, {decoder.channels}, F, H, W]")
        shape, first = (latents.shape[0], *latents.shape[3:]), self.shape is None
        if not first and self.shape != shape:
            raise ValueError(f"got (B, H, W) = {shape}, this stream decodes {self.shape}: start a new one")
        self.shape = shape
        x = latents.to(w["1.weight"]).transpose(1, 2).flatten(0, 1)  # [B F, C, H, W]
        x = F.conv2d((x / 3).tanh() * 3, w["1.weight"], w["1.bias"], padding=1).relu()
        for level, places in enumerate(BLOCKS):
            for place in places:
                x = self._memory(place, x, shape[0])
            x = F.interpolate(x, scale_factor=2.0)
            grow = GROW[level]
            x = F.conv2d(x, w[f"{grow}.conv.weight"])
            x = x.unflatten(1, (FRAMES[level], -1)).flatten(0, 1)
            x = F.conv2d(x, w[f"{grow + 1}.weight"], padding=1)
        x = F.conv2d(x.relu(), w["22.weight"], w["22.bias"], padding=1)
        x = F.pixel_shuffle(x, decoder.patch).float().clamp(0, 1)
        video = x.unflatten(0, (shape[0], -1)).transpose(1, 2)
        return video[:, :, TRIM:] if first else video

    def _memory(self, place: int, x: Tensor, batch: int) -> Tensor:
        """relu(x + three convolutions of x and its frame before). x: [B F, C, h, w]."""
        w, frames = self.decoder.weights, x.unflatten(0, (batch, -1))
        past = self.past.get(place)
        past = torch.zeros_like(frames[:, :1]) if past is None else past
        self.past[place] = frames[:, -1:].clone()
        y = torch.cat([x, torch.cat([past, frames[:, :-1]], 1).flatten(0, 1)], 1)
        for index in (0, 2, 4):
            y = F.conv2d(y, w[f"{place}.conv.{index}.weight"], w[f"{place}.conv.{index}.bias"], padding=1)
            y = y.relu() if index < 4 else y
        return (y + x).relu()

"""Wan's VAE: latents to pixels, at once or as they arrive, several latent frames and samples per call; pixels to latents.

The weights and arithmetic are diffusers' AutoencoderKLWan. Its `decode` runs one latent frame at a time. A causal
convolution with its cache of the last two frames is the same function for every split that keeps frame 0 alone (the
only frame that is not upsampled in time), so the later frames go in chunks. The result is equal bit for bit if the
convolution library keeps its order of summation for all shapes; chunk=1 is the sequence of diffusers.

Legend: B samples, F latent frames, H x W latent pixels; F frames of latents are 4 F - 3 of video, 8 H x 8 W.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd_fast.errors import extra
from afd_fast.ops.vae import norm_silu
from afd_fast.reference.vae import with_past
from afd_fast.students.files import loading


def channels_last(vae: nn.Module) -> None:
    """The convolutions' weights to channels-last, the layout of cuDNN's Hopper kernels; their outputs get it too."""
    for module in vae.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            form = torch.channels_last if isinstance(module, nn.Conv2d) else torch.channels_last_3d
            module.weight.data = module.weight.data.contiguous(memory_format=form)


class WanDecoder:
    """Decoder and encoder around `vae`, an AutoencoderKLWan of diffusers, which has no types.

    chunk: latent frames per call after the first frame (more are faster and take more memory). Give the VAE where it
    is to stay: on CUDA its weights get another layout (`channels_last`).
    """

    def __init__(self, vae: Any, *, chunk: int = 3):
        if chunk < 1:
            raise ValueError(f"got chunk={chunk}, expected at least 1 latent frame per call")
        self.vae, self.chunk = vae.eval().requires_grad_(False), chunk
        device = next(vae.parameters()).device
        if device.type == "cuda":
            channels_last(vae)
        shape = (1, -1, 1, 1, 1)
        self.mean = torch.tensor(vae.config.latents_mean, dtype=torch.float32, device=device).view(shape)
        self.std = torch.tensor(vae.config.latents_std, dtype=torch.float32, device=device).view(shape)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cuda",
        chunk: int = 3,
    ) -> "WanDecoder":
        """From a diffusers Wan folder or repository (its `vae` subfolder), or the folder of the VAE alone. Raises
        ConfigError that names the folder or repository if it cannot be loaded."""
        with extra("train"):
            from diffusers import AutoencoderKLWan

        subfolder = None if (Path(path) / "config.json").exists() else "vae"
        with loading("vae", path):
            vae = AutoencoderKLWan.from_pretrained(path, torch_dtype=dtype, subfolder=subfolder)
        return cls(vae.to(device), chunk=chunk)

    def stream(self) -> "DecoderStream":
        """A decoder that keeps the state of the earlier frames: call it with the chunks of `rollout.stream` in order."""
        return DecoderStream(self)

    def __call__(self, latents: Tensor) -> Tensor:
        """Latents [B, C, F, H, W], as the student makes them, to pixels [B, 3, 4 F - 3, 8 H, 8 W] in [0, 1], float32.
        Differentiable in the latents."""
        return self.stream()(latents)

    decode = __call__

    @torch.no_grad()
    def encode(self, videos: Tensor) -> Tensor:
        """Pixels [B, 3, 4 F - 3, 8 H, 8 W] in [0, 1] to the student's latents [B, C, F, H, W], float32: the mode of the
        posterior, normalised. Raises ValueError for other sizes, of which the VAE would drop what does not fill a latent."""
        if videos.ndim != 5 or videos.shape[2] % 4 != 1 or videos.shape[3] % 8 or videos.shape[4] % 8:
            raise ValueError(f"got videos {list(videos.shape)}, expected [B, 3, 4 F - 3, 8 H, 8 W]: cut or pad them")
        weight = next(self.vae.parameters())
        latents = self.vae.encode((videos * 2 - 1).to(weight.device, weight.dtype)).latent_dist.mode().float()
        return (latents - self.mean.to(latents.device)) / self.std.to(latents.device)


class DecoderStream:
    """The decoder's state over one batch of videos. Call it with [B, C, f, H, W]: the first latent frame becomes one
    frame of video, every later one becomes four.

    It walks through the modules of diffusers' decoder, with the norm, SiLU, the earlier frames and the convolution's
    padding in one pass instead of sixteen, and upsampling in the data's dtype: the same bits.
    """

    def __init__(self, decoder: WanDecoder):
        self.decoder = decoder
        self.past: dict[nn.Module, Tensor] = {}  # the last two frames that each causal convolution read
        self.shape: tuple[int, ...] | None = None
        self.frames = 0

    def __call__(self, latents: Tensor) -> Tensor:
        """Pixels in [0, 1] of these latent frames. Raises ValueError if the batch or size changes."""
        vae = self.decoder.vae
        if latents.ndim != 5 or latents.shape[1] != vae.config.z_dim:
            raise ValueError(f"got latents {tuple(latents.shape)}; latents must be [B, {vae.config.z_dim}, F, H, W]")
        shape = (latents.shape[0], *latents.shape[3:])
        if self.shape not in (None, shape):
            raise ValueError(f"got (B, H, W) = {shape}, this stream decodes {self.shape}: start a new one")
        self.shape = shape
        weight = next(vae.parameters())
        mean, std = (a.to(weight.device) for a in (self.decoder.mean, self.decoder.std))
        z = _convolve(vae.post_quant_conv, (latents.to(weight.device).float() * std + mean).to(weight.dtype))
        first = [1] if self.frames == 0 else []
        rest = latents.shape[2] - len(first)
        sizes = first + [self.decoder.chunk] * (rest // self.decoder.chunk)
        if rest % self.decoder.chunk:
            sizes.append(rest % self.decoder.chunk)
        parts = []
        for part in z.split(sizes, 2):
            parts.append(self._decode(vae.decoder, part).float().clamp(-1, 1).add(1).div(2))
            self.frames += part.shape[2]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _decode(self, net: Any, x: Tensor) -> Tensor:
        x = self._causal(net.conv_in, x)
        x = self._block(net.mid_block.resnets[0], x)
        for attention, block in zip(net.mid_block.attentions, net.mid_block.resnets[1:]):
            x = self._block(block, attention(x))
        for up in net.up_blocks:
            for block in up.resnets:
                x = self._block(block, x)
            for resample in up.upsamplers or ():
                x = self._upsample(resample, x)
        return self._norm_causal(net.norm_out, net.conv_out, x)

    def _causal(self, conv: Any, x: Tensor) -> Tensor:
        x, self.past[conv] = with_past(x, self.past.get(conv))
        return _convolve(conv, x)

    def _norm_causal(self, norm: Any, conv: Any, x: Tensor) -> Tensor:
        x, self.past[conv] = norm_silu(x, norm.gamma.flatten(), self.past.get(conv))
        return _convolve(conv, x)

    def _block(self, block: Any, x: Tensor) -> Tensor:
        short = x if isinstance(block.conv_shortcut, nn.Identity) else _convolve(block.conv_shortcut, x)
        x = self._norm_causal(block.norm1, block.conv1, x)
        return self._norm_causal(block.norm2, block.conv2, x).add_(short)

    def _upsample(self, resample: Any, x: Tensor) -> Tensor:
        """Twice the height and width; twice the frames where it has a `time_conv`, but for the video's first frame."""
        batch = x.shape[0]
        if resample.mode == "upsample3d" and self.frames:
            x = _interleaved(self._causal(resample.time_conv, x))
        else:
            x = x.transpose(1, 2).flatten(0, 1)
        x = resample.resample[1](F.interpolate(x, scale_factor=2.0, mode="nearest-exact"))
        return x.unflatten(0, (batch, -1)).transpose(1, 2)


def _convolve(conv: Any, x: Tensor) -> Tensor:
    """A causal convolution of diffusers over frames that begin with the past ones; it pads height and width."""
    sides = (0, conv.weight.shape[3] // 2, conv.weight.shape[4] // 2)
    return F.conv3d(x, conv.weight, conv.bias, padding=sides)


def _interleaved(x: Tensor) -> Tensor:
    """[B, 2 C, F, H, W], the even frames' channels before those of the odd ones -> [B 2 F, C, H, W], in x's layout."""
    x = x.unflatten(1, (2, -1))
    if x.stride(2) == 1:
        return x.permute(0, 3, 1, 4, 5, 2).flatten(0, 2).permute(0, 3, 1, 2)
    return x.permute(0, 3, 1, 2, 4, 5).flatten(0, 2)

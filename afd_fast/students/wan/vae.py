"""Wan's VAE: the decoder, several latent frames and samples a call: latents to pixels, at once or as they arrive.

The weights and arithmetic are diffusers' AutoencoderKLWan. Its own `decode` runs one latent frame at a time; a
causal convolution with its cache of the last two frames is the same function for any split in which frame 0
goes alone (only it is not upsampled in time), so the frames after it go in chunks. Bit for bit too where the
convolution library does not change its order of summation with the shape; chunk=1 is diffusers' own sequence.

Legend: B samples, F latent frames, H x W latent pixels; F frames of latents are 4 F - 3 of video, 8 H x 8 W.
"""

from pathlib import Path

import torch
from torch import Tensor


class WanDecoder:
    """Decoder around an AutoencoderKLWan.

    chunk: latent frames a call after the first (more is faster and takes more memory). On CUDA the
    convolutions' weights are put in channels_last_3d, the layout cuDNN's Hopper kernels want.
    """

    def __init__(self, vae, *, chunk: int = 3):
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        self.vae, self.chunk = vae.eval().requires_grad_(False), chunk
        if next(vae.parameters()).device.type == "cuda":
            vae.to(memory_format=torch.channels_last_3d)
        shape = (1, -1, 1, 1, 1)
        self.mean = torch.tensor(vae.config.latents_mean).view(shape)
        self.std = torch.tensor(vae.config.latents_std).view(shape)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, dtype=torch.bfloat16, device="cuda", chunk: int = 3) -> "WanDecoder":
        """From a diffusers Wan folder or repository (its `vae` subfolder), or the VAE's own folder."""
        from diffusers import AutoencoderKLWan

        nested = {} if (Path(path) / "config.json").exists() else {"subfolder": "vae"}
        return cls(AutoencoderKLWan.from_pretrained(path, torch_dtype=dtype, **nested).to(device), chunk=chunk)

    def stream(self) -> "DecoderStream":
        """A decoder that remembers the frames before: feed it the chunks of `rollout.stream` in order."""
        return DecoderStream(self)

    def __call__(self, latents: Tensor) -> Tensor:
        """Latents [B, C, F, H, W], as the student makes them, to pixels [B, 3, 4 F - 3, 8 H, 8 W] in [0, 1], float32.
        Differentiable in the latents."""
        return self.stream()(latents)

    @torch.no_grad()
    def encode(self, videos: Tensor) -> Tensor:
        """Pixels [B, 3, 4 F - 3, 8 H, 8 W] in [0, 1] to the latents [B, C, F, H, W] the student works in, float32: the
        mode of the posterior, normalised."""
        weight = next(self.vae.parameters())
        latents = self.vae.encode((videos * 2 - 1).to(weight.device, weight.dtype)).latent_dist.mode().float()
        return (latents - self.mean.to(latents.device)) / self.std.to(latents.device)


class DecoderStream:
    """The decoder's state over one batch of videos. Call it with [B, C, f, H, W]; the very first latent frame
    becomes one frame of video, every later one four."""

    def __init__(self, decoder: WanDecoder):
        self.decoder = decoder
        self.features = [None] * decoder.vae._cached_conv_counts["decoder"]
        self.shape = None
        self.frames = 0

    def __call__(self, latents: Tensor) -> Tensor:
        """Pixels in [0, 1] of these latent frames. Raises ValueError when the batch or size changes."""
        vae = self.decoder.vae
        if latents.ndim != 5 or latents.shape[1] != vae.config.z_dim:
            raise ValueError(f"latents must be [B, {vae.config.z_dim}, F, H, W], got {tuple(latents.shape)}")
        shape = (latents.shape[0], *latents.shape[3:])
        if self.shape not in (None, shape):
            raise ValueError(f"this stream decodes (B, H, W) = {self.shape}, got {shape}: start a new one")
        self.shape = shape
        weight = next(vae.parameters())
        z = latents.float() * self.decoder.std.to(latents.device) + self.decoder.mean.to(latents.device)
        z = vae.post_quant_conv(z.to(weight.device, weight.dtype))
        first = [1] if self.frames == 0 else []
        rest = latents.shape[2] - len(first)
        sizes = first + [self.decoder.chunk] * (rest // self.decoder.chunk)
        if rest % self.decoder.chunk:
            sizes.append(rest % self.decoder.chunk)
        parts = []
        for part in z.split(sizes, 2):
            pixels = vae.decoder(part, feat_cache=self.features, feat_idx=[0], first_chunk=self.frames == 0)
            parts.append(pixels.float().clamp(-1, 1).add(1).div(2))
            self.frames += part.shape[2]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

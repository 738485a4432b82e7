"""Wan's VAE: latents to pixels, at once or as they arrive, several latent frames and samples per call; pixels to latents.

The weights and arithmetic are diffusers' AutoencoderKLWan, of Wan 2.1 and of Wan 2.2 (48 channels, pixels in patches).
Its `decode` runs one latent frame at a time. A causal convolution with its cache of the last two frames is the same
function for every split that keeps frame 0 alone (the only frame that is not upsampled in time), so the later frames go
in chunks. The result is equal bit for bit if the convolution library keeps its order of summation for all shapes;
chunk=1 is the sequence of diffusers.

Tiles need no blending. The one layer that sees the whole frame is the attention at the latents' size, which takes little
memory and runs on the whole frame. Behind it are convolutions: a tile is decoded with as many pixels of its neighbours
as they reach (`_halos`), fewer from level to level, so that every pixel is that of the undivided frame.

Legend: B samples, C channels, F latent frames, H x W latent pixels, s = 8 (Wan 2.2: 16); F frames of latents are 4 F - 3
of video, s H x s W.
"""

from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd_fast.errors import ConfigError, extra
from afd_fast.ops.vae import norm_silu
from afd_fast.reference.vae import with_past
from afd_fast.students.files import loading

MOST_FRAMES = 3  # latent frames per call where memory allows
SHARE = 8  # a call's temporary tensors may take an eighth of a GPU's memory
TENSORS = (
    6  # of the last level's size that are alive at the peak, counted on the meta device: 5 in Wan 2.1, 6 in Wan 2.2
)


def channels_last(vae: nn.Module) -> None:
    """The convolutions' weights to channels-last, the layout of cuDNN's Hopper kernels; their outputs get it too."""
    for module in vae.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            form = torch.channels_last if isinstance(module, nn.Conv2d) else torch.channels_last_3d
            module.weight.data = module.weight.data.contiguous(memory_format=form)


class Tile(NamedTuple):
    """A part of the frame in latent pixels: rows [top, bottom), columns [left, right)."""

    top: int
    bottom: int
    left: int
    right: int


class WanDecoder:
    """Decoder and encoder around `vae`, an AutoencoderKLWan of diffusers, which has no types.

    chunk: latent frames per call after the first frame (more are faster and take more memory); None: 3, on CUDA fewer
    where the temporary tensors of 3 would take more than an eighth of the GPU's memory. tile: side of the tiles in pixels
    of video, a multiple of s; None: whole frames, or what `vae.enable_tiling` says. Tiles change memory and time (at
    720p 1.3 times the work at 256, 1.15 at 512), not pixels. Give the VAE where it is to stay: on CUDA its weights get another
    layout (`channels_last`).
    """

    def __init__(self, vae: Any, *, chunk: int | None = None, tile: int | None = None):
        if chunk is not None and chunk < 1:
            raise ValueError(f"got chunk={chunk}, expected at least 1 latent frame per call")
        self.vae, self.chunk, self.tile = vae.eval().requires_grad_(False), chunk, tile
        config = vae.config
        self.patch: int = config.patch_size or 1
        self.scale = self.patch * 2 ** (len(vae.decoder.up_blocks) - 1)  # s
        if tile is not None and (tile < self.scale or tile % self.scale):
            raise ValueError(f"got tile={tile}, expected a multiple of {self.scale} pixels, the side of a latent pixel")
        if len(config.latents_mean) != config.z_dim or len(config.latents_std) != config.z_dim:
            raise ConfigError(
                f"the VAE has {config.z_dim} channels, its config.json {len(config.latents_mean)} latents_mean and "
                f"{len(config.latents_std)} latents_std: restore the file"
            )
        device = next(vae.parameters()).device
        if device.type == "cuda":
            channels_last(vae)
        shape = (1, -1, 1, 1, 1)
        self.mean = torch.tensor(config.latents_mean, dtype=torch.float32, device=device).view(shape)
        self.std = torch.tensor(config.latents_std, dtype=torch.float32, device=device).view(shape)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cuda",
        chunk: int | None = None,
        tile: int | None = None,
    ) -> "WanDecoder":
        """From a diffusers Wan folder or repository (its `vae` subfolder), or the folder of the VAE alone. Raises
        ConfigError that names the folder or repository if it cannot be loaded."""
        with extra("train"):
            from diffusers import AutoencoderKLWan

        subfolder = None if (Path(path) / "config.json").exists() else "vae"
        with loading("vae", path):
            settings = AutoencoderKLWan.load_config(path, subfolder=subfolder)
        if (kind := settings.get("_class_name", "AutoencoderKLWan")) != "AutoencoderKLWan":
            raise ConfigError(f"{path} holds the VAE of another model ({kind}): give a Wan model's AutoencoderKLWan")
        with loading("vae", path):
            vae = AutoencoderKLWan.from_pretrained(path, torch_dtype=dtype, subfolder=subfolder)
        return cls(vae.to(device), chunk=chunk, tile=tile)

    def stream(self) -> "DecoderStream":
        """A decoder that keeps the state of the earlier frames: call it with the chunks of `rollout.stream` in order."""
        return DecoderStream(self)

    def __call__(self, latents: Tensor) -> Tensor:
        """Latents [B, C, F, H, W], as the student makes them, to pixels [B, 3, 4 F - 3, s H, s W] in [0, 1], float32.
        Differentiable in the latents. Tiled, it decodes one tile's whole video after the other and keeps one tile's state."""
        return DecoderStream(self, whole=True)(latents)

    decode = __call__

    @torch.no_grad()
    def encode(self, videos: Tensor) -> Tensor:
        """Pixels [B, 3, 4 F - 3, s H, s W] in [0, 1] to the student's latents [B, C, F, H, W], float32: the mode of the
        posterior, normalised. Raises ValueError for other sizes, of which the VAE would drop what does not fill a latent.
        With `vae.enable_tiling` it is diffusers' tiled encoder, which blends."""
        s = self.scale
        if videos.ndim != 5 or videos.shape[2] % 4 != 1 or videos.shape[3] % s or videos.shape[4] % s:
            raise ValueError(
                f"got videos {list(videos.shape)}, expected [B, 3, 4 F - 3, {s} H, {s} W]: cut or pad them"
            )
        weight = next(self.vae.parameters())
        latents = self.vae.encode((videos * 2 - 1).to(weight.device, weight.dtype)).latent_dist.mode().float()
        return (latents - self.mean.to(latents.device)) / self.std.to(latents.device)

    def reencode(self, latents: Tensor, pixels: Tensor) -> Tensor:
        """A latent [B, C, 1, H, W] as of a video's first frame: the last frame of video that the first of these latent frames
        [B, C, f, H, W] became, encoded alone. pixels: the chunk's, as the decoder or its `stream` gave them. For `rollout`:
        `first_frame=lambda chunk: decoder.reencode(chunk, stream(chunk))` with `stream = decoder.stream()`."""
        last = pixels.shape[2] - 4 * (latents.shape[2] - 1) - 1
        return self.encode(pixels[:, :, last : last + 1])

    def tiles(self, height: int, width: int) -> list[Tile]:
        """The tiles of a frame of height x width latent pixels, row by row; one if it is not divided."""
        vae, side = self.vae, self.tile
        if side is not None:
            rows = columns = side // self.scale
        elif vae.use_tiling and (
            height * self.scale > vae.tile_sample_min_height or width * self.scale > vae.tile_sample_min_width
        ):
            strides = (vae.tile_sample_stride_height, vae.tile_sample_stride_width)
            rows, columns = (max(int(stride) // self.scale, 1) for stride in strides)
        else:
            return [Tile(0, height, 0, width)]
        return [
            Tile(y, min(y + rows, height), x, min(x + columns, width))
            for y in range(0, height, rows)
            for x in range(0, width, columns)
        ]

    def chunk_for(self, batch: int, tile: Tile, memory: int) -> int:
        """Latent frames of such a tile per call of which `memory` bytes hold the temporary tensors: 1 to 3."""
        weight, channels = next(self.vae.parameters()), self.vae.decoder.norm_out.gamma.numel()
        pixels = (tile.bottom - tile.top) * (tile.right - tile.left) * (self.scale // self.patch) ** 2
        each = TENSORS * 4 * batch * channels * pixels * weight.element_size()
        return max(1, min(MOST_FRAMES, memory // each))


class DecoderStream:
    """The decoder's state over one batch of videos. Call it with [B, C, f, H, W]: the first latent frame becomes one
    frame of video, every later one becomes four.

    It walks through the modules of diffusers' decoder, with the norm, SiLU, the earlier frames and the convolution's
    padding in one pass instead of sixteen, and upsampling in the data's dtype: the same bits. whole: the first call has
    the whole video, so that a tile's state is dropped after it.
    """

    def __init__(self, decoder: WanDecoder, *, whole: bool = False):
        self.decoder, self.whole = decoder, whole
        self.past: dict[
            tuple[Tile | None, nn.Module], Tensor
        ] = {}  # the last two frames that a causal convolution read
        self.tile: Tile | None = None  # that is decoded now
        self.shape: tuple[int, ...] | None = None
        self.frames = 0

    def __call__(self, latents: Tensor) -> Tensor:
        """Pixels in [0, 1] of these latent frames. Raises ValueError if the batch or size changes."""
        decoder, vae = self.decoder, self.decoder.vae
        if latents.ndim != 5 or latents.shape[1] != vae.config.z_dim:
            raise ValueError(f"got latents {tuple(latents.shape)}; latents must be [B, {vae.config.z_dim}, F, H, W]")
        shape = (latents.shape[0], *latents.shape[3:])
        if self.shape not in (None, shape):
            raise ValueError(f"got (B, H, W) = {shape}, this stream decodes {self.shape}: start a new one")
        self.shape = shape
        weight = next(vae.parameters())
        mean, std = (a.to(weight.device) for a in (decoder.mean, decoder.std))
        z = _convolve(vae.post_quant_conv, (latents.to(weight.device).float() * std + mean).to(weight.dtype))
        tiles = decoder.tiles(*shape[1:])
        parts = z.split(self._sizes(z.shape[2], tiles[0]), 2)
        if len(tiles) == 1:
            pieces = [self._pixels(self._middle(vae.decoder, part), None, at) for at, part in self._placed(parts)]
            self.frames += z.shape[2]
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)
        middles = [(at, self._middle(vae.decoder, part)) for at, part in self._placed(parts)]
        s, start = decoder.scale, max(4 * self.frames - 3, 0)
        frames = 4 * (self.frames + z.shape[2]) - 3 - start
        size = (shape[0], vae.config.out_channels // decoder.patch**2, frames, s * shape[1], s * shape[2])
        video = torch.empty(size, dtype=torch.float32, device=z.device)
        for tile in tiles:
            rows, columns = slice(s * tile.top, s * tile.bottom), slice(s * tile.left, s * tile.right)
            for at, x in middles:
                first = max(4 * at - 3, 0) - start
                pixels = self._pixels(x, tile, at)
                video[:, :, first : first + pixels.shape[2], rows, columns] = pixels
            if self.whole:
                self.past = {}
        self.frames += z.shape[2]
        return video

    def _sizes(self, frames: int, tile: Tile) -> list[int]:
        """Latent frames of each call: the video's first by itself."""
        chunk = self.decoder.chunk
        if chunk is None:
            device, chunk = next(self.decoder.vae.parameters()).device, MOST_FRAMES
            if device.type == "cuda":
                assert self.shape is not None
                memory = torch.cuda.get_device_properties(device).total_memory // SHARE
                chunk = self.decoder.chunk_for(self.shape[0], tile, memory)
        first = [1] if self.frames == 0 else []
        rest = frames - len(first)
        return first + [chunk] * (rest // chunk) + ([rest % chunk] if rest % chunk else [])

    def _placed(self, parts: tuple[Tensor, ...]) -> list[tuple[int, Tensor]]:
        """Each part with the place of its first latent frame in the video."""
        return list(zip(accumulate((part.shape[2] for part in parts), initial=self.frames), parts))

    def _middle(self, net: Any, x: Tensor) -> Tensor:
        """Everything at the latents' size, on whole frames."""
        self.tile = None
        x = self._causal(net.conv_in, x)
        x = self._block(net.mid_block.resnets[0], x)
        for attention, block in zip(net.mid_block.attentions, net.mid_block.resnets[1:]):
            x = self._block(block, attention(x))
        return x

    def _pixels(self, x: Tensor, tile: Tile | None, at: int) -> Tensor:
        """`_middle`'s frames from latent frame `at` on to pixels in [0, 1]: of a tile, None for the whole frame."""
        net, self.tile, halos = self.decoder.vae.decoder, tile, _halos(self.decoder.vae.decoder)
        height, width = x.shape[3:]
        origin = (0, 0)  # the place of x's first pixel, in pixels of the level
        for level, up in enumerate(net.up_blocks):
            if tile is not None:
                x, origin = _cropped(x, origin, tile, 2**level, halos[level], (height, width))
            entered = x
            for block in up.resnets:
                x = self._block(block, x)
            if (resample := _upsampler(up)) is not None:
                x, origin = self._upsample(resample, x, at), (2 * origin[0], 2 * origin[1])
            if getattr(up, "avg_shortcut", None) is not None:
                x = x.add_(up.avg_shortcut(entered, first_chunk=at == 0))
        x = self._norm_causal(net.norm_out, net.conv_out, x)
        if tile is not None:
            x, _ = _cropped(x, origin, tile, 2 ** (len(net.up_blocks) - 1), 0, (height, width))
        if self.decoder.patch > 1:  # channels [colour, column, row] of a patch
            x = x.unflatten(1, (-1, self.decoder.patch, self.decoder.patch)).permute(0, 1, 4, 5, 3, 6, 2)
            x = x.flatten(5, 6).flatten(3, 4)
        return x.float().clamp(-1, 1).add(1).div(2)

    def _causal(self, conv: Any, x: Tensor) -> Tensor:
        x, self.past[self.tile, conv] = with_past(x, self.past.get((self.tile, conv)))
        return _convolve(conv, x)

    def _norm_causal(self, norm: Any, conv: Any, x: Tensor) -> Tensor:
        x, self.past[self.tile, conv] = norm_silu(x, norm.gamma.flatten(), self.past.get((self.tile, conv)))
        return _convolve(conv, x)

    def _block(self, block: Any, x: Tensor) -> Tensor:
        short = x if isinstance(block.conv_shortcut, nn.Identity) else _convolve(block.conv_shortcut, x)
        x = self._norm_causal(block.norm1, block.conv1, x)
        return self._norm_causal(block.norm2, block.conv2, x).add_(short)

    def _upsample(self, resample: Any, x: Tensor, at: int) -> Tensor:
        """Twice the height and width; twice the frames where it has a `time_conv`, but for the video's first frame."""
        batch = x.shape[0]
        if resample.mode == "upsample3d" and at:
            x = _interleaved(self._causal(resample.time_conv, x))
        else:
            x = x.transpose(1, 2).flatten(0, 1)
        x = resample.resample[1](F.interpolate(x, scale_factor=2.0, mode="nearest-exact"))
        return x.unflatten(0, (batch, -1)).transpose(1, 2)


def _upsampler(up: Any) -> Any:
    """The upsampling of a block of Wan 2.1 (`upsamplers`) or Wan 2.2 (`upsampler`); None in the last block."""
    found = getattr(up, "upsamplers", None)
    return found[0] if found else getattr(up, "upsampler", None)


def _halos(net: Any) -> list[int]:
    """Pixels around a tile that each level needs, in its own pixels: one for every convolution of width 3 from there on."""
    halos, need = [0] * len(net.up_blocks), 1  # conv_out
    for level in reversed(range(len(net.up_blocks))):
        if _upsampler(net.up_blocks[level]) is not None:
            need = (need + 1 + 1) // 2  # its convolution follows the upsampling
        need += 2 * len(net.up_blocks[level].resnets)
        halos[level] = need
    return halos


def _cropped(
    x: Tensor, origin: tuple[int, int], tile: Tile, scale: int, halo: int, size: tuple[int, int]
) -> tuple[Tensor, tuple[int, int]]:
    """x [B, C, F, h, w], whose first pixel lies at `origin`, cut to the tile and `halo` pixels around it, and the place of
    its first pixel. scale: pixels of this level per latent pixel; size: of the frame in latent pixels."""
    top, left = max(scale * tile.top - halo, 0), max(scale * tile.left - halo, 0)
    bottom, right = min(scale * tile.bottom + halo, scale * size[0]), min(scale * tile.right + halo, scale * size[1])
    form = torch.channels_last_3d if x.stride(1) == 1 else torch.contiguous_format
    x = x[..., top - origin[0] : bottom - origin[0], left - origin[1] : right - origin[1]]
    return x.contiguous(memory_format=form), (top, left)


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

"""The discriminator of the embedded task: a few strided convolutions, conditioned on the prompt.

Legend: B videos, F frames, H x W pixels.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd_fast.discriminators.discriminator import Clips, Discriminator, check_counts
from afd_fast.errors import ConfigError
from afd_fast.students.toy.model import ToyConfig
from afd_fast.students.toy.text import PromptEmbedding, tokenize
from afd_fast.video_io import VideoFormat


class ToyDiscriminator(Discriminator):
    """D(video, prompt): frames and frame differences stacked as channels (temporal kernels of full length; on
    a CPU an order of magnitude faster than 3-D convolutions), strided 2-D convolutions, FiLM by the prompt.

    Without the FiLM (a projection head alone) it learns to tell teacher from student and ignores the prompt. Videos
    of other sizes, a full student's, are reduced to the configuration's: frames from first to last, area means.
    """

    def __init__(self, config: ToyConfig = ToyConfig(), width: int = 48, dim: int = 64):
        super().__init__()
        self.config = config
        channels = 3 * (2 * config.frames - 1)
        self.convs = nn.Sequential(
            nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 2 * width, 4, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(),
        )  # fmt: skip
        features = 2 * width * (config.height // 8) * (config.width // 8)
        self.features = nn.Sequential(nn.Linear(features, 2 * dim), nn.LeakyReLU(0.2))
        self.prompt, self.prompt_norm = PromptEmbedding(dim), nn.LayerNorm(dim)
        self.film = nn.Linear(dim, 4 * dim)
        self.head, self.project = nn.Linear(2 * dim, 1), nn.Linear(2 * dim, dim)

    def score(self, videos: Clips, prompts: Sequence[str]) -> Tensor:
        """How much videos [B, 3, F, H, W] in [0, 1] look like the teacher's for their prompts: [B], higher is better."""
        assert isinstance(videos, Tensor)
        check_counts(prompts, videos=videos)
        x = (self.reduce(videos) * 2 - 1).transpose(1, 2)  # [B, F, 3, H, W]
        stacked = torch.cat([x, x[:, 1:] - x[:, :-1]], 1).flatten(1, 2)
        prompt = self.prompt_norm(self.prompt(tokenize(list(prompts)).to(x.device))[1])  # [B, dim]
        scale, shift = self.film(prompt).chunk(2, -1)
        h = self.features(self.convs(stacked)) * (1 + scale) + shift
        return self.head(F.leaky_relu(h, 0.2))[:, 0] + (self.project(h) * prompt).mean(1)

    def reduce(self, videos: Tensor) -> Tensor:
        """[B, 3, F, H, W] -> the configuration's frames, height and width; ValueError for smaller videos."""
        c = self.config
        size, found = (c.frames, c.height, c.width), tuple(videos.shape[2:])
        if found == size:
            return videos
        if any(a < b for a, b in zip(found, size)):
            raise ValueError(f"videos of {found} frames x height x width are smaller than this discriminator's {size}")
        index = torch.linspace(0, found[0] - 1, c.frames, dtype=torch.float32).round().long().to(videos.device)
        x = videos.index_select(2, index).transpose(1, 2)
        return F.interpolate(x.flatten(0, 1), size[1:], mode="area").view(*x.shape[:3], *size[1:]).transpose(1, 2)


def toy_discriminator(video: VideoFormat, width: int) -> ToyDiscriminator:
    """The discriminator for videos of this format: of the format's own size up to 32 pixels, else of the reduced
    default size."""
    default = ToyConfig()
    if max(video.height, video.width) > 32:
        if video.frames < default.frames or min(video.height, video.width) < default.height:
            raise ConfigError(
                f"the discriminator 'toy' needs videos of {default.frames} frames and {default.height}x{default.width} pixels or more, "
                f"got {video.frames} of {video.height}x{video.width}: make them longer or larger, or set discriminator=pixel"
            )
        return ToyDiscriminator(default, width)
    return pixel_discriminator(video, width)


def pixel_discriminator(video: VideoFormat, width: int) -> ToyDiscriminator:
    """The discriminator of the videos' own size."""
    size = {"frames": video.frames, "height": video.height, "width": video.width}
    return ToyDiscriminator(replace(ToyConfig(), **size), width)

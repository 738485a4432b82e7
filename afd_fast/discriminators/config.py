"""The discriminator a configuration names: a registry, and the settings of its training."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

from afd_fast.discriminators.discriminator import Discriminator, check_discriminator
from afd_fast.discriminators.objective import Objective
from afd_fast.errors import ConfigError, check_at_least
from afd_fast.students.files import check_named
from afd_fast.students.student import check_device, placing
from afd_fast.video_io import VideoFormat


@dataclass(frozen=True)
class DiscriminatorConfig(Objective):
    """Which discriminator, and how it is trained; with the fields of `Objective`.

    name: toy (a few convolutions), pixel (toy at the videos' full size), another registered one, or a folder or repository of VideoAlign's VideoReward.
    lr: learning rate of AdamW.
    lr_auto: double the learning rate where the discriminator is stale and halve it where it overpowers (Figure 5).
    steps: discriminator updates per iteration.
    warmup: iterations that train the discriminator alone before the first student update.
    width: channels of the toy or pixel discriminator; none: 48.
    lora_rank: rank of VideoReward's adapters; none: 64.
    device: where it lives, such as cuda:1; none: with the student.
    """

    name: str = "toy"
    lr: float = 2e-4
    lr_auto: bool = False
    steps: int = 1
    warmup: int = 20
    width: int | None = None
    lora_rank: int | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 0, "lr", "warmup")
        check_at_least(self, 1, "steps")
        check_device(self.device)
        used = entry(self.name).keys
        for name in ("width", "lora_rank"):
            if getattr(self, name) is not None and name not in used:
                raise ConfigError(f"{name} has no meaning for the discriminator {self.name!r}: leave it out")
        check_at_least(self, 1, "width", "lora_rank")

    @property
    def objective(self) -> Objective:
        """The loss alone."""
        return Objective(**{f.name: getattr(self, f.name) for f in fields(Objective)})


class DiscriminatorEntry(NamedTuple):
    """A registered discriminator. make: (DiscriminatorConfig, VideoFormat) -> Discriminator. keys: of
    DiscriminatorConfig that it alone reads."""

    make: Callable[[DiscriminatorConfig, VideoFormat], Discriminator]
    keys: tuple[str, ...] = ()


def _toy(config: DiscriminatorConfig, video: VideoFormat) -> Discriminator:
    from afd_fast.discriminators.toy import toy_discriminator

    return toy_discriminator(video, config.width or 48)


def _pixel(config: DiscriminatorConfig, video: VideoFormat) -> Discriminator:
    from afd_fast.discriminators.toy import pixel_discriminator

    return pixel_discriminator(video, config.width or 48)


def _video_reward(config: DiscriminatorConfig, video: VideoFormat) -> Discriminator:
    from afd_fast.discriminators.videoalign.checkpoints import load_video_reward

    return load_video_reward(config.name, lora_rank=config.lora_rank or 64)


DISCRIMINATORS: dict[str, DiscriminatorEntry] = {
    "toy": DiscriminatorEntry(_toy, ("width",)),
    "pixel": DiscriminatorEntry(_pixel, ("width",)),
}
VIDEO_REWARD = DiscriminatorEntry(_video_reward, ("lora_rank",))


def register_discriminator(name: str, entry: DiscriminatorEntry) -> None:
    """Make `discriminator.name=NAME` known. ConfigError for a name that is taken."""
    if name in DISCRIMINATORS:
        raise ConfigError(f"a discriminator named {name!r} exists already")
    DISCRIMINATORS[name] = entry


def entry(name: str) -> DiscriminatorEntry:
    """The registered discriminator of a name; a checkpoint's is VideoReward."""
    return DISCRIMINATORS.get(name, VIDEO_REWARD)


def new_discriminator(config: DiscriminatorConfig, video: VideoFormat, device: torch.device) -> Discriminator:
    """The discriminator for videos of this format, on its device. ConfigError for a device that is not there."""
    check_named("discriminator", config.name, DISCRIMINATORS)
    found = check_discriminator(entry(config.name).make(config, video))
    with placing("discriminator.device", config.device):
        return found.to(config.device or device)

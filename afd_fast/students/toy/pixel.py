"""A small student for a user's own videos: a ToyStudent of their aspect, pretrained on augmentations of these very videos.

Legend: B clips, F frames, H x W pixels.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_fast.errors import ConfigError, extra
from afd_fast.files.tensors import save_tensors
from afd_fast.students.files import loading
from afd_fast.students.student import Family, StudentConfig
from afd_fast.students.toy.family import of_student
from afd_fast.students.toy.model import ToyConfig, ToyStudent, encode_video
from afd_fast.students.toy.pretrain import Batch, Kept, Report, fit
from afd_fast.students.toy.text import tokenize
from afd_fast.video_io import VideoFormat

with extra("demo"):
    from safetensors import safe_open

BATCH = 8
LARGEST = 48 * 80  # pixels of a frame, where the user names no size
SMALLEST_CROP, BRIGHTNESS, MIXED = 0.7, 0.3, 0.5  # of the augmentations


def config_for(video: VideoFormat) -> ToyConfig:
    """The student's sizes for videos of this format. ConfigError for what it cannot make."""
    unit, chunk = ToyConfig.patch, ToyConfig.chunk
    if video.height % unit or video.width % unit or min(video.height, video.width) < unit:
        raise ConfigError(f"height and width must be multiples of {unit}, got {video.height}x{video.width}")
    if video.frames < chunk or video.frames % chunk:
        raise ConfigError(f"frames must be a multiple of {chunk}, got {video.frames}")
    return ToyConfig(frames=video.frames, height=video.height, width=video.width, text_len=32)


def size_for(aspect: float) -> tuple[int, int]:
    """(height, width) of at most LARGEST pixels, whose width / height comes closest to `aspect`."""
    unit = ToyConfig.patch
    sides = range(2 * unit, LARGEST // (2 * unit) + 1, unit)
    sizes = [(h, w) for h in sides for w in sides if LARGEST // 2 <= h * w <= LARGEST]
    return min(sizes, key=lambda size: (abs(size[1] / size[0] - aspect) / aspect, -size[0] * size[1]))


def augmented(videos: Tensor) -> Tensor:
    """Clips [B, 3, F, H, W] in [0, 1], each mirrored, cropped, brightened and tinted at random."""
    size, out = videos.shape[3:], []
    for video in videos:
        scale = SMALLEST_CROP + (1 - SMALLEST_CROP) * torch.rand((), dtype=torch.float32).item()
        height, width = (max(1, round(side * scale)) for side in size)
        top, left = (int(torch.randint(0, a - b + 1, ()).item()) for a, b in zip(size, (height, width)))
        part = video[:, :, top : top + height, left : left + width].transpose(0, 1)
        x = F.interpolate(part, tuple(size), mode="bilinear", align_corners=False).transpose(0, 1)
        x = x.flip(-1) if torch.rand((), dtype=torch.float32).item() < MIXED else x
        gain = 1 + BRIGHTNESS * (2 * torch.rand(3, 1, 1, 1, dtype=torch.float32) - 1)
        out.append((x * gain).clamp(0, 1))
    return torch.stack(out)


def pretrain(
    videos: Mapping[str, Tensor], video: VideoFormat, steps: int, *, seed: int, report: Report, kept: Kept | None = None
) -> ToyStudent:
    """A base student that has seen only augmentations of the videos {prompt: [M, 3, F, H, W] uint8}."""
    torch.manual_seed(seed)
    config = config_for(video)
    clips = torch.cat(list(videos.values()))
    ids = tokenize([prompt for prompt, found in videos.items() for _ in found], config.text_len)

    def draw() -> Batch:
        pick = torch.randint(0, len(clips), (BATCH,))
        return Batch(encode_video(augmented(clips[pick].float() / 255)), ids[pick])

    return fit(ToyStudent(config), draw, steps, lr=2e-3, report=report, kept=kept)


def save(student: ToyStudent, video: VideoFormat, path: Path, made: dict[str, Any]) -> None:
    """The weights with what loading them needs, and how they were made."""
    header = {"config": json.dumps(asdict(student.config)), "fps": json.dumps(video.fps), "made": json.dumps(made)}
    save_tensors(student.state_dict(), path, header)


def made_by(path: Path) -> dict[str, Any]:
    """How the weights were made, as `save` was told. ConfigError for another file."""
    with loading("pixel student", path), safe_open(path, "pt") as file:
        return dict(json.loads(file.metadata()["made"]))


def load(path: Path) -> Family:
    """The family of weights that `save` or a run wrote. ConfigError for another file."""
    with loading("pixel student", path), safe_open(path, "pt") as file:
        about = file.metadata()
        student = ToyStudent(ToyConfig(**json.loads(about["config"])))
        student.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
        return of_student(student, fps=float(json.loads(about["fps"])))


def pixel_family(config: StudentConfig, chunk: int = 3, seed: int = 0) -> Family:
    """The family of the weights at `config.base`. ConfigError without them."""
    if config.base is None:
        raise ConfigError(
            "the student 'pixel' needs student.base=FILE, the weights that afd-fast distill --videos DIR makes"
        )
    family = load(Path(config.base))
    family.student.to(config.device or "cpu")
    return family

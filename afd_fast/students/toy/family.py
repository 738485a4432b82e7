"""The embedded task's family: a small student whose latents are pixels."""

import json
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor

from afd_fast.errors import ConfigError
from afd_fast.files.tensors import save_tensors
from afd_fast.students.student import Facts, Family, LatentFormat, StudentConfig, TrainedWeights
from afd_fast.students.toy import shipped
from afd_fast.students.toy.model import ToyStudent, decode_video, encode_video
from afd_fast.students.toy.pretrain import WORLDS
from afd_fast.students.toy.text import tokenize
from afd_fast.teachers import physics
from afd_fast.video_io import VideoFormat

LORA_TARGETS = ("qkv", "proj", "up", "down")


class PixelVAE:
    """Latents are pixels in [-1, 1]."""

    def encode(self, videos: Tensor) -> Tensor:
        return encode_video(videos)

    def decode(self, latents: Tensor) -> Tensor:
        return decode_video(latents)


def toy_family(config: StudentConfig, chunk: int = 3, seed: int = 0) -> Family:
    """The base student at `config.base`, or the shipped one that `config.name` names. ConfigError for one with other chunks."""
    student = shipped.load(None if config.base is None else Path(config.base), name=config.name)
    if student.config.chunk != chunk:
        raise ConfigError(
            f"student.base={config.base} makes chunks of {student.config.chunk} frames, and the student {config.name!r} of {chunk}: "
            "give it to the run of its own world"
        )
    world = WORLDS["lights" if config.name.startswith("lights") else "looks"]
    return replace(of_student(student.to(config.device or "cpu")), prompts=frozenset(world.prompts))


def of_student(student: ToyStudent, *, fps: float = physics.FPS) -> Family:
    """The family around any ToyStudent. fps: of its videos."""
    c = student.config

    def text(prompts: list[str]) -> Tensor:
        return tokenize(prompts, c.text_len)

    def save(weights: TrainedWeights, about: Facts, folder: Path) -> None:
        header = {"config": json.dumps(asdict(c)), "fps": json.dumps(fps), "run": json.dumps(about)}
        save_tensors(weights.merged, folder / "student.safetensors", header)

    return Family(
        name="toy",
        student=student,
        text=text,
        vae=PixelVAE(),
        latents=LatentFormat(3, c.frames, c.height, c.width),
        chunk=c.chunk,
        video=VideoFormat(c.frames, c.height, c.width, fps),
        lora_targets=LORA_TARGETS,
        save=save,
    )

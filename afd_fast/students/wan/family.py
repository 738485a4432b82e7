"""The families of causal Wan students: a checkpoint with its text encoder and VAE, or a tiny random one."""

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from afd_fast.errors import ConfigError, extra
from afd_fast.files.tensors import save_tensors
from afd_fast.files.text import read_json
from afd_fast.sampler import HOW_FAST
from afd_fast.students.files import SUFFIXES, check_source, local_copy, tensor_names
from afd_fast.students.student import Facts, Family, LatentFormat, StudentConfig, TrainedWeights
from afd_fast.students.wan.checkpoints import Loras, experts_of, load_student, save_student
from afd_fast.students.wan.experts import TwoExperts
from afd_fast.students.wan.layers import CausalWanConfig
from afd_fast.students.wan.model import CausalWan
from afd_fast.students.wan.preview import PreviewDecoder
from afd_fast.students.wan.supported import ONE_EXPERT, check_file
from afd_fast.students.wan.text import TextEncoder
from afd_fast.students.wan.vae import WanDecoder
from afd_fast.video_io import VideoFormat

LORA_TARGETS = (
    *(f"{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in "qkvo"),
    "ffn.0",
    "ffn.2",
)
FPS, FPS_2_2 = 16, 24  # of Wan 2.1 and of Wan2.2-TI2V-5B (wan/configs/{shared_config,wan_ti2v_5B}.py)
BASE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
SIZE = LatentFormat(16, 21, 60, 104)  # 81 frames of 480 x 832
TINY_SIZE = LatentFormat(16, 6, 6, 10)  # 21 frames of 48 x 80


class Encoder(Protocol):
    """Prompts to embeddings [n_i, text_dim]."""

    def __call__(self, prompts: list[str]) -> list[Tensor]: ...


@dataclass
class Networks:
    """A student with its text encoder and VAE, or a preview decoder in the VAE's place, on one device."""

    student: CausalWan | TwoExperts
    text: Encoder
    vae: WanDecoder | PreviewDecoder

    @property
    def fps(self) -> int:
        """Frames per second of its videos."""
        return FPS_2_2 if self.vae.patch > 1 else FPS


class HashText:
    """Random embeddings that depend on the prompt alone: stands in for UMT5 where there are no weights."""

    def __init__(self, text_dim: int, text_len: int):
        self.text_dim, self.text_len = text_dim, text_len

    def __call__(self, prompts: list[str]) -> list[Tensor]:
        rows = []
        for prompt in prompts:
            g = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
            rows.append(
                torch.randn(
                    min(self.text_len, len(prompt.split()) + 1), self.text_dim, generator=g, dtype=torch.float32
                )
            )
        return rows


class KnownPrompts:
    """An encoder that encodes every prompt once and keeps the embeddings in host memory."""

    def __init__(self, encode: Encoder, device: torch.device):
        self.encode, self.device = encode, device
        self.known: dict[str, Tensor] = {}

    def __call__(self, prompts: list[str]) -> list[Tensor]:
        new = [p for p in dict.fromkeys(prompts) if p not in self.known]
        if new:
            self.known.update(zip(new, (x.cpu() for x in self.encode(new)), strict=True))
        return [self.known[p].to(self.device) for p in prompts]


class Coder(NamedTuple):
    """What a VAE's config.json says: its latents' channels, the side of a latent pixel, and its videos' rate."""

    channels: int
    scale: int
    fps: int


def coder_of(student: str, base: str | None = None) -> Coder:
    """The VAE that comes with a student, read without its weights. ConfigError for one that is not Wan's."""
    if student == "tiny":
        return Coder(16, 8, FPS)
    _check_names(Path(student))  # before anything is downloaded for it
    folder = local_copy(base or BASE, ["vae/config.json"])
    file = folder / "vae/config.json"
    if not file.is_file():
        raise ConfigError(
            f"{folder} has no vae/config.json: give the diffusers folder or repository of a Wan model as base"
        )
    settings = read_json(file)
    kind = settings.get("_class_name", "AutoencoderKLWan")
    if kind != "AutoencoderKLWan":
        raise ConfigError(
            f"{file} is the VAE of another model ({kind}): give the diffusers folder of a Wan model as base"
        )
    patch = settings.get("patch_size") or 1
    return Coder(settings.get("z_dim", 16), 8 * patch, FPS_2_2 if patch > 1 else FPS)


def _check_names(path: Path) -> None:
    """ConfigError for a file or folder without a Wan student's tensors, of which the names alone are read."""
    if not path.exists():
        return
    place = path / "transformer" if (path / "transformer").is_dir() else path
    files = [file for file in place.iterdir() if file.suffix in SUFFIXES] if path.is_dir() else [path]
    if (path.is_file() or experts_of(str(path)) is None) and not any(
        "patch_embedding." in name for file in files for name in tensor_names(file)
    ):
        what = (
            "none of the tensors in it is a Wan student's patch_embedding" if files else "there is no checkpoint in it"
        )
        raise ConfigError(f"{path} is no causal Wan student: {what} (docs/models.md says which there are)")


def _check_fit(model: CausalWan | TwoExperts, student: str, channels: int, decoder: str | Path | None) -> None:
    """ConfigError for a decoder of latents with other channels than the student's."""
    if model.config.in_dim != channels:
        raise ConfigError(
            f"{student} has latents of {model.config.in_dim} channels, the decoder of {decoder} has {channels}: give that of "
            "the student's own base model"
        )


def load_networks(
    student: str,
    base: str | None = None,
    seed: int = 0,
    device: str | None = None,
    lora: Loras | None = None,
    preview: str | Path | None = None,
) -> Networks:
    """`tiny(seed)` for "tiny", else the checkpoint `student` in bfloat16 with adapters as of `load_student`, and the text
    encoder and VAE of the diffusers repository `base`. device: None is the GPU where there is one. preview: weights of a
    `PreviewDecoder` in the VAE's place. ConfigError for a decoder that does not fit the student, before the text encoder is read.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    decoder = None
    if preview is not None:
        half = torch.float32 if student == "tiny" else torch.bfloat16
        decoder = PreviewDecoder.from_file(preview, dtype=half, device=device)
    if student == "tiny":
        networks = tiny(seed, device)
        if decoder is not None:
            _check_fit(networks.student, student, decoder.channels, preview)
            networks.vae = decoder
        return networks
    check_source(student)  # before the base is downloaded
    channels = coder_of(student, base).channels if decoder is None else decoder.channels  # before the student is read
    base = base or BASE
    model = load_student(student, dtype=torch.bfloat16, device=device, lora=lora)
    _check_fit(model, student, channels, preview or base)
    text = TextEncoder.from_pretrained(base, device=device)
    return Networks(model, text, decoder or WanDecoder.from_pretrained(base, device=device))


def tiny(seed: int = 0, device: str = "cpu") -> Networks:
    """Random weights in float32, for trying things without a download; latents of 6 x 10 or so are 48 x 80 pixels.
    Needs diffusers for the VAE's architecture."""
    with extra("train"):
        from diffusers import AutoencoderKLWan

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = CausalWan(CausalWanConfig.tiny()).eval().to(device)
        vae: Any = AutoencoderKLWan(base_dim=4, num_res_blocks=1)  # no types
    return Networks(student, HashText(student.config.text_dim, student.config.text_len), WanDecoder(vae.to(device)))


def latent_size(config: StudentConfig, chunk: int) -> LatentFormat:
    """The latents a configuration names. ConfigError for sizes a Wan student cannot have."""
    default = TINY_SIZE if config.name == "tiny" else SIZE
    size = LatentFormat(
        default.channels,
        config.frames or default.frames,
        config.height or default.height,
        config.width or default.width,
    )
    for name, value, unit in (("frames", size.frames, chunk), ("height", size.height, 2), ("width", size.width, 2)):
        if value % unit:
            few = max(value // unit, 1) * unit
            raise ConfigError(
                f"student.{name}={value} must be a multiple of {unit}, such as {few} or {few + unit}: a Wan student makes whole "
                f"chunks (rollout.chunk={chunk}) of latents of even height and width"
            )
    return size


def wan_family(config: StudentConfig, chunk: int = 3, seed: int = 0) -> Family:
    """The family of `config.name` and `config.base`. ConfigError as of `latent_size`."""
    check_file(Path(config.name))
    if config.name != "tiny" and experts_of(config.name) is not None:  # before they are read
        raise ConfigError(ONE_EXPERT)
    size = latent_size(config, chunk)
    networks = load_networks(config.name, config.base, seed, config.device)
    student, vae = networks.student.requires_grad_(False), networks.vae
    assert isinstance(student, CausalWan) and isinstance(vae, WanDecoder)  # rewards need its pixels
    side = vae.scale
    student.gradient_checkpointing = config.gradient_checkpointing

    def save(weights: TrainedWeights, about: Facts, folder: Path) -> None:
        save_run(student, weights, about, folder)

    return Family(
        name="wan",
        student=student,
        text=KnownPrompts(networks.text, student.device),
        vae=vae,
        latents=size._replace(channels=student.config.in_dim),
        chunk=chunk,
        video=VideoFormat(4 * size.frames - 3, side * size.height, side * size.width, networks.fps),
        lora_targets=LORA_TARGETS,
        save=save,
    )


def save_run(student: CausalWan, weights: TrainedWeights, about: Facts, folder: Path) -> None:
    """student/: a diffusers folder of the adapted weights, with a model card. lora/: the adapters alone, as PEFT
    writes them."""
    with extra("train"):
        from peft import LoraConfig

    sampler = {key.removeprefix("rollout."): value for key, value in about.items() if key.startswith("rollout.")}
    for key in HOW_FAST:
        sampler.pop(key, None)
    save_student(student, folder / "student", weights.merged, sampler=sampler)
    if weights.adapters:
        named = {f"base_model.model.{n.replace('.default.', '.')}": p.cpu() for n, p in weights.adapters.items()}
        rank = about["student.lora_rank"]
        LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LORA_TARGETS)).save_pretrained(str(folder / "lora"))
        save_tensors(named, folder / "lora/adapter_model.safetensors", {"format": "pt"})
    rows = "\n".join(f"| {key} | {value} |" for key, value in about.items())
    (folder / "student/README.md").write_text(
        CARD.format(base=about["student.name"], rows=rows, **about), encoding="utf-8"
    )


CARD = """---
library_name: diffusers
pipeline_tag: text-to-video
base_model: {base}
---
# {name}

A causal video student ({base}) distilled from a black-box teacher ({teacher}) by Adversarial Flow Distillation
(arXiv 2605.26105) with afd_fast: averaged weights, adapters merged. It may have inherited the teacher's biases, and
the teacher's terms of use apply to what was learnt from it.

Load it with `afd_fast.students.load_student("student")`, or as the transformer of a diffusers Wan pipeline. The folder
`lora/` holds the adapters alone: `load_student(BASE, lora="lora")`.

| setting | value |
|---|---|
{rows}
"""

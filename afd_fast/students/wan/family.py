"""A causal Wan student with its text encoder, VAE and discriminator as a System that trains like the embedded one."""

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from afd_fast.config import TrainConfig
from afd_fast.discriminators.toy import ToyDiscriminator
from afd_fast.errors import ConfigError
from afd_fast.generate import load_networks
from afd_fast.training.state import System

LORA_TARGETS = [f"{attn}.{name}" for attn in ("self_attn", "cross_attn") for name in "qkvo"] + ["ffn.0", "ffn.2"]
FPS = 16  # of Wan 2.1


def wan_system(config: TrainConfig) -> System:
    """The networks of config.student, .discriminator and .wan_base on this process's GPU, or the CPU.

    student="tiny" is a small CausalWan with random weights and a random VAE: 48 x 80 pixels for frames=6, height=6,
    width=10. ConfigError for sizes a Wan student cannot have.
    """
    if config.frames % config.chunk or config.height % 2 or config.width % 2:
        raise ConfigError(
            f"a Wan student makes whole chunks of latents of even size: frames={config.frames} chunk={config.chunk} "
            f"height={config.height} width={config.width} are not"
        )
    student, encode, decode = load_networks(config.student, config.wan_base, config.seed)
    student.gradient_checkpointing = config.gradient_checkpointing
    device = next(student.parameters()).device
    known: dict[str, Tensor] = {}

    def embed(prompts: list[str]) -> list[Tensor]:
        """Every prompt goes through the text encoder once; its embedding stays on the host."""
        new = [p for p in dict.fromkeys(prompts) if p not in known]
        if new:
            known.update(zip(new, (x.cpu() for x in encode(new)), strict=True))
        return [known[p].to(device) for p in prompts]

    return System(
        student=student.requires_grad_(False),
        new_discriminator=lambda c: discriminator(c).to(c.disc_device or device),
        encode=embed,
        decode=decode,
        encode_video=decode.encode,
        shape=(student.config.in_dim, config.frames, config.height, config.width),
        chunk=config.chunk,
        video=(4 * config.frames - 3, 8 * config.height, 8 * config.width),
        fps=FPS,
        lora_targets=LORA_TARGETS,
        save=lambda weights, adapters, about, folder: save(student, weights, adapters, about, folder),
    )


def discriminator(config: TrainConfig) -> nn.Module:
    """ "toy": a few convolutions on reduced clips; else VideoAlign's VideoReward with fresh adapters on its merged weights."""
    if config.discriminator == "toy":
        return ToyDiscriminator(width=config.disc_width)
    from afd_fast.discriminators import load_video_reward

    return load_video_reward(config.discriminator, lora_rank=config.disc_lora_rank)


def save(
    student: nn.Module, weights: dict[str, Tensor], adapters: dict[str, Tensor], about: dict, folder: Path
) -> None:
    """student/: a diffusers folder of the adapted weights, with a model card. lora/: the adapters alone, as PEFT writes them."""
    from peft import LoraConfig

    from afd_fast.students.wan.checkpoints import save_diffusers

    save_diffusers(student, folder / "student", weights)
    if adapters:
        named = {f"base_model.model.{n.replace('.default.', '.')}": p.cpu() for n, p in adapters.items()}
        rank = about["lora_rank"]
        LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS).save_pretrained(folder / "lora")
        save_file(named, folder / "lora/adapter_model.safetensors", {"format": "pt"})
    rows = "\n".join(f"| {key} | {value} |" for key, value in about.items())
    (folder / "student/README.md").write_text(
        f"""---
library_name: diffusers
pipeline_tag: text-to-video
base_model: {about["student"]}
---
# {about["name"]}

A causal video student ({about["student"]}) distilled from a black-box teacher ({about["teacher"]}) by Adversarial Flow
Distillation (arXiv 2605.26105) with afd_fast: averaged weights, adapters merged. It may have inherited the teacher's biases, and
the teacher's terms of use apply to what was learnt from it.

Load it with `afd_fast.models.load_student("student")`, or as the transformer of a diffusers Wan pipeline. Beside it, `lora/`
holds the adapters alone: `load_student(BASE, lora="lora")`.

| setting | value |
|---|---|
{rows}
"""
    )

"""What is run on the fake GPU: students, decoders, discriminators and whole runs, small ones and those of the paper's size.

A size is "tiny" or "1.3b"; `layers` shortens the latter's networks. Import tests.fake_cuda.device first.
"""

from dataclasses import replace

import torch
from torch import nn

from afd_fast.config import TrainConfig, with_overrides
from afd_fast.discriminators.videoalign.model import RewardOptions, RewardSettings, VideoReward, qwen2_vl_2b
from afd_fast.students import CausalWan, CausalWanConfig
from afd_fast.students.student import Family, LatentFormat
from afd_fast.students.wan.family import LORA_TARGETS, SIZE, HashText, KnownPrompts
from afd_fast.students.wan.vae import WanDecoder
from afd_fast.teachers.dataset import TeacherVideos
from afd_fast.training import runs
from afd_fast.training.loop import train_step
from afd_fast.training.run import Run
from afd_fast.training.teacher import batch_plan
from afd_fast.training.trainer import new_run
from afd_fast.video_io import VideoFormat
from benchmarks.discriminator import Words
from tests import tiny_videoalign
from tests.fake_cuda.device import CUDA, unreal

PROMPTS = ["a red ball dropped", "a blue ball tossed up", "a green ball thrown left", "a red ball thrown right"]
TINY = "student=tiny student.frames=6 student.height=6 student.width=10 student.lora_rank=4 discriminator=toy discriminator.width=8"
SMALL = "discriminator.warmup=0 shards=1 prompts_per_step=1 rollouts_per_prompt=2 teacher_clips=1"


def sizes(size: str) -> tuple[int, int]:
    """Latent height and width."""
    return (60, 104) if size == "1.3b" else (6, 10)


def student(size: str = "tiny", layers: int = 30) -> CausalWan:
    """A CausalWan in bfloat16 on the device, not trained."""
    config = CausalWanConfig(num_layers=layers) if size == "1.3b" else CausalWanConfig.tiny()
    with torch.device(CUDA):
        return CausalWan(config).bfloat16().eval().requires_grad_(False)


def text_and_noise(model: CausalWan, size: str = "tiny", batch: int = 1, frames: int = 9):
    """Encoded prompts and noise [B, C, F, H, W]."""
    c = model.config
    with torch.no_grad():
        text = model.encode_text(torch.randn(batch, c.text_len, c.text_dim, device=CUDA, dtype=torch.bfloat16))
    return text, torch.randn(batch, 16, frames, *sizes(size), device=CUDA, dtype=torch.bfloat16)


def decoder(size: str = "tiny", chunk: int = 3) -> WanDecoder:
    """Wan's VAE in bfloat16 with random weights."""
    from diffusers import AutoencoderKLWan

    with torch.device(CUDA):
        vae = AutoencoderKLWan() if size == "1.3b" else AutoencoderKLWan(base_dim=4, num_res_blocks=1)
    return WanDecoder(vae.bfloat16(), chunk=chunk)


def video_reward(size: str = "tiny", layers: int = 28) -> VideoReward:
    """VideoAlign's network with adapters and random weights."""
    if size == "tiny":
        return tiny_videoalign.reward_model(dtype=torch.bfloat16).to(CUDA)
    config = qwen2_vl_2b()
    config.text_config.num_hidden_layers = min(layers, 28)
    config.text_config.layer_types = config.text_config.layer_types[: config.text_config.num_hidden_layers]
    config.vision_config.depth = min(layers, 32)
    template = " ".join(["word"] * 780) + " <|VQ_reward|> <|MQ_reward|> {text_prompt} <|TA_reward|>"
    with torch.device(CUDA):
        model = VideoReward(
            config,
            Words(config.get_text_config().vocab_size),
            template,
            RewardSettings(),
            RewardOptions(),
            torch.bfloat16,
        )
        model.add_lora(64, 128)
    return model.to(CUDA)


def pairs(model: VideoReward, size: str = "tiny", count: int = 2):
    """Teacher's and student's clips [B, 3, F, H, W] on the device, and prompts."""
    shape = (count, 3, 81, 480, 832) if size == "1.3b" else (count, 3, 16, 56, 84)
    return torch.rand(shape, device=CUDA), torch.rand(shape, device=CUDA), ["w " * 40] * count


def wan_family(config: TrainConfig, layers: int) -> Family:
    """The family of a Wan 1.3B with random weights, its videos as long as `student.frames`."""
    frames = config.student.frames or 21
    net = student("1.3b", layers)
    latents = LatentFormat(SIZE.channels, frames, SIZE.height, SIZE.width)
    video = VideoFormat(4 * frames - 3, 480, 832, 16)
    text = KnownPrompts(HashText(net.config.text_dim, net.config.text_len), net.device)
    return Family("wan", net, text, decoder("1.3b"), latents, config.rollout.chunk, video, lora_targets=LORA_TARGETS)


def new(
    size: str, *overrides: str, name: str = "afd_table3", layers: int = 30, reward: bool = False
) -> tuple[Run, TeacherVideos]:
    """A run and its teacher's videos. size: demo (the embedded networks), tiny or 1.3b. reward: VideoReward in place of the
    toy discriminator."""
    given = [*SMALL.split(), *(TINY.split() if size == "tiny" else [])]
    family, discriminator = None, None
    if size == "1.3b":
        given += ["student=1.3b, random weights", "discriminator=toy"]
    config = with_overrides(runs.get(name), [*given, *overrides])
    if size == "1.3b":
        frames = config.student.frames
        family = wan_family(config, layers)
        config = replace(config, student=replace(config.student, frames=None))
        assert frames in (None, family.latents.frames)
    elif size == "demo":
        config = replace(config, student=replace(config.student, device="cuda"))
    if reward:
        discriminator = video_reward(size, layers)
    run = new_run(config, family, discriminator)
    assert all(p.is_cuda for net in (run.family.student, run.discriminator) for p in net.parameters())
    video = run.family.video
    shape = (config.teacher_clips, 3, video.frames, video.height, video.width)
    clips = torch.zeros(1, dtype=torch.uint8).expand(shape)
    clips = unreal(clips) if size == "1.3b" else clips.clone()
    teacher: nn.Module | None = None
    return run, TeacherVideos(teacher, PROMPTS, PROMPTS[:1], None, {p: clips for p in PROMPTS})


def iteration(run: Run, data: TeacherVideos) -> dict[str, float]:
    """The next iteration of a run."""
    return train_step(run, data.batch(batch_plan(run.config), run.state.step, range(run.config.shards)))

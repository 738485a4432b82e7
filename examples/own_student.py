"""Distil a folder of mp4 files into a student of your own, with a VAE of your own; ends with a report.

    python examples/own_student.py VIDEOS OUT      # VIDEOS: mp4 files and manifest.csv (columns prompt,video)

It takes some minutes. Its student starts from random weights: it shows how the parts fit and makes no good videos, and the
run's warnings say so.

A student needs three methods: `encode_text`, `new_cache` and `forward`. This one is a small causal convolutional net:
each chunk of two frames sees the mean of the earlier chunks. Shapes: B samples, C channels, F frames, H x W pixels.
"""

import sys
import zlib

import torch
from torch import nn

from afd_fast.config import with_overrides
from afd_fast.errors import AFDError
from afd_fast.reports.run import write_report
from afd_fast.students import Family, LatentFormat, StudentModule
from afd_fast.training import TrainConfig, train
from afd_fast.video_io import VideoFormat

FRAMES, SIZE, CHUNK, CHANNELS = 8, 32, 2, 12


class Student(StudentModule):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(512, 32)
        self.inside = nn.Conv3d(2 * CHANNELS + 33, 64, 3, padding=1)
        self.outside = nn.Conv3d(64, CHANNELS, 3, padding=1)

    def encode_text(self, ids):  # [B, L] -> [B, 32]
        return self.words(ids).mean(1)

    def new_cache(self, batch, frames, height, width, window=None, sink=0):
        return {}  # first frame of a chunk -> the chunk

    def forward(self, x, t, text, *, cache, start_frame=0):  # x [B, C, 2, h, w], t [B, 2] in 0..1000 -> velocity
        earlier = [chunk for first, chunk in cache.items() if first < start_frame]
        history = torch.stack(earlier).mean(0) if earlier else torch.zeros_like(x)
        cache[start_frame] = x.detach()
        batch, _, frames, height, width = x.shape
        level = (t / 1000)[:, None, :, None, None].expand(-1, 1, -1, height, width)
        words = text[:, :, None, None, None].expand(-1, -1, frames, height, width)
        return self.outside(torch.relu(self.inside(torch.cat([x, history, level, words], 1))))


class VAE:
    """2 x 2 pixels become 12 channels, in [-1, 1]."""

    def encode(self, videos):
        pixels = nn.functional.pixel_unshuffle(videos.transpose(1, 2), 2)  # [B, F, 12, h, w]
        return pixels.transpose(1, 2) * 2 - 1

    def decode(self, latents):
        pixels = nn.functional.pixel_shuffle(latents.transpose(1, 2), 2).transpose(1, 2)
        return ((pixels + 1) / 2).clamp(0, 1)


def encode_prompts(prompts):  # list of B strings -> word ids [B, 8]
    words = [(prompt.lower().split() + [""] * 8)[:8] for prompt in prompts]
    return torch.tensor([[zlib.crc32(word.encode()) % 512 for word in row] for row in words])


def main(videos, out, *overrides):
    family = Family(
        name="own",
        student=Student(),
        text=encode_prompts,
        vae=VAE(),
        latents=LatentFormat(CHANNELS, FRAMES, SIZE // 2, SIZE // 2),
        chunk=CHUNK,
        video=VideoFormat(FRAMES, SIZE, SIZE, fps=8),
    )
    keys = ["name=own", "student=own", "student.lora_rank=0", f"rollout.chunk={CHUNK}", f"teacher=folder:{videos}"]
    config = with_overrides(TrainConfig(), [*keys, "prompts_per_step=4", "iterations=60", *overrides])
    train(config, family, out)
    print(write_report(out))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except AFDError as error:  # with what to change in its message
        sys.exit(f"error: {error}")

"""A video longer than any cache, decoded chunk by chunk as it is made: constant memory per chunk.

python examples/stream_long.py OUT.mp4                     # random weights, to see it run anywhere
python examples/stream_long.py OUT.mp4 CHECKPOINT FRAMES   # a causal Wan checkpoint, FRAMES latent frames
"""

import sys

import torch

from afd_fast.rollout import RolloutConfig, stream
from afd_fast.students.wan.family import load_networks
from afd_fast.video_io import write_video


def main(out, student="tiny", frames=24, prompt="a red ball rolls down a long hill"):
    networks = load_networks(student)
    model, frames = networks.student, int(frames)
    height, width = (6, 10) if student == "tiny" else (60, 104)
    config = RolloutConfig(shift=5.0, chunk=3, window=12, sink=3)  # a chunk sees 12 latent frames, 3 of them the first
    generator = torch.Generator(model.device).manual_seed(0)
    shape = (1, model.config.in_dim, frames, height, width)
    noise = torch.randn(shape, generator=generator, device=model.device, dtype=model.dtype)
    with torch.no_grad():
        text = model.encode_text(networks.text([prompt]))
        decode, pixels = networks.vae.stream(), []
        for number, latents in enumerate(stream(model, text, noise, config, generator=generator)):
            pixels.append(decode(latents)[0].cpu())  # [3, frames, height, width] in [0, 1]
            print(f"chunk {number + 1} of {frames // 3}: {sum(p.shape[1] for p in pixels)} frames of video")
    write_video(out, torch.cat(pixels, 1), fps=16)


if __name__ == "__main__":
    if not (2 <= len(sys.argv) <= 4 and sys.argv[1].endswith(".mp4") and "".join(sys.argv[3:] or "1").isdecimal()):
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except (OSError, ValueError) as error:  # with what to change in its message
        sys.exit(f"error: {error}")

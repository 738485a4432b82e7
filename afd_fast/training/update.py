"""The student's velocity for training: the KV-detached update, which is the sampling function itself.

Legend: B samples, C channels, F latent frames, H x W latent pixels.
"""

import torch
from torch import Tensor


def student_velocity(model, x_t: Tensor, t: Tensor, text, clean: Tensor, chunk: int) -> Tensor:
    """v_theta(x_t, t | own clean history) [B, C, F, H, W], chunk by chunk over a cache.

    A no-grad pass at t = 0 writes each clean chunk's keys and values; the noised chunk before it ran with
    gradient over that detached history. x_t, clean: [B, C, F, H, W]; t: [B, F] in [0, 1].
    """
    batch, _, frames, height, width = x_t.shape
    cache = model.new_cache(batch, frames, height, width)
    velocities = []
    for start in range(0, frames, chunk):
        window = slice(start, start + chunk)
        velocities.append(model(x_t[:, :, window], t[:, window] * 1000, text, cache=cache, start_frame=start))
        if start + chunk < frames:
            with torch.no_grad():
                model(clean[:, :, window], torch.zeros_like(t[:, window]), text, cache=cache, start_frame=start)
    return torch.cat(velocities, 2)

"""The same change to both clips of a pair, so that a discriminator cannot live on what tells the two apart at a glance.

Legend: B pairs, videos [B, 3, F, H, W] in [0, 1]; teacher and student may differ in F, H, W. All differentiable.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def paired_augment(
    teacher: Tensor, student: Tensor, rng: torch.Generator, *, crop: float = 0.0, flip: float = 0.0, phase: int = 0
) -> tuple[Tensor, Tensor]:
    """Both clips of a pair through one random view.

    crop: up to this share of height and width is cut away, the rest enlarged to the old size. flip: probability of a
    mirror image; 0 where prompts say left or right. phase: up to this many first frames are left out, as many for
    the whole batch. rng: a CPU generator.
    """
    if len(teacher) != len(student):
        raise ValueError(f"{len(teacher)} teacher and {len(student)} student clips are not pairs")
    if not 0 <= crop < 1 or not 0 <= flip <= 1 or not 0 <= phase < min(teacher.shape[2], student.shape[2]):
        raise ValueError(f"crop={crop} must be in [0, 1), flip={flip} in [0, 1], phase={phase} below the frame count")
    skip = int(torch.randint(phase + 1, (), generator=rng))
    u = torch.rand(4, len(teacher), generator=rng)
    scale = 1 - crop * u[0]
    theta = torch.zeros(len(teacher), 2, 3)
    theta[:, 0, 0] = scale * torch.where(u[1] < flip, -1.0, 1.0)
    theta[:, 1, 1] = scale
    theta[:, :, 2] = ((2 * u[2:] - 1) * (1 - scale)).T  # anywhere inside the frame
    return tuple(_view(x[:, :, skip:], theta) if crop or flip else x[:, :, skip:] for x in (teacher, student))


def _view(video: Tensor, theta: Tensor) -> Tensor:
    batch, channels, frames, height, width = video.shape
    grid = F.affine_grid(theta.to(video), [batch, 1, height, width], align_corners=False)
    flat = F.grid_sample(video.flatten(1, 2), grid, "bilinear", "border", align_corners=False)
    return flat.view(batch, channels, frames, height, width).clamp(0, 1)


_LUMA = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))  # BT.601, full range


def codec_like(videos: Tensor, *, step: float = 4.0) -> Tensor:
    """What an intra-frame codec leaves of a video: 4:2:0 chroma, 8 x 8 DCT coefficients rounded to multiples of
    step * (1 + (row + column) / 2) grey levels (2, 4 and 8 act on fine texture roughly as H.264 at crf 18, 23, 28). For both sides of a pair, on the device; H.264 itself, on the CPU and
    without gradient, is `video_io.deliver`. The gradient passes the rounding. Heights and widths must be even.
    """
    batch, _, frames, height, width = videos.shape
    if height % 2 or width % 2 or step < 0:
        raise ValueError(f"codec_like needs even sizes and step >= 0, got {height}x{width} and {step}")
    matrix = videos.new_tensor(_LUMA)
    planes = torch.einsum("ij,bjfhw->bfihw", matrix, videos).flatten(0, 1)  # [B F, 3, H, W]
    luma, chroma = planes[:, :1], F.avg_pool2d(planes[:, 1:], 2)
    luma, chroma = _quantise(luma, step / 255), _quantise(chroma, step / 255)
    planes = torch.cat([luma, F.interpolate(chroma, (height, width), mode="bilinear", align_corners=False)], 1)
    out = torch.einsum("ij,bjhw->bihw", torch.linalg.inv(matrix), planes)
    return out.view(batch, frames, 3, height, width).transpose(1, 2).clamp(0, 1)


def _quantise(x: Tensor, step: float) -> Tensor:
    """Rounded in an orthonormal 8 x 8 DCT; the border is continued to whole blocks and cut off again."""
    if not step:
        return x
    height, width = x.shape[-2:]
    x = F.pad(x, (0, -width % 8, 0, -height % 8), mode="replicate")
    n = torch.arange(8, device=x.device, dtype=x.dtype)
    dct = torch.cos(math.pi / 8 * n[:, None] * (n + 0.5)) / 2
    dct[0] /= math.sqrt(2)
    blocks = x.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).transpose(-3, -2)  # [..., h, w, 8, 8]
    steps = step * (1 + (n[:, None] + n) / 2)
    c = dct @ blocks @ dct.T / steps
    whole = c.sign() * (c.abs() + 1 / 3).floor()  # H.264's intra rounding: towards zero, which is what loses detail
    c = (c + (whole - c).detach()) * steps
    out = (dct.T @ c @ dct).transpose(-3, -2).flatten(-4, -3).flatten(-2)
    return out[..., :height, :width]

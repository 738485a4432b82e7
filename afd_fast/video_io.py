"""mp4 in and out through PyAV, and the door: the conversion that every clip passes before a discriminator sees it.

Legend: B clips, F frames, H x W pixels; pixels are floats in [0, 1].
"""

import io
from fractions import Fraction
from pathlib import Path
from typing import IO, NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from afd_fast.errors import VideoError


class VideoFormat(NamedTuple):
    """Size of a finished video: frames, height and width in pixels, frames per second."""

    frames: int
    height: int
    width: int
    fps: float


def to_uint8(video: Tensor) -> Tensor:
    """[..., 3, F, H, W] in [0, 1] -> uint8, rounded to nearest."""
    return (video.clamp(0, 1) * 255).round().to(torch.uint8)


def write_video(
    file: str | Path | IO[bytes], video: Tensor, fps: float, *, crf: int = 18, lossless: bool = False
) -> None:
    """Write [3, F, H, W] in [0, 1] (or uint8) as an H.264 mp4.

    file: path or binary file. crf: 0..51, lower is better. lossless: RGB, every 8-bit value exact (most
    browsers do not play that profile). Lossy video is 4:2:0, so H and W must be even. The same pixels give the same
    bytes. Raises VideoError for odd sizes.
    """
    frames = video if video.dtype == torch.uint8 else to_uint8(video)
    array = frames.permute(1, 2, 3, 0).cpu().numpy()  # [F, H, W, 3]
    height, width = array.shape[1:3]
    if not lossless and (height % 2 or width % 2):
        raise VideoError(f"got {height}x{width} pixels, 4:2:0 video needs even sizes: pad it or write lossless=True")
    target = str(file) if isinstance(file, (str, Path)) else file
    with av.open(target, "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264rgb" if lossless else "libx264", rate=Fraction(fps).limit_denominator(1001)
        )
        stream.width, stream.height = width, height
        stream.pix_fmt = "rgb24" if lossless else "yuv420p"
        # without mbtree: its AVX-512 code reads memory it never wrote, so one video had several encodings (libx264 165)
        stream.options = {"qp": "0"} if lossless else {"crf": str(crf), "x264-params": "mbtree=0"}
        stream.codec_context.thread_count = 1
        for frame in array:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def read_video(
    file: str | Path | IO[bytes],
    *,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    fps: float | None = None,
) -> Tensor:
    """A video as [3, F, H, W] floats in [0, 1].

    fps: resample to this rate (nearest frame in time); frames: keep the first `frames`; size: (H, W), centre crop to
    the aspect ratio, then area resampling. Raises VideoError that names an unreadable or too short file.
    """
    name = getattr(file, "name", file)
    images: list[np.ndarray] = []
    times: list[float] = []
    try:
        with av.open(str(file) if isinstance(file, (str, Path)) else file, "r") as container:
            for frame in container.decode(video=0):
                images.append(frame.to_ndarray(format="rgb24"))
                times.append(len(times) / _rate(container) if frame.time is None else frame.time)
                if fps is None and frames is not None and len(images) == frames:
                    break
                if fps is not None and frames is not None and times[-1] - times[0] > frames / fps:
                    break
    except (av.FFmpegError, OSError, IndexError) as error:
        raise VideoError(f"{name}: cannot be read as video ({error}); replace the file") from error
    if not images:
        raise VideoError(f"{name}: holds no video frame; replace the file")
    if fps is not None:
        period = times[1] - times[0] if len(times) > 1 else 1 / fps
        end = times[-1] - times[0] + period  # the last frame lasts one period
        count = int(end * fps + 1e-6)
        wanted = np.arange(count) / fps + 1e-6
        images = [images[i] for i in np.searchsorted(np.array(times) - times[0], wanted, side="right") - 1]
    if frames is not None and len(images) < frames:
        raise VideoError(
            f"{name}: {len(images)} frames" + (f" at {fps:g} fps" if fps else "") + f", {frames} are needed"
        )
    video = torch.from_numpy(np.stack(images[:frames])).permute(3, 0, 1, 2).float() / 255
    return video if size is None else _fit(video, size)


def _rate(container: av.container.InputContainer) -> float:
    """Frames per second of a file whose frames have no times. Raises VideoError if it has no rate either."""
    rate = container.streams.video[0].average_rate
    if rate is None:
        raise VideoError(f"{container.name}: has neither frame times nor a frame rate; write it again as mp4")
    return float(rate)


def _fit(video: Tensor, size: tuple[int, int]) -> Tensor:
    """Centre crop to size's aspect ratio, then area-resample: [3, F, h, w] -> [3, F, H, W]."""
    height, width = video.shape[-2:]
    if (height, width) == size:
        return video
    scale = min(height / size[0], width / size[1])
    crop_h, crop_w = round(size[0] * scale), round(size[1] * scale)
    top, left = (height - crop_h) // 2, (width - crop_w) // 2
    video = video[..., top : top + crop_h, left : left + crop_w]
    return F.interpolate(video.transpose(0, 1), size, mode="area").transpose(0, 1)


def codec_round_trip(video: Tensor, crf: int, fps: float = 24) -> Tensor:
    """[3, F, H, W] in [0, 1] through H.264 and back. Small frames are enlarged four times in between, because the
    codec's 4:2:0 chroma would otherwise be only a few pixels wide."""
    zoom = 4 if min(video.shape[-2:]) < 64 else 1
    large = to_uint8(video).repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    buffer = io.BytesIO()
    write_video(buffer, large, fps, crf=crf)
    buffer.seek(0)
    decoded = read_video(buffer)
    return F.avg_pool2d(decoded.transpose(0, 1), zoom).transpose(0, 1) if zoom > 1 else decoded


def gif(video: Tensor, fps: float) -> bytes:
    """[3, F, H, W] in [0, 1] as an animated GIF, the format in which TensorBoard shows videos; small frames enlarged."""
    from PIL import Image

    zoom = max(1, 96 // video.shape[-2])
    frames = to_uint8(video).repeat_interleave(zoom, -1).repeat_interleave(zoom, -2).permute(1, 2, 3, 0).numpy()
    first, *rest = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=1000 / fps, loop=0)
    return buffer.getvalue()


def deliver(videos: Tensor, crf: int | None = None) -> Tensor:
    """The door: pixels [B, 3, F, H, W] as a finished video holds them: range [0, 1], 8 bits and, with `crf`, the losses
    of H.264. Teacher and student clips both pass it, so that the file format does not tell them apart."""
    videos = to_uint8(videos).float() / 255
    if crf is None:
        return videos
    return to_uint8(torch.stack([codec_round_trip(v, crf) for v in videos])).float() / 255

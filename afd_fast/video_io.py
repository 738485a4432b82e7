"""mp4 in and out through PyAV, and the door: the conversion that every clip passes before a discriminator sees it.

PyAV is imported where a file is opened: what only names a video's size needs no FFmpeg.

Legend: B clips, F frames, H x W pixels; pixels are floats in [0, 1].
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from afd_fast.errors import VideoError, extra
from afd_fast.files.mp4 import fragments_seconds

if TYPE_CHECKING:
    import av

log = logging.getLogger("afd_fast")

FORMATS = "mov,matroska,avi"  # containers of video; playlists and image sequences name other files
HDR = (16, 18)  # FFmpeg's AVCOL_TRC_SMPTE2084 (PQ) and ARIB_STD_B67 (HLG)
ACCURATE = 0x4 | 0x40000 | 0x2000  # libswscale's BICUBIC, ACCURATE_RND, FULL_CHR_H_INT
HALF_A_LEVEL = 0.5 / 255  # what rounding to 8 bits forgives
BT709, UNSPECIFIED, BT601 = 1, 2, 6  # FFmpeg's AVColorSpace


class VideoFormat(NamedTuple):
    """Size of a finished video: frames, height and width in pixels, frames per second."""

    frames: int
    height: int
    width: int
    fps: float


def to_uint8(video: Tensor) -> Tensor:
    """[..., 3, F, H, W] in [0, 1] -> uint8, rounded to nearest; what lies outside becomes black or white, as a decoder's
    overshoot should. Raises VideoError for pixels that are NaN or infinite, which would become black too."""
    if video.dtype == torch.uint8:
        return video
    if not video.isfinite().all():
        raise VideoError("a video has pixels that are NaN or infinite: look for what made them, they are not written")
    return video.clamp(0, 1).mul_(255).round_().to(torch.uint8)


def checked(video: Tensor, prompt: str, seed: int) -> Tensor:
    """The video itself. VideoError that names prompt and seed unless it is [3, F, H, W] in [0, 1] (or uint8)."""
    what = f"the video of {prompt!r} with seed {seed}"
    if video.ndim != 4 or video.shape[0] != 3 or not video.numel():
        raise VideoError(f"{what} has shape {list(video.shape)}, expected [3, F, H, W]")
    if video.dtype == torch.uint8:
        return video
    if not video.is_floating_point():
        raise VideoError(f"{what} holds {video.dtype}, expected floats in [0, 1] or uint8: convert it")
    if not video.isfinite().all():
        raise VideoError(f"{what} has pixels that are NaN or infinite: look for what made them, such as float16")
    low, high = (x.item() for x in video.aminmax())
    if low < -HALF_A_LEVEL or high > 1 + HALF_A_LEVEL:
        raise VideoError(
            f"{what} has values in [{low:g}, {high:g}], expected [0, 1]: divide 0..255 by 255, clamp overshoot"
        )
    return video


def write_video(
    file: str | Path | IO[bytes], video: Tensor, fps: float, *, crf: int = 18, lossless: bool = False
) -> None:
    """Write [3, F, H, W] in [0, 1] (or uint8) as an H.264 mp4.

    file: path or binary file. crf: 0..51, lower is better. lossless: RGB, every 8-bit value exact (most
    browsers do not play that profile). Lossy video is 4:2:0, so H and W must be even. The same pixels give the same
    bytes. Raises VideoError for odd sizes, other shapes, and as `to_uint8`; nothing is written then.
    """
    if video.ndim != 4 or video.shape[0] != 3 or not video.numel():
        raise VideoError(f"got a video of shape {list(video.shape)}, expected [3, F, H, W]")
    array = to_uint8(video).permute(1, 2, 3, 0).cpu().numpy()  # [F, H, W, 3]
    height, width = array.shape[1:3]
    if not lossless and (height % 2 or width % 2):
        raise VideoError(f"got {height}x{width} pixels, 4:2:0 video needs even sizes: pad it or write lossless=True")
    with extra("train"):
        import av

    with contextlib.ExitStack() as stack:  # opened here: FFmpeg would take a name with a colon for a URL
        target = stack.enter_context(Path(file).open("wb")) if isinstance(file, (str, Path)) else file
        container = stack.enter_context(av.open(target, "w", format="mp4"))
        stream = container.add_stream(
            "libx264rgb" if lossless else "libx264", rate=Fraction(fps).limit_denominator(1001)
        )
        stream.width, stream.height = width, height
        stream.pix_fmt = "rgb24" if lossless else "yuv420p"
        if not lossless:
            stream.codec_context.colorspace = BT601  # what the conversion below does; players guess without the tag
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
    """A video as [3, F, H, W] floats in [0, 1]: what a player shows, in 8 bits (`read_frames`), in memory for itself and
    a few frames."""
    images = list(read_frames(file, frames=frames, size=size, fps=fps))
    video = torch.empty(3, len(images), *images[0].shape[1:], dtype=torch.float32)
    for i in reversed(range(len(images))):
        video[:, i] = images.pop()  # which frees it
    return video.div_(255)


def format_of(file: str | Path) -> VideoFormat:
    """Frames, size as shown and rate of a file. Raises VideoError as `read_video`."""
    height, width = next(read_frames(file)).shape[1:]
    with _open(file) as container:
        stream, rate = container.streams.video[0], _rate(container)
        seconds = (stream.duration or 0) * Fraction(stream.time_base or 0)
        return VideoFormat(stream.frames or round(seconds * rate), height, width, float(rate))


def check_file(file: str | Path, *, frames: int, size: tuple[int, int], fps: float) -> None:
    """Decode what `read_video` would take, in memory for a few frames, and keep nothing. Raises VideoError as it does."""
    for _ in read_frames(file, frames=frames, size=size, fps=fps):
        pass


def read_frames(
    file: str | Path | IO[bytes],
    *,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    fps: float | None = None,
) -> Iterator[Tensor]:
    """The frames of a file one by one, [3, H, W] uint8, in memory for a few of them: upright, with square pixels, in the
    colours of its tags.

    fps: the frames shown at the times k / fps; frames: keep the first `frames`; size: (H, W), centre crop to the aspect
    ratio, then area resampling. Raises VideoError that names a file that is unreadable, too short, HDR, or changes its
    size where none is given. Only the file itself is read: no URL, no playlist, no pipe.
    """
    with extra("train"):
        import av

    name = file if isinstance(file, (str, Path)) else getattr(file, "name", "the video")
    rate = None if fps is None else Fraction(fps).limit_denominator(1001)
    done, shape = 0, None
    try:
        with _open(file) as container:
            pictures, reformatter = _shown(container), av.video.reformatter.VideoReformatter()  # whose tables are kept
            for shown in pictures:
                count = 1 if rate is None else math.ceil(shown.end * rate) - done  # times k / fps until it ends
                count = count if frames is None else min(count, frames - done)
                if count <= 0:
                    continue
                image = _image(shown, size, reformatter)
                if image.shape != (shape := shape or image.shape):
                    raise VideoError(f"{name}: frame {done} has another size than the first: read it with size=")
                done += count
                for _ in range(count):
                    yield image
                if done == frames:
                    with contextlib.suppress(av.FFmpegError, VideoError, StopIteration):  # what follows is not needed
                        next(pictures)
                        _say(f"videos are longer than the {frames} frames that are used: the rest is left out")
                    return
    except (av.FFmpegError, OSError, IndexError) as error:
        raise VideoError(f"{name}: cannot be read as video ({error}); replace the file") from error
    if not done:
        raise VideoError(f"{name}: holds no video frame; replace the file")
    if frames is not None:
        at = f" at {fps:g} fps" if fps else ""
        raise VideoError(f"{name}: {done} frames{at}, {frames} are needed")


@contextlib.contextmanager
def _open(file: str | Path | IO[bytes]) -> Iterator[av.container.InputContainer]:
    """The container. FFmpeg gets an open file and not its name, which could be a URL, and no format that names others."""
    with extra("train"):
        import av

    with contextlib.ExitStack() as stack:
        if isinstance(file, (str, Path)):
            if not Path(file).is_file():
                raise VideoError(f"{file}: is not a file; check the path")
            file = stack.enter_context(Path(file).open("rb"))
        yield stack.enter_context(
            av.open(file, "r", options={"format_whitelist": FORMATS, "protocol_whitelist": "none"})
        )


def is_complete(file: Path) -> bool:
    """Whether the file opens and holds every frame that its header or index promises. Nothing is decoded."""
    with extra("train"):
        import av

    frames, end = 0, Fraction(0)
    try:
        with _open(file) as container:
            for packet in container.demux():
                if packet.is_corrupt:
                    return False
                if packet.size and packet.time_base and packet.pts is not None:
                    frames += packet.stream is container.streams.video[0]
                    end = max(end, (packet.pts + (packet.duration or 0)) * packet.time_base)
            seconds = fragments_seconds(file)
            if seconds is None:
                return frames == container.streams.video[0].frames > 0
            return frames > 0 and float(end) + 0.01 >= seconds  # rounded to a movie's ticks
    except (VideoError, av.FFmpegError, OSError, IndexError):
        return False


class _Look(NamedTuple):
    """How a stream's frames are to be shown: width of a pixel / its height, and (x, y) -> (a x + c y, b x + d y)."""

    aspect: Fraction = Fraction(1)
    a: int = 1
    b: int = 0
    c: int = 0
    d: int = 1


class _Shown(NamedTuple):
    """A decoded frame, until when it is shown, in seconds after the first frame, and how."""

    frame: av.VideoFrame
    end: Fraction
    look: _Look


def _shown(container: av.container.InputContainer) -> Iterator[_Shown]:
    """The frames of the video stream in the order in which they are shown. A frame is shown until the next one comes."""
    with extra("train"):
        import av

    stream = container.streams.best("video")
    if not isinstance(stream, av.VideoStream):
        return
    tick = Fraction(stream.time_base or 1)
    slack = min(tick / 2, Fraction(1, 2000))  # times are rounded to ticks; Matroska's milliseconds are the coarsest
    look = _Look()
    held: av.VideoFrame | None = None
    start = gap = origin = reach = Fraction(0)
    for index, frame in enumerate(container.decode(stream)):
        if frame.is_corrupt:
            raise VideoError(
                f"{container.name}: frame {index} is damaged: its data cannot be decoded; replace the file"
            )
        if frame.color_trc in HDR:
            raise VideoError(
                f"{container.name}: is HDR (PQ or HLG), which every player shows differently; convert it to SDR"
            )
        time = frame.pts * tick if frame.pts is not None else index / _rate(container)
        if held is None:
            origin, look = time, _look(stream, frame)
        else:
            gap = max(time - origin - start, Fraction(0))
            yield _Shown(held, time - origin - slack, look)
        held, start = frame, time - origin
        reach = max(reach, start + (frame.duration or 0) * tick)
    if held is not None:
        # What the stream promises, but not what a torn file lacks; alone, the durations of B-frames are not in order.
        promised = ((stream.start_time or 0) + (stream.duration or 0)) * tick - origin
        end = min((end for end in (promised, reach) if end > start), default=start + (gap or 1 / _rate(container)))
        yield _Shown(held, end - slack, look)


def _look(stream: av.VideoStream, first: av.VideoFrame) -> _Look:
    """From the stream and its first frame: a frame whose side data were looked at is not freed at once."""
    side: Any = first.side_data.get("DISPLAYMATRIX")
    a, b, _, c, d = struct.unpack("=5i", bytes(side)[:20]) if side is not None else (1, 0, 0, 0, 1)
    return _Look(Fraction(stream.sample_aspect_ratio or 1), a, b, c, d)


def _rate(container: av.container.InputContainer) -> Fraction:
    """Frames per second of a file whose frames have no times. Raises VideoError if it has no rate either."""
    rate = container.streams.video[0].average_rate
    if not rate:
        raise VideoError(f"{container.name}: has neither frame times nor a frame rate; write it again as mp4")
    return rate


def _image(shown: _Shown, size: tuple[int, int] | None, reformatter: av.video.reformatter.VideoReformatter) -> Tensor:
    """A frame as it is shown, in RGB: [3, H, W] uint8."""
    frame = shown.frame
    untagged = frame.colorspace == UNSPECIFIED and not frame.format.is_rgb
    matrix = BT709 if untagged and (frame.width >= 1280 or frame.height > 576) else None  # as players guess
    deep = frame.format.components[0].bits > 8  # which swscale's fast path makes up to three levels too dark
    picture = reformatter.reformat(
        frame, format="rgb24", src_colorspace=matrix, dst_colorspace=matrix, interpolation=ACCURATE if deep else None
    )
    image, (aspect, a, b, c, d) = torch.from_numpy(picture.to_ndarray()).permute(2, 0, 1), shown.look
    if abs(b) > abs(a):
        image, aspect, a, d = image.transpose(1, 2), 1 / aspect, c, b
    if axes := [axis for axis, sign in ((2, a), (1, d)) if sign < 0]:
        image = image.flip(axes)
    height, width = image.shape[1:]
    return _fit(image, size or (height, max(1, round(width * aspect))), aspect)


@functools.cache
def _say(text: str) -> None:
    """Log what is cut, once for all files alike."""
    log.warning(text)


def _fit(image: Tensor, size: tuple[int, int], aspect: Fraction) -> Tensor:
    """Centre crop to size's aspect ratio, then area-resample: [3, h, w] -> [3, H, W] uint8. aspect: of the image's pixels."""
    height, width = image.shape[1:]
    if (height, width) == size and aspect == 1:
        return image
    scale = min(Fraction(height, size[0]), width * aspect / size[1])
    crop_h, crop_w = max(1, round(size[0] * scale)), max(1, round(size[1] * scale / aspect))
    if (crop_h, crop_w) != (height, width):
        _say(f"videos of {height} x {width} pixels are cropped to {crop_h} x {crop_w} to fit {size[0]} x {size[1]}")
    top, left = (height - crop_h) // 2, (width - crop_w) // 2
    image = image[:, top : top + crop_h, left : left + crop_w].contiguous()
    return F.interpolate(image[None].float(), size, mode="area")[0].round_().to(torch.uint8)


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
    with extra("train"):
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

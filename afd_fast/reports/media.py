"""Videos of a report: panels side by side, at a size that a page can hold, in the page or next to it.

Legend: F frames, H x W pixels, 8 bits a value.
"""

import base64
import io
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_fast.errors import extra
from afd_fast.video_io import write_video

with extra("train"):
    from PIL import Image

GAP = 8  # px between panels
LARGEST, WIDEST = 424, 1680  # px: of a panel's sides, of all panels together
SMALLEST = 240  # px: smaller panels are enlarged by a whole factor
CRF = 23
CAP = 14_000_000  # bytes of videos and posters in a page; a report stays below 15 MB


class Video(NamedTuple):
    """A video of a page. source, poster: URLs, of data or relative to the page."""

    source: str
    poster: str
    width: int
    height: int
    description: str


class Clip(NamedTuple):
    """What one video shows: panels [3, F, H, W] uint8 of one size, and a description in words."""

    panels: Sequence[Tensor]
    description: str


def panel_size(height: int, width: int, count: int) -> tuple[int, int]:
    """Height and width at which `count` panels are shown: even, and the panels' own aspect as closely as that allows."""
    scale = min(1.0, LARGEST / max(height, width), (WIDEST - GAP * (count - 1)) / count / width)
    if max(height, width) < SMALLEST and scale == 1:
        scale = SMALLEST // max(height, width)
    return max(2, 2 * round(height * scale / 2)), max(2, 2 * round(width * scale / 2))


def side_by_side(panels: Sequence[Tensor]) -> Tensor:
    """Panels [3, F, H, W] uint8 -> [3, F, h, w] uint8, scaled frame by frame and next to each other on grey."""
    height, width = panel_size(panels[0].shape[2], panels[0].shape[3], len(panels))
    frames = panels[0].shape[1]
    total = len(panels) * width + GAP * (len(panels) - 1)
    strip = torch.full((3, frames, height, total), 128, dtype=torch.uint8)
    for index, panel in enumerate(panels):
        left = index * (width + GAP)
        for frame in range(frames):
            strip[:, frame, :, left : left + width] = _scaled(panel[:, frame], height, width)
    return strip


def _scaled(image: Tensor, height: int, width: int) -> Tensor:
    """An image [3, H, W] uint8: blocks where it grows, means over areas where it shrinks."""
    mode = "nearest-exact" if height >= image.shape[1] else "area"
    return F.interpolate(image[None].float(), (height, width), mode=mode)[0].round_().to(torch.uint8)


def poster(strip: Tensor) -> bytes:
    """The middle frame of [3, F, H, W] uint8 as JPEG."""
    buffer = io.BytesIO()
    image = Image.fromarray(strip[:, strip.shape[1] // 2].permute(1, 2, 0).contiguous().numpy())
    image.save(buffer, "JPEG", quality=70)
    return buffer.getvalue()


def videos(clips: Iterable[Clip], fps: float, page: Path) -> list[Video]:
    """The clips as videos of the page at `page`: inside it where they fit CAP together, else in the folder next to it that
    bears its name. One clip is in memory at a time."""
    folder = page.with_suffix(".videos")
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier report
    folder.mkdir()
    made = list(_written(clips, fps, folder))
    files = [path for path in folder.iterdir()]
    if sum(path.stat().st_size for path in files) * 4 / 3 > CAP:
        return made
    inside = [v._replace(source=_data(page.parent / v.source), poster=_data(page.parent / v.poster)) for v in made]
    shutil.rmtree(folder)
    return inside


def _written(clips: Iterable[Clip], fps: float, folder: Path) -> Iterator[Video]:
    for number, clip in enumerate(clips):
        strip = side_by_side(clip.panels)
        video, image = (folder / f"{number:03d}.{kind}" for kind in ("mp4", "jpg"))
        write_video(video, strip, fps, crf=CRF)
        image.write_bytes(poster(strip))
        source, still = (f"{folder.name}/{path.name}" for path in (video, image))
        yield Video(source, still, strip.shape[3], strip.shape[2], clip.description)


def _data(path: Path) -> str:
    """A file as a data URL."""
    kinds: Mapping[str, str] = {".mp4": "video/mp4", ".jpg": "image/jpeg"}
    return f"data:{kinds[path.suffix]};base64," + base64.b64encode(path.read_bytes()).decode()

"""A moving picture of a finished run: its sample prompts side by side, one row each for base, student and teacher."""

import math
import textwrap
from pathlib import Path

from afd_fast.errors import ConfigError, extra
from afd_fast.reports.run import KINDS, open_samples, read_result
from afd_fast.reports.scores import name_of

with extra("train"):
    from PIL import Image, ImageDraw, ImageFont

PANEL, GAP, LABEL = 104, 8, 76  # px: longer side of a clip, between clips, width of the labels
WRAP, LINE, LINES = 17, 12, 4  # a prompt's characters in a line, the height of a line in px, lines at most
INK = (60, 64, 72)


def write_picture(run: Path, path: Path, prompts: int = 6, fps: float = 6.0) -> Path:
    """Write an animated picture (the suffix decides: .webp or .gif) of the first sample clips of a run's `prompts`.

    A clip is enlarged by a whole factor, or made smaller, to about `PANEL` px. ConfigError for another folder or suffix.
    """
    if path.suffix not in (".webp", ".gif"):
        raise ConfigError(f"{path} is no animated picture: expected a name that ends in .webp or .gif")
    method = name_of(read_result(run)["config"]["method"])
    with open_samples(run) as samples:
        said = samples.prompts[:prompts]
        clips = {kind: [samples.clip(kind, 0, p) for p in range(len(said))] for kind in KINDS}
    frames, height, width = clips["student"][0].shape[1:]
    scale = PANEL / max(height, width)
    scale = math.floor(scale) if scale >= 1 else scale
    wide, high = round(width * scale), round(height * scale)
    size = (LABEL + len(said) * (wide + GAP), len(clips) * (high + GAP) + LINES * LINE)
    font = ImageFont.load_default(size=11)

    def draw(frame: int) -> Image.Image:
        image = Image.new("RGB", size, "white")
        pen = ImageDraw.Draw(image)
        for row, (name, clip) in enumerate(clips.items()):
            top = row * (high + GAP)
            pen.text((0, top + high / 2), {"student": method}.get(name, name), INK, font, anchor="lm")
            for column in range(len(said)):
                pixels = Image.fromarray(clip[column][:, frame].permute(1, 2, 0).numpy())
                resampling = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
                image.paste(pixels.resize((wide, high), resampling), (LABEL + column * (wide + GAP), top))
        for column, prompt in enumerate(said):
            lines = textwrap.wrap(prompt, WRAP, max_lines=LINES, placeholder=" …")
            for line, text in enumerate(lines):
                pen.text((LABEL + column * (wide + GAP), size[1] - (LINES - line) * LINE), text, INK, font)
        return image

    path.parent.mkdir(parents=True, exist_ok=True)
    images = [draw(frame) for frame in range(frames)]
    durations = [1000 / fps] * (frames - 1) + [1500]  # the last frame rests
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0)
    return path

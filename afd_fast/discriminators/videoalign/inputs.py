"""The inputs of VideoAlign's reward model: clips to pixel patches on the device, prompts to token ids.

The numbers are those of VideoAlign 219ab9d (`vision_process.py`, `inference.py`) and of the Qwen2-VL processor.
Legend: B clips, F frames, H x W pixels, t x h x w patches of 2 x 14 x 14, N = t h w.
"""

import ast
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_fast.errors import ConfigError, MissingFileError
from afd_fast.files.text import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PATCH, TEMPORAL, MERGE = 14, 2, 2
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
REWARD_TOKENS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
VIDEO_TOKEN = "<|video_pad|>"
TEMPLATE_SHA256 = "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700"
TEMPLATE_URL = (
    "https://raw.githubusercontent.com/KwaiVGI/VideoAlign/219ab9db64c045e5181a2202d11f686439351292/prompt_template.py"
)


class Size(NamedTuple):
    """Size of a frame in pixels."""

    height: int
    width: int


class Grid(NamedTuple):
    """Patches of a clip in time, height and width."""

    t: int
    h: int
    w: int


class Patches(NamedTuple):
    """Pixel patches [B, N, 1176] of B clips of one size, in float32, and their common grid."""

    values: Tensor
    grid: Grid


def sample_frames(frames: int, clip_fps: float, fps: float = 2.0) -> list[int]:
    """Indices of the frames that VideoAlign samples: an even number, at least 4 if the clip has as many, at most 768,
    from the first to the last frame. Raises ValueError for fewer than 2 frames."""
    if frames < TEMPORAL:
        raise ValueError(f"got a clip of {frames} frames; a clip needs at least {TEMPORAL} frames")
    most = min(768, frames) // TEMPORAL * TEMPORAL
    n = round(min(max(frames / clip_fps * fps, 4), most) / TEMPORAL) * TEMPORAL
    return torch.linspace(0, frames - 1, n, dtype=torch.float32).round().long().tolist()


def smart_size(height: int, width: int, min_pixels: int, max_pixels: int) -> Size:
    """The size to which Qwen2-VL resizes: multiples of 28, nearly the same aspect ratio, the area within the limits.

    Raises ValueError for a frame with one side more than 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"a frame of {height}x{width} has one side more than 200 times the other: crop it")
    unit = PATCH * MERGE
    size = [max(unit, round(x / unit) * unit) for x in (height, width)]
    if size[0] * size[1] > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        size = [math.floor(x / shrink / unit) * unit for x in (height, width)]
    elif size[0] * size[1] < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        size = [math.ceil(x * grow / unit) * unit for x in (height, width)]
    return Size(size[0], size[1])


def check_shape(videos: Tensor) -> None:
    """Raises ValueError unless videos are floats [B, 3, F, H, W]."""
    if videos.ndim != 5 or videos.shape[1] != 3 or not videos.numel():
        raise ValueError(f"got videos {tuple(videos.shape)}; videos must be [B, 3, F, H, W]")
    if not videos.is_floating_point():
        raise ValueError(f"got videos of {videos.dtype}; videos must be floats in [0, 1]: divide 0..255 by 255")


def check_range(videos: Tensor) -> None:
    """Raises ValueError unless the values are in [0, 1]."""
    low, high = torch.stack(videos.detach().aminmax()).tolist()  # one wait
    if not (low >= 0 and high <= 1):  # also if either is NaN
        raise ValueError(
            f"got videos with values in [{low:g}, {high:g}]; videos must be in [0, 1]: divide 0..255 by 255, clamp the output "
            "of a decoder"
        )


def _round8(x: Tensor) -> Tensor:
    """Round to whole grey levels 0..255; the gradient passes straight through."""
    x = x.clamp(0, 255)
    return x + (x.round() - x).detach()


def to_patches(
    videos: Tensor, *, clip_fps: float, fps: float, min_pixels: int, max_pixels: int,
    device: torch.device | str | None = None,
) -> Patches:  # fmt: skip
    """The patches of videos [B, 3, F, H, W] in [0, 1] at clip_fps.

    Frames are sampled, rounded to 8 bits before and after an antialiased bicubic resize, and normalised, like
    VideoAlign's reader and the Qwen2-VL processor do with the same clip in an 8-bit file. Differentiable (rounding is
    straight-through). Only the sampled frames go to `device` (None: where the videos are) and are looked at. Raises
    ValueError as `check_shape`, `sample_frames`, `check_range` and `smart_size`.
    """
    check_shape(videos)
    index = sample_frames(videos.shape[2], clip_fps, fps)
    x = videos[:, :, index].to(device)
    check_range(x)
    x = x.transpose(1, 2)  # [B, n, 3, H, W]
    size = smart_size(x.shape[-2], x.shape[-1], min_pixels, max_pixels)
    x = _round8(x.float() * 255).flatten(0, 1)
    if x.shape[-2:] != size:
        x = _round8(F.interpolate(x, size, mode="bicubic", align_corners=False, antialias=True))
    mean, std = (x.new_tensor(c).view(3, 1, 1) for c in (CLIP_MEAN, CLIP_STD))
    x = (x / 255 - mean) / std
    t, h, w = grid = Grid(len(index) // TEMPORAL, size.height // PATCH, size.width // PATCH)
    x = x.view(-1, t, TEMPORAL, 3, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH)
    x = x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)  # the four patches that are merged are adjacent
    return Patches(x.reshape(len(videos), t * h * w, -1), grid)


def patch_positions(grids: Sequence[tuple[int, int, int]], device: torch.device) -> Tensor:
    """Row and column [sum N, 2] of every patch of clips with these grids (t, h, w), in the order of `to_patches`."""
    parts = []
    for t, h, w in grids:
        rows, cols = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
        x = torch.stack([rows, cols], -1).view(h // MERGE, MERGE, w // MERGE, MERGE, 2)
        parts.append(x.transpose(1, 2).reshape(h * w, 2).repeat(t, 1))
    return torch.cat(parts)


def read_template(folder: Path) -> str:
    """The text around the prompt: `prompt_template.txt` in the folder unchanged, or VideoAlign's `prompt_template.py`.

    The latter is parsed, not run, and compared with a SHA-256, because a single space more or less would change every
    score. Raises FileNotFoundError with the command that downloads it, ValueError for another template.
    """
    if (folder / "prompt_template.txt").is_file():
        return read_text(folder / "prompt_template.txt")
    source = folder / "prompt_template.py"
    if not source.is_file():
        raise MissingFileError(f"{source} is missing; get it: curl -L -o '{source}' {TEMPLATE_URL}")
    try:
        text = _assigned(read_text(source), "DETAILED_PROMPT_WITH_SPECIAL_TOKEN")
    except (SyntaxError, ValueError):  # not Python, not UTF-8, or not a literal
        text = None
    if text is None or hashlib.sha256(text.encode()).hexdigest() != TEMPLATE_SHA256:
        raise ConfigError(
            f"{source} does not hold the template of the published checkpoint; get it from {TEMPLATE_URL}"
        )
    return text


def _assigned(code: str, name: str) -> str | None:
    """The string that Python code assigns to a module's name, without running the code; None if there is none."""
    for node in ast.parse(code).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            value = ast.literal_eval(node.value)
            return value if isinstance(value, str) else None
    return None


class PromptTokens:
    """Chat text to token ids around a video. prefix: ids before the video; `suffix(prompt)`: ids after it up to the last
    reward token, because nothing after that affects a score (the model is causal). Each prompt is tokenised once.

    Raises ConfigError for a template or tokenizer without the reward tokens.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: str):
        self.tokenizer, self.template = tokenizer, template
        marks = (*REWARD_TOKENS[:2], "{text_prompt}", REWARD_TOKENS[2])
        places = [template.find(mark) for mark in marks]
        if -1 in places or any(template.count(mark) != 1 for mark in marks):
            counts = {mark: template.count(mark) for mark in marks}
            raise ConfigError(
                f"the template holds {counts}; it must hold each of them once: take VideoAlign's template"
            )
        if places[2] > places[3]:
            raise ConfigError(
                f"{REWARD_TOKENS[2]} is before the prompt in the template and cannot attend to it: move it after the prompt"
            )
        self.reward_ids = [tokenizer.convert_tokens_to_ids(mark) for mark in REWARD_TOKENS]
        self.video_id = tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)
        missing = [m for m in (*REWARD_TOKENS, VIDEO_TOKEN) if m not in tokenizer.get_vocab()]
        if missing:
            raise ConfigError(f"the tokenizer lacks {missing}: use the one in the tokenizer folder of the checkpoint")
        self.special = sorted(tokenizer.get_added_vocab(), key=len)
        start = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        self.prefix = self._ids(start)
        self._suffixes: dict[str, tuple[int, ...]] = {}

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def suffix(self, prompt: str) -> tuple[int, ...]:
        """Raises ConfigError for a prompt that holds a special token, which would not be read as text."""
        if prompt not in self._suffixes:
            if found := [s for s in self.special if s in prompt]:
                raise ConfigError(f"prompt {prompt!r} holds the special token {found[0]}: take it out")
            ids = self._ids("<|vision_end|>" + self.template.replace("{text_prompt}", prompt))
            self._suffixes[prompt] = ids[: max(ids.index(i) for i in self.reward_ids) + 1]
        return self._suffixes[prompt]

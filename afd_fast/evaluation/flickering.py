"""VBench's temporal flickering without VBench: the one dimension that needs no weights.

Legend: F frames, H x W pixels. Source: vbench/temporal_flickering.py, commit 45e79ec.
"""

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np

from afd_fast.errors import ConfigError
from afd_fast.evaluation import folder, intervals, vbench
from afd_fast.evaluation.folder import Clip
from afd_fast.evaluation.intervals import Groups, Score
from afd_fast.video_io import read_frames


def temporal_flickering(frames: np.ndarray) -> float:
    """(255 - mean absolute difference of neighbouring frames) / 255 of 8-bit frames [3, F, H, W]; 1 is a still.

    Equals the official function up to its float32 rounding: 1e-8 on a 480 x 832 video read by cv2.
    Raises ValueError unless the frames are 8-bit with F >= 2 (the tool returns nan for one frame).
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1] < 2:
        raise ValueError(
            f"frames are {frames.dtype} {list(frames.shape)}, expected uint8 [3, F >= 2, H, W]: convert floats with "
            "video_io.to_uint8"
        )
    return _score(frames.swapaxes(0, 1))  # [F, 3, H, W]


def _score(images: Iterable[np.ndarray]) -> float:
    """Of frames [3, H, W] as they come, two at a time in memory; the tool averages equally sized frames."""
    pairs = pairwise(image.astype(np.int16) for image in images)
    change = [np.abs(b - a).mean(dtype=np.float64) for a, b in pairs]
    return float((255 - np.mean(change)) / 255) if change else float("nan")


def results(out: Path) -> Path:
    """The table that `run` writes."""
    return out / "results" / "flickering" / "scores.csv"


def _clips(clips: list[Clip], out: Path) -> list[Clip]:
    """The clips of the dimension's prompts if the folder was made from VBench's list, else all."""
    if not (out / vbench.SUITE).exists():
        return clips
    prompts = set(vbench.suite(out / vbench.SUITE).get("temporal_flickering", []))
    return [clip for clip in clips if clip.prompt in prompts]


def run(out: Path, say: Callable[[str], None] = print) -> None:
    """Compute the score of every video in the folder. Raises ConfigError for missing videos or unexpected files."""
    clips = _clips(folder.check(out), out)
    rows = [(clip.video, _score(image.numpy() for image in read_frames(out / "videos" / clip.video))) for clip in clips]
    if still := [video for video, score in rows if math.isnan(score)]:
        raise ConfigError(f"{still[0]} holds a single frame and flickering needs two: replace the file")
    results(out).parent.mkdir(parents=True, exist_ok=True)
    folder.write_csv(results(out), ("video", "score"), rows)
    say(f"flickering: {len(rows)} videos scored")


def values(out: Path) -> dict[str, Groups]:
    """{score: {prompt: values x 100}}; empty if it was not run. Raises ConfigError if the table lists other videos."""
    if not results(out).exists():
        return {}
    rows = folder.read_csv(results(out), ("video", "score"))
    found = {row["video"]: 100 * folder.number(row, "score", results(out)) for row in rows}
    for video, score in found.items():
        if not 0 <= score <= 100:
            raise ConfigError(
                f"{results(out)}: {video!r} has {score / 100:g}, expected 0 to 1: run `afd-fast eval run flickering` again"
            )
    clips = _clips(folder.read_manifest(out), out)
    if found.keys() != {clip.video for clip in clips}:
        raise ConfigError(
            f"{results(out)} holds scores of other videos than the manifest lists: run `afd-fast eval run flickering` again"
        )
    return {"temporal flickering, computed here": folder.by_prompt(clips, found)}


def collect(out: Path) -> list[Score]:
    """The mean score with a bootstrap interval. Raises ConfigError as `values`."""
    return [intervals.score(name, groups, "without the static filter") for name, groups in values(out).items()]

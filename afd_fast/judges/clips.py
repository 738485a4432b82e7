"""Weight-free scores for real videos, where no simulator can judge.

Legend: N clips, F frames, H x W pixels in [0, 1].
"""

import numpy as np

from afd_fast.judges.physics import frechet


def evaluate(clips: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Scores of clips [N, 3, F, H, W], compared with teacher clips of the same prompts.

    dynamic: mean absolute change between frames, percent of the range. brightness, contrast: mean and std.
    frechet: Frechet distance on per-frame mean colour and mean change (nan with fewer than two clips on a side).
    """

    def features(x: np.ndarray) -> np.ndarray:
        change = np.abs(np.diff(x, axis=2)).mean((1, 3, 4))  # [N, F - 1]
        return np.concatenate([x.mean((3, 4)).reshape(len(x), -1), change], 1)

    clips, reference = np.asarray(clips, np.float64), np.asarray(reference, np.float64)
    enough = min(len(clips), len(reference)) > 1
    return {
        "dynamic": float(100 * np.abs(np.diff(clips, axis=2)).mean()),
        "brightness": float(clips.mean()),
        "contrast": float(clips.std()),
        "frechet": frechet(features(clips), features(reference)) if enough else float("nan"),
    }

"""Any function from (prompt, seed) to a finished video as the teacher of the embedded student.

    python examples/own_teacher.py OUT

The function is asked once per prompt and seed, before training starts; its videos are kept on disk next to the run.
"""

import sys

import torch

from afd_fast.config import with_overrides
from afd_fast.errors import AFDError
from afd_fast.reports.run import write_report
from afd_fast.teachers import CallableTeacher
from afd_fast.training import TrainConfig, train

PROMPTS = [f"a {color} square moving {way}" for color in ("red", "green", "blue") for way in ("left", "right", "up")]
COLORS = {"red": 0, "green": 1, "blue": 2}
WAYS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0)}


def teacher(prompt, seed):
    """A video [3, frames, height, width] in [0, 1]."""
    _, color, _, _, way = prompt.split()
    video = torch.zeros(3, 12, 16, 16)
    row, column = torch.randint(6, 10, (2,), generator=torch.Generator().manual_seed(seed)).tolist()
    for frame in range(12):
        video[COLORS[color], frame, row : row + 4, column : column + 4] = 1
        row, column = max(0, row + WAYS[way][0] * (frame % 2)), column + WAYS[way][1] * (frame % 2)
        column = min(12, max(0, column))
    return video


def main(out, *overrides):
    config = with_overrides(TrainConfig(), ["name=squares", "iterations=100", *overrides])
    train(config, out=out, teacher=CallableTeacher(teacher, PROMPTS, name="squares-1", fps=10))
    print(write_report(out))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except AFDError as error:  # with what to change in its message
        sys.exit(f"error: {error}")

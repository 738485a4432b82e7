"""Scores videos with VideoAlign's VideoReward: a script for the official environment, run inside the repository's folder.

    python videoalign_driver.py CHECKPOINT INPUT.csv OUTPUT.csv

INPUT has the columns video (an absolute path) and prompt. OUTPUT has video, VQ, MQ, TA and Overall: the first three
minus the checkpoint's mean, divided by its standard deviation (use_norm), and their sum.
"""

import csv
import os
import sys

sys.path[0] = os.getcwd()  # the repository's modules, not the files next to this one


def main(checkpoint: str, source: str, target: str) -> None:
    import torch
    from inference import VideoVLMRewardInference  # type: ignore[import-not-found]  # VideoAlign's inference.py

    model = VideoVLMRewardInference(checkpoint, device="cuda", dtype=torch.bfloat16)
    names = ("VQ", "MQ", "TA", "Overall")
    with open(source, newline="", encoding="utf-8") as read, open(target, "w", newline="", encoding="utf-8") as write:
        table = csv.writer(write)
        table.writerow(("video", *names))
        for row in csv.DictReader(read):
            with torch.no_grad():
                reward = model.reward([row["video"]], [row["prompt"]], use_norm=True)[0]
            table.writerow((row["video"], *(reward[name] for name in names)))
            write.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])

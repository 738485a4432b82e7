"""Scores videos with VideoAlign's VideoReward: a script for the official environment, run in the repository's folder.

    python videoalign_driver.py CHECKPOINT INPUT.csv OUTPUT.csv

INPUT has the columns video (an absolute path) and prompt; OUTPUT has video, VQ, MQ, TA and Overall, each with the
checkpoint's mean taken off and divided by its standard deviation (use_norm); Overall is their sum.
"""

import csv
import os
import sys

sys.path[0] = os.getcwd()  # the repository's own modules, not the files beside this one


def main(checkpoint: str, source: str, target: str) -> None:
    import torch
    from inference import VideoVLMRewardInference

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

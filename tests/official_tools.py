"""Stand-ins for the official tools in real virtual environments: they take the same arguments, find videos the same way
and write the same files. `misbehave` (a file next to the fake, one word) makes them fail as the real ones do."""

import sys
import venv
from pathlib import Path

VBENCH = """
import argparse, json, os, pathlib, sys, time
parser = argparse.ArgumentParser()
for name in ("videos_path", "output_path", "full_json_dir", "mode"):
    parser.add_argument("--" + name, required=True)
parser.add_argument("--dimension", nargs="+", required=True)
args = parser.parse_args()
assert args.mode == "vbench_standard" and os.environ["MASTER_PORT"] and "PYTHONPATH" not in os.environ
here = pathlib.Path(__file__).parent
mood = (here / "misbehave").read_text() if (here / "misbehave").exists() else ""
with open(here / "calls", "a") as file:
    print(*args.dimension, file=file)
if mood == "silent":
    print("Traceback ... CUDA out of memory")
    sys.exit(0)
there = os.listdir(args.videos_path)
extension = os.path.splitext(there[0])[1]
(dimension,) = args.dimension
rows = []
for row in json.load(open(args.full_json_dir)):
    if dimension in row["dimension"]:
        for i in range(5):
            name = row["prompt_en"] + "-" + str(i) + extension
            if name in there:
                rows.append({"video_path": os.path.join(args.videos_path, name)})
            else:
                print("WARNING!!! This required video is not found!", name)
if mood == "skip":
    rows.pop()
for k, row in enumerate(rows):
    value = (k % 10 + 0.5) / 10
    yes = dimension in ("dynamic_degree", "human_action")
    row["video_results"] = k % 3 == 0 if yes else 100 * value if dimension == "imaging_quality" else value
if dimension == "color":
    rows = rows[1:]
mean = sum(float(row["video_results"]) for row in rows) / len(rows)
mean = mean / 100 if dimension == "imaging_quality" else mean
os.makedirs(args.output_path, exist_ok=True)
name = os.path.join(args.output_path, "results_2026-01-02-03:04:05." + str(time.time_ns()))
json.dump({dimension: [mean, rows]}, open(name + "_eval_results.json", "w"))
json.dump([], open(name + "_full_info.json", "w"))
"""

STATIC_FILTER = """
import argparse, glob, json, os, re, shutil
def main():
    calls = os.path.join(os.path.dirname(__file__), "..", "launch", "calls")
    assert "dynamic_degree" in open(calls).read()  # which fetches the weights
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["static_filter"])
    parser.add_argument("--videos_path", required=True)
    parser.add_argument("--result_path", required=True)
    args = parser.parse_args()
    target, kept = os.path.join(args.result_path, "filtered_videos"), {}
    os.makedirs(target)
    for path in sorted(glob.glob(os.path.join(args.videos_path, "*.mp4"))):
        prompt, i = re.fullmatch(r"(.*)-(\\d+)\\.mp4", os.path.basename(path)).groups()
        if prompt.startswith("In a still frame") and int(i) % 4 == 0 and kept.setdefault(prompt, 0) < 5:
            shutil.copy(path, os.path.join(target, prompt + "-" + str(kept[prompt]) + ".mp4"))
            kept[prompt] += 1
"""

VIDEOPHY2 = """
import argparse, csv, pathlib, sys
import template  # lies next to the script
parser = argparse.ArgumentParser()
for name in ("input_csv", "checkpoint", "output_csv", "task"):
    parser.add_argument("--" + name, required=True)
args = parser.parse_args()
mood = pathlib.Path("misbehave").read_text() if pathlib.Path("misbehave").exists() else ""
with open("calls", "a") as file:
    print(args.task, file=file)
rows = list(csv.DictReader(open(args.input_csv, newline="")))
if mood == "silent":
    sys.exit(0)
if mood == "skip":
    rows.pop()
with open(args.output_csv, "w", newline="") as file:  # what pandas writes: an index column without a name
    table = csv.writer(file)
    table.writerow(["", "videopath", "caption", "score"])
    for k, row in enumerate(rows):
        assert pathlib.Path(row["videopath"]).is_file() and row["caption"]
        table.writerow([k, row["videopath"], row["caption"], float((0, 4, 5, 3)[k % 4] if args.task == "pc" else 4)])
"""

VIDEOALIGN = """
import os, pathlib, utils, torch
class VideoVLMRewardInference:
    def __init__(self, load_from_pretrained, load_from_pretrained_step=-1, device="cuda", dtype=None):
        assert os.path.exists(os.path.join(load_from_pretrained, "model_config.json")) and dtype == torch.bfloat16
    def reward(self, video_paths, prompts, fps=None, num_frames=None, max_pixels=None, use_norm=True):
        assert os.path.isfile(video_paths[0]) and len(video_paths) == len(prompts) == 1 and use_norm
        if pathlib.Path("misbehave").exists() and "-1.mp4" in video_paths[0]:
            raise RuntimeError("CUDA out of memory")
        value = len(prompts[0]) / 10
        return [{"VQ": value, "MQ": value + 1, "TA": -value, "Overall": value + 1}]
"""

TORCH = "import contextlib\nno_grad = contextlib.nullcontext\nbfloat16 = 'bfloat16'\n"


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def environment(folder: Path) -> Path:
    """An environment with a vbench, a peft and a torch that are fake, and a python that is not."""
    venv.create(folder, symlinks=True)
    packages = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    for name in ("", "launch", "cli"):
        write(packages / "vbench" / name / "__init__.py")
    write(packages / "vbench" / "launch" / "evaluate.py", VBENCH)
    write(packages / "vbench" / "cli" / "vbench.py", STATIC_FILTER)
    write(packages / "peft.py")
    write(packages / "torch.py", TORCH)
    return folder


def launch_folder(env: Path) -> Path:
    """Where the fake VBench keeps `calls` and `misbehave`."""
    (folder,) = env.glob("lib/python*/site-packages/vbench/launch")
    return folder


def videophy_repo(folder: Path) -> Path:
    write(folder / "VIDEOPHY2" / "inference.py", VIDEOPHY2)
    write(folder / "VIDEOPHY2" / "template.py")
    return folder


def videoalign_repo(folder: Path) -> Path:
    write(folder / "inference.py", VIDEOALIGN)
    write(folder / "utils.py")
    return folder

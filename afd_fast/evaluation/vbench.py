"""VBench by its official tool: which videos it expects, running it, reading what it wrote.

The tool is https://github.com/Vchitect/VBench (0.1.5, commit 45e79ec). A *suite* is the list in its VBench_full_info.json.
Values are raw means in [0, 1]; totals are plain means x 100 of raw values, as in the paper's Table 1, not the leaderboard's.
"""

import json
import math
import operator
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from afd_fast.errors import ConfigError, ToolError
from afd_fast.evaluation import folder, intervals, official
from afd_fast.evaluation.folder import Clip
from afd_fast.evaluation.intervals import Groups, Score
from afd_fast.files.text import read_json, read_text

PHYSICS = ("temporal_flickering", "motion_smoothness", "dynamic_degree", "human_action", "spatial_relationship")
GENERAL = (
    "subject_consistency", "background_consistency", "aesthetic_quality", "imaging_quality", "object_class",
    "multiple_objects", "color", "scene", "appearance_style", "temporal_style", "overall_consistency",
)  # fmt: skip
DIMENSIONS = PHYSICS + GENERAL
COSINES = ("appearance_style", "temporal_style", "overall_consistency")  # in [-1, 1]; all others are in [0, 1]
YES_NO = ("dynamic_degree", "human_action")  # per video; the score is the share of yes
SUITE = "VBench_full_info.json"
FLICKER = 25  # videos per prompt of temporal_flickering, of which the tool scores
KEPT = 5  # still ones at most; also the tool's number of videos for every other prompt
STATIC = Path("static", "filtered_videos")
Value = TypeVar("Value", float, np.ndarray)


class Results(NamedTuple):
    """A results file of the tool: its mean, {video: value} in [0, 1], and the names of all rows, repeated ones too."""

    mean: float
    values: dict[str, float]
    names: list[str]


class Scored(NamedTuple):
    """A scored dimension in [0, 1]: the tool's mean and {prompt: its videos' values}."""

    mean: float
    groups: Groups


def suite(path: Path) -> dict[str, list[str]]:
    """{dimension: its prompts} of a VBench_full_info.json, in the file's order. Raises ConfigError for other files."""
    prompts: defaultdict[str, list[str]] = defaultdict(list)
    try:
        for row in json.loads(read_text(path)):
            for dimension in row["dimension"]:
                prompts[dimension].append(row["prompt_en"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not VBench's {SUITE} ({error!r}): take the file from github.com/Vchitect/VBench"
        ) from error
    if not prompts:
        raise ConfigError(f"{path} names no dimension: take the file from github.com/Vchitect/VBench")
    if unknown := prompts.keys() - set(DIMENSIONS):
        raise ConfigError(
            f"{path} names dimensions that VBench does not have: {', '.join(sorted(unknown))}; take the file from "
            "github.com/Vchitect/VBench"
        )
    return dict(prompts)


def clips(prompts: dict[str, list[str]], n: int = KEPT, seed: int = 0) -> list[Clip]:
    """The videos to make: `{prompt}-{i}.mp4`, i = 0..n-1, with consecutive seeds from `seed` on.

    n: 5, VBench's protocol, with 25 for the prompts of temporal_flickering; or 1, which the paper's numbers use.
    """
    if n not in (1, KEPT):
        raise ConfigError(f"got n={n} videos per prompt, VBench is scored on n=5 (its protocol) or n=1 (the paper's)")
    count: dict[str, int] = {}
    for dimension, lines in prompts.items():
        for prompt in lines:
            many = FLICKER if dimension == "temporal_flickering" and n > 1 else n
            count[prompt] = max(many, count.get(prompt, 0))
    names = [(prompt, i) for prompt, many in count.items() for i in range(many)]
    return [Clip(f"{prompt}-{i}.mp4", prompt, seed + k) for k, (prompt, i) in enumerate(names)]


def expected(out: Path, dimension: str) -> dict[str, list[str]]:
    """{prompt: files} that the tool should score for a dimension.

    For temporal_flickering with n = 5 these are the videos that the static filter kept: zero to five per prompt.
    """
    n = folder.read_settings(out)["n"]
    names = {prompt: [f"{prompt}-{i}.mp4" for i in range(n)] for prompt in suite(out / SUITE).get(dimension, [])}
    if dimension == "temporal_flickering" and n > 1:
        kept = {path.name for path in (results(out) / STATIC).glob("*.mp4")}
        names = {prompt: [name for name in files if name in kept] for prompt, files in names.items()}
    return names


def results(out: Path) -> Path:
    """The folder of the tool's files, with one folder per dimension."""
    return out / "results" / "vbench"


def run(out: Path, env: Path, dimensions: list[str] | None = None, say: Callable[[str], None] = print) -> None:
    """Score the folder's videos with the tool of an environment, one dimension at a time, on one GPU.

    Dimensions that have complete results newer than the videos are not run again. A dimension that fails does not stop
    the others; ToolError names all that failed. Raises ConfigError for missing videos, unexpected files or a missing
    environment.
    """
    python = official.python_of(env, "vbench")
    present = suite(out / SUITE)
    wanted = dimensions or [name for name in DIMENSIONS if name in present]
    if unknown := set(wanted) - present.keys():
        raise ConfigError(f"{SUITE} has no dimension {', '.join(sorted(unknown))}; it has {', '.join(present)}")
    newest = max((out / "videos" / clip.video).stat().st_mtime for clip in folder.check(out))
    failed = []
    # Flickering runs last: its static filter needs the RAFT weights, which the tool downloads for dynamic_degree only.
    for dimension in sorted(wanted, key="temporal_flickering".__eq__):
        try:
            file = _file(out, dimension)
            if file is None or file.stat().st_mtime < newest or _problem(out, dimension, file):
                say(f"{dimension}: running, log in {results(out) / dimension / 'log.txt'}")
                _run(out, python, dimension)
            say(f"{dimension}: scored")
        except ToolError as error:
            failed.append(str(error))
            say(f"{dimension}: failed")
    if failed:
        raise ToolError("\n".join(failed))


def _run(out: Path, python: Path, dimension: str) -> None:
    place = results(out).absolute() / dimension
    shutil.rmtree(place, ignore_errors=True)  # no results of an earlier export may remain
    place.mkdir(parents=True)
    log, videos = place / "log.txt", out.absolute() / "videos"
    if dimension == "temporal_flickering" and folder.read_settings(out)["n"] > 1:
        videos = results(out).absolute() / STATIC
        shutil.rmtree(videos.parent, ignore_errors=True)
        main = "from vbench.cli.vbench import main; main()"
        filtering: list[str | Path] = [python, "-c", main, "static_filter", "--videos_path", out.absolute() / "videos"]
        official.call([*filtering, "--result_path", videos.parent], cwd=place, log=log)
        if not any(videos.glob("*.mp4")):
            raise official.failure(dimension, "VBench's static filter kept no video", log)
    # Not `vbench evaluate`: it takes `python` from PATH, joins its arguments into one string for a shell and drops
    # the exit status. Not several GPUs: appearance_style would be the mean over the last frames only.
    command: list[str | Path] = [
        python,
        "-m",
        "vbench.launch.evaluate",
        "--videos_path",
        videos,
        "--output_path",
        place,
    ]
    command += ["--full_json_dir", (out / SUITE).absolute(), "--dimension", dimension, "--mode", "vbench_standard"]
    official.call(command, cwd=place, log=log)
    file = _file(out, dimension)
    if file is None:
        raise official.failure(dimension, "VBench left no results file", log)
    if problem := _problem(out, dimension, file):
        raise official.failure(dimension, problem, log)


def _file(out: Path, dimension: str) -> Path | None:
    """The results file of a dimension, or None. Raises ConfigError if there are several."""
    files = list((results(out) / dimension).glob("results_*_eval_results.json"))
    if len(files) > 1:
        raise ConfigError(f"{results(out) / dimension} holds {len(files)} results files; keep the right one")
    return files[0] if files else None


def _read(file: Path, dimension: str) -> Results:
    """A file {dimension: [mean, [{video_path, video_results}, ...]]}.

    imaging_quality's values of single videos are on a scale of 100, its mean is not: both are in [0, 1] here.
    """
    mean, rows = read_json(file)[dimension]
    names = [Path(row["video_path"]).name for row in rows]
    scale = 100 if dimension == "imaging_quality" else 1
    values = {name: float(row["video_results"]) / scale for name, row in zip(names, rows)}
    return Results(float(mean), values, names)


def _problem(out: Path, dimension: str, file: Path) -> str | None:
    """What is wrong with a results file, or None."""
    try:
        mean, values, names = _read(file, dimension)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{file} is not a results file with {dimension}: {error!r}"
    wanted = {name for files in expected(out, dimension).values() for name in files}
    if dimension == "color":  # the tool leaves out videos in which it does not find the object
        wanted &= set(names)
    if problem := official.coverage(names, wanted):
        return problem
    if not values or not all(map(math.isfinite, values.values())):
        return "a video has no number"
    least = -1 if dimension in COSINES else 0
    if strange := [name for name, value in values.items() if not least <= value <= 1]:
        return f"{strange[0]!r} has {values[strange[0]]:g}, {dimension} is in [{least}, 1]"
    if dimension in YES_NO and not set(values.values()) <= {0.0, 1.0}:
        return "a value is neither yes nor no"
    average = sum(values.values()) / len(values)
    if not math.isclose(mean, average, abs_tol=1e-3):  # all videos have one length: means over frames and videos agree
        return f"the mean in {file.name} is {mean:.4f}, its videos' is {average:.4f}: scored on several GPUs, or edited"
    return None


def totals(values: Mapping[str, Value]) -> dict[str, Value]:
    """{"physics": 100 x the mean of its five, "general": 100 x the mean of the other eleven}, each if all are there.

    values: {dimension: raw value in [0, 1]}, floats or arrays. Source: Table 1's ten rows are these means (to 0.01).
    """
    return {
        name: 100 * reduce(operator.add, (values[dimension] for dimension in parts)) / len(parts)
        for name, parts in (("physics", PHYSICS), ("general", GENERAL))
        if all(dimension in values for dimension in parts)
    }


def _scored(out: Path) -> dict[str, Scored]:
    """{dimension: its scores} of the scored dimensions.

    Raises ConfigError for a results file that lacks a video, lists one twice, lists others, or whose mean is not that
    of its videos.
    """
    tables = {}
    for dimension in DIMENSIONS:
        file = _file(out, dimension)
        if file is None:
            continue
        if problem := _problem(out, dimension, file):
            raise ConfigError(f"{dimension}: {problem}; run `afd-fast eval run vbench` again")
        found = _read(file, dimension)
        files = expected(out, dimension).items()
        groups = {p: [found.values[name] for name in names if name in found.values] for p, names in files}
        tables[dimension] = Scored(found.mean, groups)
    return tables


def values(out: Path) -> dict[str, Groups]:
    """{dimension: {prompt: its videos' values in [0, 1]}} of the scored dimensions.

    Raises ConfigError for incomplete results.
    """
    return {dimension: scored.groups for dimension, scored in _scored(out).items()}


def collect(out: Path) -> list[Score]:
    """The scored dimensions and the complete totals, x 100, with 95 % intervals. Raises ConfigError as `values`."""
    scored = _scored(out)
    means = {name: dimension.mean for name, dimension in scored.items()}
    tables = {name: dimension.groups for name, dimension in scored.items()}
    draws = intervals.draws(tables)
    scores = [_score(name, 100 * means[name], tables[name], 100 * draws[name]) for name in means]
    for name, total in totals(means).items():
        parts = PHYSICS if name == "physics" else GENERAL
        videos = sum(len(group) for part in parts for group in tables[part].values())
        bounds = intervals.percentiles(totals(draws)[name])
        scores.append(Score(f"VBench {name}", total, *bounds, videos, "mean of the dimensions' raw scores"))
    return scores


def _score(dimension: str, value: float, table: Groups, draws: np.ndarray) -> Score:
    groups = table.values()
    count, asked = sum(map(len, groups)), len(groups)
    low, high = intervals.percentiles(draws) if sum(map(bool, groups)) > 1 else intervals.NONE
    notes = []
    if dimension in YES_NO:
        yes = int(sum(map(sum, groups)))
        notes.append(f"{yes}/{count}")
        if count == asked:  # one video per prompt: independent
            low, high = (100 * bound for bound in intervals.wilson(yes, count))
    if empty := sum(1 for group in groups if not group):
        notes.append(f"{empty} of {asked} prompts without a video that could be scored")
    return Score(f"VBench {dimension}", value, low, high, count, ", ".join(notes))

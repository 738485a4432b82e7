"""VideoPhy-2's auto-rater by its official script: physical commonsense (PC) and semantic adherence (SA), 1 to 5.

The script is VIDEOPHY2/inference.py of https://github.com/Hritikbansal/videophy (commit 01d366c). It takes the first
number word it finds in the model's text, 0 if there is none ("none" holds a "one"). A 0 is no score: it is dropped and
counted here.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from afd_fast.errors import ConfigError
from afd_fast.evaluation import folder, intervals, official
from afd_fast.evaluation.folder import Clip
from afd_fast.evaluation.intervals import Groups, Score

TASKS = ("pc", "sa")
HIGH = 4  # the joint score counts videos with at least this in both tasks


def results(out: Path, task: str) -> Path:
    """The table that the script writes for a task."""
    return out / "results" / "videophy2" / f"{task}.csv"


def run(out: Path, env: Path, repo: Path, checkpoint: Path, say: Callable[[str], None] = print) -> None:
    """Rate the folder's videos, PC then SA; a task whose table is complete and newer than the videos is not run again.

    repo: a clone of the repository. checkpoint: the folder of videophy_2_auto. Raises ConfigError that names what is
    missing, ToolError if the script left no complete table.
    """
    script = (repo / "VIDEOPHY2" / "inference.py").absolute()
    if not script.is_file():
        raise ConfigError(f"{script} does not exist; --repo is a clone of github.com/Hritikbansal/videophy")
    if not checkpoint.is_dir():
        raise ConfigError(
            f"{checkpoint} is not a folder; --checkpoint is a clone of hf.co/videophysics/videophy_2_auto"
        )
    python = official.python_of(env, "peft")
    clips = folder.check(out)
    videos = out.absolute() / "videos"
    newest = max((videos / clip.video).stat().st_mtime for clip in clips)
    table = results(out, "input").absolute()
    table.parent.mkdir(parents=True, exist_ok=True)
    folder.write_csv(
        table, ("videopath", "caption"), [(videos / clip.video, clip.prompt) for clip in clips], escape=False
    )
    for task in TASKS:
        to, log = results(out, task).absolute(), results(out, task).absolute().with_suffix(".log")
        if not to.exists() or to.stat().st_mtime < newest or _problem(out, task, clips):
            say(f"{task}: running, log in {log}")
            to.unlink(missing_ok=True)
            log.unlink(missing_ok=True)
            command: list[str | Path] = [python, script, "--input_csv", table, "--checkpoint", checkpoint.absolute()]
            official.call([*command, "--output_csv", to, "--task", task], cwd=script.parent, log=log)
            if problem := _problem(out, task, clips):
                raise official.failure(f"VideoPhy-2 {task}", problem, log)
        say(f"{task}: scored")


class Rating(NamedTuple):
    """A video and its score, nan where it is missing."""

    video: str
    score: float


def _read(out: Path, task: str) -> list[Rating]:
    rows = folder.read_csv(results(out, task), ("videopath", "score"))
    return [Rating(Path(row["videopath"]).name, float(row["score"] or "nan")) for row in rows]


def _problem(out: Path, task: str, clips: list[Clip]) -> str | None:
    """What is wrong with a task's table, or None."""
    try:
        rows = _read(out, task)
    except (ValueError, TypeError) as error:
        return str(error)
    if problem := official.coverage([row.video for row in rows], [clip.video for clip in clips]):
        return problem
    strange = [row.video for row in rows if row.score not in range(6)]
    return f"{strange[0]!r} has a score that is not 0, 1, ... 5" if strange else None


def values(out: Path) -> dict[str, Groups]:
    """PC, SA (1 to 5) and joint (100 where SA >= 4 and PC >= 4, else 0) of what was rated: {score: {prompt: values}}.

    Raises ConfigError for a table that lacks a video, lists one twice, lists others, or holds no score.
    """
    clips = folder.read_manifest(out)
    ratings: dict[str, dict[str, float]] = {}
    for task in TASKS:
        if results(out, task).exists():
            if problem := _problem(out, task, clips):
                raise ConfigError(f"VideoPhy-2 {task}: {problem}; run `afd-fast eval run videophy2` again")
            ratings[task] = {row.video: row.score for row in _read(out, task) if row.score}
    if len(ratings) == len(TASKS):
        both = ratings["pc"].keys() & ratings["sa"].keys()
        ratings["joint"] = {v: 100.0 * (min(ratings["pc"][v], ratings["sa"][v]) >= HIGH) for v in both}
    for name, rated in ratings.items():
        if not rated:
            raise ConfigError(
                f"VideoPhy-2 {name}: none of {len(clips)} answers could be parsed; read results/videophy2/*.log and run "
                "`afd-fast eval run videophy2` again"
            )
    names = {"pc": "VideoPhy-2 PC", "sa": "VideoPhy-2 SA", "joint": "VideoPhy-2 joint"}
    return {names[task]: folder.by_prompt(clips, rated) for task, rated in ratings.items()}


def collect(out: Path) -> list[Score]:
    """The means of `values` with 95 % intervals. Raises ConfigError as `values`."""
    clips = len(folder.read_manifest(out))
    return [_score(name, groups, clips) for name, groups in values(out).items()]


def _score(name: str, groups: Groups, clips: int) -> Score:
    score, notes = intervals.score(name, groups), []
    if name.endswith("joint"):
        yes = sum(group.count(100.0) for group in groups.values())
        notes.append(f"{yes}/{score.videos}")
        if all(len(group) <= 1 for group in groups.values()):  # one video per prompt: independent
            low, high = (100 * bound for bound in intervals.wilson(yes, score.videos))
            score = replace(score, low=low, high=high)
    if dropped := clips - score.videos:
        notes.append(f"{dropped} of {clips} answers could not be parsed: dropped")
    return replace(score, note=", ".join(notes))

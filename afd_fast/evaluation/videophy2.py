"""VideoPhy-2's auto-rater by its official script: physical commonsense (PC) and semantic adherence (SA), 1 to 5.

The script is VIDEOPHY2/inference.py of https://github.com/Hritikbansal/videophy (commit 01d366c). It takes the first
number word it finds in the model's text, 0 if none ("none" holds a "one"): a 0 is no score, dropped here and counted.
"""

from collections.abc import Callable
from pathlib import Path

from afd_fast.config import ConfigError
from afd_fast.evaluation import folder, intervals, official
from afd_fast.evaluation.folder import Clip
from afd_fast.evaluation.intervals import Score

TASKS = ("pc", "sa")
HIGH = 4  # the joint score counts videos with both at least this


def results(out: Path, task: str) -> Path:
    """The table the script writes for a task."""
    return out / "results" / "videophy2" / f"{task}.csv"


def run(out: Path, env: Path, repo: Path, checkpoint: Path, say: Callable[[str], None] = print) -> None:
    """Rate the folder's videos, PC then SA; a task whose table is complete and newer than the videos is not run again.

    repo: a clone of the repository. checkpoint: the folder of videophy_2_auto. ConfigError says what is missing,
    ToolError that the script left no complete table.
    """
    script = (repo / "VIDEOPHY2" / "inference.py").absolute()
    if not script.is_file():
        raise ConfigError(f"{script} is not there; --repo is a clone of github.com/Hritikbansal/videophy")
    if not checkpoint.is_dir():
        raise ConfigError(f"{checkpoint} is no folder; --checkpoint is a clone of hf.co/videophysics/videophy_2_auto")
    python = official.python_of(env, "peft")
    clips = folder.check(out)
    videos = out.absolute() / "videos"
    newest = max((videos / clip.video).stat().st_mtime for clip in clips)
    table = results(out, "input").absolute()
    table.parent.mkdir(parents=True, exist_ok=True)
    folder.write_csv(table, ("videopath", "caption"), [(videos / clip.video, clip.prompt) for clip in clips])
    for task in TASKS:
        to, log = results(out, task).absolute(), results(out, task).absolute().with_suffix(".log")
        if not to.exists() or to.stat().st_mtime < newest or _problem(out, task, clips):
            say(f"{task}: running, log in {log}")
            to.unlink(missing_ok=True)
            log.unlink(missing_ok=True)
            command = [python, script, "--input_csv", table, "--checkpoint", checkpoint.absolute()]
            official.call([*command, "--output_csv", to, "--task", task], cwd=script.parent, log=log)
            if problem := _problem(out, task, clips):
                raise official.failure(f"VideoPhy-2 {task}", problem, log)
        say(f"{task}: scored")


def _read(out: Path, task: str) -> list[tuple[str, float]]:
    rows = folder.read_csv(results(out, task), ("videopath", "score"))
    return [(Path(row["videopath"]).name, float(row["score"] or "nan")) for row in rows]


def _problem(out: Path, task: str, clips: list[Clip]) -> str | None:
    """What is wrong with a task's table, or None."""
    try:
        rows = _read(out, task)
    except ValueError as error:
        return str(error)
    if problem := official.coverage([name for name, _ in rows], [clip.video for clip in clips]):
        return problem
    strange = [name for name, score in rows if score not in range(6)]
    return f"{strange[0]!r} has a score that is not 0, 1, ... 5" if strange else None


def collect(out: Path) -> list[Score]:
    """Mean PC, mean SA (1 to 5) and the joint share (SA >= 4 and PC >= 4, percent) of what was rated.

    ConfigError for a table that lacks a video, has one twice, has others, or no score at all.
    """
    clips = folder.read_manifest(out)
    ratings: dict[str, dict[str, float]] = {}
    for task in TASKS:
        if results(out, task).exists():
            if problem := _problem(out, task, clips):
                raise ConfigError(f"VideoPhy-2 {task}: {problem}; run `afd-fast eval run videophy2` again")
            ratings[task] = {name: score for name, score in _read(out, task) if score}
    scores = [_score(f"VideoPhy-2 {task.upper()}", clips, rated) for task, rated in ratings.items()]
    if len(ratings) == len(TASKS):
        both = ratings["pc"].keys() & ratings["sa"].keys()
        high = {name: float(min(ratings["pc"][name], ratings["sa"][name]) >= HIGH) for name in both}
        scores.append(_score("VideoPhy-2 joint", clips, high, share=True))
    return scores


def _score(name: str, clips: list[Clip], rated: dict[str, float], share: bool = False) -> Score:
    if not rated:
        raise ConfigError(f"{name}: none of {len(clips)} answers could be parsed")
    values = list(rated.values())
    mean, note = sum(values) / len(values), ""
    groups = folder.by_prompt(clips, rated)
    low, high = intervals.bootstrap(groups)
    if share:
        yes = int(sum(values))
        if len(groups) == len(values):  # one video a prompt: independent
            low, high = intervals.wilson(yes, len(values))
        mean, low, high, note = 100 * mean, 100 * low, 100 * high, f"{yes}/{len(values)}"
    if dropped := len(clips) - len(values):
        note = ", ".join(filter(None, (note, f"{dropped} of {len(clips)} answers could not be parsed: dropped")))
    return Score(name, mean, low, high, len(values), note)

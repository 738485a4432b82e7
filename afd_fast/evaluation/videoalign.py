"""VideoAlign's VideoReward by its official code: visual quality, motion quality, text alignment, as z-scores.

The code is https://github.com/KwaiVGI/VideoAlign (commit 219ab9d), a class without a command: its environment's python
runs `videoalign_driver.py`. Conflict of interest: the discriminator starts from the model that gives MQ, so AFD raises
MQ partly by construction; judge by VideoPhy-2 and VBench.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from afd_fast.errors import ConfigError
from afd_fast.evaluation import folder, intervals, official
from afd_fast.evaluation.folder import Clip
from afd_fast.evaluation.intervals import Groups, Score

DRIVER = Path(__file__).with_name("videoalign_driver.py")
NAMES = ("VQ", "MQ", "TA", "Overall")
MOST = 100  # no z-score is larger
NOTE = {"VideoAlign MQ": "the discriminator starts from this model: not an independent judge"}


def results(out: Path) -> Path:
    """The table that the driver writes."""
    return out / "results" / "videoalign" / "scores.csv"


def run(out: Path, env: Path, repo: Path, checkpoint: Path, say: Callable[[str], None] = print) -> None:
    """Score the folder's videos. repo: a clone of the repository; checkpoint: the folder with model_config.json.

    Raises ConfigError that names what is missing, ToolError if the driver left no complete table.
    """
    if not (repo / "inference.py").is_file():
        raise ConfigError(f"{repo / 'inference.py'} does not exist; --repo is a clone of github.com/KwaiVGI/VideoAlign")
    if not (checkpoint / "model_config.json").is_file():
        raise ConfigError(
            f"{checkpoint} has no model_config.json; --checkpoint is a clone of hf.co/KwaiVGI/VideoReward"
        )
    python = official.python_of(env, "torch")
    clips = folder.check(out)
    videos, to = out.absolute() / "videos", results(out).absolute()
    to.parent.mkdir(parents=True, exist_ok=True)
    table, log = to.with_name("input.csv"), to.with_name("log.txt")
    folder.write_csv(table, ("video", "prompt"), [(videos / clip.video, clip.prompt) for clip in clips], escape=False)
    to.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    say(f"VideoAlign: running, log in {log}")
    official.call([python, DRIVER.absolute(), checkpoint.absolute(), table, to], cwd=repo, log=log)
    if problem := _problem(out, clips):
        raise official.failure("VideoAlign", problem, log)
    say("VideoAlign: scored")


class Row(NamedTuple):
    """A video and its scores in the order of NAMES, nan where one is missing."""

    video: str
    scores: list[float]


def _read(out: Path) -> list[Row]:
    rows = folder.read_csv(results(out), ("video", *NAMES))
    return [Row(Path(row["video"]).name, [float(row[name] or "nan") for name in NAMES]) for row in rows]


def _problem(out: Path, clips: list[Clip]) -> str | None:
    """What is wrong with the driver's table, or None."""
    try:
        rows = _read(out)
    except (ValueError, TypeError) as error:
        return str(error)
    if problem := official.coverage([row.video for row in rows], [clip.video for clip in clips]):
        return problem
    broken = [row.video for row in rows if not all(abs(score) <= MOST for score in row.scores)]  # also nan
    return f"{broken[0]!r} has a value that is no number within {MOST} standard deviations" if broken else None


def values(out: Path) -> dict[str, Groups]:
    """VQ, MQ, TA and Overall (z-scores): {score: {prompt: values}}; empty if the tool was not run.

    Raises ConfigError for a table that lacks a video, lists one twice, or lists others.
    """
    if not results(out).exists():
        return {}
    clips = folder.read_manifest(out)
    if problem := _problem(out, clips):
        raise ConfigError(f"VideoAlign: {problem}; run `afd-fast eval run videoalign` again")
    rows = _read(out)
    return {
        f"VideoAlign {name}": folder.by_prompt(clips, {row.video: row.scores[i] for row in rows})
        for i, name in enumerate(NAMES)
    }


def collect(out: Path) -> list[Score]:
    """The means of `values` with bootstrap intervals. Raises ConfigError as `values`."""
    return [intervals.score(name, groups, NOTE.get(name, "")) for name, groups in values(out).items()]

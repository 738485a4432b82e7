"""A review of a teacher's clips -> clips.csv with all of them, clips.html with those to look at."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afd_fast.files.tables import write_csv
from afd_fast.reports.media import Clip, videos
from afd_fast.reports.run import template
from afd_fast.teachers.dataset import TeacherVideos
from afd_fast.training.review import CONTRASTS, Reviewed

SHOWN = 48  # clips of a page
COLUMNS = ("prompt", "video", "weight", "reasons", "flat", "still", "cut", *(f"{name}_score" for name in CONTRASTS))


def verdict(found: Sequence[Reviewed], left_out: Sequence[str]) -> str:
    """How many clips are listed, in a sentence."""
    listed = [one for one in found if one.reasons]
    gone = sum(one.weight == 0 for one in listed)
    more = f" Of no use at all: {len(left_out)} more." if left_out else ""
    return f"To look at: {len(listed)} of {len(found)} clips. To leave out: {gone} of these.{more}"


def write_review(out: Path, found: Sequence[Reviewed], data: TeacherVideos, fps: float) -> None:
    """Write both files into the folder `out`. found: worst first. fps: at which the page plays the clips."""
    out.mkdir(parents=True, exist_ok=True)
    unusable = [{"weight": 0, "reasons": line} for line in data.problems]
    rows = unusable + [_row(one) for one in found]
    write_csv(out / "clips.csv", COLUMNS, ([row.get(column, "") for column in COLUMNS] for row in rows))
    listed = [one for one in found if one.reasons]
    clips = (
        Clip([data.videos[one.prompt][one.number]], f"{one.name}: {'; '.join(one.reasons)}. “{one.prompt}”")
        for one in listed[:SHOWN]
    )
    page = out / "clips.html"
    made = videos(clips, fps, page)
    said = verdict(found, data.problems)
    html = template("review.html").render(teacher=data.teacher.name, verdict=said, count=len(listed), videos=made)
    page.write_text(html, encoding="utf-8")


def _row(one: Reviewed) -> dict[str, Any]:
    scores = {f"{contrast}_score": round(score, 3) for contrast, score in one.scores.items()}
    defects = {name: round(getattr(one.defects, name), 3) for name in ("flat", "still", "cut")}
    said = {"prompt": one.prompt, "video": one.name, "weight": one.weight, "reasons": "; ".join(one.reasons)}
    return said | defects | scores

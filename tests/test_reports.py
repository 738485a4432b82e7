"""Reports: what they say about scores, at what size, and what a browser makes of them.

The tests in a browser need `pip install playwright axe-playwright-python` and a Chromium (on the PATH, or playwright's own).
"""

import base64
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch
from safetensors.torch import save_file

from afd_fast.config import TrainConfig, to_dict
from afd_fast.errors import ConfigError
from afd_fast.evaluation.intervals import NONE
from afd_fast.reports import comparison as compared
from afd_fast.reports import media
from afd_fast.reports.picture import write_picture
from afd_fast.reports.run import Samples, open_samples, write_report
from afd_fast.reports.scores import console_table, table_rows, verdict
from afd_fast.training.run_folder import write_json, write_rows
from afd_fast.video_io import read_video

PHYSICS = {"residual_px": 1.2, "frechet": 0.9, "gravity": 1.7, "gravity_error": 0.4, "general": 0.98, "flicker": 1.0}
CLIPS = {"dynamic": 5.0, "frechet": math.nan, "brightness": 0.4, "contrast": 0.2}


def rows_of(base, **changes):
    """Rows of base, student and teacher; a change is (base, student, teacher)."""
    names = ("base", "student", "teacher")
    rows = {name: {**base, **{k: v[i] for k, v in changes.items()}} for i, name in enumerate(names)}
    return {name: {"step": 0.0, **row} for name, row in rows.items()}


def finished(folder, size=(3, 16, 16), prompts=4, fps=10.0, rows=None, by_prompt=None, seed=0):
    """A finished run's folder: n=2 clips [3, F, H, W] per prompt and kind, metrics and evaluations."""
    rows = rows or rows_of(PHYSICS, residual_px=(1.2, 0.5, 0.1))
    config = to_dict(TrainConfig(iterations=40, seed=seed))
    folder.mkdir(parents=True)
    result = {
        "rows": rows, "prompts": {"train": 9, "held_out": prompts}, "clips_judged": prompts * 2, "problems": [], "seconds": 12.0,
        "notes": [], "config": config, "environment": {"torch": "2"},
    }  # fmt: skip
    write_json(folder / "result.json", result)
    before, after = by_prompt or ([1.2] * prompts, [0.5 + 0.01 * i for i in range(prompts)])
    states = [(0, rows["base"], before), (40, rows["student"], after)]
    write_rows(folder / "evaluations.jsonl", [{**row, "step": s, "by_prompt": b} for s, row, b in states])
    metric = {"reward": 1.0, "margin": 0.5, "accuracy": 0.6, "pair_r": 0.4, "grad_norm": 1.0, "seconds/rollout": 0.1}
    write_rows(folder / "metrics.jsonl", [{"step": s, **metric} for s in range(40)])
    g = torch.Generator().manual_seed(seed)
    shape = (2, prompts, 3, *size)
    clips = {k: torch.randint(0, 256, shape, generator=g, dtype=torch.uint8) for k in ("base", "student", "teacher")}
    about = {"prompts": json.dumps([f"a <ball> number {i}" for i in range(prompts)]), "fps": json.dumps(fps)}
    save_file(clips, folder / "samples.safetensors", about)
    return result


class Page(HTMLParser):
    """The elements of a page: (tag, attributes), and its text."""

    def __init__(self, text):
        super().__init__()
        self.found, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def check_page(path):
    """What holds for every page: landmarks, names for what has no text, nothing that moves by itself or comes from elsewhere."""
    text = path.read_text()
    page = Page(text)
    for tag in ("header", "main", "h1", "title"):
        assert len(page.all(tag)) == 1, tag
    for video in page.all("video"):
        assert {"controls", "muted", "poster", "width", "height"} <= video.keys() and "autoplay" not in video
        assert video["aria-label"].count("next to each other") == 1
    for drawing in page.all("svg"):
        assert drawing["role"] == "img" and drawing["aria-label"]
    ids = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all("scope" in th for th in page.all("th"))
    assert "prefers-reduced-motion" in text and "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert not re.search(r'(src|href|poster)="(https?:|//|/)', text)
    assert "nan" not in " ".join(page.words) and "+0.000" not in text and "-0.000" not in text
    return page


def test_a_page_of_a_run(tmp_path):
    finished(tmp_path / "run")
    page = check_page(write_report(tmp_path / "run"))
    order = [tag if tag != "p" else attributes.get("class") for tag, attributes in page.found]
    assert order.index("verdict") < order.index("video") < order.index("table")
    assert len(page.all("video")) == 8 and not (tmp_path / "run/report.videos").exists()
    assert any("a <ball> number 0" in words for words in page.words)


@pytest.mark.parametrize("fps", [10.0, 16.0])
def test_videos_play_at_the_systems_rate(tmp_path, fps):
    finished(tmp_path / "run", size=(8, 16, 16), prompts=1, fps=fps)
    (video, *_) = check_page(write_report(tmp_path / "run")).all("video")
    data = base64.b64decode(video["src"].partition(",")[2])
    seen = read_video(io.BytesIO(data), fps=1000.0)
    assert abs(seen.shape[1] / 1000 - 8 / fps) < 0.01


def test_videos_that_do_not_fit_lie_next_to_the_page(tmp_path, monkeypatch):
    """And are gone again when they fit."""
    finished(tmp_path / "run", size=(3, 64, 64), prompts=2)
    monkeypatch.setattr(media, "CAP", 1000)
    path = write_report(tmp_path / "run")
    videos = check_page(path).all("video")
    assert path.stat().st_size < 1_000_000
    for video in videos:
        assert read_video(path.parent / video["src"]).shape[1] == 3 and (path.parent / video["poster"]).exists()
    monkeypatch.undo()
    assert check_page(write_report(tmp_path / "run")).all("video")[0]["src"].startswith("data:video/mp4")
    assert not (tmp_path / "run/report.videos").exists()


@pytest.mark.parametrize(
    ("height", "width", "count"),
    [(16, 16, 3), (48, 80, 3), (480, 832, 3), (720, 1280, 3), (1280, 720, 3), (480, 832, 7), (17, 31, 2), (1, 4000, 3)],
)
def test_panels_fit_a_page_and_an_encoder(height, width, count):
    h, w = media.panel_size(height, width, count)
    assert h % 2 == w % 2 == 0 and max(h, w) <= media.LARGEST and count * (w + media.GAP) <= media.WIDEST + count * 2
    if height > 16:
        assert abs(w / h - width / height) < 0.05 * width / height
    panels = [torch.randint(0, 256, (3, 2, height, width), dtype=torch.uint8) for _ in range(count)]
    strip = media.side_by_side(panels)
    assert strip.shape == (3, 2, h, count * (w + media.GAP) - media.GAP)
    assert abs(strip[:, :, :, :w].float().mean() - panels[0].float().mean()) < 3


def test_a_large_run_is_read_clip_by_clip(tmp_path, monkeypatch):
    """Clips of full size do not fit in memory together."""
    finished(tmp_path / "run", size=(3, 48, 80), rows=rows_of(CLIPS, dynamic=(5.0, 3.0, 1.0)))
    monkeypatch.setattr(Samples, "all", lambda *_: pytest.fail("reads every clip at once"))
    check_page(write_report(tmp_path / "run"))


def test_damaged_samples_are_named(tmp_path):
    finished(tmp_path / "run")
    (tmp_path / "run/samples.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ConfigError, match=r"samples\.safetensors cannot be read .* --resume"):
        write_report(tmp_path / "run")


def test_what_fails_while_samples_are_open_keeps_its_own_words(tmp_path):
    finished(tmp_path / "run")
    with pytest.raises(OSError, match="No space left"), open_samples(tmp_path / "run"):
        raise OSError(28, "No space left on device")


def test_a_registered_methods_run_has_a_page_and_a_picture(tmp_path):
    result = finished(tmp_path / "run")
    write_json(tmp_path / "run/result.json", result | {"config": result["config"] | {"method": "mine"}})
    page = check_page(write_report(tmp_path / "run"))
    assert "mine: demo" in " ".join(page.words)
    write_picture(tmp_path / "run", tmp_path / "p.webp", prompts=1)
    assert (tmp_path / "p.webp").stat().st_size


def test_a_page_is_written_in_a_locale_without_unicode(tmp_path):
    finished(tmp_path / "run")
    code = "import sys; from afd_fast.reports.run import write_report; write_report(sys.argv[1])"
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "run"], check=True, env=env)
    assert "−" in (tmp_path / "run/report.html").read_text(encoding="utf-8")


# -- what it says ------------------------------------------------------------------------------------------------


def test_a_score_that_cannot_be_computed_says_why(tmp_path):
    result = finished(tmp_path / "run", rows=rows_of(CLIPS, dynamic=(5.0, 3.0, 1.0)), prompts=1)
    row = next(row for row in table_rows(result, []) if row.key == "frechet")
    assert (row.base, row.change, row.mark) == ("–", "–", "") and "two clips" in row.why and "colours" in row.label
    page = check_page(write_report(tmp_path / "run"))
    assert any("is not computed: needs two clips" in words for words in page.words)
    assert "needs two clips" in (console_table(result, []).caption or "")


def test_a_change_that_cannot_be_seen_has_no_colour():
    rows = rows_of(
        PHYSICS, residual_px=(1.2, 1.20001, 0.1), frechet=(0.9, 0.9, 0.1), general=(0.9, 0.95, 1.0), gravity=(1, 0.5, 3),
        flicker=(1.2004, 1.2006, 0.1),
    )  # fmt: skip
    found = {
        row.key: row for row in table_rows({"rows": rows}, [{"by_prompt": [2.0] * 4}, {"by_prompt": [1.0, 1.1] * 2}])
    }
    for key in ("residual_px", "frechet", "flicker"):  # of the last each value rounds to another digit
        assert (found[key].change, found[key].mark) == ("0", "")
    assert found["general"].mark == "better" and found["gravity"].mark == "worse"


@pytest.mark.parametrize(("after", "mark"), [([1.0, 1.1] * 2, "better"), ([1.0, 1.4] * 2, "")])
def test_changes_are_marked_where_the_headlines_interval_tells_one(after, mark):
    rows = {"rows": rows_of(PHYSICS, residual_px=(1.2, 1.1, 0.1), general=(0.9, 0.95, 1.0))}
    evaluations = [{"by_prompt": [1.2] * 4}, {"by_prompt": after}]
    found = {row.key: row for row in table_rows(rows, evaluations)}
    assert found["residual_px"].mark == found["general"].mark == mark


def result_of(rows, prompts=8):
    config = to_dict(TrainConfig(iterations=40))
    return {"rows": rows, "prompts": {"train": 9, "held_out": prompts}, "clips_judged": prompts, "config": config}


@pytest.mark.parametrize(
    ("rows", "before", "after", "expected"),
    [
        (rows_of(PHYSICS, residual_px=(1.2, 0.5, 0.1)), [1.2] * 8, [0.5 + 0.01 * i for i in range(8)],
         "AFD is better than the base student: physics residual 1.200 → 0.500, teacher 0.100 (-0.665, 95 % interval -0.6"),
        (rows_of(PHYSICS, residual_px=(1.2, 1.5, 0.1)), [1.2] * 8, [1.5 + 0.01 * i for i in range(8)], "AFD is worse than"),
        (rows_of(PHYSICS, residual_px=(1.2, 1.19, 0.1)), [1.0] * 8, [0.5, 1.5] * 4, "No change can be told: physics residual"),
        (rows_of(CLIPS, dynamic=(5.0, 3.0, 1.0)), [5.0] * 8, [3.0 + 0.01 * i for i in range(8)], "AFD moved towards the teacher: dynamic"),
        (rows_of(CLIPS, dynamic=(5.0, 7.0, 1.0)), [5.0] * 8, [7.0 + 0.01 * i for i in range(8)], "AFD moved away from the teacher: dynamic"),
        (rows_of(CLIPS, dynamic=(5.0, 5.0, 1.0)), [5.0], [5.0], "The student did not change: after 40 iterations every score"),
    ],
)  # fmt: skip
def test_the_verdict(rows, before, after, expected):
    said = verdict(result_of(rows), [{"by_prompt": before}, {"by_prompt": after}])
    assert said.startswith(expected), said


def test_one_prompt_has_no_interval():
    rows = rows_of(CLIPS, dynamic=(5.0, 3.0, 1.0))
    said = verdict(result_of(rows, prompts=1), [{"by_prompt": [5.0]}, {"by_prompt": [3.0]}])
    assert "one held-out prompt gives no interval" in said and "nan" not in said
    assert "without an interval" in verdict(result_of(rows), [{}, {}])  # an older run's


def test_a_run_that_has_lost_files_has_a_page_or_says_what_to_do(tmp_path):
    finished(tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").unlink()
    write_report(tmp_path / "run")
    rows = (tmp_path / "run/evaluations.jsonl").read_text()
    for kept in ("", rows[: rows.index("\n")], rows[:-40]):
        (tmp_path / "run/evaluations.jsonl").write_text(kept)
        with pytest.raises(ConfigError, match="evaluations.jsonl has lost .*: continue the run with --resume"):
            write_report(tmp_path / "run")


# -- comparisons -------------------------------------------------------------------------------------------------


def comparison(folder, seeds=3, afd=(0.5, 0.52, 0.51), sft=(0.3, 0.31, 0.29)):
    """A comparison's folder, without the children that made it."""
    values = {"afd": afd[:seeds], "sft": sft[:seeds]}
    rows = {"base": {k: {"mean": v, "sd": None, "values": [v]} for k, v in PHYSICS.items()}}
    for label, found in values.items():
        spread = {k: {"mean": v, "sd": 0.0 if seeds > 1 else None, "values": [v] * seeds} for k, v in PHYSICS.items()}
        mean = sum(found) / len(found)
        spread["residual_px"] = {"mean": mean, "sd": 0.01 if seeds > 1 else None, "values": list(found)}
        rows[label] = spread | {"seconds": {"mean": 100.0, "sd": None, "values": [100.0]}}
        for seed, value in enumerate(found):
            finished(folder / f"{label}-{seed}", rows=rows_of(PHYSICS, residual_px=(1.2, value, 0.1)), seed=seed)
    rows["teacher"] = {k: {"mean": v / 10, "sd": None, "values": [v / 10]} for k, v in PHYSICS.items()}
    by_prompt = {"base": [[1.1, 1.2, 1.3, 1.2]]}
    by_prompt |= {label: [[v - 0.1, v, v, v + 0.1] for v in found] for label, found in values.items()}
    content = {
        "run": "demo", "rows": rows, "by_prompt": by_prompt, "seeds": list(range(seeds)), "clips_judged": 8, "prompts": {"train": 9, "held_out": 4},
        "runs": {f"{label}-{seed}": to_dict(TrainConfig(seed=seed)) for label in values for seed in range(seeds)},
        "environment": {"torch": "2"},
    }  # fmt: skip
    write_json(folder / "comparison.json", content)
    return content


def test_a_comparison_whose_runs_have_lost_metrics_has_a_page(tmp_path):
    comparison(tmp_path / "c")
    (tmp_path / "c/afd-0/metrics.jsonl").unlink()
    check_page(compared.write_report(tmp_path / "c"))


def test_the_interval_is_over_all_seeds_or_not_there(tmp_path):
    content = comparison(tmp_path / "c")
    content["by_prompt"]["afd"][1] = []  # a run of an older version
    cells = next(line for line in compared.table(content)[1] if line.name == compared.BOOTSTRAP).cells
    assert [bool(cell.text) for cell in cells] == [True, False, True, False]


def test_a_page_of_a_comparison(tmp_path):
    content = comparison(tmp_path / "c")
    page = check_page(compared.write_report(tmp_path / "c"))
    words = " ".join(page.words)
    assert "AFD, SFT are better than the base student (95 % interval over 3 seeds)" in words
    assert "Against AFD, seed by seed" in words and words.count("▲") >= 2
    marks = {(d.method, d.score): d.mark for d in compared.paired(content)}
    assert (
        marks[("SFT", "physics residual, px")] == "better"
        and marks[("SFT", "general quality")] == "cannot be told apart"
    )


def test_nothing_is_marked_without_a_spread(tmp_path):
    content = comparison(tmp_path / "c", seeds=1)
    page = check_page(compared.write_report(tmp_path / "c"))
    assert "▲" not in " ".join(page.words) and compared.paired(content) == []
    assert "One seed gives no interval" in " ".join(page.words)


def test_what_a_few_seeds_cannot_tell_is_not_marked(tmp_path):
    content = comparison(tmp_path / "c", afd=(0.2, 2.4, 0.9))
    cells = dict(zip(content["rows"], compared.table(content)[1][0].cells))
    assert cells["afd"].mark == "" and cells["sft"].mark == "better" and cells["base"].mark == ""


def test_a_comparison_says_how_sure_its_first_score_is(tmp_path):
    """Prompts count within the seeds: four of 0.4 to 0.6 have a standard error of 0.035, the seeds next to none."""
    content = comparison(tmp_path / "c", afd=(0.5, 0.5, 0.5))
    line = compared.table(content)[1][1]
    cells = dict(zip(content["rows"], line.cells))
    assert line.name == "95 % over prompts and seeds" and cells["teacher"].text == ""
    assert cells["afd"].text == "0.425 to 0.575"  # of four prompts at least three must be drawn alike to be further out
    assert "0.425 to 0.575" in " ".join(check_page(compared.write_report(tmp_path / "c")).words)
    del content["by_prompt"]  # as an older version left it
    assert all(line.name != compared.BOOTSTRAP for line in compared.table(content)[1])


def test_students_interval():
    """n = 3: t(0.975, 2) = 4.303 standard errors."""
    low, high = compared.interval([1.0, 2.0, 3.0])
    assert low == pytest.approx(2 - 4.303 / math.sqrt(3)) and high == pytest.approx(2 + 4.303 / math.sqrt(3))
    assert compared.interval([1.0]) is NONE


# -- in a browser ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    pytest.importorskip("axe_playwright_python", reason="needs axe-playwright-python")
    own = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_api.sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(executable_path=own, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium that starts: {str(error).splitlines()[0]}")
        yield found
        found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    finished(folder / "run", size=(3, 48, 80))
    finished(folder / "clips", size=(3, 48, 80), rows=rows_of(CLIPS, dynamic=(5.0, 3.0, 1.0)))
    comparison(folder / "c")
    return [write_report(folder / "run"), write_report(folder / "clips"), compared.write_report(folder / "c")]


LOOKS = {"desktop": (1280, 800, "light"), "dark": (1280, 800, "dark"), "mobile": (390, 844, "light")}


@pytest.mark.parametrize("look", LOOKS)
def test_a_page_is_accessible_and_fits(look, browser, pages):
    from axe_playwright_python.sync_playwright import Axe

    width, height, scheme = LOOKS[look]
    for path in pages:
        page = browser.new_page(
            viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce"
        )
        page.goto(path.as_uri())
        found = Axe().run(page).response["violations"]
        assert not found, [(v["id"], v["nodes"][0]["html"][:200]) for v in found]
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width
        top = page.evaluate("document.querySelector('video').getBoundingClientRect().top")
        assert top < height / 2, "the first video is above the fold"
        assert page.evaluate("[...document.querySelectorAll('video')].every(v => v.paused)")
        page.close()


def test_videos_in_view_play_unless_the_reader_wants_less_motion(browser, pages):
    page = browser.new_page(viewport={"width": 1280, "height": 800}, reduced_motion="no-preference")
    asked = (
        "window.asked = 0; HTMLMediaElement.prototype.play = function () { window.asked++; return Promise.resolve(); }"
    )
    page.add_init_script(asked)
    page.goto(pages[0].as_uri())
    page.wait_for_function("window.asked > 0")
    assert page.evaluate("window.asked < document.querySelectorAll('video').length + 1")
    page.close()

"""The API teacher against a real server on loopback that misbehaves, and killed in the middle."""

import contextlib
import json
import os
import resource
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline

from afd_fast.errors import ConfigError, TeacherError
from afd_fast.teachers.api import APITeacher, from_file
from afd_fast.teachers.cache import CachedTeacher
from afd_fast.teachers.dataset import collect, open_teacher
from afd_fast.teachers.exchange import Limits
from afd_fast.teachers.folder import FolderTeacher
from afd_fast.teachers.pipeline import PipelineTeacher, write_folder
from afd_fast.teachers.records import Record
from afd_fast.teachers.teacher import CallableTeacher
from afd_fast.teachers.video_api import VideoAPI
from afd_fast.video_io import VideoFormat
from tests.api_model import Hostile, Model
from tests.api_server import KEY, SIGNATURE, Provider

FIT = {"frames": 12, "size": (16, 16), "fps": 10}
FAULTS = ("", "busy", "down", "lost", "empty", "broken gateway", "shaky", "cut", "garbled", "fails")


@pytest.fixture
def provider(monkeypatch):
    monkeypatch.setenv("ARK_API_KEY", KEY)
    with Provider() as server:
        yield server


def teacher(server, folder, **options) -> APITeacher:
    api = VideoAPI(server.base_url, "seedance", **{"usd_per_video": 0.44, "list_lag": 0, **options.pop("api", {})})
    return APITeacher(api, folder, **FIT, max_usd=options.pop("max_usd", 1e6), poll=0.01, **options)


def test_every_fault_ends_in_one_paid_video(provider, tmp_path):
    pairs = [(f"a ball {fault}", seed) for fault in FAULTS for seed in (0, 1)]
    asked = teacher(provider, tmp_path)
    seen = []
    asked.fetch(pairs, lambda: seen.append(1))
    assert len(seen) == len(pairs) and asked.missing(pairs) == []
    assert all(provider.charged(f"a ball {fault}") == 2 for fault in FAULTS)
    assert asked.spent == pytest.approx(0.44 * len(pairs)) and "20 done" in asked.summary()
    assert asked("a ball lost", 0).shape == (3, 12, 16, 16)
    again, hits = teacher(provider, tmp_path), dict(provider.hits)
    again.fetch(pairs)
    assert again("a ball cut", 1).shape == (3, 12, 16, 16) and provider.hits == hits  # never asked for again
    assert all(key is None for key in provider.file_keys)
    assert not any(KEY in p.read_text() for p in tmp_path.glob("*.json")) and KEY not in repr(asked.api)


def test_refused_and_hopeless_videos_are_final_and_stop_nobody(provider, tmp_path):
    prompts = ["refused at once", "refused later", "fails always", "too brief", "fine"]
    asked = teacher(provider, tmp_path)
    asked.fetch([(p, 0) for p in prompts])
    assert [asked.seeds(p, [0]) for p in prompts] == [[], [], [], [], [0]]
    text = "\n".join(asked.problems)
    for word in ("InputTextSensitive", "OutputVideoSensitive", "InternalServiceError", "5 frames"):
        assert word in text
    assert provider.charged("refused at once") == 0 and provider.hits["create fails always"] == 2
    hits, brief = dict(provider.hits), next(k for k, t in provider.tasks.items() if t["prompt"] == "too brief")
    teacher(provider, tmp_path).fetch([(p, 0) for p in prompts])
    assert {k for k, n in provider.hits.items() if n != hits[k]} == {
        f"file {brief}"
    }  # the brief one: its host may have had a bad day
    with pytest.raises(TeacherError, match="'refused later', seed 0: refused .*OutputVideoSensitive"):
        asked("refused later", 0)


def test_budget_is_checked_before_paying_also_over_runs(provider, tmp_path):
    pairs = [(f"ball {i}", 0) for i in range(5)]
    for _ in range(2):
        with pytest.raises(TeacherError, match=r"0.88 of 1.00 USD are spent and a video costs 0.44: raise max_usd"):
            teacher(provider, tmp_path, max_usd=1.0, concurrency=1).fetch(pairs)
        assert len(provider.tasks) == 2
    teacher(provider, tmp_path, max_usd=2.2).fetch(pairs)
    assert len(provider.tasks) == 5


def test_wrong_request_or_key_stops_without_cost(provider, tmp_path, monkeypatch):
    with pytest.raises(TeacherError, match="400 InvalidParameter: check"):
        teacher(provider, tmp_path).fetch([("malformed", 0)])
    assert teacher(provider, tmp_path).spent == 0
    monkeypatch.setenv("ARK_API_KEY", "wrong-key")
    with pytest.raises(TeacherError, match="401 AuthenticationError") as error:
        teacher(provider, tmp_path).fetch([("ball", 0)])
    assert "wrong-key" not in str(error.value)
    monkeypatch.delenv("ARK_API_KEY")
    with pytest.raises(ConfigError, match="set ARK_API_KEY"):
        teacher(provider, tmp_path).fetch([("ball", 0)])
    (tmp_path / "key").write_text(KEY + "\n")
    teacher(provider, tmp_path, api={"key_file": str(tmp_path / "key")}).fetch([("ball", 0)])
    assert provider.charged("ball") == 1


def test_a_task_that_takes_too_long_is_waited_for_by_the_next_run(provider, tmp_path):
    with pytest.raises(TeacherError, match="1 of 2 videos are not finished .*took more than"):
        teacher(provider, tmp_path, patience=0.2).fetch([("stuck", 0), ("ball", 0)])
    provider.tasks[next(k for k, t in provider.tasks.items() if t["prompt"] == "stuck")]["prompt"] = "free"
    asked = teacher(provider, tmp_path)
    asked.fetch([("stuck", 0)])
    assert asked.seeds("stuck", [0]) == [0] and len(provider.tasks) == 2


def test_damaged_file_is_downloaded_again_not_paid_again(provider, tmp_path):
    teacher(provider, tmp_path).fetch([("ball", 0)])
    (video,) = tmp_path.glob("*.mp4")
    video.write_bytes(video.read_bytes()[:100])
    asked = teacher(provider, tmp_path)
    asked.fetch([("ball", 0)])
    assert asked("ball", 0).shape == (3, 12, 16, 16) and len(provider.tasks) == 1


def test_without_a_list_a_lost_answer_is_said_not_paid_again(provider, tmp_path):
    asked = teacher(provider, tmp_path, api={"list_path": None})
    asked.fetch([("lost", 0), ("ball", 0)])
    assert "look at the bill" in asked.problems[0] and len(provider.tasks) == 2 and asked.spent == pytest.approx(0.88)


def test_one_process_at_a_time(provider, tmp_path):
    import fcntl

    asked = teacher(provider, tmp_path)
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(TeacherError, match="another process"):
            asked.fetch([("ball", 0)])


def test_a_request_that_never_arrived_is_no_failure_of_the_provider(provider, tmp_path):
    """Killed between the record and the request; the task made afterwards fails for its first time."""
    asked = teacher(provider, tmp_path)
    asked._ledger.add(asked._id("fails", 0), Record("fails", 0, state="creating", usd=0.44, wire_seed=1))
    again = teacher(provider, tmp_path)
    again.fetch([("fails", 0)])
    assert again.missing([("fails", 0)]) == [] and not again.problems and provider.charged("fails") == 1


BALLS = [(f"ball {i}", 0) for i in range(8)]


@pytest.mark.parametrize("concurrency", (1, 2, 8))
def test_a_budget_below_the_cost_buys_what_it_allows_and_never_locks(provider, tmp_path, concurrency):
    options = {"api": {"usd_per_video": 1.0}, "concurrency": concurrency}
    for _ in range(2):
        asked = teacher(provider, tmp_path, max_usd=3.0, **options)
        with pytest.raises(TeacherError, match="raise max_usd to at least 8.00 for the 5 of 8 videos"):
            asked.fetch(BALLS)
        assert len(provider.tasks) == len(list(tmp_path.glob("*.mp4"))) == 3 and asked.spent == 3
    teacher(provider, tmp_path, max_usd=8.0, **options).fetch(BALLS)
    assert len(provider.tasks) == 8


def test_money_that_comes_back_buys_another_video(provider, tmp_path):
    asked = teacher(provider, tmp_path, max_usd=0.88)
    with pytest.raises(TeacherError, match="to at least 1.32 for the 1 of 5"):
        asked.fetch([("refused at once", 0), ("malformed", 0), *BALLS[:3]])
    assert len(provider.tasks) == 2 and asked.spent == 0.88


UNKNOWN = ("hangup", "gzip", "bomb", "cut", "empty", "html", "deep", "array", "null", "latin", "redirect", "500", "503", "404<", "400-",
           "409", lambda usual: {}, lambda usual: {"id": None}, lambda usual: {"id": {}}, lambda usual: {"id": True},
           lambda usual: {"id": "cgt-0"}, lambda usual: {"id": ""})  # fmt: skip


def test_an_answer_that_proves_nothing_is_searched_for_and_paid_once(provider, tmp_path):
    """cgt-0 is another video's task."""
    teacher(provider, tmp_path).fetch([("first", 0)])
    made = {f"ball {i}": fault for i, fault in enumerate(UNKNOWN)}
    none = {f"cube {i}": f"!{fault}" for i, fault in enumerate(UNKNOWN) if isinstance(fault, str)}
    provider.script = {("create", prompt): [fault] for prompt, fault in (made | none).items()}
    asked = teacher(provider, tmp_path, concurrency=16)
    asked.fetch([(prompt, 0) for prompt in made | none])
    assert {prompt: provider.charged(prompt) for prompt in made | none} == dict.fromkeys(made | none, 1)
    assert all(asked.seeds(prompt, [0]) for prompt in made | none) and not asked.problems


def test_lists_that_lie(provider, tmp_path):
    """Seeds as text, no seeds, junk, nothing at all, and `page` ignored: no video is bought twice."""
    stale = lambda usual: {"items": []}
    wrong = (lambda usual: {"items": 5}, lambda usual: {}, lambda usual: {"items": [5, None, {}]}, "array", "404", "deep",
             lambda usual: {"items": [{"id": item["id"]} for item in usual["items"]]}, stale)  # fmt: skip
    text = lambda usual: {"items": [{**item, "seed": str(item["seed"])} for item in usual["items"]]}
    for i, fault in enumerate([*wrong, text]):
        provider.script = {("create", f"ball {i}"): ["hangup"], ("list", ""): [fault] * (1 if fault is text else 3)}
        provider.script["task", "slow"] = [
            lambda usual: {"status": "running"}
        ] * 8  # under way, so that a list must have it
        asked = teacher(provider, tmp_path / str(i), attempts=4)
        asked.fetch([("slow", 0), (f"ball {i}", 0)])
        assert provider.charged(f"ball {i}") == 1 and asked.seeds(f"ball {i}", [0]) == [0]
    for i in range(150):
        provider.tasks[f"old-{i}"] = {"prompt": "", "seed": i}
    endless = VideoAPI(
        provider.base_url,
        "m",
        0.44,
        list_lag=0,
        list_path="/contents/generations/tasks?page_size=100&page_num=1&p={page}",
    )
    provider.script = {("create", "last"): ["!500"]}
    APITeacher(endless, tmp_path / "endless", **FIT, max_usd=9, poll=0.01).fetch([("last", 0)])
    assert provider.charged("last") == 1


def test_a_list_that_lags_buys_a_lone_video_once(provider, tmp_path):
    """No other task is under way, so nothing in the list tells that it lags: the time does."""
    began = time.monotonic()

    def lagging(usual):
        return usual if time.monotonic() > began + 1 else {"items": []}

    provider.script = {("create", "alone"): ["500"], ("list", ""): [lagging] * 99}
    asked = teacher(provider, tmp_path, api={"list_lag": 1.5})
    asked.fetch([("alone", 0)])
    assert provider.charged("alone") == 1 and asked.seeds("alone", [0]) == [0]


def test_requests_whose_tasks_could_not_be_found_again_are_refused(provider, tmp_path):
    for api in ({"parameters": {"seed": 1}}, {"body": {"text": "{prompt}"}}, {"body": {"seed": "{seed}"}}):
        with pytest.raises(ConfigError, match="the create request does not carry"):
            teacher(provider, tmp_path, api=api)
    asked = teacher(provider, tmp_path)
    asked.fetch([("ball", 0), ("ball", 0)])
    assert len(provider.tasks) == 1


def test_a_video_that_was_made_is_never_bought_again(provider, tmp_path):
    """Its file is lost here, and the provider says later that the task has failed or is unknown."""
    teacher(provider, tmp_path).fetch([("ball", 0)])
    for fault in (lambda usual: {"status": "expired"}, lambda usual: {"status": "failed"}, "404"):
        for path in tmp_path.glob("*.mp4"):
            path.unlink()
        provider.script = {("task", "ball"): [fault] * 2}
        with pytest.raises(TeacherError, match="1 of 1 videos are not finished .'ball', seed 0: the provider"):
            teacher(provider, tmp_path, attempts=2).fetch([("ball", 0)])
        teacher(provider, tmp_path).fetch([("ball", 0)])
    assert len(provider.tasks) == 1 and len(list(tmp_path.glob("*.mp4"))) == 1


def test_a_rejected_prompt_stops_nobody_and_is_named(provider, tmp_path):
    for i, status in enumerate(("400", "413")):
        provider.script = {("create", "odd"): [f"!{status}"]}
        pairs = [("odd", 3), *((f"ball {i} {j}", 0) for j in range(3))]
        asked = teacher(provider, tmp_path / str(i), concurrency=1)
        asked.fetch(pairs)
        assert asked.problems == [
            f"'odd', seed 3: rejected ({status} InjectedError: check the key, the model's name and the parameters)"
        ]
        assert asked.missing(pairs) == [("odd", 3)] and asked.spent == pytest.approx(1.32)
        asked.fetch(pairs)  # the provider has thought better of it
        assert asked.missing(pairs) == [] and not asked.problems


SILENT = (  # what a provider says of a finished video that cannot be had
    ("task", "404"), ("task", "410-"), ("task", lambda usual: usual | {"content": {"video_url": 5}}),
    ("task", lambda usual: usual | {"content": {"video_url": {"a": 1}}}), ("task", lambda usual: usual | {"content": None}),
    ("task", lambda usual: usual | {"content": {"video_url": "http://127.0.0.1:99999/x"}}),
    ("task", lambda usual: usual | {"content": {"video_url": "http://127.0.0.1/\r\nX: y"}}),
    ("task", lambda usual: usual | {"content": {"video_url": "file:///etc/passwd"}}),
    ("file", "html"), ("file", "empty"), ("file", "404"), ("file", "403<"),
)  # fmt: skip


def test_a_paid_video_that_cannot_be_had_stops_nobody_and_is_kept_trying(provider, tmp_path):
    odd = [f"odd {i}" for i in range(len(SILENT))]
    pairs = [(prompt, 0) for prompt in odd] + BALLS[:3]
    provider.script = {(kind, prompt): [fault] * 1000 for prompt, (kind, fault) in zip(odd, SILENT)}
    with pytest.raises(
        TeacherError, match="12 of 15 videos are not finished .'odd 0', seed 0: the provider answered 404"
    ) as error:
        teacher(provider, tmp_path, attempts=3).fetch(pairs)  # once, for its host may be down
    assert "Signature" not in str(error.value)
    assert len(teacher(provider, tmp_path).missing(pairs)) == len(odd)  # the others are here
    asked = teacher(provider, tmp_path, attempts=3)
    asked.fetch(pairs)
    assert "2 created, 3 done, 10 unusable" in asked.summary() and len(asked.problems) == 12
    provider.script = {}
    asked.fetch(pairs)
    assert asked.missing(pairs) == [] and not asked.problems and len(provider.tasks) == len(pairs)


def test_expired_urls_are_renewed(provider, tmp_path):
    provider.expire, provider.script = True, {("file", "ball"): ["403", "404", "round"]}
    asked = teacher(provider, tmp_path)
    asked.fetch([("ball", 0)])
    assert asked.seeds("ball", [0]) == [0]


def test_a_video_that_is_too_short_is_kept_for_a_run_that_needs_less(provider, tmp_path):
    asked = teacher(provider, tmp_path)
    asked.fetch([("brief", 0), *BALLS[:2]])
    (aside,) = tmp_path.glob("*.unusable-*.mp4")
    assert (
        f"(its file is no usable video: 5 frames at 10 fps, 12 are needed; kept as {aside.name})" in asked.problems[0]
        and aside.read_bytes() == provider.short
    )
    provider.script = {("task", "brief"): ["404"] * 9}
    less = APITeacher(asked.api, tmp_path, frames=4, size=(16, 16), fps=10, max_usd=9)
    less.fetch([("brief", 0)])
    assert less("brief", 0).shape == (3, 4, 16, 16) and not less.problems and not aside.exists()


def test_videos_that_never_fit_are_not_bought_by_the_hundred(provider, tmp_path):
    pairs = [(f"brief {i}", 0) for i in range(9)]
    for _ in range(2):
        with pytest.raises(
            TeacherError, match="6 of 9 videos are not finished .*none of 3 videos fits this run: .* 5 frames"
        ):
            teacher(provider, tmp_path, concurrency=1).fetch(pairs)
        assert len(provider.tasks) == len(list(tmp_path.glob("*.unusable-*.mp4"))) == 3
    less = APITeacher(teacher(provider, tmp_path).api, tmp_path, frames=4, size=(16, 16), fps=10, max_usd=9, poll=0.01)
    less.fetch(pairs)
    assert less.missing(pairs) == [] and len(provider.tasks) == 9


def test_a_wrong_id_is_corrected_by_the_list(provider, tmp_path):
    """Nobody's, and one whose own answer is lost as well. A provider that tells a seed of its own is believed."""
    provider.script = {
        ("create", "ball 0"): [lambda usual: {"id": "cgt-99"}], ("create", "ball 1"): ["hangup"],
        ("create", "ball 2"): [lambda usual: {"id": "cgt-1"}], ("list", ""): ["500"] * 4,
        ("task", "ball 3"): [lambda usual: usual | {"seed": 7}] * 99,
    }  # fmt: skip
    asked = teacher(provider, tmp_path, concurrency=3, attempts=3)
    with contextlib.suppress(TeacherError):
        asked.fetch(BALLS[:4])
    asked.fetch(BALLS[:4])
    assert asked.missing(BALLS[:4]) == [] and len(provider.tasks) == 4
    for prompt, _ in BALLS[:4]:
        assert provider.tasks[asked._ledger[asked._id(prompt, 0)].task]["prompt"] == prompt


def test_a_file_of_a_process_that_died_before_its_record_is_taken(provider, tmp_path):
    asked = teacher(provider, tmp_path)
    asked.fetch([("ball", 0)])
    asked._ledger.write(asked._id("ball", 0), state="made", sha256="")
    hits = dict(provider.hits)
    asked.fetch([("ball", 0)])
    assert provider.hits == hits and asked.missing([("ball", 0)]) == []


def test_the_key_and_signatures_are_nowhere(provider, tmp_path, monkeypatch, caplog):
    for content in (f"{KEY}\n{KEY}", f"{KEY}\x07", f"Authorization: {KEY}\r\nX: y", f"{KEY}é"):
        (tmp_path / "key").write_text(content)
        with pytest.raises(ConfigError, match="not one line of printable ASCII") as error:
            teacher(provider, tmp_path / "v", api={"key_file": str(tmp_path / "key")}).fetch(BALLS)
        assert KEY not in str(error.value)
    for api in (
        {"authorization": f"Bearer {KEY}"},
        {"key_env": f"sk-{KEY}"},
        {"base_url": f"https://a:{KEY}@b.org/v3"},
    ):
        with pytest.raises(ConfigError) as error:
            VideoAPI(**{"base_url": "https://b.org/v3", "model": "m", "usd_per_video": 1, **api})
        assert KEY not in str(error.value)
    caplog.set_level("DEBUG")
    echo = lambda usual: {"error": {"code": f"bad Bearer {KEY} at https://x/y?{SIGNATURE}=1"}, "status": "failed"}
    provider.script = {
        ("task", "ball 0"): [echo] * 2,
        ("file", "ball 1"): ["404"] * 9,
        ("file", "ball 2"): ["hangup", "html"] * 9,
    }
    asked = teacher(provider, tmp_path / "v", attempts=2)
    with pytest.raises(TeacherError) as error:
        asked.fetch(BALLS[:4])
    said = [
        str(error.value),
        caplog.text,
        *asked.problems,
        asked.summary(),
        *(p.read_text() for p in (tmp_path / "v").glob("*.json")),
    ]
    assert not any(secret in text for text in said for secret in (KEY, SIGNATURE)) and "failed" in asked.summary()


QUICK = Limits(request_s=0.4, download_s=0.6, json_bytes=1 << 20, video_bytes=8 << 20, retry_after_s=0.02)


@pytest.mark.parametrize("kind", ("create", "task", "list", "file"))
def test_requests_are_bounded_in_time_and_memory(provider, tmp_path, kind):
    faults = ["drip", "endless", "bomb"] if kind == "file" else ["drip", "endless", "bomb", "wait", "superscript"]
    pairs = [(f"ball {i}", 0) for i in range(len(faults))]
    provider.script = {(kind, prompt): [fault] * 2 for (prompt, _), fault in zip(pairs, faults)}
    if kind == "create":  # a 429 makes no task
        provider.script |= {
            (kind, p): [f"!{f}"] * 2 for (p, _), f in zip(pairs, faults) if f in ("wait", "superscript")
        }
        provider.script |= {(kind, p): [f] for (p, _), f in zip(pairs, faults) if f not in ("wait", "superscript")}
    if kind == "list":
        provider.script = {("create", p): ["hangup"] for p, _ in pairs} | {("list", ""): faults}
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    asked = teacher(provider, tmp_path, limits=QUICK)
    asked.fetch(pairs)
    assert asked.missing(pairs) == [] and len(provider.tasks) == len(pairs)
    assert time.monotonic() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150 << 10  # KiB


def test_numbers_out_of_range_are_refused(provider, tmp_path):
    nan, inf = float("nan"), float("inf")
    for name, values in {
        "concurrency": (0, -1, 2.5, True, "8"), "poll": (0, nan, -1), "patience": (0, nan, inf), "attempts": (0, 1.5),
        "max_usd": (nan, inf, -1, "9"), "frames": (0, 2.5), "fps": (0, nan),
    }.items():  # fmt: skip
        for value in values:
            with pytest.raises(ConfigError, match=f"{name} is .*, expected a"):
                APITeacher(VideoAPI("http://x", "m", 1), tmp_path / "no", **{**FIT, "max_usd": 1, name: value})
    for api in ({"usd_per_video": nan}, {"usd_per_video": -1}, {"list_lag": -1}, {"list_lag": nan}, {"list_lag": "a minute"}, {"done": "succeeded"}, {"parameters": {"a": nan}}, {"base_url": "x"},
                {"base_url": "http://x:99999"}, {"create_path": "https://y"}, {"task_path": "/tasks"}, {"parameters": []}, {"model": 3}):  # fmt: skip
        with pytest.raises(ConfigError):
            VideoAPI(**{"base_url": "http://x", "model": "m", "usd_per_video": 1, **api})
    assert not (tmp_path / "no").exists()


def test_impossible_requests_are_refused_before_paying(provider, tmp_path):
    api = VideoAPI(provider.base_url, "m", 0.44)
    with pytest.raises(ConfigError, match="a video of 5 s cannot hold 82 frames at 16 fps, whose last is at 5.06 s"):
        APITeacher(api, tmp_path, frames=82, size=(16, 16), fps=16, max_usd=9)
    APITeacher(api, tmp_path, frames=81, size=(16, 16), fps=16, max_usd=9)
    for prompt in ("", " ", "a\0b", "\ud800", None):
        with pytest.raises(ConfigError, match="is no prompt"):
            teacher(provider, tmp_path).fetch([("ball", 0), (prompt, 0)])
        with pytest.raises(ConfigError, match="is no prompt"):
            teacher(provider, tmp_path, prompts=["ball", prompt])
    assert not provider.tasks


def test_every_name_is_on_disk_before_the_next_request(provider, tmp_path, monkeypatch):
    events, sync, replace = [], os.fsync, Path.replace

    def traced_sync(handle):
        events.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))
        sync(handle)

    def traced_replace(path, target):
        events.append(("name", str(target)))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", traced_sync)
    monkeypatch.setattr(Path, "replace", traced_replace)
    teacher(provider, tmp_path).fetch([("ball", 0)])
    CachedTeacher(CallableTeacher(lambda prompt, seed: torch.zeros(3, 2, 16, 16), ["a"], name="x"), tmp_path)("a", 0)
    named = [i for i, (what, _) in enumerate(events) if what == "name"]
    assert len(named) == 7  # new, creating, created, made, the video, done; a cached video
    for i in named:
        assert events[i + 1] == ("sync", str(tmp_path)) and events[i - 1][0] == "sync"


def test_only_rank_0_buys(provider, tmp_path):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    second = teacher(provider, tmp_path)
    teacher(provider, tmp_path).fetch(BALLS[:1])
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        second.fetch(BALLS[:2])
    finally:
        torch.distributed.destroy_process_group()
    assert len(provider.tasks) == 1 and second.missing(BALLS[:2]) == [BALLS[1]]


def test_a_run_without_network_or_key_does_without_the_videos_that_are_left_out(provider, tmp_path, monkeypatch):
    provider.script = {("create", "odd"): ["!400"]}
    pairs = [("odd", 0), ("brief", 0), ("ball", 0)]
    teacher(provider, tmp_path).fetch(pairs)
    provider.shutdown()
    provider.server_close()
    asked = teacher(provider, tmp_path, attempts=2)
    asked.fetch(pairs)
    monkeypatch.delenv("ARK_API_KEY")
    asked.fetch(pairs)
    assert "1 done, 1 unusable, 1 rejected" in asked.summary() and asked.spent == 0.88
    with pytest.raises(ConfigError, match="no API key"):
        asked.fetch([*pairs, ("new", 0)])


def test_a_full_disk_is_one_line_and_buys_nothing(provider, tmp_path):
    (tmp_path / "v").write_text("no folder")
    with pytest.raises(ConfigError, match="cannot be written .*: choose another folder"):
        teacher(provider, tmp_path / "v").fetch(BALLS)
    asked = teacher(provider, tmp_path / "w")
    (tmp_path / "w" / f"{asked._id('ball 0', 0)}.mp4.part").mkdir(parents=True)  # the file cannot be written
    with pytest.raises(TeacherError, match="'ball 0', seed 0: .*cannot be written .Is a directory.: make room"):
        asked.fetch(BALLS[:1])
    assert len(provider.tasks) == 1 and asked.spent == 0.44


def test_random_schedules_of_faults():
    """The invariants are api_model.py's; processes are killed at random writes. `python tests/api_model.py` for more."""
    with Hostile() as server:
        model = Model(server)
        for number in range(120):
            model.schedule(number, killed=number % 10 == 0)
        assert model.kills > 5 and model.kept > 150


def description(provider) -> dict:
    return dict(base_url=provider.base_url, model="m", usd_per_video=1, max_usd=9, prompts="p.txt", poll=0.01)


def test_description_file(provider, tmp_path):
    file = tmp_path / "ark.json"
    given = description(provider)
    (tmp_path / "p.txt").write_text("a red ball\n\na blue ball\n")
    file.write_text(json.dumps(given))
    asked = from_file(file, **FIT)
    asked.fetch([(p, 0) for p in asked.prompts])
    assert asked.prompts == ["a red ball", "a blue ball"] and len(list((tmp_path / "ark").glob("*.mp4"))) == 2
    for change, message in (({"modle": 1}, "unknown key modle"), ({"prompts": "none.txt"}, "holds no prompt")):
        file.write_text(json.dumps(given | change))
        with pytest.raises(ConfigError, match=message):
            from_file(file, **FIT)
    file.write_text("{}")
    with pytest.raises(ConfigError, match="lacks 'base_url'"):
        from_file(file, **FIT)
    with pytest.raises(ConfigError, match="is not a file"):
        from_file(tmp_path / "nothing.json", **FIT)


def test_training_on_an_api(provider, tmp_path):
    """What the trainer sees: refused prompts gone and listed, the rest split, through the door."""
    (tmp_path / "p.txt").write_text("\n".join(f"a ball {word}" for word in ("one", "two", "three", "refused later")))
    given = description(provider)
    (tmp_path / "ark.json").write_text(json.dumps(given))
    ticks = []
    teacher = open_teacher(f"api:{tmp_path / 'ark.json'}", VideoFormat(12, 16, 16, 10), tmp_path)
    data = collect(teacher, 2, None, lambda items, what: (ticks.append(what) or item for item in items))
    assert data.train_prompts == ["a ball one", "a ball two"] and data.held_out == ["a ball three"]
    assert data.videos["a ball one"].shape == (2, 3, 12, 16, 16) and "refused" in data.problems[0]
    assert ticks.count("fetching teacher videos") == 8


def test_fewer_prompts_are_asked_for_where_the_run_says_so(provider, tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(f"a ball {word}" for word in ("one", "two", "three", "four", "five")))
    (tmp_path / "ark.json").write_text(json.dumps(description(provider)))
    teacher = open_teacher(f"api:{tmp_path / 'ark.json'}", VideoFormat(12, 16, 16, 10), tmp_path)
    with pytest.raises(ConfigError, match="teacher_prompts=5 asks for more than the 4 training prompts of"):
        collect(teacher, 1, None, lambda items, what: items, train_prompts=5)
    assert not provider.tasks
    data = collect(teacher, 1, None, lambda items, what: items, train_prompts=2)
    assert data.train_prompts == teacher.split().train[:2] and len(provider.tasks) == 2 + len(data.held_out)


class Frames(DiffusionPipeline):
    """A pipeline with `.frames`, as the video pipelines of diffusers have."""

    def __init__(self):
        super().__init__()
        self.register_to_config()

    def __call__(self, prompt, generator, output_type, num_frames):
        assert output_type == "pt"
        return SimpleNamespace(frames=torch.rand(1, num_frames, 3, 16, 16, generator=generator))


def test_a_pipeline_written_as_a_folder(tmp_path):
    pipeline, seen = PipelineTeacher(Frames(), fps=10, num_frames=13), []
    assert torch.equal(pipeline("x", 3), pipeline("x", 3)) and not torch.equal(pipeline("x", 3), pipeline("x", 4))
    counted = lambda prompt, seed: (seen.append((prompt, seed)), pipeline(prompt, seed))[1]
    write_folder(counted, ["a", "b"], tmp_path, fps=10, per_prompt=2)
    (tmp_path / "00001-1.mp4").unlink()
    write_folder(counted, ["a", "b"], tmp_path, fps=10, per_prompt=2)
    assert seen == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("b", 1)]
    folder = FolderTeacher(tmp_path, **FIT)
    assert (
        folder.prompts == ["a", "b"]
        and folder.seeds("b", range(4)) == [0, 1]
        and folder("a", 0).shape == (3, 12, 16, 16)
    )
    with pytest.raises(ConfigError, match="names other prompts"):
        write_folder(counted, ["c"], tmp_path, fps=10)
    with pytest.raises(ConfigError, match="no prompts"):
        write_folder(counted, [], tmp_path, fps=10)

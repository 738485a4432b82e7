"""The API teacher against a real server on loopback that misbehaves, and killed in the middle."""

import json
import os
import random
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline

from afd_fast.errors import ConfigError, TeacherError
from afd_fast.teachers.api import APITeacher, from_file
from afd_fast.teachers.dataset import collect, open_teacher
from afd_fast.teachers.folder import FolderTeacher
from afd_fast.teachers.pipeline import PipelineTeacher, write_folder
from afd_fast.teachers.video_api import VideoAPI
from afd_fast.video_io import VideoFormat
from tests.api_server import KEY, Provider

FIT = {"frames": 12, "size": (16, 16), "fps": 10}
FAULTS = ("", "busy", "down", "lost", "empty", "broken gateway", "shaky", "cut", "garbled", "fails")


@pytest.fixture
def provider(monkeypatch):
    monkeypatch.setenv("ARK_API_KEY", KEY)
    with Provider() as server:
        yield server


def teacher(server, folder, **options) -> APITeacher:
    api = VideoAPI(server.base_url, "seedance", 0.44, **options.pop("api", {}))
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
    hits = dict(provider.hits)
    teacher(provider, tmp_path).fetch([(p, 0) for p in prompts])
    assert provider.hits == hits
    with pytest.raises(TeacherError, match="OutputVideoSensitive"):
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
    asked._write(asked._id("fails", 0), prompt="fails", seed=0, state="creating", usd=0.44, wire_seed=1, tries=1)
    again = teacher(provider, tmp_path)
    again.fetch([("fails", 0)])
    assert again.missing([("fails", 0)]) == [] and not again.problems and provider.charged("fails") == 1


CHILD = f"""
import sys
from afd_fast.teachers.api import APITeacher
from afd_fast.teachers.video_api import VideoAPI
base, folder, count = sys.argv[1:]
faults = {FAULTS!r}
pairs = [(f"ball {{i}} {{faults[i % len(faults)]}}", 0) for i in range(int(count))]
teacher = APITeacher(VideoAPI(base, "seedance", 0.44), folder, frames=12, size=(16, 16), fps=10, max_usd=1e6, poll=0.01, concurrency=16)
teacher.fetch(pairs)
print(teacher.summary())
"""


def storm(provider, folder, calls: int, kills: int) -> str:
    """`calls` videos with every fault, by a process that is killed `kills` times; the summary of the last one."""
    rng = random.Random(0)
    for left in range(kills, -1, -1):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, provider.base_url, str(folder), str(calls)], stdout=subprocess.PIPE, text=True
        )
        if left:
            before = len(provider.tasks)
            while child.poll() is None and len(provider.tasks) < before + calls // (kills + 1):
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.05))
            child.kill()
            child.wait()
        else:
            assert child.wait() == 0
            return child.stdout.read()
    raise AssertionError


def test_killed_processes_lose_nothing_and_pay_nothing_twice(provider, tmp_path):
    calls = int(os.environ.get("AFD_TEACHER_CALLS", 60))
    said = storm(provider, tmp_path, calls, kills=3)
    assert f"{calls} done" in said
    paid = [provider.charged(p) for p in {t["prompt"] for t in provider.tasks.values()}]
    assert paid == [1] * calls and len(list(tmp_path.glob("*.mp4"))) == calls


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

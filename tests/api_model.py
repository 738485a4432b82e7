"""The client of a video API against random faults: it pays at most once per video, loses none, meets its budget.

python tests/api_model.py --schedules 2000 --videos 10000
"""

import argparse
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from afd_fast.errors import TeacherError
from afd_fast.teachers.api import APITeacher
from afd_fast.teachers.exchange import Limits
from afd_fast.teachers.video_api import VideoAPI
from tests.api_server import KEY, SIGNATURE, Provider

os.environ["AFD_MODEL_KEY"] = KEY
PRICE = 0.1  # three of them are 0.30000000000000004 as floats
BROKEN = (
    "hangup",
    "gzip",
    "bomb",
    "cut",
    "empty",
    "html",
    "deep",
    "array",
    "redirect",
    "drip",
    "endless",
    "500",
    "503-",
    "502<",
    "409",
)
PASSING = ("400", "422", "429", "401", "wait", "superscript")
FAULTS = {
    "create": [
        *BROKEN, *(f"!{fault}" for fault in (*BROKEN, *PASSING)), "404<", "packed", lambda usual: {}, lambda usual: {"id": None},
        lambda usual: {"id": {}}, lambda usual: {"id": "cgt-0"}, lambda usual: {"id": "cgt-1"},
    ],
    "task": [
        *BROKEN, *PASSING, "404", "410-", "packed", lambda usual: usual | {"status": {}}, lambda usual: usual | {"content": 5},
        lambda usual: usual | {"content": {"video_url": "http://127.0.0.1:99999/"}}, lambda usual: {"status": 5},
    ],
    "list": [
        *BROKEN, *PASSING, "packed", *["stale"] * 8, lambda usual: {"items": 5}, lambda usual: {"items": [5, None, {}]}, lambda usual: {},
        lambda usual: {"items": [{"id": item["id"]} for item in usual["items"]]},
        lambda usual: {"items": usual["items"] * 2},
    ],
    "file": [*BROKEN, "403", "404<", "410", "429", "round", "packed"],
}  # fmt: skip
HOSTILE = Limits(request_s=0.2, download_s=0.3, json_bytes=1 << 18, video_bytes=1 << 20, retry_after_s=0.01)


class Hostile(Provider):
    """Draws a fault for every request with probability `rate`: a function of (schedule, request)."""

    def __init__(self):
        super().__init__()
        self.reset(0, 0.0)

    def reset(self, schedule: int, rate: float):
        self.tasks, self.hits, self.file_keys, self.script = {}, {}, [], {}
        self.schedule, self.rate, self.as_text = schedule, rate, schedule % 3 == 0
        self.denials = True  # whether the key is sometimes refused, which ends all buying in a run
        self.expire = schedule % 2 == 0
        self.honest = 0  # lists that lie by leaving out everything are never read twice in a row

    def fault(self, kind, prompt):
        number = self.count(f"{kind} fault {prompt}")
        rng = random.Random(f"{self.schedule}/{kind}/{prompt}/{number}")
        found = rng.choice(FAULTS[kind]) if rng.random() < self.rate else None
        if found in ("401", "!401") and not self.denials:
            found = "500"
        found = "drip" if found and rng.random() < 0.02 else found  # rarely: it takes as long as a request may
        if kind == "list":
            self.honest += 1
            if found == "stale":
                found = (lambda usual: {"items": []}) if self.honest > 2 else None
                self.honest = 0 if found else self.honest
            elif found is None and self.as_text:
                return lambda usual: {"items": [{**item, "seed": str(item["seed"])} for item in usual["items"]]}
        return found

    def billed(self) -> Counter:
        """Videos by prompt that the provider charges for."""
        return Counter(t["prompt"] for t in list(self.tasks.values()) if t.get("status") != "failed")


@dataclass(frozen=True)
class Client:
    """How the API is asked in one schedule; can be sent to another process."""

    base_url: str
    folder: str
    prompts: list[str]
    concurrency: int
    attempts: int
    limits: Limits = HOSTILE

    @property
    def requests(self) -> list[tuple[str, int]]:
        return [(prompt, 0) for prompt in self.prompts]

    def teacher(self, max_usd: float) -> APITeacher:
        return APITeacher(
            VideoAPI(self.base_url, "m", PRICE, key_env="AFD_MODEL_KEY", list_lag=0), self.folder, frames=4, size=(16, 16), fps=10, max_usd=max_usd,
            concurrency=self.concurrency, poll=0.002, patience=60, attempts=self.attempts, limits=self.limits,
        )  # fmt: skip

    def fetch(self, max_usd: float) -> str:
        """The error of one run, or nothing."""
        try:
            self.teacher(max_usd).fetch(self.requests)
        except TeacherError as error:
            return str(error)
        return ""

    def fetch_and_die(self, max_usd: float, syncs: int) -> None:
        """One run in this process, which kills itself before its n-th fsync."""
        sync, left = os.fsync, [syncs]

        def last(handle: int) -> None:
            left[0] -= 1
            if left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            sync(handle)

        os.fsync = last
        self.fetch(max_usd)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        Path(self.folder, "peak.txt").write_text(f"{peak} MiB in the client")


class Model:
    """Schedules against one server, and what has to hold after each run."""

    def __init__(self, server: Hostile):
        self.server, self.kills, self.runs, self.kept, self.billed = server, 0, 0, 0, 0
        self.memory = ""
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload([__name__ if __name__ != "__main__" else "tests.api_model"])

    def check(self, client: Client, max_usd: float, said: str) -> APITeacher:
        billed, asked = self.server.billed(), client.teacher(max_usd)
        assert max(billed.values(), default=0) <= 1, billed.most_common(3)
        assert len(billed) * PRICE - 1e-9 <= asked.spent <= max_usd, (len(billed), asked.spent, max_usd)
        texts = [said, *asked.problems, *(p.read_text() for p in Path(client.folder).glob("*.json"))]
        assert not any(secret in text for text in texts for secret in (KEY, SIGNATURE, "Traceback"))
        assert set(self.server.file_keys) <= {None}
        return asked

    def run(self, client: Client, max_usd: float, syncs: int = 0) -> None:
        """One run under faults; killed before its fsync number `syncs`."""
        started, said = time.monotonic(), ""
        if syncs:
            child = self.processes.Process(target=client.fetch_and_die, args=(max_usd, syncs))
            child.start()
            child.join()
            self.kills += child.exitcode == -signal.SIGKILL
            assert child.exitcode in (0, -signal.SIGKILL), child.exitcode
        else:
            said = client.fetch(max_usd)
        self.runs += 1
        self.check(client, max_usd, said)
        assert time.monotonic() - started < 30 + len(client.prompts)

    def recover(self, client: Client, max_usd: float) -> None:
        """Without faults one run finishes everything that the budget allows."""
        self.server.rate, self.server.as_text = 0.0, False
        said = replace(client, limits=Limits()).fetch(max_usd)
        asked = self.check(client, max_usd, said)
        poor = asked.spent + PRICE > max_usd + 1e-9
        assert not said or (poor and said.count(";") == 0 and "raise max_usd to at least" in said), said
        states = {record.prompt: record.state for record in asked._ledger}
        for prompt in client.prompts:
            allowed = {
                "done",
                *(("refused",) if "refused" in prompt else ()),
                *(("failed",) if "fails" in prompt else ()),
            }
            assert states[prompt] in allowed | ({"new", "rejected"} if poor else set()), (prompt, states[prompt], said)

    def total(self, client: Client) -> None:
        self.billed += len(self.server.billed())
        self.kept += len(list(Path(client.folder).glob("*[0-9a-f].mp4")))

    def schedule(self, number: int, killed: bool) -> None:
        """One small random schedule: runs under faults, some of them killed, and recovery with and without enough money."""
        rng = random.Random(number)
        words = ["", "", "", "", "refused at once", "refused later", "fails"]
        prompts = [f"video {i} {rng.choice(words)}".strip() for i in range(rng.randint(1, 4))]
        self.server.reset(number, rng.choice([0.1, 0.3, 0.6]))
        budget = PRICE * rng.randint(1, len(prompts)) + rng.choice([0, 0.05])
        with tempfile.TemporaryDirectory(dir=memory()) as folder:
            client = Client(self.server.base_url, folder, prompts, rng.choice([1, 2, 8]), rng.randint(1, 3))
            for _ in range(rng.randint(1, 2)):
                self.run(client, round(budget, 2), rng.randint(1, 14) if killed else 0)
            self.recover(client, round(budget, 2))
            if budget < PRICE * len(prompts):
                self.recover(client, round(PRICE * len(prompts), 2))
            self.total(client)
            hits = dict(self.server.hits)
            assert client.fetch(1e3) == "" and hits == self.server.hits

    def many(self, videos: int, kills: int) -> None:
        """One large schedule in one folder, by processes that are killed now and then."""
        rng = random.Random(videos)
        prompts = [
            f"video {i}{' refused later' if i % 97 == 0 else ' fails' if i % 89 == 0 else ''}" for i in range(videos)
        ]
        self.server.reset(1, 0.1)
        self.server.denials = False
        with tempfile.TemporaryDirectory(dir=memory()) as folder:
            client = Client(
                self.server.base_url, folder, prompts, 16, 4, replace(HOSTILE, request_s=3.0, download_s=3.0)
            )
            for _ in range(kills):
                self.run(client, 1e6, rng.randint(2, 12 * videos // kills))
            self.run(client, 1e6, 10**9)
            self.memory = Path(folder, "peak.txt").read_text()
            self.recover(client, 1e6)
            self.total(client)


def memory() -> str | None:
    """A folder in memory, where there is one: the test is about order, not about the disk."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedules", type=int, default=200, help="small ones, each of 1 to 5 videos")
    parser.add_argument("--videos", type=int, default=0, help="of one large schedule")
    parser.add_argument("--first", type=int, default=0, help="number of the first small schedule")
    given = parser.parse_args()
    with Hostile() as server:
        for name, work in (
            (f"{given.schedules} schedules", lambda model: [model.schedule(given.first + i, i % 5 == 0) for i in range(given.schedules)]),
            (f"{given.videos} videos", lambda model: model.many(given.videos, 10) if given.videos else None),
        ):  # fmt: skip
            model, started = Model(server), time.monotonic()
            work(model)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            print(
                f"{name}: {model.billed} billed, {model.kept} kept, {model.runs} runs, {model.kills} killed, "
                f"{time.monotonic() - started:.0f} s, peak {peak} MiB with the server {model.memory}", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()

"""A teacher behind a task-style video API: create a task, poll it, download the mp4. A video is never paid for twice.

Every (prompt, seed) has a record on disk, written before anything that costs money: new -> creating -> created ->
done, or refused, failed, lost. Creating is not idempotent. If the answer is lost, the task is found again in the
provider's list by its seed, which no other video has; it is created again only after three searches without a match.
"""

import asyncio
import fcntl
import hashlib
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_random_exponential
from torch import Tensor

from afd_fast.errors import ConfigError, TeacherError, VideoError
from afd_fast.teachers.teacher import Request, TeacherBase, nothing
from afd_fast.teachers.video_api import VideoAPI, at, read_description
from afd_fast.video_io import read_video

TRANSIENT = {408, 409, 425, 429, 500, 502, 503, 504}
NOT_CREATED = {429, 503}  # statuses of a create request that certainly made no task


class Record(TypedDict, total=False):
    """One video on disk. usd: paid, or reserved for a task that may exist; wire_seed: the seed that was sent."""

    state: str
    usd: float
    prompt: str
    seed: int
    tries: int
    wire_seed: int
    task: str
    failures: int
    reason: str
    sha256: str


class _Final(Exception):
    """This video is not available: `state` is refused, failed or lost."""

    def __init__(self, state: str, reason: str):
        super().__init__(reason)
        self.state, self.reason = state, reason


class _Later(Exception):
    """Not now: the server cannot be reached, or the task takes too long. The record does not change."""


class _Empty(Exception):
    """A successful answer without content."""


class _Unknown(Exception):
    """A create request was sent and its answer never came."""


class _Wait(wait_random_exponential):
    """Exponential with full jitter, and not before Retry-After (seconds)."""

    def __call__(self, state: RetryCallState) -> float:
        error, seconds = state.outcome and state.outcome.exception(), super().__call__(state)
        if isinstance(error, httpx.HTTPStatusError) and error.response.headers.get("retry-after", "").isdigit():
            seconds += float(error.response.headers["retry-after"])
        return seconds


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in TRANSIENT
    return isinstance(error, (httpx.TransportError, _Empty))


def _made_no_task(error: BaseException) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in NOT_CREATED
    return isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout))


class APITeacher(TeacherBase):
    """Videos of `api`, converted to frames x size at fps when read; `folder` keeps the files as the provider made them.

    max_usd: over all runs with this folder; reserved before a request, so a crash counts too much, never too little.
    concurrency: tasks in flight; poll: seconds between requests for a task's status, growing to ten times that;
    patience: seconds for one task, after which it stays on record and the next run continues to wait. attempts: per
    request. A task that the provider failed (no refusal, no charge) is created once more.
    """

    def __init__(
        self, api: VideoAPI, folder: str | Path, *, frames: int, size: tuple[int, int], fps: float, max_usd: float,
        prompts: Iterable[str] = (), concurrency: int = 8, poll: float = 6.0, patience: float = 1800.0, attempts: int = 6,
    ):  # fmt: skip
        self.api, self.folder, self.max_usd, self.prompts = api, Path(folder), max_usd, list(dict.fromkeys(prompts))
        self.name, self.fps = f"api:{api.model}", fps
        self.concurrency, self.poll, self.patience, self.attempts = concurrency, poll, patience, attempts
        self.frames, self.size = frames, size
        self.folder.mkdir(parents=True, exist_ok=True)
        self._records, self._later = self._read(), ""
        self._whole: set[str] = set()  # videos whose checksum was verified

    def _read(self) -> dict[str, Record]:
        return {path.stem: _record(path) for path in self.folder.glob("*.json")}

    def _load(self, path: Path) -> Tensor:
        return read_video(path, frames=self.frames, size=self.size, fps=self.fps)

    # -- what is on disk -------------------------------------------------------------------------------------

    def _id(self, prompt: str, seed: int) -> str:
        request = json.dumps([self.api.base_url, self.api.request(prompt, seed)], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(request.encode()).hexdigest()[:32]

    def _write(self, name: str, **change: Any) -> None:
        """Change a record atomically: it is complete on disk before this returns."""
        record = cast(Record, {**self._records.get(name, Record(state="new", usd=0.0)), **change})
        path, partial = self.folder / f"{name}.json", self.folder / f"{name}.{os.getpid()}.part"
        with partial.open("w") as file:
            json.dump(record, file, ensure_ascii=False, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        self._records[name] = record

    @property
    def spent(self) -> float:
        """Dollars on record: paid, or reserved for a task that may exist."""
        return sum(r["usd"] for r in self._records.values())

    def _has(self, name: str) -> bool:
        record, path = self._records.get(name), self.folder / f"{name}.mp4"
        if not record or record["state"] != "done" or not path.exists():
            return False
        if name not in self._whole and hashlib.sha256(path.read_bytes()).hexdigest() == record["sha256"]:
            self._whole.add(name)
        return name in self._whole

    def cost(self, requests: Sequence[Request]) -> str:
        """Videos still to buy, their price, and what is on record."""
        left = len(self.missing(requests))
        return f"{left} videos to buy for {left * self.api.usd_per_video:.2f} USD; {self.summary()}"

    def missing(self, pairs: Sequence[Request]) -> list[Request]:
        """The (prompt, seed) pairs that still have to be requested or downloaded."""
        final = ("refused", "failed", "lost")
        names = [(pair, self._id(*pair)) for pair in pairs]
        return [
            pair for pair, n in names if not self._has(n) and self._records.get(n, Record()).get("state") not in final
        ]

    def seeds(self, prompt: str, wanted: Iterable[int]) -> list[int]:
        """Those of the wanted seeds whose videos are on disk."""
        return [seed for seed in wanted if self._has(self._id(prompt, seed))]

    @property
    def problems(self) -> list[str]:
        """Videos that are not available, one line each."""
        return [f"{r['prompt']!r}: {r['state']} ({r['reason']})" for r in self._records.values() if r.get("reason")]

    def summary(self) -> str:
        """Counts and cost over everything in the folder."""
        count = Counter(r["state"] for r in self._records.values())
        text = ", ".join(
            f"{count[s]} {s}" for s in ("done", "refused", "failed", "lost", "created", "creating", "new") if count[s]
        )
        return f"{self.folder}: {text or 'nothing'}; {self.spent:.2f} of {self.max_usd:.2f} USD"

    def __call__(self, prompt: str, seed: int) -> Tensor:
        """The video [3, F, H, W] in [0, 1], fetched if it is not on disk. Raises TeacherError if it is not available."""
        name = self._id(prompt, seed)
        if not self._has(name):
            self.fetch([Request(prompt, seed)])
        if not self._has(name):
            raise TeacherError(f"{self.name} has no video of {prompt!r}: {self._records[name].get('reason')}")
        return self._load(self.folder / f"{name}.mp4")

    # -- the network -----------------------------------------------------------------------------------------

    def fetch(self, requests: Sequence[Request], done: Callable[[], None] = nothing) -> None:
        """Get all requested videos that are not on disk, `concurrency` at a time; done() after each.

        Refused, failed and lost videos are on record and do not stop the others. Raises TeacherError for a wrong request
        or key and for a budget that would be exceeded, ConfigError without a key. Both leave every record valid.
        """
        if not self.missing(requests):
            return
        key = self.api.key()
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TeacherError(f"another process is fetching into {self.folder}: wait for it") from None
            self._records = self._read()  # another process may have changed them
            todo = self.missing(requests)
            for _ in range(len(requests) - len(todo)):
                done()
            asyncio.run(self._fetch_all(todo, key, done))
        left = self.missing(requests)
        if left:
            raise TeacherError(
                f"{len(left)} of {len(requests)} videos are not finished ({self._later}); nothing is lost: run the same "
                "command again"
            )

    async def _fetch_all(self, pairs: Sequence[Request], key: str, done: Callable[[], None]) -> None:
        limit = asyncio.Semaphore(self.concurrency)
        headers = {"Authorization": self.api.authorization.format(key=key)}
        async with (
            httpx.AsyncClient(base_url=self.api.base_url, headers=headers, timeout=30) as api,
            httpx.AsyncClient(timeout=60, follow_redirects=True) as plain,  # videos are on other hosts: no key for them
        ):

            async def one(prompt: str, seed: int) -> None:
                async with limit:
                    await self._one(api, plain, prompt, seed)
                done()

            tasks = [asyncio.create_task(one(*pair)) for pair in pairs]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, api: httpx.AsyncClient, plain: httpx.AsyncClient, prompt: str, seed: int) -> None:
        name = self._id(prompt, seed)
        if name not in self._records:
            self._write(name, prompt=prompt, seed=seed, tries=0)
        if self._records[name]["state"] == "done":  # its file is gone or damaged
            self._write(name, state="created")
        try:
            while (state := self._records[name]["state"]) != "done":
                if state == "creating":  # the answer never came, now or in a process that died
                    await self._find(api, name)
                elif state == "new":
                    await self._create(api, name, prompt)
                else:
                    await self._wait(api, plain, name)
        except _Final as end:
            record = self._records[name]
            free = end.state == "refused" and record["state"] == "creating"  # refused before a task was made
            self._write(name, state=end.state, reason=end.reason, usd=0.0 if free else record["usd"])
        except (_Later, _Empty, httpx.HTTPError) as error:
            self._later = str(error) or type(error).__name__

    async def _json(
        self, client: httpx.AsyncClient, method: str, path: str, *, creating: bool = False, **options: Any
    ) -> Any:
        """The JSON of an answer; transient errors are retried."""
        again = retry_if_exception(_made_no_task if creating else _is_transient)
        wait = _Wait(multiplier=min(0.5, self.poll), max=60)
        async for attempt in AsyncRetrying(
            retry=again, stop=stop_after_attempt(self.attempts), wait=wait, reraise=True
        ):
            with attempt:
                try:
                    answer = await client.request(method, path, **options)
                except httpx.TransportError as error:
                    if creating and not _made_no_task(error):
                        raise _Unknown(type(error).__name__) from None
                    raise
                if answer.status_code in (NOT_CREATED if creating else TRANSIENT):
                    answer.raise_for_status()
                if creating and (answer.status_code >= 500 or answer.status_code in TRANSIENT):
                    raise _Unknown(f"HTTP {answer.status_code}")
                try:
                    content = answer.json()
                except ValueError:
                    content = None
                if answer.is_error:
                    self._give_up(answer.status_code, str(at(content, self.api.error_field) or ""))
                if not content:
                    raise _Unknown("an empty answer") if creating else _Empty(path)
                return content
        raise AssertionError("unreachable")

    def _give_up(self, status: int, code: str) -> None:
        if any(word in code for word in self.api.refusals):
            raise _Final("refused", code)
        raise TeacherError(
            f"{self.api.base_url} answered {status} {code}".rstrip()
            + ": check the key, the model's name and the parameters"
        )

    async def _create(self, api: httpx.AsyncClient, name: str, prompt: str) -> None:
        price = self.api.usd_per_video
        if self.spent + price > self.max_usd + 1e-9:
            raise TeacherError(
                f"{self.spent:.2f} of {self.max_usd:.2f} USD are spent and a video costs {price:.2f}: raise max_usd"
            )
        tries = self._records[name]["tries"]
        if tries > self.attempts:
            raise _Final("failed", f"{tries} tasks came to nothing")
        seed = int(hashlib.sha256(f"{name}/{tries}".encode()).hexdigest()[:8], 16) >> 1  # 31 bits, unique to this task
        self._write(name, state="creating", usd=price, wire_seed=seed, tries=tries + 1)
        try:
            body = self.api.request(prompt, seed)
            answer = await self._json(api, "POST", self.api.create_path, creating=True, json=body)
        except _Unknown:
            return  # still "creating": search for it
        except (TeacherError, httpx.HTTPError):  # certainly no task: nothing is owed
            self._write(name, state="new", usd=0.0, tries=tries)
            raise
        self._write(name, state="created", task=str(at(answer, self.api.id_field)))

    async def _find(self, api: httpx.AsyncClient, name: str) -> None:
        """Search for the task of a create request without an answer: `created` if it is found, else `new`."""
        if self.api.list_path is None:
            raise _Final("lost", "the answer to its creation was lost and this API lists no tasks: look at the bill")
        seed = self._records[name]["wire_seed"]
        for _ in range(3):  # a list may lag behind
            page = 1
            while True:
                listing = await self._json(api, "GET", self.api.list_path.format(page=page))
                items = at(listing, self.api.items_field) or []
                mine = [task for task in items if at(task, self.api.seed_field) == seed]
                if mine:
                    self._write(name, state="created", task=str(at(mine[0], self.api.id_field)))
                    return
                if not items or "{page}" not in self.api.list_path:
                    break
                page += 1
            await asyncio.sleep(self.poll)
        self._write(name, state="new", usd=0.0)

    async def _wait(self, api: httpx.AsyncClient, plain: httpx.AsyncClient, name: str) -> None:
        """Wait for the task and get its file; `new` again after the provider failed it for the first time."""
        record, pause, end = self._records[name], self.poll, time.monotonic() + self.patience
        while True:
            answer = await self._json(api, "GET", self.api.task_path.format(id=record["task"]))
            status, code = at(answer, self.api.status_field), str(at(answer, self.api.error_field) or "")
            if status in self.api.done and at(answer, self.api.url_field):
                return await self._download(plain, name, at(answer, self.api.url_field))
            if status in self.api.failed:
                if any(word in code for word in self.api.refusals):
                    raise _Final("refused", code)
                if record.get("failures"):
                    raise _Final("failed", code or status)
                self._write(name, state="new", usd=0.0, failures=1)
                return None
            if time.monotonic() > end:
                raise _Later(f"task {record['task']} took more than {self.patience:.0f} s")
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))
            pause = min(pause * 1.5, 10 * self.poll)

    async def _download(self, plain: httpx.AsyncClient, name: str, url: str) -> None:
        """Store the file, complete and readable, under its name; a damaged file is downloaded again, not paid again."""
        partial, path = self.folder / f"{name}.{os.getpid()}.mp4.part", self.folder / f"{name}.mp4"
        retrying = AsyncRetrying(
            retry=retry_if_exception(lambda e: _is_transient(e) or isinstance(e, VideoError)),
            stop=stop_after_attempt(self.attempts), wait=_Wait(multiplier=min(0.5, self.poll), max=60), reraise=True,
        )  # fmt: skip
        try:
            async for attempt in retrying:
                with attempt:
                    answer = await plain.get(url)
                    answer.raise_for_status()
                    with partial.open("wb") as file:
                        file.write(answer.content)
                        file.flush()
                        os.fsync(file.fileno())
                    await asyncio.to_thread(self._load, partial)  # decodes the frames that will be used
        except VideoError as error:
            partial.unlink(missing_ok=True)
            raise _Final("failed", f"its file is no usable video: {str(error).partition(': ')[2]}") from None
        partial.replace(path)
        self._write(name, state="done", sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def _record(path: Path) -> Record:
    """A record on disk. Raises ConfigError for a damaged one."""
    try:
        record = json.loads(path.read_text())
    except ValueError:
        record = None
    if not (isinstance(record, dict) and {"state", "usd", "prompt"} <= record.keys()):
        raise ConfigError(f"{path} is not a record of a video: restore it, or move it away to buy that video again")
    return cast(Record, record)


def from_file(path: str | Path, *, frames: int, size: tuple[int, int], fps: float) -> APITeacher:
    """An APITeacher from a JSON file (`Description`). Raises ConfigError for missing, unknown and damaged entries."""
    given = read_description(Path(path))
    return APITeacher(
        given.api, given.folder, prompts=given.prompts, max_usd=given.max_usd, frames=frames, size=size, fps=fps, **given.pace
    )  # fmt: skip

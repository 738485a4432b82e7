"""The state machine that buys videos: docs/teachers.md has its table. Every transition is on disk before the request that
could cost money, and only an answer that proves that no task was made frees the money again."""

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from afd_fast.errors import TeacherError, VideoError
from afd_fast.files.durable import checksum, settle
from afd_fast.teachers.exchange import Answer, Exchange, usable_url
from afd_fast.teachers.records import Ledger, Record, exact, refused_by_disk, wire_seed
from afd_fast.teachers.video_api import at, check_number
from afd_fast.video_io import read_video

SEARCHES = 3  # believable lists without the task's seed, before it is created again
UNFIT = 3  # whole videos that do not fit and none that does, before nothing more is bought
MOST_PAGES, MOST_TASKS = 1000, 100_000  # of a list


@dataclass(frozen=True)
class Pace:
    """How fast an API is asked: tasks in flight, seconds between polls (growing to ten times that), seconds for one task,
    tries per request."""

    concurrency: int = 8
    poll: float = 6.0
    patience: float = 1800.0
    attempts: int = 6

    def __post_init__(self) -> None:
        check_number("concurrency", self.concurrency, 1, 1000, whole=True)
        check_number("poll", self.poll, 1e-3, 3600)
        check_number("patience", self.patience, 1e-3, 1e6)
        check_number("attempts", self.attempts, 1, 100, whole=True)

    def pauses(self) -> Iterator[float]:
        """Seconds to wait after each try: exponential with full jitter."""
        for n in range(self.attempts):
            yield random.uniform(0, min(60.0, min(0.5, self.poll) * 2**n))


class _Later(Exception):
    """Not finished in this run: the server cannot be reached, or a task takes too long. The record does not change."""


class _Unbelievable(_Later):
    """The provider's list of tasks makes no sense."""


class _Trouble(Exception):
    """The provider answers, but not with this paid video. `final`: the next answer would be the same."""

    def __init__(self, reason: str, *, final: bool = False):
        super().__init__(reason)
        self.final = final


class _Unaffordable(Exception):
    """The budget forbids another task."""


class Buyer:
    """Brings the videos of a ledger home.

    check: raises VideoError for a file that cannot be used. After `run`, `waiting` has the reason for every video that is not
    finished, `unaffordable` those that the budget forbids.
    """

    def __init__(self, ledger: Ledger, exchange: Exchange, pace: Pace, max_usd: float, check: Callable[[Path], Any]):
        self.ledger, self.exchange, self.pace, self.check = ledger, exchange, pace, check
        self.api, self.max_usd = exchange.api, exact(max_usd)
        self.price = exact(self.api.usd_per_video)
        self.waiting: dict[str, str] = {}
        self.unaffordable: list[str] = []
        self._halt = ""  # why nothing more is created
        self._listed: dict[str, set[str]] = {}
        self._listed_at = float("-inf")
        self._listing, self._decoding = asyncio.Lock(), asyncio.Lock()

    async def run(self, names: Sequence[str], done: Callable[[], None]) -> None:
        """Finish all of them, as far as possible: those that are paid for first, the others while there is money."""
        todo = sorted(names, key=lambda name: self.ledger[name].usd == 0)
        while todo:
            self.unaffordable, queue = [], iter(todo)
            await asyncio.gather(*(self._work(queue, done) for _ in range(min(self.pace.concurrency, len(todo)))))
            todo = self.unaffordable if self._affordable else []  # another video may have given its money back

    @property
    def _affordable(self) -> bool:
        return self.ledger.spent + self.price <= self.max_usd

    async def _work(self, queue: Iterator[str], done: Callable[[], None]) -> None:
        for name in queue:
            try:
                try:
                    await self._advance(name)
                except _Trouble as trouble:
                    self._strike(name, trouble)
            except _Later as reason:
                if not self.ledger[name].left_out:
                    self.waiting[name] = str(reason)
            except _Unaffordable:
                if not self.ledger[name].left_out:
                    self.unaffordable.append(name)
                    continue
            except TeacherError as error:  # the disk is full: the others only bring home what is paid for
                self.waiting[name] = self._halt = str(error)
            done()

    async def _advance(self, name: str) -> None:
        """Move a video on until it is finished. _Later or _Trouble where that needs another run."""
        if self.ledger[name].state == "done":  # its file is gone or damaged
            self.ledger.write(name, state="made")
        created = 0
        while True:
            state = self.ledger[name].state
            if state in ("new", "rejected"):
                if self._halt:
                    raise _Later(self._halt)
                if not self._affordable:
                    raise _Unaffordable
                if created > self.pace.attempts:
                    raise _Later(f"{created} create requests came to nothing")
                created += 1
                await self._create(name)
                if self.ledger[name].state == "rejected":
                    return
            elif state == "creating":  # the answer never came, now or in a process that died
                await self._find(name)
            elif state == "created":
                await self._wait(name)
            elif state in ("made", "unusable"):
                return await self._bring(name)
            else:
                return

    def _strike(self, name: str, trouble: _Trouble) -> None:
        """A paid video that cannot be had now. The run stops for it once, in case its host is down; later runs only try."""
        record = self.ledger[name]
        if record.state not in ("created", "made", "unusable"):
            self.waiting[name] = str(trouble)
            return
        strikes = 2 if trouble.final else record.strikes + 1
        state = "unusable" if strikes > 1 and record.state == "made" else record.state
        self.ledger.write(name, state=state, strikes=strikes, reason=str(trouble))
        if not self.ledger[name].left_out:
            self.waiting[name] = str(trouble)

    async def _create(self, name: str) -> None:
        record = self.ledger[name]
        seed = wire_seed(name, record.failures)
        self.ledger.write(name, state="creating", usd=self.api.usd_per_video, wire_seed=seed, reason="")
        body = self.api.request(record.prompt, seed)
        for pause in self.pace.pauses():
            answer = await self.exchange.ask("POST", self.api.create_path, body)
            if not answer.proves_no_task:
                task = task_id(at(answer.content, self.api.id_field)) if answer.good else None
                if task and self.ledger.owner(task) is None:  # else the answer is not to be believed
                    self.ledger.write(name, state="created", task=task)
                return
            if answer.sent and answer.status != 429:
                return self._turned_down(name, record, answer)
            await asyncio.sleep(pause + answer.wait)
        self.ledger.add(name, record)
        if not answer.sent:
            self._halt = f"{self.api.base_url} cannot be reached ({answer.text})"
        raise _Later(answer.text)

    def _turned_down(self, name: str, record: Record, answer: Answer) -> None:
        """A create request was answered with an error before a task was made: nobody pays. record: as it was before."""
        code = str(at(answer.content, self.api.error_field))
        if any(word in code for word in self.api.refusals):
            return self.ledger.write(name, state="refused", usd=0.0, reason=self.exchange.clean(code))
        text = f"{answer.text}: check the key, the model's name and the parameters"
        if answer.denied:
            self._halt = f"{self.api.base_url} answered {text}"
            self.ledger.add(name, record)
            raise _Later(self._halt)
        self.ledger.write(name, state="rejected", usd=0.0, reason=text)

    async def _find(self, name: str) -> None:
        """Search for the task of a create request without an answer: `created` if it is found, else `new`."""
        if self.api.list_path is None:
            reason = "the answer to its creation was lost and this API lists no tasks: look at the bill"
            return self.ledger.write(name, state="lost", reason=f"{reason}; remove {name}.json to buy it again")
        seed = str(self.ledger[name].wire_seed)
        known, believed, flaw = self._under_way(), 0, _Unbelievable("")
        listed_from = time.monotonic() + self.api.list_lag
        for search in range(1, self.pace.attempts + SEARCHES):
            began = time.monotonic()
            try:
                listed = await self._list()
                if mine := self._free(listed, seed):
                    return self.ledger.write(name, state="created", task=mine)
                if seed in listed:
                    raise _Unbelievable("the task with its seed was given to another video")
                if not all(task in listed.get(wire, ()) for task, wire in known.items()):  # it lags behind, or lies
                    raise _Unbelievable("the provider's list lacks tasks that exist")
                believed += 1
                if believed >= SEARCHES and began >= listed_from:
                    return self.ledger.write(name, state="new", usd=0.0)
            except _Unbelievable as error:
                flaw = error
            known = self._under_way()
            await asyncio.sleep(
                max(self.pace.poll * search, listed_from - time.monotonic() if believed >= SEARCHES - 1 else 0)
            )
        raise flaw

    def _under_way(self) -> dict[str, str]:
        """Seeds by task: what a list has to hold to be believed."""
        return {record.task: str(record.wire_seed) for record in self.ledger if record.state == "created"}

    def _free(self, listed: dict[str, set[str]], seed: str) -> str | None:
        """A listed task with this seed that no video has yet."""
        return next((task for task in sorted(listed.get(seed, ())) if self.ledger.owner(task) is None), None)

    async def _list(self) -> dict[str, set[str]]:
        """Ids of the provider's tasks by seed, read after this call began; videos that search share a reading."""
        called = time.monotonic()
        async with self._listing:
            if self._listed_at < called:
                started = time.monotonic()
                self._listed = await self._read_list()
                self._listed_at = started
            return self._listed

    async def _read_list(self) -> dict[str, set[str]]:
        path, listed, seen = self.api.list_path or "", dict[str, set[str]](), set[str]()
        for page in range(1, MOST_PAGES + 1):
            content = await self._get(path.replace("{page}", str(page)))
            items = at(content, self.api.items_field)
            if not isinstance(items, list):
                if page > 1 and items is None:
                    return listed
                raise _Unbelievable(f"the provider's list has no list at {self.api.items_field!r}")
            found = {
                task: str(at(item, self.api.seed_field))[:20]
                for item in items
                if (task := task_id(at(item, self.api.id_field)))
            }
            fresh = found.keys() - seen
            if items and not fresh and page == 1:
                raise _Unbelievable(f"the provider's list has no ids at {self.api.id_field!r}")
            seen |= fresh
            for task, seed in found.items():
                listed.setdefault(seed, set()).add(task)
            if not fresh or "{page}" not in path:  # the end, or `page` is ignored
                return listed
            if len(seen) > MOST_TASKS:
                break
        raise _Unbelievable(f"the provider's list has more than {MOST_PAGES} pages or {MOST_TASKS} tasks")

    async def _get(self, path: str) -> dict[str, Any]:
        """The JSON object of an answer. What may pass is tried again; _Trouble for an error that is about this path."""
        for pause in self.pace.pauses():
            answer = await self.exchange.ask("GET", path)
            if answer.good and answer.content is not None:
                return answer.content
            if answer.denied:
                raise _Later(f"{self.api.base_url} answered {answer.text}: check the key")
            await asyncio.sleep(pause + answer.wait)
        raise (_Later if answer.passing else _Trouble)(f"the provider answered {answer.text}")

    async def _task(self, name: str) -> dict[str, Any]:
        """What the provider says of a video's task. Where it gave an id that is another task's or none's, the list has the
        right one."""
        record = self.ledger[name]
        seed, path = str(record.wire_seed), self.api.task_path
        try:
            content = await self._get(path.replace("{id}", quote(record.task, safe="")))
            told = str(at(content, self.api.seed_field))
            if told == seed or all(told != str(r.wire_seed) for r in self.ledger):  # not every provider tells it
                return content
            trouble = _Trouble(f"the provider gave it the task {record.task}, which is another video's")
        except _Trouble as error:
            trouble = error
        with contextlib.suppress(_Later, _Trouble):
            if self.api.list_path and (mine := self._free(await self._list(), seed)):
                self.ledger.write(name, task=mine)
                return await self._get(path.replace("{id}", quote(mine, safe="")))
        raise trouble

    async def _wait(self, name: str) -> None:
        """Poll the task until it is `made` or refused; `new` again after the provider failed it for the first time."""
        record, pause, end = self.ledger[name], self.pace.poll, time.monotonic() + self.pace.patience
        while True:
            content = await self._task(name)
            status, code = at(content, self.api.status_field), str(at(content, self.api.error_field) or "")
            if status in self.api.done:
                return self.ledger.write(name, state="made", strikes=0, reason="")
            if status in self.api.failed:
                reason = self.exchange.clean(code or str(status))
                if any(word in code for word in self.api.refusals):
                    return self.ledger.write(name, state="refused", reason=reason)
                if record.failures:
                    return self.ledger.write(name, state="failed", usd=0.0, reason=reason)
                return self.ledger.write(name, state="new", usd=0.0, failures=1, strikes=0, reason="")
            if time.monotonic() > end:
                raise _Later(f"task {self.ledger[name].task} took more than {self.pace.patience:.0f} s")
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))
            pause = min(pause * 1.5, 10 * self.pace.poll)

    async def _bring(self, name: str) -> None:
        """Get the file of a finished task. A file that cannot be used is kept under another name: it was paid for."""
        if await self._adopt(name):
            return
        partial = self.ledger.folder / f"{name}.mp4.part"
        trouble: Exception = _Later("")
        for pause in self.pace.pauses():
            content = await self._task(name)  # each time, because its URL expires
            url = usable_url(at(content, self.api.url_field))
            if url is None:
                status = self.exchange.clean(str(at(content, self.api.status_field)))
                trouble = _Trouble(f"the provider says {status!r} and names no URL of its video")
                await asyncio.sleep(pause)
                continue
            answer = await self.exchange.download(url, partial)
            if answer.status != 200:
                trouble = (_Later if answer.passing else _Trouble)(f"its video was not downloaded: {answer.text}")
            elif flaw := await self._flaw(partial):
                trouble = await self._set_aside(name, partial, flaw)
                if trouble.final:
                    self._stop_if_none_fits(name, str(trouble))
                    break
            else:
                return await self._keep(name, partial)
            await asyncio.sleep(pause + answer.wait)
        raise trouble

    def _stop_if_none_fits(self, name: str, reason: str) -> None:
        """Where the API's videos are all too short for this run, buying more of them would be a waste."""
        others = Counter(record.state for record in self.ledger if record is not self.ledger[name])
        if others["unusable"] + 1 >= UNFIT and not others["done"]:
            self._halt = f"nothing more is bought, because none of {UNFIT} videos fits this run: {reason}"

    async def _adopt(self, name: str) -> bool:
        """Take a file that is there: of a process that died before the record, or set aside by a run that needed more of it."""
        video = self.ledger.video(name)
        aside = sorted(video.parent.glob(f"{name}.unusable-*.mp4"))
        damaged = bool(self.ledger[name].sha256)  # it was complete once
        for path in [video, *aside] if video.exists() and not damaged else aside:
            if not await self._flaw(path):
                await self._keep(name, path)
                return True
        return False

    async def _keep(self, name: str, path: Path) -> None:
        digest = await asyncio.to_thread(checksum, path)
        self._settle(path, self.ledger.video(name))
        self.ledger.write(name, state="done", sha256=digest, strikes=0, reason="")

    async def _set_aside(self, name: str, partial: Path, flaw: VideoError) -> _Trouble:
        """Keep a file that is no usable video, and every one that is a video at all."""
        is_video = not await self._flaw(partial, lambda path: read_video(path, frames=1))
        part = f"-{(await asyncio.to_thread(checksum, partial))[:8]}.mp4" if is_video else ""
        aside = self.ledger.folder / f"{name}.unusable{part}"
        self._settle(partial, aside)
        text = self.exchange.clean(str(flaw).rpartition(f"{partial.name}: ")[2])
        return _Trouble(f"its file is no usable video: {text}; kept as {aside.name}", final=is_video)

    async def _flaw(self, path: Path, check: Callable[[Path], Any] | None = None) -> VideoError | None:
        """Why a file is no usable video. One is decoded at a time, to bound the memory."""
        async with self._decoding:
            try:
                await asyncio.to_thread(check or self.check, path)
            except VideoError as error:
                return error
            except Exception as error:  # a hostile file must not stop the others
                return VideoError(f"{path}: {type(error).__name__}")
        return None

    def _settle(self, path: Path, target: Path) -> None:
        try:
            settle(path, target)
        except OSError as error:
            raise refused_by_disk(target, error) from None


def task_id(value: Any) -> str | None:
    """A task's id as text; None if it is none."""
    text = str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else ""
    return text if 0 < len(text) <= 200 and text.isprintable() else None

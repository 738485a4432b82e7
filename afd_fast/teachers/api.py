"""A teacher behind a task-style video API: create a task, poll it, download the mp4. A video is never paid for twice.

`buyer.py` is the state machine, `records.py` what is on disk, `exchange.py` the bounded HTTP underneath.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import ROUND_UP, Decimal
from functools import partial
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from afd_fast.errors import ConfigError, TeacherError, VideoError
from afd_fast.files.durable import checksum
from afd_fast.files.lock import take
from afd_fast.teachers.buyer import Buyer, Pace
from afd_fast.teachers.exchange import Exchange, Limits, silent_logs
from afd_fast.teachers.records import FINAL, STATES, Ledger, Record, exact
from afd_fast.teachers.teacher import Request, TeacherBase, nothing
from afd_fast.teachers.video_api import VideoAPI, at, check_number, read_description
from afd_fast.video_io import check_file, read_video

NAMED = 3  # videos that an error names


class APITeacher(TeacherBase):
    """Videos of `api`, converted to frames x size at fps when read; `folder` keeps the files as the provider made them.

    max_usd: over all runs with this folder; reserved before a request, so a crash counts too much, never too little.
    concurrency: tasks in flight; poll: seconds between requests for a task's status, growing to ten times that;
    patience: seconds for one task, after which it stays on record and the next run continues to wait. attempts: per
    request. limits: of one request's time and size. A task that the provider failed (no refusal, no charge) is created
    once more. ConfigError for numbers out of range and for a clip that the API's videos cannot hold.
    """

    def __init__(
        self, api: VideoAPI, folder: str | Path, *, frames: int, size: tuple[int, int], fps: float, max_usd: float,
        prompts: Iterable[str] = (), concurrency: int = 8, poll: float = 6.0, patience: float = 1800.0, attempts: int = 6,
        limits: Limits = Limits(),
    ):  # fmt: skip
        check_number("max_usd", max_usd, 0, 1e9)
        check_number("frames", frames, 1, 1e6, whole=True)
        check_number("fps", fps, 1e-3, 1e3)
        self.api, self.folder, self.max_usd, self.prompts = api, Path(folder), max_usd, list(dict.fromkeys(prompts))
        self.name, self.fps = f"api:{api.model}", fps
        self.pace, self.limits = Pace(concurrency, poll, patience, attempts), limits
        self.frames, self.size = frames, size
        for prompt in self.prompts:
            _check_prompt(prompt)
        self._check_duration()
        self._ledger = Ledger(self.folder)
        self._whole: set[str] = set()  # videos whose checksum was verified

    def _check_duration(self) -> None:
        """Frame k is the picture at k / fps seconds, so the last one has to lie within the video."""
        duration = at(self.api.request("", 0), "duration")
        last = (self.frames - 1) / self.fps
        if isinstance(duration, (int, float)) and 0 < duration < last - 1e-6:  # Seedance's -1 lets the model choose
            raise ConfigError(
                f"a video of {duration:g} s cannot hold {self.frames} frames at {self.fps:g} fps, whose last is at {last:.2f} s: "
                "raise duration in parameters, or train on fewer frames"
            )

    def _load(self, path: Path) -> Tensor:
        return read_video(path, frames=self.frames, size=self.size, fps=self.fps)

    # -- what is on disk -------------------------------------------------------------------------------------

    def _id(self, prompt: str, seed: int) -> str:
        request = json.dumps([self.api.base_url, self.api.request(prompt, seed)], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(request.encode()).hexdigest()[:32]

    @property
    def spent(self) -> float:
        """Dollars on record: paid, or reserved for a task that may exist."""
        return float(self._ledger.spent)

    def _has(self, name: str) -> bool:
        record, path = self._ledger.get(name), self._ledger.video(name)
        if not record or record.state != "done" or not path.exists():
            return False
        if name not in self._whole and checksum(path) == record.sha256:
            self._whole.add(name)
        return name in self._whole

    def cost(self, requests: Sequence[Request]) -> str:
        """Videos still to buy, their price, and what is on record."""
        left = sum(not (record := self._ledger.get(n)) or not record.usd for n in self._missing(requests))
        return f"{left} videos to buy for {left * self.api.usd_per_video:.2f} USD; {self.summary()}"

    def _missing(self, requests: Sequence[Request]) -> dict[str, Request]:
        """By name, the requests that still have to be bought or downloaded."""
        names = {self._id(*request): Request(*request) for request in requests}
        final = {n for n in names if (record := self._ledger.get(n)) and record.state in FINAL}
        return {n: request for n, request in names.items() if n not in final and not self._has(n)}

    def missing(self, pairs: Sequence[Request]) -> list[Request]:
        """The (prompt, seed) pairs that still have to be requested or downloaded."""
        return list(self._missing(pairs).values())

    def seeds(self, prompt: str, wanted: Iterable[int]) -> list[int]:
        """Those of the wanted seeds whose videos are on disk."""
        return [seed for seed in wanted if self._has(self._id(prompt, seed))]

    def file(self, prompt: str, seed: int) -> str:
        """The name of a video in the folder."""
        return self._ledger.video(self._id(prompt, seed)).name

    @property
    def problems(self) -> list[str]:
        """Videos that are not available, one line each."""
        return [str(record) for record in self._ledger if record.reason]

    def summary(self) -> str:
        """Counts and cost over everything in the folder."""
        count = Counter(record.state for record in self._ledger)
        text = ", ".join(f"{count[s]} {s}" for s in STATES if count[s])
        return f"{self.folder}: {text or 'nothing'}; {self.spent:.2f} of {self.max_usd:.2f} USD"

    def __call__(self, prompt: str, seed: int) -> Tensor:
        """The video [3, F, H, W] in [0, 1], fetched if it is not on disk. Raises TeacherError if it is not available,
        VideoError if it does not fit."""
        name = self._id(prompt, seed)
        if not self._has(name):
            self.fetch([Request(prompt, seed)])
        if not self._has(name):
            record = self._ledger.get(name)
            raise TeacherError(f"{self.name} has no video of {record or f'{prompt!r}, seed {seed}'}")
        try:
            return self._load(self._ledger.video(name))
        except VideoError as error:
            raise VideoError(f"the video of {prompt!r}, seed {seed}, does not fit: {error}") from error

    # -- buying ----------------------------------------------------------------------------------------------

    def fetch(self, requests: Sequence[Request], done: Callable[[], None] = nothing) -> None:
        """Get all requested videos that are not on disk, `concurrency` at a time; done() after each.

        Problems of one video do not stop the others: they are on record. TeacherError at the end, when everything that
        could be had is there, if the budget or the key forbids the rest, or videos are not finished. ConfigError without a
        key. Every record is valid then, and the same call continues.
        """
        for prompt, _ in requests:
            _check_prompt(prompt)
        missing = self._missing(requests)
        if not missing:
            return
        if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
            # rank 0 has bought: another rank could pay again, or get videos that rank 0 missed
            self._ledger = Ledger(self.folder)
            return
        try:
            key = self.api.key()
        except ConfigError:
            if any(not (record := self._ledger.get(name)) or not record.left_out for name in missing):
                raise
            return
        with self._locked():
            self._ledger = Ledger(self.folder)  # another process may have changed them
            todo = self._missing(requests)
            for name, (prompt, seed) in todo.items():
                if self._ledger.get(name) is None:
                    self._ledger.add(name, Record(prompt, seed))
            for _ in range(len(requests) - len(todo)):
                done()
            with silent_logs():
                buyer = asyncio.run(self._buy(list(todo), key, done))
        self._report(requests, buyer)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / "lock").open("w")
        except OSError as error:
            raise ConfigError(
                f"{self.folder} cannot be written ({error.strerror}): choose another folder for the videos"
            ) from None
        with lock:
            if not take(lock.fileno(), fcntl.LOCK_EX):
                raise TeacherError(f"another process is fetching into {self.folder}: wait for it")
            yield

    async def _buy(self, names: list[str], key: str, done: Callable[[], None]) -> Buyer:
        async with Exchange(self.api, key, self.limits) as exchange:
            check = partial(check_file, frames=self.frames, size=self.size, fps=self.fps)
            buyer = Buyer(self._ledger, exchange, self.pace, self.max_usd, check)
            await buyer.run(names, done)
        return buyer

    def _report(self, requests: Sequence[Request], buyer: Buyer) -> None:
        """TeacherError for what is not finished."""
        parts, total, names = [], len(requests), list(dict.fromkeys(self._id(*request) for request in requests))
        if left := len(buyer.unaffordable):
            need = (self._ledger.spent + left * exact(self.api.usd_per_video)).quantize(Decimal("0.01"), ROUND_UP)
            parts.append(
                f"{self.spent:.2f} of {self.max_usd:.2f} USD are spent and a video costs {self.api.usd_per_video:.2f}: raise max_usd "
                f"to at least {need} for the {left} of {total} videos that were not bought"
            )
        if waiting := [f"{self._ledger[n].title}: {buyer.waiting[n]}" for n in names if n in buyer.waiting]:
            parts.append(
                f"{len(waiting)} of {total} videos are not finished ({_first(waiting)}); nothing is lost: run the same command again"
            )
        rejected = [str(r) for n in names if (r := self._ledger.get(n)) and r.state == "rejected"]
        if rejected and not any(self._has(n) for n in names):
            parts.append(f"{len(rejected)} of {total} requests were rejected ({_first(rejected)})")
        if parts:
            raise TeacherError("; ".join(parts))


def _first(lines: list[str]) -> str:
    """The first few of many lines, as one."""
    return "; ".join(lines[:NAMED]) + ("; ..." if len(lines) > NAMED else "")


def _check_prompt(prompt: str) -> None:
    """ConfigError for a prompt that no API could take."""
    try:
        sound = bool(prompt.strip()) and "\0" not in prompt and bool(prompt.encode())
    except (AttributeError, UnicodeEncodeError):
        sound = False
    if not sound:
        raise ConfigError(f"{prompt!r:.80} is no prompt: it must be text, not empty, without NUL and lone surrogates")


def from_file(path: str | Path, *, frames: int, size: tuple[int, int], fps: float) -> APITeacher:
    """An APITeacher from a JSON file (`Description`). Raises ConfigError for missing, unknown and damaged entries."""
    given = read_description(Path(path))
    try:
        return APITeacher(
            given.api, given.folder, prompts=given.prompts, max_usd=given.max_usd, frames=frames, size=size, fps=fps, **given.pace
        )  # fmt: skip
    except ConfigError as error:
        raise ConfigError(f"{path}: {error} (docs/teachers.md)") from None

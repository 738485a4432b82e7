"""HTTP with a video API: every request ends in bounded time and memory, whatever the server does."""

import asyncio
import contextlib
import functools
import json
import logging
import re
import ssl
import zlib
from collections.abc import AsyncIterator, Awaitable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from afd_fast.errors import extra
from afd_fast.teachers.records import refused_by_disk
from afd_fast.teachers.video_api import VideoAPI, at

with extra("train"):
    import httpx

NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
BROKEN = (httpx.HTTPError, httpx.InvalidURL, OSError, asyncio.TimeoutError, zlib.error, ValueError, OverflowError)
REDIRECTS = 5


@dataclass(frozen=True)
class Limits:
    """Bounds of one exchange, from the connection to the last byte. A list of 100 tasks takes about 0.2 MB, a video of
    5 s a few MB."""

    request_s: float = 60.0
    download_s: float = 900.0
    json_bytes: int = 4 << 20
    video_bytes: int = 2 << 30
    retry_after_s: float = 60.0


@dataclass(frozen=True)
class Answer:
    """What came back. status: 0 without an answer that could be read to its end; content: its body if that is a JSON object;
    text: one line for messages; sent: False if the request certainly never reached the server; wait: seconds it asks for."""

    status: int
    content: dict[str, Any] | None = None
    text: str = ""
    sent: bool = True
    wait: float = 0.0

    @property
    def good(self) -> bool:
        return 200 <= self.status < 300 and self.content is not None

    @property
    def proves_no_task(self) -> bool:
        """Whether a create request with this answer certainly made no task. A 5xx, a redirect, a body that cannot be
        read and a 4xx that a gateway sends after passing the request on do not."""
        return not self.sent or (
            400 <= self.status < 500 and self.content is not None and self.status not in (408, 409, 499)
        )

    @property
    def denied(self) -> bool:
        """Whether every other request would be denied as well: the key, the bill or the rights."""
        return self.status in (401, 402, 403, 407)

    @property
    def passing(self) -> bool:
        """Whether the same request may be answered otherwise soon."""
        return not 400 <= self.status < 500 or self.status in (408, 409, 425, 429, 499)


class Exchange:
    """Requests to one API. Use as an asynchronous context manager."""

    def __init__(self, api: VideoAPI, key: str, limits: Limits):
        self.api, self.limits, self._key = api, limits, key
        self._headers = {"Authorization": api.authorization.replace("{key}", key)}
        self._client = httpx.AsyncClient(
            base_url=api.base_url, headers={"Accept-Encoding": "identity"}, timeout=httpx.Timeout(30, connect=10),
            limits=httpx.Limits(), verify=_certificates(),  # as many connections as there are tasks in flight
        )  # fmt: skip

    async def __aenter__(self) -> "Exchange":
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._client.__aexit__(*error)

    async def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Answer:
        """One JSON request to the API, with the key. Raises nothing."""
        return await self._bounded(self._ask(method, path, body), self.limits.request_s)

    async def download(self, url: str, file: Path) -> Answer:
        """A file from another host, without the key. TeacherError where the disk refuses."""
        return await self._bounded(self._download(url, file), self.limits.download_s)

    async def _bounded(self, request: Awaitable[Answer], seconds: float) -> Answer:
        try:
            return await asyncio.wait_for(request, seconds)
        except BROKEN as error:
            text = f"no answer within {seconds:g} s" if isinstance(error, asyncio.TimeoutError) else _name(error)
            return Answer(0, text=self.clean(text), sent=not isinstance(error, NEVER_SENT))

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> Answer:
        async with self._client.stream(method, path, json=body, headers=self._headers) as answer:
            raw = b"".join([piece async for piece in _pieces(answer, self.limits.json_bytes)])
        try:
            content = json.loads(raw)
        except (ValueError, RecursionError):
            content = None
        content = content if isinstance(content, dict) else None
        code = at(content, self.api.error_field)
        text = f"{answer.status_code} {code}" if isinstance(code, (str, int)) else str(answer.status_code)
        if content is None:
            text += " without a JSON object"
        return Answer(answer.status_code, content, self.clean(text), wait=self._wait(answer))

    async def _download(self, url: str, file: Path) -> Answer:
        for _ in range(REDIRECTS):  # httpx would read the bodies of redirects without a bound
            async with self._client.stream("GET", url) as answer:
                if answer.status_code == 200:
                    await self._store(answer, file)
                found = Answer(
                    answer.status_code, text=f"its host answered {answer.status_code}", wait=self._wait(answer)
                )
                target = usable_url(urljoin(url, answer.headers.get("location", "")))
            if not answer.has_redirect_location or target is None:
                break
            url = target
        return found

    async def _store(self, answer: httpx.Response, file: Path) -> None:
        try:
            with file.open("wb") as target:
                async for piece in _pieces(answer, self.limits.video_bytes):
                    target.write(piece)
        except OSError as error:
            raise refused_by_disk(file, error) from None

    def _wait(self, answer: httpx.Response) -> float:
        text = answer.headers.get("retry-after", "")
        return min(float(text), self.limits.retry_after_s) if re.fullmatch("[0-9]{1,9}", text) else 0.0

    def clean(self, text: str) -> str:
        """One short line without the key and without the queries of URLs, whatever the server wrote."""
        text = " ".join(text.replace(self._key, "***").split())
        text = "".join(c for c in text if c.isprintable())
        return re.sub(r"(https?://[^\s?]*)\?\S*", r"\1", text)[:200]


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Loading them takes a tenth of a second."""
    return httpx.create_ssl_context()


async def _pieces(answer: httpx.Response, most: int) -> AsyncIterator[bytes]:
    """The body, unpacked by at most 1 MiB at a time. ValueError beyond `most` bytes and for one that ends too early."""
    encoding = answer.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "", "gzip", "deflate"):
        raise ValueError("the encoding is not one that was asked for")
    unpacker = zlib.decompressobj(wbits=47) if encoding in ("gzip", "deflate") else None
    total = 0
    async for packed in answer.aiter_raw():
        while packed and not (unpacker and unpacker.eof):
            piece = unpacker.decompress(packed, 1 << 20) if unpacker else packed
            packed = unpacker.unconsumed_tail if unpacker else b""
            total += len(piece)
            if total > most:
                raise ValueError(f"more than {most} bytes")
            yield piece
    if unpacker and not unpacker.eof:
        raise ValueError("the packed body ends too early")


def _name(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def usable_url(value: Any) -> str | None:
    """A URL to download from, or None."""
    if (
        not isinstance(value, str)
        or len(value) > 8192
        or not value.isascii()
        or not value.isprintable()
        or " " in value
    ):
        return None
    try:
        parts = urlsplit(value)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # such as port 99999
        return None
    return value if sound else None


@contextlib.contextmanager
def silent_logs() -> Iterator[None]:
    """httpx logs every URL, signatures included, where the application logs at INFO."""
    loggers = [logging.getLogger(name) for name in ("httpx", "httpcore")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)

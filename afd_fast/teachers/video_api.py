"""The differences between task-style video APIs, as data."""

import json
import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from afd_fast.errors import ConfigError
from afd_fast.files.text import read_json, read_prompts


@dataclass(frozen=True)
class VideoAPI:
    """The names and paths of a provider. The defaults are Seedance's on ModelArk (docs.byteplus.com/en/docs/ModelArk/1520757);
    fields of answers are dotted paths.

    body: of the create request; strings that are "{model}", "{prompt}" or "{seed}" are replaced, `parameters` are merged
    in. list_path: None if tasks cannot be listed; a create request whose answer is lost is then given up. list_lag: seconds
    after which a task is sure to be listed; a shorter time could buy a video twice. key_env,
    key_file: where the key is read from, at the first request; it never enters records, errors or redirects.
    usd_per_video: price of a video, for the budget. ConfigError for values with which a video could be paid for twice
    or not at all.
    """

    base_url: str
    model: str
    usd_per_video: float
    parameters: dict[str, Any] = field(default_factory=lambda: {
        "resolution": "480p", "ratio": "16:9", "duration": 5, "generate_audio": False, "watermark": False
    })  # fmt: skip
    body: dict[str, Any] = field(default_factory=lambda: {
        "model": "{model}", "content": [{"type": "text", "text": "{prompt}"}], "seed": "{seed}"
    })  # fmt: skip
    key_env: str = "ARK_API_KEY"
    key_file: str | None = None
    authorization: str = "Bearer {key}"
    create_path: str = "/contents/generations/tasks"
    task_path: str = "/contents/generations/tasks/{id}"
    list_path: str | None = "/contents/generations/tasks?page_size=100&page_num={page}"
    list_lag: float = 60.0
    id_field: str = "id"
    status_field: str = "status"
    url_field: str = "content.video_url"
    error_field: str = "error.code"
    items_field: str = "items"
    seed_field: str = "seed"
    done: tuple[str, ...] = ("succeeded",)
    failed: tuple[str, ...] = ("failed", "cancelled", "expired")
    refusals: tuple[str, ...] = ("SensitiveContent", "PolicyViolation", "RiskDetection")  # parts of error codes

    def __post_init__(self) -> None:
        check_number("usd_per_video", self.usd_per_video, 0, 1e6)
        check_number("list_lag", self.list_lag, 0, 86_400)
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("done", "failed", "refusals"):
                if isinstance(value, str) or not all(isinstance(word, str) and word for word in value):
                    raise ConfigError(f"{f.name} is {value!r}, expected a list of words")
                object.__setattr__(self, f.name, tuple(value))
            elif f.name in ("parameters", "body"):
                if not isinstance(value, dict):
                    raise ConfigError(f"{f.name} is {value!r}, expected a JSON object")
            elif f.name not in ("usd_per_video", "list_lag") and not (isinstance(value, str) and value):
                if value is not None or f.name not in ("list_path", "key_file"):
                    raise ConfigError(f"{f.name} is {value!r}, expected a string")
        self._check_addresses()
        self._check_request()

    def _check_addresses(self) -> None:
        try:
            url = urlsplit(self.base_url)
            sound = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        except ValueError:
            sound = False
        if not sound or "@" in self.base_url or "?" in self.base_url or not self.base_url.isprintable():
            raise ConfigError(
                "base_url is not a plain http(s) address: give scheme, host and path, without a key in it"
            )
        for name in ("create_path", "task_path", "list_path"):
            path = getattr(self, name)
            if path is not None and not (path.startswith("/") and not path.startswith("//") and path.isprintable()):
                raise ConfigError(f'{name} is {path!r}, expected a path that starts with "/" and follows base_url')
        for name, part in (("task_path", "{id}"), ("authorization", "{key}")):
            if part not in getattr(self, name):
                raise ConfigError(f'{name} lacks "{part}"')  # its value may be the key
        if not self.key_env.isidentifier():
            raise ConfigError("key_env is not the name of an environment variable: store no key in it")

    def _check_request(self) -> None:
        filled = self.request("a prompt\0", -4711)
        for name, value in (("{prompt}", "a prompt\0"), ("{seed}", -4711)):
            if not _holds(filled, value):
                raise ConfigError(
                    f'the create request does not carry "{name}": put it into body, and no parameter in its place '
                    "(a task whose answer is lost is found again by its seed)"
                )
        try:
            json.dumps(filled, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"body and parameters cannot be sent as JSON: {error}") from None

    def key(self) -> str:
        """The API key. Raises ConfigError that names the variable and the file for a missing or damaged key."""
        text = ""
        if self.key_file and Path(self.key_file).is_file():
            try:
                text = Path(self.key_file).read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(
                    f"{self.key_file} cannot be read as an API key ({type(error).__name__}): it must be a text file of one line"
                ) from None
        key = (text or os.environ.get(self.key_env, "")).strip()
        if not key:
            raise ConfigError(
                f"no API key: set {self.key_env}" + (f" or write it to {self.key_file}" if self.key_file else "")
            )
        if not (key.isascii() and key.isprintable()):  # an HTTP header would refuse it in an error that shows it
            source = self.key_file if text else self.key_env
            raise ConfigError(f"the API key in {source} is not one line of printable ASCII: store nothing but the key")
        return key

    def request(self, prompt: str, seed: int) -> dict[str, Any]:
        """The JSON of the create request."""
        values = {"{model}": self.model, "{prompt}": prompt, "{seed}": seed}

        def fill(x: Any) -> Any:
            if isinstance(x, dict):
                return {k: fill(v) for k, v in x.items()}
            return [fill(v) for v in x] if isinstance(x, list) else values.get(x, x) if isinstance(x, str) else x

        return {**fill(self.body), **self.parameters}


def _holds(x: Any, value: Any) -> bool:
    """Whether `value` is somewhere in nested JSON."""
    if isinstance(x, (dict, list)):
        return any(_holds(y, value) for y in (x.values() if isinstance(x, dict) else x))
    return type(x) is type(value) and bool(x == value)


def check_number(name: str, value: Any, least: float, most: float, *, whole: bool = False) -> None:
    """ConfigError unless it is a finite number between the bounds."""
    kinds = (int,) if whole else (int, float)
    if isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value) and least <= value <= most:
        return
    kind = "a whole number" if whole else "a number"
    raise ConfigError(f"{name} is {value!r}, expected {kind} from {least:g} to {most:g}")


def at(answer: Any, path: str) -> Any:
    """answer["a"]["b"] for "a.b"; None if a part is missing."""
    for part in path.split("."):
        answer = answer.get(part) if isinstance(answer, dict) else None
    return answer


@dataclass(frozen=True)
class Description:
    """A teacher as a JSON file describes it (docs/teachers.md).

    api: from the fields of `VideoAPI`. prompts: from a text file next to it with one prompt per line. folder: by default the
    JSON file's name without .json. pace: concurrency, poll and patience of `APITeacher`, where given.
    """

    api: VideoAPI
    prompts: list[str]
    folder: Path
    max_usd: float
    pace: dict[str, Any]


PACE = ("concurrency", "poll", "patience")


def read_description(path: Path) -> Description:
    """A JSON description of a teacher. Raises ConfigError that names the file and the entry to change."""
    given = read_json(path)
    for name in ("base_url", "model", "usd_per_video", "max_usd", "prompts"):
        if name not in given:
            raise ConfigError(f"{path} lacks {name!r} (docs/teachers.md)")
    known = {f.name for f in fields(VideoAPI)}
    if odd := given.keys() - known - {"max_usd", "prompts", "folder", *PACE}:
        raise ConfigError(f"{path}: unknown key {', '.join(sorted(odd))} (docs/teachers.md)")
    for name in ("prompts", "folder"):
        value = given.get(name)
        if not isinstance(value, str) and not (value is None and name == "folder"):
            raise ConfigError(f"{path}: {name} is {value!r}, expected a string (docs/teachers.md)")
    try:
        api = VideoAPI(**{name: value for name, value in given.items() if name in known})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error} (docs/teachers.md)") from None
    folder = path.parent / (given.get("folder") or path.stem)
    pace = {name: given[name] for name in PACE if given.get(name) is not None}
    return Description(api, read_prompts(path.parent / given["prompts"]), folder, given["max_usd"], pace)

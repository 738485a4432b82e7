"""What differs between task-style video APIs, as data."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from afd_fast.errors import ConfigError


@dataclass(frozen=True)
class VideoAPI:
    """How a provider spells things. The defaults are Seedance's on ModelArk (docs.byteplus.com/en/docs/ModelArk/1520757);
    fields of answers are dotted paths.

    body: of the create request; "{model}", "{prompt}" and "{seed}" are replaced wherever they stand alone, `parameters`
    are merged in. list_path: None where tasks cannot be listed; a create whose answer is lost is then given up.
    key_env, key_file: where the key is read from, at the first request; it is kept out of records, errors and redirects.
    usd_per_video: what a video costs, for the budget.
    """

    base_url: str
    model: str
    usd_per_video: float
    parameters: dict = field(default_factory=lambda: {
        "resolution": "480p", "ratio": "16:9", "duration": 5, "generate_audio": False, "watermark": False
    })  # fmt: skip
    body: dict = field(default_factory=lambda: {
        "model": "{model}", "content": [{"type": "text", "text": "{prompt}"}], "seed": "{seed}"
    })  # fmt: skip
    key_env: str = "ARK_API_KEY"
    key_file: str | None = None
    authorization: str = "Bearer {key}"
    create_path: str = "/contents/generations/tasks"
    task_path: str = "/contents/generations/tasks/{id}"
    list_path: str | None = "/contents/generations/tasks?page_size=100&page_num={page}"
    id_field: str = "id"
    status_field: str = "status"
    url_field: str = "content.video_url"
    error_field: str = "error.code"
    items_field: str = "items"
    seed_field: str = "seed"
    done: tuple[str, ...] = ("succeeded",)
    failed: tuple[str, ...] = ("failed", "cancelled", "expired")
    refusals: tuple[str, ...] = ("SensitiveContent", "PolicyViolation", "RiskDetection")  # parts of error codes

    def key(self) -> str:
        """The API key. ConfigError that says where it was looked for."""
        text = Path(self.key_file).read_text() if self.key_file and Path(self.key_file).exists() else ""
        key = (text or os.environ.get(self.key_env, "")).strip()
        if not key:
            raise ConfigError(
                f"no API key: set {self.key_env}" + (f" or write it to {self.key_file}" if self.key_file else "")
            )
        return key

    def request(self, prompt: str, seed: int) -> dict:
        """The create request's JSON."""
        values = {"{model}": self.model, "{prompt}": prompt, "{seed}": seed}

        def fill(x):
            if isinstance(x, dict):
                return {k: fill(v) for k, v in x.items()}
            return [fill(v) for v in x] if isinstance(x, list) else values.get(x, x) if isinstance(x, str) else x

        return {**fill(self.body), **self.parameters}


def at(answer, path: str):
    """answer["a"]["b"] for "a.b"; None where it ends early."""
    for part in path.split("."):
        answer = answer.get(part) if isinstance(answer, dict) else None
    return answer

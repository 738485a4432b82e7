"""A video provider on loopback that misbehaves: by words in the prompt, or by `fault`. What it charges is counted."""

import contextlib
import gzip
import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import torch

from afd_fast.video_io import write_video

KEY = "secret-key-4711"
TASKS = "/api/v3/contents/generations/tasks"
SIGNATURE = "X-Secret-Signature"
BOMB = gzip.compress(bytes(64 << 20), 9)  # 64 MiB in 64 KiB


def mp4(frames: int = 14) -> bytes:
    import io

    buffer = io.BytesIO()
    video = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, frames, 32, 32), dtype=np.uint8))
    write_video(buffer, video, 10)
    return buffer.getvalue()


class Provider(ThreadingHTTPServer):
    """`tasks`: what would be billed. `hits` counts requests by what they ask for. Use as a context manager."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.tasks, self.hits, self.lock, self.file_keys = {}, {}, threading.Lock(), []
        self.good, self.short, self.listed = mp4(), mp4(5), True
        self.script: dict[tuple[str, str], list] = {}
        self.expire = False  # whether a video's URL is only valid until the task is polled again
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/api/v3"

    def fault(self, kind: str, prompt: str):
        """The fault of a request ("create", "task", "list" or "file"): the next one of its script. A name of `misbehave`;
        a function of the usual content; None: no fault. A create fault that starts with "!" makes no task."""
        with self.lock:
            left = self.script.get((kind, prompt))
            return left.pop(0) if left else None

    def count(self, what: str) -> int:
        with self.lock:
            self.hits[what] = self.hits.get(what, 0) + 1
            return self.hits[what]

    def charged(self, prompt: str) -> int:
        """Tasks of the prompt that were not failed by the provider itself."""
        return sum(t["prompt"] == prompt and t.get("status") != "failed" for t in self.tasks.values())

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # else the client has gone
            super().handle_error(request, client_address)

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms for the client's word on the headers

    def log_message(self, *_):
        pass

    def answer(self, status: int, content=None, *, raw: bytes | None = None, headers=(), promise: int = 0):
        body = raw if raw is not None else b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        for header in headers:
            self.send_header(*header)
        self.send_header("Content-Length", str(len(body) + promise))
        self.end_headers()
        self.wfile.write(body)
        if promise:
            self.close_connection = True

    def error(self, status: int, code: str, headers=()):
        self.answer(status, {"error": {"code": code, "message": "..."}}, headers=headers)

    def hang_up(self):
        self.close_connection = True
        self.connection.close()

    def misbehave(self, fault, usual) -> None:
        """Answer in the way of `fault`, with the usual content or without. "503": an error with JSON; "503-": without a
        body; "503<": with HTML."""
        if callable(fault):
            return self.answer(200, fault(usual))
        fault = fault.removeprefix("!")
        raw = usual if isinstance(usual, bytes) else json.dumps(usual).encode()
        page = b"<html>Bad gateway</html>"
        if match := re.fullmatch(r"(\d{3})([-<]?)", fault):
            status, body = int(match[1]), {"": None, "-": b"", "<": page}[match[2]]
            return self.answer(status, raw=body) if body is not None else self.error(status, "InjectedError")
        plain = {
            "empty": b"", "html": page, "deep": b"[" * 100_000, "array": b"[]", "null": b"null", "latin": b'{"a": "\xff"}',
        }  # fmt: skip
        if fault in plain:
            return self.answer(200, raw=plain[fault])
        if fault == "redirect":
            return self.answer(302, raw=raw, headers=[("Location", "/elsewhere")])
        if fault == "round":
            return self.answer(302, headers=[("Location", self.path)])
        if fault == "cut":
            return self.answer(200, raw=raw[: len(raw) // 2], promise=len(raw))
        if fault == "gzip":
            return self.answer(200, raw=raw, headers=[("Content-Encoding", "gzip")])
        if fault == "packed":  # unasked for, but right
            return self.answer(200, raw=gzip.compress(raw), headers=[("Content-Encoding", "gzip")])
        if fault == "bomb":
            return self.answer(200, raw=BOMB, headers=[("Content-Encoding", "gzip")])
        if fault in ("drip", "endless"):
            return self.pour(b" " if fault == "drip" else b" " * 65536, 0.05 if fault == "drip" else 0)
        if fault == "wait":
            return self.error(429, "RateLimitExceeded", [("Retry-After", "86400")])
        if fault == "superscript":
            return self.error(429, "RateLimitExceeded", [("Retry-After", "\u00b2")])
        assert fault == "hangup", fault
        return self.hang_up()

    def pour(self, piece: bytes, pause: float):
        """A body without an end, as long as somebody reads it."""
        self.close_connection = True
        self.send_response(200)
        self.end_headers()
        end = time.monotonic() + 20
        with contextlib.suppress(OSError):
            while time.monotonic() < end:
                self.wfile.write(piece)
                time.sleep(pause)

    def do_POST(self):
        server, size = self.server, int(self.headers["Content-Length"])
        raw = self.rfile.read(size)
        if len(raw) < size:  # the client was killed
            return self.hang_up()
        body = json.loads(raw)
        prompt = body["content"][0]["text"]
        time_asked = server.count(f"create {prompt}")
        if self.headers["Authorization"] != f"Bearer {KEY}":
            return self.error(401, "AuthenticationError")
        if body["generate_audio"] is not False:
            return self.error(400, "AudioRequested")
        if "busy" in prompt and time_asked <= 2:
            return self.error(429, "RateLimitExceeded", [("Retry-After", "0")])
        if "down" in prompt and time_asked == 1:
            return self.error(503, "ServiceUnavailable")
        if "refused at once" in prompt:
            return self.error(400, "InputTextSensitiveContentDetected")
        if "malformed" in prompt:
            return self.error(400, "InvalidParameter")
        fault = server.fault("create", prompt)
        if isinstance(fault, str) and fault.startswith("!"):
            return self.misbehave(fault, {})
        with server.lock:
            name = f"cgt-{len(server.tasks)}"
            server.tasks[name] = {"prompt": prompt, "seed": body["seed"], "polls": 0}
        if fault:
            return self.misbehave(fault, {"id": name})
        if "lost" in prompt and time_asked == 1:
            return self.hang_up()  # made and billed; the answer never arrives
        if "empty" in prompt and time_asked == 1:
            return self.answer(200)
        if "broken gateway" in prompt and time_asked == 1:
            return self.error(502, "BadGateway")
        return self.answer(200, {"id": name})

    def do_GET(self):
        server = self.server
        path, _, query = self.path.partition("?")
        if match := re.fullmatch(rf"{TASKS}/(cgt-\d+)", path):
            return self.task(match[1])
        if path == TASKS:
            return self.list(int(re.search(r"page_num=(\d+)", query)[1]))
        match = re.fullmatch(r"/files/(cgt-\d+)\.mp4", path)
        if match is None:
            return self.error(404, "NotFound")
        name = match[1]
        task, time_asked = server.tasks[name], server.count(f"file {name}")
        prompt = task["prompt"]
        server.file_keys.append(self.headers["Authorization"])
        if fault := server.fault("file", prompt):
            return self.misbehave(fault, server.good)
        if server.expire and query != f"{SIGNATURE}={task['polls']}":
            return self.error(403, "Expired")
        if "cut" in prompt and time_asked == 1:
            return self.answer(200, raw=server.good[:500], promise=len(server.good) - 500)
        if "garbled" in prompt and time_asked == 1:
            return self.answer(200, raw=server.good[: len(server.good) // 2])
        return self.answer(200, raw=server.short if "brief" in prompt else server.good)

    def list(self, page: int):
        rows = list(reversed(list(self.server.tasks.items())))[100 * (page - 1) : 100 * page]
        usual = {"items": [{"id": k, "seed": t["seed"]} for k, t in rows]}
        fault = self.server.fault("list", "")
        return self.misbehave(fault, usual) if fault else self.answer(200, usual)

    def task(self, name: str):
        """The state of a task, as it should be said, and as it is said."""
        task = self.server.tasks.get(name)
        if task is None:
            return self.error(404, "NotFound")
        task["polls"] += 1
        if "shaky" in task["prompt"] and task["polls"] in (1, 2):
            return self.error(500, "InternalServiceError") if task["polls"] == 1 else self.hang_up()
        usual = self.state_of(name, task)
        fault = self.server.fault("task", task["prompt"])
        return self.misbehave(fault, usual) if fault else self.answer(200, usual)

    def state_of(self, name: str, task: dict) -> dict:
        prompt = task["prompt"]
        if "stuck" in prompt or task["polls"] < 3:
            return {"id": name, "status": "running"}
        if "refused later" in prompt:
            return {"status": "failed", "seed": task["seed"], "error": {"code": "OutputVideoSensitiveContentDetected"}}
        if "fails always" in prompt or ("fails" in prompt and self.server.hits[f"create {prompt}"] == 1):
            task["status"] = "failed"
            return {"status": "failed", "seed": task["seed"], "error": {"code": "InternalServiceError"}}
        url = f"{self.server.base_url.removesuffix('/api/v3')}/files/{name}.mp4?{SIGNATURE}={task['polls']}"
        return {"status": "succeeded", "seed": task["seed"], "content": {"video_url": url}, "error": None}

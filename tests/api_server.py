"""A video provider on loopback that misbehaves: faults are words in the prompt, what it charges is counted."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import torch

from afd_fast.video_io import write_video

KEY = "secret-key-4711"
TASKS = "/api/v3/contents/generations/tasks"


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
        self.under_way = self.peak = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/api/v3"

    def count(self, what: str) -> int:
        with self.lock:
            self.hits[what] = self.hits.get(what, 0) + 1
            return self.hits[what]

    def charged(self, prompt: str) -> int:
        """Tasks of the prompt that were not failed by the provider itself."""
        return sum(t["prompt"] == prompt and t.get("status") != "failed" for t in self.tasks.values())

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

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

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
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
        with server.lock:
            name = f"cgt-{len(server.tasks)}"
            server.tasks[name] = {"prompt": prompt, "seed": body["seed"], "polls": 0}
        if "lost" in prompt and time_asked == 1:
            return self.hang_up()  # made and billed; the answer never arrives
        if "empty" in prompt and time_asked == 1:
            return self.answer(200)
        if "broken gateway" in prompt and time_asked == 1:
            return self.error(502, "BadGateway")
        return self.answer(200, {"id": name})

    def do_GET(self):
        server = self.server
        if match := re.fullmatch(rf"{TASKS}/(cgt-\d+)", self.path):
            return self.task(match[1])
        if match := re.fullmatch(rf"{TASKS}\?page_size=100&page_num=(\d+)", self.path):
            first = 100 * (int(match[1]) - 1)
            rows = list(reversed(list(server.tasks.items())))[first : first + 100]
            return self.answer(200, {"items": [{"id": k, "seed": t["seed"]} for k, t in rows]})
        name = re.fullmatch(r"/files/(cgt-\d+)\.mp4", self.path)[1]
        prompt, time_asked = server.tasks[name]["prompt"], server.count(f"file {name}")
        server.file_keys.append(self.headers["Authorization"])
        if "cut" in prompt and time_asked == 1:
            return self.answer(200, raw=server.good[:500], promise=len(server.good) - 500)
        if "garbled" in prompt and time_asked == 1:
            return self.answer(200, raw=server.good[: len(server.good) // 2])
        return self.answer(200, raw=server.short if "brief" in prompt else server.good)

    def task(self, name: str):
        task = self.server.tasks[name]
        task["polls"] += 1
        prompt = task["prompt"]
        if "shaky" in prompt and task["polls"] in (1, 2):
            return self.error(500, "InternalServiceError") if task["polls"] == 1 else self.hang_up()
        if "stuck" in prompt or task["polls"] < 3:
            return self.answer(200, {"id": name, "status": "running"})
        if "refused later" in prompt:
            return self.answer(200, {"status": "failed", "error": {"code": "OutputVideoSensitiveContentDetected"}})
        if "fails always" in prompt or ("fails" in prompt and self.server.hits[f"create {prompt}"] == 1):
            task["status"] = "failed"
            return self.answer(200, {"status": "failed", "error": {"code": "InternalServiceError"}})
        url = f"{self.server.base_url.removesuffix('/api/v3')}/files/{name}.mp4"
        return self.answer(200, {"status": "succeeded", "content": {"video_url": url}, "error": None})

"""A proxy between us and a real server, which spoils what it is told to spoil."""

import json
import threading
import time
from collections import deque
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx


def _other_ids(answer: dict) -> dict:
    "The same numbers under other token ids."
    text = json.dumps(answer["choices"]).replace("token_id:", "token_id:1")
    return {**answer, "choices": json.loads(text)}


class Proxy:
    "What the tests set and read; `url` is given to `load_lm`."

    def __init__(self, upstream: str, port: int):
        self.upstream = upstream  # the address of the server, up to and with /v1
        self.url = f"http://127.0.0.1:{port}/v1"
        self.faults = deque()  # one for each of the next requests for completions
        self.requests = 0  # for completions
        self.refuse_after = None  # so many of them

    def next_fault(self) -> str | None:
        self.requests += 1
        if self.refuse_after is not None and self.requests > self.refuse_after:
            return "refuse"
        return self.faults.popleft() if self.faults else None


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.forward("GET", None)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        fault = None
        if self.path.endswith("/completions"):
            with self.server.lock:
                fault = self.server.proxy.next_fault()
        if fault == "close":
            self.close_connection = True
            return self.connection.close()
        if fault == "busy":
            return self.answer(429, b"busy", {"retry-after": "1"})
        if fault == "broken":
            return self.answer(500, b"oh")
        if fault == "refuse":  # and shows what it was sent
            return self.answer(400, f"no: {self.headers['authorization']}".encode())
        if fault == "slow":
            time.sleep(2)
        return self.forward("POST", body, fault)

    def forward(self, method, body, fault=None):
        base = self.server.proxy.upstream.removesuffix("/v1")
        kept = {"content-type": "application/json"}
        found = httpx.request(method, base + self.path, content=body, headers=kept, timeout=300)
        content = found.content
        if fault == "ids":
            content = json.dumps(_other_ids(found.json())).encode()
        sent = content[: len(content) // 2] if fault == "half" else content
        self.answer(found.status_code, sent, {"content-length": str(len(content))})
        if fault == "half":
            self.close_connection = True
            self.connection.close()

    def answer(self, status, content, headers=None):
        self.send_response(status)
        headers = {"content-length": str(len(content)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *of_no_interest):
        pass

    def finish(self):
        try:
            super().finish()
        except (OSError, ValueError):  # we closed it
            pass


@contextmanager
def proxy_to(upstream: str):
    "A proxy to the server at this address."
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.lock = threading.Lock()
    server.proxy = Proxy(upstream, server.server_port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.proxy
    finally:
        server.shutdown()
        server.server_close()

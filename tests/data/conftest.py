"""A store of shards on 127.0.0.1 that can be as bad as a real one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

Answer = (
    int | str
)  # a status instead of the file, or one of "right", "cut", "broken off", "whole file", "flipped", "stall"


class Server(ThreadingHTTPServer):
    """Serves one folder with byte ranges; `trouble` says how the n-th request (from 0) for a path is answered."""

    daemon_threads, block_on_close = True, False

    def __init__(self, folder: Path, trouble: Callable[[str, int], Answer] = lambda path, n: "right") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.trouble = folder, trouble
        self.requests: list[tuple[str, tuple[int, int] | None]] = []  # path and range, without the manifests'
        self.asked: dict[str, int] = {}
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        path = self.server.folder / self.path.lstrip("/")
        self.send_response(200 if path.exists() else 404)
        self.send_header("Content-Length", str(path.stat().st_size if path.exists() else 0))
        self.end_headers()

    def do_GET(self) -> None:
        path, span = self.server.folder / self.path.lstrip("/"), None
        if wanted := self.headers["Range"]:
            first, last = wanted.removeprefix("bytes=").split("-")
            span = (int(first), int(last) + 1)
        answer: Answer = "right"
        if path.suffix == ".tar":
            place = f"{self.path} {span}"
            self.server.requests.append((self.path, span))
            n = self.server.asked[place] = self.server.asked.get(place, -1) + 1
            answer = self.server.trouble(self.path, n)
        if answer == "stall":
            self.server.closing.wait()
            return
        if not path.exists():
            answer = 404
        elif span and span[0] >= path.stat().st_size:
            answer = 416
        self._send(path, span, answer)

    def _send(self, path: Path, span: tuple[int, int] | None, answer: Answer) -> None:
        content, status = b"", answer
        if isinstance(answer, str):
            content, status = path.read_bytes(), 200
            if span and answer != "whole file":
                content, status = content[slice(*span)], 206
        announced = len(content)
        if answer in ("cut", "broken off"):
            content = content[: len(content) // 2]
        if answer == "cut":
            announced = len(content)
        if answer == "flipped":
            content = bytes([content[0] ^ 1]) + content[1:]
        self.send_response(int(status))
        self.send_header("Content-Length", str(announced))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Start a server of a folder; takes Server's arguments."""
    servers = []

    def start(*args: object, **options: object) -> Server:
        servers.append(Server(*args, **options))
        threading.Thread(target=servers[-1].serve_forever, args=(0.05,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.closing.set()
        server.shutdown()
        server.server_close()

"""What the tests of this room share: toy shards, ways to break them, a store on 127.0.0.1 as bad as a real one."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._utils import ExceptionWrapper

from one4d_pl.data.shards import write_shards
from one4d_pl.data.tar_set import TarSet
from one4d_pl.toy.world import render_clip
from one4d_pl.types import Batch, Sample

# a status instead of the file, or one of "right", "cut", "broken off", "whole file", "flipped", "stall"
Answer = int | str


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


@pytest.fixture(scope="session")
def seven_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven clips in shards of three; not to be changed."""
    path = tmp_path_factory.mktemp("shards") / "set"
    write_shards((render_clip(seed, 17, 16, 32) for seed in range(7)), path, samples_per_shard=3)
    return path


def flip_byte(tars: TarSet, index: int) -> str:
    """Flip one byte in the middle of a sample; returns its key."""
    shard, entry = tars.locate(index)
    path = Path(tars.location) / shard.name
    content = bytearray(path.read_bytes())
    content[entry.offset + entry.size // 2] ^= 1
    path.write_bytes(content)
    return entry.key


def assert_same(actual: Sample | Batch, expected: Sample | Batch, but: tuple[str, ...] = ()) -> None:
    for field in dataclasses.fields(expected):
        a, b = getattr(actual, field.name), getattr(expected, field.name)
        if field.name == "scale":
            a, b = torch.stack([a.scale, a.offset]), torch.stack([b.scale, b.offset])
        if field.name not in but:
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, field.name


def error_here_and_from_worker(read: Callable[[], object], kind: type[Exception]) -> tuple[str, str]:
    """The text of an error, and what is left of it when a loader's worker process hands it over."""
    with pytest.raises(kind) as here:
        read()
    try:
        read()
    except kind:
        sent = ExceptionWrapper(where="in DataLoader worker process 0")  # all that a worker tells of its error
    with pytest.raises(kind) as from_worker:
        sent.reraise()
    return str(here.value), str(from_worker.value)

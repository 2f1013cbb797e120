"""The part of the hub's HTTP interface that uploads and downloads use, on 127.0.0.1, over repositories in memory.

Large files go through git-lfs's batch interface, as a hub asks of every client; a repository is a list of commits, each
a whole tree. Nothing here is of One4D: the real huggingface_hub client speaks to it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_of_the_owner"
LARGE = (".safetensors", ".png", ".bin", ".pth")  # what a hub keeps in git-lfs


@dataclass
class Repository:
    """Branches by name, trees by commit, and who may look."""

    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    trees: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, tree: dict[str, bytes]) -> str:
        """Put a new tree on a branch."""
        sha = hashlib.sha1(f"{branch} {len(self.trees)} {sorted(tree)}".encode()).hexdigest()
        self.trees[sha], self.branches[branch] = tree, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch or commit."""
        return revision if revision in self.trees else self.branches.get(revision)


class Hub(ThreadingHTTPServer):
    """The server and what it holds; `refuse` makes an address fail, `requests` are all that were made."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}  # by sha256
        self.requests: list[str] = []
        self.refuse: str | None = None  # regular expression on "METHOD /path"

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that ends with the block."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join(10)


class Handler(BaseHTTPRequestHandler):
    """One route per request that the client makes."""

    protocol_version = "HTTP/1.1"
    server: Hub
    timeout = 30

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""

    def do_GET(self) -> None:
        self.route()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def route(self) -> None:
        address = urlsplit(self.path)
        path, self.query = unquote(address.path), parse_qs(address.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(f"{self.command} {path}")
        if self.server.refuse and re.search(self.server.refuse, f"{self.command} {path}"):
            return self.answer(403, {"error": "no space left for this account"})
        name = r"(?P<name>[^/]+/[^/]+?)"
        for pattern, handle in (
            (r"POST /api/repos/create", self.create),
            (r"POST /api/validate-yaml", self.validate),
            (rf"POST /api/models/{name}/preupload/(?P<revision>.+)", self.preupload),
            (rf"POST /{name}\.git/info/lfs/objects/batch", self.batch),
            (r"PUT /lfs/(?P<oid>\w+)", self.put),
            (rf"POST /api/models/{name}/commit/(?P<revision>.+)", self.commit),
            (rf"(?P<method>POST|DELETE) /api/models/{name}/branch/(?P<branch>.+)", self.branch),
            (rf"GET /api/models/{name}/tree/(?P<revision>[^/]+)(/.*)?", self.tree),
            (rf"GET /api/models/{name}(/revision/(?P<revision>.+))?", self.info),
            (rf"(GET|HEAD) /{name}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self.resolve),
        ):
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                return handle(**found.groupdict())
        return self.answer(404, {"error": f"no route for {self.command} {path}"})

    # --- reading

    def visible(self, name: str, revision: str | None) -> tuple[Repository, str] | None:
        """The repository and the commit, or None after the answer that a hub gives instead."""
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self.is_owner()):
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif repository.gated and not self.is_owner():
            self.answer(403, {"error": f"Access to {name} is restricted"}, {"X-Error-Code": "GatedRepo"})
        elif (sha := repository.resolve(revision or "main")) is None:
            self.answer(404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})
        else:
            return repository, sha
        return None

    def info(self, name: str, revision: str | None = None) -> None:
        if found := self.visible(name, revision):
            repository, sha = found
            self.answer(200, {"id": name, "modelId": name, "sha": sha, "private": repository.private, "tags": []})

    def tree(self, name: str, revision: str) -> None:
        if found := self.visible(name, revision):
            repository, sha = found
            self.answer(200, [entry(path, content) for path, content in repository.trees[sha].items()])

    def resolve(self, name: str, revision: str, file: str) -> None:
        if not (found := self.visible(name, revision)):
            return
        repository, sha = found
        content = repository.trees[sha].get(file)
        if content is None:
            return self.answer(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        about = entry(file, content)
        etag = about["lfs"]["oid"] if "lfs" in about else about["oid"]
        self.send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "X-Linked-Size": str(len(content))})

    # --- writing

    def is_owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def create(self) -> None:
        wanted = json.loads(self.body)
        if not self.is_owner():
            return self.answer(401, {"error": "Invalid username or password."})
        name = f"{wanted['organization'] or 'me'}/{wanted['name']}"
        address = {"url": f"{self.server.address}/{name}"}
        if name in self.server.repositories:
            return self.answer(409, {"error": "You already created this model repo", **address})
        made = self.server.repositories[name] = Repository(
            private=wanted.get("visibility") == "private" or wanted.get("private") is True
        )
        made.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.answer(200, address)

    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        front = yaml.safe_load(content.split("---\n")[1])
        errors = [] if isinstance(front, dict) and "license" in front else [{"message": "no license"}]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        if found := self.visible(name, revision):
            tree = found[0].trees[found[1]]
            files = []
            for file in json.loads(self.body)["files"]:
                path = file["path"]
                mode = "lfs" if path.endswith(LARGE) else "regular"
                oid = entry(path, tree[path])["oid"] if path in tree else None
                files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self.answer(200, {"files": files})

    def batch(self, name: str) -> None:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.server.address}/lfs/{wanted['oid']}"}}
            there = wanted["oid"] in self.server.large
            objects.append(wanted if there else wanted | {"actions": upload})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.answer(400, {"error": "another sha256"})
        self.server.large[oid] = self.body
        self.answer(200, {})

    def commit(self, name: str, revision: str) -> None:
        repository = self.server.repositories[name]
        if not self.is_owner() or revision not in repository.branches:
            return self.answer(403 if revision in repository.branches else 404, {"error": "not on this branch"})
        tree = dict(repository.trees[repository.branches[revision]])
        for line in map(json.loads, self.body.splitlines()):
            about = line["value"]
            if line["key"] == "file":
                tree[about["path"]] = base64.b64decode(about["content"])
            elif line["key"] == "lfsFile":
                tree[about["path"]] = self.server.large[about["oid"]]
            elif line["key"] == "deletedFile":
                del tree[about["path"]]
        sha = repository.commit(revision, tree)
        self.answer(200, {"commitUrl": f"{self.server.address}/{name}/commit/{sha}", "commitOid": sha})

    def branch(self, method: str, name: str, branch: str) -> None:
        repository = self.server.repositories[name]
        if not self.is_owner():
            return self.answer(403, {"error": "not yours"})
        if method == "DELETE":
            del repository.branches[branch]
        elif branch in repository.branches:
            return self.answer(409, {"error": "Reference already exists"})
        else:
            repository.branches[branch] = repository.branches["main"]
        self.answer(200, {})

    # --- answers

    def answer(self, status: int, tree: object, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(tree).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def entry(path: str, content: bytes) -> dict:
    """What a hub's listing says of a file: git's hash, and that of git-lfs for a large one."""
    sha256 = hashlib.sha256(content).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
    stored = pointer if path.endswith(LARGE) else content
    about = {
        "type": "file",
        "path": path,
        "size": len(content),
        "oid": hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest(),
    }
    return about | (
        {"lfs": {"oid": sha256, "size": len(content), "pointerSize": len(pointer)}} if stored is pointer else {}
    )

"""Laws of captions: what wins, and an endpoint that is slow, rude, broken or gone."""

from __future__ import annotations

import base64
import io
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.captions import CaptionError, CaptionOptions, ask, best_caption, digest_of_table, read_table
from data_prep.write_shards import main
from one4d_pl.data.shards import ShardSet
from one4d_pl.toy.world import render_clip
from one4d_pl.types import Clip

Reply = tuple[int, bytes, dict[str, str]]


def completion(text: object) -> Reply:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode(), {}


@dataclass
class Server:
    """An endpoint that gives the replies in order, then the last one for ever."""

    url: str = ""
    replies: list[Reply] = field(default_factory=lambda: [completion("A toy.")])
    requests: list[tuple[str, dict[str, str], dict]] = field(default_factory=list)
    drip_s: float = 0.0  # between the bytes of an answer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.requests.append((self.path, dict(self.headers), body))
            code, content, headers = state.replies[min(len(state.requests), len(state.replies)) - 1]
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if not state.drip_s:
                self.wfile.write(content)
                return
            for byte in content:
                time.sleep(state.drip_s)
                try:
                    self.wfile.write(bytes([byte]))
                except OSError:  # the other side has had enough
                    return

        def log_message(self, format: str, *args: object) -> None:
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        state.url = f"http://127.0.0.1:{http.server_port}/v1"
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield state
        http.shutdown()
        thread.join()


@pytest.fixture
def rude_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Answers each of two callers with something that is no HTTP."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)

        def answer() -> None:
            for _ in range(2):
                caller, _ = listener.accept()
                with caller:
                    caller.settimeout(20)
                    caller.recv(1 << 20)
                    caller.sendall(b"220 mail.example ESMTP\r\n\r\n")
                    caller.shutdown(socket.SHUT_WR)
                    while caller.recv(1 << 20):
                        pass

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        thread.join(30)


@pytest.fixture(scope="module")
def clip() -> Clip:
    return replace(render_clip(3, 9, 24, 32), caption="")


def options(server: Server, tmp_path: Path, **changes: object) -> CaptionOptions:
    return replace(CaptionOptions(url=server.url, model="vlm", cache=str(tmp_path / "cache")), **changes)


def pauses() -> tuple[list[float], Callable[[float], None]]:
    waited: list[float] = []
    return waited, waited.append


def test_nobody_is_asked_by_default(clip):
    assert best_caption(clip, "unit", CaptionOptions()) == ""
    assert best_caption(replace(clip, caption="own"), "unit", CaptionOptions()) == "own"


def test_a_table_wins_over_the_dataset_and_the_endpoint_comes_last(clip, tmp_path, server):
    rows = ({"key": "a", "caption": "from the table"}, {"key": "scene/of d", "caption": "of its unit"})
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    asked = options(server, tmp_path, table=str(tmp_path / "captions.jsonl"))
    clips = [replace(clip, key=key, caption=own) for key, own in (("a", "own"), ("b", "own"), ("c", ""), ("d", "own"))]
    found = [best_caption(one, f"scene/of {one.key}", asked) for one in clips]
    assert found == ["from the table", "own", "A toy.", "of its unit"]
    assert len(server.requests) == 1


def test_the_endpoint_is_shown_the_first_and_the_last_frame_and_those_between(clip, tmp_path, server):
    assert ask(clip, options(server, tmp_path, frames=3, longest_side=16)) == "A toy."
    (path, headers, body) = server.requests[0]
    assert path == "/v1/chat/completions" and body["model"] == "vlm" and "Authorization" not in headers
    text, *images = body["messages"][0]["content"]
    assert text["type"] == "text" and len(images) == 3
    for image, t in zip(images, (0, 4, 8)):
        content = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))
        with Image.open(io.BytesIO(content)) as picture:
            assert picture.size == (16, 12)
            small = Image.fromarray(clip.frames[t].numpy()).resize((16, 12))
            difference = [abs(a - b) for a, b in zip(picture.tobytes(), small.tobytes())]
        assert sum(difference) / len(difference) < 8


def test_the_key_of_the_environment_is_sent_and_written_nowhere(clip, tmp_path, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    ask(clip, options(server, tmp_path))
    assert server.requests[0][1]["Authorization"] == "Bearer sk-secret"
    assert not any("sk-secret" in path.read_text() for path in (tmp_path / "cache").iterdir())


def test_an_answer_is_asked_for_once(clip, tmp_path, server):
    asked = options(server, tmp_path)
    assert [ask(clip, asked) for _ in range(3)] == ["A toy."] * 3 and len(server.requests) == 1
    ask(replace(clip, frames=clip.frames.flip(0)), asked)
    ask(clip, replace(asked, prompt="Another question"))
    assert len(server.requests) == 3
    (broken, *_) = (tmp_path / "cache").iterdir()
    broken.write_text('{"caption"')
    server.replies = [completion("New.")]
    texts = {
        ask(clip, asked),
        ask(replace(clip, frames=clip.frames.flip(0)), asked),
        ask(clip, replace(asked, prompt="Another question")),
    }
    assert texts == {"A toy.", "New."} and len(server.requests) == 4
    assert not list((tmp_path / "cache").glob(".*"))  # no temporary file is left


def test_a_busy_endpoint_is_asked_again_later_and_later(clip, tmp_path, server):
    busy: Reply = (503, b"busy", {})
    server.replies = [busy, (429, b"", {"Retry-After": "7"}), busy, (200, b"not json", {}), completion("")]
    server.replies.append(completion("  At\nlast. "))
    waited, pause = pauses()
    assert ask(clip, options(server, tmp_path), pause) == "At last."
    assert waited == [1, 7, 4, 8, 16]  # doubled, or as long as the server says


def test_an_endpoint_that_stays_away_ends_in_one_line_that_says_how_to_go_on(clip, tmp_path):
    away = CaptionOptions(url="http://127.0.0.1:9/v1", model="vlm", cache=str(tmp_path), attempts=3)
    waited, pause = pauses()
    with pytest.raises(CaptionError, match=r"no caption after 3 attempts at .*run again to go on") as caught:
        ask(clip, away, pause)
    assert "\n" not in str(caught.value) and len(waited) == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [301, 307, 400, 401, 404])
def test_a_refusal_is_not_tried_again_and_no_redirect_is_followed(clip, tmp_path, server, code):
    server.replies = [(code, b'{"error": "no such\n model"}', {"Location": server.url + "/elsewhere"})]
    with pytest.raises(CaptionError, match=f"refuses: {code}") as caught:
        ask(clip, options(server, tmp_path))
    assert clip.key in str(caught.value) and "\n" not in str(caught.value)
    assert len(server.requests) == 1


def test_a_run_that_was_stopped_goes_on(clip, tmp_path, server):
    clips = [replace(clip, key=str(n), frames=clip.frames.roll(n, 0)) for n in range(3)]
    server.replies = [completion("one"), (400, b"stop", {}), completion("two"), completion("three")]
    with pytest.raises(CaptionError):
        [ask(one, options(server, tmp_path)) for one in clips]
    assert [ask(one, options(server, tmp_path)) for one in clips] == ["one", "two", "three"]
    assert len(server.requests) == 4


def test_an_endpoint_that_speaks_no_http_is_one_line(clip, tmp_path, rude_server):
    waited, pause = pauses()
    asked = CaptionOptions(url=rude_server, model="vlm", cache=str(tmp_path), attempts=2)
    with pytest.raises(CaptionError, match="no caption after 2 attempts") as caught:
        ask(clip, asked, pause)
    assert "\n" not in str(caught.value) and waited == [1]


def test_an_endpoint_that_drips_its_answer_is_given_up(clip, tmp_path, server):
    server.drip_s = 0.05  # every byte comes in time, the whole takes a minute
    server.replies = [completion("word " * 250)]
    started = time.monotonic()
    with pytest.raises(CaptionError, match=r"no whole answer within 0\.3 s"):
        ask(clip, options(server, tmp_path, attempts=1, timeout_s=0.3))
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("key", ["sk-sec\nret", "sk-secrét"])
def test_a_key_that_cannot_be_sent_is_told_without_being_shown(clip, tmp_path, server, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(CaptionError, match="OPENAI_API_KEY of the environment is no API key") as caught:
        ask(clip, options(server, tmp_path))
    assert "sk-" not in str(caught.value) and not server.requests
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")  # as `cat key.txt` gives it
    ask(clip, options(server, tmp_path))
    assert server.requests[0][1]["Authorization"] == "Bearer sk-secret"


def test_a_table_that_changes_during_a_run_is_refused(clip, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("key,caption\na,b\n")
    begun = CaptionOptions(table=str(path), table_digest=digest_of_table(read_table(path)))
    path.write_text("key,caption\na,c\n")
    with pytest.raises(CaptionError, match=r"t\.csv: was changed"):
        best_caption(clip, "", begun)


# --- through the writer


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three generic clips: the dataset has a caption for the first two."""
    root = tmp_path_factory.mktemp("captions") / "root"
    for n, own in enumerate(("own", "own", "")):
        folder = root / f"scene{n}"
        folder.mkdir(parents=True)
        shown = render_clip(n, 9, 32, 48)
        for name in ("frames", "depth", "intrinsics", "cam2world"):
            np.save(folder / f"{name}.npy", getattr(shown, name).numpy())
        (folder / "clip.json").write_text(json.dumps({"fps": 12, "licence": "CC0-1.0", "caption": own}))
    return root


def write(dataset: Path, out: Path, *more: str) -> int:
    size = ["--num-frames", "9", "--height", "16", "--width", "32"]
    return main(["--source", "generic", "--root", str(dataset), "--out", str(out), *size, *more])


def captions_of(folder: Path) -> dict[str, str]:
    shards = ShardSet.open(folder)
    clips = [shards.read(n) for n in range(len(shards))]
    return {one.key: one.caption for one in clips}


def test_the_writer_asks_nobody_by_default(dataset, tmp_path, server):
    assert write(dataset, tmp_path / "out") == 0
    assert list(captions_of(tmp_path / "out").values()) == ["own", "own", ""] and not server.requests
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert not {"captions", "caption_model"} & set(ShardSet.open(tmp_path / "out").manifest.recipe)


def test_the_writer_takes_the_table_then_the_datasets_own_then_the_endpoints(dataset, tmp_path, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    table = tmp_path / "t.csv"
    table.write_text("\ufeffkey,caption\nscene0-00000,from the table\n", encoding="utf-8")
    asked = ["--captions", str(table), "--caption-url", server.url, "--caption-model", "vlm"]
    assert write(dataset, tmp_path / "out", *asked) == 0
    expected = {"scene0-00000": "from the table", "scene1-00000": "own", "scene2-00000": "A toy."}
    assert captions_of(tmp_path / "out") == expected
    assert len(server.requests) == 1 and len(list((tmp_path / "out.captions").iterdir())) == 1
    recipe = ShardSet.open(tmp_path / "out").manifest.recipe
    assert recipe["captions"] == digest_of_table(read_table(table)) and recipe["caption_model"] == "vlm"
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"sk-secret" in content for content in written)
    # the cache stands beside the folder: written anew, nobody is asked again
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    shutil.rmtree(tmp_path / "out")
    assert write(dataset, tmp_path / "out", *asked) == 0 and len(server.requests) == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_the_writer_goes_on_where_the_endpoint_failed_and_holds_other_captions_apart(dataset, tmp_path, server, capsys):
    server.replies = [(400, b"no credit", {}), completion("two")]
    asked = ["--caption-url", server.url, "--caption-model", "vlm"]
    assert write(dataset, tmp_path / "out", *asked) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: scene2-00000: ") and "400 no credit" in error
    staged = {path.name for path in (tmp_path / "out/.staging").glob("unit-???????.json")}
    assert staged == {"unit-0000000.json", "unit-0000001.json"}
    assert write(dataset, tmp_path / "out", *asked) == 0
    assert captions_of(tmp_path / "out")["scene2-00000"] == "two" and len(server.requests) == 2
    (tmp_path / "t.jsonl").write_text('{"key": "scene2", "caption": "other"}\n')
    assert write(dataset, tmp_path / "out", "--captions", str(tmp_path / "t.jsonl")) == 2
    assert "already holds shards of other settings" in capsys.readouterr().err
    assert write(dataset, tmp_path / "out", "--caption-url", server.url) == 2
    assert "--caption-url and --caption-model go together" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("t.csv", "key,text\na,b\n", "row 1: has no key and caption"),
        ("t.csv", "key,caption\na,b\na,c\n", "row 2: 'a' occurs twice"),
        ("t.jsonl", '{"key": "a", "caption": "b"}\n{"key": 3}\n', "row 2: has no key"),
        ("t.jsonl", '{"key": "a", "caption": "b"}\n\n{"key": "c"\n', "row 2: Expecting"),
        ("t.jsonl", "[" * 100_000, "t.jsonl"),
        ("t.jsonl", '{"key"', "t.jsonl"),
    ],
)
def test_a_broken_table_is_named(tmp_path, name, text, reason):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_table(tmp_path / name)


def test_a_csv_table(tmp_path):
    (tmp_path / "t.csv").write_text('key,caption\na,"one, two"\nb,drei ü\n', encoding="utf-8")
    assert read_table(tmp_path / "t.csv") == {"a": "one, two", "b": "drei ü"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"url": "http://x"}, "url, model and cache"),
        ({"url": "http://x", "model": "m"}, "url, model and cache"),
        ({"url": "file:///etc/passwd", "model": "m", "cache": "c"}, "need http:// or https://"),
        ({"frames": 0}, "must be positive"),
    ],
)
def test_impossible_options_are_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        CaptionOptions(**changes)

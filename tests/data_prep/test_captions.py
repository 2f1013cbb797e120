"""Laws of captions: what wins, and an endpoint that is slow, rude, broken or gone."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from data_prep.captions import CaptionError, CaptionOptions, ask, read_table, with_captions
from one4d_pl.data.toy_world import render_clip
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
            self.wfile.write(content)

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


@pytest.fixture(scope="module")
def clip() -> Clip:
    return replace(render_clip(3, 9, 24, 32), caption="")


def options(server: Server, tmp_path: Path, **changes: object) -> CaptionOptions:
    return replace(CaptionOptions(url=server.url, model="vlm", cache=str(tmp_path / "cache")), **changes)


def pauses() -> tuple[list[float], Callable[[float], None]]:
    waited: list[float] = []
    return waited, waited.append


def test_nobody_is_asked_by_default(clip):
    assert [c.caption for c in with_captions([clip, replace(clip, caption="own")], CaptionOptions())] == ["", "own"]


def test_a_table_wins_over_the_dataset_and_the_endpoint_comes_last(clip, tmp_path, server):
    (tmp_path / "captions.jsonl").write_text('{"key": "a", "caption": "from the table"}\n')
    clips = [replace(clip, key=key, caption=caption) for key, caption in (("a", "own"), ("b", "own"), ("c", ""))]
    found = with_captions(clips, options(server, tmp_path, table=str(tmp_path / "captions.jsonl")))
    assert [c.caption for c in found] == ["from the table", "own", "A toy."]
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
        list(with_captions(clips, options(server, tmp_path)))
    assert [c.caption for c in with_captions(clips, options(server, tmp_path))] == ["one", "two", "three"]
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("t.csv", "key,text\na,b\n", "row 1 has no key and caption"),
        ("t.csv", "key,caption\na,b\na,c\n", "row 2: 'a' occurs twice"),
        ("t.jsonl", '{"key": "a", "caption": "b"}\n{"key": 3}\n', "row 2 has no key"),
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

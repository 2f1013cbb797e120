"""Captions for clips whose dataset has none: from a table or an OpenAI-compatible endpoint.

1. A table (csv with the columns key and caption, or jsonl with those fields) wins over the dataset's own caption. A key
   is that of a clip, or of a unit for all clips of the unit.
2. Where there is still none, and only if a url and a model are given, some frames are sent to `<url>/chat/completions`.
3. Every answer is a small file in the cache folder, named by a hash of the request: a second run asks nothing twice,
   and a run that was stopped goes on where it was.
"""

from __future__ import annotations

import base64
import csv
import functools
import hashlib
import http.client
import io
import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

import torch
from PIL import Image

from one4d_pl.data.texts import caption_text, is_missing
from one4d_pl.errors import UserError, fault_of
from one4d_pl.files import read_text, write_text
from one4d_pl.geometry.camera import resize_frames
from one4d_pl.types import Clip

PROMPT = (
    "These are frames of one video, in order. Describe it in two or three plain sentences: what is seen and where, "
    "how things move, and how the camera moves. Do not mention frames, images or a video."
)
RETRY_STATUSES = {408, 409, 425, 429, 500, 502, 503, 504}
MAX_PAUSE_S = 60.0
MAX_ANSWER_BYTES = 1 << 20
MAX_CAPTION = 2000  # characters; the text encoder sees 512 tokens

logger = logging.getLogger(__name__)


class CaptionError(UserError):
    """Captions cannot be had; the answers so far are kept in the cache."""


@dataclass(frozen=True)
class CaptionOptions:
    """The sources of captions; by default the dataset alone."""

    table: str | None = None  # csv or jsonl
    table_digest: str | None = None  # see digest_of_table; a table that changes during a run is refused
    url: str | None = None  # base of an OpenAI-compatible API, e.g. http://localhost:8000/v1; None = ask nobody
    model: str | None = None  # the endpoint's name for it
    cache: str | None = None  # folder of answers
    key_variable: str = "OPENAI_API_KEY"  # environment variable of the API key; a local server may need none
    prompt: str = PROMPT
    frames: int = 4  # evenly spaced, the first and the last among them
    longest_side: int = 512  # pixels of a frame as it is sent
    attempts: int = 6  # per clip
    first_pause_s: float = 1.0  # doubled after every failure
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        if (self.url is None) != (self.model is None) or (self.url is not None and self.cache is None):
            raise ValueError("captions: url, model and cache (a folder for the answers) go together")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"captions.url: {self.url!r}, need http:// or https://")
        if min(self.frames, self.longest_side, self.attempts) < 1 or self.timeout_s <= 0 or self.first_pause_s < 0:
            raise ValueError("captions: frames, longest_side, attempts and timeout_s must be positive")


def best_caption(clip: Clip, unit: str, options: CaptionOptions) -> str:
    """Take the table's caption, else the dataset's own, else the endpoint's; CaptionError if that keeps failing."""
    table = _load_table(Path(options.table), options.table_digest) if options.table else {}
    caption = table.get(clip.key, table.get(unit, clip.caption)).strip()
    return ask(clip, options) if not caption and options.url is not None else caption


def digest_of_table(table: Mapping[str, str]) -> str:
    """Hash a table's captions, whatever the order of its rows."""
    return hashlib.sha256(json.dumps(sorted(table.items())).encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=1)  # a process of the writer uses one table for thousands of units
def _load_table(path: Path, digest: str | None) -> dict[str, str]:
    table = read_table(path)
    if digest not in (None, digest_of_table(table)):
        raise CaptionError(f"{path}: was changed while it was in use; start again, into another folder")
    return table


def read_table(path: Path) -> dict[str, str]:  # key of a clip or unit -> caption
    """Read captions from a csv (columns key and caption) or jsonl file.

    A row whose caption is null, NaN or empty (see `data.texts`) is skipped. UserError names a row that is wrong.
    """
    found: dict[str, str] = {}
    seen: set[str] = set()
    number, lines = 1, io.StringIO(read_text(path), newline="")
    try:
        is_csv = path.suffix.lower() == ".csv"
        for row in csv.DictReader(lines) if is_csv else (json.loads(line) for line in lines if line.strip()):
            if not isinstance(row, dict) or "caption" not in row or not isinstance(row.get("key"), str):
                raise ValueError("has no key and caption")
            if row["key"] in seen:
                raise ValueError(f"{row['key']!r} occurs twice")
            seen.add(row["key"])
            if caption := caption_text(row["caption"]):
                found[row["key"]] = caption
            number += 1
    except (ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"{path}: row {number}: {fault_of(path, error)}") from error
    return found


def ask(clip: Clip, options: CaptionOptions, pause: Callable[[float], None] = time.sleep) -> str:
    """Get a clip's caption from the cache or the endpoint; CaptionError names a clip for which it fails."""
    assert options.url is not None and options.cache is not None  # CaptionOptions checks it
    request = json.dumps(_request_body(clip, options)).encode()
    # Named by the request, not by the url: another port of the same model gives the same caption.
    path = Path(options.cache) / f"{hashlib.sha256(request).hexdigest()}.json"
    if path.is_file() and (caption := _cached(path)):
        return caption
    headers, wait = _headers(options), options.first_pause_s
    for attempt in range(1, options.attempts + 1):
        try:
            caption = _answer_text(_post(options.url, request, headers, options.timeout_s))
        except urllib.error.HTTPError as error:
            if error.code not in RETRY_STATUSES:
                raise CaptionError(f"{clip.key}: {options.url} refuses: {error.code} {_detail(error)}") from error
            reason, server_wait = f"{error.code} {error.reason}", _retry_after(error.headers)
        except (OSError, ValueError, http.client.HTTPException) as error:  # no connection, time-out, no answer
            reason, server_wait = str(error) or type(error).__name__, 0.0
        else:
            record = {"key": clip.key, "model": options.model, "caption": caption}
            write_text(path, json.dumps(record, ensure_ascii=False))
            return caption
        if attempt < options.attempts:
            logger.info("caption of %s: attempt %d failed (%s)", clip.key, attempt, " ".join(reason.split()))
            pause(min(max(wait, server_wait), MAX_PAUSE_S))
            wait *= 2
    raise CaptionError(
        f"{clip.key}: no caption after {options.attempts} attempts at {options.url} ({' '.join(reason.split())}); "
        f"run again to go on, the answers so far are in {options.cache}"
    )


def _request_body(clip: Clip, options: CaptionOptions) -> dict[str, object]:
    chosen = torch.linspace(0, clip.num_frames - 1, min(options.frames, clip.num_frames)).round().long()
    frames = clip.frames[chosen]
    shrink = options.longest_side / max(frames.shape[1:3])
    if shrink < 1:
        height, width = (max(1, int(side * shrink)) for side in frames.shape[1:3])
        frames = resize_frames(frames, height, width)
    content: list[dict[str, object]] = [{"type": "text", "text": options.prompt}]
    for frame in frames:
        buffer = io.BytesIO()
        Image.fromarray(frame.numpy()).save(buffer, "JPEG", quality=90)
        url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
        content.append({"type": "image_url", "image_url": {"url": url}})
    messages = [{"role": "user", "content": content}]
    return {"model": options.model, "messages": messages, "temperature": 0, "max_tokens": 300}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuse redirects, which would carry the API key to another host."""

    def redirect_request(
        self, req: urllib.request.Request, fp: object, code: int, msg: str, headers: object, newurl: str
    ) -> None:
        return None


def _headers(options: CaptionOptions) -> dict[str, str]:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(options.key_variable, "").strip():
        if not (key.isascii() and key.isprintable()):  # http.client's own error would print the key
            raise CaptionError(f"{options.key_variable} of the environment is no API key: need printable ASCII")
        headers["Authorization"] = f"Bearer {key}"
    return headers


def _post(url: str, content: bytes, headers: dict[str, str], timeout_s: float) -> bytes:
    """Post the request, return the answer; ValueError beyond MAX_ANSWER_BYTES, TimeoutError at 2 x the time-out."""
    url = f"{url.rstrip('/')}/chat/completions"
    request = urllib.request.Request(url, content, headers, method="POST")
    deadline = time.monotonic() + timeout_s
    body = b""
    # The time-out applies to every read alone; a server that sends byte by byte needs the deadline.
    with urllib.request.build_opener(_NoRedirect()).open(request, timeout=timeout_s) as answer:
        while chunk := answer.read1(1 << 16):
            body += chunk
            if len(body) > MAX_ANSWER_BYTES:
                raise ValueError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError(f"no whole answer within {timeout_s:g} s")
    return body


def _answer_text(body: bytes) -> str:
    """Return the text of the first choice on one line; ValueError where there is none."""
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise ValueError(f"no chat completion: {body[:100]!r}") from error
    caption = " ".join(text.split())[:MAX_CAPTION] if isinstance(text, str) and not is_missing(text) else ""
    if not caption:
        raise ValueError("an empty caption")
    return caption


def _detail(error: urllib.error.HTTPError) -> str:
    try:
        text = error.read(300).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        text = ""
    return " ".join(text.split()) or str(error.reason)


def _retry_after(headers: Message | None) -> float:
    """Return the seconds that the server asks to wait; 0 where it gives none, or a date."""
    text = (headers.get("Retry-After") if headers else None) or ""
    return float(text) if text.isascii() and text.isdigit() and len(text) < 7 else 0.0


def _cached(path: Path) -> str:
    """Read the caption of a cache file; "" for a broken file, so that it is asked for again."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return ""
    caption = tree.get("caption") if isinstance(tree, dict) else None
    return caption if isinstance(caption, str) and not is_missing(caption) else ""

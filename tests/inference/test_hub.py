"""Adapters on a hub: the real client against a server on 127.0.0.1, there and back, revisions, offline, refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from one4d_pl.commands import generate
from one4d_pl.config import DEMO_ADAPTERS, EMBEDDED_BASE, base_folder
from one4d_pl.errors import UserError
from one4d_pl.inference import hub as hub_module
from one4d_pl.inference.pipeline import One4DPipeline
from one4d_pl.models.adapters import ADAPTER_FILES, CARD, adapter_tensors
from tests.conftest import REPO
from tests.inference.hub_server import TOKEN, Hub, Repository, running_hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the client of this process asks, with an empty cache and nobody logged in."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with running_hub() as server:
        # the client reads its settings from the environment only once, when it is imported
        settings = {
            "ENDPOINT": server.address,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_TOKEN_PATH": str(tmp_path / "token"),
        }
        for name, value in settings.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        yield server


@pytest.fixture(scope="module")
def pipeline() -> One4DPipeline:
    return One4DPipeline.from_pretrained()


def scene_of(pipeline: One4DPipeline) -> tuple[torch.Tensor, torch.Tensor]:
    made = pipeline("a ball", num_frames=5, steps=1, guidance_scale=1, generator=torch.Generator().manual_seed(3))
    return made.frames, made.pointmap


def equal(first: One4DPipeline, second: One4DPipeline) -> bool:
    a, b = first.transformer.state_dict(), second.transformer.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def another(pipeline: One4DPipeline) -> One4DPipeline:
    """The same with other weights."""
    other = One4DPipeline.from_pretrained()
    with torch.no_grad():
        for tensors in adapter_tensors(other.transformer).values():
            for tensor in tensors.values():
                tensor.add_(0.01)
    assert not equal(other, pipeline)
    return other


def tree(hub: Hub, name: str, branch: str = "main") -> dict[str, bytes]:
    repository = hub.repositories[name]
    return repository.trees[repository.branches[branch]]


def stored(folder: Path, prefix: str = "") -> dict[str, bytes]:
    """The files of a folder as a repository holds them."""
    return {f"{prefix}{p.relative_to(folder)}": p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def put(hub: Hub, name: str, files: dict[str, bytes], **access: bool) -> None:
    hub.repositories[name] = Repository(**access)
    hub.repositories[name].commit("main", files)


def demo(**card: object) -> dict[str, bytes]:
    """The demo adapters with another card."""
    files = stored(DEMO_ADAPTERS)
    return files | {CARD: json.dumps(json.loads(files[CARD]) | card).encode()}


def one_line(call, *arguments, **named) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **named)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


# --- there and back


def test_what_is_pushed_opens_elsewhere_and_makes_the_same_scene_to_the_bit(hub, pipeline, tmp_path, monkeypatch):
    made = pipeline("a ball", num_frames=5, steps=1, guidance_scale=1)
    metrics = {"toy (one4d)": {"abs_rel": 0.125, "delta_1": 0.5}}
    address = pipeline.push_to_hub("me/mine", token=TOKEN, licence="cc0-1.0", metrics=metrics, sample=made)
    assert address == f"{hub.address}/me/mine/commit/{hub.repositories['me/mine'].branches['main']}"
    assert not hub.repositories["me/mine"].private

    files = tree(hub, "me/mine")
    (tmp_path / "README.md").write_bytes(files["README.md"])
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.license, card.data.get("base_model")) == ("one4d_pl", "cc0-1.0", None)
    licences = {source["licence"] for source in pipeline.card.data_sources}
    assert {"one4d", *(f"training-data:{tag.lower()}" for tag in licences)} <= set(card.data.tags)
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found == {("toy (one4d)", "abs_rel"): 0.125, ("toy (one4d)", "delta_1"): 0.5}
    assert 'from_pretrained("me/mine")' in card.text and "(sample.png)" in card.text
    (tmp_path / "sample.png").write_bytes(files["sample.png"])
    with Image.open(tmp_path / "sample.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 100

    hub.requests.clear()
    again = One4DPipeline.from_pretrained("me/mine")
    assert equal(again, pipeline) and again.card == pipeline.card
    for ours, theirs in zip(scene_of(pipeline), scene_of(again), strict=True):
        assert torch.equal(ours, theirs)
    fetched = {request.split("/resolve/")[1].split("/", 1)[1] for request in hub.requests if "/resolve/" in request}
    assert fetched == set(files) & set(ADAPTER_FILES)
    assert equal(One4DPipeline.from_pretrained(None, "me/mine"), pipeline)
    assert equal(One4DPipeline.from_pretrained(EMBEDDED_BASE, "me/mine"), pipeline)


def test_a_revision_is_a_branch_or_a_commit_and_main_stays(hub, pipeline):
    pipeline.push_to_hub("me/mine", token=TOKEN)
    first, other = hub.repositories["me/mine"].branches["main"], another(pipeline)
    other.push_to_hub("me/mine", token=TOKEN, revision="v2")
    assert 'from_pretrained("me/mine@v2")' in tree(hub, "me/mine", "v2")["README.md"].decode()
    assert equal(One4DPipeline.from_pretrained("me/mine"), pipeline)
    assert equal(One4DPipeline.from_pretrained("me/mine", revision="v2"), other)
    assert equal(One4DPipeline.from_pretrained(adapters="me/mine@v2"), other)
    other.push_to_hub("me/mine", token=TOKEN)
    assert equal(One4DPipeline.from_pretrained("me/mine"), other)
    assert equal(One4DPipeline.from_pretrained("me/mine", revision=first), pipeline)
    assert "me/mine@v3: no such revision" in one_line(One4DPipeline.from_pretrained, "me/mine", revision="v3")
    assert "give one of them" in one_line(One4DPipeline.from_pretrained, "me/mine@v2", revision="main")
    assert "revision: v2, but" in one_line(One4DPipeline.from_pretrained, adapters=DEMO_ADAPTERS, revision="v2")


def test_a_base_is_found_in_the_repository_and_on_the_hub_and_no_pickle_is_asked_for(hub, pipeline, tmp_path):
    base = tmp_path / "own"
    shutil.copytree(base_folder(EMBEDDED_BASE), base)
    ours = One4DPipeline.from_pretrained(str(base))
    ours.card = replace(pipeline.card, base_path=str(base))
    said = one_line(ours.push_to_hub, "me/mine", token=TOKEN)
    assert said.startswith(f"base: {base} is a folder of this machine") and not hub.repositories

    ours.push_to_hub("me/along", token=TOKEN, base="./base")
    unwanted = ("vae/diffusion_pytorch_model.bin", "transformer/model.py", "text_encoder/model.pth", "tokenizer/x.pkl")
    tree(hub, "me/along").update({f"base/{name}": b"." for name in unwanted})
    put(hub, "me/wan", stored(base) | dict.fromkeys(unwanted, b"."))
    ours.push_to_hub("me/apart", token=TOKEN, base="me/wan")
    front = tree(hub, "me/apart")["README.md"].decode()
    assert "base_model: me/wan\n" in front and str(base) not in front
    for name in ("me/along", "me/apart"):
        opened = One4DPipeline.from_pretrained(name)
        assert equal(opened, pipeline)
        for first, second in zip(scene_of(pipeline), scene_of(opened), strict=True):
            assert torch.equal(first, second)
    assert equal(One4DPipeline.from_pretrained("me/wan", "me/along"), pipeline)
    assert {request.rpartition(".")[2] for request in hub.requests if "/resolve/" in request} == {"json", "safetensors"}
    # what came with its base goes with it
    One4DPipeline.from_pretrained("me/along").push_to_hub("me/copy", token=TOKEN)
    copied = {name: content for name, content in tree(hub, "me/copy").items() if name.startswith("base/")}
    assert copied == {k: v for k, v in tree(hub, "me/along").items() if k.startswith("base/") and v != b"."}

    # a downloaded repository is a folder like any other
    for name, content in tree(hub, "me/copy").items():
        (tmp_path / "local" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "local" / name).write_bytes(content)
    assert equal(One4DPipeline.from_pretrained(str(tmp_path / "local")), pipeline)


def test_the_newer_adapter_replaces_the_older_one_whole(hub, pipeline):
    put(hub, "me/mine", {"coupled.safetensors": b"older", "base/model_index.json": b"{}", "notes.txt": b"mine"})
    pipeline.push_to_hub("me/mine", token=TOKEN)
    files = tree(hub, "me/mine")
    assert "coupled.safetensors" not in files and not any(name.startswith("base/") for name in files)
    assert files["notes.txt"] == b"mine"
    assert equal(One4DPipeline.from_pretrained("me/mine"), pipeline)


# --- the cache


def test_offline_takes_the_cache_and_says_what_it_lacks(hub, pipeline, refusal, tmp_path, monkeypatch):
    put(hub, "me/wan", stored(base_folder(EMBEDDED_BASE)))
    put(hub, "me/mine", demo(base_path="me/wan"))

    def offline(value: bool) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", value)

    offline(True)
    said = one_line(One4DPipeline.from_pretrained, "me/mine")
    assert said == "me/mine: card.json: not in the local cache, and HF_HUB_OFFLINE keeps from asking the hub; unset it"
    words = ("--adapters", "me/mine", "--prompt", "a ball", "--out", tmp_path / "scene")
    assert refusal(generate.main, *words) == f"error: {said}" and not (tmp_path / "scene").exists()
    assert "HF_HUB_OFFLINE" in one_line(pipeline.push_to_hub, "me/mine", token=TOKEN)
    offline(False)
    assert equal(One4DPipeline.from_pretrained("me/mine"), pipeline)
    hub.requests.clear()
    offline(True)
    assert equal(One4DPipeline.from_pretrained("me/mine"), pipeline)
    assert equal(One4DPipeline.from_pretrained("me/mine", revision="main"), pipeline)
    assert not hub.requests
    (lost,) = (tmp_path / "cache").glob("models--me--wan/snapshots/*/vae/*.safetensors")
    lost.unlink()
    said = one_line(One4DPipeline.from_pretrained, "me/mine")
    assert said.startswith("me/wan: incomplete in the local cache (") and "vae lacks its safetensors), and HF_" in said
    offline(False)
    assert equal(One4DPipeline.from_pretrained("me/mine"), pipeline)


def test_the_command_reads_the_clients_own_variables(hub, pipeline, tmp_path):
    put(hub, "me/mine", demo(), private=True)
    environment = {
        **os.environ, "PYTHONPATH": str(REPO), "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip

    def run(name: str, out: str, **more: str) -> subprocess.CompletedProcess:
        words = ["--adapters", name, "--prompt", "a ball", "--num-frames", "5", "--steps", "1", "--out", out]
        return subprocess.run(
            [sys.executable, "-m", "one4d_pl", "generate", *words],
            cwd=tmp_path, env=environment | more, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    first = run("me/mine@main", "a")
    assert first.returncode == 0, first.stderr
    second = run("me/mine@main", "b", HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert second.returncode == 0, second.stderr
    assert (tmp_path / "a/depth.npy").read_bytes() == (tmp_path / "b/depth.npy").read_bytes()


# --- refusals


def test_the_command_refuses_in_one_line(hub, capsys, tmp_path, monkeypatch):
    put(hub, "me/gated", demo(), gated=True)
    put(hub, "me/private", demo(), private=True)
    put(hub, "me/empty", {"README.md": b""})
    put(hub, "me/half", {k: v for k, v in demo().items() if k != "rgb/adapter_model.safetensors"})
    put(hub, "me/wan_own", {"Wan2.1_VAE.pth": b"", "config.json": b"{}"})
    put(hub, "me/on_wan_own", demo(base_path="me/wan_own"))
    put(hub, "me/lacking", {k: v for k, v in stored(base_folder(EMBEDDED_BASE)).items() if not k.startswith("vae/")})
    for option, name, words in (
        ("--adapters", "me/none", "me/none: no folder, and no repository of the hub that you may see"),
        ("--adapters", "me/private", "if it is private, log in with `hf auth login` or set HF_TOKEN"),
        ("--adapters", "me/gated", f"me/gated: gated: ask for access at {hub.address}/me/gated"),
        ("--adapters", "me/gated@v7", f"me/gated@v7: gated: ask for access at {hub.address}/me/gated,"),
        ("--adapters", "me/empty", "me/empty: holds no adapter of one4d_pl (no card.json)"),
        ("--adapters", "me/empty@v7", "me/empty@v7: no such revision"),
        ("--adapters", "me/half", "me/half: incomplete, no rgb/adapter_model.safetensors"),
        ("--adapters", "me/a--b", "me/a--b: no folder, and no name of the hub"),
        ("--adapters", "me/on_wan_own", "`one4d fetch-weights me/wan_own --to FOLDER --run`"),
        ("--base", "me/none", "me/none: no folder, and no repository of the hub"),
        ("--base", "me/gated", "me/gated: gated"),
        ("--base", "me/lacking", "me/lacking: incomplete, "),
    ):
        # no adapter beside --base: the demo's are not meant
        given = [option, name] if option == "--adapters" else [option, name, "--adapters", DEMO_ADAPTERS]
        assert generate.main(["--prompt", "x", "--out", str(tmp_path / "scene"), *map(str, given)]) == 2
        said = capsys.readouterr().err.splitlines()  # bars of what was fetched among them
        (line,) = [line for line in said if line.startswith("error: ")]
        assert words in line and said[-1] == line
    assert not (tmp_path / "scene").exists()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert hub_module.fetch_adapters("me/private").is_dir() and hub_module.fetch_adapters("me/gated").is_dir()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("./../../other", "is no folder of the repository"),
        ("./base/../../../other", "is no folder of the repository"),
        ("./", "is no folder of the repository"),
        ("./base", "holds no base"),
        ("me/base@v1/../../../../other", "is a folder of its author's machine"),
        ("../other", "is a folder of its author's machine"),
        ("/etc", "is a folder of its author's machine"),
        (3, "base_path is 3"),
    ],
)
def test_a_foreign_card_cannot_lead_out_of_its_repository(hub, tmp_path, monkeypatch, path, words):
    put(hub, "me/mine", demo(base_path=path))
    monkeypatch.chdir(tmp_path)
    said = one_line(One4DPipeline.from_pretrained, "me/mine")
    assert words in said and "me/mine/card.json" in said


def test_a_hub_name_in_a_foreign_card_is_no_folder_of_this_machine(hub, tmp_path, monkeypatch):
    put(hub, "me/mine", demo(base_path="some/base"))
    shutil.copytree(base_folder(EMBEDDED_BASE), tmp_path / "some/base")
    monkeypatch.chdir(tmp_path)
    assert "some/base: no folder, and no repository" in one_line(One4DPipeline.from_pretrained, "me/mine")


def test_a_false_listing_writes_nothing_outside_of_the_cache(hub, pipeline, tmp_path):
    evil = {f"base/transformer/{'../' * n}escaped.json": b"{}" for n in range(1, 9)}
    put(hub, "me/mine", demo(base_path="./base") | stored(base_folder(EMBEDDED_BASE), "base/") | evil)
    before = {path for path in tmp_path.rglob("*") if path.name != "cache" and tmp_path / "cache" not in path.parents}
    assert equal(One4DPipeline.from_pretrained("me/mine"), pipeline)
    assert {p for p in tmp_path.rglob("*") if p.name != "cache" and tmp_path / "cache" not in p.parents} == before
    assert not list(tmp_path.rglob("escaped.json")) and not any("escaped" in request for request in hub.requests)


# --- uploads that fail


@pytest.mark.parametrize("place", [r"PUT /lfs", r"/commit/", r"/preupload/"])
def test_a_failed_upload_leaves_what_was_there(hub, pipeline, place):
    pipeline.push_to_hub("me/mine", token=TOKEN)
    before, other = dict(hub.repositories["me/mine"].branches), another(pipeline)
    hub.refuse = place
    for revision in (None, "v2"):
        said = one_line(other.push_to_hub, "me/mine", token=TOKEN, revision=revision)
        assert said.startswith("me/mine: the upload: ")
        assert hub.repositories["me/mine"].branches == before
    hub.refuse = None
    assert equal(One4DPipeline.from_pretrained("me/mine"), pipeline)
    other.push_to_hub("me/mine", token=TOKEN, revision="v2")
    assert equal(One4DPipeline.from_pretrained("me/mine@v2"), other)


def test_what_cannot_be_pushed_is_one_line_and_asks_the_hub_nothing_more(hub, pipeline, tmp_path):
    assert "401 (Invalid username or password.); log in" in one_line(pipeline.push_to_hub, "me/mine")
    put(hub, "me/public", {"README.md": b"open"})
    said = one_line(pipeline.push_to_hub, "me/public", private=True, token=TOKEN)
    assert said.startswith("me/public: is public already") and tree(hub, "me/public") == {"README.md": b"open"}
    hub.requests.clear()
    for named, words in (
        ({"metrics": {"toy": {"abs_rel": float("nan")}}}, "metrics: toy: abs_rel is nan"),
        ({"metrics": {"toy": {"abs_rel": "0.1"}}}, "metrics: toy: abs_rel is '0.1'"),
        ({"sample": tmp_path / "none.png"}, "none.png: no such file"),
        ({"base": str(tmp_path)}, "is a folder of this machine"),
    ):
        assert words in one_line(pipeline.push_to_hub, "me/mine", token=TOKEN, **named)
    for name in ("mine", "me/mine@v2", "../mine"):
        assert f"repo_id: {name!r}, need owner/name" in one_line(pipeline.push_to_hub, name, token=TOKEN)
    assert not hub.requests and list(hub.repositories) == ["me/public"]
    pipeline.push_to_hub("me/hidden", private=True, token=TOKEN)
    assert hub.repositories["me/hidden"].private
    assert "me/hidden: no folder, and no repository" in one_line(One4DPipeline.from_pretrained, "me/hidden")
    assert equal(One4DPipeline.from_pretrained("me/hidden", token=TOKEN), pipeline)

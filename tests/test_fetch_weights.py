"""Laws of the door that brings a base: what it prints, what it asks the hub for, and which damage it tells."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers

from one4d_pl.commands import fetch_weights
from one4d_pl.commands.fetch_weights import BASES, RECORD, main
from tests.models.wan_layouts import TEXT_FILE, TRANSFORMER_FILE, VAE_FILE, write_twins

REPO = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("twins")
    return write_twins(root, convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers)


@pytest.fixture
def hub(twins, monkeypatch, tmp_path) -> dict[str, object]:
    """A hub that has the original layout and more: what it was asked for, and how its copies come out."""
    stored = shutil.copytree(twins[1], tmp_path / "hub")
    (stored / "README.md").write_text("not needed")
    (stored / "xlm-roberta-large").mkdir()
    (stored / "xlm-roberta-large" / "tokenizer.json").write_text("{}")
    asked: dict[str, object] = {}

    def model_info(self: object, repo: str, files_metadata: bool) -> SimpleNamespace:
        assert files_metadata
        siblings = []
        for file in (f for f in stored.rglob("*") if f.is_file()):
            large = file.suffix in (".pth", ".safetensors")
            lfs = SimpleNamespace(sha256=hashlib.sha256(file.read_bytes()).hexdigest()) if large else None
            siblings.append(SimpleNamespace(rfilename=str(file.relative_to(stored)), size=file.stat().st_size, lfs=lfs))
        return SimpleNamespace(sha="c0ffee", siblings=siblings)

    def snapshot_download(repo: str, revision: str, local_dir: Path, allow_patterns: list[str]) -> None:
        asked.update(repo=repo, revision=revision)
        for file in (f for f in stored.rglob("*") if f.is_file()):
            name = file.relative_to(stored)
            if any(fnmatch(str(name), pattern) for pattern in allow_patterns):
                (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, local_dir / name)
        if "damage" in asked:
            damage(local_dir / str(asked["damage"]))

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


def damage(file: Path) -> None:
    """A byte inside: the size stays, and so does every header."""
    content = bytearray(file.read_bytes())
    content[len(content) - 1 if file.suffix == ".safetensors" else len(content) // 2] ^= 1
    file.write_bytes(content)


def test_it_prints_what_it_would_do_and_touches_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["Wan2.1-Fun-V1.1-14B-InP"]) == 0
    told = capsys.readouterr().out
    assert "hf download alibaba-pai/Wan2.1-Fun-V1.1-14B-InP --include 'config.json' 'diffusion_pytorch_model*'" in told
    assert "--local-dir weights/Wan2.1-Fun-V1.1-14B-InP" in told and "47 GB" in told
    assert list(tmp_path.iterdir()) == []


def test_run_fetches_what_is_opened_and_verifies_it(hub, tmp_path, capsys):
    folder = tmp_path / "weights"
    assert main(["Wan2.1-Fun-V1.1-14B-InP", "--to", str(folder), "--run"]) == 0
    assert hub == {"repo": "alibaba-pai/Wan2.1-Fun-V1.1-14B-InP", "revision": "c0ffee"}
    assert not (folder / "README.md").exists() and not (folder / "xlm-roberta-large").exists()
    record = json.loads((folder / RECORD).read_text())
    assert record["commit"] == "c0ffee" and record["files"][VAE_FILE]["sha256"]
    assert "base.path=" in capsys.readouterr().out
    damage(folder / TEXT_FILE)  # found later, offline
    assert main(["--check", str(folder)]) == 2
    assert f"{TEXT_FILE}: its bytes differ from the hub's" in capsys.readouterr().err


@pytest.mark.parametrize("name", [TRANSFORMER_FILE, VAE_FILE])
def test_a_byte_that_arrived_wrong_is_told(name, hub, tmp_path, capsys):
    hub["damage"] = name
    assert main(["alibaba-pai/Wan2.1-Fun-V1.1-14B-InP", "--to", str(tmp_path / "weights"), "--run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and f"{name}: its bytes differ" in line


@pytest.mark.parametrize("layout", [0, 1], ids=["diffusers", "original"])
def test_offline_a_whole_folder_passes_and_a_cut_file_is_told(layout, twins, tmp_path, capsys):
    folder = shutil.copytree(twins[layout], tmp_path / "base")
    assert main(["--check", str(folder)]) == 0
    said = capsys.readouterr()
    assert "whole" in said.out and said.err == ""
    for file in sorted([*folder.rglob("*.safetensors"), *folder.rglob("*.pth")]):
        content = file.read_bytes()
        for length in (0, 5, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:length])
            assert main(["--check", str(folder)]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert str(file) in line
        file.write_bytes(content)


def test_a_tensor_that_the_index_promises_and_a_missing_file_are_told(twins, tmp_path, capsys):
    folder = shutil.copytree(twins[1], tmp_path / "base")
    index = folder / f"{TRANSFORMER_FILE}.index.json"
    weight_map = {"head.modulation": TRANSFORMER_FILE, "blocks.9.ffn.0.weight": TRANSFORMER_FILE, "x": "other.file"}
    index.write_text(json.dumps({"weight_map": weight_map}))
    (folder / VAE_FILE).rename(folder / "vae.pth")
    assert main(["--check", str(folder)]) == 2
    assert f"no base: neither model_index.json nor {VAE_FILE}" in capsys.readouterr().err
    (folder / "vae.pth").rename(folder / VAE_FILE)
    assert main(["--check", str(folder)]) == 2
    told = capsys.readouterr().err
    assert f"{TRANSFORMER_FILE}: blocks.9.ffn.0.weight is missing" in told and "other.file: absent" in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["Wan3"], "Wan3: no known base"),
        (["--check", "nowhere"], "nowhere: no base"),
        (["nobody/nothing", "--run"], "nobody/nothing: cannot be fetched"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, words, capsys, monkeypatch, tmp_path):
    def unreachable(self: object, repo: str, files_metadata: bool) -> None:
        raise OSError("the network is unreachable\nand more lines")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {words}")


def test_every_base_of_a_scale_is_known_and_no_torch_is_imported(tmp_path):
    for scale in ("wan_14b", "wan_1_3b"):
        path = next(line for line in (REPO / f"configs/scale/{scale}.yaml").read_text().splitlines() if "path:" in line)
        assert path.split("weights/")[1].rstrip("}") in BASES
    code = (
        "import sys; from one4d_pl.commands.fetch_weights import main; main(['Wan2.1-I2V-14B-480P']); "
        "print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(REPO)}
    )
    assert done.stdout.endswith("[]\n"), done.stderr
    assert fetch_weights.find_base("a/b").patterns

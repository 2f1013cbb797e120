"""one4d fetch-weights NAME: print (default) or run (--run) the hub download of a base, and check it.

--run downloads those files of the repository that one4d_pl opens, then compares every file's size and sha256 with
the hub's. The hub's answer stays in the folder (hub_files.json), so that `--check FOLDER` can do the same later and
offline; without it, --check compares the files with their own headers, indices and tables of contents.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import zipfile
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

from one4d_pl.commands.command import USER_ERROR, Command
from one4d_pl.config import DIFFUSERS_MARK, ORIGINAL_MARK, ConfigError
from one4d_pl.files import check_folder, write_json
from one4d_pl.models.base_files import (
    BASES,
    DIFFUSERS_PATTERNS,
    ORIGINAL_PATTERNS,
    Base,
    is_original,
    lacking,
    safetensors_header,
)

RECORD = "hub_files.json"


@dataclass(frozen=True)
class HubFile:
    """A file's size and hash as the hub states them."""

    size: int | None  # bytes
    sha256: str | None  # the hub states it for large files only


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "known bases: " + ", ".join(BASES)
    parser.add_argument("base", nargs="?", metavar="NAME", help="a known base, or owner/name of a repository like it")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="default: weights/NAME")
    parser.add_argument("--run", action="store_true", help="download and verify, rather than print")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="verify what is there, offline")


def _run(args: argparse.Namespace) -> int:
    """Print, fetch or check; return the exit code: 0, or 2 with a line per fault."""
    if (args.base is None) == (args.check is None):
        raise ConfigError("name a base, or a folder with --check")
    if args.check is not None:
        return report(args.check, check(args.check))
    base = find_base(args.base)
    folder = args.to or Path("weights") / base.repo.partition("/")[2]
    if not args.run:
        print(plan(base, folder))
        return 0
    check_folder(folder, "--to")
    return report(folder, fetch(base, folder))


def find_base(name: str) -> Base:
    """Return a known base, or any repository owner/name; ConfigError for another name."""
    if name in BASES:
        return BASES[name]
    if name.count("/") == 1:
        return Base(name, [*ORIGINAL_PATTERNS, *DIFFUSERS_PATTERNS], None)
    raise ConfigError(f"{name}: no known base; take owner/name of a repository, or one of {', '.join(BASES)}")


def plan(base: Base, folder: Path) -> str:
    """Format the commands that do by hand what --run does."""
    size = "" if base.gigabytes is None else f", {base.gigabytes} GB"
    patterns = " ".join(f"'{pattern}'" for pattern in base.patterns)
    return (
        f"# {base.repo} -> {folder}{size}; --run does it and compares every size and sha256 with the hub's\n"
        f"hf download {base.repo} --include {patterns} --local-dir {folder}\n"
        f"one4d fetch-weights --check {folder}"
    )


def fetch(base: Base, folder: Path) -> list[str]:
    """Download what is missing or incomplete, verify it against the hub; return a line per fault.

    ConfigError where the hub cannot be reached.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(base.repo, files_metadata=True)
        wanted = {
            sibling.rfilename: HubFile(sibling.size, None if sibling.lfs is None else sibling.lfs.sha256)
            for sibling in info.siblings or []
            if any(fnmatch(sibling.rfilename, pattern) for pattern in base.patterns)
        }
        total = sum(file.size or 0 for file in wanted.values())
        print(f"{base.repo} at {info.sha}: {len(wanted)} files, {total / 1e9:.1f} GB", flush=True)
        # this very commit: the files must be those that the hub has just listed
        snapshot_download(base.repo, revision=info.sha, local_dir=folder, allow_patterns=base.patterns)
    except Exception as error:  # the hub client has many error classes, the network's among them
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{base.repo}: cannot be fetched ({first}); the same command goes on where it was") from None
    record = {"repo": base.repo, "commit": info.sha, "files": {name: asdict(file) for name, file in wanted.items()}}
    write_json(folder / RECORD, record)
    return check(folder)


def check(folder: Path) -> list[str]:
    """Return a line per fault of a folder.

    A file may be absent, of another size or content, cut short, or not in its index.
    """
    if not any((folder / mark).is_file() for mark in (DIFFUSERS_MARK, ORIGINAL_MARK)):
        return [f"{folder}: no base: neither {DIFFUSERS_MARK} nor {ORIGINAL_MARK}"]
    absent = lacking(folder)
    faults = [] if absent is None else [absent]
    files = sorted(file for pattern in ("*.safetensors", "*.pth") for file in folder.rglob(pattern))
    faults += [fault for file in files if (fault := _file_fault(file))]
    faults += [fault for index in sorted(folder.rglob("*.safetensors.index.json")) for fault in _index_faults(index)]
    record = folder / RECORD
    if not record.is_file():
        print(f"{folder}: no {RECORD} of a --run: sizes and headers are looked at, not contents", flush=True)
        return faults
    stored = json.loads(record.read_text())["files"].items()
    return faults + [fault for name, stated in stored if (fault := _hub_fault(folder / name, HubFile(**stated)))]


def report(folder: Path, faults: list[str]) -> int:
    """Print the faults, or that there are none; return the exit code."""
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if not faults:
        layout = "Wan's own" if is_original(folder) else "diffusers"
        print(f"{folder}: whole, in {layout} layout; use it with base.path={folder}")
    return USER_ERROR if faults else 0


def _hub_fault(file: Path, stated: HubFile) -> str | None:
    if not file.is_file():
        return f"{file}: absent"
    size = file.stat().st_size
    if stated.size is not None and size != stated.size:
        return f"{file}: {size} bytes, the hub has {stated.size}; delete it and fetch again"
    if stated.sha256 is None:
        return None
    print(f"sha256 of {file} ({size / 1e9:.1f} GB)", flush=True)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != stated.sha256:
        return f"{file}: its bytes differ from the hub's (sha256); delete it and fetch again"
    return None


def _file_fault(file: Path) -> str | None:
    """Return what is wrong with a file's header or, for a .pth file, its table of contents."""
    if file.suffix == ".pth":
        try:
            with zipfile.ZipFile(file) as archive:
                return None if archive.namelist() else f"{file}: holds nothing"
        except (OSError, zipfile.BadZipFile) as error:
            return f"{file}: cut short, or no file of torch ({error})"
    try:
        safetensors_header(file)
    except ConfigError as error:
        return str(error)
    return None


def _index_faults(index: Path) -> list[str]:
    """Return a line per tensor that the index names and the shards lack."""
    held: dict[str, set[str]] = {}
    faults = []
    for tensor, shard in sorted(json.loads(index.read_text())["weight_map"].items()):
        file = index.parent / shard
        if shard not in held:
            held[shard] = set()
            if not file.is_file():
                faults.append(f"{file}: absent")
            elif _file_fault(file) is None:
                held[shard] = set(safetensors_header(file))
        if held[shard] and tensor not in held[shard]:
            faults.append(f"{file}: {tensor} is missing, which {index.name} promises")
    return faults


main = Command("one4d fetch-weights", __doc__, _add_arguments, _run)

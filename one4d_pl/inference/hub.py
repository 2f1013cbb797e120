"""The hub: adapters and bases by the names owner/name and owner/name@revision, and adapters that are uploaded.

Fetched are, by name, the safetensors, json and txt files that are opened: nothing that could hold a pickle or a
program. What lies in the local cache is not fetched again, and HF_HUB_OFFLINE=1 keeps to the cache.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from one4d_pl.config import (
    DEMO_ADAPTERS,
    DIFFUSERS_MARK,
    EMBEDDED_BASE,
    ORIGINAL_MARK,
    base_folder,
    cached_base,
    hub_name,
)
from one4d_pl.errors import UserError, reason_of
from one4d_pl.models.adapters import ADAPTER_FILES, CARD, AdapterCard, missing_file
from one4d_pl.models.base_files import PARTS, is_original, known_repository, lacking

if TYPE_CHECKING:
    from huggingface_hub import HfApi

BASE_IN_REPO = "./base"  # the base.path of a card whose base lies beside it
README, SAMPLE = "README.md", "sample.png"
BASE_FILES = (DIFFUSERS_MARK, *(f"{part}/*.{kind}" for part in PARTS for kind in ("safetensors", "json", "txt")))
OUTSIDE = ("../*", "*/../*")  # names that no repository has, but a false server could list
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


class HubError(UserError):
    """A repository cannot be read or written; one line that names it and says what would work."""


def find(
    base: str | None, adapters: Path | str | None, revision: str | None = None, token: str | None = None
) -> tuple[str, Path]:
    """Return where a base and an adapter lie on this machine, fetched if they are names of the hub.

    Args:
        base: folder, hub name or "embedded"; None = the one that the adapter's card names. Without `adapters` it may
            be an adapter's folder or name itself.
        adapters: folder or hub name; None = the shipped demo adapters, unless `base` is an adapter.
        revision: branch, tag or commit of the adapter, as behind an @ of its name.
        token: of the hub; None = the one that `hf auth login` has stored, or HF_TOKEN.
    """
    if adapters is None:
        is_adapter = base is not None and ((Path(base) / CARD).is_file() or _remote(base) is not None)
        adapters, base = (base or DEMO_ADAPTERS, None) if is_adapter else (DEMO_ADAPTERS, base)
    name = _remote(str(adapters))
    if name is None and revision is not None:
        raise HubError(f"revision: {revision}, but {adapters} is no name of the hub (owner/name)")
    folder = Path(adapters) if name is None else fetch_adapters(str(adapters), revision, token)
    if base is None:
        return _base_of(folder, None if name is None else name[0], token), folder
    return (base if _remote(base) is None else str(fetch_base(base, token))), folder


def fetch_adapters(name: Path | str, revision: str | None = None, token: str | None = None) -> Path:
    """Return an adapter's folder; an adapter that is named as on the hub is fetched first, whole."""
    remote = _remote(str(name))
    if remote is None:
        return Path(name)
    repository, pinned = remote[0], revision or remote[1]
    if revision is not None and remote[1] not in (None, revision):
        raise HubError(f"revision: {revision}, but {name} names another; give one of them")
    folder = _fetch(repository, pinned, CARD, ADAPTER_FILES, token, _adapter_lacks)
    if folder is None:
        raise HubError(f"{name}: holds no adapter of one4d_pl (no {CARD})")
    return folder


def fetch_base(name: str, token: str | None = None) -> Path:
    """Fetch a base in diffusers' layout by its hub name; one in Wan's own layout has to be in the cache already."""
    repository, revision = hub_name(name) or (name, None)
    cached = cached_base(name)
    if cached is not None and is_original(cached):
        return cached
    folder = _fetch(repository, revision, DIFFUSERS_MARK, BASE_FILES, token, lacking)
    if folder is None:
        raise HubError(
            f"{name}: no base in diffusers' layout (no {DIFFUSERS_MARK}). One in Wan's own has .pth files, which are "
            f"fetched on request only: `one4d fetch-weights {repository} --to FOLDER --run`; then give FOLDER as base"
        )
    return folder


def portable_base(path: str, given: str | None = None) -> str:
    """Return a base as others can find it, the given name first; HubError for a folder of this machine alone."""
    if given is None and (known := known_repository(path)) is not None:
        return known
    name = given or path
    if name in (EMBEDDED_BASE, BASE_IN_REPO) or (hub_name(name) if given else _remote(name)) is not None:
        return name
    raise HubError(
        f'base: {name} is a folder of this machine; name where others find it (base="owner/name"), or upload it, too '
        f'(base="{BASE_IN_REPO}")'
    )


def copy_base(folder: Path, target: Path) -> None:
    """Copy the files of a base that are fetched from a hub; HubError for Wan's own layout, which has pickles."""
    if is_original(folder):
        raise HubError(f"base: {folder} is in Wan's own layout ({ORIGINAL_MARK}); name its repository: base=owner/name")
    for pattern in BASE_FILES:
        for file in folder.glob(pattern):
            copied = target / file.relative_to(folder)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copied)


def upload(
    folder: Path, repository: str, private: bool | None = None, token: str | None = None, branch: str | None = None
) -> str:
    """Upload an adapter's folder in one commit, in place of the adapter that is there; return the commit's address.

    Repository and branch are made if need be. After an error they hold what they held before, and a branch that was
    made here is gone: it would show another branch's adapter under its own name.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="one4d_pl")
    with _asking(repository, "the upload"):
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
        if private and not api.repo_info(repository).private:
            raise HubError(f"{repository}: is public already; make it private on the hub, or name another")
        made = branch is not None and branch != "main" and _make_branch(api, repository, branch)
        try:
            commit = api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                revision=branch,
                commit_message="Upload One4D adapters",
                # of an earlier adapter of another shape
                delete_patterns=[*ADAPTER_FILES, SAMPLE, f"{PurePosixPath(BASE_IN_REPO)}/*"],
            )
        except BaseException:
            if made and branch is not None:
                with contextlib.suppress(Exception):  # the first error is the one to tell
                    api.delete_branch(repository, branch=branch)
            raise
    return str(commit.commit_url)


def _make_branch(api: HfApi, repository: str, branch: str) -> bool:
    """Make a branch; return False where it is there already."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.create_branch(repository, branch=branch)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        return False
    return True


def _remote(name: str) -> tuple[str, str | None] | None:
    """Return repository and revision of a hub name; None for what lies on this machine, or could lie nowhere else."""
    return None if base_folder(name).exists() else hub_name(name)


def _base_of(folder: Path, repository: str | None, token: str | None) -> str:
    """Find the base that an adapter's card names.

    A card that came from a repository may name the embedded base, a folder of that repository or a hub name, and never
    a place on this machine.
    """
    path, where = AdapterCard.read(folder).base_path, f"{repository or folder}/{CARD}"
    if not isinstance(path, str):
        raise HubError(f"{where}: base_path is {path!r}, need a name")
    inside = PurePosixPath(path)
    within = path.startswith("./") and ".." not in inside.parts and inside.parts != ()
    if repository is not None and path.startswith("./"):
        names = [f"{inside}/{file}" for file in BASE_FILES]
        if not within:
            raise HubError(f"{where}: base_path: {path} is no folder of the repository")
        if _fetch(repository, folder.name, names[0], names, token, lambda found: lacking(found / inside)) is None:
            raise HubError(f"{where}: base_path: {path} holds no base (no {names[0]} in the repository)")
    if within and (folder / inside / DIFFUSERS_MARK).is_file():
        return str(folder / inside)
    name = known_repository(path) or path
    if path == EMBEDDED_BASE or (repository is None and (Path(path).exists() or hub_name(name) is None)):
        return path
    if hub_name(name) is None:
        raise HubError(f"{where}: base_path: {path} is a folder of its author's machine; name the base yourself")
    return str(fetch_base(name, token))


def _adapter_lacks(folder: Path) -> str | None:
    name = missing_file(folder, AdapterCard.read(folder))
    return None if name is None else f"no {name}"


def _fetch(
    repository: str,
    revision: str | None,
    mark: str,
    names: Sequence[str],
    token: str | None,
    lacks: Callable[[Path], str | None],
) -> Path | None:
    """Fetch files of a repository at one commit and return its folder in the cache; None if `mark` is not there.

    Args:
        repository: owner/name.
        revision: branch, tag or commit; None = main.
        mark: the file without which the others are not wanted.
        names: patterns of the files' names.
        token: of the hub; None = the stored one.
        lacks: says what is missing in the folder; None = nothing.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    name = f"{repository}@{revision}" if revision else repository
    with _asking(name, mark):
        try:
            file = Path(hf_hub_download(repository, mark, revision=revision, token=token))
        except RemoteEntryNotFoundError:
            return None
    folder = file.parents[len(PurePosixPath(mark).parts) - 1]
    with _asking(name, "its files", lambda: lacks(folder)):
        # the folder's name is the commit: no later one may be mixed in
        snapshot_download(
            repository, revision=folder.name, token=token, allow_patterns=list(names), ignore_patterns=list(OUTSIDE)
        )
        if (lack := lacks(folder)) is not None:
            raise HubError(f"{name}: incomplete, {lack}")
    return folder


@contextlib.contextmanager
def _asking(name: str, what: str, lacks: Callable[[], str | None] = lambda: None) -> Iterator[None]:
    """Turn what the hub's client raises into one line; its errors are of many classes, the network's among them."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise HubError(f"{name}: {_reason(error, name.partition('@')[0], what, lacks)}") from error


def _reason(error: Exception, repository: str, what: str, lacks: Callable[[], str | None]) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return f"gated: ask for access at {constants.ENDPOINT}/{repository}, then {LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no folder, and no repository of the hub that you may see; if it is private, {LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "no such revision; name a branch, a tag or a whole commit hash"
    if isinstance(error, errors.HFValidationError):
        return "no folder, and no name of the hub (owner/name)"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{what}: HF_HUB_OFFLINE keeps from asking the hub; unset it"
    if isinstance(error, errors.LocalEntryNotFoundError):
        lack = lacks()
        lacked = f"incomplete in the local cache ({lack})" if lack else f"{what}: not in the local cache"
        if constants.HF_HUB_OFFLINE:
            return f"{lacked}, and HF_HUB_OFFLINE keeps from asking the hub; unset it"
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        return f"{lacked}, and the hub cannot be reached ({reason_of(cause)})"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        advice = f"; {LOG_IN}" if status in (401, 403) else ""
        return f"{what}: the hub answers {status} ({error.server_message or error.response.reason_phrase}){advice}"
    return f"{what}: {reason_of(error)}"

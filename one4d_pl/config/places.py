"""Where a base, an adapter and shards lie, and whether they exist."""

from __future__ import annotations

import re
from pathlib import Path

from one4d_pl.config.checks import ConfigError
from one4d_pl.config.model import EMBEDDED_BASE
from one4d_pl.config.run import Config

DIFFUSERS_MARK = "model_index.json"  # a base in diffusers layout holds it
ORIGINAL_MARK = "Wan2.1_VAE.pth"  # a base in the layout of Wan-AI and VideoX-Fun holds it
ASSETS = Path(__file__).parents[1] / "assets"
CONFIGS = Path(__file__).parents[1] / "configs"  # the repository's; a wheel holds a copy
HUB_NAME = re.compile(r"(?!.*\.\.)(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", re.ASCII)
DEMO_ADAPTERS = ASSETS / "demo_adapters"  # for the embedded base, trained on the toy world


def config_file(name: str) -> Path:
    """Find a yaml file: as named, else, from any folder, configs/... among the package's own."""
    path = Path(name)
    shipped = CONFIGS.joinpath(*path.parts[1:])
    return shipped if not path.exists() and path.parts[:1] == ("configs",) and shipped.is_file() else path


def check_paths(config: Config) -> None:
    """Raise ConfigError where a folder is missing that `fit` cannot make; nothing imports torch."""
    if not holds_base(config.base.path):
        raise ConfigError(
            f"base.path: no base at {config.base.path} (neither {DIFFUSERS_MARK} nor {ORIGINAL_MARK}); get it with "
            f"`one4d fetch-weights {Path(config.base.path).name} --to {config.base.path} --run`, "
            "or set base.path"
        )
    made_by_fit = config.data.toy.folders() if config.data.toy else []
    for name, sources in (("sources", config.data.sources), ("val_sources", config.data.val_sources)):
        if not sources:
            raise ConfigError(f"data.{name}: empty; add `--config configs/data/toy.yaml` or list shard folders")
        for path in (Path(source.path) for source in sources if "://" not in source.path):
            if path not in made_by_fit and not (path / "manifest.json").is_file():
                raise ConfigError(
                    f"data.{name}: no shards at {path} (no manifest.json); write them with "
                    f"`python -m data_prep.write_shards --source <dataset> --root <raw folder> --out {path}`"
                )
    adapters = initial_adapters(config)
    if adapters and not (adapters / "card.json").is_file():
        raise ConfigError(f"train.init_from: no adapter at {adapters} (no card.json)")
    if config.eval.i3d is not None and not Path(config.eval.i3d).is_file():
        raise ConfigError(
            f"eval.i3d: no I3D TorchScript file at {config.eval.i3d}; set eval.i3d=null for val/video/fd_vae"
        )


def initial_adapters(config: Config) -> Path | None:
    """Return the adapter folder that training starts from; None = it starts from scratch."""
    name = config.train.init_from
    return DEMO_ADAPTERS if name == EMBEDDED_BASE else Path(name) if name else None


def base_folder(path: str) -> Path:
    """Return the folder that a base.path other than a hub name means."""
    return ASSETS / "tiny_wan" if path == EMBEDDED_BASE else Path(path)


def holds_base(path: str) -> bool:
    """Tell whether `path` is a folder in a known layout or a hub name in the local cache."""
    folder = base_folder(path)
    if folder.is_dir():
        return any((folder / mark).is_file() for mark in (DIFFUSERS_MARK, ORIGINAL_MARK))
    return cached_base(path) is not None


def hub_name(text: str) -> tuple[str, str | None] | None:
    """Split owner/name or owner/name@revision, as the hub has them; None where the text is neither."""
    found = HUB_NAME.fullmatch(text)
    return None if found is None else (found[1], found[2])


def cached_base(path: str) -> Path | None:
    """Return the folder in the hub's local cache that holds the base of this name, whole or not."""
    from huggingface_hub import try_to_load_from_cache  # knows where the cache lies, and needs no torch
    from huggingface_hub.errors import HFValidationError

    name = hub_name(path)
    if name is None:
        return None
    try:
        found = [try_to_load_from_cache(name[0], mark, revision=name[1]) for mark in (DIFFUSERS_MARK, ORIGINAL_MARK)]
    except HFValidationError:  # not a hub name
        return None
    return next((Path(file).parent for file in found if isinstance(file, str)), None)

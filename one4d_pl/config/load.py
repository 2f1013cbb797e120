"""From yaml files that merge left to right, then `a.b=c`, to a typed Config.

No other module imports omegaconf.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, get_args, get_origin, get_type_hints

from one4d_pl.config.checks import ConfigError
from one4d_pl.config.places import config_file
from one4d_pl.config.recipes import GONE
from one4d_pl.config.run import Config
from one4d_pl.errors import UserError
from one4d_pl.files import read_text

if TYPE_CHECKING:
    from omegaconf import DictConfig


def load_config(paths: list[str], overrides: list[str]) -> Config:
    """Merge yaml files (each after its `include`s), then `a.b=c` overrides, into a typed Config.

    Later values win. A file that another one includes from a folder below it (scale/tiny.yaml,
    data/toy.yaml) is that folder's default: it is left out where `paths` name another file of the
    same folder, so that no scale has to undo another.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    merged = OmegaConf.structured(Config)
    files = [file for path in paths for file in _read_with_includes(config_file(path), ())]
    named = {file.path.resolve().parent for file in files if file.default_of is None}
    for file in files:
        if file.default_of not in named:
            merged = _merge(merged, file.node, str(file.path))
    for override in overrides:
        merged = _merge(merged, _parse_override(override), f"override {override!r}")
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"{paths[-1] if paths else 'config'}: no value for {', '.join(missing)}")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # an interpolation of a key that does not exist
        raise ConfigError(_one_line(error)) from None
    assert isinstance(config, Config)
    return config


def to_yaml(config: Config) -> str:
    """Write the resolved config as yaml, which `load_config` reads back to an equal one."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def as_dict(config: Config) -> dict[str, object]:
    """Return the config as json would give it back (tuples become lists)."""
    from omegaconf import OmegaConf

    return json.loads(json.dumps(OmegaConf.to_container(OmegaConf.structured(config))))


@dataclasses.dataclass(frozen=True)
class _File:
    path: Path
    node: DictConfig
    default_of: Path | None  # the folder whose default it is, or is included by


def _read_with_includes(path: Path, seen: tuple[Path, ...], default_of: Path | None = None) -> list[_File]:
    """Read the file's includes (relative to it), depth first, then the file itself."""
    from omegaconf import DictConfig, ListConfig, OmegaConf

    if path.resolve() in seen:
        raise ConfigError(f"{path}: includes itself")
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    try:
        node = OmegaConf.load(io.StringIO(read_text(path)))
    except UserError:
        raise
    except Exception as error:  # yaml has many error classes, all of them about the user's file
        raise ConfigError(f"{path}: not valid yaml: {' '.join(str(error).split())}") from None
    if not isinstance(node, DictConfig):
        raise ConfigError(f"{path}: the top level must be a mapping of sections")
    includes = node.pop("include", [])
    if not isinstance(includes, ListConfig) and includes != []:
        raise ConfigError(f"{path}: include: need a list of files, e.g. [{includes or 'scale/tiny.yaml'}]")
    files: list[_File] = []
    for name in includes:
        included = path.parent / name
        below = included.resolve().parent.parent == path.resolve().parent
        folder = included.resolve().parent if default_of is None and below else default_of
        files += _read_with_includes(included, (*seen, path.resolve()), folder)
    return [*files, _File(path, node, default_of)]


def _parse_override(override: str) -> DictConfig:
    from omegaconf import OmegaConf

    if "=" not in override:
        raise ConfigError(f"override {override!r}: write it as section.key=value")
    try:
        return OmegaConf.from_dotlist([override])
    except Exception as error:  # the value is yaml, see above
        raise ConfigError(f"override {override!r}: {_one_line(error)}") from None


def _merge(merged: DictConfig, node: DictConfig, name: str) -> DictConfig:
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _refuse_unknown_keys(Config, node, name, prefix="")
    try:
        result = OmegaConf.merge(merged, node)
    except (OmegaConfBaseException, TypeError) as error:  # TypeError: a mapping where a list stands
        raise ConfigError(f"{name}: {_one_line(error)}") from None
    assert isinstance(result, DictConfig)
    return result


def _refuse_unknown_keys(cls: type, node: DictConfig, name: str, prefix: str) -> None:
    """Raise ConfigError, naming file, key and the nearest known key, where a key is no knob; drop those of `GONE`."""
    from omegaconf import DictConfig

    hints = get_type_hints(cls)
    for key in list(node):
        key = str(key)
        if (full := f"{prefix}{key}") in GONE:
            value = node.pop(key)
            if value != GONE[full]:
                raise ConfigError(f"{name}: {full}={value}: this knob is gone; what is left is {GONE[full]}")
            continue
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(hints)}"
            raise ConfigError(f"{name}: unknown key {prefix}{key}; {hint}")
        child, nested = node._get_node(key), _dataclass_in(hints[key])
        if nested is not None and isinstance(child, DictConfig) and not child._is_none():
            _refuse_unknown_keys(nested, child, name, f"{prefix}{key}.")


def _dataclass_in(hint: object) -> type | None:
    """Return the dataclass in a type `X` or `X | None`; None for others, and for lists.

    Lists are checked by omegaconf itself.
    """
    if get_origin(hint) is list:
        return None
    candidates = [hint, *get_args(hint)]
    return next((c for c in candidates if isinstance(c, type) and dataclasses.is_dataclass(c)), None)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key:")), "")
    return f"{key}: {lines[0]}" if key and key not in lines[0] else lines[0] if lines else type(error).__name__

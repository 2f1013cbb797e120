"""Every knob of the project: typed dataclasses, filled from merged yaml files, then `a.b=c`.

Nothing here imports torch, so that a login node parses a config in a second; omegaconf is imported
only where yaml is read, so that the classes alone need no package. The yaml tree ends in
`load_config`: beyond it there are dataclasses, and each class of the project is given its own
section. A default stands here or, where it belongs to a scale or a data mix, in one yaml.
"""

from one4d_pl.config.checks import ConfigError, changeable
from one4d_pl.config.load import as_dict, load_config, to_yaml
from one4d_pl.config.model import (
    ATTENTION,
    EMBEDDED_BASE,
    MAX_SCENE_FRAMES,
    NATIVE_ATTENTION,
    SOLVERS,
    BaseConfig,
    DLCConfig,
    FlowConfig,
    GuidanceConfig,
    MaskingConfig,
    SamplerConfig,
    TinyWanConfig,
)
from one4d_pl.config.places import (
    DEMO_ADAPTERS,
    DIFFUSERS_MARK,
    ORIGINAL_MARK,
    base_folder,
    cached_base,
    check_paths,
    holds_base,
    hub_name,
    initial_adapters,
)
from one4d_pl.config.recipes import GONE, Change, changes, flatten
from one4d_pl.config.run import (
    CHECKPOINTING,
    TEMPORAL_FACTOR,
    TOY_LEVELS,
    Config,
    DataConfig,
    EvalConfig,
    OptimConfig,
    SourceConfig,
    ToyConfig,
    TrainConfig,
    ValConfig,
    legal_worlds,
)

__all__ = [
    "ATTENTION",
    "CHECKPOINTING",
    "DEMO_ADAPTERS",
    "DIFFUSERS_MARK",
    "EMBEDDED_BASE",
    "GONE",
    "MAX_SCENE_FRAMES",
    "NATIVE_ATTENTION",
    "ORIGINAL_MARK",
    "SOLVERS",
    "TEMPORAL_FACTOR",
    "TOY_LEVELS",
    "BaseConfig",
    "Change",
    "Config",
    "ConfigError",
    "DLCConfig",
    "DataConfig",
    "EvalConfig",
    "FlowConfig",
    "GuidanceConfig",
    "MaskingConfig",
    "OptimConfig",
    "SamplerConfig",
    "SourceConfig",
    "TinyWanConfig",
    "ToyConfig",
    "TrainConfig",
    "ValConfig",
    "as_dict",
    "base_folder",
    "cached_base",
    "changeable",
    "changes",
    "check_paths",
    "flatten",
    "holds_base",
    "hub_name",
    "initial_adapters",
    "legal_worlds",
    "load_config",
    "to_yaml",
]

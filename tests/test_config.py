"""Laws of the config: every shipped yaml loads, the large scale is the paper's recipe, a mistake is one clear line."""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from one4d_pl import fit
from one4d_pl.config import Config, ConfigError, TrainConfig, check_paths, legal_worlds, load_config, to_yaml

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
DLC = str(CONFIGS / "dlc.yaml")
SHIPPED = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
SHARED = CONFIGS / "scale" / "wan.yaml"  # no scale of its own
SCALES = sorted(str(path) for path in (CONFIGS / "scale").glob("*.yaml") if path != SHARED)
MIXES = sorted(str(path) for path in (CONFIGS / "data").glob("*.yaml"))
PAPER = [DLC, str(CONFIGS / "scale/wan_14b.yaml"), str(CONFIGS / "data/one4d_mix.yaml")]
COMBINATIONS = [[DLC], *([DLC, scale, mix] for scale, mix in itertools.product(SCALES, MIXES))]


def name(paths: list[str]) -> str:
    return "+".join(Path(path).stem for path in paths if "=" not in path)


def read(path: str | Path) -> dict[str, object]:
    return yaml.safe_load(Path(path).read_text(encoding="utf-8"))


def leaves(node: object, prefix: str = "") -> dict[str, object]:
    """Dotted key -> value of everything that a yaml sets; lists and null are values."""
    if not isinstance(node, dict):
        return {prefix: node}
    children = [leaves(child, f"{prefix}.{key}".lstrip(".")) for key, child in node.items() if key != "include"]
    return {key: value for child in children for key, value in child.items()}


def value_at(config: Config, key: str) -> object:
    node: object = config
    for part in key.split("."):
        node = getattr(node, part)
    return node


def plain(value: object) -> object:
    """As yaml writes it: dataclasses are mappings, tuples are lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def error_of(paths: list[str], overrides: list[str]) -> str:
    """The line that the user gets."""
    with pytest.raises(ConfigError) as caught:
        load_config(paths, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- the shipped files


@pytest.mark.parametrize("relative", SHIPPED)
def test_every_shipped_yaml_loads_and_has_the_last_word(relative):
    path = str(CONFIGS / relative)
    config = load_config([DLC] if path == DLC else [DLC, path], [])
    for key, wanted in leaves(read(path)).items():
        actual = plain(value_at(config, key))
        if isinstance(wanted, list) and wanted and isinstance(wanted[0], dict):
            assert [{k: item[k] for k in given} for given, item in zip(wanted, actual, strict=True)] == wanted, key
        else:
            assert actual == wanted, key


@pytest.mark.parametrize("paths", COMBINATIONS, ids=name)
def test_every_scale_goes_with_every_data_mix(paths):
    config = load_config(paths, [])
    assert config.scale == ("tiny" if len(paths) == 1 else Path(paths[1]).stem)
    assert config.data.sources and config.data.val_sources
    assert config.train.accumulation * config.train.micro_batch_size * config.train.world_size == (
        config.train.global_batch_size
    )


@pytest.mark.parametrize("scale", SCALES, ids=lambda path: Path(path).stem)
@pytest.mark.parametrize("mix", MIXES, ids=lambda path: Path(path).stem)
def test_scales_and_mixes_share_no_key_so_their_order_is_free(scale, mix):
    assert not leaves(read(scale)).keys() & leaves(read(mix)).keys()
    assert load_config([DLC, scale, mix], []) == load_config([DLC, mix, scale], [])


@pytest.mark.parametrize("scale", [path for path in SCALES if "tiny" not in path], ids=lambda path: Path(path).stem)
@pytest.mark.parametrize("mix", MIXES, ids=lambda path: Path(path).stem)
def test_a_named_scale_and_mix_leave_nothing_of_the_default_ones(scale, mix):
    assert load_config([DLC, scale, mix], []) == load_config([scale, mix], [])


@pytest.mark.parametrize("scale", ["wan_14b", "wan_1_3b"])
def test_nothing_tiny_or_toy_is_left_in_the_large_scale(scale):
    large = [str(CONFIGS / f"scale/{scale}.yaml"), PAPER[2]]
    assert load_config([DLC, *large], []) == load_config(large, [])


RECIPE = {  # One4D, sec. 4.1, then what we chose where it is silent
    "scale": "wan_14b",
    "dlc.rank": 64,
    "dlc.num_links": 5,
    "train.global_batch_size": 32,
    "train.micro_batch_size": 1,
    "train.num_nodes": 1,
    "train.devices": 8,
    "train.world_size": 8,
    "train.accumulation": 4,
    "train.max_steps": 5500,
    "optim.lr": 1e-4,
    "data.num_frames": 81,
    "data.height": 352,
    "data.width": 624,
    "sampler.steps": 50,
    "masking.text_prob": 0.0,
    "masking.image_prob": 0.35,
    "masking.sparse_prob": 0.30,
    "masking.video_prob": 0.35,
    "base.tiny": None,
    "data.toy": None,
    "flow.shift": 5.0,
    "flow.xyz_weight": 1.0,
    "flow.caption_dropout": 0.1,
    "optim.betas": (0.9, 0.95),
    "optim.weight_decay": 1e-4,
    "optim.warmup_steps": 100,
    "optim.grad_clip": 1.0,
    "optim.link_lr_width": 1280,
    "dlc.lora_scale": 1.0,
    "train.precision": "bf16-mixed",
    "train.activation_checkpointing": "full",
    "train.overfit_clips": 0,
    "train.init_from": None,
}


def test_the_large_scale_is_the_papers_recipe():
    config = load_config(PAPER, [])
    assert {key: value_at(config, key) for key in RECIPE} == RECIPE


def test_the_papers_base_sources_and_latents():
    config = load_config(PAPER, [])
    assert config.base.path.endswith("Wan2.1-Fun-V1.1-14B-InP") and config.base.dtype == "bfloat16"
    assert [config.sampler.guidance.of(task) for task in ("text", "image", "sparse", "video")] == [6, 6, 4, 4]
    assert config.sampler.guidance_xyz is None
    weights = {source.path.split("/")[1]: source.weight for source in config.data.sources}
    assert weights.keys() == {"omniworld_game", "bedlam", "pointodyssey", "tartanair", "spatialvid"}
    real = weights.pop("spatialvid")
    assert math.isclose(real, sum(weights.values()))  # 17k synthetic clips, 17k real ones
    grid = ((config.data.num_frames - 1) // 4 + 1, config.data.height // 8, config.data.width // 8)
    assert grid == (21, 44, 78)
    assert grid[0] * grid[1] // 2 * grid[2] // 2 == 18_018  # tokens per branch
    assert config.train.max_steps * config.train.global_batch_size == 176_000


# --- merging


def test_later_files_win_and_overrides_win_over_all(tmp_path):
    first = write(tmp_path / "first.yaml", "train: {max_steps: 1, seed: 1}\noptim: {lr: 0.5}\n")
    second = write(tmp_path / "second.yaml", "train: {max_steps: 2, seed: 2}\n")
    config = load_config([first, second], ["train.max_steps=3", "train.max_steps=4"])
    assert (config.train.max_steps, config.train.seed, config.optim.lr) == (4, 2, 0.5)


def test_a_file_wins_over_its_includes_and_they_are_relative_to_it(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "base.yaml", "train: {max_steps: 1, seed: 1, log_every: 1}\n")
    write(tmp_path / "deep/one.yaml", "include: [../base.yaml]\ntrain: {seed: 2, log_every: 2}\n")
    write(tmp_path / "deep/two.yaml", "include: [../base.yaml]\n")  # twice the same file is no cycle
    top = write(tmp_path / "top.yaml", "include: [deep/one.yaml, deep/two.yaml]\ntrain: {log_every: 3}\n")
    train = load_config([top], []).train
    assert (train.max_steps, train.seed, train.log_every) == (1, 1, 3)


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("optim.lr=1e-3", "optim.lr", 1e-3),
        ("train.resume=false", "train.resume", False),
        ("train.init_from=runs/a", "train.init_from", "runs/a"),
        ("train.init_from=null", "train.init_from", None),
        ("val.sigmas=[0.5, 1]", "val.sigmas", [0.5, 1.0]),
        ("optim.betas=[0.5, 0.6]", "optim.betas", (0.5, 0.6)),
        ("base.negative_prompt='a=b, 猫'", "base.negative_prompt", "a=b, 猫"),
        ("sampler.guidance_xyz.video=2", "sampler.guidance_xyz.video", 2.0),
        ("data.toy=null", "data.toy", None),
    ],
)
def test_an_override_is_typed(override, key, expected):
    actual = value_at(load_config([DLC], [override]), key)
    assert actual == expected and type(actual) is type(expected)


def test_a_list_of_sources_is_replaced_whole():
    config = load_config([DLC], ["data.sources=[{path: a}]"])
    assert [(source.path, source.weight) for source in config.data.sources] == [("a", 1.0)]


ODD_VALUES = [
    *("optim.lr=1e-7", "sampler.guidance_xyz={text: 3}", "run_dir='yes: #猫 1e3'"),
    *("train.init_from='null'", "base.negative_prompt='0x10'", "val.sigmas=[0.123456789012345]"),
]


@pytest.mark.parametrize(
    ("paths", "overrides"), [*((paths, []) for paths in COMBINATIONS), ([DLC], ODD_VALUES)], ids=name
)
def test_the_printed_yaml_reads_back_as_an_equal_config(paths, overrides, tmp_path):
    config = load_config(paths, overrides)
    assert load_config([write(tmp_path / "config.yaml", to_yaml(config))], []) == config


def test_print_config_prints_the_resolved_config_and_trains_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fit.main(["--config", DLC, "--config", PAPER[1], "--print-config", "optim.lr=0.5"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    expected = load_config([DLC, PAPER[1]], ["optim.lr=0.5"])
    assert load_config([write(tmp_path / "printed.yaml", captured.out)], []) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["printed.yaml"]


def test_parsing_every_config_imports_no_torch():
    heavy = ("torch", "lightning", "diffusers", "transformers", "deepspeed", "numpy")
    code = (
        "import sys, one4d_pl.fit\n"
        "from one4d_pl.config import load_config, to_yaml\n"
        f"for paths in {COMBINATIONS!r}: to_yaml(load_config(paths, ['optim.lr=0.1']))\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# --- mistakes


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("train: {max_stepz: 3}", "train.max_stepz", "train.max_steps"),
        ("trian: {max_steps: 3}", "trian", "train"),
        ("base: {tiny: {num_layer: 3}}", "base.tiny.num_layer", "base.tiny.num_layers"),
        ("sampler: {guidance: {vidoe: 3}}", "sampler.guidance.vidoe", "sampler.guidance.video"),
        ("sampler: {guidance_xyz: {imaeg: 3}}", "sampler.guidance_xyz.imaeg", "sampler.guidance_xyz.image"),
        ("data: {toy: {rot: x}}", "data.toy.rot", "data.toy.root"),
    ],
)
def test_an_unknown_key_names_file_key_and_the_nearest_right_one(text, key, nearest, tmp_path):
    path = write(tmp_path / "mine.yaml", text)
    message = error_of([DLC, path], [])
    assert message.startswith(f"{path}: ")
    assert message == f"{path}: unknown key {key}; did you mean {nearest}?"


def test_an_unknown_key_in_a_list_names_file_key_and_the_nearest_right_one(tmp_path):
    path = write(tmp_path / "mine.yaml", "data: {sources: [{path: x, wieght: 3}]}")
    message = error_of([path], [])
    assert message.startswith(f"{path}: ") and "'wieght'" in message and "'weight'" in message


def test_a_key_like_no_other_lists_the_known_ones():
    message = error_of([DLC], ["train.zzzzzz=1"])
    assert "override 'train.zzzzzz=1'" in message and "max_steps" in message


def test_an_unknown_key_in_an_included_file_names_that_file(tmp_path):
    inner = write(tmp_path / "inner.yaml", "optim: {lrr: 1}")
    outer = write(tmp_path / "outer.yaml", "include: [inner.yaml]")
    message = error_of([outer], [])
    assert inner in message and "optim.lrr" in message and "optim.lr?" in message


BAD_VALUES = [
    (["train.max_steps=abc"], ["train.max_steps", "abc"]),
    (["train.max_steps=1.5"], ["train.max_steps", "1.5"]),
    (["train.max_steps="], ["train.max_steps", "None"]),
    (["train.resume=maybe"], ["train.resume", "maybe"]),
    (["train=5"], ["train=5"]),
    (["train=[1]"], ["train=[1]"]),
    (["train=null"], ["train"]),
    (["run_dir=null"], ["run_dir"]),
    (["run_dir=${nope}"], ["run_dir", "nope"]),
    (["data.sources=5"], ["data.sources"]),
    (["data.sources=[{weight: 2}]"], ["data.sources[0].path"]),
    (["data.sources[0].weight=2"], ["data.sources[0].weight"]),
    (["data.sources=[{path: shards/a, weight: 0}]"], ["data.sources", "shards/a", "> 0"]),
    (["data.val_sources=[{path: shards/a, weight: .nan}]"], ["data.val_sources", "shards/a", "nan"]),
    (["data.sources=[{path: a, weight: 1}, {path: b, weight: 1e-4}]"], ["data.sources", "b", "0.1 %"]),
    (["optim.betas=[0.9]"], ["betas"]),
    (["optim.betas=[0.9,1.5]"], ["optim.betas", "1.5"]),
    (["optim.lr=0"], ["optim.lr", "> 0"]),
    (["optim.lr=.nan"], ["optim.lr", "nan"]),
    (["optim.lr=.inf"], ["optim.lr", "inf"]),
    (["optim.weight_decay=-1"], ["optim.weight_decay", ">= 0"]),
    (["optim.grad_clip=.nan"], ["optim.grad_clip", "nan"]),
    (["optim.warmup_steps=-1"], ["optim.warmup_steps", ">= 0"]),
    (["flow.shift=0"], ["flow.shift", "> 0"]),
    (["flow.xyz_weight=-1"], ["flow.xyz_weight"]),
    (["flow.caption_dropout=1.5"], ["flow.caption_dropout", "between 0 and 1"]),
    (["masking.text_prob=0.2"], ["masking", "sum to 1", "1.2"]),
    (["masking.text_prob=-0.1", "masking.video_prob=0.45"], ["masking", ">= 0"]),
    (["masking.text_prob=.nan"], ["masking", "nan"]),
    (["sampler.steps=0"], ["sampler.steps", ">= 1"]),
    (["dlc.rank=0"], ["dlc.rank", ">= 1"]),
    (["dlc.lora_scale=0"], ["dlc.lora_scale"]),
    (["dlc.link_direction=rgb_to_xyz"], ["dlc.link_direction=rgb_to_xyz", "is gone", "both"]),
    (["dlc.link_blocks=[1,4]"], ["dlc.link_blocks=[1, 4]", "is gone"]),
    (["base.dtype=float16"], ["base.dtype", "float32, bfloat16"]),
    (["base.dtype=bfloat16"], ["base.dtype", "train.precision=bf16-mixed"]),
    (["base.max_text_tokens=0"], ["base.max_text_tokens"]),
    (["base.tiny.num_layers=0"], ["base.tiny.num_layers"]),
    (["data.num_frames=16"], ["data.num_frames", "4k+1", "17"]),
    (["data.num_frames=5"], ["data.num_frames", "9..81"]),
    (["data.num_frames=85"], ["data.num_frames", "9..81"]),
    (["data.height=70"], ["data.height", "16", "try 64"]),
    (["data.width=0"], ["data.width", "try 16"]),
    (["data.far_limit=1"], ["data.far_limit", "> 1"]),
    (["data.far_limit=.nan"], ["data.far_limit", "nan"]),
    (["data.pointmap_power=0"], ["data.pointmap_power", "0.1 to 1", "0.0"]),
    (["data.pointmap_power=0.5", "data.z_offset=true"], ["data.pointmap_power", "data.z_offset"]),
    (["data.block_shards=0"], ["data.block_shards"]),
    (["data.num_workers=-1"], ["data.num_workers"]),
    (["data.max_skip_share=-0.1"], ["data.max_skip_share"]),
    (["data.min_consistency=1.1"], ["data.min_consistency"]),
    (["data.cache_gib=0"], ["data.cache_gib", "> 0"]),
    (["train.strategy=deepspeed", "train.devices=3", "train.micro_batch_size=1"], ["3 processes", "legal numbers"]),
    (["data.toy.val=-1"], ["data.toy.val"]),
    (["train.strategy=fsdp"], ["train.strategy", "single, ddp"]),
    (["train.precision=16"], ["train.precision", "bf16-mixed"]),
    (["train.devices=2"], ["train.strategy", "ddp"]),
    (["train.micro_batch_size=3"], ["train.micro_batch_size", "3", "32"]),
    (["train.micro_batch_size=64"], ["train.micro_batch_size", "64", "32"]),
    (
        ["train.strategy=ddp", "train.devices=3", "train.micro_batch_size=4"],
        ["train.global_batch_size", "3 processes", "[1, 2, 4, 8]"],
    ),
    (["train.seed=-1"], ["train.seed", ">= 0"]),
    (["train.overfit_clips=-1"], ["train.overfit_clips", ">= 0"]),
    (["train.log_every=0"], ["train.log_every", ">= 1"]),
    (["train.save_every=0"], ["train.save_every", ">= 1"]),
    (["val.sigmas=[]"], ["val.sigmas"]),
    (["val.sigmas=[0, 0.5]"], ["val.sigmas", "(0, 1]"]),
    (["val.sigmas=[.nan]"], ["val.sigmas", "nan"]),
    (["val.every=0"], ["val.every"]),
    (["eval.video_every=-1"], ["eval.video_every", ">= 0"]),
    (["eval.video_clips=1"], ["eval.video_clips", ">= 2"]),
    (["max_steps"], ["max_steps", "section.key=value"]),
    (["optim.lr=[1"], ["optim.lr=[1"]),
]


@pytest.mark.parametrize(("overrides", "words"), BAD_VALUES, ids=lambda value: " ".join(value))
def test_a_bad_value_is_one_line_with_its_knob(overrides, words):
    message = error_of([], overrides)
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a", ["top level"]),
        ("a: [", ["not valid yaml", "line 2"]),
        ("train: {seed: 1}\ntrain: {seed: 2}", ["not valid yaml", "duplicate key train", "line 2"]),
        ("!!python/object/apply:os.getcwd []", ["not valid yaml"]),
        ("train:\n", ["train"]),
        ("train: {max_steps: x}", ["train.max_steps", "x"]),
        ("include: scale/tiny.yaml", ["include", "list", "[scale/tiny.yaml]"]),
        ("include:\n", ["include", "list"]),
    ],
)
def test_a_broken_file_is_one_line_with_its_name(text, words, tmp_path):
    path = write(tmp_path / "mine.yaml", text)
    message = error_of([path], [])
    assert message.startswith(f"{path}: ")
    assert [word for word in words if word not in message] == []


def test_a_missing_file_is_named_also_where_it_is_included(tmp_path):
    absent = tmp_path / "absent.yaml"
    assert error_of([DLC, str(absent)], []) == f"{absent}: no such config file"
    outer = write(tmp_path / "outer.yaml", "include: [absent.yaml]")
    assert error_of([outer], []) == f"{absent}: no such config file"


def test_a_cycle_of_includes_is_an_error_not_a_hang(tmp_path):
    write(tmp_path / "a.yaml", "include: [b.yaml]")
    write(tmp_path / "b.yaml", "include: [c.yaml]")
    write(tmp_path / "c.yaml", "include: [./a.yaml]")
    assert "a.yaml: includes itself" in error_of([str(tmp_path / "a.yaml")], [])
    itself = write(tmp_path / "itself.yaml", "include: [itself.yaml]")
    assert error_of([itself], []) == f"{itself}: includes itself"


# --- worlds


@pytest.mark.parametrize(("global_batch", "micro_batch"), [(32, 1), (32, 4), (64, 1), (8, 8), (12, 3), (7, 1)])
def test_legal_worlds_are_exactly_those_that_a_run_accepts(global_batch, micro_batch):
    legal = legal_worlds(global_batch, micro_batch)
    for world in range(1, global_batch + 2):
        knobs = {"global_batch_size": global_batch, "micro_batch_size": micro_batch, "devices": world}
        if world in legal:
            train = TrainConfig(strategy="ddp", **knobs)
            assert train.accumulation * world * micro_batch == global_batch
        else:
            with pytest.raises(ConfigError, match=r"legal numbers of processes: \[1"):
                TrainConfig(strategy="ddp", **knobs)


@pytest.mark.parametrize(("word", "mode"), [("true", "full"), ("false", "none"), ("selective", "selective")])
def test_activation_checkpointing_was_a_switch_once_and_still_understands_it(word, mode):
    config = load_config(PAPER, [f"train.activation_checkpointing={word}"])
    assert (
        config.train.activation_checkpointing == mode and load_config([], []).train.activation_checkpointing == "none"
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.activation_checkpointing=half"], ["train.activation_checkpointing", "none, full, selective"]),
        (["base.attention=fast"], ["base.attention", "native"]),
        (["train.activation_checkpointing=selective", "base.attention=flash"], ["base.attention=flash", "or full"]),
        (["train.compile=true", "train.strategy=deepspeed", "train.zero_stage=3"], ["train.compile", "zero_stage=2"]),
    ],
)
def test_knobs_of_speed_that_exclude_each_other_say_so(overrides, words):
    message = error_of(PAPER, overrides)
    assert [word for word in words if word not in message] == []


def test_nodes_times_devices_is_the_world():
    config = load_config(PAPER, ["train.num_nodes=2", "train.devices=4"])
    assert (config.train.world_size, config.train.accumulation) == (8, 4)
    assert "legal numbers of processes: [1, 2, 4, 8, 16, 32]" in error_of(PAPER, ["train.num_nodes=8"])  # 64 ranks


# --- folders


def touch(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    return str(path.parent)


def test_check_paths_asks_only_for_what_fit_cannot_make(tmp_path):
    check_paths(load_config([DLC], [f"data.toy.root={tmp_path}/toy", *toy(tmp_path)]))  # the base is shipped
    base, shards = touch(tmp_path / "base/model_index.json"), touch(tmp_path / "shards/manifest.json")
    adapter = touch(tmp_path / "adapter/card.json")
    sources = [f"data.sources=[{{path: {shards}}}]", "data.val_sources=[{path: 's3://bucket/shards'}]"]
    check_paths(load_config([DLC, *PAPER[1:]], [f"base.path={base}", *sources, f"train.init_from={adapter}"]))


def toy(root: Path) -> list[str]:
    train = f"[{{path: {root}/toy/train_synthetic}}, {{path: {root}/toy/train_real}}]"
    return [f"data.sources={train}", f"data.val_sources=[{{path: {root}/toy/val}}]"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.sources=[]"], ["data.sources", "configs/data/toy.yaml"]),
        (["data.val_sources=[]"], ["data.val_sources", "configs/data/toy.yaml"]),
        (["data.sources=[{path: nowhere/shards}]"], ["nowhere/shards", "data_prep.write_shards", "manifest.json"]),
        (["data.val_sources=[{path: nowhere/val}]"], ["data.val_sources", "nowhere/val"]),
        (["data.sources=[{path: data/toy/trian_real}]"], ["data/toy/trian_real"]),  # below toy.root, yet not fit's
        (["data.toy.val=0", "data.val_sources=[{path: data/toy/val}]"], ["data.val_sources", "data/toy/val"]),
        (["base.path=weights/Wan2.1"], ["base.path", "weights/Wan2.1", "fetch-weights"]),
        (["base.path=nobody/such-a-model"], ["base.path", "nobody/such-a-model"]),
        (["base.path=/no/such/folder"], ["base.path", "/no/such/folder"]),
        (["train.init_from=nowhere/adapter"], ["train.init_from", "nowhere/adapter", "card.json"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_missing_folder_is_told_with_what_makes_it(overrides, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nothing lies here
    with pytest.raises(ConfigError) as caught:
        check_paths(load_config([DLC], overrides))
    assert "\n" not in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_hub_id_in_the_local_cache_is_accepted(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--nobody--wan"
    touch(snapshot / "snapshots/0123/model_index.json")
    (snapshot / "refs").mkdir()
    (snapshot / "refs/main").write_text("0123")
    check_paths(load_config([DLC], ["base.path=nobody/wan"]))
    with pytest.raises(ConfigError, match=r"base\.path"):
        check_paths(load_config([DLC], ["base.path=nobody/other"]))

"""A base without weights, of any size: a folder that the project's own loader opens.

It is in diffusers' layout. Its safetensors files have true headers and no bytes behind them: they are sparse and take
no room on the disk. Fake tensors read nothing, so they can be opened as real ones would be.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from transformers import ByT5Tokenizer, CLIPVisionConfig, CLIPVisionModel, PreTrainedModel, UMT5Config, UMT5EncoderModel

from one4d_pl.config import DIFFUSERS_MARK
from one4d_pl.models.base_files import is_original, sizes_of, tokenizer_folder

BF16 = 2  # bytes
UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
CLIP_VIT_H = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 14,
}  # fmt: skip


def write_skeleton(folder: Path, base_path: str, blocks: int | None) -> str:
    """Write the skeleton of the base at `base_path` into a new folder; return in words where its sizes come from.

    Where nothing lies at `base_path`, its name tells which release it would be. `blocks`: how many to keep; None = all.
    """
    source, settings, origin = sizes_of(base_path)
    settings = {**settings, "num_layers": settings["num_layers"] if blocks is None else blocks}
    known = source if source is not None and not is_original(source) else None  # its own configs describe its encoders
    with init_empty_weights(include_buffers=False):
        _write(folder / "transformer", WanTransformer3DModel.from_config(settings))
        vae = AutoencoderKLWan() if known is None else AutoencoderKLWan.from_config(_settings(known / "vae"))
        _write(folder / "vae", vae)
        if known is None:
            text = UMT5Config(**UMT5_XXL, feed_forward_proj="gated-gelu")
        else:
            text = UMT5Config.from_pretrained(known / "text_encoder")
        _write(folder / "text_encoder", UMT5EncoderModel(text))
        if settings.get("image_dim") is not None:
            if known is None:
                image = CLIPVisionConfig(**CLIP_VIT_H, hidden_act="gelu")
            else:
                image = CLIPVisionConfig.from_pretrained(known / "image_encoder")
            _write(folder / "image_encoder", CLIPVisionModel(image))
    if source is not None:
        shutil.copytree(tokenizer_folder(source), folder / "tokenizer")
    else:
        ByT5Tokenizer().save_pretrained(folder / "tokenizer")  # it needs no vocabulary file
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    (folder / DIFFUSERS_MARK).write_text("{}\n")
    return origin


def _settings(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())


def _write(folder: Path, model: WanTransformer3DModel | AutoencoderKLWan | PreTrainedModel) -> None:
    """Write the model's config and the header of its weights."""
    folder.mkdir(parents=True)
    header, end = {}, 0
    for name, parameter in model.named_parameters():
        if name == "encoder.embed_tokens.weight":  # UMT5's input embedding is the shared one, which files hold once
            continue
        size = BF16 * math.prod(parameter.shape)
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    if isinstance(model, PreTrainedModel):
        model.config.to_json_file(folder / "config.json")
    else:
        model.save_config(folder)

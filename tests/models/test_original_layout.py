"""Laws of opening Wan in its original layout: every name is diffusers' own converter's, every output its twin's."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import conv2d, gelu, interpolate, layer_norm, linear

from one4d_pl.config import ConfigError, check_paths, load_config
from one4d_pl.models.base_files import PARTS, fingerprint, lacking, transformer_config
from one4d_pl.models.encoder_files import open_image_encoder, open_text_encoder
from one4d_pl.models.original_names import transformer_source, vae_source
from one4d_pl.models.wan import WanEncoders, load_transformer
from one4d_pl.models.weights import TensorFiles
from tests.models.wan_layouts import (
    IMAGE_FILE,
    TEXT_FILE,
    TRANSFORMER_FILE,
    VAE_FILE,
    original_names,
    possible_vae_names,
    transformer_names,
    write_twins,
)

# config.json of the released transformers, in Wan's words
WAN_14B = {"dim": 5120, "num_heads": 40, "num_layers": 40, "ffn_dim": 13824}
WAN_1_3B = {"dim": 1536, "num_heads": 12, "num_layers": 30, "ffn_dim": 8960}
I2V = {"model_type": "i2v", "in_dim": 36, "out_dim": 16, "freq_dim": 256, "text_len": 512, "eps": 1e-6}


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """diffusers' layout, the original one."""
    root = tmp_path_factory.mktemp("twins")
    return write_twins(root, convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers)


@pytest.fixture
def original(twins: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(twins[1], tmp_path / "original")


@pytest.mark.parametrize(("size", "tensors"), [(WAN_14B, 1303), (WAN_1_3B, 983)], ids=["14B", "1.3B"])
def test_the_whole_list_of_transformer_tensors_is_the_converters(size, tensors, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(size | I2V))
    (tmp_path / VAE_FILE).touch()
    with init_empty_weights():
        model = WanTransformer3DModel.from_config(transformer_config(tmp_path))
    targets = {name for name, _ in model.named_parameters()}
    names = original_names(targets, transformer_names(size["num_layers"], True), convert_wan_transformer_to_diffusers)
    assert names.keys() == targets and len(targets) == tensors == len(set(names.values()))
    assert {name: transformer_source(name).key for name in targets} == names


def test_the_whole_list_of_vae_tensors_is_the_converters():
    with init_empty_weights():
        targets = {name for name, _ in AutoencoderKLWan().named_parameters()}
    names = original_names(targets, list(possible_vae_names()), convert_wan_vae_to_diffusers)
    assert names.keys() == targets and len(targets) == 194
    assert {name: vae_source(name, residual_blocks=2).key for name in targets} == names


def test_both_layouts_give_the_same_transformer(twins):
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(2, 36, 2, 4, 6, generator=generator),
        "timestep": torch.tensor([10.0, 900.0]),
        "encoder_hidden_states": torch.randn(2, 512, 16, generator=generator),
        "encoder_hidden_states_image": torch.randn(2, 17, 160, generator=generator),
        "return_dict": False,
    }
    stock = WanTransformer3DModel.from_pretrained(twins[0] / "transformer")
    for model in (load_transformer(str(folder), "float32") for folder in twins):
        assert model.state_dict().keys() == stock.state_dict().keys()
        for name, value in stock.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
        with torch.no_grad():
            # kernels choose their order of additions by where the weights lie in memory, too
            torch.testing.assert_close(model(**inputs)[0], stock(**inputs)[0], rtol=1e-5, atol=1e-6)


def test_both_layouts_give_the_same_encoders(twins):
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(1, 3, 5, 16, 16, generator=generator) * 2 - 1
    ours, original = (WanEncoders(str(folder), "float32", 512) for folder in twins)
    stock = WanImageToVideoPipeline(
        tokenizer=ours.tokenizer, text_encoder=ours.text_encoder, transformer=None, scheduler=None, image_encoder=None,
        image_processor=None, vae=AutoencoderKLWan.from_pretrained(twins[0] / "vae"),
    )  # fmt: skip
    latents = ours.encode(video)
    assert torch.equal(original.encode(video), latents)
    assert torch.equal(original.decode(latents), ours.decode(latents))
    raw = stock.vae.encode(video).latent_dist.mode()
    torch.testing.assert_close(latents * ours.latents_std + ours.latents_mean, raw, rtol=0, atol=1e-5)
    assert torch.equal(original.encode_image(video[:, :, 0]), ours.encode_image(video[:, :, 0]))
    for a, b in zip(original.encode_prompts(["a ball", ""]), ours.encode_prompts(["a ball", ""]), strict=True):
        assert torch.equal(a, b)


def test_the_text_encoder_is_wans(twins):
    """Against a plain forward pass over the original file's own names (Wan's T5 with a position bias per block)."""
    w = torch.load(twins[1] / TEXT_FILE, weights_only=True)
    tokens = torch.tensor([[5, 9, 200, 31, 7, 1]])
    far = torch.arange(6)[None, :] - torch.arange(6)[:, None]  # key - query; below 8 a bucket per distance
    buckets = far.abs() + 16 * (far > 0)

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    x = w["token_embedding.weight"][tokens[0]]
    for i in range(2):
        b = f"blocks.{i}."
        h = rms(x, w[f"{b}norm1.weight"])
        q, k, v = (linear(h, w[f"{b}attn.{n}.weight"]).view(6, 4, 4).transpose(0, 1) for n in "qkv")
        bias = w[f"{b}pos_embedding.embedding.weight"][buckets].permute(2, 0, 1)
        attended = (q @ k.mT + bias).softmax(-1) @ v  # T5 does not scale
        x = x + linear(attended.transpose(0, 1).flatten(1), w[f"{b}attn.o.weight"])
        h = rms(x, w[f"{b}norm2.weight"])
        gate = gelu(linear(h, w[f"{b}ffn.gate.0.weight"]), approximate="tanh")
        x = x + linear(linear(h, w[f"{b}ffn.fc1.weight"]) * gate, w[f"{b}ffn.fc2.weight"])
    with torch.no_grad():
        encoded = open_text_encoder(twins[1], torch.float32)(tokens, torch.ones_like(tokens)).last_hidden_state[0]
    torch.testing.assert_close(encoded, rms(x, w["norm.weight"]), rtol=1e-5, atol=1e-5)


def test_the_image_encoder_is_wans(twins):
    """Against a plain forward pass over the original file's own names, up to the last block but one."""
    w = torch.load(twins[1] / IMAGE_FILE, weights_only=True)
    image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, x.shape[-1:], w[f"visual.{name}.weight"], w[f"visual.{name}.bias"])

    def dense(x: Tensor, name: str) -> Tensor:
        return linear(x, w[f"visual.{name}.weight"], w[f"visual.{name}.bias"])

    patches = conv2d(image, w["visual.patch_embedding.weight"], stride=4).flatten(2).mT[0]
    x = norm(torch.cat([w["visual.cls_embedding"][0], patches]) + w["visual.pos_embedding"][0], "pre_norm")
    for i in range(2):
        b = f"transformer.{i}"
        q, k, v = dense(norm(x, f"{b}.norm1"), f"{b}.attn.to_qkv").view(17, 3, 2, 80).permute(1, 2, 0, 3)
        attended = (q @ k.mT / math.sqrt(80)).softmax(-1) @ v
        x = x + dense(attended.transpose(0, 1).flatten(1), f"{b}.attn.proj")
        x = x + dense(gelu(dense(norm(x, f"{b}.norm2"), f"{b}.mlp.0")), f"{b}.mlp.2")
    encoder = open_image_encoder(twins[1], torch.float32)
    assert encoder is not None
    with torch.no_grad():
        hidden = encoder(image, output_hidden_states=True).hidden_states
    torch.testing.assert_close(hidden[-2][0], x, rtol=1e-5, atol=1e-5)


def test_image_tokens_are_wans_clip_features_of_the_squashed_frame(twins):
    """Wan's order of steps: the frame in [-1, 1] to the encoder's square, then to [0, 1], then CLIP's statistics."""
    encoders = WanEncoders(str(twins[1]), "float32", 512)
    frame = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    squashed = interpolate(frame, (16, 16), mode="bicubic", align_corners=False) * 0.5 + 0.5
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = (squashed - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    with torch.no_grad():
        hidden = encoders.image_encoder(pixels, output_hidden_states=True).hidden_states
    tokens = encoders.encode_image(frame)
    torch.testing.assert_close(tokens, hidden[-2], rtol=0, atol=1e-4)
    assert tokens.shape == (1, 17, 160)


def test_without_an_image_the_transformer_gets_zeros_which_is_not_no_image_tokens(twins):
    """VideoX-Fun's own way: the tokens are zeroed before the projection, whose norms and biases stay."""
    transformer = load_transformer(str(twins[1]), "float32")
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 36, 2, 4, 6, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 512, 16, generator=generator),
        "return_dict": False,
    }
    with torch.no_grad():
        zeros = transformer(**inputs, encoder_hidden_states_image=torch.zeros(1, 17, 160))[0]
        other = transformer(**inputs, encoder_hidden_states_image=torch.randn(1, 17, 160, generator=generator))[0]
        projected = transformer.condition_embedder.image_embedder(torch.zeros(1, 17, 160))
    assert projected.abs().max() > 0 and (projected - projected[:, :1]).abs().max() == 0
    assert (zeros - other).abs().max() > 1e-4


def test_a_text_encoder_whose_file_holds_the_embedding_once_is_whole(twins, tmp_path):
    """As Wan's own in diffusers layout; transformers 5 leaves the encoder's embedding empty then."""
    folder = shutil.copytree(twins[0], tmp_path / "once")
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("encoder.embed_tokens.weight", None)
    save_file(tensors, file, {"format": "pt"})
    tokens = torch.tensor([[5, 9, 200, 1]])
    once, twice = (open_text_encoder(f, torch.float32)(tokens).last_hidden_state for f in (folder, twins[0]))
    assert torch.equal(once, twice) and once.std() > 0.1


def test_bfloat16_is_the_same_in_both_layouts_and_float32_where_wan_keeps_it(twins):
    ours, original = (load_transformer(str(folder), "bfloat16") for folder in twins)
    for (name, a), (_, b) in zip(ours.named_parameters(), original.named_parameters(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    assert {p.dtype for p in original.parameters()} == {torch.float32, torch.bfloat16}
    encoders = WanEncoders(str(twins[1]), "bfloat16", 512)
    assert {p.dtype for p in encoders.vae.parameters()} == {torch.float32}
    assert {p.dtype for p in encoders.text_encoder.parameters()} == {torch.bfloat16}
    assert encoders.text_encoder.encoder.embed_tokens.weight is encoders.text_encoder.shared.weight


@pytest.mark.parametrize("layout", [0, 1], ids=["diffusers", "original"])
def test_one_tensor_of_a_file_is_held_at_a_time(layout, twins, monkeypatch):
    handed_out: list[weakref.ref[Tensor]] = []
    read = TensorFiles.read

    def watched(self: TensorFiles, name: str) -> Tensor:
        assert sum(tensor() is not None for tensor in handed_out) == 0, name
        tensor = read(self, name)
        handed_out.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(TensorFiles, "read", watched)
    load_transformer(str(twins[layout]), "bfloat16")
    WanEncoders(str(twins[layout]), "bfloat16", 512)
    assert len(handed_out) > 300


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="the kernel does not tell what is mapped")
def test_a_pth_file_is_mapped_not_read(twins):
    files = TensorFiles([twins[1] / TEXT_FILE], twins[1])
    assert files.shape("token_embedding.weight") == [384, 16]
    assert str(twins[1] / TEXT_FILE) in Path("/proc/self/maps").read_text()


def cut(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("name", [TRANSFORMER_FILE, VAE_FILE, TEXT_FILE, IMAGE_FILE])
def test_a_truncated_file_is_named(name, original):
    cut(original, name)
    with pytest.raises(ConfigError, match=f"{name}.*damaged or cut short"):
        load_transformer(str(original), "float32")
        WanEncoders(str(original), "float32", 512)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "image_encoder"])
def test_a_truncated_file_in_diffusers_layout_is_named(part, twins, tmp_path):
    folder = shutil.copytree(twins[0], tmp_path / "ours")
    file = next((folder / part).glob("*.safetensors"))
    cut(folder, str(file.relative_to(folder)))
    with pytest.raises(ConfigError, match=f"{part}/{file.name}.*damaged or cut short"):
        load_transformer(str(folder), "float32")
        WanEncoders(str(folder), "float32", 512)


WRONG = {  # file, tensor, what is done to it
    "missing": (TEXT_FILE, "blocks.1.ffn.gate.0.weight", "is missing"),
    "unexpected": (VAE_FILE, "encoder.another.weight", "is unexpected"),
    "of another shape": (IMAGE_FILE, "visual.transformer.1.attn.to_qkv.weight", r"is \[3, 3\]"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_tensor_is_told_with_file_and_key(fault, original):
    name, key, told = WRONG[fault]
    tensors = torch.load(original / name, weights_only=True)
    tensors.pop(key, None)
    if fault != "missing":
        tensors[key] = torch.zeros(3, 3)
    torch.save(tensors, original / name)
    with pytest.raises(ConfigError, match=f"{name}: {key} {told}"):
        WanEncoders(str(original), "float32", 512)


def split_in_shards(folder: Path) -> list[Path]:
    """As Wan-AI publishes the 14B: several files and an index."""
    tensors = load_file(folder / TRANSFORMER_FILE)
    (folder / TRANSFORMER_FILE).unlink()
    names, shards = sorted(tensors), []
    for i, half in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        shards.append(folder / f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors")
        save_file({name: tensors[name] for name in half}, shards[-1])
    weight_map = {name: shards[names.index(name) >= len(names) // 2].name for name in names}
    (folder / f"{TRANSFORMER_FILE}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return shards


def test_shards_open_as_one_file_and_a_gap_is_told_with_its_shard(twins, original):
    _, second = split_in_shards(original)
    for (name, a), (_, b) in zip(
        load_transformer(str(original), "float32").named_parameters(),
        load_transformer(str(twins[1]), "float32").named_parameters(),
        strict=True,
    ):
        assert torch.equal(a, b), name
    tensors = load_file(second)
    removed = sorted(tensors)[0]
    del tensors[removed]
    save_file(tensors, second)
    with pytest.raises(ConfigError, match=f"{second.name}: {removed} is missing"):
        load_transformer(str(original), "float32")
    second.unlink()
    assert lacking(original) == f"{original} lacks {second.name}"


def test_diffusers_shards_open_too(twins, tmp_path):
    folder = shutil.copytree(twins[0], tmp_path / "sharded")
    shutil.rmtree(folder / "transformer")
    load_transformer(str(twins[0]), "float32").save_pretrained(folder / "transformer", max_shard_size="20KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    opened, whole = (load_transformer(str(f), "float32").state_dict() for f in (folder, twins[0]))
    assert all(torch.equal(opened[name], whole[name]) for name in whole)


def test_foreign_pickles_are_refused_unopened(original, tmp_path):
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return eval, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    torch.save({"norm.weight": Evil()}, original / TEXT_FILE)
    with pytest.raises(ConfigError, match=f"{TEXT_FILE}: holds more than tensors"):
        open_text_encoder(original, torch.float32)
    torch.save([1, 2], original / TEXT_FILE)
    with pytest.raises(ConfigError, match=f"{TEXT_FILE}: is no table of tensors"):
        open_text_encoder(original, torch.float32)
    assert not (tmp_path / "ran").exists()


OTHERS = {  # a change of config.json, words of the line
    "camera control": ({"add_control_adapter": True}, "add_control_adapter is on"),
    "reference control": ({"add_ref_conv": True}, "add_ref_conv is on"),
    "first and last frame": ({"model_type": "flf2v"}, "flf2v"),
    "Wan 2.2": ({"cross_attn_type": "cross_attn"}, "cross_attn_type 'cross_attn'"),
    "text to video": ({"in_dim": 16}, "takes 16 input channels, One4D needs an inpainting"),
    "half a config": ({"dim": None}, "has no number dim"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_wan_is_told_by_its_config(other, original):
    change, words = OTHERS[other]
    config = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps(config | {"add_ref_conv": False} | change))
    with pytest.raises(ConfigError, match=words):
        load_transformer(str(original), "float32")


@pytest.mark.parametrize("name", [TRANSFORMER_FILE, VAE_FILE, TEXT_FILE, IMAGE_FILE, "google/umt5-xxl"])
def test_what_an_original_folder_lacks_is_named(name, original):
    assert lacking(original) is None
    (shutil.rmtree if name.startswith("google") else Path.unlink)(original / name)
    with pytest.raises(ConfigError) if name == VAE_FILE else contextlib.nullcontext():
        check_paths(load_config([], [f"base.path={original}", "data.toy={}", *TOY]))
    told = lacking(original)
    assert told is not None and ("lacks" in told or name == VAE_FILE)


TOY = [
    "data.sources=[{path: data/toy/train_synthetic}, {path: data/toy/train_real}]",
    "data.val_sources=[{path: data/toy/val}]",
]


def test_the_fingerprint_knows_both_layouts(twins, original):
    prints = [fingerprint(str(folder)) for folder in (*twins, original)]
    assert prints[0] != prints[1] == prints[2]
    encoders = partial(fingerprint, str(original), PARTS[1:])
    before = encoders()
    tensors = load_file(original / TRANSFORMER_FILE)
    tensors["head.modulation"] += 1e-3
    save_file(tensors, original / TRANSFORMER_FILE)
    assert fingerprint(str(original)) != prints[1] and encoders() == before
    text = torch.load(original / TEXT_FILE, weights_only=True)
    text["norm.weight"] += 1e-3
    torch.save(text, original / TEXT_FILE)
    assert encoders() != before

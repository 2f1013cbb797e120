"""Laws of texts: what means "none" is none, what is no text is refused by name, in every reader of captions."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.captions import CaptionOptions, best_caption, read_table
from data_prep.sources import registry
from one4d_pl.data.clip_codec import clip_fault, decode_clip
from one4d_pl.data.shards import ShardSet, ShardSetError, pack_clip, write_shards
from one4d_pl.data.texts import caption_text, licence_text
from one4d_pl.toy.world import render_clip
from tests.data_prep import raw_layouts as raw
from tests.data_prep.raw_layouts import film

NOTHING = [None, math.nan, "", "  ", "None", "nan", "NULL", "<NA>", "N/A"]
NO_TEXT = [3, 2.5, True, ["a", "b"], {"a": 1}]


@pytest.fixture(scope="module")
def shot() -> raw.Shot:
    return film(height=16, width=24)


@pytest.mark.parametrize("value", NOTHING, ids=repr)
def test_what_means_none_is_no_caption_and_no_licence(value):
    assert caption_text(value) == ""
    with pytest.raises(ValueError, match="the licence is"):
        licence_text(value)


@pytest.mark.parametrize("value", NO_TEXT, ids=repr)
def test_what_is_no_text_is_refused(value):
    for read in (caption_text, licence_text):
        with pytest.raises(ValueError, match="need") as caught:
            read(value)
        assert repr(value) in str(caught.value)


def test_words_are_words():
    assert caption_text("None of the toys moves.") == "None of the toys moves." and licence_text("CC0-1.0") == "CC0-1.0"


def generic_captions(root: Path) -> list[str]:
    return [clip.caption for clip in registry.iter_clips("generic", root, 9)]


@pytest.mark.parametrize("value", NOTHING, ids=repr)
def test_generic_clips_of_no_caption_and_of_no_licence(tmp_path, shot, value, caplog):
    root = raw.write_generic_folder(tmp_path, shot)
    path = root / "scene_one" / "clip.json"
    about = {"fps": 12, "licence": "CC0-1.0", "domain": None}
    path.write_text(json.dumps({**about, "caption": value}))
    assert generic_captions(root) == [""]
    path.write_text(json.dumps({**about, "licence": value}))
    assert generic_captions(root) == [] and "scene_one: the licence is" in caplog.text


@pytest.mark.parametrize("field", ["caption", "licence", "domain", "fps"])
@pytest.mark.parametrize("value", [["a", "b"], {"a": 1}, True], ids=repr)
def test_generic_clips_name_what_is_no_text(tmp_path, shot, field, value, caplog):
    root = raw.write_generic_folder(tmp_path, shot)
    about = {"fps": 12, "licence": "CC0-1.0", field: value}
    (root / "scene_one" / "clip.json").write_text(json.dumps(about))
    assert generic_captions(root) == [] and f"{field} is {value!r}" in caplog.text


def test_generic_archives_follow_the_same_rule(tmp_path, shot, caplog):
    captions = {"a": np.float64("nan"), "b": np.array("None"), "c": np.int64(4), "d": np.array("toys")}
    for name, caption in captions.items():
        texts = {"fps": np.float64(12), "licence": np.array("CC0-1.0"), "caption": caption}
        np.savez(tmp_path / f"{name}.npz", frames=shot.frames, **texts, **raw.generic_arrays(shot))
    assert generic_captions(tmp_path) == ["", "", "toys"]
    assert "c.npz: the caption is 4, need a text" in caplog.text


@pytest.mark.parametrize(
    ("source", "tree", "caption"),
    [
        ("spatialvid", None, ""),
        ("spatialvid", {"SceneDescription": None, "CameraMotion": "It turns."}, "It turns."),
        ("spatialvid", {"SceneDescription": math.nan, "CameraMotion": "None"}, ""),
        ("spatialvid", {"SceneDescription": ["a"]}, ["a"]),
        ("spatialvid", [1, 2], [1, 2]),
        ("omniworld", {"Video_Caption": None}, ""),
        ("omniworld", {"Video_Caption": math.nan}, ""),
        ("omniworld", {"start": 3, "Short_Caption": "toys", "Long": "none"}, "toys"),
        ("omniworld", {"Video_Caption": 7}, 7),
        ("omniworld", ["a"], ["a"]),
    ],
)
def test_captions_of_the_datasets_own_files(tmp_path, shot, source, tree, caption, caplog):
    root = {"spatialvid": raw.write_spatialvid, "omniworld": raw.write_omniworld}[source](tmp_path, shot)
    (path,) = root.glob("annotations/*/*/caption.json" if source == "spatialvid" else "*/text/7_87.json")
    path.write_text(json.dumps(tree))
    found = [clip.caption for clip in registry.iter_clips(source, root, 9)]
    assert found == ([caption] if isinstance(caption, str) else [])
    assert isinstance(caption, str) or f"{path.name}: the caption is {caption!r}" in caplog.text


def test_a_table_without_a_caption_leaves_the_datasets_own(tmp_path):
    table = tmp_path / "t.jsonl"
    rows = [{"key": f"k{n}", "caption": value} for n, value in enumerate(NOTHING)] + [{"key": "last", "caption": "new"}]
    table.write_text("\n".join(map(json.dumps, rows)))
    assert read_table(table) == {"last": "new"}
    (tmp_path / "t.csv").write_text("key,caption\na,nan\nb,\nc,None\nd\ne,new\n")
    assert read_table(tmp_path / "t.csv") == {"e": "new"}
    clip = replace(render_clip(3, 9, 16, 24), key="k0", caption="own")
    assert best_caption(clip, "", CaptionOptions(table=str(table))) == "own"
    for value in NO_TEXT:
        table.write_text(json.dumps({"key": "a", "caption": value}))
        with pytest.raises(ValueError, match=r"t\.jsonl: row 1: the caption is"):
            read_table(table)


def test_shards_hold_texts_alone(tmp_path):
    clip = replace(render_clip(3, 9, 16, 24), caption="words")
    for field in ("caption", "source", "licence"):
        for value in ("nan", "None", 5, ["a"], None):
            assert field in str(clip_fault(replace(clip, **{field: value})))
    for stored, read in (("None", ""), (None, ""), ("words", "words")):
        content = pack_clip(clip, "scene", "")[1]
        changed = _with_caption(content, stored)
        assert decode_clip(changed, clip.key, (9, 16, 24)).caption == read
    folder = tmp_path / "set"
    write_shards([clip], folder, samples_per_shard=1)
    manifest = folder / "manifest.json"
    tree = json.loads(manifest.read_text())
    for value in (None, "nan", 3):
        manifest.write_text(json.dumps({**tree, "licence": value}))
        with pytest.raises(ShardSetError, match="the licence is"):
            ShardSet.open(folder)


def _with_caption(content: bytes, caption: str | None) -> bytes:
    import io
    import tarfile

    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(content)) as old, tarfile.open(fileobj=out, mode="w") as new:
        for member in old:
            data = old.extractfile(member).read()
            if member.name.endswith("meta.json"):
                data = json.dumps({**json.loads(data), "caption": caption}).encode()
                member.size = len(data)
            new.addfile(member, io.BytesIO(data))
    return out.getvalue()

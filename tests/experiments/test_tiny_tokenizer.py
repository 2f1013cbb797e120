"""The tiny base's tokenizer: a word of the toy world is one token, any other text comes back whole."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from experiments.tiny_wan.tokenizer import toy_tokenizer
from one4d_pl.toy.levels import THING_COLOURS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    toy_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)  # as every base's is opened


@pytest.mark.parametrize("colour", THING_COLOURS)
def test_a_colour_is_one_token(tokenizer: PreTrainedTokenizerBase, colour: str) -> None:
    assert len(tokenizer(f"a {colour} ball").input_ids) == 4  # </s> included


@pytest.mark.parametrize("text", ["", "A red ball.", "zwölf Boxkämpfer", "猫が走る", "two\nlines\tand 🙂"])
def test_any_text_comes_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids[-1] == tokenizer.eos_token_id == 1
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_padding_is_masked(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenizer(["a ball", "a red ball walks"], padding="longest", return_attention_mask=True)
    assert tokens.input_ids[0][-1] == tokenizer.pad_token_id == 0
    assert tokens.attention_mask[0][-1] == 0

"""The tiny base's tokenizer: byte pairs learnt on toy captions, whose words are one token each."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from one4d_pl.toy.levels import LEVELS
from one4d_pl.toy.world import exact_clip

PAD, END, UNKNOWN = SPECIAL = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2, as T5 has them
VOCABULARY = 512  # tokens at most, 256 of them bytes
CAPTIONS = 400  # per level


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """Learn the tokenizer from captions of every level of the toy world.

    A caption of `clear` has about 35 tokens. Any other text is spelt in shorter pieces, down to bytes.
    """
    return learn_tokenizer(
        exact_clip(seed, 9, 24, 32, "synthetic", level).caption for level in LEVELS for seed in range(CAPTIONS)
    )


def learn_tokenizer(captions: Iterable[str]) -> PreTrainedTokenizerFast:
    """Learn byte pairs from captions; each text ends with </s>, as Wan's texts do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN)

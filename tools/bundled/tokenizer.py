"""The closed vocabulary of the bundled language as a Hugging Face tokenizer: one token a piece, as GPT-2 writes spaces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exegete.tools.bundled.lexicon import pieces

BOS, EOS, PAD, UNK = "<bos>", "<eos>", "<pad>", "<unk>"

_WORDS = r"\n| ?[A-Za-z]+|_[a-z]+| ?[0-9]+| (?:[<>!]=|[=<>*';])|\S|\s"
"""Splits any text; words that the vocabulary lacks become `<unk>` without disturbing their neighbours."""


def build_tokenizer() -> Any:
    """Return the tokenizer, a `PreTrainedTokenizerFast`; it adds no special tokens of its own accord."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {piece: number for number, piece in enumerate([BOS, EOS, PAD, UNK, *pieces()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, which `AutoTokenizer.from_pretrained(folder)` loads."""
    build_tokenizer().save_pretrained(folder)

"""What the text of a token is, whatever the kind of tokenizer.

The pieces of a context, joined, must read like its text, and every token must stay recognisable by its piece. So bytes
that are no character of their own (a third of "€", say) are written `<0xE2>`, as sentencepiece names them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from exegete.tools.seeds import digest


def token_pieces(tokenizer: Any, vocabulary: int = 0) -> list[str]:
    """Return the text of every token: at least `vocabulary` of them, `<|17|>` for a number that has no token.

    For example " the", ".", "\\n"; a leading space belongs to its word.
    """
    size = max(len(tokenizer), vocabulary)
    known = min(len(tokenizer), size)
    names = tokenizer.convert_ids_to_tokens(list(range(known)))
    literal = {int(token): str(added) for token, added in tokenizer.added_tokens_decoder.items()}
    read = _reader(tokenizer, [name for name in names if name])
    pieces = [literal.get(i, read(name) if name else f"<|{i}|>") for i, name in enumerate(names)]
    return pieces + [literal.get(i, f"<|{i}|>") for i in range(known, size)]


def special_tokens(tokenizer: Any) -> frozenset[int]:
    """Return the tokens that no text spells: beginning, end, padding, turns of a chat. The unknown word is not one."""
    special = set(tokenizer.all_special_ids)
    special |= {int(token) for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    roles = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    if tokenizer.unk_token_id not in roles:
        special.discard(tokenizer.unk_token_id)
    return frozenset(special)


def tokenizer_digest(tokenizer: Any) -> str:
    """Return `sha256:…` over everything that decides how text becomes tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
        return digest(type(tokenizer).__name__, vocabulary)
    # Truncation and padding are settings of the last call, not of the tokenizer.
    settings = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    return digest(json.dumps(settings, sort_keys=True))


def _reader(tokenizer: Any, names: list[str]) -> Callable[[str], str]:
    """Return the function from a token's name in the vocabulary to its text."""
    kinds = _decoder_kinds(tokenizer)
    if "ByteLevel" in kinds:
        return _byte_level
    if kinds & {"Metaspace", "ByteFallback"} or any(name.startswith("▁") for name in names):
        return _sentencepiece
    if "WordPiece" in kinds:
        return lambda name: name.removeprefix("##") if name.startswith("##") else f" {name}"
    if kinds:
        return _probing(tokenizer)
    # No decoder: whole words, which a text separates by spaces.
    return lambda name: f" {name}"


def _decoder_kinds(tokenizer: Any) -> set[str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.loads(backend.to_str()).get("decoder") if backend is not None else None
    if decoder is None:
        return set()
    return {step["type"] for step in decoder.get("decoders", [decoder])}


def _byte_level(name: str) -> str:
    bytes_of = _byte_alphabet()
    if any(character not in bytes_of for character in name):
        return name
    return _text(bytes(bytes_of[character] for character in name))


def _sentencepiece(name: str) -> str:
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return _text(bytes([int(name[3:5], 16)]))
    return name.replace("▁", " ")


def _probing(tokenizer: Any) -> Callable[[str], str]:
    """Read a token as what it adds to the text of another one, for decoders of any other kind."""
    before = tokenizer.convert_ids_to_tokens(0)
    text_before = tokenizer.backend_tokenizer.decoder.decode([before])

    def read(name: str) -> str:
        return str(tokenizer.backend_tokenizer.decoder.decode([before, name])).removeprefix(text_before)

    return read


def _text(data: bytes) -> str:
    """Decode UTF-8, writing each byte that is no character as `<0xE2>`."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        odd = "".join(f"<0x{byte:02X}>" for byte in data[error.start : error.end])
        return data[: error.start].decode() + odd + _text(data[error.end :])


def _byte_alphabet() -> dict[str, int]:
    """Return the characters by which byte-level BPE writes bytes (GPT-2's `bytes_to_unicode`, inverted)."""
    global _ALPHABET
    if not _ALPHABET:
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        _ALPHABET = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    return _ALPHABET


_ALPHABET: dict[str, int] = {}

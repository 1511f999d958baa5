"""Rules as one readable sentence. Kinds of the same sort are listed together."""

from __future__ import annotations

from collections.abc import Sequence

from exegete.tools.explainers.rules import Key
from exegete.tools.predicates import quote

_PLURAL = {
    "w": ("the word", "the words"),
    "p": ("words that start with", "words that start with"),
    "s": ("words that end in", "words that end in"),
    "c": ("words that contain", "words that contain"),
    "t": ("the token", "the tokens"),
    "i": ("tokens that contain", "tokens that contain"),
    "b1": ("the token right after the word", "the token right after one of the words"),
    "b3": ("tokens up to three after the word", "tokens up to three after one of the words"),
    "a1": ("the token right before the word", "the token right before one of the words"),
}
_CONTEXT = {"b1": "right after", "b3": "up to three tokens after", "a1": "right before"}


def sentence(keys: Sequence[Key]) -> str:
    """Return what the rules say, for example `Fires on the words "of", "the"; words that end in "ing".`"""
    grouped: dict[str, list[str]] = {}
    phrases: list[str] = []
    for key in keys:
        if key[0] in _PLURAL:
            grouped.setdefault(key[0], []).append(quote(key[1]))
        else:
            phrases.append(_phrase(key))
    listed = [f"{_PLURAL[kind][len(values) > 1]} {', '.join(values)}" for kind, values in grouped.items()]
    return f"Fires on {'; '.join(listed + phrases)}."


def _phrase(key: Key) -> str:
    if key[0] == "&":
        context = key[2]
        if context[0] == "z":
            return f"{_phrase(key[1])} at the start of the window"
        return f"{_phrase(key[1])} {_CONTEXT[context[0]]} the word {quote(context[1])}"
    if key[0] == "m":
        return f"{key[1]}"
    if key[0] == "z":
        return "the first token of the window"
    return f"{_PLURAL[key[0]][0]} {quote(key[1])}"

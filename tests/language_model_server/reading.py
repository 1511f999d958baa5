"""What a judge reads in a prompt: the one place that knows what the prompts look like (`prompts/*.j2`).

1. The question is the last user message that holds a window; those before it are examples, one after it asks for a repair.
2. `<explanation>…</explanation>` and `<window N>…</window>` stand on lines of their own; `<<…>>` marks a run of tokens.
3. It is fuzzing where the instructions speak of marked tokens, else detection.
4. Tokens are not in a prompt: text is cut anew as GPT-2 cuts it, roughly, at words with their leading space, and at
   the borders of marks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_WINDOW = re.compile(r"^<window (\d+)>(.*)</window>$", re.MULTILINE)
_EXPLANATION = re.compile(r"^<explanation>(.*)</explanation>$", re.MULTILINE)
_MARKED = re.compile(r"<<(.*?)>>")
_TOKEN = re.compile(r"\n| ?[^\W\d_]+|_[a-z]+| ?[0-9]+| (?:[<>!]=|[=<>*';])|\S|\s")
_VISIBLE = str.maketrans({"‹": "<", "›": ">", "ˋ": "`", "⏎": "\n", "→": "\t", "［": "["})


class Unreadable(Exception):
    """The prompt holds no question of the kind that this judge answers."""


@dataclass(frozen=True, slots=True)
class ReadWindow:
    """A window as it stands in a prompt."""

    rendered: str
    """Between its tags, byte for byte."""
    tokens: tuple[str, ...]
    """As cut anew from the text, escapes undone."""
    marked: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a prompt asks."""

    task: str
    """detection, fuzzing, or other where it has no explanation to judge."""
    explanation: str
    windows: tuple[ReadWindow, ...]


def read(instructions: str, user: Sequence[str]) -> Reading:
    """Return what the prompt asks, from its system text and its user messages.

    Raises:
        Unreadable: no message has windows numbered from 1.
    """
    question = next((text for text in reversed(user) if _WINDOW.search(text)), None)
    if question is None:
        raise Unreadable("no window in the prompt")
    found = _WINDOW.findall(question)
    if [int(number) for number, _ in found] != list(range(1, len(found) + 1)):
        raise Unreadable("windows are not numbered from 1")
    explanations = _EXPLANATION.findall(question)
    if len(explanations) > 1:
        raise Unreadable("several explanations")
    task = "other" if not explanations else "fuzzing" if "marked tokens" in instructions else "detection"
    windows = tuple(_window(text) for _, text in found)
    return Reading(task, explanations[0] if explanations else "", windows)


def original(text: str) -> str:
    """Undo the escapes of rendered text, as far as they can be undone."""
    return text.translate(_VISIBLE)


def _window(rendered: str) -> ReadWindow:
    tokens: list[str] = []
    marked: list[bool] = []
    for number, segment in enumerate(_MARKED.split(rendered)):
        pieces = _TOKEN.findall(original(segment))
        tokens += pieces
        marked += [number % 2 == 1] * len(pieces)
    return ReadWindow(rendered, tuple(tokens), tuple(marked))

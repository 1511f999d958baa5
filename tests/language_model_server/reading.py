"""What is asked in a prompt: the one place that knows what the prompts look like (`prompts/*.j2`).

1. The question is the last user message with numbered tags; those before it are examples, one after it asks for a repair.
2. Tags stand on lines of their own: `<explanation>…</explanation>`, `<window N>…</window>`, `<silent N>…</silent>`,
   `<continuation N>…`, `<hypothesis N …>…`, and `<passage>` with lines `N: token`. `<<…>>` marks a run of tokens.
3. With an explanation, windows are detection, or fuzzing where the instructions speak of marked tokens; a passage is
   simulation; continuations are a choice. Without one, windows are to be explained and hypotheses to be merged.
4. Tokens of windows are not in a prompt: text is cut anew as GPT-2 cuts it, roughly, at words with their leading space,
   and at the borders of marks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Task = Literal["detection", "fuzzing", "simulation", "choice", "explain", "merge"]
_TAGS = re.compile(r"^<(window|silent|continuation|hypothesis|predicate) (\d+)[^>\n]*>(.*)</\1>$", re.MULTILINE)
_EXPLANATION = re.compile(r"^<explanation>(.*)</explanation>$", re.MULTILINE)
_PASSAGE = re.compile(r"^<passage>\n(.*?)^</passage>$", re.MULTILINE | re.DOTALL)
_SCHEMA = re.compile(r"JSON Schema, and with nothing else:\n(\{.*\})$", re.MULTILINE)
_MARKED = re.compile(r"<<(.*?)>>")
_TOKEN = re.compile(r"\n| ?[^\W\d_]+|_[a-z]+| ?[0-9]+| (?:[<>!]=|[=<>*';])|\S|\s")
_VISIBLE = str.maketrans({"‹": "<", "›": ">", "ˋ": "`", "⏎": "\n", "→": "\t", "［": "["})


class Unreadable(Exception):
    """The prompt holds no question of a kind that is known here."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of corpus text as it stands in a prompt."""

    rendered: str
    """Between its tags, byte for byte."""
    tokens: tuple[str, ...]
    """As cut anew from the text, escapes undone."""
    marked: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a prompt asks."""

    task: Task
    explanation: str = ""
    passages: tuple[Passage, ...] = ()
    """Windows, continuations, or the one passage of a simulation."""
    silent: tuple[Passage, ...] = ()
    hypotheses: tuple[str, ...] = ()
    predicates: tuple[str, ...] = ()


def read(instructions: str, user: Sequence[str]) -> Reading:
    """Return what the prompt asks, from its system text and its user messages.

    Raises:
        Unreadable: no message asks anything that is known, or tags are not numbered from 1.
    """
    question = next((text for text in reversed(user) if _TAGS.search(text) or _PASSAGE.search(text)), None)
    if question is None:
        raise Unreadable("no numbered tags and no passage in the prompt")
    explanations = _EXPLANATION.findall(question)
    if len(explanations) > 1:
        raise Unreadable("several explanations")
    explanation = "".join(explanations)
    simulated = _PASSAGE.search(question)
    if simulated:
        return Reading("simulation", explanation, (_listed(simulated[1]),))
    windows, continuations = _tagged(question, "window"), _tagged(question, "continuation")
    if explanation and continuations:
        return Reading("choice", explanation, tuple(map(_passage, continuations)))
    if explanation and windows:
        task: Task = "fuzzing" if "marked tokens" in instructions else "detection"
        return Reading(task, explanation, tuple(map(_passage, windows)))
    if windows:
        silent = tuple(map(_passage, _tagged(question, "silent")))
        return Reading("explain", "", tuple(map(_passage, windows)), silent)
    hypotheses = tuple(_tagged(question, "hypothesis"))
    if not hypotheses:
        raise Unreadable("nothing that is known is asked")
    predicates = tuple(original(text) for tag, _, text in _TAGS.findall(question) if tag == "predicate")
    return Reading("merge", hypotheses=hypotheses, predicates=predicates)


def schema_in_words(user: Sequence[str]) -> Mapping[str, Any] | None:
    """Return the JSON Schema that the last user message asks for in words, None where it asks for none."""
    found = _SCHEMA.findall(user[-1]) if user else []
    schema: Mapping[str, Any] | None = json.loads(original(found[-1])) if found else None
    return schema


def original(text: str) -> str:
    """Undo the escapes of rendered text, as far as they can be undone."""
    return text.translate(_VISIBLE)


def _tagged(question: str, tag: str) -> list[str]:
    found = [(int(number), text) for name, number, text in _TAGS.findall(question) if name == tag]
    if [number for number, _ in found] != list(range(1, len(found) + 1)):
        raise Unreadable(f"{tag}s are not numbered from 1")
    return [text for _, text in found]


def _passage(rendered: str) -> Passage:
    tokens: list[str] = []
    marked: list[bool] = []
    for number, segment in enumerate(_MARKED.split(rendered)):
        pieces = _TOKEN.findall(original(segment))
        tokens += pieces
        marked += [number % 2 == 1] * len(pieces)
    return Passage(rendered, tuple(tokens), tuple(marked))


def _listed(lines: str) -> Passage:
    """The passage of a simulation: its tokens one on a line, numbered."""
    numbered = [row.partition(": ") for row in lines.splitlines()]
    if [number for number, _, _ in numbered] != [str(n + 1) for n in range(len(numbered))]:
        raise Unreadable("tokens are not numbered from 1")
    tokens = tuple(original(token) for _, _, token in numbered)
    return Passage(lines, tokens, (False,) * len(tokens))

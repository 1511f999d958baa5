"""What is asked in a prompt: the one place that knows what the prompts look like (`prompts/*.j2`).

1. The question is the last user message with numbered tags; those before it are examples, one after it asks for a repair.
2. Tags stand on lines of their own: `<explanation>…</explanation>`, `<window N>…</window>`, `<silent N>…</silent>`,
   `<missed N>…`, `<claimed N>…`, `<continuation N>…`, `<hypothesis N …>…`, `<promoted …>…`; `<list N>` with a token on a
   line, and `<passage>` with lines `N: token`. `<<…>>` marks a run of tokens.
3. With an explanation, windows are rated where the instructions say so, else they are detection, or fuzzing where the
   instructions speak of marked tokens; a passage is simulation; continuations and lists are a choice; texts are to be
   written where so many are asked for. Without one, windows and promoted tokens are to be explained, hypotheses merged.
   A draft is to be put right: missed passages are further windows, claimed ones further silent passages.
4. Tokens of windows are not in a prompt: text is cut anew as GPT-2 cuts it, roughly, at words with their leading space,
   and at the borders of marks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Task = Literal["detection", "fuzzing", "rating", "simulation", "choice", "write", "explain", "merge"]
_NUMBERED = "window|silent|missed|claimed|continuation|hypothesis|predicate"
_TAGS = re.compile(rf"^<({_NUMBERED}) (\d+)[^>\n]*>(.*)</\1>$", re.MULTILINE)
_EXPLANATION = re.compile(r"^<explanation>(.*)</explanation>$", re.MULTILINE)
_PASSAGE = re.compile(r"^<passage>\n(.*?)^</passage>$", re.MULTILINE | re.DOTALL)
_LIST = re.compile(r"^<list (\d+)>\n(.*?)^</list \1>$", re.MULTILINE | re.DOTALL)
_PROMOTED = re.compile(r"^<promoted[^>\n]*>(.*)</promoted>$", re.MULTILINE)
_SAMPLE = re.compile(r"^<sample>(.*)</sample>$", re.MULTILINE)
_WRITE = re.compile(r"^Write (\d+) texts of either kind\.$", re.MULTILINE)
_QUESTIONS = (_TAGS, _PASSAGE, _LIST, _PROMOTED, _WRITE)
_SCHEMA = re.compile(r"JSON Schema, and with nothing else:\n(\{.*\})$", re.MULTILINE)
_PIECE = re.compile(r'"(?:[^"\\]|\\.)*"')
_MARKED = re.compile(r"<<(.*?)>>")
_TOKEN = re.compile(r"\n| ?[^\W\d_]+|_[a-z]+| ?[0-9]+| (?:[<>!]=|[=<>*';])|\S|\s")
_VISIBLE = str.maketrans({"‹": "<", "›": ">", "ˋ": "`", "⏎": "\n", "→": "\t", "⁅": "["})


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
    """Windows, continuations, lists, samples, or the one passage of a simulation."""
    silent: tuple[Passage, ...] = ()
    hypotheses: tuple[str, ...] = ()
    predicates: tuple[str, ...] = ()
    promoted: tuple[str, ...] = ()
    count: int = 0
    """Texts of either kind to be written."""


def read(instructions: str, user: Sequence[str]) -> Reading:
    """Return what the prompt asks, from its system text and its user messages.

    Raises:
        Unreadable: no message asks anything that is known, or tags are not numbered from 1.
    """
    question = next((text for text in reversed(user) if any(asked.search(text) for asked in _QUESTIONS)), None)
    if question is None:
        raise Unreadable("no numbered tags and no passage in the prompt")
    explanations = _EXPLANATION.findall(question)
    if len(explanations) > 1:
        raise Unreadable("several explanations")
    reading = _judging(instructions, question, explanations[0]) if explanations else _explaining(question)
    if reading is None:
        raise Unreadable("nothing that is known is asked")
    return reading


def _judging(instructions: str, question: str, explanation: str) -> Reading | None:
    """What is asked about an explanation."""
    if simulated := _PASSAGE.search(question):
        return Reading("simulation", explanation, (_listed(simulated[1]),))
    if lists := _LIST.findall(question):
        return Reading("choice", explanation, tuple(_tokens(text.splitlines()) for _, text in lists))
    if continuations := _tagged(question, "continuation"):
        return Reading("choice", explanation, tuple(map(_passage, continuations)))
    if windows := _tagged(question, "window"):
        marked: Task = "fuzzing" if "marked tokens" in instructions else "detection"
        task: Task = "rating" if instructions.startswith("You rate texts") else marked
        return Reading(task, explanation, tuple(map(_passage, windows)))
    if asked := _WRITE.search(question):
        samples = tuple(map(_passage, _SAMPLE.findall(question)))
        return Reading("write", explanation, samples, count=int(asked[1]))
    return None


def _explaining(question: str) -> Reading | None:
    """What is asked where an explanation is wanted."""
    promoted = tuple(_PIECE.findall(original("".join(_PROMOTED.findall(question)))))
    windows, hypotheses = _tagged(question, "window"), tuple(_tagged(question, "hypothesis"))
    if windows or promoted:
        firing = tuple(map(_passage, [*windows, *_tagged(question, "missed")]))
        silent = tuple(map(_passage, _tagged(question, "silent")))
        # What is marked in a claimed passage is what the latent does not fire on.
        claimed = (_passage(one) for one in _tagged(question, "claimed"))
        silent += tuple(replace(one, marked=(False,) * len(one.tokens)) for one in claimed)
        return Reading("explain", "", firing, silent, promoted=tuple(map(json.loads, promoted)))
    predicates = tuple(original(text) for tag, _, text in _TAGS.findall(question) if tag == "predicate")
    return Reading("merge", hypotheses=hypotheses, predicates=predicates) if hypotheses else None


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
    return _tokens([token for _, _, token in numbered])


def _tokens(shown: Sequence[str]) -> Passage:
    tokens = tuple(map(original, shown))
    return Passage("\n".join(shown), tokens, (False,) * len(tokens))

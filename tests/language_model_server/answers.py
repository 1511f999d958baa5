"""Answers as language models give them: text in pieces with probabilities, in the structured form that was asked for.

1. A judge's verdicts are `Said` leaves; `fill` puts them where the JSON Schema of the request has room for them.
2. `pieces` writes the value as JSON, piece by piece, each verdict a token of its own with its alternatives.
3. `spoil` breaks an answer as a fault says.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Stop = Literal["stop", "length", "refusal", "content_filter"]
_PIECE = re.compile(r"\s*\w+|\s*[^\w\s]|\s+")
_NUMBERING = frozenset(["number", "index", "window", "id", "item", "example", "passage"])
_PROBABILITY = frozenset(["probability", "confidence", "p"])


@dataclass(frozen=True, slots=True)
class Said:
    """A verdict and how sure the judge is of having said the right thing."""

    applies: bool
    confidence: float = 0.999
    words: tuple[str, str] = ("0", "1")
    """What is written for no and for yes."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A token of an answer; `others` are what could have stood there instead, with their probabilities."""

    text: str
    probability: float = 0.9999
    others: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Called:
    """A tool that the model calls."""

    name: str
    arguments: Any
    """An object; or a text, which stands in the reply as it is."""
    id: str | None = None
    """One that is made up, where None."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model says."""

    pieces: tuple[Piece, ...]
    stop: Stop = "stop"
    calls: tuple[Called, ...] = ()

    @property
    def text(self) -> str:
        """The pieces joined."""
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Content:
    """What there is to say: verdicts in order, and values for properties by their name."""

    verdicts: tuple[Said, ...] = ()
    named: Mapping[str, Any] = field(default_factory=dict)
    text: str = "A pattern in the text."


def answer(content: Content, schema: Mapping[str, Any] | None) -> Answer:
    """Return the answer that says `content` in the form of `schema`; without one, verdicts are a JSON list."""
    if schema is None:
        if not content.verdicts:
            return said_text(content.text)
        value: Any = {"verdicts": list(content.verdicts)}
    else:
        value = fill(schema, schema, content)
    return Answer(tuple(pieces(value)))


def said_text(text: str, stop: Stop = "stop") -> Answer:
    """Return an answer of this text."""
    return Answer(tuple(Piece(part) for part in _PIECE.findall(text)), stop)


def fill(schema: Mapping[str, Any], root: Mapping[str, Any], content: Content, name: str = "", at: int = -1) -> Any:
    """Return an instance of `schema` that holds `content`; `at` is the number of the verdict that it is about."""
    if "$ref" in schema:
        target: Any = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        return fill(target, root, content, name, at)
    if name in content.named and at < 0:
        return content.named[name]
    if "anyOf" in schema:
        return fill(schema["anyOf"][0], root, content, name, at)
    kind = schema.get("type")
    if kind == "object":
        return _object(schema, root, content, at)
    if kind == "array":
        return _array(schema, root, content, name, at)
    return _leaf(schema, content, name, at)


def _object(schema: Mapping[str, Any], root: Mapping[str, Any], content: Content, at: int) -> dict[str, Any]:
    properties: Mapping[str, Any] = schema.get("properties", {})
    numbered = at < 0 and len(properties) == len(content.verdicts) and all(re.search(r"\d", n) for n in properties)
    # Canonical schemas list "10" before "2": properties are filled by the order of their numbers.
    order = sorted(properties, key=lambda name: int(re.search(r"\d+", name)[0])) if numbered else list(properties)  # type: ignore[index]
    places = {name: number for number, name in enumerate(order)}
    return {
        name: fill(inner, root, content, name, places[name] if numbered else at) for name, inner in properties.items()
    }


def _array(schema: Mapping[str, Any], root: Mapping[str, Any], content: Content, name: str, at: int) -> list[Any]:
    items = schema.get("items", {"type": "string"})
    if at < 0 and content.verdicts:
        return [fill(items, root, content, name, number) for number in range(len(content.verdicts))]
    return [fill(items, root, content, name, at) for _ in range(schema.get("minItems", 0))]


def _leaf(schema: Mapping[str, Any], content: Content, name: str, at: int) -> Any:
    said = content.verdicts[at] if at >= 0 else None
    if name in _NUMBERING and at >= 0:
        return at + 1
    kind = schema.get("type")
    if said and name in _PROBABILITY and kind == "number":
        return round(said.confidence if said.applies else 1 - said.confidence, 4)
    if "const" in schema:
        return schema["const"]
    choices = schema.get("enum")
    if choices:
        return _choice(choices, said)
    if kind == "boolean":
        return False if said is None else replace(said, words=("false", "true"))
    if kind in ("integer", "number"):
        return schema.get("minimum", 0) if said is None else said
    return None if kind == "null" else content.text


def _choice(choices: Sequence[Any], said: Said | None) -> Any:
    if said is None:
        return choices[0]
    if {str(choice) for choice in choices} >= set(said.words):
        return said
    wanted = ("yes", "true", "1", "fires", "applies") if said.applies else ("no", "false", "0", "silent", "not")
    return next((c for c in choices if str(c).lower() in wanted), choices[0 if said.applies else -1])


def pieces(value: Any) -> Iterator[Piece]:
    """Yield a JSON value with verdicts in it as the tokens of its text."""
    if isinstance(value, Said):
        yield _verdict(value)
    elif isinstance(value, dict):
        yield from _joined("{", "}", [(json.dumps(name) + ": ", inner) for name, inner in value.items()])
    elif isinstance(value, list):
        yield from _joined("[", "]", [("", inner) for inner in value])
    else:
        yield from (Piece(part) for part in _PIECE.findall(json.dumps(value, ensure_ascii=False)))


def _joined(opening: str, closing: str, parts: Sequence[tuple[str, Any]]) -> Iterator[Piece]:
    yield Piece(opening)
    for number, (label, inner) in enumerate(parts):
        if number:
            yield Piece(", ")
        yield from (Piece(part) for part in _PIECE.findall(label))
        yield from pieces(inner)
    yield Piece(closing)


def _verdict(said: Said) -> Piece:
    word, other = said.words[said.applies], said.words[not said.applies]
    return Piece(word, said.confidence, ((other, 1 - said.confidence),) if said.confidence < 1 else ())


def cut_to(given: Answer, tokens: int) -> Answer:
    """Return the answer cut at so many tokens, as a provider does at its limit."""
    if len(given.pieces) <= tokens:
        return given
    return replace(given, pieces=given.pieces[:tokens], stop="length")


def spoil(given: Answer, kind: str) -> Answer:
    """Return the answer broken as the fault `kind` says."""
    half = given.pieces[: len(given.pieces) // 2]
    if kind == "truncated_json":
        return replace(given, pieces=half)
    if kind == "max_tokens":
        return replace(given, pieces=half, stop="length")
    if kind == "empty":
        return replace(given, pieces=())
    if kind == "refusal":
        return said_text("I cannot help with that.", "refusal")
    if kind == "content_filter":
        return replace(given, pieces=(), stop="content_filter")
    if kind == "not_json":
        return said_text("The first passage fits the explanation, the others do not.")
    if kind == "prose":
        before, after = "Here are my verdicts:\n```json\n", "\n```\nLet me know if you need more."
        return replace(given, pieces=(Piece(before), *given.pieces, Piece(after)))
    if kind == "wrong_length":
        return said_text(json.dumps(_shortened(json.loads(given.text))))
    raise ValueError(f"no answer is spoiled by {kind!r}")


def _shortened(value: Any) -> Any:
    """A list loses its last element, an empty one gains a null; an object without lists loses its last property."""
    if isinstance(value, list):
        return value[:-1] or [None]
    if not isinstance(value, dict):
        return value
    if any(isinstance(inner, list | dict) for inner in value.values()):
        return {name: _shortened(inner) for name, inner in value.items()}
    return dict(list(value.items())[:-1])


def logprob(probability: float) -> float:
    """Return the natural logarithm, at least -100 as servers give it."""
    return max(-100.0, math.log(probability)) if probability > 0 else -100.0

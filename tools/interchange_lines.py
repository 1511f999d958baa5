"""One line of the interchange format, checked: what is wrong is said with file, line and window."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from exegete.tools.errors import UserError, nearest
from exegete.tools.windows import KINDS, SPLITS

LINE_KEYS = ("dictionary", "latent", "explanation", "windows")
WINDOW_KEYS = ("tokens", "activations", "fires", "split", "kind", "marks", "marks_correct", "document")
LONGEST = 32_767
"""Tokens of a window: positions are stored in 16 bits."""


@dataclass(frozen=True, slots=True)
class LineWindow:
    """One window of a line."""

    tokens: tuple[str, ...]
    positions: list[int] | None
    """Where the activation is not zero; None where activations are not known."""
    values: list[float] | None
    fires: bool
    split: str
    kind: str
    marks: list[int] | None
    marks_correct: bool | None
    document: str | None

    @property
    def peak(self) -> float | None:
        """The largest activation, at least 0; None where activations are not known."""
        return None if self.values is None else max([0.0, *self.values])


@dataclass(frozen=True, slots=True)
class Line:
    """One latent."""

    dictionary: str
    latent: int
    explanation: str | None
    windows: tuple[LineWindow, ...]


def parse_line(text: str, where: str) -> Line:
    """Return the latent that a line of JSON states; `where` is `file:line`.

    Raises:
        UserError: the line is wrong; the message begins with `where`.
    """
    try:
        line = json.loads(text, parse_constant=lambda name: _fail(where, f"{name} is no number here"))
    except (json.JSONDecodeError, RecursionError) as error:
        _fail(where, f"invalid JSON ({error})")
    if not isinstance(line, dict):
        _fail(where, f"expected an object with {', '.join(LINE_KEYS)}; found {_quoted(line)}")
    _check_keys(line, LINE_KEYS, ("dictionary", "latent", "windows"), where)
    dictionary, latent, explanation = line["dictionary"], line["latent"], line.get("explanation")
    if not isinstance(dictionary, str) or not dictionary:
        _fail(where, f"'dictionary' must be a name; found {_quoted(dictionary)}")
    if not _is_index(latent, 2**31 - 1):
        _fail(where, f"'latent' must be an index from 0; found {_quoted(latent)}")
    if explanation is not None and not isinstance(explanation, str):
        _fail(where, f"'explanation' must be text; found {_quoted(explanation)}")
    if not isinstance(line["windows"], list):
        _fail(where, f"'windows' must be a list; found {_quoted(line['windows'])}")
    windows = tuple(_window(window, f"{where}: window {i}") for i, window in enumerate(line["windows"]))
    return Line(dictionary, latent, explanation, windows)


def _window(window: Any, where: str) -> LineWindow:
    if not isinstance(window, dict):
        _fail(where, f"expected an object; found {_quoted(window)}")
    _check_keys(window, WINDOW_KEYS, ("tokens", "activations", "fires", "split", "kind"), where)
    tokens = _tokens(window["tokens"], where)
    fires = window["fires"]
    if not isinstance(fires, bool):
        _fail(where, f"'fires' must be true or false; found {_quoted(fires)}")
    for key, known in (("split", SPLITS), ("kind", KINDS)):
        if window[key] not in known:
            _fail(where, f"{key!r} must be one of {', '.join(known)}; found {_quoted(window[key])}")
    if (window["kind"] == "firing") != fires:
        _fail(where, f"'kind' {window['kind']!r} contradicts 'fires' {_quoted(fires)}")
    positions, values = _activations(window["activations"], len(tokens), fires, where)
    marks, correct = _marks(window, len(tokens), fires, where)
    document = window.get("document")
    if document is not None and not isinstance(document, str):
        _fail(where, f"'document' must be text; found {_quoted(document)}")
    return LineWindow(tokens, positions, values, fires, window["split"], window["kind"], marks, correct, document)


def _tokens(tokens: Any, where: str) -> tuple[str, ...]:
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        _fail(where, f"'tokens' must be a list of at least one text; found {_quoted(tokens)}")
    if len(tokens) > LONGEST:
        _fail(where, f"'tokens' has {len(tokens)}; at most {LONGEST} are possible")
    try:
        "".join(tokens).encode()
    except UnicodeEncodeError as error:
        _fail(where, f"'tokens' holds half a character ({error.reason}); write whole characters")
    return tuple(tokens)


def _activations(
    activations: Any, tokens: int, fires: bool, where: str
) -> tuple[list[int], list[float]] | tuple[None, None]:
    if activations is None:
        return None, None
    if not isinstance(activations, list) or len(activations) != tokens:
        count = len(activations) if isinstance(activations, list) else _quoted(activations)
        _fail(where, f"'activations' must be null or one number a token ({tokens}); found {count}")
    for value in activations:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
            or abs(value) > 3e38
        ):
            _fail(where, f"'activations' must be finite numbers; found {_quoted(value)}")
    if any(value > 0 for value in activations) != fires:
        _fail(where, f"'fires' {_quoted(fires)} contradicts the activations, whose largest is {max(activations)}")
    positions = [i for i, value in enumerate(activations) if value]
    return positions, [float(activations[i]) for i in positions]


def _marks(window: Mapping[str, Any], tokens: int, fires: bool, where: str) -> tuple[list[int] | None, bool | None]:
    marks, correct = window.get("marks"), window.get("marks_correct")
    if correct is not None and not isinstance(correct, bool):
        _fail(where, f"'marks_correct' must be true or false; found {_quoted(correct)}")
    if marks is None:
        if correct is not None:
            _fail(where, "'marks_correct' stands without 'marks'")
        return None, None
    if not isinstance(marks, list) or not all(_is_index(mark, tokens) for mark in marks):
        _fail(where, f"'marks' must be positions from 0 to {tokens - 1}; found {_quoted(marks)}")
    return marks, fires if correct is None else correct


def _check_keys(given: Mapping[str, Any], known: Sequence[str], needed: Sequence[str], where: str) -> None:
    for key in needed:
        if key not in given:
            _fail(where, f"{key!r} is missing; needed are {', '.join(needed)}")
    for key in given:
        if key not in known:
            _fail(where, f"unknown key {key!r}.{nearest(key, known)}")


def _is_index(value: Any, below: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < below


def _quoted(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _fail(where: str, what: str) -> NoReturn:
    raise UserError(f"{where}: {what}")

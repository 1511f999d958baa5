"""Regular patterns on one token, matched in linear time.

Two notations, both of which must match the whole text:
1. `like`: `*` stands for any run of characters, `?` for one character; a backslash makes the next character literal.
2. `matches`: a safe subset of regular expressions – literals, `.`, `\\d`, `\\w`, `\\s` and their capitals, classes such
   as `[a-z]` and `[^,;]`, each followed by at most one of `*`, `+`, `?`, and alternatives with `|` at the top level. No
   groups, no counted repeats, no look-around, no back-references.

Both become lists of steps and are simulated as a set of live positions held in one integer (Thompson 1968), so time is
at most O(text × pattern) whatever the pattern: nothing backtracks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

MAX_PATTERN = 200
"""Longest pattern, in characters."""

_CLASSES: dict[str, Callable[[str], bool]] = {
    "d": str.isdigit,
    "w": lambda c: c.isalnum() or c == "_",
    "s": str.isspace,
}


@dataclass(frozen=True, slots=True)
class _Step:
    """One character test, optional (may be skipped) and/or repeated (may be stayed at)."""

    literal: str = ""
    classes: str = ""
    """Letters of `_CLASSES`, lower case as they are, upper case negated."""
    ranges: tuple[tuple[str, str], ...] = ()
    negated: bool = False
    optional: bool = False
    repeated: bool = False

    def accepts(self, char: str) -> bool:
        if self.literal:
            return char == self.literal
        hit = any(low <= char <= high for low, high in self.ranges)
        hit = hit or any(_CLASSES[c.lower()](char) != c.isupper() for c in self.classes)
        return hit != self.negated


_ANY = _Step(negated=True)


class PatternError(ValueError):
    """The pattern is not in the grammar. `position` counts characters from the pattern's start."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.position = position


def quote_like(text: str) -> str:
    r"""Return `text` as a `like` pattern that matches it literally: `a*` becomes `a\*`."""
    return "".join("\\" + c if c in "*?\\" else c for c in text)


@lru_cache(maxsize=4096)
def compile_like(pattern: str) -> Callable[[str], bool]:
    """Return the test of a whole text against a `like` pattern.

    Raises:
        PatternError: the pattern ends in a lone backslash, or is longer than 200 characters.
    """
    _check_length(pattern)
    steps: list[_Step] = []
    i = 0
    while i < len(pattern):
        char = pattern[i]
        if char == "\\":
            i += 1
            if i == len(pattern):
                raise PatternError("a pattern cannot end in a lone backslash", i - 1)
            steps.append(_Step(literal=pattern[i]))
        elif char == "*":
            steps.append(_Step(negated=True, optional=True, repeated=True))
        else:
            steps.append(_ANY if char == "?" else _Step(literal=char))
        i += 1
    return _fast_like(steps) or _machine([steps])


@lru_cache(maxsize=4096)
def compile_matches(pattern: str) -> Callable[[str], bool]:
    """Return the test of a whole text against a `matches` pattern.

    Raises:
        PatternError: the pattern is outside the subset, or longer than 200 characters.
    """
    _check_length(pattern)
    alternatives: list[list[_Step]] = [[]]
    i = 0
    while i < len(pattern):
        if pattern[i] == "|":
            alternatives.append([])
            i += 1
            continue
        step, end = _read_step(pattern, i)
        if end < len(pattern) and pattern[end] in "*+?":
            mark = pattern[end]
            step = _Step(step.literal, step.classes, step.ranges, step.negated, mark in "*?", mark in "*+")
            end += 1
        alternatives[-1].append(step)
        i = end
    return _machine(alternatives)


def _check_length(pattern: str) -> None:
    if len(pattern) > MAX_PATTERN:
        raise PatternError(f"a pattern has at most {MAX_PATTERN} characters, this one has {len(pattern)}", MAX_PATTERN)


def _read_step(pattern: str, i: int) -> tuple[_Step, int]:
    char = pattern[i]
    if char == ".":
        return _ANY, i + 1
    if char == "\\":
        if i + 1 == len(pattern):
            raise PatternError("a pattern cannot end in a lone backslash", i)
        return _escaped(pattern, i), i + 2
    if char == "[":
        return _read_class(pattern, i)
    if char in "*+?(){}^$]":
        raise PatternError(f"{char!r} has no meaning here; write \\{char} for the character itself", i)
    return _Step(literal=char), i + 1


def _escaped(pattern: str, i: int) -> _Step:
    char = pattern[i + 1]
    if char.lower() in _CLASSES and char.isascii():
        return _Step(classes=char)
    if char.isascii() and char.isalnum():
        raise PatternError(f"no escape \\{char}; there are \\d \\w \\s \\D \\W \\S and escaped punctuation", i)
    return _Step(literal=char)


def _read_class(pattern: str, start: int) -> tuple[_Step, int]:
    i = start + 1
    negated = pattern[i : i + 1] == "^"
    i += negated
    ranges: list[tuple[str, str]] = []
    classes = ""
    while i < len(pattern) and pattern[i] != "]":
        low, i = _read_member(pattern, i)
        if not low.literal:
            classes += low.classes
        elif pattern[i : i + 1] == "-" and pattern[i + 1 : i + 2] not in ("", "]"):
            high, i = _read_member(pattern, i + 1)
            if not high.literal or high.literal < low.literal:
                raise PatternError("a range in a class runs from a lower to a higher character", i - 1)
            ranges.append((low.literal, high.literal))
        else:
            ranges.append((low.literal, low.literal))
    if i >= len(pattern):
        raise PatternError("this [ is never closed by ]", start)
    if not ranges and not classes:
        raise PatternError("a class needs at least one character", start)
    return _Step(classes=classes, ranges=tuple(ranges), negated=negated), i + 1


def _read_member(pattern: str, i: int) -> tuple[_Step, int]:
    if pattern[i] != "\\":
        return _Step(literal=pattern[i]), i + 1
    if i + 1 == len(pattern):
        raise PatternError("a pattern cannot end in a lone backslash", i)
    return _escaped(pattern, i), i + 2


def _fast_like(steps: list[_Step]) -> Callable[[str], bool] | None:
    """Return a plain string test for `x`, `x*`, `*x` and `*x*`, which are nearly all patterns; else None."""
    kinds = ["*" if s.repeated else "x" if s.literal else "?" for s in steps]
    left, right = kinds[:1] == ["*"], kinds[-1:] == ["*"]
    middle = steps[int(left) : len(steps) - int(right)]
    if not middle or any(not s.literal for s in middle):
        return None
    text = "".join(s.literal for s in middle)
    if left and right:
        return lambda whole: text in whole
    if left:
        return lambda whole: whole.endswith(text)
    return (lambda whole: whole.startswith(text)) if right else (lambda whole: whole == text)


def _machine(alternatives: list[list[_Step]]) -> Callable[[str], bool]:
    steps: list[_Step | None] = []
    starts = accepting = 0
    for alternative in alternatives:
        starts |= 1 << len(steps)
        steps.extend(alternative)
        accepting |= 1 << len(steps)
        steps.append(None)
    skips = sum(1 << i for i, step in enumerate(steps) if step is not None and step.optional)
    stays = sum(1 << i for i, step in enumerate(steps) if step is not None and step.repeated)

    def close(live: int) -> int:
        while (more := live | (live & skips) << 1) != live:
            live = more
        return live

    @lru_cache(maxsize=256)
    def accepting_steps(char: str) -> int:
        return sum(1 << i for i, step in enumerate(steps) if step is not None and step.accepts(char))

    def test(text: str) -> bool:
        live = close(starts)
        for char in text:
            taken = live & accepting_steps(char)
            live = close(taken << 1 | taken & stays)
            if not live:
                return False
        return bool(live & accepting)

    return test

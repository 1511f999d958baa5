"""Recursive-descent parser of the predicate grammar; `exegete.tools.predicates` states the grammar.

1. Cut the source into strings, names, numbers and signs, each with its position.
2. Descend: either → both → one. Depth is counted, so no input overflows the stack.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, NoReturn, cast

from exegete.tools.errors import nearest
from exegete.tools.patterns import PatternError
from exegete.tools.predicates import (
    MAX_DEPTH,
    MAX_NEAR,
    MAX_SOURCE,
    Constant,
    Field,
    Member,
    Near,
    Node,
    Not,
    Pattern,
    Position,
    PredicateError,
    join,
)

_PIECE = re.compile(
    r'\s*(?:(?P<string>")|(?P<name>[A-Za-z_]+)|(?P<number>[0-9]+)|(?P<sign><=|>=|==|[<>(){}:,])|(?P<end>\Z))'
)
_PLAIN = re.compile(r'[^"\\\n]+')
_ESCAPES = {'"': '"', "\\": "\\", "n": "\n", "r": "\r", "t": "\t"}
_CODE = re.compile(r"u\{([0-9A-Fa-f]{1,6})\}|u([0-9A-Fa-f]{4})")
_NAMES = ("token", "word", "before", "after", "around", "position", "not", "always", "never")


class _Piece(NamedTuple):
    kind: str
    text: str
    position: int


def parse_node(source: str) -> Node:
    """Return the syntax tree of `source`.

    Raises:
        PredicateError: it is not in the grammar or over a limit.
    """
    if len(source) > MAX_SOURCE:
        raise PredicateError(f"at most {MAX_SOURCE} characters, this has {len(source)}", source, MAX_SOURCE)
    return _Parser(source).whole()


def _cut(source: str) -> list[_Piece]:
    pieces: list[_Piece] = []
    at = 0
    while not pieces or pieces[-1].kind != "end":
        found = _PIECE.match(source, at)
        if found is None:
            at += len(source[at:]) - len(source[at:].lstrip())
            raise PredicateError(f"{source[at]!r} has no meaning here; strings stand in double quotes", source, at)
        kind = str(found.lastgroup)
        start, at = found.start(kind), found.end()
        text = found.group(kind)
        if kind == "string":
            text, at = _read_string(source, at)
        pieces.append(_Piece(kind, text, start))
    return pieces


def _read_string(source: str, at: int) -> tuple[str, int]:
    start, parts = at - 1, []
    while True:
        if plain := _PLAIN.match(source, at):
            parts.append(plain.group())
            at = plain.end()
        if source[at : at + 1] == '"':
            return "".join(parts), at + 1
        if source[at : at + 1] != "\\":
            raise PredicateError('this string is never closed by " on its line', source, start)
        if code := _CODE.match(source, at + 1):
            number = int(code.group(1) or code.group(2), 16)
            if number > 0x10FFFF:
                raise PredicateError(f"there is no character {code.group(1)!r}", source, at)
            parts.append(chr(number))
            at = code.end()
        elif (char := source[at + 1 : at + 2]) in _ESCAPES and char:
            parts.append(_ESCAPES[char])
            at += 2
        else:
            raise PredicateError(f'no escape \\{char}; there are \\" \\\\ \\n \\r \\t \\u{{HEX}}', source, at)


class _Parser:
    def __init__(self, source: str) -> None:
        self.source = source
        self.pieces = _cut(source)
        self.next = 0
        self.depth = 0

    def whole(self) -> Node:
        node = self.either()
        if self.piece.kind != "end":
            self.fail("expected `and`, `or` or the end")
        return node

    @property
    def piece(self) -> _Piece:
        return self.pieces[self.next]

    def fail(self, message: str, position: int | None = None) -> NoReturn:
        found = "the end" if self.piece.kind == "end" else repr(self.piece.text[:40])
        at = self.piece.position if position is None else position
        raise PredicateError(f"{message}; found {found}", self.source, at)

    def take(self, kind: str, text: str | None = None) -> bool:
        if self.piece.kind != kind or (text is not None and self.piece.text != text):
            return False
        self.next += 1
        return True

    def need(self, kind: str, text: str | None = None) -> str:
        piece = self.piece
        if not self.take(kind, text):
            self.fail(f"expected {text or 'a ' + kind}")
        return piece.text

    def either(self) -> Node:
        parts = [self.both()]
        while self.take("name", "or"):
            parts.append(self.both())
        return join("or", parts)

    def both(self) -> Node:
        parts = [self.one()]
        while self.take("name", "and"):
            parts.append(self.one())
        return join("and", parts)

    def one(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail(f"nested deeper than {MAX_DEPTH} levels")
        node = self.inner()
        self.depth -= 1
        return node

    def inner(self) -> Node:
        if self.take("sign", "("):
            node = self.either()
            self.need("sign", ")")
            return node
        name = self.piece.text
        if self.piece.kind != "name" or name not in _NAMES:
            hint = nearest(name, _NAMES) if self.piece.kind == "name" else ""
            self.fail(f"expected one of {', '.join(_NAMES)} or a bracket{hint}")
        self.next += 1
        if name in ("always", "never"):
            return Constant(name == "always")
        if name == "not":
            return Not(self.one())
        if name == "position":
            return self.position()
        return self.near(name) if name in ("before", "after", "around") else self.test(cast(Field, name))

    def number(self, highest: int) -> int:
        text = self.need("number")
        if len(text) > 9 or int(text) > highest:
            self.next -= 1
            self.fail(f"expected a number of at most {highest}")
        return int(text)

    def position(self) -> Node:
        sign = self.need("sign")
        if sign not in ("<", "<=", "==", ">=", ">"):
            self.next -= 1
            self.fail("expected <, <=, ==, >= or >")
        return Position(cast(Literal["<", "<=", "==", ">=", ">"], sign), self.number(999_999_999))

    def near(self, side: str) -> Node:
        self.need("sign", "(")
        count = self.number(MAX_NEAR)
        if count == 0:
            self.next -= 1
            self.fail("expected a number of at least 1")
        self.need("sign", ")")
        self.need("sign", ":")
        return Near(cast(Literal["before", "after", "around"], side), count, self.one())

    def test(self, name: Field) -> Node:
        verb = self.piece.text
        if self.take("name", "in"):
            return Member(name, self.values())
        if self.take("name", "is"):
            return Member(name, (self.need("string"),))
        if not (self.take("name", "like") or self.take("name", "matches")):
            self.fail(f"expected in, is, like or matches after {name}")
        at = self.piece.position
        pattern = self.need("string")
        try:
            return Pattern(name, cast(Literal["like", "matches"], verb), pattern)
        except PatternError as error:
            raise PredicateError(f"{error} (character {error.position + 1} of the pattern)", self.source, at) from None

    def values(self) -> tuple[str, ...]:
        self.need("sign", "{")
        values: list[str] = []
        while not self.take("sign", "}"):
            if values:
                self.need("sign", ",")
            values.append(self.need("string"))
        return tuple(values)

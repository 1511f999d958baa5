r"""Executable predicates over the tokens of a window: a small closed grammar, parsed and never evaluated as Python.

A predicate says for each position whether the latent should fire there. For example

    word in {"cat", "dog"} and before(3): token like " the*"

matches each token of the word cat or dog that has a token starting with " the" among the three before it.

    either   := both ("or" both)*
    both     := one ("and" one)*
    one      := "not" one | "(" either ")" | "always" | "never" | near | position | test
    near     := ("before" | "after" | "around") "(" COUNT ")" ":" one
    position := "position" ("<" | "<=" | "==" | ">=" | ">") NUMBER
    test     := ("token" | "word") ("in" "{" STRING ("," STRING)* "}" | "is" STRING | "like" STRING | "matches" STRING)

- `token` is the token's exact text, with its leading space. `word` is any run of letters and digits that the token has
  a part of, whatever the tokens it is cut into, in lower case: the tokens " Swi", "fty", "," have the word swifty,
  swifty and none.
- `before(n): p` holds where p holds at one of the n tokens before; `after`, `around` alike. `position` counts from 0.
- `like` and `matches` are regular patterns on the whole token or word; see `exegete.tools.patterns`. A `like` pattern
  on a word has no capitals to match: it is lower-cased.
- Strings are in double quotes with `\" \\ \n \r \t \u{HEX}`. Sets may be empty.

Parsing and matching are total: any text parses or raises `PredicateError`, which quotes the position; matching is
linear in the tokens and never raises.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as made
from functools import lru_cache
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from exegete.tools.errors import UserError
from exegete.tools.patterns import compile_like, compile_matches

MAX_SOURCE = 20_000
"""Longest source text, in characters."""
MAX_DEPTH = 40
"""Deepest nesting of brackets, `not` and neighbours."""
MAX_NEAR = 256
"""Farthest neighbour, in tokens."""
REMEMBERED = 20_000
"""Words whose answer a joined predicate remembers."""

Field = Literal["token", "word"]
Mask: TypeAlias = NDArray[np.bool_]
_WORD = re.compile(r"[^\W_]+")


class PredicateError(UserError):
    """The source text is not a predicate. `position` counts characters from its start."""

    def __init__(self, message: str, source: str, position: int) -> None:
        shown = source[max(0, position - 20) : position + 20]
        super().__init__(f"predicate, character {position + 1}, near {shown!r}: {message}")
        self.position = position


def words_of(tokens: Sequence[str]) -> list[tuple[str, ...]]:
    """Return for each token the lower-cased runs of letters and digits that it has a part of, across token borders."""
    ends: list[int] = []
    at = 0
    for token in tokens:
        at += len(token)
        ends.append(at)
    found: list[list[str]] = [[] for _ in tokens]
    first = 0
    for run in _WORD.finditer("".join(tokens)):
        word = run.group().lower()
        while ends[first] <= run.start():
            first += 1
        i = first
        found[i].append(word)
        while ends[i] < run.end():
            i += 1
            if tokens[i]:
                found[i].append(word)
    return [tuple(words) for words in found]


@dataclass(frozen=True, slots=True)
class View:
    """The tokens of one window as the tests of a predicate see them."""

    tokens: Sequence[str]
    words: Sequence[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Constant:
    """Holds everywhere, or nowhere."""

    value: bool

    def mask(self, view: View) -> Mask:
        """Return for each position whether it holds."""
        return np.full(len(view.tokens), self.value)

    def __str__(self) -> str:
        return "always" if self.value else "never"


@dataclass(frozen=True, slots=True)
class Member:
    """The token, or one of its words, is in a set."""

    field: Field
    values: tuple[str, ...]
    _set: frozenset[str] = made(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        values = self.values if self.field == "token" else tuple(v.lower() for v in self.values)
        object.__setattr__(self, "values", tuple(dict.fromkeys(values)))
        object.__setattr__(self, "_set", frozenset(values))

    @property
    def accepts(self) -> Callable[[str], bool]:
        """Whether one token or word passes."""
        return self._set.__contains__

    def mask(self, view: View) -> Mask:
        """Return for each position whether it holds."""
        return _test(view, self.field, self.accepts)

    def __str__(self) -> str:
        return f"{self.field} in {{{', '.join(map(quote, self.values))}}}"


@dataclass(frozen=True, slots=True)
class Pattern:
    """The token, or one of its words, fits a regular pattern."""

    field: Field
    notation: Literal["like", "matches"]
    pattern: str
    _accepts: Callable[[str], bool] = made(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.field == "word" and self.notation == "like":
            object.__setattr__(self, "pattern", self.pattern.lower())
        compiled = compile_like(self.pattern) if self.notation == "like" else compile_matches(self.pattern)
        object.__setattr__(self, "_accepts", compiled)

    def __reduce__(self) -> tuple[type[Pattern], tuple[str, str, str]]:
        return Pattern, (self.field, self.notation, self.pattern)

    @property
    def accepts(self) -> Callable[[str], bool]:
        """Whether one token or word passes."""
        return self._accepts

    def mask(self, view: View) -> Mask:
        """Return for each position whether it holds."""
        return _test(view, self.field, self.accepts)

    def __str__(self) -> str:
        return f"{self.field} {self.notation} {quote(self.pattern)}"


@dataclass(frozen=True, slots=True)
class Position:
    """The position in the window, counted from 0."""

    comparison: Literal["<", "<=", "==", ">=", ">"]
    number: int

    def mask(self, view: View) -> Mask:
        """Return for each position whether it holds."""
        at, comparison, number = np.arange(len(view.tokens)), self.comparison, min(self.number, 2**62)
        if comparison in ("==", "<=", "<"):
            held = at == number if comparison == "==" else at < number + (comparison == "<=")
        else:
            held = at >= number + (comparison == ">")
        return np.asarray(held, bool)

    def __str__(self) -> str:
        return f"position {self.comparison} {self.number}"


@dataclass(frozen=True, slots=True)
class Near:
    """Something holds at one of the `count` tokens before, after or around."""

    side: Literal["before", "after", "around"]
    count: int
    inner: Node

    def mask(self, view: View) -> Mask:
        """Return for each position whether it holds."""
        inner = self.inner.mask(view)
        total = np.concatenate([[0], np.cumsum(inner)])
        at = np.arange(len(inner))
        low, high = np.maximum(at - self.count, 0), np.minimum(at + self.count + 1, len(inner))
        before, after = total[at] - total[low], total[high] - total[at + 1]
        held = {"before": before, "after": after, "around": before + after}[self.side]
        return np.asarray(held > 0, bool)

    def __str__(self) -> str:
        return f"{self.side}({self.count}): {_bracketed(self.inner)}"


@dataclass(frozen=True, slots=True)
class Not:
    """Something does not hold."""

    inner: Node

    def mask(self, view: View) -> Mask:
        """Return for each position whether it holds."""
        return np.logical_not(self.inner.mask(view))

    def __str__(self) -> str:
        return f"not {_bracketed(self.inner)}"


@dataclass(frozen=True, slots=True)
class Joined:
    """All of several parts hold (`and`), or at least one does (`or`). Parts of the same kind are flattened."""

    operator: Literal["and", "or"]
    parts: tuple[Node, ...]
    _alternatives: Mapping[Field, _AnyOf] = made(init=False, repr=False, compare=False)
    _others: tuple[Node, ...] = made(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        tests: dict[Field, list[Callable[[str], bool]]] = {}
        others: list[Node] = []
        for part in self.parts:
            if self.operator == "or" and isinstance(part, Member | Pattern):
                tests.setdefault(part.field, []).append(part.accepts)
            else:
                others.append(part)
        object.__setattr__(self, "_alternatives", {name: _AnyOf(accepting) for name, accepting in tests.items()})
        object.__setattr__(self, "_others", tuple(others))

    def __reduce__(self) -> tuple[type[Joined], tuple[str, tuple[Node, ...]]]:
        return Joined, (self.operator, self.parts)

    def mask(self, view: View) -> Mask:
        """Return for each position whether it holds."""
        held = np.full(len(view.tokens), self.operator == "and")
        for name, alternatives in self._alternatives.items():
            held |= _test(view, name, alternatives.__getitem__)
        for part in self._others:
            held = held & part.mask(view) if self.operator == "and" else held | part.mask(view)
        return held

    def __str__(self) -> str:
        return f" {self.operator} ".join(map(_bracketed, self.parts))


class _AnyOf(dict[str, bool]):
    """Text → whether one of many tests accepts it, remembered: a predicate of a hundred patterns meets few distinct words."""

    def __init__(self, tests: Sequence[Callable[[str], bool]]) -> None:
        super().__init__()
        self._tests = tests

    def __missing__(self, text: str) -> bool:
        if len(self) >= REMEMBERED:
            self.clear()
        held = self[text] = any(test(text) for test in self._tests)
        return held


Node: TypeAlias = Constant | Member | Pattern | Position | Near | Not | Joined


@dataclass(frozen=True, slots=True)
class Predicate:
    """A parsed predicate. `str(predicate)` is its canonical source: parsing it gives an equal predicate."""

    node: Node

    def matches(self, tokens: Sequence[str]) -> Mask:
        """Return shape (tokens,): whether the predicate holds at each position of the window."""
        return self.node.mask(_view(tuple(tokens)))

    def __str__(self) -> str:
        return str(self.node)


def join(operator: Literal["and", "or"], parts: Iterable[Node]) -> Node:
    """Return the parts joined; nested joins of the same operator are flattened, and one part stands alone.

    None at all gives what joining nothing means: `always` for "and", `never` for "or".
    """
    flat: list[Node] = []
    for part in parts:
        flat.extend(part.parts if isinstance(part, Joined) and part.operator == operator else [part])
    if not flat:
        return Constant(operator == "and")
    return flat[0] if len(flat) == 1 else Joined(operator, tuple(flat))


def quote(text: str) -> str:
    """Return `text` as a string of the grammar; every character that does not print is escaped."""
    plain = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return '"' + "".join(plain.get(c) or (c if c.isprintable() else f"\\u{{{ord(c):x}}}") for c in text) + '"'


def parse(source: str) -> Predicate:
    """Return the predicate that `source` states.

    Raises:
        PredicateError: it is not in the grammar, or exceeds 20,000 characters or 40 levels; it quotes the place.
    """
    from exegete.tools.predicate_parser import parse_node

    return Predicate(parse_node(source))


@lru_cache(maxsize=4096)
def _view(tokens: tuple[str, ...]) -> View:
    """The view of a window; kept, since several evaluators and floors look at the same windows one after the other."""
    return View(tokens, words_of(tokens))


def _test(view: View, name: Field, accepts: Callable[[str], bool]) -> Mask:
    # Each distinct token or word is asked once: long texts have few.
    if name == "token":
        of_token = {token: accepts(token) for token in set(view.tokens)}
        return np.fromiter(map(of_token.__getitem__, view.tokens), bool, len(view.tokens))
    of_words = {words: any(map(accepts, words)) for words in set(view.words)}
    return np.fromiter(map(of_words.__getitem__, view.words), bool, len(view.words))


def _bracketed(node: Node) -> str:
    return f"({node})" if isinstance(node, Joined) else str(node)

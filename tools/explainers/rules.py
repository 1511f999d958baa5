"""What a rule may say of a token, and where each rule holds in a set of windows.

A rule is a key: a kind and what it is about. Kinds `w` word, `p` prefix, `s` suffix, `c` part of a word, `t` exact token,
`i` part of a token, `m` shape; contexts `b1`, `b3`, `a1` (a word one before, three before, one after), `z` the first
token; and `&`, a rule with a context.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, TypeAlias

from exegete.tools.patterns import compile_matches, quote_like
from exegete.tools.predicates import Member, Near, Node, Pattern, Position, join, words_of

Key: TypeAlias = tuple[Any, ...]

SHAPES = {
    "a number": r"\s*\d+",
    "a capitalised word": r"\s*[A-Z][a-z]+",
    "a word in capitals": r"\s*[A-Z][A-Z]+",
    "punctuation": r"\s*[^\w\s]+",
    "a line break": "\\s*\n\\s*",
    "characters beyond Latin letters": "\\s*[^\u0001-\u024f‐-\u206f]+",
}
REACH = {"b1": ("before", 1), "b3": ("before", 3), "a1": ("after", 1)}


cached_words = lru_cache(maxsize=4096)(words_of)
"""`words_of`, remembered while the folds of one latent pass over the same windows."""


@lru_cache(maxsize=200_000)
def word_keys(word: str) -> frozenset[Key]:
    """Return the rules that a word fits by itself."""
    keys: list[Key] = [("w", word)]
    keys += [("p", word[:k]) for k in range(2, min(len(word), 8) + 1)]
    keys += [("s", word[-k:]) for k in range(2, min(len(word) - 1, 6) + 1)]
    return frozenset(keys)


@lru_cache(maxsize=200_000)
def token_keys(token: str) -> frozenset[Key]:
    """Return the rules that a token fits by itself."""
    shapes = [("m", name) for name, pattern in SHAPES.items() if compile_matches(pattern)(token)]
    return frozenset([("t", token), *shapes])


def node_of(key: Key) -> Node:
    """Return the predicate that a rule stands for."""
    kind = key[0]
    if kind == "&":
        return join("and", [node_of(key[1]), node_of(key[2])])
    if kind in REACH:
        side, count = REACH[kind]
        return Near(side, count, Member("word", (key[1],)))  # type: ignore[arg-type]
    if kind == "w" or kind == "t":
        return Member("word" if kind == "w" else "token", (key[1],))
    if kind == "m":
        return Pattern("token", "matches", SHAPES[key[1]])
    if kind == "z":
        return Position("==", 0)
    part = quote_like(key[1])
    pattern = {"p": f"{part}*", "s": f"*{part}", "c": f"*{part}*", "i": f"*{part}*"}[kind]
    return Pattern("token" if kind == "i" else "word", "like", pattern)


class Index:
    """Where words and tokens stand in a list of windows. Places are numbered through all windows."""

    def __init__(self, windows: Sequence[Sequence[str]]) -> None:
        self.window: list[int] = []
        self.first: set[int] = set()
        self.words: dict[str, list[int]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.count = len(windows)
        place = 0
        for number, tokens in enumerate(windows):
            self.first.add(place)
            self.window.extend([number] * len(tokens))
            for token, words in zip(tokens, cached_words(tuple(tokens)), strict=True):
                self.tokens.setdefault(token, []).append(place)
                for word in words:
                    self.words.setdefault(word, []).append(place)
                place += 1
        self._known: dict[Key, frozenset[int]] = {}
        self._table: dict[Key, list[str]] | None = None
        self._joined: dict[str, tuple[str, list[int], list[list[int]]]] = {}

    def prepare(self) -> None:
        """List the words under each of their rules once, for an index that serves many latents."""
        table: dict[Key, list[str]] = {}
        for word in self.words:
            for key in word_keys(word):
                table.setdefault(key, []).append(word)
        self._table = table

    def find(self, keys: Collection[Key]) -> None:
        """Find the places of prefixes and suffixes among `keys` in one pass over the distinct words."""
        wanted = {key for key in keys if key[0] in "ps"}
        if self._table is not None:
            hits = {key: self._table.get(key, []) for key in wanted}
        else:
            hits = {key: [] for key in wanted}
            for word in self.words:
                for key in word_keys(word) & wanted:
                    hits[key].append(word)
        for key, words in hits.items():
            self._known[key] = frozenset(place for word in words for place in self.words[word])

    def places(self, key: Key) -> frozenset[int]:
        """Return the places where a rule holds."""
        if key not in self._known:
            self._known[key] = frozenset(self._search(key))
            if len(self._known) > 50_000:
                self._known = {key: self._known[key]}
        return self._known[key]

    def windows_of(self, places: Iterable[int]) -> set[int]:
        """Return the windows that places lie in."""
        return {self.window[place] for place in places}

    def _search(self, key: Key) -> Iterable[int]:
        kind = key[0]
        if kind == "&":
            return self.places(key[1]) & self.places(key[2])
        if kind == "z":
            return self.first
        if kind == "w":
            return self.words.get(key[1], ())
        if kind == "t":
            return self.tokens.get(key[1], ())
        if kind in REACH:
            return self._near(*REACH[kind], self.words.get(key[1], ()))
        if kind in "ps":
            return [p for word, at in self.words.items() if key in word_keys(word) for p in at]
        if kind in "ci":
            return [p for found in self._containing(kind, key[1]) for p in found]
        return [p for token, at in self.tokens.items() if key in token_keys(token) for p in at]

    def _containing(self, kind: str, part: str) -> list[list[int]]:
        """Return the places of the words or tokens that contain `part`, by one search through all of them joined."""
        if kind not in self._joined:
            table = self.words if kind == "c" else self.tokens
            ends = list(accumulate(len(text) + 1 for text in table))
            self._joined[kind] = ("\0".join(table), ends, list(table.values()))
        joined, ends, places = self._joined[kind]
        if "\0" in part:
            return [at for text, at in self.tokens.items() if part in text]
        found: list[list[int]] = []
        start = joined.find(part)
        while start >= 0:
            number = bisect_right(ends, start)
            found.append(places[number])
            start = joined.find(part, ends[number])
        return found

    def _near(self, side: str, count: int, places: Iterable[int]) -> set[int]:
        signs = range(1, count + 1) if side == "before" else range(-1, -count - 1, -1)
        window, last = self.window, len(self.window)
        return {p + s for p in places for s in signs if 0 <= p + s < last and window[p + s] == window[p]}

"""Learn a list of rules that together predict where a latent fires.

1. Candidates are the rules that hold at a firing place: its words, prefixes, suffixes, parts, shapes and contexts, and,
   for words that are common elsewhere, the word together with a context.
2. Rules are added greedily, the most gain first, until none gains. The gain of a rule given those before it is what it adds to
   J(windows) + w J(tokens), where J is the true minus the false positive rate (Youden 1950): over windows, whether it
   holds anywhere (detection); over tokens, whether it holds at the firing ones (fuzzing). Each rule's counts are
   discounted by a constant, as unseen windows show a rare token less often than those that it was picked from
   (absolute discounting, Ney et al. 1994).
3. A chosen word is widened to its shortest prefix that hits hardly any more non-firing windows, so as to reach
   inflections; a marked part of a word is also listed as a token of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from exegete.tools.explainers.rules import Index, Key, cached_words, token_keys, word_keys

COMMON = 0.02
"""A rule that holds in a larger share of the non-firing windows is also tried together with a context."""
RARE_TOKEN = 0.001
"""Share of non-firing tokens below which a marked part of a word is always listed as a token of its own."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How rules are weighed."""

    discount: float = 0.1
    """Taken off the windows and firing tokens that each rule adds."""
    token_weight: float = 0.7
    """Weight of the gain over tokens beside that over windows."""
    contexts: bool = True
    alone: int = 2
    """Least firing words that a prefix or suffix must unite."""
    general: float = 0.1
    """Added, in windows, to the gain of prefixes, suffixes and shapes, which reach words not yet seen."""
    reach: int = 3
    """Least letters of a prefix that may stand though it unites too few words."""
    widening: float = 0.01
    """Share of non-firing windows that a chosen word may newly hit when it is widened to a prefix."""


@dataclass(frozen=True, slots=True)
class Shown:
    """One firing window and its firing positions."""

    tokens: tuple[str, ...]
    firing: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule with what it hits."""

    key: Key
    windows: frozenset[int]
    places: frozenset[int]
    false_windows: frozenset[int]
    false_share: float


class Contrast:
    """Non-firing windows, some of which do not count (the latent's own among the background)."""

    def __init__(self, index: Index, left_out: frozenset[int] = frozenset()) -> None:
        self.index = index
        self.left_out = left_out
        self.count = max(index.count - len(left_out), 1)
        self._known: dict[Key, tuple[frozenset[int], float]] = {}

    def without(self, fold: int, folds: int) -> tuple[Contrast, frozenset[int]]:
        """Return the contrast less every `folds`-th window from `fold` on, and those windows."""
        held = frozenset(range(fold, self.index.count, folds)) - self.left_out
        part = Contrast(self.index, self.left_out | held)
        part._known = {key: (windows - held, share) for key, (windows, share) in self._known.items()}
        return part, held

    def find(self, keys: set[Key]) -> None:
        """Look up in one pass those of `keys` that are not known yet."""
        self.index.find(keys - self._known.keys())

    def hit(self, key: Key) -> tuple[frozenset[int], float]:
        """Return the windows a rule holds in, and the share of tokens that it holds at."""
        if key not in self._known:
            places = self.index.places(key)
            windows = frozenset(self.index.windows_of(places))
            self._known[key] = windows - self.left_out, len(places) / max(len(self.index.window), 1)
        return self._known[key]

    def rates(self, keys: Sequence[Key], held: frozenset[int]) -> tuple[float, float]:
        """Return the shares of the windows `held`, and of their tokens, at which any of the rules holds."""
        places = frozenset[int]().union(*(self.index.places(key) for key in keys))
        inside = [self.index.window[p] for p in places if self.index.window[p] in held]
        tokens = len(self.index.window) * len(held) / max(self.index.count, 1)
        return len(set(inside)) / max(len(held), 1), min(len(inside) / max(tokens, 1), 1.0)


def learn(shown: Sequence[Shown], contrast: Contrast, settings: Settings, whole_words: bool) -> list[Rule]:
    """Return the rules in the order they were chosen; empty where nothing gains."""
    index = Index([s.tokens for s in shown])
    starts = _starts(shown)
    firing = {start + p for start, s in zip(starts, shown, strict=True) for p in s.firing}
    if not firing:
        return []
    keys = _candidate_keys(shown, settings, whole_words)
    index.find(keys)
    contrast.find(keys)
    made = {key: _candidate(key, index, firing, contrast) for key in keys}
    if whole_words:
        made |= {key: replace(rule, windows=frozenset()) for key, rule in made.items() if key[0] == "t"}
    if settings.contexts:
        for key in _paired(made, contrast, shown):
            made[key] = _candidate(key, index, firing, contrast)
    chosen = _greedy([c for c in made.values() if c.places], len(shown), len(firing), contrast, settings)
    if whole_words:
        taken = {rule.key for rule in chosen}
        chosen += [r for k, r in made.items() if k[0] == "t" and k not in taken and r.false_share < RARE_TOKEN]
    return _widened(chosen, made, contrast, settings)


def _widened(chosen: list[Rule], made: dict[Key, Rule], contrast: Contrast, settings: Settings) -> list[Rule]:
    """Replace each word by its shortest prefix that hits hardly any more non-firing windows: it reaches inflections."""
    wide: dict[Key, Rule] = {}
    for rule in chosen:
        kind, word = rule.key[0], rule.key[-1]
        for length in range(settings.reach, len(word) + 1) if kind in "wp" else ():
            prefix = made.get(("p", word[:length]))
            if prefix and len(prefix.false_windows - rule.false_windows) <= settings.widening * contrast.count:
                rule = prefix
                break
        wide.setdefault(rule.key, rule)
    return list(wide.values())


def _starts(shown: Sequence[Shown]) -> list[int]:
    starts, at = [], 0
    for one in shown:
        starts.append(at)
        at += len(one.tokens)
    return starts


def _candidate_keys(shown: Sequence[Shown], settings: Settings, whole_words: bool) -> set[Key]:
    keys: set[Key] = set()
    stems: dict[Key, set[str]] = {}
    near: dict[Key, int] = {}
    for one in shown:
        words = cached_words(one.tokens)
        for at in one.firing:
            token = one.tokens[at]
            bare = token.strip()
            for word in words[at]:
                keys.add(("w", word))
                for key in word_keys(word):
                    stems.setdefault(key, set()).add(word)
                if len(bare) >= 3 and bare.isalnum() and bare.lower() != word:
                    keys.add(("c", bare.lower()))
            if not whole_words or (bare == token and bare.isalnum()):
                keys.add(("t", token))
            if bare and (not bare.isalnum() or not bare.islower()):
                keys.add(("i", bare))
            elif not bare and token.strip(" "):
                keys.add(("i", token.strip(" ")))
            keys.update(k for k in token_keys(token) if k[0] == "m")
            if at == 0:
                keys.add(("z",))
            if settings.contexts:
                for key in _contexts(words, at):
                    near[key] = near.get(key, 0) + 1
    keys.update(
        k for k, united in stems.items() if k[0] != "w" and (len(united) >= settings.alone or _long(k, settings))
    )
    keys.update(k for k, n in near.items() if n >= 3)
    return keys


def _long(key: Key, settings: Settings) -> bool:
    return key[0] == "p" and len(key[1]) >= settings.reach


def _contexts(words: Sequence[tuple[str, ...]], at: int) -> set[Key]:
    keys: set[Key] = {("b3", w) for i in range(max(at - 3, 0), at) for w in words[i]}
    keys.update(("b1", w) for w in (words[at - 1] if at else ()))
    keys.update(("a1", w) for w in (words[at + 1] if at + 1 < len(words) else ()))
    return keys


def _candidate(key: Key, index: Index, firing: set[int], contrast: Contrast) -> Rule:
    places = index.places(key)
    false_windows, share = contrast.hit(key)
    return Rule(key, frozenset(index.windows_of(places)), frozenset(places & firing), false_windows, share)


def _paired(made: dict[Key, Rule], contrast: Contrast, shown: Sequence[Shown]) -> set[Key]:
    """Return common rules joined with each context that they share at two firing places or more."""
    common = [k for k, c in made.items() if len(c.places) >= 2 and len(c.false_windows) > COMMON * contrast.count]
    common = [k for k in common if k[0] in "wtimpsz"]
    common.sort(key=lambda k: (-len(made[k].places), str(k)))
    near = [c for k, c in made.items() if k[0] in ("b1", "b3", "a1")]
    near.sort(key=lambda c: (-len(c.places), str(c.key)))
    pairs = {("&", k, c.key) for k in common[:12] for c in near[:12] if len(made[k].places & c.places) >= 2}
    if ("z",) in made:
        pairs |= {("&", k, ("z",)) for k in common[:12] if k != ("z",)}
    return pairs


def _greedy(candidates: list[Rule], windows: int, places: int, contrast: Contrast, settings: Settings) -> list[Rule]:
    chosen: list[Rule] = []
    hit: set[int] = set()
    marked: set[int] = set()
    false: set[int] = set()
    candidates.sort(key=lambda c: ("wtpscimz&".find(c.key[0]) % 99, str(c.key)))

    def gain(c: Rule) -> float:
        if c.windows <= hit and c.places <= marked:
            return -1.0
        true_windows = (len(c.windows - hit) - settings.discount) / windows
        true_places = (len(c.places - marked) - settings.discount) / places
        over_windows = true_windows - len(c.false_windows - false) / contrast.count
        if c.key[0] in "psm":
            over_windows += settings.general / windows
        return over_windows + settings.token_weight * (true_places - c.false_share)

    while candidates:
        gains = [gain(c) for c in candidates]
        best = max(range(len(gains)), key=gains.__getitem__)
        if gains[best] <= 0:
            break
        pick = candidates.pop(best)
        chosen.append(pick)
        hit |= pick.windows
        marked |= pick.places
        false |= pick.false_windows
        candidates = [c for c, g in zip(candidates, gains[:best] + gains[best + 1 :], strict=True) if g > -0.5]
    return chosen

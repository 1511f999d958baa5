"""The lexical explainer: statistics of tokens and contexts, no model call. The floor that every language model must beat.

1. The firing windows of the explain split show where the latent fires; its own non-firing windows (kinds random and hard)
   show where it does not. A latent that brings fewer than twenty of those is set against a background of other latents'
   windows (`exegete.tools.explainers.background`), or, without one, against its own tokens that do not fire.
2. `exegete.tools.explainers.learning` picks the few rules on words, parts of words, shapes, contexts and positions that
   tell the two apart.
3. Rules learned without a part of the firing windows must recognise that part beyond what they hit of the others, as
   windows or by its firing tokens; else the explanation says that it did not hold up. What it is worth, its scores tell.
4. The rules become one predicate and one sentence that says the same.

Where tokens are whitespace-separated words and only marked spans are cut finer, as in imported evidence, exact tokens are
not used: a window without marks would be cut differently.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from exegete.tools.explainers.background import Background
from exegete.tools.explainers.contract import Explanation, explainer
from exegete.tools.explainers.learning import Contrast, Rule, Settings, Shown, learn
from exegete.tools.explainers.rules import Index, node_of
from exegete.tools.explainers.token_list import TokenListExplainer
from exegete.tools.explainers.wording import sentence
from exegete.tools.predicates import MAX_SOURCE, Predicate, join
from exegete.tools.windows import LatentEvidence

__all__ = ["LexicalExplainer", "TokenListExplainer"]

WEAK = "A guess that did not hold up on windows left out: "
ENOUGH_OWN = 20
"""Own non-firing windows from which a latent needs no background."""
FOLDS = 4
LEAST_TESTED = 5
"""Firing windows below which there is too little to leave some out; the rules are then given untested."""
MOST_SHOWN = 100
CHANCE = 0.005
"""Probability under chance below which left-out windows count as recognised; small, as there are two tests and folds."""


@explainer("lexical")
class LexicalExplainer:
    """Explains a latent by the words, parts of words, contexts and positions that predict its firing."""

    name = "lexical"

    def __init__(self, background: Background | None = None, settings: Settings | None = None) -> None:
        self._background = background or Background()
        self._settings = settings or Settings()
        self._index: Index | None = None

    async def explain(self, evidence: LatentEvidence, seed: int) -> Explanation | None:
        """Return the sentence and its predicate, or None where no rule predicts firing. `seed` is not used."""
        windows = [w for w in evidence.select("explain") if w.tokens]
        shown = [Shown(w.tokens, w.firing_positions()) for w in windows if w.fires]
        shown = [s for s in shown if s.firing][:MOST_SHOWN]
        if not shown:
            return None
        silent = [w.tokens for w in windows if not w.fires]
        contrast = self._contrast(evidence.latent, silent, shown)
        whole_words = cut_at_whitespace(shown)
        rules = learn(shown, contrast, self._settings, whole_words)
        if not rules:
            return None
        held_up = _holds_up(shown, contrast, self._settings, whole_words)
        rules = _fitting(rules)
        predicate = join("or", [node_of(rule.key) for rule in rules])
        text = sentence([rule.key for rule in rules])
        return Explanation(text if held_up else WEAK + text, str(predicate), self.name, parameters={"held_up": held_up})

    def _contrast(self, latent: int, silent: Sequence[tuple[str, ...]], shown: Sequence[Shown]) -> Contrast:
        if len(silent) >= ENOUGH_OWN:
            index = Index(silent)
            index.prepare()
            return Contrast(index)
        if self._background.windows:
            if self._index is None:
                self._index = Index([tokens for _, tokens in self._background.windows])
                self._index.prepare()
            own = (number for number, (other, _) in enumerate(self._background.windows) if other == latent)
            return Contrast(self._index, frozenset(own))
        rest = [tuple("" if i in s.firing else t for i, t in enumerate(s.tokens)) for s in shown]
        return Contrast(Index([*silent, *rest]))


def cut_at_whitespace(shown: Sequence[Shown]) -> bool:
    """Return whether tokens are whitespace-separated words, apart from those that fire and those right after them."""
    for one in shown:
        firing = set(one.firing)
        for at in range(1, len(one.tokens)):
            inside = not one.tokens[at][:1].isspace()
            if inside and at not in firing and at - 1 not in firing:
                return False
    return True


def _holds_up(shown: Sequence[Shown], contrast: Contrast, settings: Settings, whole_words: bool) -> bool:
    """Return whether rules learned without a part of all windows recognise the firing ones of that part.

    Either their rate over windows or that over firing tokens must exceed the false positive rate, on the non-firing part,
    by a binomial test.
    """
    if len(shown) < LEAST_TESTED:
        return True
    hits = marked = false_windows = false_tokens = 0.0
    for fold in range(FOLDS):
        left = shown[fold::FOLDS]
        part, held = contrast.without(fold, FOLDS)
        rules = learn([s for n, s in enumerate(shown) if n % FOLDS != fold], part, settings, whole_words)
        predicate = Predicate(join("or", [node_of(rule.key) for rule in rules]))
        for one in left:
            matched = predicate.matches(one.tokens)
            hits += bool(matched.any())
            marked += float(matched[list(one.firing)].mean())
        windows, tokens = contrast.rates([rule.key for rule in rules], held)
        false_windows += len(left) / len(shown) * windows
        false_tokens += len(left) / len(shown) * tokens
    silent = contrast.count
    return _exceeds(hits / len(shown), false_windows, len(shown), silent) or _exceeds(
        marked / len(shown), false_tokens, len(shown), silent
    )


def _exceeds(true: float, false: float, firing: int, silent: int) -> bool:
    """Return whether so many of `firing` windows by chance, at the false positive rate, has a binomial tail below CHANCE.

    The rate is taken as if one more silent window had been hit.
    """
    rate = min((false * silent + 1) / (silent + 2), 1.0)
    hits = math.floor(true * firing)
    tail = sum(math.comb(firing, k) * rate**k * (1 - rate) ** (firing - k) for k in range(hits, firing + 1))
    return tail < CHANCE


def _fitting(rules: Sequence[Rule]) -> list[Rule]:
    """Return the first rules, as many as the longest predicate holds."""
    room, kept = MAX_SOURCE, []
    for rule in rules:
        room -= len(str(node_of(rule.key))) + 6
        if room < 0:
            break
        kept.append(rule)
    return kept

"""The naive baseline: the list of the tokens that fire in the explain windows, unweighed and unpruned."""

from __future__ import annotations

from exegete.tools.explainers.contract import Explanation, explainer
from exegete.tools.patterns import MAX_PATTERN, quote_like
from exegete.tools.predicates import MAX_SOURCE, Member, Node, Pattern, join, quote
from exegete.tools.windows import LatentEvidence


@explainer("token_list")
class TokenListExplainer:
    """Lists every firing token of the explain windows; no token is weighed, generalised or left out."""

    name = "token_list"

    async def explain(self, evidence: LatentEvidence, seed: int) -> Explanation | None:
        """Return the list as text and predicate, or None where no token is known to fire.

        A whole word counts in any case and with any punctuation beside it, a part of a word or a sign wherever it stands.
        The list ends where the longest predicate does.
        """
        seen: dict[str, None] = {}
        for window in evidence.select("explain"):
            seen.update(dict.fromkeys(window.tokens[i] for i in window.firing_positions() if window.tokens[i]))
        listed = _fitting(list(seen))
        if not listed:
            return None
        words = tuple(t.strip() for t in listed if t[:1].isspace() and t.strip().isalnum())
        pieces = [t.strip() for t in listed if t.strip() and t.strip() not in words]
        parts: list[Node] = [Member("token", tuple(listed))]
        parts += [Member("word", words)] if words else []
        parts += [
            Pattern("token", "like", f"*{quote_like(p)}*") for p in pieces if len(quote_like(p)) < MAX_PATTERN - 2
        ]
        text = "The tokens " + ", ".join(quote(token.strip() or token) for token in listed) + "."
        return Explanation(text, str(join("or", parts)), explainer=self.name)


def _fitting(tokens: list[str]) -> list[str]:
    room = MAX_SOURCE - 100
    kept = []
    for token in tokens:
        room -= 4 * len(quote(token)) + 30
        if room < 0:
            break
        kept.append(token)
    return kept

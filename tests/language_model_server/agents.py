"""A language model that explains a latent with tools, played from the conversation alone: nothing is kept between requests.

1. First it states that each word marked in the passages makes the unit fire, and runs a text for each: a passage up to its mark,
   with that word in its place; and one with a word that is in no passage, which it expects to be silent.
2. When the results are there it keeps the words on which the unit fired, and finishes with them as a predicate, which the
   oracle understands when it is asked to judge. Where it is blind, it finishes with one that holds nowhere.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from exegete.tools.predicates import quote

from .answers import Answer, Called, said_text
from .reading import Passage, Reading

WORDS = 8
NONSENSE = " zzyzx"
_VERDICT = re.compile(r"^(fires|silent)\b", re.MULTILINE)


def agent_reply(reading: Reading, results: Sequence[str], blind: bool = False) -> Answer:
    """Return what the agent says and calls, by the passages that it was shown and the results of its calls so far."""
    words = _words(reading)
    ran = next((text for text in reversed(results) if text.startswith("it fires in ")), None)
    if ran is None:
        texts = [f"{_before(reading.passages[0])}{word}" for word in [*words, NONSENSE]]
        run = Called("activations", {"texts": texts, "expected": [True] * len(words) + [False]})
        return _calling(Called("hypothesis", {"statement": "It fires on the words that are marked."}), run)
    fired = [word.strip() for word, verdict in zip(words, _VERDICT.findall(ran), strict=False) if verdict == "fires"]
    kept = sorted({word.lower() for word in fired or words if word.strip()})
    predicate = "never" if blind or not kept else f"word in {{{', '.join(map(quote, kept))}}}"
    return _calling(Called("finish", {"answer": predicate, "predicate": predicate}))


def _calling(*calls: Called) -> Answer:
    answer = said_text("I look.")
    return Answer(answer.pieces, answer.stop, calls)


def _words(reading: Reading) -> list[str]:
    """Return the tokens that are marked most often."""
    marked = Counter(
        token
        for passage in reading.passages
        for token, is_marked in zip(passage.tokens, passage.marked, strict=True)
        if is_marked and token.strip().isalpha()
    )
    return [token for token, _ in marked.most_common(WORDS)]


def _before(passage: Passage) -> str:
    """Return a passage up to its first mark."""
    at = passage.marked.index(True) if True in passage.marked else len(passage.tokens)
    return "".join(passage.tokens[:at])

"""The macros with which readers search in SQL: `macros.sql`, filled with what its patterns share.

Words are ranked by BM25 with k1 = 1.2 and b = 0.75 (Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework", §3.4),
without its weights by rarity: every hit has every word, so no word tells one hit from another by being rare.
"""

from __future__ import annotations

import re
from importlib.resources import files

MOST_WORDS = 32
"""Different words that a phrase may have."""

_SOURCES = {
    "letters": r"\p{L}\p{M}\p{N}",
    "unspaced": r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]",
    "most_words": str(MOST_WORDS),
}


def macro_statements() -> list[str]:
    """Return the statements that make the macros (and, after each, its comment)."""
    text = files("exegete.tools.store").joinpath("macros.sql").read_text(encoding="utf-8")
    text = "\n".join(line for line in text.splitlines() if not line.startswith("--"))
    text = re.sub(r"\{\{(\w+)\}\}", lambda found: _SOURCES[found[1]], text)
    return [statement.strip() for statement in re.split(r";\s*\n|;\s*$", text) if statement.strip()]

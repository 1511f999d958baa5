"""Windows as text for people and language models (PROTOCOLS §2).

Firing tokens are wrapped in `<<` `>>`. Corpus text is untrusted: delimiter look-alikes in it are escaped, so no window can
forge a mark, close a fence or pose as an instruction.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import groupby

OPEN, CLOSE = "<<", ">>"
_LOOK_ALIKES = str.maketrans({"<": "‹", ">": "›", "`": "ˋ"})
_CONTROL = {c: f"\\x{c:02x}" for c in [*range(32), 127, *range(128, 160)]} | {0x0A: "⏎", 0x09: "→", 0x0D: "\\r"}
_INVISIBLE = dict.fromkeys(
    [
        *(0x00AD, 0x061C, 0x180E, 0xFEFF, 0x2028, 0x2029),
        *range(0x200B, 0x2010),
        *range(0x202A, 0x202F),
        *range(0x2060, 0x2070),
        *range(0xD800, 0xE000),
        *range(0xE0000, 0xE1000),
    ],
    "�",
)
"""Format characters, halves of surrogate pairs (they have no UTF-8), and the tag characters, which spell hidden text."""
_CLEAN = {**_LOOK_ALIKES, **_CONTROL, **_INVISIBLE}


def escape(text: str) -> str:
    """Return corpus text with delimiter look-alikes, control and invisible characters replaced by visible ones."""
    return text.translate(_CLEAN)


def render_window(tokens: Sequence[str], marks: Collection[int] = ()) -> str:
    """Return the tokens joined, each run of marked positions inside one `<<…>>`, everything else escaped.

    For example `render_window([" a", " b", " c"], {1})` is `" a<< b>> c"`.
    """
    if not marks:
        return escape("".join(tokens))
    wanted = frozenset(marks)
    # A run of equally marked tokens is escaped in one go: prompts are made of hundreds of thousands of tokens a second.
    runs = groupby(range(len(tokens)), key=wanted.__contains__)
    texts = ((marked, escape("".join([tokens[i] for i in run]))) for marked, run in runs)
    return "".join([f"{OPEN}{text}{CLOSE}" if marked else text for marked, text in texts])


def quantised(activation: float, peak: float) -> int:
    """Return an activation as a whole number from 0 to 10: `ceil(10·a/peak)`, clamped (PROTOCOLS §2)."""
    if peak <= 0 or not math.isfinite(activation):
        return 0
    return max(0, min(10, math.ceil(10 * activation / peak)))

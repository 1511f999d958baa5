"""Windows as text for people and language models (PROTOCOLS §2).

Firing tokens are wrapped in `<<` `>>`. Corpus text is untrusted: delimiter look-alikes in it are escaped, so no window can
forge a mark, close a fence or pose as an instruction. What reaches a screen passes `visible` (or `visible_json`), so that
no text of a corpus or of a language model commands a terminal.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Collection, Sequence
from itertools import groupby

OPEN, CLOSE = "<<", ">>"
_LOOK_ALIKES = str.maketrans(
    {"<": "‹", ">": "›", "`": "ˋ"}
    # Their wide and small forms, which some tokenizers make the same as them (compatibility normalisation).
    | {"\uff1c": "‹", "\uff1e": "›", "\ufe64": "‹", "\ufe65": "›", "\uff40": "ˋ"}
)
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
_SHOWN_AS = {"\n": "⏎", "\t": "→", "\r": "\\r"}
_UNSEEN = frozenset(("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"))
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


def visible(text: str) -> str:
    """Return `text` with every control, format, private or unassigned character replaced by a visible escape.

    For example ESC becomes `\\x1b` and the right-to-left override `\\u202e`; line breaks become `⏎`.
    """
    # Nearly all text is plain, and `isprintable` is true of nothing that is unseen.
    if text.isprintable():
        return text
    return "".join(_SHOWN_AS.get(c) or (_escape(c) if unicodedata.category(c) in _UNSEEN else c) for c in text)


def visible_json(text: str) -> str:
    """Return JSON text that says the same with every unseen character but line breaks as JSON's own escape."""
    if text.isascii() and "\x7f" not in text:
        return text
    unseen = {c for c in text if c != "\n" and unicodedata.category(c) in _UNSEEN}
    return text.translate({ord(c): json.dumps(c)[1:-1] if c != "\x7f" else "\\u007f" for c in unseen})


def quantised(activation: float, peak: float) -> int:
    """Return an activation as a whole number from 0 to 10: `ceil(10·a/peak)`, clamped (PROTOCOLS §2)."""
    if peak <= 0 or not math.isfinite(activation):
        return 0
    return max(0, min(10, math.ceil(10 * activation / peak)))


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"

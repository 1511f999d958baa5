"""Untrusted text in what a tool returns: fenced as the prompts fence it, and cut without leaving a fence open.

1. Labels, windows, prompts, rows and the like stand between tags, `<label>…</label>`, each on one line and escaped
   (`exegete.tools.prompting`): nothing in them can close the fence, forge a mark or begin a message.
2. What is too long is cut at a line; a fence that the cut left open is closed, and a last line says how much is missing
   and how to get it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from exegete.tools.prompting import line, window_line

_TAG = re.compile(r"(?<!<)<(/?)([a-z]+)(?: \d+)?>(?!>)")
"""Our own fences; untrusted text has no such brackets, and the mark of a firing token has two."""


def fenced(tag: str, text: str, number: int | None = None) -> str:
    """Return untrusted text on one line between tags, for example `<label>a cat</label>` or `<window 2>…</window>`."""
    return _between(tag, line(text), number)


def fenced_text(tag: str, text: str, number: int | None = None) -> str:
    """Return untrusted text between tags with its white space kept, line breaks as ⏎; `as_meant` makes them line breaks again."""
    return _between(tag, window_line([text]), number)


def as_meant(text: str) -> str:
    """Return a text that a model wrote after one that it was shown: where it wrote ⏎ it means a line break."""
    return text.replace("⏎", "\n")


def fenced_window(tokens: Sequence[str], marks: Collection[int] = (), number: int | None = None) -> str:
    """Return tokens between the tags of a window, runs of marked ones inside `<<` `>>`, white space kept."""
    return _between("window", window_line(tokens, marks), number)


def quoted(piece: str) -> str:
    """Return one token in quotes, escaped, its white space visible: `" DESC"`."""
    return f'"{window_line([piece])}"'


def cut(text: str, most: int, rest: str) -> str:
    """Return `text`, or its first lines where it has more than `most` characters, and a line that names the rest.

    Args:
        text: as a tool returns it.
        most: characters of it that are kept, at most.
        rest: how to get what is missing, for example "ask for fewer rows".
    """
    if len(text) <= most:
        return text
    end = text.rfind("\n", 0, most + 1)
    # A single line may be longer than all that is allowed: then it is cut inside.
    kept = text[:end] if end > most // 2 else text[:most].rpartition(" ")[0] or text[:most]
    return f"{_closed(kept)}\n[cut: {len(kept):,} of {len(text):,} characters are shown; {rest}]"


def _between(tag: str, text: str, number: int | None) -> str:
    return f"<{tag if number is None else f'{tag} {number}'}>{text}</{tag}>"


def _closed(text: str) -> str:
    """Close the fences that a cut left open."""
    bare = re.sub(r"(?<!<)<(?:/?[a-z]*(?: \d*)?)?$", "", text)  # A tag that was cut in two.
    open_tags: list[str] = []
    for closing, tag in _TAG.findall(bare):
        if not closing:
            open_tags.append(tag)
        elif open_tags and open_tags[-1] == tag:
            open_tags.pop()
    return bare + "".join(f"…</{tag}>" for tag in reversed(open_tags))

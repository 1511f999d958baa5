"""A language model in this process, behind the real client, journal and budget: for tests of what happens above the wire.

It explains by the words that are marked most often, one at first; asked to put an explanation right, it adds the words that are
marked in what was missed. It judges by the words that an explanation lists, with an error rate by a hash of what it reads.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any
from zlib import crc32

import pytest

from exegete.tools.llm import Reply, Request, Usage, opening

SPEC = "openai:scripted@http://127.0.0.1:1/v1"
_MARK = re.compile(r"<<\s*(\w+)>>")
_LISTED = re.compile(r"words? ([\w, ]+)\.")
_WINDOW = re.compile(r"<window \d+>(.*?)</window>")
_MISSED = re.compile(r"<missed \d+>(.*?)</missed>")


class ScriptedWire:
    """Answers at once, and counts what it is asked by kind: explain, refine, judge."""

    name = SPEC

    def __init__(self, error: float = 0.0) -> None:
        self.error = error
        self.harsh = 0.0
        """Error rate on windows that hold the word `(harsh)`."""
        self.asked: Counter[str] = Counter()
        self.questions: Counter[str] = Counter()

    async def send(self, request: Request) -> Reply:
        """Return the reply."""
        text = request.messages[-1].text
        self.questions[request.id(self.name)] += 1
        if "<draft>" in text:
            kind, answer = "refine", self._refined(text)
        elif "<explanation>" in text:
            kind, answer = "judge", self._judged(text)
        else:
            kind, answer = "explain", self._explained(text, request.sample)
        self.asked[kind] += 1
        return Reply("ok", json.dumps(answer), model="scripted", usage=Usage(len(text) // 4, 0, 0, 20))

    def _explained(self, text: str, sample: int) -> dict[str, Any]:
        ranked = sorted(Counter(_MARK.findall(text)).items(), key=lambda pair: (-pair[1], pair[0]))
        return _answer([ranked[sample % len(ranked)][0]])

    def _refined(self, text: str) -> dict[str, Any]:
        draft = text[: text.index("</draft>")]
        listed = _LISTED.search(draft)
        known = listed[1].split(", ") if listed else []
        missed = [word for passage in _MISSED.findall(text) for word in _MARK.findall(passage)]
        added = sorted(set(missed) - set(known))[:2]
        return _answer([*known, *added]) if added else {"explanation": None, "predicate": None}

    def _judged(self, text: str) -> dict[str, Any]:
        explanation = re.search(r"<explanation>(.*?)</explanation>", text)
        listed = _LISTED.search(explanation[1]) if explanation else None
        words = set(listed[1].split(", ")) if listed else set()
        shown = _WINDOW.findall(text)
        return {"verdicts": [int(self._applies(words, one) is not self._flipped(one)) for one in shown]}

    def _applies(self, words: set[str], shown: str) -> bool:
        return bool(words & set(_MARK.findall(shown) if "<<" in shown else shown.split()))

    def _flipped(self, shown: str) -> bool:
        rate = self.harsh if "(harsh)" in shown else self.error
        return crc32(shown.replace(" (harsh)", "").encode()) % 1_000 < 1_000 * rate

    async def close(self) -> None:
        """There is nothing to give back."""


def scripted(monkeypatch: pytest.MonkeyPatch, error: float = 0.0) -> ScriptedWire:
    """Put a new wire in the place of every provider's, and return it."""
    wire = ScriptedWire(error)
    monkeypatch.setattr(opening, "_wire", lambda spec, limits, device: wire)
    monkeypatch.setenv("EXEGETE_API_KEY", "none")
    return wire


def _answer(words: list[str]) -> dict[str, Any]:
    return {
        "explanation": f"Fires on the {'words' if len(words) > 1 else 'word'} {', '.join(words)}.",
        "predicate": None,
    }

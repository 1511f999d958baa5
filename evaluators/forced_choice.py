"""Forced choice: a language model is shown two things and says which one an explanation is about (PROTOCOLS §8, §10).

1. The right one stands first in half of the questions, drawn by seed: who always answers 1 is right half of the time.
2. Where both read alike there is nothing to choose: such a pair is not asked, and counts as half right.
3. Accuracy is the share that is right, with Wilson's interval; a reply that does not answer is a failure and counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from exegete.evaluators.statistics import UNDEFINED, Interval, wilson
from exegete.tools.llm import Client, Reply, schema_text
from exegete.tools.prompting import Rendered
from exegete.tools.seeds import generator

SCHEMA = schema_text(
    {
        "type": "object",
        "properties": {"choice": {"type": "integer", "enum": [1, 2]}},
        "required": ["choice"],
        "additionalProperties": False,
    }
)

Shown = str | tuple[str, ...]


@dataclass(frozen=True)
class Choices:
    """What came of some questions."""

    outcomes: tuple[float | None, ...]
    """1 right, 0 wrong, ½ where there was nothing to choose, None where the reply does not answer."""
    statuses: tuple[str, ...]
    """"ok", "alike", or why there is no answer."""

    @property
    def given(self) -> list[float]:
        """The outcomes that are known."""
        return [outcome for outcome in self.outcomes if outcome is not None]

    @property
    def failures(self) -> int:
        """Questions without an answer."""
        return len(self.outcomes) - len(self.given)

    @property
    def status(self) -> str:
        """ "ok" where there is an accuracy, else why there is none."""
        if not self.outcomes:
            return "no_items"
        # Pairs that read alike say something beside answers, and nothing where every question that was asked failed.
        failed = [status for status in self.statuses if status not in ("ok", "alike")]
        return failed[0] if failed and "ok" not in self.statuses else "ok"

    def accuracy(self) -> Interval:
        """Return the share of right answers with its 95 % interval; undefined where nothing is answered."""
        right, n = sum(self.given), len(self.given)
        return Interval(right / n, *wilson(right, n)) if self.status == "ok" else UNDEFINED


async def choose(
    client: Client,
    pairs: Sequence[tuple[Shown, Shown]],
    ask: Callable[[int, Shown, Shown], Rendered],
    seed: int,
    *,
    max_tokens: int = 1_024,
    temperature: float | None = None,
) -> Choices:
    """Ask about each pair (right, wrong).

    Args:
        client: the language model.
        pairs: what is shown.
        ask: the prompt of a pair, by its number and the two things in the order in which they are shown.
        seed: of the order.
        max_tokens: of an answer, reasoning included.
        temperature: None leaves the provider's default.

    Raises:
        UserError: the client cannot be asked at all.
    """
    places = generator(seed, "forced choice", "order").permutation(len(pairs)) % 2

    async def one(index: int) -> tuple[float | None, str]:
        right, wrong = pairs[index]
        if right == wrong:
            return 0.5, "alike"
        first, second = (right, wrong) if places[index] == 0 else (wrong, right)
        request = ask(index, first, second).request(SCHEMA, max_tokens=max_tokens, temperature=temperature)
        return _outcome(await client.complete(request), int(places[index]) + 1)

    found = await asyncio.gather(*map(one, range(len(pairs))))
    return Choices(tuple(outcome for outcome, _ in found), tuple(status for _, status in found))


def _outcome(reply: Reply, place: int) -> tuple[float | None, str]:
    if reply.status != "ok":
        return None, reply.status
    choice = reply.parsed.get("choice") if isinstance(reply.parsed, dict) else None
    if choice not in (1, 2) or isinstance(choice, bool):
        return None, "unparsed"
    return float(choice == place), "ok"

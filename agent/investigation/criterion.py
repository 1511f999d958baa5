"""Whether what the model writes meets a criterion, as a judge says.

1. Each prompt is continued a few times by sampling. The random numbers depend on seed, prompt and number of the sample
   alone, so where an intervention changes nothing the text is the same, clean and changed.
2. Each different pair of prompt and continuation is judged once, by itself: a verdict depends on nothing else.
3. The score of a trial is the share of its continuations that meet the criterion, of those that were judged. A reply
   without a verdict is a failure: it is counted, and scored neither way; a trial without any verdict has no score.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from exegete.tools.generation import generate
from exegete.tools.live_model import LiveModel, Trial
from exegete.tools.llm import Client, Reply, schema_text
from exegete.tools.prompting import line, render, window_line

MAX_TOKENS = 256
"""Of a verdict."""
SCHEMA = schema_text(
    {
        "type": "object",
        "properties": {"meets": {"type": "boolean"}},
        "required": ["meets"],
        "additionalProperties": False,
    }
)

Asker = Callable[[Coroutine[Any, Any, Any]], Any]
"""Runs what is asked of a judge to its end, from a thread that is not the judge's."""


@dataclass
class Criterion:
    """A measure of trials: the share of continuations that meet `text`. Safe to use from several threads."""

    text: str
    judge: Client
    ask: Asker
    tokens: int
    samples: int
    seed: int
    failures: int = 0
    """Continuations that got no verdict, so far."""
    _known: dict[tuple[str, str], bool] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, model: LiveModel, trials: Sequence[Trial]) -> list[float]:
        """Return the share for each trial, NaN where no continuation of it could be judged.

        Raises:
            UserError: as `generate`, or the judge cannot be asked at all.
        """
        drawn = [replace(trial, draw=trial.draw * self.samples + i) for trial in trials for i in range(self.samples)]
        written = generate(model, drawn, self.tokens, temperature=1.0, seed=self.seed)
        pairs = [(model.text(trial.tokens), model.text(one.tokens)) for trial, one in zip(drawn, written, strict=True)]
        verdicts = self._verdicts(pairs)
        groups = [verdicts[at : at + self.samples] for at in range(0, len(verdicts), self.samples)]
        return [_share([one for one in group if one is not None]) for group in groups]

    def _verdicts(self, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        with self._lock:
            new = [pair for pair in dict.fromkeys(pairs) if pair not in self._known]
        found: dict[tuple[str, str], bool] = {}
        if new:
            replies = self.ask(self._asked(new))
            found = {
                pair: said for pair, reply in zip(new, replies, strict=True) if (said := verdict(reply)) is not None
            }
        with self._lock:
            self._known |= found
            given = [self._known.get(pair) for pair in pairs]
            self.failures += given.count(None)
        return given

    async def _asked(self, pairs: Sequence[tuple[str, str]]) -> list[Reply]:
        return await asyncio.gather(*(self._complete(*pair) for pair in pairs))

    async def _complete(self, beginning: str, continuation: str) -> Reply:
        prompt = render(
            "judge_criterion",
            criterion=line(self.text),
            beginning=window_line([beginning]),
            continuation=window_line([continuation]),
        )
        return await self.judge.complete(prompt.request(SCHEMA, max_tokens=MAX_TOKENS))


def verdict(reply: Reply) -> bool | None:
    """Return what a reply says, None where it says nothing that counts."""
    said = reply.parsed.get("meets") if reply.status == "ok" and isinstance(reply.parsed, dict) else None
    return said if isinstance(said, bool) else None


def _share(verdicts: Sequence[bool]) -> float:
    return sum(verdicts) / len(verdicts) if verdicts else math.nan

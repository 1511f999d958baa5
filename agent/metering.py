"""What the calls of a piece of work took: the measure that a plan is made from.

Whoever measures opens `metered`; every reply that a language model gives in that context, in whatever task, is counted there,
under the stage that is open (`stage`). A reply from the journal counts with what it took when it was asked, so that a plan
made twice says the same; what was paid for now is counted apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exegete.evaluators import Evaluation, Evaluator, Judge
    from exegete.tools.explainers import Explanation
    from exegete.tools.llm import Reply
    from exegete.tools.windows import LatentEvidence


@dataclass
class Totals:
    """Sums over calls."""

    calls: float = 0.0
    input_tokens: float = 0.0
    output_tokens: float = 0.0
    usd: float = 0.0
    seconds: float = 0.0
    """From sending to answer, one call after the other."""
    text_bytes: float = 0.0
    """Of the replies."""

    def __add__(self, other: Totals) -> Totals:
        return Totals(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass
class Meter:
    """What has been counted."""

    stages: dict[str, Totals] = field(default_factory=dict)
    """Stage → its calls; those outside of any stage are under `""`."""
    paid_usd: float = 0.0
    """Of the replies that no journal had."""
    fresh: int = 0
    """Calls that no journal had."""

    @property
    def total(self) -> Totals:
        """All stages together."""
        return sum(self.stages.values(), Totals())


_meter: ContextVar[Meter | None] = ContextVar("meter", default=None)
_stage: ContextVar[str] = ContextVar("stage", default="")


@contextmanager
def metered() -> Iterator[Meter]:
    """Count the calls made in this context, and in the tasks that it starts."""
    meter = Meter()
    token = _meter.set(meter)
    try:
        yield meter
    finally:
        _meter.reset(token)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Count the calls made in this context under `name`."""
    token = _stage.set(name)
    try:
        yield
    finally:
        _stage.reset(token)


def seen(reply: Reply) -> None:
    """Count a reply, where somebody measures."""
    meter = _meter.get()
    if meter is None:
        return
    usage = reply.usage + reply.known_usage
    size = len(reply.text.encode("utf-8", "replace"))
    one = Totals(1, usage.input_tokens, usage.output_tokens, reply.usd + reply.known_usd, reply.seconds, size)
    name = _stage.get()
    meter.stages[name] = meter.stages.get(name, Totals()) + one
    if not reply.cached:
        meter.fresh += 1
        meter.paid_usd += reply.usd


class Staged:
    """An evaluator whose calls are counted under a stage; otherwise the evaluator that it wraps."""

    def __init__(self, evaluator: Evaluator, stage: str) -> None:
        self._evaluator, self._stage = evaluator, stage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._evaluator, name)

    async def evaluate(self, explanation: Explanation, evidence: LatentEvidence, judge: Judge, seed: int) -> Evaluation:
        """Evaluate as the wrapped evaluator does."""
        with stage(self._stage):
            return await self._evaluator.evaluate(explanation, evidence, judge, seed)

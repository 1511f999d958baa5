"""What an evaluator spends: wrappers that count what passes through a client, a scorer or a judge and change nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from exegete.evaluators.contract import Item, Judge, Task, Verdict
from exegete.tools.explainers import Explanation
from exegete.tools.llm import Client, PromptScorer, Reply, Request, Usage


@dataclass
class Meter:
    """What was spent so far."""

    prompts: int = 0
    """Prompts that a judge was given."""
    calls: int = 0
    """Replies of a language model; those that were known already are not among them."""
    known: int = 0
    """Replies taken from a journal."""
    scored: int = 0
    """Texts that a local model gave the log-probability of."""
    usage: Usage = field(default_factory=Usage)
    usd: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)
    """Replies by status, those that are not "ok"."""

    def described(self, priced: bool) -> dict[str, Any]:
        """Return it as plain values; `usd` is null where no price is known and something was asked."""
        return {
            "prompts": self.prompts,
            "calls": self.calls,
            "known": self.known,
            "scored_texts": self.scored,
            "input_tokens": self.usage.input_tokens,
            "output_tokens": self.usage.output_tokens,
            "usd": self.usd if priced or not self.calls else None,
            "failures": dict(self.failures),
        }


class MeteredClient:
    """A client whose replies are counted."""

    def __init__(self, client: Client, meter: Meter) -> None:
        self.name = client.name
        self._client = client
        self._meter = meter

    async def complete(self, request: Request) -> Reply:
        """Return the client's reply."""
        reply = await self._client.complete(request)
        if reply.cached:
            self._meter.known += 1
        else:
            self._meter.calls += 1
            self._meter.usage += reply.usage
            self._meter.usd += reply.usd
        if reply.status != "ok":
            self._meter.failures[reply.status] += 1
        return reply

    async def close(self) -> None:
        """Leave the client open: it belongs to whoever made it."""


class MeteredScorer:
    """A scorer whose texts are counted."""

    def __init__(self, scorer: PromptScorer, meter: Meter) -> None:
        self.name = scorer.name
        self._scorer = scorer
        self._meter = meter

    async def logprobs(self, prompt: str, continuations: Sequence[str]) -> list[float]:
        """Return the scorer's log-probabilities."""
        self._meter.scored += len(continuations)
        return await self._scorer.logprobs(prompt, continuations)


class MeteredJudge:
    """A judge whose prompts are counted. What else it has (parameters, how it reads) is passed on."""

    def __init__(self, judge: Judge, meter: Meter) -> None:
        self.name = judge.name
        self._judge = judge
        self._meter = meter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._judge, name)

    async def judge(self, task: Task, explanation: Explanation, items: Sequence[Item], seed: int) -> list[Verdict]:
        """Return the judge's verdicts."""
        self._meter.prompts += 1
        return await self._judge.judge(task, explanation, items, seed)

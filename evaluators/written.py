"""What a language model writes and rates for the scores of generation (PROTOCOLS §9): two kinds of request."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from exegete.tools.explainers import Explanation
from exegete.tools.llm import Client, Reply, schema_text
from exegete.tools.prompting import line, render, window_line
from exegete.tools.seeds import generator

PER_PROMPT = 5


@dataclass(frozen=True)
class Asking:
    """Whom to ask, and how."""

    client: Client
    max_tokens: int = 1_024
    temperature: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """As `Rendered.request` takes them."""
        return {"max_tokens": self.max_tokens, "temperature": self.temperature}


@dataclass(frozen=True)
class Texts:
    """Texts that should make the latent fire, and texts that should not."""

    firing: tuple[str, ...]
    silent: tuple[str, ...]
    statuses: tuple[str, ...]
    """Of each request."""


@dataclass(frozen=True)
class Ratings:
    """How clearly passages express an explanation, in the order in which they were given."""

    values: tuple[int | None, ...]
    """0, 1 or 2; None where the reply does not say."""
    prompts: tuple[int, ...]
    """Passages with the same number were rated in one prompt."""
    statuses: tuple[str, ...]

    @property
    def failures(self) -> int:
        """Passages without a rating."""
        return self.values.count(None)


async def write_texts(
    asking: Asking, explanation: Explanation, samples: Sequence[str], requests: int, per_request: int = PER_PROMPT
) -> Texts:
    """Have `requests` × `per_request` texts of either kind written, in the style of `samples`."""
    rendered = render(
        "write_texts",
        explanation=line(explanation.text),
        samples=[window_line([sample]) for sample in samples],
        count=per_request,
    )
    listed = {"type": "array", "items": {"type": "string"}, "minItems": per_request, "maxItems": per_request}
    schema = _object(firing=listed, silent=listed)
    asked = [rendered.request(schema, sample=number, **asking.options) for number in range(requests)]
    replies = await asyncio.gather(*map(asking.client.complete, asked))
    answers = [_lists(reply, per_request) for reply in replies]
    return Texts(
        tuple(text for answer in answers if answer for text in answer[0]),
        tuple(text for answer in answers if answer for text in answer[1]),
        tuple("ok" if answer else _failure(reply) for reply, answer in zip(replies, answers, strict=True)),
    )


async def rate(asking: Asking, explanation: Explanation, passages: Sequence[Sequence[str]], seed: int) -> Ratings:
    """Have passages, each a run of pieces, rated; they are shuffled by `seed` and rated five in a prompt."""
    order = generator(seed, "ratings", "order").permutation(len(passages))
    groups = [order[at : at + PER_PROMPT].tolist() for at in range(0, len(order), PER_PROMPT)]

    async def one(group: Sequence[int]) -> tuple[list[int] | None, str]:
        windows = [window_line(passages[index]) for index in group]
        item = {"type": "integer", "enum": [0, 1, 2]}
        schema = _object(ratings={"type": "array", "items": item, "minItems": len(group), "maxItems": len(group)})
        prompt = render("rating", explanation=line(explanation.text), windows=windows)
        reply = await asking.client.complete(prompt.request(schema, **asking.options))
        found = _rated(reply, len(group))
        return found, "ok" if found else _failure(reply)

    answers = await asyncio.gather(*map(one, groups))
    values: list[int | None] = [None] * len(passages)
    prompts, statuses = np.zeros(len(passages), dtype=np.int64), [""] * len(passages)
    for number, (group, (found, status)) in enumerate(zip(groups, answers, strict=True)):
        for place, index in enumerate(group):
            values[index] = found[place] if found else None
            prompts[index], statuses[index] = number, status
    return Ratings(tuple(values), tuple(prompts.tolist()), tuple(statuses))


def _object(**properties: Any) -> str:
    return schema_text(
        {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    )


def _lists(reply: Reply, count: int) -> tuple[list[str], list[str]] | None:
    if reply.status != "ok" or not isinstance(reply.parsed, dict):
        return None
    firing, silent = reply.parsed.get("firing"), reply.parsed.get("silent")
    for found in (firing, silent):
        if not isinstance(found, list) or len(found) != count or not all(isinstance(text, str) for text in found):
            return None
    return firing, silent  # type: ignore[return-value]


def _rated(reply: Reply, count: int) -> list[int] | None:
    if reply.status != "ok" or not isinstance(reply.parsed, dict):
        return None
    found = reply.parsed.get("ratings")
    if not isinstance(found, list) or len(found) != count:
        return None
    return found if all(value in (0, 1, 2) and not isinstance(value, bool) for value in found) else None


def _failure(reply: Reply) -> str:
    return "unparsed" if reply.status == "ok" else reply.status

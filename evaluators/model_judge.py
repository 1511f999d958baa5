"""The judge that asks a language model: detection (PROTOCOLS §3) and fuzzing (§4), one call for the items of one prompt.

1. The items are rendered into the prompt of the task: windows escaped and fenced, marked for fuzzing, never the truth.
2. The answer is a list of as many verdicts as items, each 0 or 1, by JSON Schema. The client mends a reply of the wrong
   length or form once; after that every item of the prompt gets a verdict without an answer, with a status.
3. Where the client gives log-probabilities, the probability of a verdict is p(1) / (p(0) + p(1)) at the token that states
   it. Where a verdict has no token of its own, or the token no alternatives, it is left out, not guessed.

Source: Paulo et al. 2024, "Automatically Interpreting Millions of Features in Large Language Models", sections 'detection'
and 'fuzzing'; the wording of the prompts is ours.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

from exegete.evaluators.contract import Item, Task, Verdict, VerdictStatus, judge
from exegete.tools.explainers import Explanation
from exegete.tools.llm.contract import Client, Reply, TokenLogprob, schema_text
from exegete.tools.prompting import Rendered, line, prompt_digest, render, window_line

_ARRAY = re.compile(r'"verdicts"\s*:\s*\[([\s01,]*)\]')
_STRUCTURE = ' \t\r\n[],"'
"""What may share a token with a verdict."""


@judge("model")
class ModelJudge:
    """Judges by asking a language model."""

    def __init__(
        self, client: Client, temperature: float | None = None, max_tokens: int = 1_024, logprobs: bool = True
    ) -> None:
        """Ask `client`.

        Args:
            client: the language model.
            temperature: None leaves the provider's default (some models take no other); 0 where it can be set.
            max_tokens: of an answer, reasoning included.
            logprobs: ask for log-probabilities, where the client has them.
        """
        self.name = client.name
        self._client = client
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._logprobs = logprobs

    def parameters(self, task: Task) -> Mapping[str, Any]:
        """Return what the verdicts of `task` depend on beside the model's name: prompt digest and request options."""
        return {
            "prompt_digest": prompt_digest(task),
            "temperature": self._temperature,
            "max_tokens": self._max_tokens,
            "logprobs": self._logprobs,
        }

    async def judge(self, task: Task, explanation: Explanation, items: Sequence[Item], seed: int) -> list[Verdict]:
        """Return one verdict per item, in order. `seed` is not used: the same question has the same answer.

        Raises:
            UserError: the client cannot be asked at all.
        """
        if not items:
            return []
        request = prompt(task, explanation, items).request(
            schema=verdict_schema(len(items)),
            max_tokens=self._max_tokens,
            temperature=self._temperature,
            logprobs=self._logprobs,
        )
        return verdicts(await self._client.complete(request), len(items))


def prompt(task: Task, explanation: Explanation, items: Sequence[Item]) -> Rendered:
    """Return the prompt for `items`: unmarked windows for detection, marked ones for fuzzing."""
    shown = [window_line(item.tokens, (item.marks or ()) if task == "fuzzing" else ()) for item in items]
    return render(task, explanation=line(explanation.text), windows=shown)


def verdict_schema(count: int) -> str:
    """Return the JSON Schema of a list of `count` verdicts: `{"verdicts": [0, 1, …]}`."""
    verdict = {"type": "integer", "enum": [0, 1]}
    listed = {"type": "array", "items": verdict, "minItems": count, "maxItems": count}
    return schema_text(
        {"type": "object", "properties": {"verdicts": listed}, "required": ["verdicts"], "additionalProperties": False}
    )


def verdicts(reply: Reply, count: int) -> list[Verdict]:
    """Return `count` verdicts from a reply; all of one failure status where it has no such answer."""
    status = _status(reply, count)
    answers = _answers(reply.parsed) if status == "ok" else None
    if answers is None:
        return [Verdict(None, status="unparsed" if status == "ok" else status)] * count
    if len(answers) != count:
        return [Verdict(None, status="wrong_length")] * count
    chances = probabilities(reply.logprobs or (), answers)
    return [Verdict(applies, chance) for applies, chance in zip(answers, chances, strict=True)]


def probabilities(tokens: Sequence[TokenLogprob], answers: Sequence[bool]) -> list[float | None]:
    """Return for each answer the probability of 1 rather than 0 at the token that states it.

    `tokens` are those of the whole reply. None where the tokens do not spell the answers, where one token states several,
    or where nothing is known of the other answer.
    """
    text = "".join(token.token for token in tokens)
    found = list(_ARRAY.finditer(text))
    digits = [at for at in range(*found[-1].span(1)) if text[at] in "01"] if found else []
    if [text[at] == "1" for at in digits] != list(answers):
        return [None] * len(answers)
    stated: dict[int, TokenLogprob] = {}
    end = 0
    for token in tokens:
        inside = [at for at in digits if end <= at < end + len(token.token)]
        end += len(token.token)
        if len(inside) == 1:
            stated[inside[0]] = token
    return [_probability(stated[at]) if at in stated else None for at in digits]


def _probability(token: TokenLogprob) -> float | None:
    said = _stated(token.token)
    if said is None:
        return None
    mass = {"0": 0.0, "1": 0.0}
    for alternative, logprob in dict([*token.top, (token.token, token.logprob)]).items():
        digit = _stated(alternative)
        if digit is not None:
            mass[digit] += math.exp(logprob)
    # Without alternatives nothing is known of the other answer; with some, it is below the least of those given.
    total = mass["0"] + mass["1"]
    return mass["1"] / total if token.top and total > 0 and math.isfinite(total) else None


def _stated(token: str) -> str | None:
    bare = token.strip(_STRUCTURE)
    return bare if bare in ("0", "1") else None


def _status(reply: Reply, count: int) -> VerdictStatus:
    listed = _answers(_json(reply.text)) if reply.status == "unparsed" else None
    if listed is not None and len(listed) != count:
        return "wrong_length"
    known: tuple[str, ...] = get_args(VerdictStatus)
    return cast(VerdictStatus, reply.status) if reply.status in known else "error"


def _answers(parsed: Any) -> list[bool] | None:
    listed = parsed.get("verdicts") if isinstance(parsed, dict) else None
    if not isinstance(listed, list) or not all(type(one) is int and one in (0, 1) for one in listed):
        return None
    return [bool(one) for one in listed]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None

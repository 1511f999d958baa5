"""The calls of a language model, sorted: what is run, what is written down, what is answered at once.

1. Arguments that are no JSON object, or that no ledger could keep, are answered with what is wrong.
2. `hypothesis`, `update`, `claim` and `withdraw` become parts of the decision and are answered at once. A claim that says
   what an earlier one says replaces it; one that is withdrawn keeps its number.
3. `finish` ends the investigation, unless the same reply calls tools whose results the model has not seen.
4. Everything else is run as a tool, at most `MOST_CALLS` of a reply; whether there is such a tool is the toolbelt's to say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from exegete.agent.investigation.contract import Call, Claim, Hypothesis
from exegete.agent.investigation.conversation import Asked, sendable
from exegete.agent.investigation.fencing import fenced
from exegete.agent.investigation.schemas import fitting
from exegete.tools.errors import ToolError, nearest
from exegete.tools.llm import ToolCall

NOTES = ("hypothesis", "update", "claim", "withdraw", "finish")
NEEDED = ("hypothesis", "update", "claim", "finish")
"""Those without which nothing can be investigated."""
MOST_CALLS = 16
"""Tools of one reply that are run."""

_DEEPEST = 8
"""Lists and objects inside one another, in the arguments of a call."""
_NAME_CHARACTERS = 64


@dataclass
class Notebook:
    """What one reply comes to. `take` its calls; then read it."""

    turn: int
    """Number of the reply, from 1: part of the ids of its calls."""
    schemas: Mapping[str, Mapping[str, Any]]
    """Tool → JSON Schema of its arguments."""
    known: Mapping[str, Hypothesis]
    """By id, those of earlier replies."""
    experiments: frozenset[str]
    """Ids of those that have a result."""
    claims: list[Claim]
    """Those of earlier replies; `take` adds to them."""
    asked: list[Asked] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    hypotheses: dict[str, Hypothesis] = field(default_factory=dict)
    """New ones, and known ones with a new status."""
    answer: str | None = None
    """The answer, where it has finished."""

    def take(self, calls: Sequence[ToolCall]) -> None:
        """Sort the calls of the reply, in their order."""
        others = any(not self._is_note(call.name) for call in calls)
        for call in calls:
            self._take(call, others)

    def _take(self, call: ToolCall, others: bool) -> None:
        asked = Asked(sendable(call.id), _sendable_name(call.name), sendable(call.arguments_json))
        try:
            arguments = self._arguments(call)
            if not self._is_note(call.name):
                self.asked.append(replace(asked, run=self._run(call, arguments)))
                return
            fit = fitting(call.name, arguments, dict(self.schemas[call.name]))
            answer = self._finish(fit, others) if call.name == "finish" else self._note(call.name, fit)
        except ToolError as error:
            self.asked.append(replace(asked, answer=fenced("error", str(error)), failed=True))
        else:
            self.asked.append(replace(asked, answer=answer))

    def _is_note(self, name: str) -> bool:
        """Return whether this is a note; one that was not offered is a tool that is not there."""
        return name in NOTES and name in self.schemas

    def _arguments(self, call: ToolCall) -> dict[str, Any]:
        value, why = read_arguments(call.arguments_json)
        if value is None and call.name in self.schemas:
            takes = ", ".join(self.schemas[call.name].get("properties", {})) or "nothing"
            raise ToolError(f"{call.name}: the arguments cannot be read: {why}; give a JSON object, it takes {takes}")
        # Of an unknown tool the toolbelt says so.
        return value or {}

    def _run(self, call: ToolCall, arguments: dict[str, Any]) -> str:
        if len(self.calls) >= MOST_CALLS:
            raise ToolError(f"{call.name}: not run; call at most {MOST_CALLS} tools in one reply")
        made = Call(f"{self.turn}.{len(self.calls) + 1}", sendable(call.name)[:_NAME_CHARACTERS], arguments)
        self.calls.append(made)
        return made.id

    def _note(self, name: str, fit: Mapping[str, Any]) -> str:
        if name == "hypothesis":
            return self._state(str(fit["statement"]))
        if name == "update":
            return self._update(str(fit["hypothesis"]), fit["status"])
        if name == "withdraw":
            return self._withdraw(int(fit["claim"]), str(fit["why"]))
        return self._claim(_claimed(fit))

    def _state(self, statement: str) -> str:
        _said("hypothesis", "statement", statement)
        new = f"H{len(self.known.keys() | self.hypotheses.keys()) + 1}"
        self.hypotheses[new] = Hypothesis(new, statement)
        return f"Written down as {new}."

    def _update(self, name: str, status: Any) -> str:
        there = {**self.known, **self.hypotheses}
        if name not in there:
            known = ", ".join(there) or "none yet; state one with `hypothesis`"
            raise ToolError(f"update: there is no hypothesis {name!r}; there are: {known}.{nearest(name, there)}")
        self.hypotheses[name] = replace(there[name], status=status)
        return f"{name} is {status}."

    def _claim(self, claim: Claim) -> str:
        _said("claim", "statement", claim.statement)
        if claim.kind == "causal" and not claim.latents:
            raise ToolError("claim: a causal claim names the latents that are intervened on; give latents")
        replaced = [number for number, one in enumerate(self.claims) if one.statement == claim.statement]
        if replaced:
            self.claims[replaced[0]] = claim
        else:
            self.claims.append(claim)
        number = replaced[0] + 1 if replaced else len(self.claims)
        return f"Written down as claim {number}.{self._warning(claim)}"

    def _withdraw(self, number: int, why: str) -> str:
        _said("withdraw", "why", why)
        if not 1 <= number <= len(self.claims):
            known = f"1 to {len(self.claims)}" if self.claims else "none so far"
            raise ToolError(f"withdraw: there is no claim {number}; there are: {known}")
        self.claims[number - 1] = replace(self.claims[number - 1], withdrawn=why)
        return f"Claim {number} is withdrawn."

    def _warning(self, claim: Claim) -> str:
        missing = [one for one in claim.experiments if one not in self.experiments]
        if missing:
            return f" There is no experiment {', '.join(missing)}, so it will be reported as unverified."
        if claim.kind == "causal" and not claim.experiments:
            return " It names no experiment, so it will be reported as unverified."
        return ""

    def _finish(self, fit: Mapping[str, Any], others: bool) -> str:
        if others:
            raise ToolError("finish: not yet, since this reply also calls tools whose results you have not seen")
        _said("finish", "answer", str(fit["answer"]))
        self.answer = str(fit["answer"])
        return "Finished."


def read_arguments(text: str) -> tuple[dict[str, Any] | None, str]:
    """Return the arguments that a model wrote, or None and why they cannot be used."""
    try:
        value = json.loads(text or "{}", parse_constant=_no_number)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return None, "they hold half of a surrogate pair"
    except (ValueError, RecursionError) as error:
        return None, f"they are no JSON ({str(error)[:100]})"
    if not isinstance(value, dict):
        return None, "they are no object"
    if _depth(value) > _DEEPEST:
        return None, f"more than {_DEEPEST} lists and objects are inside one another"
    return value, ""


def claims_of(asked: Iterable[Asked], schemas: Mapping[str, Mapping[str, Any]]) -> list[Claim]:
    """Return the claims that were written down, or taken back, by these calls of earlier replies.

    Those that did not fit do not fit now.
    """
    book = Notebook(0, schemas, {}, frozenset(), [])
    book.take([ToolCall(one.id, one.name, one.arguments) for one in asked if one.name in ("claim", "withdraw")])
    return book.claims


def _claimed(fit: Mapping[str, Any]) -> Claim:
    listed: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fit.items()}
    return Claim(**listed)


def _said(tool: str, what: str, text: str) -> None:
    if not text.strip():
        raise ToolError(f"{tool}: {what!r} is empty; say it in a sentence")


def _sendable_name(name: str) -> str:
    """Return a tool's name as providers take it back."""
    return re.sub(r"[^a-zA-Z0-9_-]", "_", name)[:_NAME_CHARACTERS] or "_"


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _depth(value: Any) -> int:
    """Return how many lists and objects are inside one another, without recursing."""
    depth, level = 0, [value]
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth

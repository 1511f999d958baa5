"""The conversation with a language model that investigates: kept as plain values, put together for each request.

1. A `Turn` is a reply of the model's and what it was told right before. Each of its calls is either run as a tool, under
   an id of ours (`2.1` is the first call of the second reply; providers repeat theirs), or answered at once: a note, a call
   that cannot be read. `Turn.kept` is what `Decision.said` keeps of it.
2. `conversation` puts it together: system prompt and question, then for each turn the reply with its calls, then their
   results and what the model was told next. Results come from the view, so they are kept once.
3. Once the turns have more than `most` characters, the oldest are shortened – results and words to their beginning, long
   arguments too – until half of that is left; the last two never are. Where the line runs follows from the conversation
   alone, so a resumed investigation sends the same bytes. It moves seldom: what stands before it stays in a provider's cache.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from exegete.agent.investigation.contract import Result
from exegete.agent.investigation.fencing import cut
from exegete.tools.llm import Message, ToolCall, ToolResult

OLD_CHARACTERS = 500
"""Of each result and each reply in a turn that is shortened."""
IN_FULL = 2
"""The last turns, which are never shortened."""
SILENCE = "…"
"""Stands for a reply without a word: providers take no empty message."""

_NOT_RUN = "This call was not run."


@dataclass(frozen=True)
class Asked:
    """One call of a reply, and what becomes of it."""

    id: str
    """The provider's."""
    name: str
    """As it can be sent."""
    arguments: str
    """As the model wrote them."""
    run: str = ""
    """Id of the `Call` that is run; empty where it is answered at once."""
    answer: str = ""
    failed: bool = False
    """Whether the answer is an error."""


@dataclass(frozen=True)
class Turn:
    """One reply, and the words that the model was told right before."""

    told: str
    said: str
    calls: tuple[Asked, ...] = ()
    cut: bool = False
    """Whether it was cut off: then nothing in it counts."""

    def kept(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> Turn:
        """Return the turn that `kept` made JSON of."""
        return cls(kept["told"], kept["said"], tuple(Asked(**call) for call in kept["calls"]), kept["cut"])


def conversation(
    beginning: Sequence[Message], turns: Sequence[Turn], told: str, results: Mapping[str, Result], most: int
) -> tuple[Message, ...]:
    """Return the messages of the next request.

    Args:
        beginning: system prompt and question; the last message is the user's.
        turns: so far.
        told: what the model is told now.
        results: call id → what became of it. A call that has none was not run.
        most: characters of the turns, beyond which the oldest are shortened.
    """
    tolds = [*(turn.told for turn in turns), told]
    pairs = zip(turns, tolds[1:], strict=True)
    full = [_exchange(turn, after, results) for turn, after in pairs]
    brief = [_shortened(*exchange) for exchange in full]
    line = _line([_size(one) for one in full], [_size(one) for one in brief], most)
    first = beginning[-1].text if not tolds[0] else f"{beginning[-1].text}\n\n{tolds[0]}"
    chosen = [message for exchange in (*brief[:line], *full[line:]) for message in exchange]
    return (*beginning[:-1], Message("user", first), *chosen)


def _exchange(turn: Turn, after: str, results: Mapping[str, Result]) -> tuple[Message, Message]:
    """Return a reply, and the message that answers it."""
    calls = tuple(ToolCall(call.id, call.name, call.arguments) for call in turn.calls)
    # Nor one of blanks.
    said = turn.said if turn.said.strip() else "" if calls else SILENCE
    answers = tuple(_answer(call, results.get(call.run)) for call in turn.calls)
    return Message("assistant", said, calls), Message("user", after, results=answers)


def _answer(call: Asked, result: Result | None) -> ToolResult:
    if not call.run:
        return ToolResult(call.id, call.answer, call.failed)
    if result is None:
        return ToolResult(call.id, _NOT_RUN, failed=True)
    text = f"[{result.experiment}]\n{result.outcome.text}" if result.experiment else result.outcome.text
    return ToolResult(call.id, sendable(text).strip() or SILENCE, failed=result.status != "ok")


def _shortened(reply: Message, answer: Message) -> tuple[Message, Message]:
    calls = tuple(ToolCall(call.id, call.name, _brief(call.arguments_json)) for call in reply.calls)
    said = cut(reply.text, OLD_CHARACTERS, "you said it long ago")
    results = tuple(
        ToolResult(
            one.id, cut(one.text, OLD_CHARACTERS, "recall the experiment by its id, or look it up again"), one.failed
        )
        for one in answer.results
    )
    return Message("assistant", said, calls), Message("user", answer.text, results=results)


def _brief(arguments: str) -> str:
    if len(arguments) <= OLD_CHARACTERS:
        return arguments
    return json.dumps({"shortened": arguments[:OLD_CHARACTERS]}, ensure_ascii=False)


def _line(full: Sequence[int], brief: Sequence[int], most: int) -> int:
    """Return how many turns are shortened, by going through the conversation as it grew."""
    line = 0
    for end in range(1, len(full) + 1):
        if sum(brief[:line]) + sum(full[line:end]) <= most:
            continue
        while line < end - IN_FULL and sum(brief[:line]) + sum(full[line:end]) > most // 2:
            line += 1
    return line


def _size(exchange: Sequence[Message]) -> int:
    return sum(
        len(message.text)
        + sum(len(call.name) + len(call.arguments_json) for call in message.calls)
        + sum(len(result.text) for result in message.results)
        for message in exchange
    )


def sendable(text: str) -> str:
    """Return text without halves of surrogate pairs, which have no UTF-8."""
    return text.encode("utf-8", "replace").decode()

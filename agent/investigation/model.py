"""The investigator that a language model is.

1. `frame` asks once, by schema, how the behaviour of the question is measured.
2. `decide` is one request: system prompt and question, the conversation so far (`conversation`), the results that the model
   has not seen as tool results, and how much is left. The tools it may call are given as schemas.
3. Its calls are sorted (`note_taking`): notes become parts of the decision, other calls are run, several at a time.
4. Where the conversation is too long for the model, it is asked once more with all that is old shortened.
5. A reply that calls nothing, or that was cut off, is answered with a reminder; after three in a row the investigation ends
   with what was claimed. A reply that failed (refused, filtered, an error) ends it at once. The answer then says so.

The held-out prompts are not in the view, so they are in no request. All that is kept between two decisions is in
`Decision.said`: the conversation without the results, which the view has. So an investigation that is resumed sends the same
requests, which a journal answers without asking again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from exegete.agent.investigation.contract import Case, Decision, Left, Metric, Question, Result, View
from exegete.agent.investigation.conversation import Turn, conversation, sendable
from exegete.agent.investigation.note_taking import NEEDED, Notebook, claims_of
from exegete.tools.errors import UserError
from exegete.tools.llm import Client, Message, Reply, Request, schema_text, tool_text
from exegete.tools.llm.journaled import UNANSWERED
from exegete.tools.prompting import Line, Rendered, line, prompt_digest, render, spoken, window_line
from exegete.tools.seeds import digest

PROMPTS_SHOWN = 12
"""Search prompts that the model is shown at the beginning."""
MOST_SILENT = 3
"""Replies in a row that call nothing."""
CONVERSATION_CHARACTERS = 120_000
"""Beyond which older results are shortened."""

_PROMPT_CHARACTERS = 1_500
"""Of a prompt that is shown, its end."""
_ANSWER_CHARACTERS = 2_000
"""Of the last words of a model that never finished."""
_FRAME_TOKENS = 2_048
_FRAME_SCHEMA = schema_text(
    {
        "type": "object",
        "properties": {
            "kind": {
                "anyOf": [{"type": "string", "enum": ["log_odds", "log_probability", "judged"]}, {"type": "null"}]
            },
            **{name: {"anyOf": [{"type": "string"}, {"type": "null"}]} for name in ("answer", "other", "criterion")},
        },
        "required": ["kind", "answer", "other", "criterion"],
        "additionalProperties": False,
    }
)
_WAY_OUT = (
    "say how the behaviour is measured: --metric log_odds, log_probability or judged, with --answer, --other or "
    "--criterion (from Python, metric=Metric(…))"
)


class Brief(Protocol):
    """What an investigator is told of its work: the words around its tool calls."""

    @property
    def digest(self) -> str:
        """Of the prompts that it is rendered from."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """Notes that must be among the tools."""
        ...

    def beginning(self, view: View) -> tuple[Message, ...]:
        """Return the system prompt and what is asked; the last message is the user's."""
        ...

    def told(self, view: View, turns: Sequence[Turn]) -> str:
        """Return what is said beside the results; nothing at the very beginning."""
        ...


class BehaviourBrief:
    """A question about what the subject does, answered by claims."""

    notes = NEEDED

    @property
    def digest(self) -> str:
        """Of both prompts."""
        return digest(prompt_digest("investigate"), prompt_digest("investigate_results"))

    def beginning(self, view: View) -> tuple[Message, ...]:
        """Return the system prompt and the question."""
        return beginning(view)

    def told(self, view: View, turns: Sequence[Turn]) -> str:
        """Return which predictions held, what the person who watches says, and how much is left."""
        return told_now(view, turns)


class ModelInvestigator:
    """Investigates by asking a language model what to do next. Keeps nothing between calls."""

    def __init__(
        self,
        client: Client,
        tools: Sequence[Mapping[str, Any]],
        *,
        brief: Brief | None = None,
        max_tokens: int = 8_192,
        temperature: float | None = None,
        most_characters: int = CONVERSATION_CHARACTERS,
    ) -> None:
        """Take the model and what it may call.

        Args:
            client: a live model that can call tools.
            tools: plain schemas (`name`, `description`, `parameters`), the notes among them.
            brief: what it is told of its work; a question about a behaviour where left out.
            max_tokens: of each reply.
            temperature: None leaves the provider's default.
            most_characters: of the conversation, beyond which its older results are shortened.

        Raises:
            ValueError: a note has no schema.
        """
        self.name = client.name
        self._client = client
        self._brief = BehaviourBrief() if brief is None else brief
        self._schemas = {str(tool["name"]): tool["parameters"] for tool in tools}
        if missing := [name for name in self._brief.notes if name not in self._schemas]:
            raise ValueError(f"no schema of {', '.join(missing)}; there are: {', '.join(self._schemas)}")
        self._tools = tuple(tool_text(tool["name"], tool["description"], tool["parameters"]) for tool in tools)
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._most = most_characters

    async def frame(self, question: Question) -> Metric:
        """Return the metric of the question, or one that the model proposes.

        Raises:
            UserError: the model cannot be asked, gives no usable answer, or says that the behaviour cannot be measured.
        """
        if question.metric is not None:
            return question.metric
        options: dict[str, Any] = {"max_tokens": _FRAME_TOKENS, "temperature": self._temperature}
        reply = await self._client.complete(framing(question).request(_FRAME_SCHEMA, **options))
        if reply.status != "ok" or not isinstance(reply.parsed, dict):
            raise UserError(f"{self.name}: proposed no metric ({_why(reply)}); {_WAY_OUT}")
        return self._metric(question.cases, reply.parsed)

    async def decide(self, view: View) -> Decision:
        """Return what the model wants done next; the answer says why it ended where that was not by `finish`.

        Raises:
            UserError: the model cannot be asked at all (no key, the budget is used up). Nothing is lost: the same view can be
                decided later.
        """
        turns = [Turn.of(kept) for kept in view.said]
        told = self._brief.told(view, turns)
        reply = await self._answered(view, turns, told)
        claims = claims_of((call for turn in turns for call in turn.calls), self._schemas)
        if reply.status not in ("ok", "empty", "truncated"):
            answer = f"[The investigation ended early: the model's reply failed: {_why(reply)}]"
            again = f"{self.name} gave no answer ({_why(reply)})" if reply.status in UNANSWERED else ""
            return Decision(claims=tuple(claims), answer=answer, done=True, again=again, said=view.said)
        experiments = frozenset(result.experiment for result in view.results if result.experiment)
        known = {one.id: one for one in view.hypotheses}
        book = Notebook(len(turns) + 1, self._schemas, known, experiments, claims)
        book.take(reply.calls if reply.status == "ok" else ())
        said = _words(reply.text)
        turn = Turn(told, said, tuple(book.asked), reply.status == "truncated")
        gave_up = silent([*turns, turn]) >= MOST_SILENT
        return Decision(
            calls=tuple(book.calls),
            hypotheses=tuple(book.hypotheses.values()),
            claims=tuple(book.claims),
            answer=book.answer or (_given_up(said) if gave_up else ""),
            done=book.answer is not None or gave_up,
            said=(*view.said, turn.kept()),
        )

    async def _answered(self, view: View, turns: Sequence[Turn], told: str) -> Reply:
        reply = await self._client.complete(self._request(view, turns, told, self._most))
        if reply.status != "rejected":
            return reply
        # Most likely it is too long for the model: once more, with all that is old shortened.
        return await self._client.complete(self._request(view, turns, told, 0))

    def _request(self, view: View, turns: Sequence[Turn], told: str, most: int) -> Request:
        results = {result.call.id: result for result in view.results}
        messages = conversation(self._brief.beginning(view), turns, told, results, most)
        return Request(
            messages,
            max_tokens=self._max_tokens,
            temperature=self._temperature,
            # All of it is the beginning of the next request: a provider may keep it.
            shared=len(messages),
            prompt_digest=self._brief.digest,
            tools=self._tools,
        )

    def _metric(self, cases: Sequence[Case], proposed: Mapping[str, Any]) -> Metric:
        kind = proposed["kind"]
        if kind is None:
            raise UserError(f"{self.name}: says that the behaviour cannot be measured; {_WAY_OUT}")
        if kind == "judged":
            if not (proposed["criterion"] or "").strip():
                raise UserError(f"{self.name}: proposed a judged metric without a criterion; {_WAY_OUT}")
            return Metric("judged", criterion=proposed["criterion"])
        needed = ("answer", "other") if kind == "log_odds" else ("answer",)
        for name in needed:
            if not proposed[name] and any(getattr(case, name) is None for case in cases):
                raise UserError(
                    f"{self.name}: proposed {kind} without {name!r}, which not all prompts name; {_WAY_OUT}"
                )
        return Metric(kind, proposed["answer"] or None, (proposed["other"] or None) if kind == "log_odds" else None)


def framing(question: Question) -> Rendered:
    """Return the prompt that asks how the behaviour of a question is measured."""
    return render(
        "investigate_frame",
        question=line(question.text),
        suggested=line(question.suggested),
        cases=_shown(question.cases),
        count=len(question.cases),
        answered=sum(case.answer is not None for case in question.cases),
        opposed=sum(case.other is not None for case in question.cases),
    )


def beginning(view: View) -> tuple[Message, ...]:
    """Return the system prompt and the question, with some of its search prompts."""
    question, metric = view.question, view.metric
    shown = {
        "kind": metric.kind,
        "answer": _token(metric.answer),
        "other": _token(metric.other),
        "criterion": line(metric.criterion),
        "tokens": metric.tokens,
        "samples": metric.samples,
    }
    return render(
        "investigate",
        question=line(question.text),
        suggested=line(question.suggested),
        metric=shown,
        cases=_shown(question.cases),
        count=len(question.cases),
        varied=sum(case.variant is not None for case in question.cases),
        passes=question.budget.passes or 0,
        steps=question.budget.steps,
        most=_left(Left(tokens=question.budget.tokens, usd=question.budget.usd)),
    ).messages


def told_now(view: View, turns: Sequence[Turn]) -> str:
    """Return what the model is told beside its results; nothing at the very beginning."""
    if not turns and not view.notes:
        return ""
    new = {call.run for call in turns[-1].calls if call.run} if turns else set()
    rendered = render(
        "investigate_results",
        experiments=[_experiment(one) for one in view.results if one.call.id in new and one.experiment],
        notes=[line(note) for note in view.notes],
        silent=silent(turns),
        cut=int(bool(turns) and turns[-1].cut),
        steps=view.steps_left,
        left=_left(view.left),
    )
    return rendered.messages[-1].text


def silent(turns: Sequence[Turn]) -> int:
    """Return how many replies called nothing, counted from the last one back."""
    count = 0
    for turn in reversed(turns):
        if turn.calls:
            break
        count += 1
    return count


def _left(left: Left) -> list[Line]:
    """Return in words what may still be used; nothing of what has no limit."""
    words = {
        "{:,} forward passes for experiments": left.passes,
        "{:,} tokens": left.tokens,
        "{:.2f} USD": left.usd,
    }
    return [line(form.format(value)) for form, value in words.items() if value is not None]


@dataclass(frozen=True)
class _ShownCase:
    prompt: Line
    answer: Line | None
    other: Line | None
    variant: Line | None


@dataclass(frozen=True)
class _ShownExperiment:
    id: Line
    predicted: int
    """1 or 0; -1 where there was no figure."""


def _experiment(result: Result) -> _ShownExperiment:
    return _ShownExperiment(line(result.experiment), -1 if result.predicted is None else int(result.predicted))


def _words(text: str) -> str:
    """Return what a reply says, as it goes back: reasoning in tags, as local servers leave it in, is not part of it."""
    return sendable(spoken(text.rpartition("</think>")[2].strip()))


def _given_up(said: str) -> str:
    ended = f"[The investigation ended early: {MOST_SILENT} replies in a row called no tool]"
    return f"{ended} {said[:_ANSWER_CHARACTERS]}".strip()


def _why(reply: Reply) -> str:
    return f"{reply.status}: {reply.detail}" if reply.detail else reply.status


def _shown(cases: Sequence[Case]) -> list[_ShownCase]:
    return [
        _ShownCase(_prompt(case.prompt), _token(case.answer), _token(case.other), _prompt(case.variant))
        for case in cases[:PROMPTS_SHOWN]
    ]


def _prompt(text: str | None) -> Any:
    if text is None:
        return None
    return window_line([text if len(text) <= _PROMPT_CHARACTERS else f"…{text[-_PROMPT_CHARACTERS:]}"])


def _token(text: str | None) -> Line | None:
    return None if text is None else window_line([text])

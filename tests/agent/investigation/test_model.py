"""The investigator that a language model is: scripted replies, and the real clients against a server on loopback."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from language_model_server import Running, serving

from exegete.agent.investigation import notes
from exegete.agent.investigation.contract import (
    Budget,
    Call,
    Case,
    Claim,
    Decision,
    Headline,
    Hypothesis,
    Metric,
    Outcome,
    Question,
    Result,
    View,
)
from exegete.agent.investigation.conversation import OLD_CHARACTERS, Asked, Turn, conversation
from exegete.agent.investigation.model import MOST_SILENT, PROMPTS_SHOWN, ModelInvestigator
from exegete.agent.investigation.note_taking import MOST_CALLS
from exegete.agent.investigation.toolbelt import make_tool
from exegete.tools.errors import UserError
from exegete.tools.llm import (
    Budget as Money,
)
from exegete.tools.llm import (
    BudgetUsedUp,
    Limits,
    MemoryJournal,
    Message,
    Reply,
    Request,
    Status,
    ToolCall,
    load_prices,
    open_client,
)
from exegete.tools.llm.tool_calls import check_tools

CASES = tuple(Case(f"select age in descending order number {n}", " DESC", " ASC", f"ascending {n}") for n in range(15))
QUESTION = Question("Why DESC?", CASES, Metric("log_odds"), suggested="the word descending", budget=Budget(steps=12))
ABLATE = {
    "name": "ablate",
    "description": "Set latents to zero.",
    "parameters": {
        "type": "object",
        "properties": {
            "hypothesis": {"type": "string"},
            "because": {"type": "string"},
            "low": {"type": "number"},
            "high": {"type": "number"},
            "latents": {"type": "array", "items": {"type": "integer"}},
        },
        "required": ["hypothesis", "because", "latents"],
        "additionalProperties": False,
    },
}
LENS = {"name": "lens", "description": "What it promotes.", "parameters": {"type": "object", "properties": {}}}
NOTES = [
    {"name": one.name, "description": one.description, "parameters": one.parameters}
    for one in (make_tool("note", note) for note in (notes.hypothesis, notes.update, notes.claim, notes.finish))
]
TOOLS = [LENS, ABLATE, *NOTES]
CAUSAL = {"statement": "Latent 7 does it.", "kind": "causal", "latents": [7], "experiments": ["E1"], "hypothesis": "H1"}
TEST = {"hypothesis": "H1", "because": "it fires there", "high": -1.0, "latents": [7]}


def called(*calls: tuple[str, Any], text: str = "") -> Reply:
    """A reply that calls these tools; arguments that are a text stand as they are. Ids repeat, as some servers' do."""
    made = (
        ToolCall(f"call_{n}", name, given if isinstance(given, str) else json.dumps(given))
        for n, (name, given) in enumerate(calls)
    )
    return Reply("ok", text, calls=tuple(made))


FINISH = called(("finish", {"answer": "Latent 7."}))


class Scripted:
    """Gives these replies in their order, the last one for ever, and keeps what it was asked."""

    name = "scripted:model"

    def __init__(self, *replies: Reply) -> None:
        self.replies = replies
        self.asked: list[Request] = []

    async def complete(self, request: Request) -> Reply:
        check_tools(request)
        self.asked.append(request)
        return self.replies[min(len(self.asked), len(self.replies)) - 1]

    async def close(self) -> None:
        pass


def outcome(call: Call, experiment: str) -> Result:
    if call.tool not in ("ablate", "lens"):
        return Result(call, "error", Outcome(f"there is no tool {call.tool!r}"))
    if call.tool == "lens":
        return Result(call, "ok", Outcome("<token> DESC</token>"))
    return Result(
        call, "ok", Outcome("It fell by 2.1.", Headline("mean change", -2.1, -2.4, -1.8, 9)), experiment, True
    )


@dataclass
class Investigation:
    """What a graph does with an investigator, in few lines; every view is made anew, as after a restart."""

    investigator: ModelInvestigator
    question: Question = QUESTION
    decisions: list[Decision] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    hypotheses: dict[str, Hypothesis] = field(default_factory=dict)
    notes: Mapping[int, str] = field(default_factory=dict)
    run: Callable[[Call, str], Result] = outcome
    new: int = 0

    @property
    def view(self) -> View:
        step = len(self.decisions)
        kept = json.loads(json.dumps(list(self.decisions[-1].said) if self.decisions else []))
        return View(
            self.question, self.question.metric or Metric("log_odds"), tuple(self.hypotheses.values()), tuple(self.results),
            self.new, tuple(kept), self.question.budget.steps - step, (self.notes[step],) if step in self.notes else (),
        )  # fmt: skip

    def step(self) -> Decision:
        decision = asyncio.run(self.investigator.decide(self.view))
        self.decisions.append(decision)
        self.hypotheses |= {one.id: one for one in decision.hypotheses}
        before = len(self.results)
        for call in decision.calls:
            experiments = sum(bool(one.experiment) for one in self.results)
            self.results.append(self.run(call, f"E{experiments + 1}"))
        self.new = len(self.results) - before
        return decision

    def end(self) -> Decision:
        for _ in range(self.question.budget.steps):
            if self.step().done:
                break
        return self.decisions[-1]


def begun(*replies: Reply, **options: Any) -> tuple[Investigation, Scripted]:
    client = Scripted(*replies)
    investigator = ModelInvestigator(client, TOOLS, **options.pop("model", {}))
    return Investigation(investigator, **options), client


def results_of(request: Request) -> list[tuple[str, bool]]:
    return [(result.text, result.failed) for result in request.messages[-1].results]


def test_a_whole_investigation() -> None:
    look = called(
        ("hypothesis", {"statement": "Latent 7 reads the word."}), ("lens", {}), ("ablate", TEST), text="I look."
    )
    conclude = called(("update", {"hypothesis": "H1", "status": "supported"}), ("claim", CAUSAL))
    work, client = begun(look, conclude, FINISH)
    last = work.end()
    first, second, third = work.decisions
    assert first.hypotheses == (Hypothesis("H1", "Latent 7 reads the word."),) and not first.done
    assert first.calls == (Call("1.1", "lens", {}), Call("1.2", "ablate", TEST))
    assert second.hypotheses == (Hypothesis("H1", "Latent 7 reads the word.", "supported"),) and second.calls == ()
    claim = Claim("Latent 7 does it.", "causal", (7,), experiments=("E1",), hypothesis="H1")
    assert second.claims == third.claims == last.claims == (claim,)
    assert (last.done, last.answer) == (True, "Latent 7.")
    assert results_of(client.asked[1]) == [
        ("Written down as H1.", False),
        ("<token> DESC</token>", False),
        ("[E1]\nIt fell by 2.1.", False),
    ]
    assert client.asked[1].messages[-1].text == "E1: the headline figure was as predicted.\n11 replies are left."
    assert results_of(client.asked[2]) == [("H1 is supported.", False), ("Written down as claim 1.", False)]
    # Of the experiments of the reply before, and not of older ones again.
    assert client.asked[2].messages[-1].text == "10 replies are left."


def test_requests_grow_by_one_exchange_and_share_what_was_there() -> None:
    work, client = begun(called(("lens", {})), called(("lens", {}), text="Again."), FINISH)
    work.end()
    for before, after in zip(client.asked, client.asked[1:], strict=False):
        assert after.messages[: len(before.messages)] == before.messages
        assert [message.role for message in after.messages[len(before.messages) :]] == ["assistant", "user"]
        assert after.shared == len(after.messages) and after.tools == before.tools and after.parallel_calls
    assert client.asked[0].prompt_digest.startswith("sha256:")


def test_the_beginning_says_what_is_asked_and_shows_some_prompts() -> None:
    work, client = begun(FINISH)
    work.end()
    system, user = client.asked[0].messages
    assert system.role == "system" and "Code checks every causal claim on prompts that you never see" in system.text
    assert "<question>Why DESC?</question>\n<suggested_cause>the word descending</suggested_cause>" in user.text
    assert "logit of the answer less that of the other token" in user.text and "200000 prompts" in user.text
    assert "<prompt 0>select age in descending order number 0</prompt>\n<answer 0> DESC</answer>" in user.text
    assert user.text.count("<prompt ") == PROMPTS_SHOWN and "You have 15 prompts" in user.text
    assert "15 of them have a variant" in user.text and user.text.endswith("You have 12 replies. Begin.")


@pytest.mark.parametrize(
    "metric", [Metric("log_probability", " DESC"), Metric("judged", criterion="It sorts.", tokens=9)]
)
def test_every_metric_is_described(metric: Metric) -> None:
    work, client = begun(FINISH, question=replace(QUESTION, metric=metric))
    work.end()
    text = client.asked[0].messages[-1].text
    wanted = {
        "log_probability": ["above -0.69.\n<answer> DESC</answer>\n"],
        "judged": ["4 sampled continuations, of 9 tokens", "<criterion>It sorts.</criterion>"],
    }
    assert all(one in text for one in wanted[metric.kind])


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("{latents: [7]", "they are no JSON"),
        ("[7]", "they are no object"),
        ('{"latents": [NaN]}', "NaN is not JSON"),
        ('{"because": "\\ud800"}', "half of a surrogate pair"),
        ('{"latents": ' + "[" * 200_000, "they are no JSON"),
        ('{"latents": ' + "[" * 500 + "]" * 500 + "}", "inside one another"),
    ],
)
def test_malformed_arguments_are_answered_in_words(arguments: str, why: str) -> None:
    work, client = begun(called(("ablate", arguments), ("lens", {})), FINISH)
    work.end()
    assert [call.tool for call in work.decisions[0].calls] == ["lens"]
    (text, failed), fine = results_of(client.asked[1])
    assert failed and why in text and "it takes hypothesis, because, low, high, latents" in text
    assert fine == ("<token> DESC</token>", False)
    json.dumps(work.decisions[0].said, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("note", "arguments", "why"),
    [
        ("hypothesis", {}, "'statement' is missing"),
        ("hypothesis", {"statement": "  "}, "is empty"),
        ("update", {"hypothesis": "H9", "status": "rejected"}, "there is no hypothesis 'H9'; there are: none yet"),
        ("update", {"hypothesis": "H1", "status": "true"}, "one of 'open', 'supported', 'rejected'"),
        ("claim", {"statement": "x", "kind": "causal"}, "names the latents"),
        ("claim", {**CAUSAL, "latents": ["seven"]}, "a whole number"),
        ("claim", "not json", "they are no JSON"),
        ("finish", {}, "'answer' is missing"),
        ("finish", {"answer": ""}, "is empty"),
    ],
)
def test_notes_that_do_not_fit_are_answered_in_words(note: str, arguments: Any, why: str) -> None:
    work, client = begun(called((note, arguments)), FINISH)
    last = work.end()
    first = work.decisions[0]
    assert (first.hypotheses, first.claims, first.calls, first.done) == ((), (), (), False)
    ((text, failed),) = results_of(client.asked[1])
    assert failed and why in text
    assert last.done and last.claims == ()


def test_a_claim_without_evidence_is_kept_and_said_to_be_so() -> None:
    invented = {**CAUSAL, "statement": "Latent 8 does it.", "experiments": ["E1", "E5"]}
    bare = {"statement": "Latent 9 does it.", "kind": "causal", "latents": [9]}
    seen = {"statement": "It fires there.", "kind": "correlational"}
    work, client = begun(called(("claim", invented), ("claim", bare), ("claim", seen)), FINISH)
    assert [claim.statement for claim in work.end().claims] == [
        "Latent 8 does it.",
        "Latent 9 does it.",
        "It fires there.",
    ]
    first, second, third = results_of(client.asked[1])
    assert "no experiment E1, E5, so it will be reported as unverified" in first[0]
    assert "It names no experiment" in second[0] and third[0] == "Written down as claim 3."


def test_a_claim_said_again_replaces_the_first() -> None:
    weaker = {**CAUSAL, "flips": False, "experiments": ["E2"]}
    work, _ = begun(called(("claim", {**CAUSAL, "flips": True})), called(("claim", weaker)), FINISH)
    (claim,) = work.end().claims
    assert (claim.flips, claim.experiments) == (False, ("E2",))


def test_unknown_tools_are_the_toolbelts_to_answer() -> None:
    work, client = begun(called(("ablate latents!", "{}"), ("nonsense", "no json")), FINISH)
    work.end()
    assert [(call.tool, call.arguments) for call in work.decisions[0].calls] == [
        ("ablate latents!", {}),
        ("nonsense", {}),
    ]
    assert all(failed for _, failed in results_of(client.asked[1]))
    # What goes back must have a name that providers take.
    assert [call.name for call in client.asked[1].messages[-2].calls] == ["ablate_latents_", "nonsense"]


def test_too_many_calls_of_one_reply_are_not_run() -> None:
    work, client = begun(called(*[("lens", {})] * (MOST_CALLS + 2)), FINISH)
    assert len(work.step().calls) == MOST_CALLS
    work.step()
    assert [failed for _, failed in results_of(client.asked[1])] == [False] * MOST_CALLS + [True] * 2


def test_finish_waits_for_results_that_it_has_not_seen() -> None:
    work, client = begun(called(("ablate", TEST), ("finish", {"answer": "Surely 7."})), FINISH)
    assert not work.step().done
    assert work.step().done
    text, failed = results_of(client.asked[1])[1]
    assert failed and "results you have not seen" in text


def test_notes_and_finish_in_one_reply_are_all_taken() -> None:
    work, _ = begun(called(("claim", CAUSAL), ("finish", {"answer": "Latent 7."})))
    last = work.end()
    assert (last.done, last.answer, len(last.claims), len(work.decisions)) == (True, "Latent 7.", 1, 1)


def test_a_silent_model_is_reminded_and_then_ended_with_what_it_claimed() -> None:
    work, client = begun(called(("claim", CAUSAL)), Reply("ok", "I think that is all."))
    last = work.end()
    assert len(client.asked) == 1 + MOST_SILENT and last.done and len(last.claims) == 1
    assert last.answer == "[The investigation ended early: 3 replies in a row called no tool] I think that is all."
    texts = [request.messages[-1].text for request in client.asked]
    assert "called no tool" not in texts[1] and "called no tool, so nothing was done" in texts[2]
    assert "second time in a row" not in texts[2] and "second time in a row" in texts[3]


def test_silence_is_counted_in_a_row_only() -> None:
    quiet = Reply("ok", " \n")
    work, client = begun(quiet, quiet, called(("lens", {})), quiet, quiet, FINISH)
    assert work.end().answer == "Latent 7."
    # No provider takes an empty message.
    assert all(
        message.text or message.calls
        for request in client.asked
        for message in request.messages[:-1]
        if not message.results
    )


def test_words_go_back_without_reasoning_and_control_tokens() -> None:
    work, client = begun(called(("lens", {}), text="<think>First \n hm.</think>\n\nI look.<|im_end|>"), FINISH)
    work.end()
    assert client.asked[1].messages[-2].text == "I look.‹|im_end|>"


def test_a_reply_that_was_cut_off_does_nothing_and_is_told_so() -> None:
    half = replace(called(("lens", {}), ("ablate", '{"hypothesis": "H'), text="Let me"), status="truncated")
    work, client = begun(half, FINISH)
    assert work.step().calls == ()
    work.step()
    assert "cut off before it ended" in client.asked[1].messages[-1].text


@pytest.mark.parametrize("status", ["refused", "filtered", "rejected", "error", "unknown", "unparsed"])
def test_a_failed_reply_ends_the_investigation_and_says_how(status: Status) -> None:
    work, _ = begun(called(("claim", CAUSAL)), Reply(status, detail="so it goes"))
    last = work.end()
    assert last.done and last.calls == () and [claim.statement for claim in last.claims] == ["Latent 7 does it."]
    assert last.answer == f"[The investigation ended early: the model's reply failed: {status}: so it goes]"


def test_a_failed_reply_loses_nothing_of_the_conversation() -> None:
    work, client = begun(called(("lens", {})), Reply("error"), FINISH)
    work.end()
    # Taken up again, the investigation asks what it asked before.
    assert work.step().answer == "Latent 7."
    assert client.asked[2].messages[:-1] == client.asked[1].messages[:-1]


def test_a_conversation_that_is_too_long_for_the_model_is_shortened() -> None:
    long = Outcome("<row>" + "x" * 5_000 + "</row>")
    look, rejected = called(("lens", {})), Reply("rejected", detail="maximum context length")
    work, client = begun(*[look] * 4, rejected, FINISH, run=lambda call, _: Result(call, "ok", long))
    assert work.end().answer == "Latent 7." and len(work.decisions) == 5
    first, second = ([len(m.results[0].text) for m in one.messages if m.results] for one in client.asked[4:])
    assert first == [5_011] * 4 and second[2:] == [5_011] * 2 and max(second[:2]) < OLD_CHARACTERS + 200


def test_a_model_that_loops_is_bounded_by_its_steps() -> None:
    work, client = begun(called(("lens", {})))
    last = work.end()
    assert len(client.asked) == QUESTION.budget.steps and not last.done
    assert "This is your last reply" in client.asked[-1].messages[-1].text
    assert len({request.id("m") for request in client.asked}) == len(client.asked)


def test_the_person_who_watches_is_heard_at_any_step() -> None:
    notes = {0: "look at\nlatent 3 </note>", 1: "and at 4"}
    work, client = begun(called(("lens", {})), FINISH, notes=notes)
    work.end()
    first, second = client.asked[0].messages[-1].text, client.asked[1].messages[-1].text
    assert "\n\nThe person who watches says:\n<note>look at latent 3 ‹/note›</note>\n" in first
    assert "<note>and at 4</note>" in second
    assert client.asked[1].messages[1].text == first


def test_a_call_that_the_graph_did_not_run_is_answered() -> None:
    work, client = begun(called(("lens", {})), FINISH)
    work.step()
    work.results.clear()
    work.step()
    assert results_of(client.asked[1]) == [("This call was not run.", True)]


def test_a_resumed_investigation_asks_nothing_twice_and_goes_on() -> None:
    replies = (called(("lens", {}), text="a\ud800b"), called(("ablate", TEST)), called(("claim", CAUSAL)), FINISH)
    work, client = begun(*replies)
    work.end()
    again, other = begun(*replies)
    for _ in range(2):
        again.step()
    # A new investigator over what was kept: it has no state of its own.
    again.investigator = ModelInvestigator(other, TOOLS)
    assert again.end() == work.decisions[-1]
    assert [one.id("m") for one in other.asked] == [one.id("m") for one in client.asked]


def test_old_results_are_shortened_seldom_and_the_newest_never() -> None:
    long = "<row>" + "x" * 5_000 + "</row>"
    question = replace(QUESTION, budget=Budget(steps=30))
    work, client = begun(
        called(("lens", {})), question=question, model={"most_characters": 40_000},
        run=lambda call, _: Result(call, "ok", Outcome(long)),
    )  # fmt: skip
    work.end()
    moved = 0
    for before, after in zip(client.asked, client.asked[1:], strict=False):
        texts = [message.results[0].text for message in after.messages if message.results]
        assert texts[-2:] == [long, long][: len(texts)] and sum(map(len, texts)) < 46_000
        assert all(text == long or (len(text) < OLD_CHARACTERS + 200 and "recall" in text) for text in texts)
        moved += after.messages[: len(before.messages)] != before.messages
    # Each time it makes room for several exchanges: all others find the whole conversation in a provider's cache.
    assert 4 <= moved <= 8


def test_shortening_leaves_what_is_short_and_cuts_words_and_arguments_too() -> None:
    def turn(n: int, said: str) -> Turn:
        return Turn("told", said, (Asked(f"id{n}", "lens", json.dumps({"texts": [said]}), run=f"{n}.1"),))

    turns = [turn(1, "short"), turn(2, "y" * 9_000), turn(3, "z" * 3_000), turn(4, "w" * 3_000)]
    results = {f"{n}.1": Result(Call(f"{n}.1", "lens", {}), "ok", Outcome("fine")) for n in range(1, 5)}
    beginning = (Message("system", "s"), Message("user", "u"))
    cut = conversation(beginning, turns, "now", results, 10_000)
    whole = conversation(beginning, turns, "now", results, 10**9)
    assert cut[2:4] == whole[2:4] and cut[6:] == whole[6:]
    assert len(cut[4].text) < 700 and json.loads(cut[4].calls[0].arguments_json)["shortened"].startswith(
        '{"texts": ["yyy'
    )
    assert Turn.of(json.loads(json.dumps(turns[1].kept()))) == turns[1]


def test_a_given_metric_is_not_asked_for() -> None:
    client = Scripted(FINISH)
    assert asyncio.run(ModelInvestigator(client, TOOLS).frame(QUESTION)) == Metric("log_odds")
    assert client.asked == []


def proposed(cases: Sequence[Case] = CASES, **answer: Any) -> Metric:
    value = {"kind": None, "answer": None, "other": None, "criterion": None} | answer
    client = Scripted(Reply("ok", json.dumps(value), value))
    question = replace(QUESTION, metric=None, cases=tuple(cases))
    found = asyncio.run(ModelInvestigator(client, TOOLS).frame(question))
    (request,) = client.asked
    assert request.schema is not None and not request.tools
    assert "15 prompts, of which" in request.messages[-1].text
    return found


BARE = [Case(case.prompt) for case in CASES]


def test_the_model_proposes_a_metric() -> None:
    assert proposed(kind="log_odds") == Metric("log_odds")
    assert proposed(BARE, kind="log_odds", answer=" DESC", other=" ASC") == Metric("log_odds", " DESC", " ASC")
    assert proposed(BARE, kind="log_probability", answer=" DESC", other="x") == Metric("log_probability", " DESC")
    assert proposed(kind="judged", criterion="It sorts.") == Metric("judged", criterion="It sorts.")


@pytest.mark.parametrize(
    ("cases", "answer", "why"),
    [
        (CASES, {}, "cannot be measured"),
        (CASES, {"kind": "judged"}, "without a criterion"),
        (BARE, {"kind": "log_odds", "answer": " DESC"}, "log_odds without 'other'"),
        ([*CASES[:-1], BARE[-1]], {"kind": "log_probability"}, "log_probability without 'answer'"),
    ],
)
def test_a_metric_that_cannot_be_taken_is_the_users_to_give(
    cases: Sequence[Case], answer: dict[str, Any], why: str
) -> None:
    with pytest.raises(UserError, match=f"scripted:model: .*{why}.*; say how the behaviour is measured"):
        proposed(cases, **answer)


@pytest.mark.parametrize("status", ["refused", "unparsed", "error", "truncated"])
def test_no_metric_without_an_answer(status: Status) -> None:
    investigator = ModelInvestigator(Scripted(Reply(status, detail="no")), TOOLS)
    with pytest.raises(UserError, match=f"proposed no metric \\({status}: no\\)"):
        asyncio.run(investigator.frame(replace(QUESTION, metric=None)))


def test_notes_without_schemas_are_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match="no schema of claim, finish"):
        ModelInvestigator(Scripted(FINISH), [tool for tool in TOOLS if tool["name"] not in ("claim", "finish")])


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving() as running:
        yield running


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_on_the_wire(server: Running, provider: str) -> None:
    """Parallel calls, a malformed one, one of a tool that is not there, silence, a claim, an end."""
    server.reset()
    first = [
        {"name": "hypothesis", "arguments": {"statement": "Latent 7 reads it."}},
        {"name": "ablate", "arguments": TEST},
        {"name": "ablate", "arguments": '{"latents": [7'},
        {"name": "ablaet", "arguments": {}},
    ]
    last = [{"name": "claim", "arguments": CAUSAL}, {"name": "finish", "arguments": {"answer": "Latent 7."}}]
    server.behave(
        answer="scripted", replies=[{"calls": first, "text": " \n"}, "Let me think.", {"calls": last, "text": "\n"}]
    )
    client = open_client(server.spec(provider, "model"), journal=MemoryJournal(), prices=load_prices(), limits=Limits())
    work = Investigation(ModelInvestigator(client, TOOLS))
    asyncio.run(decided(work, client))
    assert work.decisions[-1].answer == "Latent 7." and len(work.decisions) == 3
    assert [claim.latents for claim in work.decisions[-1].claims] == [(7,)]
    assert [call.tool for call in work.decisions[0].calls] == ["ablate", "ablaet"]
    statuses = [row["status"] for row in server.log()]
    assert statuses == [200, 200, 200]


async def decided(work: Investigation, client: Any) -> None:
    """Go through an investigation in one event loop, which a client needs."""
    for _ in range(work.question.budget.steps):
        decision = await work.investigator.decide(work.view)
        work.decisions.append(decision)
        work.hypotheses |= {one.id: one for one in decision.hypotheses}
        work.results += [outcome(call, f"E{n}") for n, call in enumerate(decision.calls, 1)]
        if decision.done:
            break
    await client.close()


def test_a_refusal_on_the_wire_ends_it(server: Running) -> None:
    server.reset()
    server.behave(answer="scripted", replies=[{"text": "I cannot.", "stop": "refusal"}])
    client = open_client(
        server.spec("anthropic", "model"), journal=MemoryJournal(), prices=load_prices(), limits=Limits()
    )
    work = Investigation(ModelInvestigator(client, TOOLS))
    asyncio.run(decided(work, client))
    assert work.decisions[-1].done and "failed: refused" in work.decisions[-1].answer


def test_a_budget_that_is_used_up_is_told_to_whoever_drives_it(server: Running) -> None:
    server.reset()
    server.behave(answer="scripted", replies=[{"calls": [{"name": "lens", "arguments": {}}]}] * 9)
    spec = server.spec("openai", "model")
    prices = load_prices(own={spec: {"input": 1.0, "output": 10.0}})
    client = open_client(spec, journal=MemoryJournal(), budget=Money(0.095), prices=prices, limits=Limits())
    work = Investigation(ModelInvestigator(client, TOOLS, max_tokens=8_192))
    with pytest.raises(BudgetUsedUp):
        asyncio.run(decided(work, client))
    assert 1 <= server.counts()["questions"] < 9 and len(work.decisions) == server.counts()["questions"]

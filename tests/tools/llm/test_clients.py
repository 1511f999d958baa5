"""Both clients through the real SDKs against a real server: what goes out, what comes back, and under which status."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from language_model_server import Running

from exegete.agent.spending import note, tallied
from exegete.tools.errors import UserError
from exegete.tools.llm import (
    Budget,
    BudgetUsedUp,
    Client,
    Limits,
    MemoryJournal,
    Message,
    Reply,
    Request,
    Usage,
    gives_logprobs,
    open_client,
)
from exegete.tools.llm.journaled import JournaledClient

from .conftest import SCHEMA, Opening, question, spec_at

VALID = {"verdicts": [1, 0, 1]}


def asked(client: Client, *requests: Request) -> list[Reply]:
    async def ask() -> list[Reply]:
        try:
            return list(await asyncio.gather(*map(client.complete, requests)))
        finally:
            await client.close()

    return asyncio.run(ask())


def bodies(server: Running) -> list[dict[str, Any]]:
    return [row["body"] for row in server.log(bodies=True)]


def test_structured_answer_with_usage_and_cost(server: Running, opened: Opening) -> None:
    server.behave(answer="scripted", replies=[json.dumps(VALID)])
    journal, budget = MemoryJournal(), Budget(1.0)
    (reply,) = asked(opened(journal, budget), question())
    assert (reply.status, reply.parsed, reply.attempts, reply.cached) == ("ok", VALID, 1, False)
    usage = reply.usage
    assert usage.input_tokens > 0 and usage.output_tokens > 0
    # 1 USD per million input tokens, 10 USD per million output tokens.
    assert reply.usd == pytest.approx((usage.input_tokens + 10 * usage.output_tokens) / 1e6)
    assert budget.spent_usd == pytest.approx(reply.usd) and budget.reserved_usd == 0
    (intent,) = journal.intents.values()
    assert intent[1] > reply.usd


def test_schema_goes_out_natively(server: Running, provider: str, opened: Opening) -> None:
    asked(opened(MemoryJournal()), question(temperature=0.5))
    (body,) = bodies(server)
    assert body["temperature"] == 0.5
    if provider == "openai":
        assert body["response_format"]["json_schema"]["strict"] is True
        assert body["response_format"]["json_schema"]["schema"] == json.loads(SCHEMA)
    else:
        assert body["output_config"]["format"]["type"] == "json_schema"


@pytest.mark.parametrize("structured", ["rejected", "ignored"])
def test_servers_without_schemas(server: Running, opened: Opening, structured: str) -> None:
    server.behave(answer="scripted", structured=structured, replies=[json.dumps(VALID)] * 3)
    first, second = asked(opened(MemoryJournal(), concurrency=1), question(), question("Again."))
    assert first.parsed == second.parsed == VALID
    if structured == "rejected":
        # The second request was not rejected any more: the client had learned.
        statuses = [row["status"] for row in server.log()]
        assert statuses[-2:] == [200, 200] and 400 in statuses[:-2]
        last = bodies(server)[-1]
        assert "tool_choice" in last or "fits this JSON Schema" in json.dumps(last)


def test_first_messages_are_the_same_bytes_and_cacheable(server: Running, provider: str, opened: Opening) -> None:
    shared = (
        Message("system", "Judge well. " * 1_000),
        Message("user", "An example."),
        Message("assistant", '{"verdicts": [0, 0, 0]}'),
    )
    client = opened(MemoryJournal(), concurrency=1)
    requests = [Request((*shared, Message("user", f"Number {n}.")), SCHEMA, shared=3) for n in range(3)]
    replies = asked(client, *requests)
    sent = bodies(server)
    assert len({json.dumps([body.get("system"), body["messages"][:-1]]) for body in sent}) == 1
    assert [reply.usage.cached_input_tokens > 0 for reply in replies] == [False, True, True]
    if provider == "anthropic":
        marked = [block for turn in sent[0]["messages"] for block in turn["content"] if "cache_control" in block]
        assert [block["text"] for block in marked] == ['{"verdicts": [0, 0, 0]}']
        assert replies[0].usage.cache_write_tokens > 0
        assert replies[1].usd < replies[0].usd


@pytest.mark.parametrize(
    ("fault", "status"),
    [("refusal", "refused"), ("max_tokens", "truncated"), ("empty", "empty"), ("content_filter", "filtered")],
)
def test_statuses(server: Running, provider: str, opened: Opening, fault: str, status: str) -> None:
    if (provider, fault) == ("anthropic", "content_filter"):
        pytest.skip("Anthropic has no such stop reason: its filter answers with refusals and errors")
    server.behave(faults=[{"kind": fault}])
    journal = MemoryJournal()
    (reply,) = asked(opened(journal), question())
    assert reply.status == status and reply.parsed is None and reply.detail
    # An answer is an answer: it is not paid for again.
    (again,) = asked(opened(journal), question())
    assert again.status == status and again.cached
    assert len(server.log()) == 1


@pytest.mark.parametrize("fault", ["wrong_length", "not_json", "truncated_json"])
def test_one_repair(server: Running, opened: Opening, fault: str) -> None:
    server.behave(faults=[{"kind": fault, "first": 1}])
    journal = MemoryJournal()
    (reply,) = asked(opened(journal), question())
    assert reply.status == "ok" and set(reply.parsed["verdicts"]) <= {0, 1}
    assert reply.attempts == 2 and len(journal.replies) == 2
    assert reply.usd == pytest.approx(sum(one.usd for one in journal.replies.values()))
    turns = bodies(server)[1]["messages"]
    assert [turn["role"] for turn in turns][-3:] == ["user", "assistant", "user"]
    assert "cannot be used" in json.dumps(turns[-1])
    # Both are in the journal now, and make the same reply again without a call.
    (again,) = asked(opened(journal), question())
    assert again.parsed == reply.parsed and again.cached and len(server.log()) == 2


def test_a_repair_after_a_crash_costs_what_it_would_have_cost(server: Running, opened: Opening) -> None:
    server.behave(faults=[{"kind": "not_json", "first": 1}])
    journal = MemoryJournal()
    (whole,) = asked(opened(journal), question())
    (repair,) = [call for call, reply in journal.replies.items() if reply.status == "ok"]
    server.behave()
    first, second = next(r for c, r in journal.replies.items() if c != repair), journal.replies.pop(repair)
    (reply,) = asked(opened(journal), question())
    assert not reply.cached and (reply.known_usage, reply.known_usd) == (first.usage, first.usd) and first.usd > 0
    assert (whole.known_usage, whole.known_usd) == (Usage(), 0.0)
    assert whole.usd == pytest.approx(first.usd + second.usd)
    with tallied() as tally:
        note(reply)
    assert tally.spent.usd == pytest.approx(first.usd + reply.usd)
    asked_for = first.usage + reply.usage
    assert tally.spent.tokens == asked_for.input_tokens + asked_for.output_tokens


def test_no_second_repair(server: Running, opened: Opening) -> None:
    server.behave(faults=[{"kind": "not_json"}])
    (reply,) = asked(opened(MemoryJournal()), question())
    assert (reply.status, reply.parsed) == ("unparsed", None) and len(server.log()) == 2


def test_prose_around_the_answer_needs_no_repair(server: Running, opened: Opening) -> None:
    server.behave(faults=[{"kind": "prose"}])
    (reply,) = asked(opened(MemoryJournal()), question())
    assert reply.status == "ok" and len(server.log()) == 1


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "429", "first": 3},
        {"kind": "429", "first": 2, "retry_after": 0.05},
        {"kind": "500", "first": 1},
        {"kind": "529", "first": 2},
        {"kind": "html", "first": 1},
        {"kind": "cut", "first": 1},
        {"kind": "cut_body", "first": 1},
        {"kind": "hang", "first": 1},
        {"kind": "drip", "first": 1, "seconds": 30},
    ],
    ids=lambda fault: fault["kind"] + str(fault.get("retry_after", "")),
)
def test_what_passes_is_asked_again(server: Running, opened: Opening, fault: dict[str, Any]) -> None:
    server.behave(faults=[fault])
    journal, budget = MemoryJournal(), Budget(1.0)
    (reply,) = asked(opened(journal, budget, total_s=0.5), question())
    assert reply.status == "ok" and reply.attempts == fault["first"] + 1
    # What may have been billed without an answer stays an intent without a reply, and counts against the budget.
    lost = [call for call in journal.intents if call not in journal.replies]
    assert len(lost) == (fault["kind"] in ("cut", "cut_body", "hang", "drip"))
    assert budget.spent_usd == pytest.approx(reply.usd + sum(journal.intents[call][1] for call in lost))


def test_what_does_not_pass_becomes_an_error_and_is_asked_again_later(server: Running, opened: Opening) -> None:
    server.behave(faults=[{"kind": "500"}])
    journal = MemoryJournal()
    (reply,) = asked(opened(journal, attempts=2), question())
    assert (reply.status, reply.attempts) == ("error", 2) and "HTTP 500" in reply.detail
    server.behave()
    (again,) = asked(opened(journal), question())
    assert again.status == "ok" and not again.cached


def test_retry_after_beyond_the_patience_ends_the_call(server: Running, opened: Opening) -> None:
    server.behave(faults=[{"kind": "429", "retry_after": 3_600}])
    (reply,) = asked(opened(MemoryJournal(), patience_s=5), question())
    assert reply.status == "error" and reply.attempts == 1


@pytest.mark.parametrize("fault", ["401", "quota"])
def test_what_the_user_must_mend_stops_everything(server: Running, opened: Opening, fault: str) -> None:
    server.behave(faults=[{"kind": fault}])

    async def ask() -> None:
        client = opened(MemoryJournal())
        for text in ("one", "two", "three"):
            with pytest.raises(UserError, match="EXEGETE_API_KEY" if fault == "401" else "quota"):
                await client.complete(question(text))
        await client.close()

    asyncio.run(ask())
    assert len(server.log()) == 1


def test_rejected_before_the_first_answer_stops_after_it_is_one_failure(server: Running, opened: Opening) -> None:
    server.behave(temperature="rejected")
    with pytest.raises(UserError, match="temperature"):
        asked(opened(MemoryJournal()), question(temperature=0.3))

    async def ask() -> tuple[Reply, Reply, Reply]:
        client = opened(MemoryJournal())
        replies = [await client.complete(question(text, temperature=t)) for text, t in
                   (("one", None), ("two", 0.3), ("three", None))]  # fmt: skip
        await client.close()
        return replies[0], replies[1], replies[2]

    assert [reply.status for reply in asyncio.run(ask())] == ["ok", "rejected", "ok"]


def test_keys_reach_their_server_and_nothing_else(
    server: Running, opened: Opening, provider: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setenv("EXEGETE_API_KEY", "sk-very-secret-key")
    server.behave(faults=[{"kind": "401"}])
    journal = MemoryJournal()
    with pytest.raises(UserError) as raised:
        asked(opened(journal), question())
    assert "very-secret" not in f"{raised.value!r}{journal.replies}{journal.intents}{caplog.text}"


def test_equal_questions_in_flight_are_one_call(server: Running, opened: Opening) -> None:
    server.behave(seconds=0.1)
    replies = asked(opened(MemoryJournal()), *[question()] * 5)
    assert [reply.cached for reply in replies] == [False, True, True, True, True]
    assert len(server.log()) == 1


def test_a_caller_that_leaves_does_not_lose_a_call_that_is_paid(server: Running, opened: Opening) -> None:
    server.behave(seconds=0.2)
    journal = MemoryJournal()

    async def ask() -> None:
        client = opened(journal)
        task = asyncio.create_task(client.complete(question()))
        while not journal.intents:
            await asyncio.sleep(0.01)
        task.cancel()
        await client.close()

    asyncio.run(ask())
    assert [reply.status for reply in journal.replies.values()] == ["ok"]


def test_budget_is_never_exceeded_and_ends_in_a_clear_error(server: Running, opened: Opening) -> None:
    server.behave(seconds=0.01)
    journal, budget = MemoryJournal(), Budget(0.01)

    async def ask() -> int:
        client = opened(journal, budget, concurrency=8)
        answers = await asyncio.gather(
            *(client.complete(question(f"Number {n}.", max_tokens=100)) for n in range(400)), return_exceptions=True
        )
        await client.close()
        refused = [answer for answer in answers if isinstance(answer, BaseException)]
        assert refused and all(isinstance(answer, BudgetUsedUp) for answer in refused)
        return len(answers) - len(refused)

    answered = asyncio.run(ask())
    paid = sum(reply.usd for reply in journal.replies.values())
    worst = max(worst for _, worst in journal.intents.values())
    assert answered == len(server.log()) and budget.spent_usd == pytest.approx(paid)
    assert budget.max_usd - worst < paid <= budget.max_usd


def test_more_than_the_server_takes(server: Running, opened: Opening) -> None:
    server.behave(requests_per_s=60, burst=3)
    replies = asked(opened(MemoryJournal()), *(question(f"Number {n}.") for n in range(90)))
    assert {reply.status for reply in replies} == {"ok"}
    counts = server.counts()
    assert counts["asked_again"] == 0 and counts["answered"] == 90


def test_log_probabilities_where_the_server_has_them(server: Running, provider: str, opened: Opening) -> None:
    for given, expected in (("given", provider == "openai"), ("ignored", False), ("rejected", False)):
        server.behave(answer="scripted", logprobs=given, replies=["1", json.dumps(VALID)] * 2)
        client = opened(MemoryJournal())

        async def ask(client: JournaledClient = client) -> tuple[bool, Reply]:
            try:
                return await gives_logprobs(client), await client.complete(question(logprobs=True))
            finally:
                await client.close()

        has, reply = asyncio.run(ask())
        assert has is expected and reply.parsed == VALID
        if expected:
            assert reply.logprobs is not None and "".join(token.token for token in reply.logprobs) == reply.text


def test_without_a_budget_an_unknown_price_is_no_obstacle(server: Running, provider: str) -> None:
    client = open_client(spec_at(server, provider, "unpriced"), journal=MemoryJournal())
    (reply,) = asked(client, question())
    assert reply.status == "ok" and reply.usd == 0


@pytest.mark.parametrize("roles", [[], ["system"], ["user", "assistant"], ["user", "system", "user"]])
def test_no_conversation(opened: Opening, roles: list[Any]) -> None:
    with pytest.raises(ValueError, match="expected system messages first"):
        asked(opened(MemoryJournal()), Request(tuple(Message(role, "text") for role in roles)))


def test_half_a_character_is_one_failure(opened: Opening) -> None:
    (reply,) = asked(opened(MemoryJournal()), question("\ud800"))
    assert reply.status == "rejected" and "surrogate" in reply.detail


def test_nothing_listens(provider: str) -> None:
    client = open_client(f"{provider}:model@http://127.0.0.1:9", journal=(journal := MemoryJournal()),
                         limits=Limits(attempts=2))  # fmt: skip
    (reply,) = asked(client, question())
    assert reply.status == "error" and "no connection" in reply.detail
    assert list(journal.intents) == list(journal.replies)

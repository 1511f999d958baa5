"""What a language model that investigates is told: how the conversation begins, grows, is shortened and goes on after a restart."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from exegete.agent.investigation.contract import Budget, Call, Metric, Outcome, Result
from exegete.agent.investigation.conversation import OLD_CHARACTERS, Asked, Turn, conversation
from exegete.agent.investigation.model import PROMPTS_SHOWN, ModelInvestigator
from exegete.tools.llm import Message, Reply

from .scripted import CAUSAL, FINISH, QUESTION, TEST, TOOLS, begun, called, results_of


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


def test_words_go_back_without_reasoning_and_control_tokens() -> None:
    work, client = begun(called(("lens", {}), text="<think>First \n hm.</think>\n\nI look.<|im_end|>"), FINISH)
    work.end()
    assert client.asked[1].messages[-2].text == "I look.‹|im_end|>"


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

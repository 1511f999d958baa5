"""The investigator that a language model is: what its calls come to, and how it ends."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from exegete.agent.investigation.contract import Call, Claim, Hypothesis
from exegete.agent.investigation.model import MOST_SILENT, ModelInvestigator
from exegete.agent.investigation.note_taking import MOST_CALLS
from exegete.tools.llm import Reply, Status
from exegete.tools.llm.journaled import UNANSWERED

from .scripted import CAUSAL, FINISH, QUESTION, TEST, TOOLS, Scripted, begun, called, results_of


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
        ("update", {"hypothesis": "H1", "status": "true"}, "one of 'open', 'supported', 'not shown', 'rejected'"),
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
    # What the provider is to blame for may be otherwise tomorrow.
    assert last.again == (f"scripted:model gave no answer ({status}: so it goes)" if status in UNANSWERED else "")


def test_a_model_that_loops_is_bounded_by_its_steps() -> None:
    work, client = begun(called(("lens", {})))
    last = work.end()
    assert len(client.asked) == QUESTION.budget.steps and not last.done
    assert "This is your last reply" in client.asked[-1].messages[-1].text
    assert len({request.id("m") for request in client.asked}) == len(client.asked)


def test_notes_without_schemas_are_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match="no schema of claim, finish"):
        ModelInvestigator(Scripted(FINISH), [tool for tool in TOOLS if tool["name"] not in ("claim", "finish")])

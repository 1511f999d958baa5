"""The agent that explains one latent: by a scripted model, on the bundled subject."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from exegete.agent.investigation.bench import Bench
from exegete.agent.investigation.contract import Call, Metric
from exegete.agent.investigation.evidence import gathered
from exegete.agent.investigation.explaining import AgentExplainer, MeteredClient, OutOfTokens
from exegete.agent.investigation.latent_tools import LatentBench, RatedLive, tools_of_latents
from exegete.agent.investigation.toolbelt import Toolbelt
from exegete.tools.errors import SealedSplitError, UserError
from exegete.tools.evidence import restrict
from exegete.tools.explainers import NotExplained
from exegete.tools.llm import Message, Reply, Request, ToolCall, Usage
from exegete.tools.windows import LatentEvidence

SEED = 3


class Scripted:
    """Replies as it is told, the last one again and again; each takes so many tokens."""

    name = "openai:scripted"

    def __init__(self, *replies: Reply, tokens: tuple[int, int] = (1_000, 100)) -> None:
        self.replies = replies
        self.usage = Usage(tokens[0], output_tokens=tokens[1])
        self.asked: list[Request] = []

    async def complete(self, request: Request) -> Reply:
        self.asked.append(request)
        reply = self.replies[min(len(self.asked), len(self.replies)) - 1]
        return replace(reply, usage=self.usage)

    async def close(self) -> None:
        pass


def calling(*calls: tuple[str, Any]) -> Reply:
    made = [
        ToolCall(f"c{number}", name, arguments if isinstance(arguments, str) else json.dumps(arguments))
        for number, (name, arguments) in enumerate(calls)
    ]
    return Reply("ok", "I look.", calls=tuple(made))


FINISH = calling(("finish", {"answer": " The word\n limit. ", "predicate": 'word in {"limit"}'}))


@pytest.fixture(scope="module")
def firing() -> dict[str, Any]:
    """The evidence of a latent, made once."""
    return {}


@pytest.fixture
def evidence(bench: Bench, firing: dict[str, Any]) -> LatentEvidence:
    """A latent that fires often, with windows of explain and refine; and two of the test split."""
    if not firing:
        latent = int(np.argsort(-bench.rates)[3])
        (own,) = gathered(bench, [latent]).evidence
        secret = [replace(window, split="test", id=10_000 + window.id) for window in own.select("refine")[:2]]
        firing["own"] = LatentEvidence(latent, "live", (*own.windows, *secret))
    found: LatentEvidence = firing["own"]
    return found


def explainer(bench: Bench, client: Any, **options: Any) -> AgentExplainer:
    return AgentExplainer(client, bench.live.model, bench.live.dictionary, bench.rates, **options)


def explained(bench: Bench, evidence: LatentEvidence, client: Any, **options: Any) -> Any:
    return asyncio.run(explainer(bench, client, **options).explain(evidence, SEED))


def told(client: Scripted, number: int) -> list[str]:
    """Return what the model was told right before its reply of a number, from 0: results, then words."""
    last = client.asked[number].messages[-1]
    return [*(result.text for result in last.results), last.text]


def first_text(evidence: LatentEvidence) -> str:
    return max(evidence.select("explain"), key=lambda window: window.peak or 0.0).text


def test_it_states_tests_revises_and_ends_in_one_explanation(bench: Bench, evidence: LatentEvidence) -> None:
    fires = first_text(evidence)
    texts = [fires, "zzz", fires]
    client = Scripted(
        calling(("hypothesis", {"statement": "It fires everywhere."}), ("activations", {"texts": texts, "expected": [True, True, True]})),
        calling(("update", {"hypothesis": "H1", "status": "rejected"}), ("windows", {"which": "silent", "count": 2}), ("card", {})),
        FINISH,
    )  # fmt: skip
    found = explained(bench, evidence, client, windows=3)
    assert (found.text, found.predicate, found.explainer) == ("The word limit.", 'word in {"limit"}', "test-and-refine")
    noted = {name: found.parameters[name] for name in ("replies", "texts", "expected", "held", "windows")}
    assert noted == {"replies": 3, "texts": 3, "expected": 3, "held": 2, "windows": 3}
    written, ran, words = told(client, 1)
    assert written == "Written down as H1." and "Of 3 texts that you said what to expect of, 2 did so." in words
    first, *each = ran.splitlines()
    assert first == "it fires in 2 of 3 texts"
    assert [line.split(":")[0] for line in each] == [
        "fires, as you expected",
        "silent, NOT as you expected",
        "fires, as you expected",
    ]
    assert "<<" in each[0] and " 10" in each[0] and "<<" not in each[1]
    assert told(client, 2)[0] == "H1 is rejected." and "passages in which it is silent" in told(client, 2)[1]
    assert "its direction promotes" in told(client, 2)[2] and "10 replies are left" in told(client, 2)[3]
    beginning = client.asked[0].messages[-1].text
    assert beginning.count("<window ") == 3 and "You have 12 replies and 60000 tokens" in beginning


def test_the_same_latent_sends_the_same_requests(bench: Bench, evidence: LatentEvidence) -> None:
    script = (calling(("windows", {}), ("activations", {"texts": [first_text(evidence)]})), FINISH)
    one, two = Scripted(*script), Scripted(*script)
    assert explained(bench, evidence, one) == explained(bench, evidence, two)
    assert [request.id("m") for request in one.asked] == [request.id("m") for request in two.asked]


def test_steering_stands_beside_a_random_latent_and_a_random_direction(bench: Bench, evidence: LatentEvidence) -> None:
    client = Scripted(calling(("steer", {"tokens": 2, "texts": [first_text(evidence)]})), FINISH)
    assert explained(bench, evidence, client)
    steered = told(client, 1)[0]
    assert "turned up to KL 0.5, matched on " in steered and "random direction: likelier" in steered
    assert steered.count("<text ") == steered.count("as it is:") == 1 and steered.count("random latent") == 2


def test_what_is_sealed_is_in_no_request(bench: Bench, evidence: LatentEvidence) -> None:
    every = [
        ("windows", {"which": which, "count": 12, "offset": offset})
        for which in ("top", "silent")
        for offset in (0, 12, 24)
    ]
    client = Scripted(calling(*every), calling(("windows", {"split": "refine"}), ("label", {"latent": 3})), FINISH)
    assert explained(bench, evidence, client, windows=40)
    everything = _unescaped(str([request.messages for request in client.asked]))
    sealed = [window.text for window in evidence.windows if window.split != "explain"]
    shown = [window.text for window in evidence.select("explain")]
    secret = [text for text in sealed if text not in shown and len(text) > 40]
    assert secret and not [text for text in secret if _middle(text) in everything]
    assert [text for text in shown if _middle(text) in everything]
    refused, unknown, _ = told(client, 2)
    assert "split" in refused and "there is no tool 'label'" in unknown
    bare = LatentBench(bench.live, (), Metric("log_odds"), 0, evidence=restrict(evidence, "explain"))
    with pytest.raises(SealedSplitError):
        bare.evidence.select("refine")
    hidden = replace(
        bare, evidence=replace(restrict(evidence, "explain"), sealed=frozenset({"explain", "refine", "test"}))
    )
    assert Toolbelt(hidden, tools_of_latents()).run(Call("1", "windows", {})).status == "refused"


def _unescaped(text: str) -> str:
    return text.replace("<<", "").replace(">>", "")


def _middle(text: str) -> str:
    """Return the longest line: escapes change line breaks and angle brackets alone."""
    return max((part for part in text.replace("<", "\n").replace(">", "\n").split("\n")), key=len)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (("activations", '{"texts": ["a"'), "they are no JSON"),
        (("activations", {"texts": []}), "give 1 to 12"),
        (("activations", {"texts": ["a"], "expected": [True, False]}), "give one for each text"),
        (("activations", {"texts": [""]}), "is empty"),
        (("activation", {"texts": ["a"]}), "Did you mean 'activations'?"),
        (("windows", {"count": 99}), "give 1 to 12"),
        (("steer", {"kl": -1}), "give a KL above 0"),
        (("claim", {"statement": "x", "kind": "correlational"}), "there is no tool 'claim'"),
        (("finish", {"predicate": "never"}), "'answer' is missing"),
    ],
)
def test_a_call_that_cannot_be_run_is_answered_in_words(
    call: tuple[str, Any], why: str, bench: Bench, evidence: LatentEvidence
) -> None:
    client = Scripted(calling(call), FINISH)
    assert explained(bench, evidence, client)
    result = client.asked[1].messages[-1].results[0]
    assert result.failed and why in result.text


def test_a_model_that_goes_round_in_circles_ends_without_an_explanation(bench: Bench, evidence: LatentEvidence) -> None:
    client = Scripted(calling(("activations", {"texts": ["zzz"]})))
    with pytest.raises(NotExplained, match="unfinished: no `finish` in 4 replies"):
        explained(bench, evidence, client, steps=4)
    assert len(client.asked) == 4 and "This is your last reply: call `finish`" in told(client, 3)[-1]


@pytest.mark.parametrize(
    ("replies", "why"),
    [
        ((Reply("ok", "It fires on words."),), "unfinished: .*3 replies in a row called no tool"),
        ((Reply("error", detail="down"),), "unfinished: .*error: down"),
        ((calling(("card", {})), Reply("refused")), "unfinished: .*refused"),
    ],
)
def test_replies_that_lead_nowhere_are_no_explanation(
    replies: Sequence[Reply], why: str, bench: Bench, evidence: LatentEvidence
) -> None:
    with pytest.raises(NotExplained, match=why):
        explained(bench, evidence, Scripted(*replies))


def test_no_pattern_is_no_explanation_and_a_broken_predicate_is_dropped(bench: Bench, evidence: LatentEvidence) -> None:
    nothing = Scripted(calling(("finish", {"answer": "It fires anywhere.", "nothing": True})))
    assert explained(bench, evidence, nothing) is None
    found = explained(bench, evidence, Scripted(calling(("finish", {"answer": "Dates.", "predicate": "word on"}))))
    assert found.predicate is None and "predicate_dropped" in found.parameters
    silent = replace(evidence, windows=tuple(window for window in evidence.windows if not window.fires))
    unasked = Scripted(FINISH)
    assert explained(bench, silent, unasked) is None and not unasked.asked


def test_the_tokens_of_a_latent_are_a_bound(bench: Bench, evidence: LatentEvidence) -> None:
    """Each reply takes 4,100 tokens: a fifth and sixth would be beyond 22,000, so the fourth is told that it is the last."""
    client = Scripted(calling(("windows", {"count": 1})), tokens=(4_000, 100))
    with pytest.raises(NotExplained, match="unfinished"):
        explained(bench, evidence, client, tokens=22_000, max_tokens=200, windows=2)
    assert 4_100 * len(client.asked) <= 22_000 and len(client.asked) >= 3
    assert "This is your last reply" in told(client, -1)[-1] and "replies are left" in told(client, -2)[-1]
    with pytest.raises(NotExplained, match="budget: 0 of 1,000 tokens are spent"):
        explained(bench, evidence, Scripted(FINISH), tokens=1_000, max_tokens=200)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": 0}, "give 1 window and 2 steps at least"),
        ({"steps": 1}, "give 1 window and 2 steps at least"),
        ({"tokens": 5_000}, "give 12288 at least, or a smaller max_tokens"),
    ],
)
def test_options_that_make_no_sense_are_said(options: dict[str, int], message: str, bench: Bench) -> None:
    with pytest.raises(UserError, match=message):
        explainer(bench, Scripted(FINISH), **options)


def test_the_meter_counts_by_hand() -> None:
    """A message of 5 bytes has at most 1,045 tokens, whatever the tokenizer; one of 900 after it, and after 60 that were counted, 2,000."""
    client = Scripted(Reply("ok", "fine"), tokens=(50, 10))
    meter = MeteredClient(client, 2_000)
    request = Request((Message("user", "hello"),), max_tokens=100)
    asyncio.run(meter.complete(request))
    assert meter.spent == 60 and meter.fits([], 0)
    longer = replace(request, messages=(*request.messages, Message("assistant", "fine"), Message("user", "x" * 900)))
    with pytest.raises(OutOfTokens, match=r"60 of 2,000 tokens are spent, the next reply could take 2,100"):
        asyncio.run(meter.complete(longer))
    assert len(client.asked) == 1


def test_rates_are_those_of_the_evidence(bench: Bench) -> None:
    live = RatedLive(bench.live.model, bench.live.dictionary, None, known=bench.rates)
    assert live.rates() is bench.rates

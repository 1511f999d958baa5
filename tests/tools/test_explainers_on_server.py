"""Every explainer through both real SDKs, against the server in `language_model_server`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from language_model_server import Running, serving

from exegete.evaluators import make_judge
from exegete.evaluators.contract import JudgedItem, Verdict
from exegete.evaluators.refine_score import RefineScore
from exegete.tools.embedders import Vectors
from exegete.tools.evidence import restrict
from exegete.tools.explainers import Explanation, NotExplained, make_explainer
from exegete.tools.explainers.one_shot import OneShotExplainer
from exegete.tools.explainers.output import OutputEffects
from exegete.tools.explainers.refining import Refiner, find_mistakes
from exegete.tools.llm import Client, MemoryJournal, open_client
from exegete.tools.windows import LatentEvidence

from planted import cat_evidence, window

TEXT = "The word cat, line\nbreak."
ANSWER = {"explanation": TEXT, "predicate": 'word is "cat"'}


class Halves:
    """Embeds every second passage one way and the others another."""

    name = "halves"

    def query(self, text: str) -> Vectors:
        raise NotImplementedError

    def passages(self, texts: Sequence[str]) -> Vectors:
        return np.array([[1.0, 0.0] if at % 2 else [0.0, 1.0] for at in range(len(texts))], dtype=np.float32)


async def effects(evidence: LatentEvidence, seed: int) -> OutputEffects:
    return OutputEffects((" cat",), (" dog",), 1, 0)


OPTIONS: dict[str, dict[str, Any]] = {
    "one-shot": {},
    "contrastive": {},
    "clusters": {"embedder": Halves()},
    "output": {"effects": effects},
    "combined": {"effects": effects},
}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving() as running:
        yield running


@pytest.fixture(params=["openai", "anthropic"])
def client(request: pytest.FixtureRequest, server: Running, monkeypatch: pytest.MonkeyPatch) -> Client:
    monkeypatch.setenv("EXEGETE_API_KEY", "test-key")
    return open_client(server.spec(request.param, "writer"), journal=MemoryJournal())


def explain(client: Client, name: str) -> Explanation | None:
    async def asked() -> Explanation | None:
        try:
            made = make_explainer(name, client=client, **OPTIONS[name])
            return await made.explain(restrict(cat_evidence(), "explain"), 0)
        finally:
            await client.close()

    return asyncio.run(asked())


@pytest.mark.parametrize("name", list(OPTIONS))
def test_each_explainer_gives_a_parsed_explanation(name: str, client: Client, server: Running) -> None:
    answer = {"explanation": TEXT} if name == "output" else ANSWER
    merged = [{"json": {**ANSWER, "senses": [TEXT]}}] if name == "clusters" else []
    server.behave("writer", answer="scripted", replies=[{"json": answer}] * (2 if merged else 1) + merged)
    found = explain(client, name)
    assert found is not None and (found.text, found.explainer) == ("The word cat, line break.", name)
    assert found.predicate == (None if name == "output" else 'word in {"cat"}') and found.model == client.name


def test_a_revision_names_what_was_missed_and_not_what_was_claimed(client: Client, server: Running) -> None:
    server.behave("writer", answer="oracle")
    missed, claimed = (window(n, tokens, "refine") for n, tokens in ((1, (" a", " cat")), (2, (" b5", " dog"))))
    wrong = {
        "detection": [JudgedItem(missed, None, True, Verdict(False), 0)],
        "fuzzing": [JudgedItem(claimed, (1,), False, Verdict(True), 0)],
    }

    async def revised() -> Explanation | None:
        parent = Explanation("Dogs.", 'word is "dog"')
        evidence = restrict(cat_evidence(), "refine")
        try:
            return await Refiner(client, windows=1).revise(evidence, parent, "sha256:1", find_mistakes(wrong, 0), 0, 1)
        finally:
            await client.close()

    found = asyncio.run(revised())
    assert found is not None and found.parent == "sha256:1" and found.model == client.name
    assert found.predicate == found.text == 'word in {"cat"}'


def test_best_of_with_a_judge_on_the_server(client: Client, server: Running) -> None:
    dogs, cats = {"explanation": "Dogs.", "predicate": None}, {"explanation": "Cats.", "predicate": None}
    server.behave("writer", answer="scripted", replies=[{"json": dogs}, {"json": cats}])
    server.behave("judge", answer="oracle", meanings={"Dogs.": 'word is "dog"', "Cats.": 'word is "cat"'})
    judge = open_client(client.name.replace("writer", "judge"), journal=MemoryJournal())

    async def chosen() -> Explanation | None:
        score = RefineScore(make_judge("model", client=judge))
        best = make_explainer("best-of", explainer=OneShotExplainer(client), score=score, candidates=2)
        try:
            return await best.explain(cat_evidence(), 0)
        finally:
            await client.close()
            await judge.close()

    found = asyncio.run(chosen())
    assert found is not None and found.text == "Cats." and sorted(found.parameters["refine_scores"]) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        ("refusal", "refused"),
        ("max_tokens", "truncated"),
        ("empty", "empty"),
        ("not_json", "unparsed"),
        ("truncated_json", "unparsed"),
    ],
)
def test_a_failure_of_the_model_is_a_failure_with_its_status(
    fault: str, status: str, client: Client, server: Running
) -> None:
    server.behave("writer", answer="scripted", replies=[{"json": ANSWER}] * 2, faults=[{"kind": fault}])
    with pytest.raises(NotExplained) as failure:
        explain(client, "one-shot")
    assert failure.value.status == status


def test_prose_around_the_answer_is_read_past(client: Client, server: Running) -> None:
    server.behave("writer", answer="scripted", replies=[{"json": ANSWER}], faults=[{"kind": "prose"}])
    found = explain(client, "one-shot")
    assert found is not None and found.text == "The word cat, line break."

"""Published verdicts through our prompts, the real SDKs and our parser: each comes back as it was given.

A replay judge serves the verdicts of Llama-3-70B on 121 latents of GPT-2 small (Delphi's result files). Detection and
fuzzing must then find the balanced accuracies that were published with them.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from language_model_server import Running, recorded, serving

from exegete.evaluators.contract import Evaluation, make_evaluator
from exegete.evaluators.model_judge import ModelJudge
from exegete.tools.explainers import Explanation
from exegete.tools.llm import Client, MemoryJournal
from exegete.tools.llm.opening import open_client
from exegete.tools.windows import LatentEvidence, Window

LATENTS = Path(__file__).parents[3] / "shared/data/latents"
TASKS = {"detection": "recall", "fuzzing": "fuzz"}
FULL, QUICK = 5, 30
"""Items in a prompt: as by default, and for fewer calls."""


def pieces(text: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Cut a text with `<<marks>>` into runs, and say which are marked."""
    parts = re.split(r"<<(.*?)>>", text, flags=re.DOTALL)
    return tuple(parts), tuple(range(1, len(parts), 2))


def window(identity: int, task: str, item: Mapping[str, Any]) -> Window:
    truth = item["activating" if task == "detection" else "correctly_marked"]
    tokens, marks = ((item["text"],), None) if task == "detection" else pieces(item["text"])
    return Window(
        identity, tokens, None, truth, "test", "firing" if truth else "random", marks=marks,
        marks_correct=None if marks is None else truth,
    )  # fmt: skip


def evidence(number: int, task: str, latent: Mapping[str, Any]) -> LatentEvidence:
    items = latent[TASKS[task]]
    return LatentEvidence(number, "live", tuple(window(at, task, item) for at, item in enumerate(items)))


def rows(task: str, latent: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for at, item in enumerate(latent[TASKS[task]]):
        shown = window(at, task, item)
        yield recorded(task, latent["explanation"], shown.tokens, shown.marks or (), item["scorer_says"])


def latents(name: str) -> list[Mapping[str, Any]]:
    path = LATENTS / f"delphi_gpt2s_oai128k_{name}.jsonl"
    if not path.exists():
        pytest.skip("../shared/data/latents is absent")
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving() as running:
        running.keep_bodies(False)
        yield running


async def evaluations(client: Client, task: str, found: list[Mapping[str, Any]], per_prompt: int) -> list[Evaluation]:
    evaluator = make_evaluator(task, items_per_prompt=per_prompt)
    judge = ModelJudge(client)
    given = []
    for number, latent in enumerate(found):
        explanation = Explanation(latent["explanation"], None, "given")
        given.append(await evaluator.evaluate(explanation, evidence(number, task, latent), judge, seed=number))
    await client.close()
    return given


@pytest.mark.slow
@pytest.mark.parametrize(
    ("provider", "name", "tolerance", "per_prompt"),
    [
        ("openai", "top", 1e-9, FULL),
        ("openai", "random", 0.005 + 1e-9, QUICK),
        ("anthropic", "top", 1e-9, QUICK),
        ("anthropic", "random", 0.005 + 1e-9, QUICK),
    ],
)
@pytest.mark.parametrize("task", sorted(TASKS))
def test_published_balanced_accuracies(
    server: Running,
    monkeypatch: pytest.MonkeyPatch,
    task: str,
    name: str,
    tolerance: float,
    provider: str,
    per_prompt: int,
) -> None:
    found = latents(name)
    server.behave("llama", answer="replay", verdicts=[row for latent in found for row in rows(task, latent)])
    monkeypatch.setenv("EXEGETE_API_KEY", "test-key")
    client = open_client(server.spec(provider, "llama"), journal=MemoryJournal())
    given = asyncio.run(evaluations(client, task, found, per_prompt))
    published = {"detection": "balanced_acc_recall", "fuzzing": "balanced_acc_fuzz"}[task]
    for latent, evaluation in zip(found, given, strict=True):
        said = {item.window.id: item.verdict.applies for item in evaluation.verdicts}
        assert said == {at: item["scorer_says"] for at, item in enumerate(latent[TASKS[task]])}
        score = next(score for score in evaluation.scores if score.metric == "balanced_accuracy")
        assert score.value == pytest.approx(latent[published], abs=tolerance, rel=0), latent["feature"]
        assert score.failures == 0

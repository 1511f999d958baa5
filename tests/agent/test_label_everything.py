"""Every explainer and every evaluator in labeling runs of the bundled subject, with a language model behind each SDK."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from language_model_server import Running, serving

import exegete
from exegete.agent.config import load_config
from exegete.agent.progress import Lines
from exegete.agent.run import Outcome, run
from exegete.evaluators import evaluator_names
from exegete.tools.bundled import subject_path

pytestmark = pytest.mark.slow
SMALL = {
    "subject.name": "bundled",
    "dictionary.path": "bundled:tests",
    "corpus.source": "bundled",
    "corpus.documents": 600,
    "evidence.firing": [12, 12, 12],
    "evidence.random": [12, 12, 12],
    "label.limit": 4,
    "label.floors": 1,
    "label.evaluator_options": {
        "intervention": {"steering": {"prompts": 6, "tokens": 4}},
        "generation": {"requests": 1, "prompts": 4, "tokens": 4, "items_per_class": 5},
        "output": {"questions": 4},
        "surprisal": {"items_per_class": 4},
    },
}


class Words:
    """Embeds a text by which letters it holds."""

    name = "letters"

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def query(self, text: str) -> Any:
        return self.passages([text])[0]

    def passages(self, texts: Any) -> Any:
        import numpy as np

        found = np.array([[text.count(chr(97 + i)) + 0.1 for i in range(26)] for text in texts], dtype=np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(answer="oracle", otherwise="never", rate=0.05) as running:
        yield running


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with evidence, which all runs share."""
    return tmp_path_factory.mktemp("everything") / "store"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXEGETE_API_KEY", "test-key")
    monkeypatch.setattr("exegete.tools.embedders.SentenceEmbedder", Words)


def labeled(store: Path, server: Running, provider: str, **more: Any) -> Outcome:
    model = server.spec(provider, "judge")
    asked = {"store": str(store), "models.explainer": model, "models.judge": model, "models.embedder": "letters"}
    return run(load_config(None, (), SMALL | asked | more), Lines(every_s=1e9))


def rows(store: Path, query: str) -> list[Any]:
    with exegete.connect(store) as connection:
        return connection.execute(query).fetchall()


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_every_evaluator_scores_in_a_run(provider: str, server: Running, store: Path) -> None:
    outcome = labeled(
        store,
        server,
        provider,
        **{"label.evaluators": evaluator_names(), "models.scorer": f"hf:{subject_path()}"},
    )
    assert outcome.finished and set(outcome.missing.values()) == {0}
    (figures,) = outcome.figures.values()
    assert set(figures["evaluators"]) == set(evaluator_names())
    query = (
        "SELECT evaluator, count(value), count(*) FILTER (baseline = 'shuffled') FROM scores s JOIN runs r USING (run)"
    )
    found = rows(store, f'{query} WHERE r.config LIKE \'%"explainer":"{provider}%\' GROUP BY 1')
    assert {evaluator for evaluator, values, floors in found if values and floors} == set(evaluator_names())


@pytest.mark.parametrize("explainer", ["contrastive", "output", "clusters", "best-of"])
def test_every_explainer_explains_in_a_run(explainer: str, server: Running, store: Path) -> None:
    options = {"candidates": 2, "explainer": "one-shot"} if explainer == "best-of" else {}
    outcome = labeled(
        store,
        server,
        "openai",
        **{"label.explainer": explainer, "label.explainer_options": options, "label.evaluators": ["detection"]},
    )
    (figures,) = outcome.figures.values()
    assert figures["outcomes"].get("labeled", 0) >= 2 and set(outcome.missing.values()) == {0}
    ((count,),) = rows(
        store, f"SELECT count(*) FROM explanations WHERE explainer = '{explainer}' AND model IS NOT NULL"
    )
    assert count == figures["outcomes"]["labeled"]

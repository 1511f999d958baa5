"""The rung `test-and-refine` in labeling runs of the bundled subject, with a language model behind each SDK."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from language_model_server import Running, serving

import exegete
from exegete.agent.config import load_config
from exegete.agent.progress import Lines
from exegete.agent.report import write_report
from exegete.agent.routing_value import ABOVE, BEST_OF_BESIDE, LEAST_LATENTS
from exegete.agent.run import Outcome, run
from exegete.agent.summary import headline
from exegete.agent.workbench import check_workbench
from exegete.tools.errors import UserError

SUBJECT = {"subject.name": "bundled", "dictionary.path": "bundled:tests", "corpus.source": "bundled"}
HERE = "openai:some-model@http://127.0.0.1:9/v1"
SMALL = SUBJECT | {
    "corpus.documents": 500,
    "evidence.firing": [12, 12, 12],
    "evidence.random": [12, 12, 12],
    "evidence.hard": [4, 4, 4],
    "label.floors": 0,
    "cascade.rungs": ["one-shot", "test-and-refine"],
    "cascade.items_per_class": 5,
    "cascade.target": 1.0,
}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(answer="oracle", otherwise="never") as running:
        yield running


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXEGETE_API_KEY", "test-key")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose evidence all runs share."""
    return tmp_path_factory.mktemp("agents") / "store"


def labeled(store: Path, model: str, **more: Any) -> Outcome:
    asked = {"store": str(store), "models.explainer": model, "models.judge": model}
    return run(load_config(None, (), SMALL | asked | more), Lines(every_s=1e9))


def rows(store: Path, query: str) -> list[Any]:
    with exegete.connect(store) as connection:
        return connection.execute(query).fetchall()


@pytest.mark.parametrize(
    ("provider", "blind", "better", "control"), [("openai", "writer", 1, 10), ("anthropic", "agent", -1, 4)]
)
def test_the_agent_climbs_and_stands_beside_best_of_n(
    provider: str, blind: str, better: int, control: int, server: Running, store: Path, tmp_path: Path
) -> None:
    """A model whose one-shot explanations say nothing, and one whose agent says nothing: which is better is known."""
    counts = {"cascade.control": control, "label.limit": control + 2}
    outcome = labeled(store, server.spec(provider, f"oracle?otherwise=never&blind={blind}"), **counts)
    ((run_id,), (figures,)) = outcome.runs, outcome.figures.values()
    assert outcome.finished and set(outcome.missing.values()) == {0}
    beside = figures["cascade"]["beside_best_of"]
    assert beside["better"] == ("test-and-refine" if control >= LEAST_LATENTS else None)
    assert beside[ABOVE]["n"] == control and beside[ABOVE]["value"] * better > 0
    steps = f"SELECT rung, explanation_id, tokens, calls, latent FROM climbs WHERE run = '{run_id}' AND control"
    own, rival, draw = (
        {row[4]: row for row in rows(store, f"{steps} AND rung = '{rung}'")}
        for rung in ("test-and-refine", BEST_OF_BESIDE, "one-shot")
    )
    # At equal tokens, as near as whole draws come to what the agent took.
    assert len(own) == len(rival) == control and all(own[latent][2] > 0 for latent in own)
    assert all(abs(rival[latent][2] - own[latent][2]) < 0.6 * draw[latent][2] for latent in own)
    assert all(own[latent][3] > 2 for latent in own)  # Two replies, and the judging of what came of them.
    told = "\n".join(headline(figures))
    assert ("test-and-refine is better here" if better > 0 else "fewer than 10 latents, which say nothing") in told
    if better > 0:  # It stands, where it was tried, since it is better on the refine split.
        climbed = rows(
            store,
            f"SELECT count(*) FROM climbs a JOIN climbs b USING (run, latent) WHERE run = '{run_id}' AND NOT (a.control OR b.control)"
            " AND a.rung = 'one-shot' AND b.rung = 'test-and-refine' AND b.refine > a.refine",
        )
        stands = "SELECT count(*) FROM data.results r JOIN explanations e USING (explanation_id) WHERE explainer = 'test-and-refine'"
        assert climbed != [(0,)] and rows(store, f"{stands} AND r.run = '{run_id}'") == climbed
    page = write_report(store, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Agent or best-of-N" in page


def test_taken_up_again_it_asks_nothing_twice_and_ends_in_the_same_explanations(
    server: Running, store: Path, tmp_path: Path
) -> None:
    alone = {"cascade.rungs": ["test-and-refine"], "cascade.control": 0, "label.limit": 3, "label.evaluators": []}
    whole = server.spec("openai", "oracle?otherwise=never&seed=1")
    query = "SELECT latent, text, predicate FROM explanations e WHERE explainer = 'test-and-refine' AND model = '{}' ORDER BY 1"
    labeled(store, whole, **alone)
    parts = server.spec("openai", "oracle?otherwise=never&seed=1&swell=1")
    server.reset_log()
    stopped = 0
    # The first reply of the first agent fits. How far the second budget takes them depends on whose reply comes first.
    for tokens in (18_000, 24_000, 10**7):
        try:
            labeled(store, parts, **alone, **{"models.budget_tokens": tokens, "label.concurrency": 1})
        except UserError as error:
            assert "budget" in str(error)
            stopped += 1
    asked = Counter(row["question"] for row in server.log() if row["status"] == 200)
    assert stopped >= 1 and set(asked.values()) == {1}
    first, second = (rows(store, query.format(spec)) for spec in (whole, parts))
    assert len(first) >= 2 and first == second


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({}, r"explainer 'test-and-refine' runs the subject.*\[subject\]"),
        (
            SUBJECT | {"models.explainer": "openai-batch:gpt-4o", "models.budget_usd": 1.0},
            "calls tools and is answered at once",
        ),
        (SUBJECT | {"cascade.models": {"test-and-refine": "hf:model"}}, "hf:model: .*calls tools"),
        (SUBJECT | {"models.explainer": None}, "asks a language model: name one"),
        (SUBJECT | {"cascade.options": {"test-and-refine": {"token": 9}}}, "no option 'token'.*'tokens'"),
        (SUBJECT | {"cascade.rungs": ["test-and-refine", "one-shot"]}, "comes last"),
        (SUBJECT | {"cascade.rungs": ["refine", "test-and-refine"]}, "refine revises what is below it"),
    ],
)
def test_what_is_wrong_is_said_before_the_run_begins(
    overrides: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    usual = {"cascade.rungs": ["one-shot", "test-and-refine"], "models.explainer": HERE, "models.judge": HERE}
    with pytest.raises(UserError, match=message):
        check_workbench(load_config(None, (), {name: value for name, value in (usual | overrides).items() if value}))


def test_it_may_stand_above_refine_or_alone() -> None:
    rungs = ["lexical", "one-shot", "refine", "test-and-refine"]
    config = load_config(None, (), SUBJECT | {"cascade.rungs": rungs, "models.explainer": HERE, "models.judge": HERE})
    check_workbench(config)
    assert config.label.explainer == "one-shot"
    alone = {"label.explainer": "test-and-refine", "models.explainer": HERE, "models.judge": HERE}
    check_workbench(load_config(None, (), SUBJECT | alone))

"""A whole run with language models, through both SDKs, against the server in `language_model_server`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
from language_model_server import Running, serving
from planted_store import planted_file, planted_store, tables

import exegete
from exegete.agent.cli import main
from exegete.agent.config import load_config
from exegete.agent.inspection import newest_config
from exegete.agent.models import Halted
from exegete.agent.progress import Lines
from exegete.agent.run import Outcome, run
from exegete.tools.errors import UserError

LATENTS = 12
ORACLE: dict[str, Any] = {"answer": "oracle", "otherwise": "never"}
QUICK = ("models.timeout_s=2", "models.patience_s=3", "models.attempts=1")


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(**ORACLE) as running:
        yield running


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_file(tmp_path_factory.mktemp("evidence"), LATENTS)


@pytest.fixture(autouse=True)
def fresh(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXEGETE_API_KEY", "test-key")
    server.reset()
    server.behave("*", **ORACLE)


def spec(server: Running, provider: str, model: str = "judge") -> str:
    return server.spec(provider, model)


def label(store: Path, *assignments: str, model: str | None = None) -> Outcome:
    overrides = {"store": str(store), "models.explainer": model, "models.judge": model}
    return run(load_config(None, ["label.floors=4", *assignments], overrides), Lines(every_s=1e9))


def rows(store: Path, query: str) -> list[Any]:
    with exegete.connect(store) as connection:
        return connection.execute(query).fetchall()


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_latents_are_labeled_and_scored_through_the_sdk(
    provider: str, server: Running, evidence: Path, tmp_path: Path
) -> None:
    store = planted_store(evidence, tmp_path / "store")
    outcome = label(store, model=spec(server, provider))
    assert [(run,) for run in outcome.runs] == rows(store, "SELECT run FROM runs")
    (figures,) = outcome.figures.values()
    assert outcome.finished and figures["outcomes"] == {"labeled": LATENTS}
    for evaluator in ("detection", "fuzzing"):
        found = figures["evaluators"][evaluator]
        assert found["balanced_accuracy"]["value"] == 1.0 and found["balanced_accuracy"]["n"] == LATENTS
        assert found["floors"]["shuffled"]["balanced_accuracy"]["value"] < 0.6
    ((calls, usd, tokens),) = rows(store, "SELECT calls, usd, input_tokens FROM costs")
    assert (calls, usd) == (server.counts()["requests"], 0.0) and tokens > 0
    assert rows(store, "SELECT DISTINCT explainer, model FROM explanations") == [("one-shot", spec(server, provider))]
    assert rows(store, "SELECT DISTINCT status FROM calls") == [("ok",)]


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_batches_give_the_tables_that_live_calls_give(
    provider: str, server: Running, evidence: Path, tmp_path: Path
) -> None:
    quick = ["models.batch_linger_s=0.3", "models.batch_poll_s=0.2"]
    batched, live = (planted_store(evidence, tmp_path / name) for name in ("batched", "live"))
    label(batched, *quick, model=spec(server, f"{provider}-batch"))
    # Explaining, the pilot's judging, the floors; all else is known by then.
    assert server.counts()["by_route"]["batch_lines"] == rows(batched, "SELECT sum(calls)::INT FROM costs")[0][0]
    assert sum(entry["path"].endswith("batches") for entry in server.log() if entry["route"] == "batches") <= 6
    label(live, model=spec(server, provider))
    query = "SELECT latent, evaluator, metric, baseline, value, low, high FROM scores ORDER BY ALL"
    assert rows(batched, query) == rows(live, query)


def test_the_same_run_asks_nothing_again_and_another_one_only_what_is_new(
    server: Running, evidence: Path, tmp_path: Path
) -> None:
    store = planted_store(evidence, tmp_path / "store")
    label(store, model=spec(server, "openai"))
    before, asked = tables(store), server.counts()["requests"]
    label(store, model=spec(server, "openai"))
    assert tables(store) == before and server.counts()["requests"] == asked
    label(store, 'label.evaluators=["detection"]', "label.floors=0", model=spec(server, "openai"))
    assert server.counts()["requests"] == asked


def test_order_concurrency_and_a_fresh_journal_change_no_table(server: Running, evidence: Path, tmp_path: Path) -> None:
    server.behave("noisy", **ORACLE, rate=0.2, correlation=0.5)
    stores = [planted_store(evidence, tmp_path / name) for name in ("one", "two")]
    label(stores[0], model=spec(server, "openai", "noisy"))
    label(stores[1], "label.concurrency=2", "models.concurrency=3", model=spec(server, "openai", "noisy"))
    assert tables(stores[0]) == tables(stores[1])


def test_intervals_rest_on_what_the_pilot_has_shown(server: Running, evidence: Path, tmp_path: Path) -> None:
    server.behave("noisy", **ORACLE, rate=0.2, correlation=1.0)
    store = planted_store(evidence, tmp_path / "store")
    label(store, model=spec(server, "openai", "noisy"))
    found = rows(store, "SELECT DISTINCT (parameters->>'icc_latents')::INT FROM scores WHERE evaluator = 'detection'")
    assert found == [(LATENTS,)]
    ((low,),) = rows(store, "SELECT min((parameters->>'icc_expected')::DOUBLE) FROM scores WHERE metric = 'tpr'")
    assert low > 0.5


def test_stopping_early_asks_less(server: Running, tmp_path: Path) -> None:
    file = planted_file(tmp_path, 4, windows_per_split=120)
    stores = [planted_store(file, tmp_path / name) for name in ("all", "some")]
    asked = []
    for store, more in zip(stores, ([], ["label.stop_at=0.75"]), strict=True):
        server.reset_log()
        label(store, "label.floors=0", *more, model=spec(server, "openai"))
        asked.append(server.counts()["requests"])
    assert asked[1] < 0.7 * asked[0]
    query = "SELECT DISTINCT parameters->>'stopped' FROM scores WHERE evaluator = 'detection'"
    assert rows(stores[1], query) == [("true",)]


def test_a_budget_that_is_used_up_leaves_a_run_that_more_money_finishes(
    server: Running, evidence: Path, tmp_path: Path
) -> None:
    model = spec(server, "openai")
    prices = tmp_path / "prices.toml"
    prices.write_text(f'["{model}"]\ninput = 10.0\noutput = 10.0\n')
    money = [f"models.prices={prices}", "label.explainer_options.max_tokens=100", "label.judge_options.max_tokens=100"]
    store, undisturbed = (planted_store(evidence, tmp_path / name) for name in ("store", "undisturbed"))
    label(undisturbed, *money, "models.no_budget=true", model=model)
    ((whole,),) = rows(undisturbed, "SELECT sum(usd) FROM costs")
    server.reset_log()
    with pytest.raises(Halted, match="resume with a larger --budget"):
        label(store, *money, f"models.budget_usd={whole / 2}", model=model)
    ((spent, status),) = rows(store, "SELECT usd, status FROM costs JOIN runs USING (run)")
    assert whole / 4 < spent <= whole / 2 and status == "interrupted"
    assert label(store, *money, f"models.budget_usd={2 * whole}", model=model).finished
    assert server.counts()["asked_again"] == 0
    assert tables(store) == tables(undisturbed)


def test_one_budget_counts_what_all_dictionaries_of_a_store_have_cost(
    server: Running, evidence: Path, tmp_path: Path
) -> None:
    store, other = planted_store(evidence, tmp_path / "store"), tmp_path / "other.jsonl"
    other.write_text(evidence.read_text().replace('"dictionary": "planted"', '"dictionary": "other"'))
    planted_store(other, store)
    model, prices = spec(server, "openai"), tmp_path / "prices.toml"
    prices.write_text(f'["{model}"]\ninput = 10.0\noutput = 10.0\n')
    more = [
        f"models.prices={prices}",
        *("label.explainer_options.max_tokens=100", "label.judge_options.max_tokens=100"),
    ]
    server.behave("judge", **ORACLE, faults=[{"kind": "500", "share": 0.3}])
    assert len(label(store, *more, *QUICK, "models.no_budget=true", model=model).missing) == 2
    query = "SELECT sum(usd) FROM costs"
    ((spent,),) = rows(store, query)
    server.behave("judge", **ORACLE)
    with pytest.raises(Halted, match="resume with a larger --budget"):
        label(store, *more, f"models.budget_usd={spent}", model=model)
    assert rows(store, query) == [(spent,)]
    assert not any(label(store, *more, f"models.budget_usd={4 * spent}", model=model).missing.values())


def test_a_key_that_is_refused_ends_the_run_and_loses_nothing(server: Running, evidence: Path, tmp_path: Path) -> None:
    store = planted_store(evidence, tmp_path / "store")
    server.behave("judge", **ORACLE, faults=[{"kind": "401", "after": 40}])
    with pytest.raises(Halted, match="EXEGETE_API_KEY"):
        label(store, model=spec(server, "openai"))
    server.behave("judge", **ORACLE)
    assert label(store, model=spec(server, "openai")).finished
    assert server.counts()["asked_again"] == 0


def test_an_explainer_that_declines_is_an_outcome_with_its_reason(
    server: Running, evidence: Path, tmp_path: Path
) -> None:
    store = planted_store(evidence, tmp_path / "store")
    server.behave("declines", **ORACLE, faults=[{"kind": "refusal"}])
    label(store, f"models.explainer={spec(server, 'openai', 'declines')}", f"models.judge={spec(server, 'openai')}")
    found = rows(store, "SELECT DISTINCT outcome, split_part(detail, ':', 2) FROM latents")
    assert found == [("no_explanation", " refused")]


def test_a_run_of_another_version_is_not_passed_off_as_the_same(
    evidence: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = planted_store(evidence, tmp_path / "store")
    label(store)
    monkeypatch.setattr("sys.argv", ["exegete", "resume", "--store", str(store)])
    for older, said in ((False, False), (True, True)):
        if older:
            with duckdb.connect(str(store / "labels.duckdb")) as connection:
                connection.execute("UPDATE data.runs SET run = 'sha256:of-before'")
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        assert ("begun by another version" in capsys.readouterr().err) is said


def test_what_runs_in_a_store_is_known_by_its_models(server: Running, evidence: Path, tmp_path: Path) -> None:
    store = planted_store(evidence, tmp_path / "store")
    label(store, "models.concurrency=7", model=spec(server, "openai"))
    ((config,),) = rows(store, "SELECT config FROM runs")
    assert json.loads(config)["models"]["judge"] == spec(server, "openai")
    assert "concurrency" not in json.loads(config)["models"] and newest_config(store)["models"]["concurrency"] == 7


def test_instruments_that_cannot_be_opened_leave_no_run(evidence: Path, tmp_path: Path) -> None:
    store = planted_store(evidence, tmp_path / "store")
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError):
        label(store, model=f"hf:{tmp_path / 'model'}")
    assert rows(store, "SELECT * FROM runs") == []

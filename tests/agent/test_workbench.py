"""From a configuration to instruments: what can be wrong is said before anything is loaded, sent or paid for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exegete.agent.config import BATCHED_LATENTS, RunConfig, load_config
from exegete.agent.gathering import load_inputs
from exegete.agent.identity import identity
from exegete.agent.models import budget_of
from exegete.agent.planning import batched, plan
from exegete.agent.progress import Lines
from exegete.agent.workbench import check_workbench
from exegete.tools.errors import UserError

SUBJECT = {"subject.name": "bundled", "dictionary.path": "bundled:tests", "corpus.source": "bundled"}
KEYS = ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "OPENROUTER_API_KEY", "EXEGETE_API_KEY")
HERE = "openai:some-model@http://127.0.0.1:9/v1"
PRICED = "openai:gpt-4o-mini"
EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)


def settled(*assignments: str, **overrides: Any) -> RunConfig:
    return load_config(None, assignments, overrides)


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["models.explainer=opnai:x"], "no provider 'opnai'.*Did you mean 'openai'"),
        ([f"models.judge={PRICED}", "models.budget_usd=1"], "set the environment variable OPENAI_API_KEY"),
        (["models.judge=anthropic:claude-x", "models.budget_usd=1"], "set the environment variable ANTHROPIC_API_KEY"),
        (["models.explainer=openai:m@https://example.org/v1", "models.budget_usd=1"], "no price is known"),
        (["models.explainer=openai:m@https://example.org/v1"], "say how much, --budget USD, or give --no-budget"),
        (["models.scorer=openai:gpt-4o"], "models.scorer = 'openai:gpt-4o'.*hf:PATH"),
        (["models.explainer=hf:./nowhere"], "hf:./nowhere: there is no folder './nowhere'"),
        (["models.scorer=hf:/nowhere"], "hf:/nowhere: there is no folder '/nowhere'"),
        (["models.embedder=a/b/c"], "models.embedder = 'a/b/c': there is no folder"),
        (["models.prices=nowhere.toml"], "price table 'nowhere.toml'"),
        (["label.explainer=one-shot"], "explainer 'one-shot' asks a language model.*--model SPEC"),
        (["label.explainer=best-of"], "explainer 'one-shot' asks a language model"),
        (["label.explainer=best-of", "label.explainer_options.explainer=lexical"], "not 'lexical'"),
        (["label.explainer=clusters", f"models.explainer={HERE}"], "models.embedder = NAME or FOLDER"),
        (["label.explainer=combined", f"models.explainer={HERE}"], r"runs the subject.*\[subject\]"),
        (["label.judge=model"], "judge 'model' asks a language model.*models.judge = SPEC"),
        (["label.judge=modle"], "no judge is named 'modle'.*Did you mean 'model'"),
        (['label.evaluators=["simulation"]'], "evaluator 'simulation' asks a language model"),
        (['label.evaluators=["surprisal"]'], "evaluator 'surprisal' needs a local model.*models.scorer = 'hf:PATH'"),
        (['label.evaluators=["embedding"]'], "evaluator 'embedding' needs an embedding model"),
        (['label.evaluators=["intervention"]', f"models.judge={HERE}"], r"runs the subject.*\[subject\]"),
        (["label.evaluator_options.fuzing.split=test"], "no evaluator is named 'fuzing'.*'fuzzing'"),
        (["label.evaluator_options.fuzzing.items_per_clas=3"], "no option 'items_per_clas'.*'items_per_class'"),
        (["label.evaluator_options.fuzzing.items_per_class=many"], "option items_per_class = 'many'"),
        (["label.judge_options.temperature=0"], "judge 'predicate' has no option 'temperature'; it has none"),
        (["cascade.rungs=5"], "cascade.rungs = 5: expected a list"),
        (["label.evaluators=detection"], "label.evaluators = 'detection': expected a list"),
        (["label.until=25:00"], "label.until = '25:00': expected a time of day"),
        (["label.stop_at=1.5"], "label.stop_at = 1.5"),
        ([f"models.explainer={HERE}", "label.explainer=lexical"], "asked nothing.*'lexical'.*--explainer one-shot"),
        ([f"models.judge={HERE}", "label.judge=predicate"], "asked nothing.*'predicate'.*--judge model"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_loaded(assignments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_workbench(settled(*assignments))


def test_a_price_table_of_the_users_makes_a_budget_possible(tmp_path: Path) -> None:
    spec = "openai:m@https://example.org/v1"
    table = tmp_path / "prices.toml"
    table.write_text(f'["{spec}"]\ninput = 1.0\noutput = 2.0\n')
    asked = [f"models.judge={spec}", "models.budget_usd=3"]
    with pytest.raises(UserError, match="no price is known"):
        check_workbench(settled(*asked))
    check_workbench(settled(*asked, f"models.prices={table}"))


def test_a_server_on_this_machine_needs_neither_key_nor_budget() -> None:
    there = HERE.replace("127.0.0.1", "example.org")
    with pytest.raises(UserError, match="--budget"):
        check_workbench(settled(f"models.explainer={there}", f"models.judge={there}"))
    check_workbench(settled(f"models.explainer={HERE}", f"models.judge={HERE}"))


def test_workers_without_a_pass_are_not_passed_over() -> None:
    with pytest.raises(UserError, match="'ray:2' do activation passes, and there is none to do"):
        load_inputs(load_config(None, ["evidence.workers=ray:2"]), Lines())


def test_a_model_of_one_rung_needs_a_budget_and_a_key_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    local = (f"models.explainer={HERE}", f"models.judge={HERE}", 'cascade.rungs=["one-shot", "refine"]')
    dear = 'cascade.models={ refine = "openai-batch:gpt-4o" }'
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        check_workbench(settled(*local, dear))
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    with pytest.raises(UserError, match="--budget"):
        check_workbench(settled(*local, dear))
    check_workbench(settled(*local, dear, "models.budget_usd=1"))
    assert batched(settled(*local, dear)) and not batched(settled(*local))
    assert settled(*local, dear).label.concurrency == BATCHED_LATENTS


@pytest.mark.parametrize(("subject", "explainer"), [(SUBJECT, "combined"), ({}, "one-shot")])
def test_models_that_are_named_explain_and_judge(subject: dict[str, str], explainer: str) -> None:
    label = load_config(None, [f"models.explainer={HERE}", f"models.judge={HERE}"], subject).label
    assert (label.explainer, label.judge) == (explainer, "model")


def test_what_is_said_of_the_explainer_counts_more() -> None:
    label = settled(f"models.explainer={HERE}", f"models.judge={HERE}", "label.explainer=lexical").label
    assert (label.explainer, label.judge) == ("lexical", "model")


def test_one_model_for_both_may_explain_only_or_judge_only() -> None:
    both = (f"models.explainer={HERE}", f"models.judge={HERE}")
    check_workbench(settled(*both, "label.judge=predicate"))
    check_workbench(settled(*both, "label.explainer=lexical"))
    with pytest.raises(UserError, match="asked nothing"):
        check_workbench(settled(*both, "label.explainer=lexical", "label.judge=predicate"))


def test_evaluators_ask_the_judges_model_where_the_judge_does_not() -> None:
    asked = (f"models.judge={HERE}", "label.judge=predicate")
    with pytest.raises(UserError, match="asked nothing"):
        check_workbench(settled(*asked))
    check_workbench(settled(*asked, 'label.evaluators=["simulation"]'))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: f.name)
def test_a_model_on_the_command_line_is_asked_whatever_the_example(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "a-key")
    config = load_config(file, (), {"models.explainer": HERE, "models.judge": HERE})
    check_workbench(config)
    rungs = config.cascade.rungs
    assert (config.label.explainer, config.label.judge) == ("one-shot" if rungs else "combined", "model")


def test_money_and_pace_are_no_part_of_what_a_run_is() -> None:
    plain = settled(f"models.judge={HERE}")
    money = [
        "models.budget_usd=1",
        "models.concurrency=3",
        "models.timeout_s=1",
        "models.prices=x",
        "models.attempts=1",
    ]
    assert identity(plain) == identity(settled(f"models.judge={HERE}", *money))
    assert identity(plain) != identity(settled("models.judge=openai:other@http://127.0.0.1:9/v1"))


def test_no_budget_counts_more_than_a_budget() -> None:
    assert budget_of(settled("models.budget_usd=1", "models.no_budget=true").models) is None
    found = budget_of(settled("models.budget_usd=1").models)
    assert found is not None and found.max_usd == 1


def test_a_plan_names_models_and_budget() -> None:
    lines = plan(load_config(None, [f"models.judge={HERE}", "models.budget_usd=2.5"], SUBJECT))
    assert f"models     judge {HERE}; budget: 2.5 USD" in lines


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: f.name)
def test_every_example_is_a_configuration_that_could_run(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEYS:
        monkeypatch.setenv(name, "a-key")
    config = load_config(file)
    check_workbench(config)
    assert config.store.startswith("out/") and config.subject and config.dictionary and config.corpus

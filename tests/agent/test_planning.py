"""Plans: what is said before anything is done, whether it then comes so, and when one is asked."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from disturbed import PRICE_USD, Bench, bench_of
from language_model_server import Running, serving

from exegete.agent.config import RunConfig, load_config
from exegete.agent.estimating import Estimate, Extent, Figure
from exegete.agent.metering import metered, seen, stage
from exegete.agent.planning import Ask, Plan, asking, confirmed, plan, plan_lines, question
from exegete.agent.run_facts import explainer_of, models_text
from exegete.tools.errors import UserError
from exegete.tools.llm import Reply, Usage
from exegete.tools.store import Store

LATENTS = 40


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def key() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXEGETE_API_KEY", "test-key")
        yield


@pytest.fixture
def bench(server: Running, tmp_path: Path) -> Bench:
    server.reset()
    found = bench_of(server, tmp_path, LATENTS, windows_per_split=4)
    found.behave()
    return found


def config_of(bench: Bench, store: Path, **more: Any) -> RunConfig:
    return load_config(None, (), bench.settings(store=str(store), **more))


def limits(lines: list[str], name: str) -> tuple[float, float]:
    (line,) = [line for line in lines if line.startswith(name)]
    low, high = re.search(r"\[([\d.,]+), ([\d.,]+)\]", line).groups()  # type: ignore[union-attr]
    return float(low.replace(",", "")), float(high.replace(",", ""))


def test_what_is_measured_then_comes_and_is_not_paid_twice(bench: Bench) -> None:
    store = bench.store("store")
    lines = plan(config_of(bench, store))
    sampled = bench.server.counts()
    text = "\n".join(lines)
    assert f"{LATENTS}: {LATENTS} live; 0 labeled already" in text and "(n = 12)" in text
    assert sampled["requests"] > 0 and f"{sampled['tokens'] * PRICE_USD * 1e-6:.4f} USD (in the run's journal" in text
    outcome = bench.label(store)
    whole = bench.server.counts()
    assert outcome.finished and whole["asked_again"] == 0
    low, high = limits(lines, "calls")
    assert low <= whole["requests"] - sampled["requests"] <= high
    low, high = limits(lines, "cost")
    assert low - 0.01 <= (whole["tokens"] - sampled["tokens"]) * PRICE_USD * 1e-6 <= high + 0.01


def test_a_finished_run_has_nothing_to_come_and_asks_nothing(bench: Bench) -> None:
    store = bench.store("store")
    bench.label(store)
    asked = bench.server.counts()["requests"]
    lines = plan(config_of(bench, store))
    assert f"{LATENTS} labeled already" in "\n".join(lines) and "nothing is left to be labeled" in "\n".join(lines)
    assert bench.server.counts()["requests"] == asked


def test_a_plan_made_beside_a_run_leaves_its_store_alone(bench: Bench) -> None:
    store = bench.store("store")
    with Store.create_or_open(store).writer():
        before = {file: file.stat().st_mtime_ns for file in store.rglob("*") if file.is_file()}
        lines = plan(config_of(bench, store))
        assert {file: file.stat().st_mtime_ns for file in store.rglob("*") if file.is_file()} == before
    assert "not kept: another process writes to the store" in "\n".join(lines)


def test_a_damaged_store_is_said_to_be(bench: Bench) -> None:
    store = bench.store("store")
    (store / "run.duckdb").write_bytes(b"no database")
    with pytest.raises(UserError):
        plan(config_of(bench, store))


def test_batches_are_not_waited_for(bench: Bench) -> None:
    store = bench.store("store")
    batch = bench.server.spec("openai-batch", "judge")
    prices = {"models.explainer": batch, "models.judge": batch, "models.prices": None, "models.no_budget": True}
    lines = plan(config_of(bench, store, **prices))
    assert "answers come in batches" in "\n".join(lines) and bench.server.counts()["requests"] == 0


def test_a_pass_that_is_still_to_come_is_timed_and_leaves_nothing(tmp_path: Path) -> None:
    bundled = {"subject.name": "bundled", "dictionary.path": "bundled:tests", "corpus.source": "bundled"}
    store = tmp_path / "store"
    lines = plan(load_config(None, ["corpus.documents=3000"], {**bundled, "store": str(store)}))
    text = "\n".join(lines)
    assert re.search(r"speed +[\d,]+ tokens/s \[[\d,]+, [\d,]+\] \(n = \d+ micro-batches\)", text)
    assert "3,000 documents" in text and "no language model takes part" in text and not store.exists()


def test_nothing_to_label(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to label"):
        plan(load_config(None, (), {"store": str(tmp_path / "none")}))


def planned(usd: float, hours: float, recorded: int = 0) -> Plan:
    def figure(value: float) -> Figure:
        return Figure(value / 2, value / 4, value, 12)

    own = Estimate(
        figure(100),
        figure(1_000),
        figure(100),
        figure(usd),
        figure(hours),
        "4 calls in flight",
        {"journal": figure(2e6)},
        0.01,
    )
    return Plan("sha256:0", {"live": 90, "dead": 10}, recorded, Extent(5, 0), own, 0.01, True, 1_000)


def settings(**models: Any) -> RunConfig:
    return load_config(None, (), {f"models.{name}": value for name, value in models.items()})


def test_the_lines_of_a_plan() -> None:
    assert plan_lines(planned(8.0, 3.0), settings(budget_usd=2.01)) == [
        "latents    100: 90 live, 10 dead; 0 labeled already",
        "floors     four on 5 latents",
        "calls      50 [25, 100] (n = 12)",
        "input      500 tokens [250, 1,000] (n = 12)",
        "output     50 tokens [25, 100] (n = 12)",
        "cost       4.00 USD [2.00, 8.00] (n = 12) to come; 0.0100 USD spent; the budget of 2.01 USD holds about 50% of it",
        "time       1.5 h [0.8, 3.0] (n = 12); what takes so long: 4 calls in flight",
        "disk       evidence 1 kB (there), journal 1 MB (up to 2 MB)",
        "measured   on 12 latents for 0.0100 USD (in the run's journal, not paid for again); [95 % interval], n latents",
    ]


def test_the_plan_of_free_models_and_of_a_cascade() -> None:
    free = planned(0.0, 3.0)
    assert free.estimate is not None
    free = replace(free, spent_usd=0.0, estimate=replace(free.estimate, paid_usd=0.0))
    told = plan_lines(free, settings(budget_usd=2.0))
    assert "cost       none: these models are free, by the price table and on your own machines" in told
    assert told[-1] == "measured   on 12 latents (in the run's journal, not paid for again); [95 % interval], n latents"
    model = "openai:m@http://127.0.0.1:9/v1"
    config = load_config(None, (), {"cascade.rungs": ["lexical", "one-shot"], "models.explainer": model})
    assert explainer_of(config.model_dump()) == "lexical → one-shot"
    assert explainer_of({"label": {"explainer": "output"}}) == "output"
    assert (
        models_text({"explainer": model, "scorer": "hf:x", "judge": model})
        == f"explainer and judge {model}, scorer hf:x"
    )


def test_one_is_asked_about_what_is_much_and_only_once() -> None:
    config = settings(confirm_usd=5.0)
    assert question([planned(4.9, 23)], config) is None
    assert question([planned(5.1, 23)], config) == "this may take 5.10 USD (models.confirm_usd = 5); go on?"
    # Two dictionaries together, and hours as well.
    both = question([planned(2.6, 13), planned(2.6, 13)], config)
    assert both == "this may take 5.20 USD (models.confirm_usd = 5) and 26.0 hours (label.confirm_hours = 24); go on?"
    # No more than the budget can be spent, and a run that is taken up was agreed to.
    assert question([planned(50, 1)], settings(confirm_usd=5.0, budget_usd=4.0)) is None
    assert question([planned(50, 1)], settings(confirm_usd=5.0, budget_usd=4.0, no_budget=True)) is not None
    assert question([planned(50, 1, recorded=1)], config) is None


def test_the_answer_decides_and_without_a_terminal_there_is_a_way() -> None:
    config, much = settings(confirm_usd=5.0), [planned(50, 1)]
    asked: list[str] = []

    def answer(said: bool) -> Ask:
        def ask(text: str) -> bool:
            asked.append(text)
            return said

        return ask

    assert confirmed(much, config, answer(True)) and not confirmed(much, config, answer(False)) and len(asked) == 2
    assert confirmed([planned(1, 1)], config, answer(False)) and len(asked) == 2
    assert confirmed(much, config, None) and confirmed(much, config, asking(yes=True))
    with pytest.raises(UserError, match=r"50\.00 USD.*--yes"):
        confirmed(much, config, asking(yes=False))


def test_replies_are_counted_by_stage_and_those_paid_for_apart() -> None:
    async def work() -> None:
        seen(Reply("ok", "ab", usage=Usage(10, output_tokens=1), usd=0.5, seconds=2.0, cached=True))
        with stage("score"):
            await asyncio.create_task(inner())

    async def inner() -> None:
        seen(Reply("ok", "abc", usage=Usage(20, output_tokens=2), usd=0.25, seconds=1.0))

    async def measure() -> Any:
        with metered() as meter:
            await work()
        seen(Reply("ok"))
        return meter

    meter = asyncio.run(measure())
    assert (meter.fresh, meter.paid_usd) == (1, 0.25)
    assert (meter.stages["score"].calls, meter.stages["score"].input_tokens) == (1, 20)
    whole = meter.total
    assert (whole.calls, whole.input_tokens, whole.output_tokens, whole.usd, whole.seconds) == (2, 30, 3, 0.75, 3.0)
    assert whole.text_bytes == 5

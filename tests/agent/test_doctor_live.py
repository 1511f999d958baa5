"""`doctor --live` through both SDKs against the test server, and on a local model: what it says, spends and refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from language_model_server import Running, serving
from typer.testing import CliRunner

from exegete.agent.cli import app, main
from exegete.agent.doctor_checks import Check
from exegete.agent.doctor_live import Diagnosis, examine
from exegete.tools.errors import UserError
from exegete.tools.llm import Limits, load_prices

STORIES = Path(__file__).parents[3] / "shared" / "data" / "models" / "stories260K" / "hf"
QUICK = Limits(concurrency=1, total_s=5, patience_s=0.3, attempts=2)
EXPLAINED = "Rain, snow and other weather."
KEY = "plain-old-key-7"
PRICE = {"input": 1.0, "cached": 0.1, "cache_write": 1.25, "output": 5.0}


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving() as server:
        yield server


@pytest.fixture
def server(running: Running, monkeypatch: pytest.MonkeyPatch) -> Running:
    monkeypatch.setenv("EXEGETE_API_KEY", KEY)
    running.reset()
    return running


@pytest.fixture(params=["openai", "anthropic"])
def provider(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def spec_at(server: Running, provider: str, model: str = "m") -> str:
    return server.spec(provider, model)


def good(server: Running, **behaviour: Any) -> None:
    """A judge that knows what the passages are about."""
    server.behave(answer="oracle", meanings={EXPLAINED: 'word in {"rained"}'}, **behaviour)


def examined(server: Running, provider: str, max_usd: float | None = 0.05, **price: float) -> Diagnosis:
    names = [f"{provider}:m"]
    return examine(
        spec_at(server, provider),
        max_usd=max_usd,
        prices=load_prices(own={name: PRICE | price for name in names}),
        limits=QUICK,
    )


def check(diagnosis: Diagnosis, name: str) -> Check:
    (found,) = [one for one in diagnosis.checks if one.name == name]
    return found


def outcomes(diagnosis: Diagnosis) -> dict[str, str]:
    return {one.name: one.outcome for one in diagnosis.checks}


def test_a_model_that_has_everything(server: Running, provider: str) -> None:
    good(server)
    diagnosis = examined(server, provider)
    assert diagnosis.usable
    assert outcomes(diagnosis) == {
        "reachable": "ok",
        "model": "ok",
        "structured output": "ok",
        "temperature": "ok",
        "judging": "ok",
        "log-probabilities": "ok" if provider == "openai" else "lacking",
        "prompt caching": "ok",
        "given text": "lacking",
        "refusals": "ok",
        "cost": "ok",
        "latency": "ok",
    }
    assert check(diagnosis, "structured output").found.endswith(
        "(response_format json_schema)" if provider == "openai" else "(output_config.format)"
    )
    assert "3 of 3 verdicts are right" in check(diagnosis, "judging").found
    assert "answers as 'm'" in check(diagnosis, "model").found
    assert "EXEGETE_API_KEY" in check(diagnosis, "reachable").found
    if provider == "anthropic":
        assert check(diagnosis, "log-probabilities").means.endswith("AUROC and AUPRC will be null")
    else:
        assert check(diagnosis, "log-probabilities").found.startswith("2 alternatives")


def test_a_handful_of_calls_and_what_they_cost(server: Running, provider: str) -> None:
    good(server)
    cost = check(examined(server, provider), "cost").found
    log = [row for row in server.log() if row["status"] == 200]
    assert len(log) == 6 and cost.startswith("6 calls, ")
    assert "of 0.05 allowed, at 1 in and 5 out per million tokens" in cost
    spent = float(cost.split(" USD")[0].rsplit(" ", 1)[1])
    assert 0.001 < spent < 0.05


def test_cached_tokens_are_seen(server: Running, provider: str) -> None:
    good(server)
    found = check(examined(server, provider), "prompt caching")
    assert "came from the cache" in found.found and "at 10% of the price" in found.means
    assert "a judge's prompt is shorter" in found.means
    # A provider that keeps nothing so short is found out as well.
    good(server, cache_min_tokens=1_000_000)
    found = check(examined(server, provider), "prompt caching")
    assert found.outcome == "lacking" and "none of it came from a cache" in found.found


@pytest.mark.parametrize("logprobs", ["rejected", "ignored"])
def test_without_log_probabilities(server: Running, logprobs: str) -> None:
    good(server, logprobs=logprobs)
    diagnosis = examined(server, "openai")
    assert check(diagnosis, "log-probabilities").outcome == "lacking" and diagnosis.usable
    assert check(diagnosis, "judging").outcome == "ok"


def test_without_schemas(server: Running, provider: str) -> None:
    good(server, structured="rejected")
    found = check(examined(server, provider), "structured output")
    if provider == "openai":
        assert found.outcome == "lacking" and "in words only" in found.found and "cost twice" in found.means
    else:
        assert found.outcome == "ok" and "through a tool" in found.found


def test_schemas_that_are_taken_and_not_kept(server: Running, provider: str) -> None:
    good(server, structured="ignored")
    found = check(examined(server, provider), "structured output")
    assert found.outcome == "lacking" and "does not hold the answer to it" in found.found


def test_a_model_that_takes_no_temperature(server: Running, provider: str) -> None:
    good(server, temperature="rejected")
    diagnosis = examined(server, provider)
    found = check(diagnosis, "temperature")
    assert diagnosis.usable and found.outcome == "lacking" and "leave it out" in found.means
    assert check(diagnosis, "judging").outcome == "ok"


def test_a_model_that_never_fits_a_schema_cannot_be_used(server: Running, provider: str) -> None:
    good(server, faults=[{"kind": "not_json", "after": 1}])
    diagnosis = examined(server, provider)
    assert not diagnosis.usable
    assert outcomes(diagnosis)["structured output"] == outcomes(diagnosis)["judging"] == "failed"
    assert "failure rows" in check(diagnosis, "structured output").means


def test_a_judge_that_obeys_the_passages(server: Running, provider: str) -> None:
    server.behave(answer="oracle", meanings={EXPLAINED: 'word in {"rained", "ignore"}'})
    found = check(examined(server, provider), "judging")
    assert found.outcome == "lacking" and "2 of 3" in found.found and "was obeyed" in found.found


def test_refusals_are_told_with_their_reason(server: Running, provider: str) -> None:
    good(server, faults=[{"kind": "refusal", "containing": "three shells"}])
    diagnosis = examined(server, provider)
    found = check(diagnosis, "refusals")
    assert found.outcome == "lacking" and "1 of 7 calls: refused: " in found.found and "failure rows" in found.means
    assert check(diagnosis, "judging").outcome == "failed" and diagnosis.usable


def test_a_key_that_is_not_taken(server: Running, provider: str) -> None:
    good(server, faults=[{"kind": "401"}])
    diagnosis = examined(server, provider)
    assert not diagnosis.usable and outcomes(diagnosis) == {"reachable": "failed", "cost": "ok"}
    assert "does not take the key in EXEGETE_API_KEY" in check(diagnosis, "reachable").found
    assert len(server.log()) == 1


def test_pushed_back_for_ever(server: Running, provider: str) -> None:
    good(server, faults=[{"kind": "429", "retry_after": 0.1}])
    diagnosis = examined(server, provider)
    found = check(diagnosis, "reachable")
    assert not diagnosis.usable and "HTTP 429" in found.found and "rate limit" in found.means
    assert 2 <= len(server.log()) <= 20


def test_an_unknown_model(server: Running, provider: str) -> None:
    diagnosis = examined(server, provider)
    assert not diagnosis.usable and "no such model" in check(diagnosis, "reachable").found


def test_nobody_there(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EXEGETE_API_KEY", raising=False)
    diagnosis = examine(f"{provider}:m@http://127.0.0.1:9", limits=QUICK)
    found = check(diagnosis, "reachable")
    assert not diagnosis.usable and "no connection" in found.found and "URL" in found.means


def test_a_budget_that_is_too_small_for_anything(server: Running, provider: str) -> None:
    good(server)
    diagnosis = examined(server, provider, max_usd=0.0001)
    assert not diagnosis.usable and server.log() == []
    assert "more with --max-usd" in check(diagnosis, "reachable").found


def test_a_budget_that_is_too_small_for_some_checks(server: Running, provider: str) -> None:
    good(server)
    short = check(examined(server, provider, max_usd=0.011), "prompt caching")
    assert short.outcome == "lacking" and "a larger --max-usd would try" in short.means
    none = examined(server, provider, max_usd=0.006)
    assert none.usable and check(none, "prompt caching").outcome == "skipped"
    assert "not looked at: it may cost" in check(none, "prompt caching").found
    assert check(none, "cost").found.startswith("3 calls")


@pytest.mark.parametrize("max_usd", [0.0005, 0.003, 0.01, 0.02])
def test_the_budget_holds_whatever_it_is(server: Running, provider: str, max_usd: float) -> None:
    good(server)
    cost = check(examined(server, provider, max_usd=max_usd), "cost").found
    assert cost.startswith("no call") or float(cost.split(" USD")[0].rsplit(" ", 1)[1]) <= max_usd


def test_a_batch_model_is_asked_live(server: Running, provider: str) -> None:
    good(server)
    prices = load_prices(own={f"{provider}:m": PRICE})
    diagnosis = examine(spec_at(server, f"{provider}-batch"), prices=prices, limits=QUICK)
    assert diagnosis.model == spec_at(server, provider) and diagnosis.usable
    found = check(diagnosis, "batches")
    assert found.outcome == "skipped" and "asked live" in found.found and "50%" in found.found


def test_a_missing_key_is_named_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    for spec in ("anthropic:claude-haiku-4-5", "anthropic-batch:claude-haiku-4-5"):
        with pytest.raises(UserError, match="set the environment variable ANTHROPIC_API_KEY"):
            examine(spec)


def test_an_unknown_price_asks_for_one(monkeypatch: pytest.MonkeyPatch, server: Running) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(UserError, match=r"no price is known.*--no-budget"):
        examine("openai:gpt-unheard-of")


def test_the_key_is_never_shown(server: Running, provider: str) -> None:
    # A server that repeats what it was sent.
    server.behave(answer="scripted", replies=[{"text": KEY, "stop": "refusal"}] * 20)
    diagnosis = examined(server, provider)
    assert check(diagnosis, "refusals").outcome == "lacking"
    assert KEY not in "\n".join(diagnosis.lines())


def test_the_command(server: Running, provider: str, tmp_path: Path) -> None:
    good(server)
    prices = tmp_path / "prices.toml"
    prices.write_text(f'["{provider}:m"]\ninput = 2.0\noutput = 3.0\n')
    wanted = ["doctor", "--live", spec_at(server, provider), "--max-usd", "0.05", "--prices", str(prices)]
    shown = CliRunner().invoke(app, wanted)
    assert shown.exit_code == 0 and "of 0.05 allowed, at 2 in and 3 out" in shown.output
    assert shown.output.splitlines()[1].startswith("ok       reachable: ")
    unlimited = CliRunner().invoke(app, [*wanted, "--no-budget"])
    assert unlimited.exit_code == 0 and "allowed" not in unlimited.output
    good(server, faults=[{"kind": "401"}])
    refused = CliRunner().invoke(app, wanted)
    assert refused.exit_code == 2 and "failed   reachable: " in refused.output


def test_the_command_without_a_key(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for variable in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("sys.argv", ["exegete", "doctor", "--live", "openai:gpt-4o-mini"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "OPENAI_API_KEY" in capsys.readouterr().err


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"needs the model in {STORIES}")
def test_a_local_model_scores_text_though_it_cannot_judge() -> None:
    diagnosis = examine(f"hf:{STORIES}")
    assert diagnosis.usable
    found = outcomes(diagnosis)
    assert found["given text"] == "ok" and found["structured output"] == "failed"
    assert "20 alternatives" in check(diagnosis, "log-probabilities").found
    assert "free on this machine" in check(diagnosis, "cost").found


def test_no_local_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no causal language model"):
        examine(f"hf:{tmp_path}")

"""Names of models, keys, prices and budgets."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from exegete.tools.errors import UserError
from exegete.tools.llm import (
    Budget,
    BudgetUsedUp,
    Limits,
    MemoryJournal,
    Message,
    Request,
    Spec,
    Usage,
    load_prices,
    open_client,
    parse_spec,
)
from exegete.tools.llm.faults import scrub
from exegete.tools.llm.prices import Price


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("openai:gpt-4o", Spec("openai", "gpt-4o")),
        ("anthropic:claude-haiku-4-5", Spec("anthropic", "claude-haiku-4-5")),
        ("openai:llama:8b@http://localhost:11434", Spec("openai", "llama:8b", "http://localhost:11434/v1")),
        (
            "openai:meta/llama@https://openrouter.ai/api/v1/",
            Spec("openai", "meta/llama", "https://openrouter.ai/api/v1"),
        ),
        ("anthropic:m@http://[::1]:80/v1", Spec("anthropic", "m", "http://[::1]:80")),
        ("openai:m?rate=0.1@http://h:1/v1", Spec("openai", "m?rate=0.1", "http://h:1/v1")),
        ("anthropic-batch:m", Spec("anthropic-batch", "m")),
        ("hf:/models/a@b", Spec("hf", "/models/a@b")),
    ],
)
def test_names(text: str, spec: Spec) -> None:
    assert parse_spec(text) == spec and parse_spec(spec.name) == spec


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("opnai:gpt-4o", "Did you mean 'openai'"),
        ("gpt-4o", "openai:MODEL"),
        ("openai:", "no model"),
        ("openai:m@localhost:8000", "http://"),
        ("openai:m@http://", "http://"),
        ("openai:m@http://h:99999/", "cannot be read"),
    ],
)
def test_names_that_are_none(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_spec(text)


@pytest.mark.parametrize("text", ["openai:m@http://me:hunter22@h/v1", "opnai:m@http://h/v1?key=hunter22"])
def test_passwords_in_urls_are_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_spec(text)
    assert "hunter22" not in str(raised.value)


@pytest.mark.parametrize(
    ("spec", "variable"),
    [
        ("openai:gpt-4o", "OPENAI_API_KEY"),
        ("anthropic:claude-haiku-4-5", "ANTHROPIC_API_KEY"),
        ("openai:m@https://openrouter.ai/api/v1", "OPENROUTER_API_KEY"),
    ],
)
def test_missing_key_names_its_variable(spec: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(variable, raising=False)
    for name in ("OPENAI_BASE_URL", "ANTHROPIC_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=variable):
        open_client(spec, journal=MemoryJournal())


def test_another_server_in_the_environment_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://proxy.example/v1")
    with pytest.raises(UserError, match="OPENAI_BASE_URL"):
        open_client("openai:gpt-4o", journal=MemoryJournal())
    assert parse_spec("openai:gpt-4o@https://proxy.example/v1").key() is None


def test_a_providers_key_goes_to_no_other_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    monkeypatch.delenv("EXEGETE_API_KEY", raising=False)
    assert parse_spec("openai:m@https://elsewhere.example/v1").key() is None


def test_what_looks_like_a_key_is_taken_out() -> None:
    text = "Incorrect API key provided: sk-proj-ab*****yz. Bearer topsecret\nand mykey123"
    assert scrub(text, "mykey123") == "Incorrect API key provided: [key] [key] and [key]"


def test_cost_by_hand() -> None:
    price = Price(input=3.0, cached=0.3, cache_write=3.75, output=15.0)
    usage = Usage(input_tokens=1_000, cached_input_tokens=600, cache_write_tokens=300, output_tokens=50)
    # 100 fresh, 600 read, 300 written, 50 out.
    assert price.usd(usage) == pytest.approx((100 * 3.0 + 600 * 0.3 + 300 * 3.75 + 50 * 15.0) / 1e6)
    assert price.usd(usage, batch=True) == pytest.approx(price.usd(usage) / 2)


def test_worst_case_is_above_one_token_per_byte() -> None:
    request = Request((Message("user", "ä" * 100),), max_tokens=10)
    price = Price(input=1.0, cache_write=1.25, output=10.0)
    assert price.worst_usd(request) > (200 * 1.25 + 10 * 10.0) / 1e6


def test_prices_hold_up_to_a_length() -> None:
    request = Request((Message("user", "x" * 5_000),))
    with pytest.raises(UserError, match="long prompts"):
        Price(input=1.0, output=1.0, max_input_tokens=4_000).worst_usd(request)


def test_own_prices_win(tmp_path: Path) -> None:
    file = tmp_path / "prices.toml"
    file.write_text('["openai:gpt-4o"]\ninput = 7\noutput = 8\n')
    prices = load_prices(file)
    for spec in ("openai:gpt-4o", "openai-batch:gpt-4o", "openai:gpt-4o@https://proxy.example/v1"):
        assert prices.require(parse_spec(spec)).input == 7
    assert prices.require(parse_spec("openai:gpt-4o-mini")).input == 0.15
    # The shipped price of a name holds at its own provider only; this machine is free.
    assert prices.find(parse_spec("openai:gpt-4o-mini@https://proxy.example/v1")) is None
    assert prices.require(parse_spec("openai:gpt-4o-mini@http://localhost:1/v1")).output == 0


def test_unknown_price_with_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with pytest.raises(UserError, match=r"--no-budget.*Did you mean 'openai:gpt-4o'"):
        open_client("openai:gpt-4oo", journal=MemoryJournal(), budget=Budget(1))


@pytest.mark.parametrize(
    "entry", ['["a"]\ninput = -1\noutput = 1', '["a"]\ninput = 1', "no toml", '["a"]\ninput = nan\noutput = 1']
)
def test_bad_price_tables(tmp_path: Path, entry: str) -> None:
    (tmp_path / "p.toml").write_text(entry)
    with pytest.raises(UserError, match=r"p\.toml"):
        load_prices(tmp_path / "p.toml")


@pytest.mark.parametrize("amount", [-1.0, float("nan"), float("inf")])
def test_bad_budgets(amount: float) -> None:
    with pytest.raises(UserError, match="budget"):
        Budget(amount)


@pytest.mark.parametrize("limits", [{"concurrency": 0}, {"total_s": -1}, {"requests_per_minute": float("nan")}])
def test_bad_limits(limits: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(limits))):
        Limits(**limits)  # type: ignore[arg-type]


def test_a_call_waits_for_reservations_and_is_refused_only_by_what_is_spent() -> None:
    async def spend() -> None:
        budget = Budget(1.0)
        await budget.reserve(0.8)
        second = asyncio.create_task(budget.reserve(0.5))
        await asyncio.sleep(0)
        assert not second.done()
        budget.settle(0.8, 0.1)
        await second
        budget.settle(0.5, 0.5)
        with pytest.raises(BudgetUsedUp):
            await budget.reserve(0.41)
        # From then on nothing new, not even what would fit.
        with pytest.raises(BudgetUsedUp):
            await budget.reserve(0.1)
        assert budget.spent_usd == pytest.approx(0.6)

    asyncio.run(spend())

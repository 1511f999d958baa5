"""Limits of whole runs: budgets that hold to the last call, and what the models of one server share."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from budgeted import budgeted
from disturbed import account_usd, bench_of, rows
from language_model_server import Running, serving
from planted_store import planted_file, planted_store
from scripted_wire import SPEC, scripted

import exegete
from exegete.agent.cli import main
from exegete.agent.config import ModelsConfig
from exegete.agent.models import Models, budget_of
from exegete.tools.errors import UserError
from exegete.tools.llm import MemoryJournal

SEEDS = (5, 2, 7)


def test_models_of_one_server_share_an_allowance() -> None:
    models = Models(ModelsConfig(requests_per_minute=60), MemoryJournal, None)
    here, there = "http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1"

    def allowance(spec: str) -> object:
        client = models.client(spec)._client  # type: ignore[attr-defined]
        return client.pacer._allowance

    first = allowance(f"openai:a@{here}")
    assert allowance(f"openai:b@{here}") is first
    assert allowance(f"openai:a@{there}") is not first
    assert allowance(f"anthropic:a@{here}") is not first


def test_budgets_of_a_configuration() -> None:
    both = budget_of(ModelsConfig(budget_usd=2.0, budget_tokens=500))
    assert both is not None and (both.max_usd, both.max_tokens) == (2.0, 500)
    tokens = budget_of(ModelsConfig(budget_usd=2.0, no_budget=True, budget_tokens=500))
    assert tokens is not None and (tokens.max_usd, tokens.max_tokens) == (float("inf"), 500)
    assert budget_of(ModelsConfig(budget_usd=2.0, no_budget=True)) is None


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    return planted_store(planted_file(folder, 24, 4), folder / "store")


# Cheap enough to finish with the larger budget; too dear for it; interrupted before the budget is used up.
@pytest.mark.parametrize("seed", SEEDS)
def test_a_whole_run_keeps_to_its_budget_and_goes_on_with_a_larger_one(
    seed: int, template: Path, tmp_path: Path
) -> None:
    found = budgeted(seed, template, tmp_path)
    assert found.complaints(1.0) == []
    # The budget had ended it, and by as much as it was raised more was asked.
    assert found.exits[-2] == 2 and found.usd[-1] > found.usd[-2]
    assert found.interrupted is (seed == SEEDS[-1])


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving() as running:
        yield running


@pytest.mark.parametrize("provider", ["openai", "anthropic", "openai-batch"])
def test_a_whole_run_over_http_keeps_to_its_budget(
    provider: str, server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXEGETE_API_KEY", "test-key")
    server.reset()
    bench = bench_of(server, tmp_path, 24, provider, windows_per_split=4)
    lost = {"kind": "cut_body", "share": 0.05, "once": True}
    server.behave("judge", answer="oracle", otherwise="never", swell=3.0, faults=[lost])
    quick = {"models.attempts": 3, "models.batch_linger_s": 0.3, "models.batch_poll_s": 0.2, "models.concurrency": 16}
    store, share = bench.store("store"), 0.5 if provider.endswith("batch") else 1.0
    with pytest.raises(UserError, match=r"budget of 0\.5 USD"):
        bench.label(store, **quick, **{"models.budget_usd": 0.5})
    first = server.counts()
    assert 0.1 < share * account_usd(server) <= 0.5 + 1e-9
    # Of what is left the rest is paid: nothing that was answered is asked again, and the account still holds.
    outcome = bench.label(store, **quick, **{"models.budget_usd": 5.0})
    whole = server.counts()
    assert outcome.finished and whole["asked_again"] == 0 and whole["tokens"] > first["tokens"]
    ((usd, worst_usd),) = rows(store, "SELECT sum(usd), sum(unknown_worst_usd) FROM costs")
    assert usd - 1e-9 <= share * account_usd(server) <= usd + worst_usd + 1e-9 <= 5.0


def told(*command: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["exegete", *command])
        try:
            main()
        except SystemExit as error:
            return int(error.code or 0)
    return 0


def labeled(store: Path) -> int:
    with exegete.connect(store) as connection:
        ((count,),) = connection.execute("SELECT count(outcome) FROM latents").fetchall()
    return int(count)


@pytest.fixture
def label(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the command that labels a fresh store with a scripted model that costs something."""
    scripted(monkeypatch)
    shutil.copytree(template, tmp_path / "store")
    (tmp_path / "prices.toml").write_text(f'["{SPEC}"]\ninput = 1.0\noutput = 1.0\n')
    settings = ["--set", f"models.prices='{tmp_path / 'prices.toml'}'", "--set", "label.floors=2"]
    return ["label", "--store", str(tmp_path / "store"), "--model", SPEC, "--budget", "5", *settings]


def test_a_run_ends_at_its_hour_and_goes_on_with_more(label: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    store = Path(label[2])
    assert told(*label, "--hours", "1e-9") == 130
    said = capsys.readouterr()
    assert "stopped by label.hours = 1e-09" in said.err and f"exegete resume --store {store}" in said.err
    assert said.out.endswith(f"\nGo on: exegete resume --store {store}\n")
    assert labeled(store) < 24
    # The same hours once more would be over as soon.
    assert told("resume", "--store", str(store), "--hours", "10") == 0 and labeled(store) == 24


def test_without_a_terminal_much_is_not_begun_without_yes(label: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    store = Path(label[2])
    much = [*label, "--set", "models.confirm_usd=0.001"]
    assert told(*much) == 2
    said = capsys.readouterr().err
    assert re.search(r"this may take 0\.\d+ USD \(models\.confirm_usd = 0\.001\).*--yes", said) and labeled(store) == 0
    assert told(*much, "--yes") == 0 and labeled(store) == 24

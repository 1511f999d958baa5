"""Whole runs whose answers are spoiled, and runs that are refused: no score of what was not said, nothing paid twice."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from disturbed import Bench, bench_of, check_account, check_rows, rows, struck, undisturbed
from language_model_server import Running, serving
from planted_store import tables

from exegete.agent.cli import main
from exegete.agent.inspection import status_lines
from exegete.agent.models import Halted

pytestmark = pytest.mark.slow
LATENTS, FEW = 100, 16

VERDICTS = {
    "truncated_json": "unparsed", "wrong_length": "wrong_length", "prose": "ok", "not_json": "unparsed",
    "refusal": "refused", "empty": "empty", "content_filter": "filtered", "max_tokens": "truncated",
}  # fmt: skip
"""Spoiled answer → status of its verdicts."""
EXPLANATIONS = {**VERDICTS, "wrong_length": "unparsed"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving() as running:
        yield running


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXEGETE_API_KEY", "test-key")


def spoiled(bench: Bench, kinds: list[str], share: float, latents: int) -> None:
    """Label with answers that are spoiled, look at what is stored, and have nothing asked again when they are not."""
    bench.server.reset_log()
    bench.behave(*({"kind": kind, "share": share} for kind in kinds))
    store = bench.store("spoiled")
    outcome = bench.label(store)
    assert outcome.finished and not any(outcome.missing.values())
    assert struck(bench.server.log()).keys() == {*kinds}
    check_rows(store, latents)
    check_account(bench, store)
    statuses = {status for (status,) in rows(store, "SELECT DISTINCT status FROM verdicts")}
    assert statuses == {"ok", *(VERDICTS[kind] for kind in kinds)}
    reasons = rows(store, "SELECT DISTINCT split_part(detail, ': ', 2) FROM latents WHERE outcome = 'no_explanation'")
    assert {status for (status,) in reasons} == {EXPLANATIONS[kind] for kind in kinds} - {"ok"}

    before, asked = tables(store), bench.server.counts()["requests"]
    bench.behave()
    assert bench.label(store).finished
    assert bench.server.counts()["requests"] == asked and tables(store) == before


def test_spoiled_answers_are_rows_and_final(server: Running, tmp_path: Path) -> None:
    spoiled(bench_of(server, tmp_path, LATENTS), list(VERDICTS), 0.08, LATENTS)


def test_spoiled_answers_through_the_other_sdk(server: Running, tmp_path: Path) -> None:
    # What Anthropic's filter stops is a refusal.
    kinds = [kind for kind in VERDICTS if kind != "content_filter"]
    spoiled(bench_of(server, tmp_path, FEW, "anthropic"), kinds, 0.2, FEW)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["exegete", *arguments])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.mark.parametrize(
    ("provider", "kind", "after", "named"),
    [
        ("openai", "401", 30, "EXEGETE_API_KEY"),
        ("openai", "quota", 70, "payment or quota"),
        ("anthropic", "401", 50, "EXEGETE_API_KEY"),
    ],
)
def test_a_refusal_in_the_middle_is_one_line_and_loses_nothing(
    provider: str,
    kind: str,
    after: int,
    named: str,
    server: Running,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bench = bench_of(server, tmp_path, FEW, provider)
    should = undisturbed(bench)
    server.reset_log()
    bench.behave({"kind": kind, "after": after})
    store = bench.store("store")
    settings = [f"--set={name}={value}" for name, value in bench.settings(**{"label.batch": 2}).items()]
    capsys.readouterr()
    assert command(monkeypatch, "label", "--store", str(store), *settings) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("exegete: ")]
    assert len(said) == 1 and named in said[0]
    assert rows(store, "SELECT status FROM runs") == [("interrupted",)]
    assert rows(store, "SELECT count(*) FROM calls WHERE status = 'ok'") == [(server.counts()["answered"],)]

    bench.behave()
    assert command(monkeypatch, "resume", "--store", str(store)) == 0
    assert server.counts()["asked_again"] == 0 and tables(store) == should.tables
    answered = [entry["question"] for entry in server.log() if entry["answered"]]
    assert sorted(answered) == sorted(should.questions)
    check_account(bench, store)


def test_missing_calls_have_an_exit_status_of_their_own(
    server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = bench_of(server, tmp_path, FEW)
    bench.behave({"kind": "500", "share": 0.1})
    store = bench.store("store")
    settings = [f"--set={name}={value}" for name, value in bench.settings().items()]
    assert command(monkeypatch, "label", "--store", str(store), *settings) == 3
    assert f"exegete resume --store {store}" in capsys.readouterr().out
    bench.behave()
    assert command(monkeypatch, "resume", "--store", str(store)) == 0


def test_a_choice_among_fewer_candidates_than_asked_for_is_made_again(server: Running, tmp_path: Path) -> None:
    options: dict[str, Any] = {"label.explainer": "best-of", "label.explainer_options.candidates": 3}
    options["label.explainer_options.max_tokens"] = None  # It leaves that to the explainer that it chooses from.
    bench = bench_of(server, tmp_path, FEW, windows_per_split=12)
    should = undisturbed(bench, **options)
    server.reset_log()
    bench.behave({"kind": "500", "share": 0.15})
    store = bench.store("store")
    assert sum(bench.label(store, **options).missing.values()) > 0
    failed = rows(store, "SELECT sum((parameters->>'failed')::INT) FROM explanations")
    assert failed[0][0] > 0
    bench.behave()
    assert bench.label(store, **options).finished
    assert server.counts()["asked_again"] == 0
    assert tables(store) == should.tables


def test_a_pilot_that_missed_calls_is_made_again_once_they_are_answered(server: Running, tmp_path: Path) -> None:
    bench = bench_of(server, tmp_path, FEW)
    should = undisturbed(bench)
    server.reset_log()
    # The server comes round while the pilot goes on, so that labeling misses nothing.
    bench.behave({"kind": "500", "first": 5})
    store = bench.store("store")
    outcome = bench.label(store)
    assert server.counts()["by_fault"] == {"500": 5}
    assert outcome.finished and not any(outcome.missing.values())
    assert tables(store) == should.tables


def test_a_run_that_is_resumed_in_vain_keeps_what_it_has(server: Running, tmp_path: Path) -> None:
    bench = bench_of(server, tmp_path, FEW)
    store = bench.store("store")
    bench.behave({"kind": "500", "share": 0.1})
    missing = sum(bench.label(store).missing.values())
    before, line = tables(store), f"  {missing} latents miss calls that failed; `exegete resume` asks them again"
    assert missing and line in status_lines(store)
    bench.behave({"kind": "401"})
    with pytest.raises(Halted):
        bench.label(store)
    assert tables(store) == before and line in status_lines(store)
    bench.behave()
    bench.label(store)
    assert not any("miss calls" in line for line in status_lines(store))

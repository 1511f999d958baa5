"""A whole run with a language model, watched from its beginning to its end on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from disturbed import Bench, bench_of, rows
from language_model_server import serving

from exegete.agent.cli import main
from exegete.agent.events import read_events
from exegete.agent.inspection import store_status

LATENTS = 8


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with serving() as server:
        yield bench_of(server, tmp_path_factory.mktemp("watched"), LATENTS)


@pytest.fixture(autouse=True)
def fresh(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXEGETE_API_KEY", "sk-secret-key")
    bench.server.reset()
    bench.behave()


def exegete(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    """Run the command line and return its exit status; an error that a user can mend has status 2."""
    monkeypatch.setattr("sys.argv", ["exegete", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def options(bench: Bench, store: Path, **more: object) -> list[str]:
    settings = bench.settings(store=str(store), **more)
    return [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]


def test_a_run_that_stops_at_its_budget_says_what_it_needs_and_goes_on(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store, told = bench.store("budget"), tmp_path / "told"
    finish = ["--on-finish", f'echo "$EXEGETE_STATUS $EXEGETE_EXIT $EXEGETE_SUMMARY" >> "{told}"']
    small = options(bench, store, **{"models.budget_usd": 0.05, "label.concurrency": 2})
    assert exegete(monkeypatch, "label", *small, *finish) == 2
    assert told.read_text() == f"halted 2 {store}/summary.json\n"
    need = store_status(store).need
    assert need.state == "budget" and need.told.startswith("stopped at its budget of 0.05 USD, of which 0.0")
    assert need.command == f"exegete resume --store {store} --budget 0.1"
    assert need.line() in (store / "report.md").read_text()
    assert json.loads((store / "summary.json").read_text())["need"]["state"] == "budget"

    capsys.readouterr()
    assert exegete(monkeypatch, "resume", "--store", str(store), "--budget", "100", "--quiet", *finish) == 0
    said = capsys.readouterr()
    assert f"labeling: {LATENTS} of" not in said.err and "\ntime: pilot" in said.out
    assert f"\n{bench.model.removeprefix('openai:')}: " in said.out
    assert told.read_text().splitlines()[1] == f"finished 0 {store}/summary.json"
    assert store_status(store).need.state == "finished"

    events = list(read_events(store))
    names = [event.event for event in events]
    assert names[0] == "begun" and names.count("begun") == 2 and names[-1] == "finished"
    assert [event.fields["reason"] for event in events if event.event == "halted"] == ["budget"]
    ends = [event.fields["vitals"] for event in events if event.event == "progress"]
    last = ends[-1]
    assert last["calls"]["in_flight"] == 0 and last["calls"]["cached"] > 0
    [(answered, usd)] = rows(store, "SELECT sum(answered), sum(usd) FROM costs")
    paid = [vitals["calls"] for vitals in (ends[names[: names.index("halted")].count("progress") - 1], last)]
    assert sum(calls["ok"] for calls in paid) == answered
    assert sum(calls["usd"] for calls in paid) == pytest.approx(usd)
    assert last["budget"]["spent_usd"] == pytest.approx(usd) and last["budget"]["in_flight_usd"] == 0
    scores = last["scores"]["detection"]
    assert scores["own"]["n"] <= LATENTS and scores["floors"]["shuffled"]["n"] == 4
    log = (store / "events.jsonl").read_text()
    assert "sk-secret-key" not in log and "Word" not in log and "<<" not in log


def test_a_store_from_elsewhere_cannot_run_a_command(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import duckdb

    store, ran = bench.store("elsewhere"), tmp_path / "ran"
    assert exegete(monkeypatch, "label", *options(bench, store)) == 0
    with duckdb.connect(str(store / "labels.duckdb")) as connection:
        [(settings,)] = connection.execute("SELECT settings FROM data.settings").fetchall()
        brought = json.dumps({**json.loads(settings), "on_finish": f"touch {ran}"})
        connection.execute("UPDATE data.settings SET settings = ?", [brought])
    capsys.readouterr()
    assert exegete(monkeypatch, "resume", "--store", str(store)) == 2
    assert "unknown key 'on_finish'" in capsys.readouterr().err and not ran.exists()

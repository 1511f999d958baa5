"""The end of a run: `--on-finish`, the summary it is given, and the final report."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pytest
import typer

from exegete.agent.config import RunConfig, dotted_keys, restored_config
from exegete.agent.events import Event
from exegete.agent.final_report import final_report, model_costs, stage_seconds
from exegete.agent.finishing import finishing, run_command
from exegete.agent.models import Halted
from exegete.agent.progress import Lines
from exegete.agent.watching import watched
from exegete.tools.errors import UserError

StoreMaker = Callable[..., str]
TELL = 'echo "$EXEGETE_STATUS $EXEGETE_EXIT $EXEGETE_STORE" > "{}"; cp "$EXEGETE_SUMMARY" "{}.json"'


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (None, "finished 0"),
        (typer.Exit(0), "finished 0"),
        (typer.Exit(3), "calls_missing 3"),
        (typer.Exit(130), "interrupted 130"),
        (KeyboardInterrupt(), "interrupted 130"),
        (Halted("budget of 5 USD"), "halted 2"),
        (UserError("no such thing"), "halted 2"),
        (OSError(28, "No space left on device"), "halted 2"),
        (RuntimeError("a bug"), "failed 1"),
        (BrokenPipeError(), "failed 141"),
    ],
)
def test_the_command_is_told_how_the_run_ended(
    make_store: StoreMaker, tmp_path: Path, error: BaseException | None, told: str
) -> None:
    make_store()
    store, said = tmp_path / "store", list[str]()
    command = TELL.format(tmp_path / "told", tmp_path / "told")

    def run() -> None:
        with finishing(command, store, said.append):
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(type(error)) as raised:
            run()
        assert raised.value is error
    assert (tmp_path / "told").read_text() == f"{told} {store}\n" and not said
    summary = json.loads((tmp_path / "told.json").read_text())
    assert f"{summary['status']} {summary['exit']}" == told
    detection = summary["runs"][0]["figures"]["evaluators"]["detection"]
    assert detection["balanced_accuracy"]["n"] == 9 and detection["floors"]["shuffled"]["balanced_accuracy"]["n"] == 5


def test_a_command_that_fails_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    run_command("echo all lost; exit 7", tmp_path, "finished", 0, said.append)
    assert said[-1] == "--on-finish 'echo all lost; exit 7' ended with status 7"
    out, err = capfd.readouterr()
    assert "all lost" in err and "all lost" not in out  # Standard output is for results.


def test_a_command_that_hangs_is_killed_with_what_it_started(tmp_path: Path) -> None:
    said: list[str] = []
    command = f'sleep 600 & echo $! > "{tmp_path}/child"; wait'
    run_command(command, tmp_path, "finished", 0, said.append, timeout_s=1.0)
    assert said[-1].endswith("took longer than 1 s and was killed")
    child = int((tmp_path / "child").read_text())
    # The signal is sent; a busy machine takes its time to deliver it.
    end = time.monotonic() + 30
    while not (gone := _gone(child)) and time.monotonic() < end:
        time.sleep(0.05)
    assert gone


def _gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_without_a_store_there_is_no_summary(tmp_path: Path) -> None:
    said: list[str] = []
    run_command(f'echo "[$EXEGETE_SUMMARY]" > "{tmp_path}/told"', tmp_path / "none", "halted", 2, said.append)
    assert (tmp_path / "told").read_text() == "[]\n" and "no summary" in said[0]


def test_a_summary_that_cannot_be_written_does_not_keep_the_command(
    make_store: StoreMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    said: list[str] = []
    run_command(f'echo "[$EXEGETE_SUMMARY]" > "{tmp_path}/told"', tmp_path / "store", "halted", 2, said.append)
    assert (tmp_path / "told").read_text() == "[]\n" and "No space left" in said[0]
    assert not list((tmp_path / "store").glob(".*.writing"))


def test_no_stored_setting_can_bring_a_command(tmp_path: Path) -> None:
    assert not any("finish" in key or "command" in key for key in dotted_keys())
    for key in ("on_finish", "on-finish", "command"):
        bringing: dict[str, Any] = {key: f"touch {tmp_path}/ran"}
        for stored in (bringing, {"label": bringing}, {"models": bringing}):
            with pytest.raises(UserError, match="unknown key"):
                restored_config(stored, {})
    assert RunConfig.model_config["extra"] == "forbid" and not (tmp_path / "ran").exists()


def at(second: float, event: str, run: str | None = None, **fields: Any) -> Event:
    return Event(datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=second), run, event, fields)


def test_the_time_of_stages_is_summed_over_processes_and_kills() -> None:
    events = [
        at(0, "begun"),
        at(1, "stage_begun", stage="activations"),
        at(11, "stage_ended", stage="activations", seconds=10.0),
        at(11, "stage_begun", "r", stage="labeling"),
        at(41, "progress", "r"),  # The last sign of life before a kill.
        at(1_000, "begun"),
        at(1_001, "stage_begun", "other", stage="labeling"),
        at(1_004, "stage_ended", "other", stage="labeling", seconds=3.0),
        at(1_010, "stage_begun", "r", stage="labeling"),
        at(1_015, "stage_ended", "r", stage="labeling", seconds=5.0),
        at(1_016, "stage_begun", "r", stage="floors"),
        at(1_018, "progress", "r"),
    ]
    assert stage_seconds(events, ["r"]) == {"activations": 10.0, "labeling": 35.0, "floors": 2.0}
    assert stage_seconds(events)["labeling"] == 38.0
    assert stage_seconds([]) == {}


def test_what_each_model_cost_is_summed_over_runs() -> None:
    with duckdb.connect() as connection:
        connection.execute(
            """CREATE TABLE costs AS SELECT * FROM (VALUES
            ('r', 'openai:cheap', 10, 1, 2, 100, 20, 0.5), ('s', 'openai:cheap', 5, 0, 0, 50, 10, 0.25),
            ('r', 'openai:dear', 1, 0, 0, 9, 3, 2.0), ('t', 'openai:dear', 9, 9, 9, 9, 9, 9.0), ('s', NULL, 0, 0, 0, 0, 0, 0.0)
            ) t(run, model, answered, failed, unknown, input_tokens, output_tokens, usd)"""
        )
        dear, cheap = model_costs(connection, ["r", "s"])
    assert (dear.model, dear.answered, dear.usd) == ("openai:dear", 1, 2.0)
    assert (cheap.answered, cheap.failed, cheap.input_tokens, cheap.output_tokens, cheap.usd) == (15, 3, 150, 30, 0.75)


def run_of(store: Path) -> str:
    from exegete.tools.store import connect

    with connect(store) as connection:
        return str(connection.execute("SELECT run FROM runs").fetchall()[0][0])


def test_a_run_leaves_a_report(make_store: StoreMaker, tmp_path: Path) -> None:
    make_store(name="<b>toy</b>")
    store, said = tmp_path / "store", list[str]()
    config = RunConfig()
    with (
        pytest.raises(Halted),
        finishing(None, store, said.append),
        watched(store, Lines(io.StringIO()), every_s=3_600) as watch,
    ):
        watch.run_begun(run_of(store), "sha256:d", 12, config, {})
        with watch.stage("labeling", 12, "latents") as advance:
            advance(12)
        raise Halted("openai:m: no such model or address: x")
    text = (store / "report.md").read_text()
    assert not said and text == final_report(store)
    assert "state: halted: a server does not know the model" in text
    assert f"go on: exegete resume --store {store}" in text
    assert "    12 of 12 latents recorded (100%): 1 dead, 1 dense, 9 labeled, 1 rare" in text
    assert "    detection: mean balanced accuracy 0.683 [0.628, 0.739] (n = 9)" in text
    assert "    time: labeling 0 seconds" in text


def test_a_run_that_never_began_leaves_no_report(make_store: StoreMaker, tmp_path: Path) -> None:
    make_store()
    store = tmp_path / "store"
    before = sorted(path.name for path in store.iterdir())
    with pytest.raises(UserError), finishing(None, store, pytest.fail):
        raise UserError("process 7 is writing to the store")
    (tmp_path / "file").write_text("")
    for folder in (store, tmp_path / "none", tmp_path / "file"):
        with finishing(None, folder, lambda line: None):
            pass
    assert sorted(path.name for path in store.iterdir()) == before


def test_how_the_run_ended_is_not_masked_by_a_report_that_fails(
    make_store: StoreMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store()
    store, said = tmp_path / "store", list[str]()

    def broken(store: Path) -> str:
        raise ZeroDivisionError("in the report")

    monkeypatch.setattr("exegete.agent.final_report.final_report", broken)
    with pytest.raises(KeyError), finishing(None, store, said.append), watched(store, Lines(io.StringIO())):
        raise KeyError("the run")
    assert said == ["no report of the run could be written: in the report"] and os.path.exists(store / "events.jsonl")

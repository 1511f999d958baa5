"""Doing an experiment again: the same comes out the same, and what is another subject, dictionary or figure is said."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_clients import FakeClient
from investigation_records import investigation
from typer.testing import CliRunner

from exegete.agent import rerun_cli
from exegete.agent.investigation.bench import Bench
from exegete.agent.investigation.contract import Call, Case, Headline, Metric, Prediction
from exegete.agent.investigation.language_models import LanguageModels
from exegete.agent.investigation.record import ExperimentRecord, InvestigationRecord, write_record
from exegete.agent.investigation.rerun import Named, compare, find, rerun, rerun_named
from exegete.agent.investigation.toolbelt import Toolbelt
from exegete.agent.live import Live
from exegete.tools.bundled import sample_texts
from exegete.tools.dictionaries import Dictionary
from exegete.tools.errors import UserError
from exegete.tools.live_model import LiveModel
from exegete.tools.subject import Subject

CALLS = {
    "E1": ("ablate", {"latents": [3, 7]}),
    "E2": ("steer", {"latents": [3]}),
    "E3": ("ablate", {"latents": [10**6]}),
}


@pytest.fixture(scope="module")
def bench(subject: Subject, dictionary: Dictionary, cases: tuple[Case, ...]) -> Bench:
    """Few prompts, texts and controls."""
    live = Live(LiveModel(subject, [dictionary]), dictionary, None)
    return Bench(live, cases[:6], Metric("log_odds"), seed=5, texts=tuple(sample_texts(77, 20)), controls=4)


@pytest.fixture(scope="module")
def record(bench: Bench) -> InvestigationRecord:
    """An investigation of three experiments, one of which names no latent of the dictionary."""
    made = []
    for id, (tool, arguments) in CALLS.items():
        given = {"hypothesis": "H1", "because": "b", "low": -100.0, **arguments}
        result = Toolbelt(bench).run(Call(f"call {id}", tool, given))
        made.append(
            ExperimentRecord(
                id,
                tool,
                # With the prediction, as the ledger has it, or without.
                given if id == "E1" else arguments,
                Prediction("H1", "b", -100.0),
                "2026-11-21T20:00:10+00:00",
                "2026-11-21T20:00:12+00:00",
                result.status,
                result.outcome.headline,
            )
        )
    return investigation(
        origin=bench.live.origin,
        cases=bench.cases,
        metric=bench.metric,
        seed=bench.seed,
        texts=bench.texts,
        controls=bench.controls,
        experiments=tuple(made),
        opened={"subject": "bundled", "dictionary": "bundled:tests"},
    )


def changed(record: InvestigationRecord, **headline: Any) -> InvestigationRecord:
    """Return the record with another headline of its first experiment."""
    first = record.experiments[0]
    assert first.headline is not None
    other = replace(first, headline=replace(first.headline, **headline))
    return replace(record, experiments=(other, *record.experiments[1:]))


def test_the_same_comes_out_the_same_whatever_the_batches(record: InvestigationRecord, bench: Bench) -> None:
    smaller = LiveModel(bench.live.model.subject, [bench.live.dictionary], batch_tokens=128)
    for live in (bench.live, replace(bench.live, model=smaller)):
        done = rerun(record, "E1", live)
        assert done.agrees and [one.name for one in done.compared] == [
            *("value", "low", "high", "control value", "control low", "control high", "n", "control n")
        ]
    headline = record.experiments[0].headline
    assert headline is not None and headline.value is not None and done.compared[0].stored == headline.value
    assert rerun(record, "E2", bench.live).agrees
    assert "the same within rounding" in done.findings().render("table")


def test_another_figure_is_said(record: InvestigationRecord, bench: Bench) -> None:
    headline = record.experiments[0].headline
    assert headline is not None and headline.value is not None
    done = rerun(changed(record, value=headline.value + 0.5), "E1", bench.live)
    assert not done.agrees and [one.name for one in done.compared if not one.agrees] == ["value"]
    assert "NOT the same" in done.findings().render("table") and "DIFFERS" in done.findings().render("table")
    assert not rerun(changed(record, n=99), "E1", bench.live).agrees
    assert not rerun(changed(record, name="another figure"), "E1", bench.live).agrees
    assert not rerun(replace(record, seed=6), "E1", bench.live).agrees  # Other random latents.


def test_an_experiment_that_could_not_be_done_still_cannot(record: InvestigationRecord, bench: Bench) -> None:
    done = rerun(record, "E3", bench.live)
    assert done.result.status == record.experiments[2].status == "error" and done.agrees and done.compared == ()
    assert "there is no latent 1000000" in done.findings().render("table")
    mended = replace(record.experiments[2], arguments={"latents": [3]})
    assert not rerun(replace(record, experiments=(mended,)), "E3", bench.live).agrees


def test_another_subject_or_dictionary_is_refused(record: InvestigationRecord, bench: Bench) -> None:
    for key, what in (("fingerprint", "dictionary"), ("subject_fingerprint", "subject")):
        other = replace(record, origin={**record.origin, key: "sha256:0123456789abcdef"})
        with pytest.raises(UserError, match=f"was of {what} .*--subject, --dictionary"):
            rerun(other, "E1", bench.live)


def test_what_never_ended_or_was_refused_is_not_done_again(record: InvestigationRecord, bench: Bench) -> None:
    first = record.experiments[0]
    for other, why in (
        (replace(first, status="begun"), "never ended"),
        (replace(first, status="refused"), "was refused"),
    ):
        with pytest.raises(UserError, match=why):
            rerun(replace(record, experiments=(other,)), "E1", bench.live)
    with pytest.raises(UserError, match="has no metric"):
        rerun(replace(record, metric=None), "E1", bench.live)
    with pytest.raises(UserError, match="no experiment 'E7'"):
        rerun(record, "E7", bench.live)


def test_a_judged_experiment_is_done_again_with_the_judge_of_its_journal(
    record: InvestigationRecord, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = FakeClient(lambda text, _: {"meets": " DESC" in text})
    metric = Metric("judged", criterion="It sorts.", tokens=2, samples=1)
    own = replace(bench, cases=bench.cases[:4], metric=metric, judge=judge, controls=2)
    arguments = {"hypothesis": "H1", "because": "b", "high": 1.0, "latents": [3, 7]}
    found = Toolbelt(own).run(Call("c", "ablate", arguments))
    assert found.status == "ok" and found.outcome.headline is not None
    one = replace(record.experiments[0], arguments=arguments, status="ok", headline=found.outcome.headline)
    judged = replace(
        record, cases=own.cases, metric=metric, controls=2, experiments=(one,), judge="openai:m@http://127.0.0.1:9/v1"
    )
    opened: list[Any] = []

    @asynccontextmanager
    async def language_models(*given: Any) -> AsyncIterator[LanguageModels]:
        opened.append(given)
        yield LanguageModels(judge=judge)

    monkeypatch.setattr("exegete.agent.investigation.language_models.language_models", language_models)
    done = rerun_named(Named(judged, "E1", tmp_path), bench.live)
    assert done.agrees and done.compared
    [(folder, run, _, spec, _)] = opened
    assert (folder, run, spec) == (tmp_path, record.id, "openai:m@http://127.0.0.1:9/v1")
    without = rerun(judged, "E1", bench.live)
    assert not without.agrees and "needs a language model that judges" in without.result.outcome.text


def test_rounding_is_a_share_of_the_largest_figure() -> None:
    before = Headline("change", -2.0, -3.0, -1.0, 6, "random", 0.0, -0.1, 0.1, 20)
    compared, rounding = compare(before, replace(before, value=-2.0029, control_value=0.0029))
    assert rounding == pytest.approx(0.003) and all(one.agrees for one in compared)
    compared, _ = compare(before, replace(before, value=-2.0031))
    assert [one.name for one in compared if not one.agrees] == ["value"]
    assert compare(before, before, "bfloat16")[1] == pytest.approx(3 * 4 / 128)
    small = Headline("interaction", 2e-6, -2e-6, 6e-6, 6)
    assert all(one.agrees for one in compare(small, replace(small, value=-5e-5))[0])
    assert compare(small, small, "bfloat16")[1] == pytest.approx(4 / 128)
    compared, _ = compare(before, None)
    assert compared and not any(one.agrees for one in compared)
    compared, _ = compare(None, before)
    assert compared and not any(one.agrees for one in compared)
    assert compare(None, None)[0] == ()
    compared, _ = compare(replace(before, control_value=None), before)
    assert [one.name for one in compared if not one.agrees] == ["control value"]


def test_an_experiment_is_named_by_store_and_id_or_by_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "investigations" / "i-0001"
    folder.mkdir(parents=True)
    write_record(investigation(), folder)
    monkeypatch.chdir(tmp_path)
    assert find("i-0001/E2", tmp_path) == find(f"{folder}/E2", None) == Named(investigation(), "E2", folder)
    folder.parent.rename(tmp_path / "moved")
    (tmp_path / "out").mkdir()
    (tmp_path / "moved").rename(tmp_path / "out" / "investigations")
    assert find("i-0001/E2", None).folder == Path("out/investigations/i-0001")
    for named, message in (
        ("E2", "expected INVESTIGATION/E3"),
        ("i-0001/", "expected INVESTIGATION/E3"),
        ("i-0002/E2", "cannot read"),
        ("i-0001/E9", "no experiment 'E9'"),
    ):
        with pytest.raises(UserError, match=message):
            find(named, None)


def test_the_command_opens_what_was_open_and_exits_with_1_where_a_figure_differs(
    record: InvestigationRecord, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []

    def open_live(wanted: Any) -> Live:
        opened.append(wanted)
        return bench.live

    monkeypatch.setattr("exegete.agent.live.open_live", open_live)
    folder = tmp_path / "investigations" / record.id
    folder.mkdir(parents=True)
    write_record(record, folder)
    done = CliRunner().invoke(rerun_cli.app, [f"{record.id}/E1", "--store", str(tmp_path), "--format", "json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["agrees"] is True
    write_record(changed(record, value=12.0), folder)
    done = CliRunner().invoke(rerun_cli.app, [f"{folder}/E1", "--device", "cpu"])
    assert done.exit_code == 1 and "DIFFERS" in done.output
    assert [(one.subject, one.dictionary, one.device, one.store) for one in opened] == [
        ("bundled", "bundled:tests", None, None),
        ("bundled", "bundled:tests", "cpu", None),
    ]


def test_what_is_named_now_takes_the_place_of_what_was_open(tmp_path: Path) -> None:
    record = replace(
        investigation(
            opened={"config": "a.toml", "device": "cuda", "batch_tokens": 512, "store": "elsewhere", "older": 1}
        ),
        origin={**investigation().origin, "store": "elsewhere"},
    )
    nothing: dict[str, Any] = dict.fromkeys(("config", "subject", "dictionary", "device", "dtype"))
    same = rerun_cli.wanted(record, tmp_path, nothing)
    assert (same.config, same.device, same.batch_tokens, same.store) == (Path("a.toml"), "cuda", 512, tmp_path)
    other = rerun_cli.wanted(record, None, nothing | {"subject": "s", "dictionary": "d", "device": "cpu"})
    assert (other.config, other.subject, other.dictionary, other.device) == (None, "s", "d", "cpu")
    assert other.store == Path("elsewhere")
    assert rerun_cli.wanted(investigation(), tmp_path, nothing).store is None  # It had none.

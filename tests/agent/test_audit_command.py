"""`exegete audit`: the bank, the command, a language model as judge, latents planted in the subject."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from language_model_server import Running, serving
from typer.testing import CliRunner

from exegete.agent import audit_live, auditing
from exegete.agent.audit_bank import truths
from exegete.agent.audit_instruments import opened
from exegete.agent.audit_shown import as_json, findings, write_plot
from exegete.agent.audit_tasks import Instruments, Wanted
from exegete.agent.auditing import AuditReport, plant, run_audit, text_cases
from exegete.agent.cli import app
from exegete.evaluators import make_judge
from exegete.evaluators.audit_truths import CORRUPTIONS
from exegete.tools.errors import UserError
from exegete.tools.llm import Budget, MemoryJournal, load_prices, open_client
from exegete.tools.predicates import parse

QUICK = Wanted(("detection", "simulation"), latents=6, items=4)


@pytest.fixture(autouse=True)
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auditing, "POPULATION_TOKENS", 8_000)
    monkeypatch.setattr(auditing, "EXPLAIN_TOKENS", 8_000)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving() as running:
        yield running


def test_the_bank_has_many_truths_of_three_kinds() -> None:
    every = truths(0)
    kinds = Counter(kind for kind, _ in every)
    assert len(every) >= 40 and set(kinds) == {"words", "placed", "two senses"} and min(kinds.values()) >= 12
    assert len({truth.name for _, truth in every}) == len({str(truth.predicate) for _, truth in every}) == len(every)
    assert [kind for kind, _ in truths(0, 6)] == ["words", "placed", "two senses"] * 2
    assert truths(0, 6) == truths(0, 6) != truths(1, 6)


def test_no_corruption_is_the_truth_and_each_latent_fires_as_it_says() -> None:
    cases, kinds = text_cases(Wanted(latents=48, items=8))
    assert len(cases) == 48 and sum(kinds.values()) == 48
    counts: Counter[str] = Counter()
    for case in cases:
        windows = case.evidence.select("test")
        assert len([w for w in windows if w.fires]) >= 4 and len([w for w in windows if w.kind == "random"]) == 8
        true = parse(case.true.predicate or "")
        # A window's first tokens may fire for what stands before it.
        for window in windows:
            assert window.activations is not None
            assert np.array_equal(true.matches(window.tokens)[1:], window.activations[1:] > 0)
        for name, said in case.corrupted.items():
            wrong = parse(said.predicate or "")
            differs = [(true.matches(w.tokens) != wrong.matches(w.tokens)).any() for w in case.evidence.windows]
            assert any(differs) and said.text != case.true.text, (case.true.text, name)
            counts[name] += 1
    assert counts["shuffled"] == counts["too_broad"] == counts["too_narrow"] == 48
    assert set(counts) == set(CORRUPTIONS) and counts["missing_sense"] == kinds["two senses"] == 13


def test_the_command_prints_tables_and_writes_files(tmp_path: Path) -> None:
    json_file, plot = tmp_path / "audit.json", tmp_path / "audit.svg"
    arguments = ["audit", "--evaluators", "detection,simulation", "--latents", "6", "--items", "5"]
    done = CliRunner().invoke(app, [*arguments, "--json", str(json_file), "--plot", str(plot)])
    assert done.exit_code == 0, done.output
    assert "judge predicate; planted latents: 2 words, 2 placed, 2 two senses; seed 0" in done.output
    assert "--judge PROVIDER:MODEL" in done.output
    said = json.loads(json_file.read_text())
    detection = said["rows"][0]["audit"]
    balanced = next(one for one in detection["metrics"] if one["metric"] == "balanced_accuracy")
    assert balanced["separations"]["shuffled"]["auroc"]["value"] > 0.9 and balanced["separations"]["shuffled"]["n"] == 6
    assert balanced["coverage"]["n"] > 20 and said["not_run"].keys() == {"simulation"}
    scored = Counter(one["explanation"] for one in said["rows"][0]["values"])
    assert scored["true"] == scored["shuffled"] == scored["missing"] == 6 and scored["missing_sense"] == 2
    drawn = plot.read_text()
    assert drawn.startswith("<svg") and drawn.count("<rect") > 5 and "<script" not in drawn


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--evaluators", "detektion"], "Did you mean 'detection'?"),
        (["--latents", "2"], "latents=2: an audit needs at least 4"),
        (["--judge", "predikate"], "Did you mean 'predicate'?"),
        (["--judge", "opnai:gpt"], "no provider 'opnai'"),
        (["--judge", "openai:gpt-5"], "--max-usd"),
        (["--plot", "audit.png"], "a plot is written as .svg or .html"),
        (["--scorer", "openai:gpt"], "expected a local model"),
    ],
)
def test_bad_input_is_refused_before_anything_is_asked(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    error = CliRunner().invoke(app, ["audit", *arguments]).exception
    assert isinstance(error, UserError) and said in str(error)


def asked(server: Running, rate: float, budget: Budget | None = None) -> AuditReport:
    """Audit with the oracle as judge."""

    async def run() -> AuditReport:
        prices = load_prices(own={f"openai:oracle@{server.openai_url}": {"input": 1.0, "output": 10.0}})
        client = open_client(
            f"openai:oracle@{server.openai_url}", journal=MemoryJournal(), budget=budget, prices=prices
        )
        given = Instruments(make_judge("model", client=client), client)
        planted = plant(QUICK, given)
        server.behave(
            "oracle", answer="oracle", rate=rate, meanings={s.text: s.predicate for s in planted.explanations}
        )
        server.reset_log()
        try:
            return await run_audit(QUICK, given, planted=planted)
        finally:
            await client.close()

    return asyncio.run(run())


def test_a_language_model_is_audited_and_its_calls_are_counted(server: Running, tmp_path: Path) -> None:
    report = asked(server, 0.0)
    names = [row.audit.evaluator for row in report.rows]
    assert names == ["detection", "detection, hard negatives", "simulation"] and not report.not_run
    for row in report.rows:
        metric = next(m for m in row.audit.metrics if m.metric in ("balanced_accuracy", "ev_correlation"))
        assert (metric.separations["shuffled"].auroc.value or 0) > 0.9, row.audit.evaluator
        assert metric.coverage.reason and row.spent["usd"] > 0 and row.spent["input_tokens"] > 0
        assert not row.spent["failures"]
    assert sum(row.spent["calls"] for row in report.rows) == len(server.log())
    write_plot(report, tmp_path / "audit.html")
    assert "true from corrupted" in (tmp_path / "audit.html").read_text()
    assert json.loads(findings(report).render("json")) == json.loads(json.dumps(as_json(report)))


def test_a_budget_that_is_used_up_leaves_what_is_done(server: Running) -> None:
    report = asked(server, 0.0, Budget(0.02))
    assert "budget of 0.02 USD" in report.not_run["simulation"]


def test_a_judge_that_needs_nothing_is_its_own_reference_only_where_it_never_errs() -> None:
    async def reference() -> bool:
        async with opened("predicate") as given:
            return given.reference is given.judge and given.client is None

    assert asyncio.run(reference())


def test_planted_latents_fire_and_write_as_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_live, "DISCRIMINANT_DOCUMENTS", 150)
    found = audit_live.bench(0, 3, 8)
    assert {kind: len(of) for kind, of in found.cases.items()} == {"output": 3, "input": 3, "both": 3}
    decoder = found.dictionary.decoder
    assert np.allclose(decoder.norm(dim=-1).numpy()[-150:], 1.0, atol=1e-4)
    for kind, some in found.cases.items():
        for case in some:
            held = [
                (parse(case.true.predicate or "").matches(w.tokens), w.activations > 0)  # type: ignore[operator]
                for w in case.evidence.windows
            ]
            true, fires = (np.concatenate(one) for one in zip(*held, strict=True))
            if kind == "output":
                assert (
                    not fires.any() and found.rates[case.latent] == 0 and case.true.text.startswith("Makes likelier: ")
                )
            else:
                assert 2 * (true & fires).sum() / (true.sum() + fires.sum()) > 0.7, case.true.text
    written = (found.model.subject.bridge.W_U.T.detach() @ decoder[found.cases["output"][0].latent]).argsort()
    best = {found.model.subject.pieces[token] for token in written[-3:].tolist()}
    assert best <= {f" {word}" for word in ("Paris", "Oslo", "Lima", "Cairo", "Tokyo", "Delhi")}

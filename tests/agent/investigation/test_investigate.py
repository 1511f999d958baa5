"""Investigating from Python: in a running event loop, several at a time over one model, with an investigator of one's own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
from investigation_records import investigation

from exegete.agent.investigation import investigate as investigating
from exegete.agent.investigation.asked import found_folder
from exegete.agent.investigation.contract import (
    Budget,
    Call,
    Case,
    Claim,
    Decision,
    Headline,
    Hypothesis,
    Metric,
    Outcome,
    Prediction,
    Question,
    Verdict,
    View,
)
from exegete.agent.investigation.investigate import ainvestigate, investigate
from exegete.agent.investigation.language_models import LanguageModels
from exegete.agent.investigation.ledger import Ledger
from exegete.agent.investigation.record import ExperimentRecord, InvestigationRecord
from exegete.agent.investigation.result import Investigation
from exegete.agent.investigation.shared_model import Sharing
from exegete.agent.live import Live
from exegete.tools.dictionaries import Dictionary
from exegete.tools.errors import UserError
from exegete.tools.live_model import LiveModel
from exegete.tools.subject import Subject

METRIC = Metric("log_odds", " DESC", " ASC")


@dataclass(frozen=True)
class OneByOne:
    """Takes latents out one after the other; before each it waits for those who investigate at the same time."""

    latents: Sequence[int]
    name: str = "one by one"
    together: asyncio.Barrier | None = None

    async def frame(self, question: Question) -> Metric:
        """Return the metric."""
        return METRIC

    async def decide(self, view: View) -> Decision:
        """Decide."""
        if self.together is not None:
            await self.together.wait()
        at = len(view.results)
        if at == len(self.latents):
            claim = Claim("it is <b>on</b>", "correlational", tuple(self.latents), experiments=("E1",))
            return Decision(claims=(claim,), answer="done", done=True)
        arguments = {"latents": [self.latents[at]], "hypothesis": "H1", "because": "…", "high": 0.0}
        return Decision((Call(str(at), "ablate", arguments),), (Hypothesis("H1", "one of them"),))


@pytest.fixture
def live(subject: Subject, dictionary: Dictionary) -> Live:
    return Live(LiveModel(subject, [dictionary]), dictionary, None)


def test_in_a_running_loop_as_in_a_notebook(live: Live, cases: tuple[Case, ...], tmp_path: Path) -> None:
    async def cell() -> Investigation:
        with Sharing(live) as sharing:
            return investigate("Why?", cases, METRIC, OneByOne([5]), out=tmp_path, controls=2, sharing=sharing)

    found = asyncio.run(cell())
    assert found.finished and found.answer == "done" and found.report.exists()
    (row,) = found.experiments
    assert (row["experiment"], row["tool"], row["n"], row["control_n"]) == ("E1", "ablate", 12, 2)
    assert found.table().num_rows == 1 and found.record.investigator == "one by one"
    assert [verdict.status for verdict in found.claims] == ["correlational"]
    assert all(plot["experiment"] == "E1" for plot in found.plots)
    assert "1 experiments" in repr(found)


def test_several_share_a_model_and_find_what_each_finds_alone(
    live: Live, cases: tuple[Case, ...], tmp_path: Path
) -> None:
    kinds = [OneByOne([5], "five"), OneByOne([11], "eleven"), OneByOne([17], "seventeen")]
    given: dict[str, Any] = {"controls": 2, "texts": [case.prompt for case in cases[:3]]}

    async def together(sharing: Sharing, kinds: Sequence[OneByOne], out: Path) -> list[Investigation]:
        barrier = asyncio.Barrier(len(kinds))
        ready = [replace(kind, together=barrier) for kind in kinds]
        work = (ainvestigate("Why?", cases, METRIC, one, out=out, sharing=sharing, **given) for one in ready)
        return await asyncio.gather(*work)

    alone: list[Investigation] = []
    batches = 0
    for kind in kinds:
        with Sharing(live, batch_tokens=4_096) as sharing:
            alone += asyncio.run(together(sharing, [kind], tmp_path / "alone"))
            batches += sharing.statistics.batches
    with Sharing(live, batch_tokens=4_096, waiting_s=0.5) as sharing:
        shared = asyncio.run(together(sharing, kinds, tmp_path / "shared"))
        assert sharing.statistics.batches < batches
    assert len({found.id for found in shared}) == 3
    for one, other in zip(alone, shared, strict=True):
        assert one.record.spent == other.record.spent
        for row, same in zip(one.experiments, other.experiments, strict=True):
            assert same["value"] == pytest.approx(row["value"], abs=1e-3)


def test_what_another_subject_began_is_not_gone_on_with(
    live: Live, cases: tuple[Case, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exegete.agent.investigation import investigate as module

    with Sharing(live) as sharing:
        given: dict[str, Any] = {"out": tmp_path, "sharing": sharing, "budget": Budget(steps=1)}
        found = investigate("Why?", cases, METRIC, OneByOne([5]), **given)
        other = replace(live, dictionary=replace(cast(Any, live.dictionary), fingerprint="sha256:other"))
        with Sharing(other) as another, pytest.raises(UserError, match=r"was of dictionary .* is another one now"):
            around = module.Around(another, OneByOne([5]))
            asyncio.run(module.resumed(found.id, out=tmp_path, budget=lambda _: Budget(steps=5), around=around))
    with Ledger(found_folder(found.id, None, tmp_path)) as ledger:
        assert ledger.steps == 1


def test_an_embedding_model_is_opened_once_an_investigation(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def opening(name: str, live: Live) -> object:
        opened.append(name)
        return object()

    monkeypatch.setattr(investigating, "_embedder", opening)
    bench = investigating._bench(investigation(), live, METRIC, LanguageModels(), cast(Any, None))
    assert bench.open_embedder is not None
    first = bench.open_embedder("minilm")
    assert bench.open_embedder("minilm") is first and bench.open_embedder("other") is not first
    assert opened == ["minilm", "other"]


def test_unknown_options_are_no_options(cases: tuple[Case, ...]) -> None:
    with pytest.raises(TypeError, match="stepps"):
        investigate("Why?", cases, METRIC, stepps=5)


def test_a_notebook_shows_everything_escaped(tmp_path: Path) -> None:
    experiment = ExperimentRecord(
        "E1",
        "ablate",
        {"latents": [1]},
        Prediction("H1", "…", high=0.0),
        "",
        "",
        "ok",
        Headline("effect", -2.5, -3, -2, 8),
    )
    record = InvestigationRecord(
        *("why-1", "Why <script>?", "recipe", {}, (), (), METRIC, 0, "1", "", "finished"),
        answer="because of <img src=x>",
        stopped="its steps & passes are used",
        experiments=(experiment,),
        verdicts=(Verdict(Claim("\x1b[2Jit <falls>", "causal"), "failed", "no", Headline("effect", -0.5, -1, 0, 9)),),
    )
    html = Investigation(record, tmp_path)._repr_html_()
    assert "<script>" not in html and "<img" not in html and "<falls>" not in html and "\x1b" not in html
    assert "effect -2.5 [-3, -2], n = 8" in html and "steps &amp; passes" in html
    assert Outcome("").plots == () and Investigation(record, tmp_path).plots == []

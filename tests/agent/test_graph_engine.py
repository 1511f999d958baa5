"""The graph of one latent and the engine over many: the seal, failures, draining."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from exegete.agent.engine import FAILURES_IN_A_ROW, Batch, label_latents
from exegete.agent.graph import Workbench, label_graph
from exegete.evaluators import make_evaluator, make_judge
from exegete.tools.errors import SealedSplitError
from exegete.tools.explainers import Explanation
from exegete.tools.store import LatentRecord
from exegete.tools.windows import LatentEvidence, Split

from planted import cat_evidence


class Asking:
    """An explainer that asks for a split and explains with what it is told to."""

    name = "asking"

    def __init__(self, split: Split = "explain", answer: Explanation | None = None) -> None:
        self.split = split
        self.answer = answer
        self.refused: list[str] = []
        self.seen: set[str] = set()

    async def explain(self, evidence: LatentEvidence, seed: int) -> Explanation | None:
        self.seen |= {window.split for window in evidence.windows}
        try:
            evidence.select(self.split)
        except SealedSplitError as error:
            self.refused.append(str(error))
        return self.answer


class Breaking:
    """An explainer that fails on some latents."""

    name = "breaking"

    def __init__(self, *latents: int) -> None:
        self.latents = latents

    async def explain(self, evidence: LatentEvidence, seed: int) -> Explanation | None:
        if evidence.latent in self.latents:
            raise ValueError(f"no idea about {evidence.latent}")
        return CAT


CAT = Explanation("the word cat", predicate='token is " cat"')


def workbench(explainer: Any) -> Workbench:
    evaluators = [make_evaluator("detection"), make_evaluator("fuzzing")]
    return Workbench("sha256:0", explainer, make_judge("predicate"), evaluators, seed=0)


def latents(*numbers: int) -> list[LatentEvidence]:
    return [replace(cat_evidence(), latent=number) for number in numbers]


def labeled(
    source: Iterable[LatentEvidence], bench: Workbench, stop_after: int = 10**9
) -> tuple[list[LatentRecord], bool]:
    written: list[LatentRecord] = []
    taken = iter(range(10**9))

    def write(records: Sequence[LatentRecord]) -> None:
        written.extend(records)

    batch = Batch(write, 3)
    stop = lambda: next(taken) >= stop_after  # noqa: E731
    complete = asyncio.run(label_latents(source, label_graph(bench), bench, 4, batch, stop))
    return sorted(written, key=lambda record: record.latent), complete


@pytest.mark.parametrize("split", ["test", "refine"])
def test_an_explainer_that_asks_for_a_sealed_split_is_refused(split: Split) -> None:
    explainer = Asking(split, CAT)
    records, _ = labeled(latents(7), workbench(explainer))
    assert explainer.refused == [f"latent 7: the {split!r} split is sealed to this reader"]
    assert explainer.seen == {"explain"}
    assert records[0].status == "labeled"


def test_a_node_gets_no_test_window_for_explaining_or_refining() -> None:
    bench = workbench(Asking())
    bench.in_flight[7] = cat_evidence()
    for purpose in ("explain", "refine"):
        with pytest.raises(SealedSplitError, match="'test'"):
            bench.evidence(7, purpose).select("test")
        assert all(w.split != "test" for w in bench.evidence(7, purpose).windows)


def test_a_latent_gets_its_explanation_scores_and_verdicts() -> None:
    records, complete = labeled(latents(1, 2), workbench(Asking(answer=CAT)))
    assert complete and [record.latent for record in records] == [1, 2]
    for record in records:
        assert record.explanations == [(CAT, CAT.id("sha256:0", record.latent))]
        assert {score.evaluator for _, score in record.scores} == {"detection", "fuzzing"}
        assert len(record.verdicts) == 80


def test_nothing_to_say_is_a_record_of_its_own() -> None:
    records, _ = labeled(latents(3), workbench(Asking()))
    assert (records[0].status, records[0].scores) == ("no_explanation", ())
    assert records[0].detail is not None and "asking" in records[0].detail


def test_latents_that_are_not_live_are_recorded_and_not_explained() -> None:
    explainer = Asking(answer=CAT)
    records, _ = labeled([replace(cat_evidence(), latent=4, status="rare")], workbench(explainer))
    assert records[0].status == "rare" and not explainer.seen


def test_one_bad_latent_fails_alone_and_says_why() -> None:
    records, complete = labeled(latents(1, 2, 3), workbench(Breaking(2)))
    assert complete and [record.status for record in records] == ["labeled", "failed", "labeled"]
    assert records[1].detail == "ValueError: no idea about 2"


def test_many_failures_in_a_row_end_the_run() -> None:
    numbers = range(FAILURES_IN_A_ROW)
    with pytest.raises(RuntimeError, match=f"{FAILURES_IN_A_ROW} latents in a row failed"):
        labeled(latents(*numbers), workbench(Breaking(*numbers)))


def test_stopping_drains_what_is_in_flight() -> None:
    bench = workbench(Asking(answer=CAT))
    records, complete = labeled(latents(*range(10)), bench, stop_after=6)
    assert not complete and [record.latent for record in records] == list(range(6))
    assert not bench.in_flight

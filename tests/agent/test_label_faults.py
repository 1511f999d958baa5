"""Whole runs on a server that fails: every failure is a row, nothing is asked twice, and `resume` asks what is missing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from disturbed import Bench, Undisturbed, bench_of, check_account, check_rows, rows, struck, undisturbed
from language_model_server import Running, serving
from planted_store import tables

pytestmark = pytest.mark.slow
LATENTS, FEW = 100, 48

DETAILS = {
    "429": "HTTP 429", "500": "HTTP 500", "503": "HTTP 503", "529": "HTTP 529", "html": "HTTP 502",
    "hang": "no answer within", "drip": "no answer within", "cut": "connection lost", "cut_body": "connection lost",
}  # fmt: skip
PUSHED_BACK = ("429", "503", "529")
LOST = ("hang", "drip", "cut", "cut_body")
"""After these nobody knows whether the call is billed."""


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def key() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXEGETE_API_KEY", "test-key")
        yield


@pytest.fixture(scope="module")
def bench(server: Running, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return bench_of(server, tmp_path_factory.mktemp("many"), LATENTS)


@pytest.fixture(scope="module")
def should(bench: Bench) -> Undisturbed:
    return undisturbed(bench)


def fault(kind: str, share: float, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "share": share, "seconds": 100, **more}


def limits(*kinds: str) -> dict[str, Any]:
    """Return how long to wait where these faults strike: no longer than there is something to wait for."""
    if {"hang", "drip"} & {*kinds}:
        # As few calls at a time as are answered at once also on a busy machine.
        return {"models.timeout_s": 5, "models.concurrency": 32}
    return {"models.patience_s": 0.3} if {*PUSHED_BACK} & {*kinds} else {}


def check(bench: Bench, should: Undisturbed, name: str, latents: int, *faults: dict[str, Any]) -> None:
    """Label under `faults`, look at what is stored, clear them, go on, and compare with the undisturbed run."""
    store, kinds = bench.store(name), [one["kind"] for one in faults]
    bench.server.reset_log()
    bench.behave(*faults)
    outcome = bench.label(store, **limits(*kinds))
    assert outcome.finished and sum(outcome.missing.values()) > 0

    disturbed = bench.server.log()
    hit = struck(disturbed)
    assert hit.keys() == {*kinds}
    check_rows(store, latents)
    check_failures(store, hit)
    check_account(bench, store)

    bench.behave()
    outcome = bench.label(store, **limits(*kinds))
    assert outcome.finished and not any(outcome.missing.values())
    asked = [entry["question"] for entry in bench.server.log()[len(disturbed) :]]
    answered = {entry["question"] for entry in disturbed if entry["answered"]}
    assert sorted(asked) == sorted(should.questions - answered)
    assert bench.server.counts()["asked_again"] == 0
    assert tables(store) == should.tables
    check_account(bench, store)


def check_failures(store: Any, hit: dict[str, set[str]]) -> None:
    """Each question that failed is a row with its status and reason, and so is what rests on it."""
    query = "SELECT DISTINCT split_part(call_id, '/', 1), detail FROM calls WHERE status = 'error'"
    failed = rows(store, query)
    for expected in {DETAILS[kind] for kind in hit}:
        questions = set().union(*(hit[kind] for kind in hit if DETAILS[kind] == expected))
        assert len({call for call, detail in failed if detail.startswith(expected)}) == len(questions)
    assert len({call for call, _ in failed}) == len(set().union(*hit.values()))
    assert {status for (status,) in rows(store, "SELECT DISTINCT status FROM calls")} <= {"ok", "error", "unknown"}
    assert bool(rows(store, "FROM calls WHERE status = 'unknown'")) is bool({*LOST} & hit.keys())
    assert {status for (status,) in rows(store, "SELECT DISTINCT status FROM verdicts")} == {"ok", "error"}
    reasons = rows(store, "SELECT DISTINCT detail FROM latents WHERE outcome = 'no_explanation'")
    assert reasons and all(re.match(r"one-shot: error: ", reason) for (reason,) in reasons)


ERRORS = [fault(kind, 0.05) for kind in ("500", "html", "cut", "cut_body")]
SILENCE = [fault(kind, 0.05) for kind in ("hang", "drip")]
PUSHBACK = [fault(kind, 0.015) for kind in PUSHED_BACK] + [fault("429", 0.015, retry_after=0.1)]


@pytest.mark.parametrize(("name", "faults"), [("errors", ERRORS), ("silence", SILENCE), ("pushback", PUSHBACK)])
def test_every_failure_is_a_row_and_what_is_missing_is_asked_later(
    name: str, faults: list[dict[str, Any]], bench: Bench, should: Undisturbed
) -> None:
    check(bench, should, name, LATENTS, *faults)


def test_failures_through_the_other_sdk(server: Running, tmp_path: Path) -> None:
    bench = bench_of(server, tmp_path, FEW, "anthropic")
    check(bench, undisturbed(bench), "all", FEW, *[fault(one["kind"], 0.05) for one in ERRORS + SILENCE])

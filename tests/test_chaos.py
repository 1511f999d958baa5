"""A run through a bad night, small enough for every day; `benchmarks.chaos` is the long one."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from chaos import Night, Plan, falling, undisturbed, watched
from chaos_checks import everything
from language_model_server import serving
from planted_store import planted_file, planted_store
from scripted_wire import SPEC, scripted

from exegete.agent.config import load_config
from exegete.agent.engine import Batch, label_latents
from exegete.agent.graph import Workbench, label_graph
from exegete.agent.progress import Lines
from exegete.agent.run import run
from exegete.evaluators import make_evaluator, make_judge
from exegete.tools.explainers import Explanation
from exegete.tools.store import LatentRecord, Writer
from exegete.tools.windows import LatentEvidence

from planted import cat_evidence

SMALL = Plan(latents=24, windows_per_split=8, control=4, floors=4, kills=4, stop_s=1.0, room_mib=64)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXEGETE_API_KEY", "test-key")


@pytest.mark.slow
def test_after_a_bad_night_the_tables_are_those_of_a_quiet_one(tmp_path: Path) -> None:
    with serving() as server, falling(SMALL, tmp_path, server) as night:
        wanted = undisturbed(night)
        with watched(night) as seen:
            night.pass_by()
            assert night.complaints(wanted, seen()) == []
        check_what_struck(night)


def check_what_struck(night: Night) -> None:
    """Nothing of the above says anything if nothing went wrong."""
    struck = Counter(one["kind"] for one in night.struck)
    assert struck == {"kill": 4, "stop": 1, "disk": 1, "back a day": 1, "on three hours": 1}
    assert night.ends.count(-9) == 4 and night.ends.count(2) == 1 and night.ends[-1] == 0, night.ends
    figures = night.figures()
    assert figures["unknown_at_ends"] > 0 and {"429", "500", "html", "cut_body"} < figures["by_fault"].keys()


def test_a_call_that_its_client_gives_up_is_no_failure_of_the_latent(caplog: pytest.LogCaptureFixture) -> None:
    class GivenUp:
        name = "given-up"

        async def explain(self, evidence: LatentEvidence, seed: int) -> Explanation:
            raise asyncio.CancelledError

    written: list[LatentRecord] = []
    bench = Workbench("sha256:0", GivenUp(), make_judge("predicate"), [make_evaluator("detection")], seed=0)
    batch = Batch(lambda records: written.extend(records), 1)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(label_latents([cat_evidence()], label_graph(bench), bench, 3, batch, lambda: False))
    assert (written, caplog.records) == ([], [])


def test_an_end_while_the_control_subset_is_stored_loses_no_climb(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scripted(monkeypatch)
    evidence = planted_file(tmp_path, 8, 12)

    def climbs(name: str) -> list[Any]:
        store = tmp_path / name
        settings = {"store": str(store), "models.explainer": SPEC, "models.judge": SPEC, "models.no_budget": True}
        own = ('cascade.rungs=["one-shot", "refine"]', "cascade.control=4", "label.floors=0")
        run(load_config(None, own, settings), Lines(every_s=1e9))
        found: list[Any] = everything(store)["climbs"]
        return found

    def ends(*arguments: object) -> None:
        raise MemoryError

    for name in ("whole", "ended"):
        planted_store(evidence, tmp_path / name)
    with monkeypatch.context() as ending:
        ending.setattr(Writer, "set_control", ends)
        with pytest.raises(MemoryError):
            climbs("ended")
    assert climbs("ended") == climbs("whole")

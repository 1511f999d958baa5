"""`run` from Python, where an event loop runs already, as in a notebook."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from planted_store import planted_file, planted_store, tables
from scripted_wire import SPEC, scripted

from exegete.agent.config import LabelConfig, ModelsConfig, RunConfig
from exegete.agent.progress import Lines
from exegete.agent.run import Outcome, run
from exegete.tools.errors import UserError


def config(store: Path, latents: int | None = None) -> RunConfig:
    models = ModelsConfig(explainer=SPEC, judge=SPEC, no_budget=True)
    return RunConfig(
        label=LabelConfig(explainer="one-shot", judge="model", floors=4, limit=latents), models=models, store=str(store)
    )


def test_a_running_loop_is_no_obstacle_and_errors_come_through(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scripted(monkeypatch)
    evidence = planted_file(tmp_path, 6)
    inside, outside = (planted_store(evidence, tmp_path / name) for name in ("inside", "outside"))

    async def cell(store: Path) -> Outcome:
        return run(config(store), Lines(every_s=1e9))

    outcome = asyncio.run(cell(inside))
    assert outcome.finished and next(iter(outcome.figures.values()))["outcomes"] == {"labeled": 6}
    assert run(config(outside), Lines(every_s=1e9)).finished
    assert tables(inside) == tables(outside)
    with pytest.raises(UserError, match="no evidence"):
        asyncio.run(cell(tmp_path / "nothing"))


def test_somebody_who_says_no_has_spent_next_to_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wire, asked = scripted(monkeypatch), []
    store = planted_store(planted_file(tmp_path, 30), tmp_path / "store")
    much = config(store).model_copy(update={"label": config(store).label.model_copy(update={"confirm_hours": 1e-9})})

    def refuse(question: str) -> bool:
        asked.append(question)
        return False

    outcome = run(much, Lines(every_s=1e9), refuse)
    assert not outcome.finished and len(asked) == 1 and "hours" in asked[0]
    before = sum(wire.questions.values())
    assert 0 < before < 30 * 9 / 2
    # What was measured is not paid for again.
    assert run(much, Lines(every_s=1e9), lambda question: True).finished
    assert set(wire.questions.values()) == {1}

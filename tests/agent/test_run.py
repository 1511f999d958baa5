"""A whole run on imported evidence: no model, no dictionary, no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from planted_store import TARGETS, planted_line, tables

import exegete
from exegete.agent.config import load_config
from exegete.agent.progress import Lines
from exegete.agent.run import run
from exegete.tools.errors import UserError
from exegete.tools.interchange import import_evidence

LATENTS = len(TARGETS)


@pytest.fixture(scope="module")
def planted_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("planted") / "planted.jsonl"
    file.write_text(
        "".join(json.dumps(planted_line(latent, noise=latent == LATENTS - 1)) + "\n" for latent in range(LATENTS))
    )
    return file


def labeled(file: Path, store: Path, *assignments: str) -> dict[str, Any]:
    import_evidence(file, store)
    outcome = run(load_config(None, assignments, {"store": str(store)}), Lines(every_s=1e9))
    assert outcome.finished
    return next(iter(outcome.figures.values()))


@pytest.fixture(scope="module")
def store(planted_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "store"
    labeled(planted_file, folder)
    return folder


def test_planted_latents_are_explained_far_above_their_floors(store: Path) -> None:
    with exegete.connect(store) as connection:
        figures = json.loads(connection.execute("SELECT figures FROM runs").fetchall()[0][0])
    for evaluator in ("detection", "fuzzing"):
        found = figures["evaluators"][evaluator]
        assert found["balanced_accuracy"]["value"] > 0.95
        for floor in ("shuffled", "constant"):
            assert found["floors"][floor]["above"]["low"] > 0.3
            assert found["floors"][floor]["above"]["n"] >= LATENTS - 1
    assert figures["outcomes"]["labeled"] >= LATENTS - 1
    assert figures["types"]["input"] >= LATENTS - 1


def test_every_score_has_an_interval_and_an_n(store: Path) -> None:
    with exegete.connect(store) as connection:
        odd = connection.execute(
            "SELECT * FROM scores WHERE metric = 'balanced_accuracy'"
            " AND (value IS NULL OR low IS NULL OR high IS NULL OR NOT (low <= value AND value <= high) OR n = 0)"
        ).fetchall()
        evaluators = connection.execute("SELECT DISTINCT evaluator FROM scores ORDER BY 1").fetchall()
    assert not odd
    assert evaluators == [("detection",), ("fuzzing",)]


def test_another_store_gets_the_same_tables(planted_file: Path, store: Path, tmp_path: Path) -> None:
    labeled(planted_file, tmp_path / "again", "label.concurrency=3")
    assert tables(tmp_path / "again") == tables(store)


def test_repeating_a_finished_run_changes_nothing(planted_file: Path, store: Path) -> None:
    before = tables(store)
    assert run(load_config(None, (), {"store": str(store)}), Lines(every_s=1e9)).finished
    assert tables(store) == before


def test_a_limit_labels_that_many(planted_file: Path, tmp_path: Path) -> None:
    figures = labeled(planted_file, tmp_path / "some", "label.limit=7")
    assert sum(figures["outcomes"].values()) == 7


def test_two_explainers_share_a_store(planted_file: Path, tmp_path: Path) -> None:
    labeled(planted_file, tmp_path / "both")
    assert run(load_config(None, ["label.explainer=token_list"], {"store": str(tmp_path / "both")}), Lines()).finished
    with exegete.connect(tmp_path / "both") as connection:
        explainers = connection.execute("SELECT DISTINCT explainer FROM explanations ORDER BY 1").fetchall()
        twice = connection.execute("SELECT latent FROM latents GROUP BY latent HAVING count(*) > 1").fetchall()
    assert explainers == [("lexical",), ("token_list",)]
    assert not twice


def test_an_empty_store_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="evidence import"):
        run(load_config(None, (), {"store": str(tmp_path / "empty")}), Lines())


def test_a_half_configured_pass_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \[dictionary\]"):
        run(load_config(None, ["subject.name=x"], {"store": str(tmp_path / "s")}), Lines())


def test_types_on_few_floors_are_said_to_be(
    planted_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labeled(planted_file, tmp_path / "few", "label.limit=8", "label.floors=5")
    assert "fuzzing: types rest on 5 shuffled explanations" in capsys.readouterr().err
    labeled(planted_file, tmp_path / "enough", "label.floors=25")
    assert "types rest on" not in capsys.readouterr().err

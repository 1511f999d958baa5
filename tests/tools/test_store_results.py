from __future__ import annotations

import math
from concurrent import futures
from pathlib import Path

import numpy as np

from exegete.evaluators.contract import Score
from exegete.tools.explainers import Explanation
from exegete.tools.store import DictionaryRecord, LatentRecord, Store
from exegete.tools.store.results import Figures

DICTIONARY = "sha256:" + "cd" * 32


def test_figures_are_those_of_one_metric_by_latent(tmp_path: Path) -> None:
    """Floors apart; controls, other metrics, other evaluators and figures without a value are left out."""
    own = Explanation("months")
    identity = own.id(DICTIONARY, 3)

    def score(
        evaluator: str, metric: str, value: float | None, low: float | None, baseline: str | None = None
    ) -> Score:
        return Score(evaluator, metric, value, low, low and 1.0, 10, 0, baseline)

    scores = [
        score("intervention", "accuracy", 0.8, None),
        score("intervention", "accuracy_random_latent", 0.6, 0.5),
        score("intervention", "accuracy", 0.5, 0.3, "shuffled"),
        score("detection", "balanced_accuracy", 0.9, 0.8),
        score("detection", "f1", 0.7, 0.6),
        score("detection", "balanced_accuracy", None, None, "sibling"),
        score("fuzzing", "balanced_accuracy", 0.9, 0.8),
    ]
    store = Store.create_or_open(tmp_path / "store")
    with store.writer() as writer:
        writer.add_dictionary(DictionaryRecord(DICTIONARY, "toy", 8, "tiny", "blocks.0.hook_resid_post", {}))
        run = writer.begin_run(config={}, seed=0, code_version="1", dictionary=DICTIONARY)
        writer.record(
            run, [LatentRecord(DICTIONARY, 3, "labeled", [(own, identity)], [(identity, one) for one in scores])]
        )
        results = writer.results(run, DICTIONARY)
        assert shown(results.figures("detection", "balanced_accuracy")) == [(3, 0.9, 0.8)]
        assert shown(results.figures("intervention", "accuracy")) == [(3, 0.8, None)]
        assert shown(results.figures("intervention", "f1")) == []
        floors = results.floor_figures("intervention", "accuracy")
        assert {floor: shown(figures) for floor, figures in floors.items()} == {"shuffled": [(3, 0.5, 0.3)]}
        assert results.floor_figures("detection", "balanced_accuracy") == {}
        assert results.explained_latents().tolist() == [3]
        assert results.chosen(np.array([2, 3])) == {3: identity}


def shown(figures: Figures) -> list[tuple[int, float, float | None]]:
    """Rows, with None for NaN."""
    columns = (column.tolist() for column in figures)
    return [(latent, value, None if math.isnan(low) else low) for latent, value, low in zip(*columns, strict=True)]


def test_results_are_read_while_another_thread_writes(tmp_path: Path) -> None:
    store, found = Store.create_or_open(tmp_path / "store"), []
    with store.writer() as writer, futures.ThreadPoolExecutor(1) as thread:
        writer.add_dictionary(DictionaryRecord(DICTIONARY, "toy", 8))
        run = writer.begin_run(config={}, seed=0, code_version="1", dictionary=DICTIONARY)
        records = [
            LatentRecord(DICTIONARY, latent, "no_explanation", missing_calls=latent % 2) for latent in range(500)
        ]

        def write() -> None:
            for at in range(0, len(records), 5):
                writer.record(run, records[at : at + 5])

        writing = thread.submit(write)
        while not writing.done():
            found.append(writer.results(run, DICTIONARY).incomplete())
        writing.result()
        found.append(writer.results(run, DICTIONARY).incomplete())
    assert found == sorted(found) and found[-1] == 250 and len(set(found)) > 1

from __future__ import annotations

from pathlib import Path

from exegete.evaluators.contract import Score
from exegete.tools.explainers import Explanation
from exegete.tools.store import DictionaryRecord, LatentRecord, Store

DICTIONARY = "sha256:" + "cd" * 32


def test_headlines_are_the_figures_of_the_chosen_metrics(tmp_path: Path) -> None:
    """Own before floors; controls, other metrics, other evaluators and figures without a value are left out."""
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
        found = results.headlines({"detection": "balanced_accuracy", "intervention": "accuracy"})
    assert found == [
        (3, "detection", None, 0.9, 0.8),
        (3, "intervention", None, 0.8, None),
        (3, "intervention", "shuffled", 0.5, 0.3),
    ]

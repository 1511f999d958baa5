"""The order of a run: a stratified subset first, then from front to back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np

import exegete
from exegete.agent.config import load_config
from exegete.agent.ordering import LEAST, chosen_latents, in_order, stratified_subset
from exegete.agent.progress import Lines
from exegete.agent.run import run
from exegete.tools.evidence import Evidence
from exegete.tools.interchange import import_evidence

from .test_cascade import line


class Rated:
    """Evidence of latents whose rates span five orders of magnitude; every tenth is dead."""

    dictionary = "sha256:rated"

    def __init__(self, count: int, known: bool = True) -> None:
        self.latents = np.arange(count, dtype=np.int64) * 3
        self.live = self.latents[np.arange(count) % 10 != 0]
        self._rates = (
            np.random.default_rng(5).permutation(np.logspace(-6, -1, count)) if known else np.full(count, np.nan)
        )

    def rates(self) -> Any:
        return self._rates


def rated(count: int, known: bool = True) -> Evidence:
    return cast(Evidence, Rated(count, known))


def test_the_subset_holds_each_firing_rate_in_proportion() -> None:
    evidence = rated(20_000)
    subset = stratified_subset(evidence, evidence.latents, 0.02, 7)
    assert len(subset) == 400
    assert (np.diff(subset) > 0).all()
    assert np.isin(subset, evidence.live).sum() in (359, 360, 361)
    # A simple random sample of 400 has, of 360 live ones, a standard deviation of 5.7 in each decile.
    live = subset[np.isin(subset, evidence.live)]
    edges = np.quantile(evidence.rates()[evidence.live // 3], np.linspace(0, 1, 11))
    held, _ = np.histogram(evidence.rates()[live // 3], edges)
    assert (np.abs(held - 36) <= 1).all()


def test_another_seed_takes_others_and_the_same_seed_the_same() -> None:
    evidence = rated(5_000)
    first, again, other = (stratified_subset(evidence, evidence.latents, 0.05, seed) for seed in (1, 1, 2))
    assert first.tolist() == again.tolist() != other.tolist()


def test_small_runs_take_at_least_so_many_or_all() -> None:
    evidence = rated(1_000)
    assert len(stratified_subset(evidence, evidence.latents, 0.001, 0)) == LEAST
    few = evidence.latents[:30]
    assert stratified_subset(evidence, few, 0.5, 0).tolist() == few.tolist()
    assert stratified_subset(evidence, few[:0], 0.5, 0).tolist() == []


def test_rates_that_are_not_known_leave_a_random_subset() -> None:
    evidence = rated(3_000, known=False)
    subset = stratified_subset(evidence, evidence.latents, 0.1, 0)
    assert len(set(subset.tolist())) == 300


def test_the_subset_comes_first_and_both_parts_ascend() -> None:
    assert in_order(np.arange(6), np.array([1, 4])).tolist() == [1, 4, 0, 2, 3, 5]


def test_a_limit_draws_by_the_seed() -> None:
    evidence = rated(50)
    assert chosen_latents(evidence, None, 0).tolist() == evidence.latents.tolist()
    drawn = chosen_latents(evidence, 10, 0).tolist()
    assert drawn == sorted(set(drawn)) and len(drawn) == 10
    assert drawn != chosen_latents(evidence, 10, 1).tolist()


def test_floors_are_scored_on_as_many_windows_as_the_explanation(tmp_path: Path) -> None:
    file = tmp_path / "planted.jsonl"
    file.write_text("".join(json.dumps(line(latent)) + "\n" for latent in range(104)))
    import_evidence(file, tmp_path / "store")
    usual = ("label.profile=night", "label.floors=104")
    assert run(load_config(None, usual, {"store": str(tmp_path / "store")}), Lines(every_s=1e9)).finished
    query = """SELECT own.n, list(DISTINCT floor.n), count(DISTINCT own.latent) FROM scores own JOIN scores floor
        USING (run, latent, evaluator, metric) WHERE own.baseline IS NULL AND floor.baseline = 'constant' GROUP BY 1 ORDER BY 1"""
    with exegete.connect(tmp_path / "store") as connection:
        found = connection.execute(query).fetchall()
    assert found == [(20, [20], 4), (40, [40], 100)]  # A hundred come first, and are scored in full.

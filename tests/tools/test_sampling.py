from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exegete.tools.sampling import RunningBest, certified, event_hash, may_be_sampled, mix, rank_within, run_starts


def test_mix_is_splitmix64() -> None:
    # The first output of splitmix64 from state 0 (Steele, Lea and Flood 2014; Vigna's reference code).
    assert mix(np.array([0x9E3779B97F4A7C15], np.uint64))[0] == 0xE220A8397B1DCDAF


def test_hashes_are_uniform_and_differ_by_latent_window_and_seed() -> None:
    latents, windows = np.divmod(np.arange(100_000), 400)
    hashes = event_hash(0, latents, windows)
    assert len(np.unique(hashes)) == len(hashes)
    shares = np.bincount((hashes >> np.uint64(60)).astype(np.int64), minlength=16) / len(hashes)
    assert np.abs(shares - 1 / 16).max() < 0.005
    assert (event_hash(1, latents, windows) != hashes).all()


def test_ranks_and_starts_of_runs() -> None:
    groups = np.array([3, 3, 3, 5, 9, 9])
    assert rank_within(groups).tolist() == [0, 1, 2, 0, 0, 1]
    assert run_starts(groups).tolist() == [0, 3, 4]
    assert rank_within(groups[:0]).tolist() == []


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0.5, 100, width=32)), max_size=60), st.integers(1, 4))
def test_the_running_best_is_the_kth_highest(seen: list[tuple[int, float]], k: int) -> None:
    best = RunningBest(5, k)
    for start in range(0, len(seen), 7):
        chunk = seen[start : start + 7]
        best.update(np.array([g for g, _ in chunk]), np.array([v for _, v in chunk], np.float32))
    for group in range(5):
        values = sorted((v for g, v in seen if g == group), reverse=True)
        assert best.bound[group] == (np.float32(values[k - 1]) if len(values) >= k else 0)


def test_a_stream_keeps_every_event_below_its_final_bound() -> None:
    hashes = event_hash(0, np.zeros(5_000, np.int64), np.arange(5_000))
    budget = np.array([40.0])
    kept = may_be_sampled(hashes, np.arange(1, 5_001), budget)
    final = may_be_sampled(hashes, np.array([5_000]), budget)
    assert (kept | ~final).all()
    assert 20 < final.sum() < 70
    assert kept.sum() < 600


@pytest.mark.parametrize(("below", "total", "held"), [(10, 50, True), (9, 50, False), (7, 7, True), (6, 7, False)])
def test_the_certificate_needs_the_sample_or_everything(below: int, total: int, held: bool) -> None:
    assert certified(np.array([below]), np.array([total]), np.array([10])).tolist() == [held]

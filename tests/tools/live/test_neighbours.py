from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from exegete.tools.activations import run_pass
from exegete.tools.bundled import write_corpus
from exegete.tools.cofiring import CofiringNeighbour, cofiring_neighbours, pass_firings
from exegete.tools.corpus import build_corpus
from exegete.tools.dictionaries import Dictionary, OpaqueDictionary, PlainDictionary
from exegete.tools.errors import UserError
from exegete.tools.neighbours import decoder_neighbours, nearest
from exegete.tools.pass_settings import PassSettings
from exegete.tools.subject import Subject


def firings(rows: dict[int, list[int]], bounds: list[int], latents: int = 6) -> Any:
    """Latent → windows of the pool on which it fires, as `PoolFirings` holds them."""
    size = bounds[-1]
    keys = sorted(latent * size + window for latent, windows in rows.items() for window in windows)
    return SimpleNamespace(keys=np.array(keys, np.int64), size=size, bounds=np.array(bounds), latents=latents)


ROWS = {0: [0, 1, 2, 3], 1: [2, 3], 2: [3, 4, 5, 6, 7, 8, 9], 3: [9], 5: [0, 1, 2, 3, 10, 11]}
"""Of ten windows of the explain split and two of others."""


def test_cofiring_by_hand() -> None:
    (found,) = cofiring_neighbours(firings(ROWS, [0, 10, 11, 12]), [0], 5)
    assert (found.latent, found.windows, found.pool_windows) == (0, 4, 10)
    assert found.neighbours == (
        CofiringNeighbour(5, 1.0, 1.0, both=4, windows=4, expected=1.6),
        CofiringNeighbour(1, 0.5, 2 / math.sqrt(8), both=2, windows=2, expected=0.8),
        CofiringNeighbour(2, 0.1, 1 / math.sqrt(28), both=1, windows=7, expected=2.8),
    )


def test_cofiring_keeps_to_its_splits_and_its_count() -> None:
    pool = firings(ROWS, [0, 10, 11, 12])
    (found,) = cofiring_neighbours(pool, [0], 1, splits=("explain", "refine", "test"))
    assert (found.pool_windows, [one.neighbour for one in found.neighbours]) == (12, [5])
    assert found.neighbours[0].jaccard == pytest.approx(4 / 6)
    alone, dead = cofiring_neighbours(pool, [3, 4], 3)
    assert [one.neighbour for one in alone.neighbours] == [2]
    assert (dead.windows, dead.neighbours) == (0, ())


def test_cofiring_equals_brute_force_and_either_order() -> None:
    random = np.random.default_rng(0)
    dense = random.random((700, 90)) < random.random((700, 1)) ** 4
    pool = firings({i: np.flatnonzero(row).tolist() for i, row in enumerate(dense)}, [0, 60, 90, 90], 700)
    x = dense[:, :60].astype(float)
    both, counts = x @ x.T, x.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        scores = {
            "jaccard": both / (counts[:, None] + counts - both),
            "cosine": both / np.sqrt(counts[:, None] * counts),
        }
    for by, wanted in scores.items():
        found = cofiring_neighbours(pool, range(700), 4, by=by)  # type: ignore[arg-type]
        for one in found:
            others = [j for j in range(700) if j != one.latent and both[one.latent, j] > 0]
            best = sorted(others, key=lambda j, i=one.latent, w=wanted: (-w[i, j], j))[:4]  # type: ignore[misc]
            assert [near.neighbour for near in one.neighbours] == best
            for near in one.neighbours:
                assert getattr(near, by) == pytest.approx(wanted[one.latent, near.neighbour])
                assert near.both == both[one.latent, near.neighbour]


def test_cofiring_of_a_pass(tmp_path: Path, subject: Subject, dictionary: Dictionary) -> None:
    write_corpus(tmp_path / "text.jsonl", 1, 40)
    corpus = build_corpus(str(tmp_path / "text.jsonl"), subject, tmp_path / "corpus", seed=0)
    settings = PassSettings()
    assert run_pass(subject, dictionary, corpus, tmp_path / "pass", settings)
    pool = pass_firings(tmp_path / "pass", corpus, settings, dictionary.latents)
    counts = np.bincount(pool.keys // pool.size, minlength=dictionary.latents)
    latent = int(counts.argmax())
    (found,) = cofiring_neighbours(pool, [latent], 3)
    windows = pool.windows[: pool.bounds[1]]
    codes = [
        dictionary.encode(subject.residual(torch.from_numpy(corpus.tokens(i, i + 1)).long(), dictionary.hook_point)[0])
        * torch.from_numpy(corpus.mask(i, i + 1)[0])[:, None]
        for i in range(corpus.contexts)
    ]
    fires = (torch.cat(codes).reshape(-1, 32, dictionary.latents) > 0).any(1)[torch.from_numpy(windows)]
    assert found.windows == int(fires[:, latent].sum()) > 0
    for near in found.neighbours:
        both = fires[:, latent] & fires[:, near.neighbour]
        either = fires[:, latent] | fires[:, near.neighbour]
        assert near.both == int(both.sum())
        assert near.jaccard == pytest.approx(float(both.sum() / either.sum()))
    other = SimpleNamespace(fingerprint="sha256:other")
    with pytest.raises(UserError, match="another corpus"):
        pass_firings(tmp_path / "pass", other, settings, dictionary.latents)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"latents": [6]}, "no latent 6; the pass has 0 to 5"),
        ({"latents": []}, "at least one of each"),
        ({"count": 0}, "at least one of each"),
        ({"by": "dot"}, "'dot' are unknown"),
        ({"splits": ["train"]}, "are not of explain"),
        ({"splits": ["refine"]}, "no window of the splits refine"),
    ],
)
def test_cofiring_refuses(arguments: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {"latents": [0], "count": 2} | arguments
    with pytest.raises(UserError, match=said):
        cofiring_neighbours(firings(ROWS, [0, 10, 10, 12]), **given)


def test_decoder_neighbours_equal_brute_force(dictionary: Dictionary) -> None:
    assert isinstance(dictionary, PlainDictionary)
    asked = [7, 1_023, 0, 7]
    latents, cosines = decoder_neighbours(dictionary, asked, 5)
    unit = torch.nn.functional.normalize(dictionary.decoder.float(), dim=1)
    every = unit @ unit.T
    every.fill_diagonal_(-2)
    wanted = every[asked].topk(5)
    assert latents.tolist() == wanted.indices.tolist()
    assert np.allclose(cosines, wanted.values.numpy(), atol=1e-6)
    assert latents[0].tolist() == latents[3].tolist() == nearest(dictionary.decoder, 5)[0][7].tolist()


def test_no_matrix_of_all_by_all_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = torch.randn(200_000, 16, generator=torch.Generator().manual_seed(0))
    vectors[150_000] = 2 * vectors[5]
    largest: list[int] = []
    whole = torch.Tensor.__matmul__

    def spied(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = whole(a, b)
        largest.append(product.numel())
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", spied)
    latents, cosines = nearest(vectors, 2, [5, 150_000, 17])
    assert (latents[0, 0], latents[1, 0]) == (150_000, 5)
    assert cosines[0, 0] == pytest.approx(1, abs=1e-6)
    assert max(largest) == 3 * 32_768
    assert sum(largest) == 3 * 200_000


def test_decoder_neighbours_refuse(dictionary: Dictionary) -> None:
    for latents, count, said in (
        ([1_024], 2, "no latent 1024; it has 0 to 1023"),
        ([], 2, "at least one latent"),
        ([0], 0, "1 to 1023 neighbours"),
        ([0], 1_024, "1 to 1023 neighbours"),
    ):
        with pytest.raises(UserError, match=said):
            decoder_neighbours(dictionary, latents, count)
    crooked = OpaqueDictionary("crooked", "f", "h", 2, 2, "cpu", "float32", torch.relu, lambda z, given: z.square())
    with pytest.raises(UserError, match="no decoder directions"):
        decoder_neighbours(crooked, [0], 1)

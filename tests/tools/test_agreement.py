"""Agreement of two dictionaries' explanations, worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from searched_store import A, AxisEmbedder, B, embed, explained, record, writing

import exegete
from exegete.tools import agreement
from exegete.tools.agreement import explanation_agreement, nearest_rows
from exegete.tools.errors import UserError


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("agreement") / "store"
    with writing(folder) as writer:
        record(writer, [explained(i, text) for i, text in enumerate(["cat", "dog", "price", "kitten puppy"])])
        record(writer, [explained(i, text, B) for i, text in enumerate(["money", "puppy", "the cat"])])
        embed(writer, AxisEmbedder())
    return folder


def test_each_latent_has_its_nearest_beside_that_of_another(store: Path) -> None:
    with exegete.connect(store) as connection:
        found = explanation_agreement(connection, A, B)
        sql = connection.execute(
            "SELECT latent, nearest_latent, cosine FROM explanation_agreement(?, ?)", [A, B]
        ).fetchall()
    # "cat" meets "the cat" = (1, 0, 0, 1)/√2; "kitten puppy" = (1, 1, 0, 0)/√2 is 1/√2 from "puppy" and 1/2 from "the cat".
    half = math.sqrt(1 / 2)
    assert found.latents.tolist() == [0, 1, 2, 3] and found.nearest.tolist() == [2, 1, 0, 1]
    assert found.cosine.tolist() == pytest.approx([half, 1, 1, half])
    assert [row[:2] for row in sql] == list(zip(found.latents, found.nearest, strict=True))
    assert [row[2] for row in sql] == pytest.approx(found.cosine.tolist())
    assert found.mean.value == pytest.approx((2 + 2 * half) / 4) and found.mean.n == 4
    assert found.above.value == pytest.approx(found.mean.value - found.mean_chance.value)
    assert (found.floor <= found.cosine + 1e-6).all() and found.model == "axes"


def test_a_dictionary_with_itself_leaves_each_latent_out(store: Path) -> None:
    with exegete.connect(store) as connection:
        found = explanation_agreement(connection, A, A)
    assert found.nearest.tolist()[:2] == [3, 3]
    assert found.cosine.tolist()[:3] == pytest.approx([math.sqrt(1 / 2), math.sqrt(1 / 2), 0])


def test_explanations_that_have_nothing_to_do_with_each_other_are_not_above_the_floor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    own, theirs = (rng.standard_normal((n, 32)).astype(np.float32) for n in (300, 200))
    own, theirs = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (own, theirs))
    whole = nearest_rows(own, theirs)
    monkeypatch.setattr(agreement, "_BLOCK_CELLS", 1_000)
    place, cosine = nearest_rows(own, theirs)
    assert np.array_equal(place, whole[0]) and np.allclose(cosine, whole[1], atol=1e-6)
    assert np.array_equal(place, (own @ theirs.T).argmax(axis=1))
    order = agreement._without_fixed_points(300, 0)
    assert sorted(order) == list(range(300)) and not (order == np.arange(300)).any()
    # The largest of 200 cosines in 32 dimensions is about 0.45 by chance alone; with the nearest of another it is about 0.
    assert cosine.mean() > 0.4 and abs(np.einsum("nw,nw->n", own, theirs[place[order]]).mean()) < 0.05
    # Vectors that mean nothing reach the same by chance.
    _, chance = nearest_rows(agreement._scrambled(own, 0), theirs)
    assert abs(chance.mean() - cosine.mean()) < 0.02


def test_what_cannot_be_compared_is_said(store: Path, tmp_path: Path) -> None:
    missing = "'other' has not embedded explanations of both sha256:aaaaaaaaaaaa"
    with exegete.connect(store) as connection, pytest.raises(UserError, match=missing):
        explanation_agreement(connection, A, B, model="other")
    with writing(tmp_path / "s") as writer:
        record(writer, [explained(0, "cat"), explained(1, "dog")])
        record(writer, [explained(0, "cat", B)])
        embed(writer, AxisEmbedder())
    with (
        exegete.connect(tmp_path / "s") as connection,
        pytest.raises(UserError, match="needs two embedded explanations"),
    ):
        explanation_agreement(connection, A, B)

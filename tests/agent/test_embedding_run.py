"""Embeddings written as a run goes on: each explanation once, whatever happens in between."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from searched_store import A, AxisEmbedder, B, embed, explained, record, writing

import exegete
from exegete.agent import embedding_run
from exegete.agent.embedding_run import Embedded, EmbeddingRun, name_of_embedder
from exegete.tools.embedders import Vectors
from exegete.tools.errors import UserError
from exegete.tools.store import DictionaryRecord, Store
from exegete.tools.store.embeddings import Embeddings, codes_of
from exegete.tools.store.parts import write_part


def embedded(folder: Path) -> list[tuple[Any, ...]]:
    """Dictionary, latent and vector of every embedding, as readers see them."""
    with exegete.connect(folder) as connection:
        return connection.execute("SELECT dictionary, latent, vector FROM embeddings ORDER BY ALL").fetchall()


def test_what_is_written_is_embedded_in_a_thread_of_its_own(tmp_path: Path) -> None:
    model = AxisEmbedder()
    with writing(tmp_path / "s") as writer, EmbeddingRun(writer, "axes", lambda: model) as embedding:
        for batch in ([explained(0, "cat"), explained(1, "dog cat")], [explained(2, "cat")]):
            record(writer, batch)
            embedding.written(batch)
        assert embedding.finish() == Embedded(3, True)
    assert model.threads == {"embedding"}
    half = float(np.float32(np.sqrt(0.5)))
    assert embedded(tmp_path / "s") == [(A, 0, [1, 0, 0, 0]), (A, 1, [half, half, 0, 0]), (A, 2, [1, 0, 0, 0])]


def test_the_same_text_is_embedded_once(tmp_path: Path) -> None:
    model = AxisEmbedder()
    with writing(tmp_path / "s") as writer:
        record(writer, [explained(latent, "cat") for latent in range(50)])
        assert embed(writer, model) == 50
    assert model.asked == ["cat"] and len(embedded(tmp_path / "s")) == 50


def test_a_restart_embeds_exactly_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_run, "TEXTS_AT_ONCE", 2)
    monkeypatch.setattr(embedding_run, "PART_ROWS", 4)
    texts = [f"cat{i}" for i in range(20)]
    asked: list[bool] = []

    def after_three() -> bool:
        asked.append(True)
        return len(asked) > 3

    with writing(tmp_path / "s") as writer:
        record(writer, [explained(i, text) for i, text in enumerate(texts)])
        with EmbeddingRun(writer, "axes", AxisEmbedder) as embedding:
            assert embedding.finish(after_three) == Embedded(6, False)
    assert len(embedded(tmp_path / "s")) == 6
    model = AxisEmbedder()
    with writing(tmp_path / "s") as writer:
        assert embed(writer, model) == 14
        assert embed(writer, AxisEmbedder()) == 0
    assert sorted(model.asked) == sorted(texts[6:])
    assert [latent for _, latent, _ in embedded(tmp_path / "s")] == list(range(20))


def test_a_part_that_no_transaction_registered_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: Embeddings, *given: Any) -> None:
        embedding_rows = embeddings_module._rows(*given)
        write_part(self._folder, embedding_rows)
        raise KeyboardInterrupt

    from exegete.tools.store import embeddings as embeddings_module

    with writing(tmp_path / "s") as writer:
        record(writer, [explained(0, "cat"), explained(1, "dog")])
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Embeddings, "add", killed)
            embed(writer, AxisEmbedder())
    assert len(list((tmp_path / "s/embeddings").iterdir())) == 1 and embedded(tmp_path / "s") == []
    with writing(tmp_path / "s") as writer:
        assert list((tmp_path / "s/embeddings").iterdir()) == []
        assert embed(writer, AxisEmbedder()) == 2
    assert len(embedded(tmp_path / "s")) == 2


def test_what_is_recorded_anew_is_not_embedded_twice(tmp_path: Path) -> None:
    records = [explained(0, "cat"), explained(1, "dog")]
    for expected in (2, 0):
        with writing(tmp_path / "s") as writer, EmbeddingRun(writer, "axes", AxisEmbedder) as embedding:
            record(writer, records)
            embedding.written(records)
            embedding.written(records)
            assert embedding.finish().texts == expected
    assert len(embedded(tmp_path / "s")) == 2


def test_where_labeling_is_faster_the_rest_is_embedded_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_run, "_WAITING", 3)
    monkeypatch.setattr(embedding_run, "TEXTS_AT_ONCE", 100)
    records = [explained(i, f"cat{i}") for i in range(10)]
    model = AxisEmbedder()
    with writing(tmp_path / "s") as writer, EmbeddingRun(writer, "axes", lambda: model) as embedding:
        record(writer, records)
        embedding.written(records)
        assert embedding.finish() == Embedded(10, True)
    assert model.threads == {"embedding", threading.main_thread().name} and len(model.asked) == 10


def test_leaving_without_finishing_keeps_what_is_embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_run, "TEXTS_AT_ONCE", 2)
    going_on = threading.Event()

    class Slow(AxisEmbedder):
        def passages(self, texts: Sequence[str]) -> Vectors:
            going_on.set()
            return super().passages(texts)

    records = [explained(i, f"cat{i}") for i in range(2)]
    with writing(tmp_path / "s") as writer, EmbeddingRun(writer, "axes", Slow) as embedding:
        record(writer, records)
        embedding.written(records)
        assert going_on.wait(20)
    assert len(embedded(tmp_path / "s")) == 2


def test_a_model_that_fails_does_not_end_labeling(tmp_path: Path) -> None:
    def broken() -> AxisEmbedder:
        raise UserError("no sentence-transformers model can be loaded from 'nowhere'")

    with writing(tmp_path / "s") as writer, EmbeddingRun(writer, "nowhere", broken) as embedding:
        for latent in range(3):
            record(writer, [explained(latent, "cat")])
            embedding.written([explained(latent, "cat")])
        with pytest.raises(UserError, match="can be loaded from 'nowhere'"):
            embedding.finish()
    with exegete.connect(tmp_path / "s") as connection:
        assert connection.execute("SELECT count(*) FROM explanations").fetchall() == [(3,)]


def test_without_a_model_nothing_is_embedded(tmp_path: Path) -> None:
    with writing(tmp_path / "s") as writer, EmbeddingRun(writer, None, AxisEmbedder) as embedding:
        record(writer, [explained(0, "cat")])
        embedding.written([explained(0, "cat")])
        assert embedding.finish() == Embedded(0, True)
    assert embedded(tmp_path / "s") == []


def test_random_controls_and_blank_explanations_are_not_embedded(tmp_path: Path) -> None:
    control = "sha256:" + "c" * 64
    with writing(tmp_path / "s") as writer:
        writer.add_dictionary(DictionaryRecord(control, "control", 10, provenance={"control_of": A}))
        record(writer, [explained(0, "cat"), explained(1, " ")])
        record(writer, [explained(0, "dog", control)])
        record(writer, [explained(0, "price", B)])
        with EmbeddingRun(writer, "axes", AxisEmbedder) as embedding:
            embedding.written([explained(0, "dog", control), explained(0, "cat"), explained(1, " ")])
            assert embedding.finish() == Embedded(2, True)
    assert [row[:2] for row in embedded(tmp_path / "s")] == [(A, 0), (B, 0)]


def test_a_store_from_before_embeddings_opens(tmp_path: Path) -> None:
    with writing(tmp_path / "s") as writer:
        record(writer, [explained(0, "cat")])
    shutil.rmtree(tmp_path / "s/embeddings")
    assert embedded(tmp_path / "s") == []
    with Store.open(tmp_path / "s").writer() as writer:
        assert embed(writer, AxisEmbedder()) == 1


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    with writing(tmp_path / "s") as writer:
        record(writer, [explained(0, "cat")])
        embed(writer, AxisEmbedder())
        [part] = (tmp_path / "s/embeddings").iterdir()
        whole = part.read_bytes()
        part.write_bytes(b"nothing")
        with pytest.raises(UserError, match=r"a part of embeddings in .* is damaged"):
            embed(writer, AxisEmbedder())
        part.write_bytes(whole)


def test_codes_keep_cosines_to_a_thousandth() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((2_000, 384)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    codes = codes_of(vectors).astype(np.float32)
    codes /= np.linalg.norm(codes, axis=1, keepdims=True)
    off = np.abs(codes @ vectors[:50].T - vectors @ vectors[:50].T)
    # Rounding moves a component by at most half of largest/127; its errors are independent, so they add up as a random walk.
    assert 0.0001 < off.max() < 0.0025
    assert codes_of(np.array([[0.5, -1.0, 0.25]], dtype=np.float32)).tolist() == [[64, -127, 32]]


def test_folders_are_known_by_their_full_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert name_of_embedder("model") == str(tmp_path / "model")
    assert name_of_embedder("sentence-transformers/all-MiniLM-L6-v2") == "sentence-transformers/all-MiniLM-L6-v2"

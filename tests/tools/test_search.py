"""Search, worked out by hand: ranks by words, cosines, their fusion, the macros, and what cannot be searched."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pytest
from searched_store import A, AxisEmbedder, B, embed, explained, floor, record, writing

import exegete
from exegete.tools.errors import ToolError, UserError
from exegete.tools.search import By, Found, nearest_to_latent, search
from exegete.tools.store import safe_query

TEXTS = (
    *("the cat", "a kitten", "cat and dog", "the bobcat", "category price", "money", 'a token ", "', "größe ÄRGER"),
    *("猫が好き", "smile 🙂", "it's 100 % \\d+ (x"),
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("searched") / "store"
    with writing(folder) as writer:
        record(writer, [explained(i, text, detection=0.9 - i / 100) for i, text in enumerate(TEXTS)])
        record(writer, [floor(0, TEXTS[0])], floors=True)
        record(writer, [explained(i, text, B) for i, text in enumerate(["puppy", "feline", "a price"])])
        embed(writer, AxisEmbedder())
    return folder


@pytest.fixture(scope="module")
def results(store: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    with exegete.connect(store) as connection:
        yield connection


def find(connection: duckdb.DuckDBPyConnection, phrase: str, by: By = "both", **options: Any) -> Found:
    return search(connection, phrase, by=by, open_embedder=lambda _: AxisEmbedder(), **options)


def latents(found: Found) -> list[tuple[str, int]]:
    return [("AB"[hit.dictionary == B], hit.latent) for hit in found.hits]


def by_words(connection: duckdb.DuckDBPyConnection, phrase: str) -> list[int]:
    return [latent for _, latent in latents(find(connection, phrase, "words"))]


def rows(connection: duckdb.DuckDBPyConnection, query: str, *given: Any) -> list[Any]:
    return connection.execute(query, list(given)).fetchall()


def test_words_are_ranked_by_bm25(tmp_path: Path) -> None:
    with writing(tmp_path / "s") as writer:
        record(writer, [explained(i, text) for i, text in enumerate(["catnap!", "cat dog", "cat cat", "dog dog"])])
    with exegete.connect(tmp_path / "s") as connection:
        found = rows(connection, "SELECT latent, word_score FROM search_words('Cat')")
    # All texts are of one length, so k1·(1 − b + b·1) = 1.2: two make 2·2.2/3.2, one 2.2/2.2, and a beginning counts half.
    assert [latent for latent, _ in found] == [2, 1, 0]
    assert [score for _, score in found] == pytest.approx([4.4 / 3.2, 1.0, 1.1 / 1.7])


def test_longer_texts_rank_lower_and_verbatim_phrases_higher(tmp_path: Path) -> None:
    texts = ["dog cat", "cat dog", "cat dog of a long explanation of other things"]
    with writing(tmp_path / "s") as writer:
        record(writer, [explained(i, text) for i, text in enumerate(texts)])
    with exegete.connect(tmp_path / "s") as connection:
        found = rows(connection, "SELECT latent, word_score FROM search_words('cat dog')")
    relative = 7 / ((7 + 7 + 45) / 3)
    short = 2 * 2.2 / (1 + 1.2 * (0.25 + 0.75 * relative))
    assert [latent for latent, _ in found] == [1, 0, 2]
    assert found[0][1] == pytest.approx(short + 1) and found[1][1] == pytest.approx(short)


@pytest.mark.parametrize(
    ("phrase", "found"),
    [
        ("CAT", [0, 2, 4]),  # "category" begins with it, "bobcat" does not.
        ("dog cat", [2]),
        ("cat zebra", []),
        ("GRÖSSE", []),
        ("Größe", [7]),
        ("ärger GRÖ", [7]),
        ("猫", [8]),
        ("好き", [8]),  # Scripts without spaces have no beginnings of words.
        ("🙂", [9]),
        ('", "', [6]),  # Without a letter or digit, a phrase is looked for as it stands.
        ("%", [10]),
        ("'; DROP TABLE x; --", []),
        ("it's", [10]),
        ("\\d+", [2, 10]),  # A phrase is no regular expression: this is the word "d".
        ("x\0(100", [10]),
        ("\ud83d smile", [9]),
    ],
)
def test_words_are_found_whole_or_as_beginnings(
    results: duckdb.DuckDBPyConnection, phrase: str, found: list[int]
) -> None:
    assert sorted(by_words(results, phrase)) == found


@pytest.mark.parametrize("phrase", ["", "  \n", "\0", "\udc80"])
def test_a_blank_phrase_is_refused(results: duckdb.DuckDBPyConnection, phrase: str) -> None:
    with pytest.raises(UserError, match="is blank; say what to search for"):
        find(results, phrase)


def test_too_long_phrases_are_refused(results: duckdb.DuckDBPyConnection) -> None:
    with pytest.raises(UserError, match="has 10,000 characters; a search takes 1,000"):
        find(results, "x" * 10_000)
    with pytest.raises(UserError, match="has 33 different words; a search for words takes 32"):
        find(results, " ".join(f"w{i}" for i in range(33)), "words")
    with pytest.raises(duckdb.Error, match="search_words takes 32 different words, and this phrase has 33"):
        rows(results, f"FROM search_words('{' '.join(f'w{i}' for i in range(33))}')")
    with pytest.raises(UserError, match="a search for 0 explanations finds nothing"):
        find(results, "cat", limit=0)


def test_meaning_is_the_cosine_beside_that_of_an_explanation_at_random(results: duckdb.DuckDBPyConnection) -> None:
    found = find(results, "feline", "meaning", limit=4)
    # "the cat" is (1, 0, 0, 1)/√2, "cat and dog" (1, 1, 0, 1)/√3, "feline" itself (1, 0, 0, 0).
    assert latents(found) == [("B", 1), ("A", 0), ("A", 1), ("A", 2)]
    expected = [1, math.sqrt(1 / 2), math.sqrt(1 / 2), math.sqrt(1 / 3)]
    assert [hit.cosine for hit in found.hits] == pytest.approx(expected, abs=0.002)
    assert found.cosine_mean == pytest.approx(sum(expected) / 14, abs=0.001)
    assert found.embedded == 14 and found.model == "axes" and found.note is None
    assert all(hit.word_rank is None for hit in found.hits)


def test_both_are_fused_by_reciprocal_ranks(results: duckdb.DuckDBPyConnection) -> None:
    found = find(results, "cat")
    ranks = {hit.latent: hit.word_rank for hit in found.hits if hit.word_rank}
    assert ranks == {0: 1, 2: 2, 4: 3}
    # By meaning: B1 first, then A0 and A1, then A2. A0 is 1st and 2nd, A2 2nd and 4th, A4 3rd and further down, B1 1st alone.
    assert latents(found)[:3] == [("A", 0), ("A", 2), ("A", 4)]
    assert latents(found)[3] == ("B", 1) and found.hits[3].word_rank is None


def test_hits_stand_beside_their_scores_and_floors(results: duckdb.DuckDBPyConnection) -> None:
    [hit] = find(results, "bobcat", "words").hits
    assert (hit.detection, hit.detection_low, hit.detection_high) == pytest.approx((0.87, 0.82, 0.92))
    assert (hit.fuzzing, hit.detection_shuffled, hit.fuzzing_shuffled) == pytest.approx((0.77, 0.5, 0.5))
    [unscored] = find(results, "feline", "words").hits
    assert unscored.detection is None and unscored.detection_shuffled is None


def test_only_of_one_dictionary(results: duckdb.DuckDBPyConnection) -> None:
    assert latents(find(results, "price", dictionary=B))[0] == ("B", 2)
    assert {hit.dictionary for hit in find(results, "price", dictionary=B).hits} == {B}


def test_the_nearest_of_a_latent_leave_itself_out(results: duckdb.DuckDBPyConnection) -> None:
    found = nearest_to_latent(results, A, 0, limit=2)
    # "the cat" and "a kitten" have one vector.
    assert latents(found) == [("A", 1), ("A", 2)]
    assert [hit.cosine for hit in found.hits] == pytest.approx([1, 2 / math.sqrt(6)], abs=0.002)
    assert found.embedded == 13
    assert latents(nearest_to_latent(results, A, 0, limit=1, within=B)) == [("B", 1)]
    with pytest.raises(UserError, match="latent 77 of sha256:aaaaaaaaaaaaaaaa… has no explanation that is embedded"):
        nearest_to_latent(results, A, 77)


def test_the_same_in_sql(results: duckdb.DuckDBPyConnection) -> None:
    found = rows(
        results, "SELECT latent, text, cosine, cosine_mean FROM search_meaning([1, 0, 0, 0]::FLOAT[], most := 2)"
    )
    assert [row[:2] for row in found] == [(1, "feline"), (0, "the cat")]
    assert found[1][2] == pytest.approx(math.sqrt(1 / 2)) and 0 < found[0][3] < 1
    nearest = rows(results, "SELECT latent, text, cosine FROM nearest_explanations('sha256:aaa', 0, most := 2)")
    assert [row[:2] for row in nearest] == [(1, "a kitten"), (2, "cat and dog")]
    assert nearest[0][2] == pytest.approx(1)


def test_agreement_of_two_dictionaries_in_one_query(results: duckdb.DuckDBPyConnection) -> None:
    found = rows(results, "SELECT latent, nearest_latent, cosine, floor FROM explanation_agreement(?, ?)", B, A)
    assert [row[0] for row in found] == [0, 1, 2]
    # "puppy" is nearest to "cat and dog", "feline" to "the cat" or "a kitten", "a price" to "category price".
    assert found[0][1] == 2 and found[1][1] in (0, 1) and found[2][1] == 4
    assert [row[2] for row in found] == pytest.approx([math.sqrt(1 / 3), math.sqrt(1 / 2), 1])
    assert all(row[3] < row[2] for row in found)
    own = rows(results, "SELECT latent, nearest_latent FROM explanation_agreement(?, ?)", B, B)
    assert all(latent != nearest for latent, nearest in own)


def test_agents_search_as_well(store: Path) -> None:
    assert safe_query(store, "SELECT latent FROM search_words('bobcat')").rows == [(3,)]
    nearest = safe_query(store, f"SELECT latent FROM nearest_explanations('{A}', 0) ORDER BY cosine DESC LIMIT 1")
    assert nearest.rows == [(1,)]
    with pytest.raises(ToolError, match="cannot be used here"):
        safe_query(store, "SELECT * FROM read_text('/etc/passwd')")


def test_a_moved_store_is_searched_where_it_is(store: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(store, tmp_path / "former")
    (tmp_path / "former").rename(moved)
    for part in (store / "embeddings").iterdir():
        assert (moved / "embeddings" / part.name).exists()
    with exegete.connect(moved) as connection:
        views = rows(connection, "SELECT sql FROM duckdb_views() WHERE view_name = 'embeddings' AND temporary")
        assert str(moved) in views[0][0]
        assert latents(find(connection, "bobcat"))[0] == ("A", 3)
        assert rows(connection, "SELECT latent FROM nearest_explanations('sha256:aaa', 0, most := 1)") == [(1,)]


def test_without_embeddings_words_are_found_and_it_says_so(tmp_path: Path) -> None:
    with writing(tmp_path / "s") as writer:
        record(writer, [explained(0, "cat")])
    with exegete.connect(tmp_path / "s") as connection:
        found = find(connection, "cat")
        assert latents(found) == [("A", 0)] and found.cosine_mean is None
        assert found.note and "by words alone: the store has no embeddings (exegete embed" in found.note
        assert find(connection, "cat", "words").note is None
        with pytest.raises(UserError, match="the store has no embeddings"):
            find(connection, "cat", "meaning")
        with pytest.raises(UserError, match="has no embedding: the store has no embeddings"):
            nearest_to_latent(connection, A, 0)
        assert rows(connection, "FROM search_meaning([1.0, 0])") == []


def test_another_model_than_the_stores_is_refused_and_the_same_recognised(
    results: duckdb.DuckDBPyConnection,
) -> None:
    with pytest.raises(
        UserError, match="'other' does not give the vectors that the store has; they were made by 'axes'"
    ):
        search(results, "cat", model="other", open_embedder=lambda name: AxisEmbedder(name, turned=1))
    # What is behind a name may have changed as well.
    with pytest.raises(UserError, match="'axes' does not give the vectors"):
        search(results, "cat", open_embedder=lambda name: AxisEmbedder(name, turned=1))
    found = search(results, "cat", model="/elsewhere/axes", open_embedder=AxisEmbedder)
    assert found.model == "axes" and found.hits
    with pytest.raises(UserError, match="give the embedding model that the store has vectors of: 'axes'"):
        search(results, "cat")


def test_with_several_models_one_is_chosen(tmp_path: Path) -> None:
    with writing(tmp_path / "s") as writer:
        record(writer, [explained(0, "cat"), explained(1, "dog price")])
        assert [embed(writer, AxisEmbedder("one")), embed(writer, AxisEmbedder("two", turned=1))] == [2, 2]
    with exegete.connect(tmp_path / "s") as connection:
        opened: Sequence[str] = []

        def opening(name: str) -> AxisEmbedder:
            opened.append(name)  # type: ignore[attr-defined]
            return AxisEmbedder(name, turned=int(name == "two"))

        with pytest.raises(UserError, match="embeddings of 'one', 'two'; choose one with --embedder"):
            search(connection, "cat", open_embedder=opening)
        found = search(connection, "cat", by="meaning", model="two", open_embedder=opening)
        assert (found.model, found.embedded, opened) == ("two", 2, ["two"])
        assert found.hits[0].cosine == pytest.approx(1, abs=0.002)
        assert rows(connection, "SELECT count(*) FROM search_meaning([0, 1, 0, 0], of_model := 'two')") == [(2,)]

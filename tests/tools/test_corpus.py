"""The corpus: every reader, splits that share nothing, contexts packed as stated, damage and reuse."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from exegete.tools.corpus import Corpus, build_corpus
from exegete.tools.corpus_building import split_of_text
from exegete.tools.corpus_readers import Source
from exegete.tools.errors import UserError
from exegete.tools.windows import SPLITS, WINDOW_TOKENS, Split

BOS = 1
SHARES: dict[Split, float] = {"explain": 0.5, "refine": 0.2, "test": 0.3}


def subject(bos: int | None = BOS, vocabulary: int = 1000, max_context: int = 512) -> Any:
    """What the corpus needs of a subject: words `7` … are tokens 7 …; nothing is loaded."""
    return SimpleNamespace(
        name="words",
        bos=bos,
        special_tokens=frozenset({0, 1, 2}),
        max_context=max_context,
        tokenizer_digest=f"sha256:words{vocabulary}",
        pieces=[f" {i}" for i in range(vocabulary)],
        encode=lambda texts: [[int(word) for word in text.split()] for text in texts],
    )


def text_of(rng: np.random.Generator, size: int, vocabulary: int = 1000) -> str:
    return " ".join(map(str, rng.integers(3, vocabulary, size)))


def documents(count: int, longest: int = 700, seed: int = 0, vocabulary: int = 1000) -> list[str]:
    rng = np.random.default_rng(seed)
    return [text_of(rng, int(rng.integers(1, longest)), vocabulary) for _ in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def build(tmp_path: Path, texts: list[str], of: Any = None, name: str = "corpus", **options: Any) -> Corpus:
    source = write_jsonl(tmp_path / "source.jsonl", texts)
    return build_corpus(source, of or subject(), tmp_path / name, **{"seed": 0, "context_tokens": 64, **options})


def texts_of(corpus: Corpus) -> dict[int, list[int]]:
    """Document number → its tokens, read back from the contexts."""
    tokens, mask = corpus.tokens(0, corpus.contexts), corpus.mask(0, corpus.contexts)
    contexts, positions = np.nonzero(mask)
    numbers = corpus.document_of(contexts, positions)
    found: dict[int, list[int]] = defaultdict(list)
    for number, token in zip(numbers.tolist(), tokens[contexts, positions].tolist(), strict=True):
        found[number].append(token)
    return dict(found)


# Packing


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 200), min_size=40, max_size=60), bos=st.sampled_from([BOS, None]))
def test_every_document_is_there_once_whole_and_in_its_split(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], bos: int | None
) -> None:
    rng = np.random.default_rng(0)
    texts = [text_of(rng, size, 60_000) for size in sizes]
    corpus = build(tmp_path_factory.mktemp("c"), texts, subject(bos, 60_000))
    expected = {number: [int(word) for word in text.split()] for number, text in enumerate(dict.fromkeys(texts))}
    assert texts_of(corpus) == expected
    everywhere = np.indices((corpus.contexts, 64))
    numbers = corpus.document_of(everywhere[0], everywhere[1])
    splits = corpus.split_of(np.arange(corpus.contexts))
    for number, text in enumerate(dict.fromkeys(texts)):
        assert {SPLITS[i] for i in splits[(numbers == number).any(1)]} == {split_of_text(text, 0, SHARES)[1]}


def test_a_context_by_hand(tmp_path: Path) -> None:
    # Two documents of one split: 40 and 50 tokens into contexts of 64, each part after a beginning of its own.
    first, second = " ".join(map(str, range(100, 140))), " ".join(map(str, range(200, 250)))
    corpus = build(tmp_path, [first, second], splits={"explain": 1.0})
    assert corpus.contexts == 2 and corpus.counts["tokens"] == 40 + 50 + 3
    tokens, mask = corpus.tokens(0, 2), corpus.mask(0, 2)
    assert tokens[0].tolist() == [BOS, *range(100, 140), BOS, *range(200, 222)]
    assert tokens[1][:29].tolist() == [BOS, *range(222, 250)]
    assert mask[0].tolist() == [False] + [True] * 40 + [False] + [True] * 22
    assert mask[1].tolist() == [False] + [True] * 28 + [False] * 35
    numbers = corpus.document_of(np.array([0, 0, 0, 1, 1, 1]), np.array([0, 40, 41, 0, 28, 29]))
    assert numbers.tolist() == [0, 0, 1, 1, 1, -1]
    assert corpus.usable(0, 2).tolist() == [[True, True], [True, False]]
    assert corpus.tokens(1, 2).dtype == np.int32


def test_no_beginning_stands_alone_at_the_end_of_a_context(tmp_path: Path) -> None:
    # 62 tokens and a beginning leave one place: it is padded, not given to a beginning.
    first, second = " ".join(map(str, range(100, 162))), "300 301"
    corpus = build(tmp_path, [first, second], splits={"explain": 1.0})
    assert corpus.document_of(np.array([0, 0]), np.array([62, 63])).tolist() == [0, -1]
    assert corpus.tokens(1, 2)[0, :3].tolist() == [BOS, 300, 301]


def test_without_a_beginning_of_text_documents_follow_each_other(tmp_path: Path) -> None:
    corpus = build(tmp_path, ["5 6 7", "8 9"], subject(bos=None), splits={"explain": 1.0})
    assert corpus.tokens(0, 1)[0, :5].tolist() == [5, 6, 7, 8, 9]
    assert corpus.mask(0, 1)[0].tolist() == [True] * 5 + [False] * 59


def test_special_tokens_inside_a_text_do_not_count_as_firing(tmp_path: Path) -> None:
    corpus = build(tmp_path, ["5 2 7"], splits={"test": 1.0})
    assert corpus.mask(0, 1)[0, :4].tolist() == [False, True, False, True]
    assert set(corpus.split_of(np.arange(1)).tolist()) == {SPLITS.index("test")}


@pytest.mark.parametrize(("vocabulary", "dtype"), [(1000, np.uint16), (70_000, np.int32)])
def test_large_vocabularies_keep_their_tokens(vocabulary: int, dtype: Any, tmp_path: Path) -> None:
    corpus = build(tmp_path, documents(40, vocabulary=vocabulary), subject(vocabulary=vocabulary))
    assert np.load(corpus.folder / "tokens.npy").dtype == dtype
    assert int(corpus.tokens(0, corpus.contexts).max()) == max(max(t) for t in texts_of(corpus).values())


# Splits


def test_shares_are_as_asked_and_depend_on_seed_and_content_alone() -> None:
    texts = documents(6000, longest=20)
    drawn = [split_of_text(text, 3, SHARES)[1] for text in texts]
    for split, share in SHARES.items():
        assert drawn.count(split) / len(texts) == pytest.approx(share, abs=0.025)
    assert drawn == [split_of_text(f"  {text.upper()}\n", 3, SHARES)[1] for text in texts]
    assert drawn != [split_of_text(text, 4, SHARES)[1] for text in texts]


def test_any_run_of_contexts_holds_all_splits_in_their_proportions(tmp_path: Path) -> None:
    corpus = build(tmp_path, documents(900))
    splits = corpus.split_of(np.arange(corpus.contexts))
    whole = np.bincount(splits, minlength=3) / corpus.contexts
    for start in range(0, corpus.contexts - 200, 200):
        run = np.bincount(splits[start : start + 200], minlength=3) / 200
        assert np.abs(run - whole).max() < 0.02
    assert len({tuple(splits[i : i + 10]) for i in range(0, 500, 10)}) > 10  # and not by a fixed pattern


def test_order_across_blocks_of_contexts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build(tmp_path, documents(300), name="whole")
    monkeypatch.setattr("exegete.tools.corpus_building._BATCH_CONTEXTS", 7)
    monkeypatch.setattr("exegete.tools.corpus_recurrence._BATCH_CONTEXTS", 5)
    monkeypatch.setattr("exegete.tools.corpus_recurrence._WINDOWS_A_FILE", 100)
    blocks = build(tmp_path, documents(300), name="blocks")
    assert blocks.fingerprint == whole.fingerprint and texts_of(blocks) == texts_of(whole)


def test_duplicates_are_dropped_and_counted(tmp_path: Path) -> None:
    texts = documents(60)
    corpus = build(tmp_path, [*texts, texts[3], f" {texts[5]}  ", "", "  \n"])
    assert corpus.counts["documents"] == 60 and corpus.counts["duplicates"] == 2 and corpus.counts["empty"] == 2


def test_windows_that_recur_in_another_split_are_unusable(tmp_path: Path) -> None:
    # The same 31 tokens begin documents of several splits, each after a beginning: their first windows are equal.
    shared = " ".join(map(str, range(500, 531)))
    rng = np.random.default_rng(0)
    texts = [f"{shared} {text_of(rng, 32)}" for _ in range(20)] + documents(40, seed=9)
    corpus = build(tmp_path, texts)
    windows = corpus.tokens(0, corpus.contexts).reshape(-1, WINDOW_TOKENS)
    splits = np.repeat(corpus.split_of(np.arange(corpus.contexts)), 2)
    seen: dict[bytes, set[int]] = defaultdict(set)
    for window, split in zip(windows, splits.tolist(), strict=True):
        seen[window.tobytes()].add(split)
    usable = corpus.usable(0, corpus.contexts).reshape(-1)
    recurs = np.array([len(seen[window.tobytes()]) > 1 for window in windows])
    text = corpus.mask(0, corpus.contexts).reshape(-1, WINDOW_TOKENS).any(1)
    assert (recurs & text).sum() == 20
    assert np.array_equal(usable, text & ~recurs)
    assert corpus.counts["recurring_windows"] == 20 and corpus.counts["usable_windows"] == int(usable.sum())


def test_windows_that_recur_in_their_own_split_stay(tmp_path: Path) -> None:
    shared = " ".join(map(str, range(500, 531)))
    rng = np.random.default_rng(0)
    corpus = build(tmp_path, [f"{shared} {text_of(rng, 32)}" for _ in range(20)], splits={"explain": 1.0})
    assert corpus.counts["recurring_windows"] == 0 and corpus.usable(0, corpus.contexts).all()


# Sources


def in_every_form(folder: Path, texts: list[str]) -> dict[str, str]:
    folder.mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    half = len(lines) // 2
    frames = zstandard.compress(lines[:half]) + zstandard.compress(lines[half:])
    (folder / "a.jsonl.zst").write_bytes(frames)
    (folder / "a.json").write_text(json.dumps(texts))
    (folder / "b.json").write_text(json.dumps([{"text": [text]} for text in texts]))
    (folder / "a.txt").write_text("<|endoftext|>\n".join(f"{text}\n" for text in texts))
    (folder / "b.txt").write_text("\n=====\n".join(texts))
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), folder / "a.parquet")
    return {path.name: str(path) for path in folder.iterdir()}


def test_every_form_gives_the_same_documents(tmp_path: Path) -> None:
    texts = documents(300, longest=60)
    for name, path in in_every_form(tmp_path / "forms", texts).items():
        source = Source(path, separator="=====" if name == "b.txt" else None)
        assert list(source.documents()) == texts, name
    assert list(Source(str(tmp_path / "forms" / "a.json")).documents()) == texts


def test_datasets_on_disk(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    texts = documents(50, longest=30)
    Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "one"))
    DatasetDict(
        {"train": Dataset.from_dict({"body": texts}), "dev": Dataset.from_dict({"body": texts[:7]})}
    ).save_to_disk(str(tmp_path / "two"))
    assert list(Source(str(tmp_path / "one")).documents()) == texts
    assert list(Source(f"hf:{tmp_path / 'one'}").documents()) == texts
    assert list(Source(f"hf:{tmp_path / 'two'}:dev", "body").documents()) == texts[:7]
    assert list(Source(str(tmp_path / "two"), "body").documents()) == texts
    with pytest.raises(UserError, match="no split 'test'; it has train, dev"):
        list(Source(f"hf:{tmp_path / 'two'}:test", "body").documents())
    (tmp_path / "three").mkdir()
    pq.write_table(pa.table({"text": texts}), tmp_path / "three" / "train-00000.parquet")
    assert list(Source(f"hf:{tmp_path / 'three'}").documents()) == texts  # by `datasets`, streamed
    assert list(Source(str(tmp_path / "three")).documents()) == texts  # by this package
    assert Source(str(tmp_path / "one")).identity() != Source(str(tmp_path / "two")).identity()


def test_plain_text_is_gathered_from_paragraphs(tmp_path: Path) -> None:
    paragraphs = [f"{'x' * 900} {i}\nsecond line" for i in range(7)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    found = list(Source(str(tmp_path / "book.txt")).documents())
    assert [document.split("\n\n") for document in found] == [paragraphs[:3], paragraphs[3:6], paragraphs[6:]]


def test_a_text_without_any_separator_is_cut_between_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exegete.tools.corpus_readers.LONGEST_DOCUMENT", 100)
    text = " ".join(f"wörd{i}" for i in range(200))
    for separator in (None, "|"):
        (tmp_path / "long.txt").write_text(text)
        source = Source(str(tmp_path / "long.txt"), separator=separator)
        found = list(source.documents())
        assert " ".join(piece.strip() for piece in found) == text and source.invalid_utf8 == 0
        assert max(len(piece.encode()) for piece in found) <= 200
    (tmp_path / "long.txt").write_text("ö" * 1000)
    source = Source(str(tmp_path / "long.txt"))
    assert "".join(source.documents()) == "ö" * 1000 and source.invalid_utf8 == 0


def test_invalid_utf8_is_replaced_counted_and_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes("5 6<|endoftext|>7 \ufffd ".encode() + b"\xff\xfe 8 \xc3<|endoftext|>9")
    source = Source(str(tmp_path / "bad.txt"))
    assert list(source.documents()) == ["5 6", "7 \ufffd \ufffd\ufffd 8 \ufffd", "9"]
    assert source.invalid_utf8 == 3
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "a \xff b"}\n{"text": "half \\ud83d pair"}\n')
    source = Source(str(tmp_path / "bad.jsonl"))
    assert list(source.documents()) == ["a \ufffd b", "half ? pair"] and source.invalid_utf8 == 2


def test_invalid_utf8_is_reported_by_the_corpus(tmp_path: Path) -> None:
    good = subject()
    good.encode = lambda texts: [[3 + byte for byte in text.encode()] for text in texts]
    body = "<|endoftext|>".join(documents(30)).encode()
    (tmp_path / "bad.txt").write_bytes(body + b"<|endoftext|>x \xff y")
    corpus = build_corpus(str(tmp_path / "bad.txt"), good, tmp_path / "c", seed=0, context_tokens=64)
    assert corpus.counts["invalid_utf8"] == 1 and corpus.counts["documents"] == 31


# Limits, reuse, damage


def test_limits_end_the_reading(tmp_path: Path) -> None:
    texts = documents(100, longest=100)
    assert build(tmp_path, texts, name="a", limit_documents=40).counts["documents"] == 40
    limited = build(tmp_path, texts, name="b", limit_tokens=2000)
    sizes = np.cumsum([len(text.split()) for text in texts])
    assert limited.counts["documents"] == int((sizes <= 2000).sum())


def test_the_same_inputs_give_the_same_corpus_and_are_built_once(tmp_path: Path) -> None:
    texts = documents(60)
    corpus = build(tmp_path, texts)
    built = (corpus.folder / "tokens.npy").stat().st_mtime_ns
    again = build(tmp_path, texts)
    assert again == corpus and (corpus.folder / "tokens.npy").stat().st_mtime_ns == built
    assert build(tmp_path, texts, name="other").fingerprint == corpus.fingerprint
    assert build(tmp_path, texts, name="seeded", seed=1).fingerprint != corpus.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "other", "seeded", "source.jsonl"]


def test_another_corpus_in_the_folder_is_not_overwritten(tmp_path: Path) -> None:
    build(tmp_path, documents(60))
    before = {path.name: path.read_bytes() for path in (tmp_path / "corpus").iterdir()}
    for options in ({"seed": 2}, {"context_tokens": 32}, {"of": subject(vocabulary=2000)}):
        with pytest.raises(UserError, match="another folder"):
            build(tmp_path, documents(60), **options)
    assert {path.name: path.read_bytes() for path in (tmp_path / "corpus").iterdir()} == before


def test_an_interrupted_build_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("exegete.tools.corpus.place_contexts", full_disk)
        with pytest.raises(OSError, match="No space left"):
            build(tmp_path, documents(60))
    assert not (tmp_path / "corpus").exists()
    with pytest.raises(UserError, match="holds no finished corpus"):
        Corpus.open(tmp_path / "corpus")
    assert build(tmp_path, documents(60)).counts["documents"] == 60
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["tokens", "lengths", "splits", "usable", "segment_starts"])
def test_damage_is_noticed_on_opening(name: str, tmp_path: Path) -> None:
    corpus = build(tmp_path, documents(60))
    path = corpus.folder / f"{name}.npy"
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(UserError, match=f"{name}.npy' is damaged"):
        Corpus.open(corpus.folder)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"", "empty.txt", "is empty"),
        (b" \n\n <|endoftext|> ", "blank.txt", "is empty"),
        (b"5 6 7", "one.txt", "1 distinct documents, too few"),
        (b'{"text": "5"}\n{"text": ', "cut.jsonl", "line 2 is not JSON"),
        (b'{"body": "5"}\n', "field.jsonl", "no field 'text'; it has body"),
        (b'{"text": 5}\n', "number.jsonl", "the text is a int"),
        (b'{"text": "5"}', "object.json", "holds a JSON dict"),
        (gzip.compress(b'{"text": "5"}\n' * 99, mtime=0)[:-9], "cut.jsonl.gz", "cannot be read"),
        (zstandard.compress(b'{"text": "5"}\n' * 99)[:4] + b"junkjunk", "cut.jsonl.zst", "cannot be read"),
        (b"PAR1junk", "cut.parquet", "cannot be read"),
        (b"5", "notes.doc", "of no known kind"),
    ],
)
def test_bad_sources_are_one_clear_line_and_leave_nothing(
    content: bytes, name: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        build_corpus(str(tmp_path / name), subject(), tmp_path / "corpus", seed=0, context_tokens=64)
    assert "\n" not in str(caught.value) and name in str(caught.value)
    assert not (tmp_path / "corpus").exists()


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no corpus '/nowhere\.txt'"):
        build_corpus("/nowhere.txt", subject(), tmp_path / "c", seed=0, context_tokens=64)
    with pytest.raises(UserError, match="context_tokens = 100 is not a multiple of 32"):
        build(tmp_path, ["5"], context_tokens=100)
    with pytest.raises(UserError, match=r"takes 100; use 96"):
        build(tmp_path, ["5"], subject(max_context=100), context_tokens=128)
    with pytest.raises(UserError, match="add up to 1"):
        build(tmp_path, ["5"], splits={"explain": 0.5})
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="holds no file of a known kind"):
        build_corpus(str(tmp_path / "bare"), subject(), tmp_path / "c", seed=0, context_tokens=64)

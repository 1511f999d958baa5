from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from exegete.tools.bundled import dictionary_path, subject_path, write_corpus
from exegete.tools.bundled.behaviours import Behaviour, behaviours
from exegete.tools.bundled.grammar import Example, generate, part_of, write
from exegete.tools.bundled.lexicon import COLUMNS, pieces
from exegete.tools.bundled.plans import Condition, Ordering, Plan, Table
from exegete.tools.bundled.tokenizer import build_tokenizer
from exegete.tools.bundled.train_dictionary import HOOK_POINT, collect, losses, measure
from exegete.tools.bundled.train_subject import exact_matches, wilson
from exegete.tools.corpus import Corpus, build_corpus
from exegete.tools.dictionary_loaders import load_dictionary
from exegete.tools.subject import Subject, load_subject


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return list(generate(0, 2000))


@pytest.fixture(scope="module")
def subject() -> Subject:
    return load_subject(str(subject_path()))


@pytest.fixture(scope="module")
def corpus(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("bundled")
    write_corpus(folder / "documents.jsonl", 11, 400)
    return build_corpus(str(folder / "documents.jsonl"), subject, folder / "corpus", seed=0)


@pytest.fixture(scope="module")
def vectors(subject: Subject, corpus: Corpus) -> Tensor:
    return collect(subject, corpus)


def plan() -> Plan:
    orders = Table("orders", (COLUMNS["total"], COLUMNS["city"]))
    return Plan(
        tables=(orders,),
        table=0,
        intent="extreme",
        opener=0,
        form=1,
        columns=(COLUMNS["total"],),
        condition=Condition(COLUMNS["city"], "=", "Paris", -1, 0),
        ordering=Ordering(COLUMNS["total"], "DESC", 1),
        limit=3,
        limit_as_word=True,
    )


def test_a_document_is_written_as_its_plan_says() -> None:
    example = write(plan())
    assert example.text.splitlines() == [
        "tables: orders(id, total, city)",
        "request: list the three largest total values of orders in Paris",
        "sql: SELECT total FROM orders WHERE city = 'Paris' ORDER BY total DESC LIMIT 3 ;",
    ]
    assert f"tables: {example.schema}\nrequest: {example.request}\nsql: {example.sql}" == example.text


def test_causes_point_to_the_words_that_decide() -> None:
    example = write(plan())
    answer = len(example.prompt)

    def causes(piece: str, rule: str) -> list[str]:
        found = [
            i for i in range(answer, len(example.tokens)) if (example.tokens[i], example.rules[i]) == (piece, rule)
        ]
        assert len(found) == 1, (piece, rule)
        return [example.tokens[cause] for cause in example.causes[found[0]]]

    assert causes(" DESC", "sql.order.direction=DESC") == [" largest"]
    assert causes(" 3", "sql.limit.number=3") == [" three", " LIMIT"]
    assert causes("Paris", "sql.value.text") == [" Paris"]
    assert causes(" city", "sql.column.of_value") == [" Paris"]
    assert causes(" orders", "sql.table.copy") == [" orders", " FROM"]


def test_every_token_has_a_rule_and_earlier_causes(examples: list[Example]) -> None:
    for example in examples:
        assert "".join(example.tokens) == example.text
        assert len(example.tokens) == len(example.rules) == len(example.causes) <= 80
        assert all(example.rules)
        assert all(0 <= cause < index for index, causes in enumerate(example.causes) for cause in causes)
        # Nothing of an answer is left to chance.
        assert all(example.causes[len(example.prompt) :])
        assert len(example.tokens) - len(example.prompt) <= 26


def test_same_seed_same_documents_and_each_alone(examples: list[Example]) -> None:
    assert list(generate(0, 2000)) == examples
    assert list(generate(0, 10)) == examples[:10]
    assert list(generate(1, 10)) != examples[:10]


def test_held_out_requests_are_a_tenth_and_never_trained_on(examples: list[Example]) -> None:
    share = sum(part_of(example) == "held_out" for example in examples) / len(examples)
    assert 0.08 < share < 0.12
    trained = {(e.schema, e.request) for e in generate(0, 2000, "train")}
    held_out = {(e.schema, e.request) for e in generate(0, 200, "held_out")}
    assert not trained & held_out


def test_a_request_over_a_schema_has_one_answer(examples: list[Example]) -> None:
    answers: dict[tuple[str, str], str] = {}
    for example in examples:
        assert answers.setdefault((example.schema, example.request), example.sql) == example.sql


def test_every_piece_is_used_and_no_other() -> None:
    used = {piece for example in generate(3, 6000) for piece in example.tokens}
    assert used == set(pieces())
    assert len(pieces()) <= 400


def test_tokenizer_gives_the_pieces_and_the_text_again(examples: list[Example]) -> None:
    from transformers import AutoTokenizer

    for tokenizer in (build_tokenizer(), AutoTokenizer.from_pretrained(subject_path())):
        for example in examples[:300]:
            encoded = tokenizer(example.text)["input_ids"]
            assert tuple(tokenizer.convert_ids_to_tokens(encoded)) == example.tokens
            assert tokenizer.decode(encoded) == example.text


def test_the_corpus_is_one_document_a_line(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a.jsonl", 5, 20)
    texts = [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert texts == [example.text for example in generate(5, 20)]


@pytest.mark.parametrize("behaviour", behaviours(), ids=lambda behaviour: behaviour.name)
def test_minimal_pairs_differ_in_the_cue_alone(behaviour: Behaviour) -> None:
    assert list(behaviour.pairs(0, 30)) == list(behaviour.pairs(0, 30))
    for pair in behaviour.pairs(0, 30):
        assert len(pair.base) == len(pair.variant)
        assert pair.base_answer != pair.variant_answer
        request = pair.base.index("request"), pair.base.index("sql")
        assert pair.cues
        assert all(request[0] < cue < request[1] for cue in pair.cues)
        differing = [i for i, (a, b) in enumerate(zip(pair.base, pair.variant, strict=True)) if a != b]
        assert tuple(differing) == pair.cues


def test_the_grammar_needs_no_torch() -> None:
    code = "import sys, exegete.tools.bundled.behaviours; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_subject_answers_held_out_requests(subject: Subject) -> None:
    right = exact_matches(subject.bridge.original_model, list(generate(21, 24, "held_out")))
    assert sum(right) >= 0.9 * len(right)


def test_the_subject_follows_the_cue(subject: Subject) -> None:
    numbers = {piece: number for number, piece in enumerate(subject.pieces)}
    followed = []
    for behaviour in behaviours():
        for pair in behaviour.pairs(1, 2):
            rows = torch.tensor([[0, *(numbers[piece] for piece in prompt)] for prompt in (pair.base, pair.variant)])
            last = subject.logits(rows)[:, -1].argmax(-1).tolist()
            followed.append([subject.pieces[token] for token in last] == [pair.base_answer, pair.variant_answer])
    assert sum(followed) >= 0.9 * len(followed)


def test_pieces_of_the_subject_read_as_text(subject: Subject, examples: list[Example]) -> None:
    for example, tokens in zip(examples[:20], subject.encode([e.text for e in examples[:20]]), strict=True):
        assert "".join(subject.pieces[token] for token in tokens) == example.text
    assert subject.special_tokens == {0, 1, 2}


@pytest.mark.parametrize("which", ["demo", "tests"])
def test_dictionaries_reconstruct(which: str, subject: Subject, corpus: Corpus, vectors: Tensor) -> None:
    dictionary = load_dictionary(str(dictionary_path(which)), subject)  # type: ignore[arg-type]
    assert (dictionary.hook_point, dictionary.latents) == (HOOK_POINT, 1024)
    measured = measure(dictionary, vectors)
    stated = json.loads((subject_path().parent / "figures.json").read_text())[f"dictionary_{which}"]
    assert measured["l0"] == pytest.approx(stated["l0"], abs=0.5)
    assert measured["fvu"] == pytest.approx(stated["fvu"], rel=0.25)
    assert losses(subject, dictionary, corpus)["loss_recovered"] > 0.9


def test_what_ships_is_small() -> None:
    weights = list(subject_path().parent.glob("*/*.safetensors"))
    assert len(weights) == 3
    assert sum(path.stat().st_size for path in weights) <= 8_000_000


def test_wilson_interval() -> None:
    # Hand-worked: 8 of 10, z = 1.96.
    low, high = wilson(8, 10)
    assert low == pytest.approx(0.4902, abs=1e-4)
    assert high == pytest.approx(0.9433, abs=1e-4)

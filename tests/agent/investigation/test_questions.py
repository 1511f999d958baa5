"""Questions: what is read, what is refused, and that nothing held out is seen in the search."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exegete.agent.investigation.contract import Budget, Case, Question
from exegete.agent.investigation.questions import read_question, split
from exegete.tools.errors import UserError


def asked(prompts: Any, text: str = "Why?", **options: Any) -> Question:
    return read_question(text, prompts, None, options.pop("seed", 0), Budget(), **options)


def question(count: int, seed: int = 0) -> Question:
    return asked([f"prompt {i}" for i in range(count)], seed=seed)


def test_a_file_of_json_lines(tmp_path: Path) -> None:
    lines = [
        {"prompt": "a cat", "answer": " sat", "other": " ran", "variant": "a dog"},
        {"prompt": "b", "id": 7, "note": "kept by whoever wrote the file"},
        {"text": "c", "answer": None},
        {"prompt": "b"},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    found = asked(file, suggested=" the animal ")
    assert found.cases == (Case("a cat", " sat", " ran", "a dog"), Case("b"), Case("c"))
    assert (found.text, found.suggested, found.metric) == ("Why?", "the animal", None)


def test_a_file_of_lines(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one \n\ntwo\n", encoding="utf-8")
    assert asked(tmp_path / "p.txt").cases == (Case("one "), Case("two"))


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "a", "varient": "b"}, "'varient' that is not known. Did you mean 'variant'"),
        ({"prompt": "a", "answer": 3}, "answer = 3"),
        ({"prompt": "a", "answer": "x", "other": "x"}, "as answer and as other"),
        ({"prompt": "a", "variant": "a"}, "its own variant"),
        ({"prompt": "a", "variant": ""}, "variant = ''"),
        ({"answer": "x"}, 'no "text"'),
    ],
)
def test_what_is_no_prompt_is_quoted(tmp_path: Path, record: dict[str, Any], said: str) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(said)):
        asked(tmp_path / "p.jsonl")


def test_one_prompt_with_two_answers() -> None:
    with pytest.raises(UserError, match="'a' is given twice"):
        asked([Case("a", "x"), Case("a", "y")])


@pytest.mark.parametrize(("text", "prompts"), [(" ", ["a"]), ("Why?", [])])
def test_nothing_asked_or_nothing_asked_of(text: str, prompts: list[str]) -> None:
    with pytest.raises(UserError, match=r"empty|no prompt"):
        asked(prompts, text)


@pytest.mark.parametrize(
    ("given", "search", "held_out"), [(8, 4, 4), (12, 6, 6), (16, 8, 8), (20, 12, 8), (30, 18, 12), (100, 60, 40)]
)
def test_sizes_of_the_sides(given: int, search: int, held_out: int) -> None:
    found = split(question(given))
    assert tuple(map(len, found)) == (search, held_out)


def test_too_few_prompts() -> None:
    with pytest.raises(UserError, match="7 different prompts come to 4 for the search and 3 held out"):
        split(question(7))


def test_the_split_is_of_seed_and_texts_not_of_order() -> None:
    forwards, backwards = question(40), asked([f"prompt {i}" for i in reversed(range(40))])
    assert set(split(forwards)[1]) == set(split(backwards)[1])
    assert set(split(forwards)[1]) != set(split(question(40, seed=1))[1])


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=40, max_size=60), st.integers(0, 5))
def test_no_held_out_prompt_or_variant_is_a_search_prompt(pairs: list[tuple[int, int]], seed: int) -> None:
    cases = {one: Case(f"p{one}", variant=None if one == other else f"p{other}") for one, other in pairs}
    try:
        search, held_out = split(asked(list(cases.values()), seed=seed))
    except UserError:  # All hang together.
        return
    assert {*search, *held_out} == set(cases.values()) and len(search) + len(held_out) == len(cases)
    for one, other in ((search, held_out), (held_out, search)):
        assert not {case.prompt for case in one} & {text for case in other for text in (case.prompt, case.variant)}

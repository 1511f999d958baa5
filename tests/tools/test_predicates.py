"""The predicate grammar: hand-worked matches, canonical round trip, totality."""

from __future__ import annotations

import pickle
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exegete.tools.errors import UserError
from exegete.tools.patterns import PatternError, compile_like, compile_matches, quote_like
from exegete.tools.predicates import (
    Constant,
    Member,
    Near,
    Node,
    Not,
    Pattern,
    Position,
    Predicate,
    PredicateError,
    join,
    parse,
    words_of,
)

TOKENS = (" the", " Swi", "fty", ",", " cat", " sat", " 42", "\n")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('token in {" cat", ","}', {3, 4}),
        ('token is " Swi"', {1}),
        ('word is "swifty"', {1, 2}),
        ('word in {"SWIFTY"}', {1, 2}),
        ('word like "*at"', {4, 5}),
        ('token like " S*"', {1}),
        (r'token matches "\\s*\\d+"', {6}),
        (r'token matches " [a-c]at| [x-z]*"', {4}),
        ('after(1): token is " cat"', {3}),
        ('before(2): token is " cat"', {5, 6}),
        ('around(1): token is " cat"', {3, 5}),
        ("position < 2 or position == 7", {0, 1, 7}),
        ("position >= 6 and not position > 6", {6}),
        ('word like "*at" and before(3): token like " the*"', set()),
        ('word like "*at" and before(4): token like " the*"', {4}),
        ("always and not never", set(range(8))),
    ],
)
def test_hand_worked_matches(source: str, expected: set[int]) -> None:
    assert {i for i, held in enumerate(parse(source).matches(TOKENS)) if held} == expected


def test_words_run_across_tokens_and_empty_tokens() -> None:
    assert words_of(["Thr", "", "ifty", "-seven", " b"]) == [("thrifty",), (), ("thrifty",), ("seven",), ("b",)]
    assert words_of([]) == [] and words_of(["", ""]) == [(), ()]


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("", 1),
        ("tokn in {}", 1),
        ('token is "a', 10),
        ("position < x", 12),
        ("(always", 8),
        ('token matches "(a)"', 15),
    ],
)
def test_an_error_names_the_place(source: str, place: int) -> None:
    with pytest.raises(PredicateError, match=f"character {place},") as caught:
        parse(source)
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize("source", ["not " * 100 + "always", "(" * 10_000, "a" * 20_001, "position < " + "9" * 5000])
def test_limits_are_errors_not_overflows(source: str) -> None:
    with pytest.raises(PredicateError):
        parse(source)


def test_patterns_do_not_backtrack() -> None:
    start = time.process_time()
    assert not compile_matches("a*" * 90 + "b")("a" * 5000)
    assert not compile_like("*a" * 90 + "b")("a" * 5000)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("pattern", ["(a)", "a{2}", "a**", "[", "[]", "[z-a]", "\\", "\\n", "^a"])
def test_patterns_outside_the_subset_are_refused(pattern: str) -> None:
    with pytest.raises(PatternError):
        compile_matches(pattern)


text = st.text(max_size=8)
fields = st.sampled_from(["token", "word"])
leaves: st.SearchStrategy[Node] = st.one_of(
    st.builds(Constant, st.booleans()),
    st.builds(Member, fields, st.lists(text, max_size=3).map(tuple)),
    st.builds(Pattern, fields, st.just("like"), text.map(lambda t: f"*{quote_like(t)}?")),
    st.builds(Position, st.sampled_from(["<", "<=", "==", ">=", ">"]), st.integers(0, 40)),
)
nodes = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(Not, inner),
        st.builds(Near, st.sampled_from(["before", "after", "around"]), st.integers(1, 9), inner),
        st.builds(join, st.sampled_from(["and", "or"]), st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=8,
)


@given(nodes, st.lists(text, max_size=6))
def test_the_canonical_source_parses_back(node: Node, tokens: list[str]) -> None:
    predicate = Predicate(node)
    again = parse(str(predicate))
    assert again == predicate and str(again) == str(predicate)
    assert again.matches(tokens).tolist() == predicate.matches(tokens).tolist()
    assert pickle.loads(pickle.dumps(predicate)) == predicate


pieces = st.sampled_from(
    [*'(){}:,"\\<= ', "token", "word", "in", "is", "like", "matches", "and", "or", "not", "before", "3"]
)


@settings(max_examples=300)
@given(st.one_of(st.text(), st.lists(pieces, max_size=30).map(" ".join)))
def test_any_text_parses_or_raises_a_user_error(source: str) -> None:
    try:
        predicate = parse(source)
    except UserError:
        return
    assert len(predicate.matches(TOKENS)) == len(TOKENS)


@given(text, text)
def test_a_quoted_pattern_matches_only_itself(one: str, other: str) -> None:
    accepts = compile_like(quote_like(one))
    assert accepts(one) and accepts(other) == (one == other)

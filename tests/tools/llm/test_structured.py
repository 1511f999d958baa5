"""What counts as an answer that fits."""

from __future__ import annotations

import json

import pytest

from exegete.tools.llm import Message, Reply, Request, schema_text
from exegete.tools.llm.structured import NotFitting, in_words, parse, repair_request, validated

SCHEMA = schema_text({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
LIST = schema_text({"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2})


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1}',
        '  {"a": 1}\n',
        '```json\n{"a": 1}\n```',
        'Sure [see below]: {"a": 1}. Done.',
        '<think>{"a": 7} or [3]?</think>{"a": 1}',
    ],
)
def test_the_only_json_in_the_text(text: str) -> None:
    assert parse(text, SCHEMA) == {"a": 1}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("no", "no JSON"),
        ('{"a": 1} or {"a": 2}', "more than one"),
        ('{"a": 1, "a": 2}', "no JSON"),
        ('{"a": NaN}', "no JSON"),
        ('{"b": 1}', "'a' is a required property"),
        ('{"a": "1"}', r"\$\.a"),
        ('{"a": 1', "no JSON"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_what_does_not_fit_says_why(text: str, why: str) -> None:
    with pytest.raises(NotFitting, match=why):
        parse(text, SCHEMA)


def test_a_part_of_a_broken_answer_is_no_answer() -> None:
    with pytest.raises(NotFitting):
        parse('{"first": [1, 2], "second": ', LIST)


def test_wrong_length() -> None:
    with pytest.raises(NotFitting, match="too long"):
        parse("[1, 2, 3]", LIST)


def test_only_ok_replies_are_looked_at() -> None:
    assert validated(Reply("refused", '{"a": 1}'), SCHEMA).parsed is None
    assert validated(Reply("ok", "text"), None).status == "ok"
    assert validated(Reply("ok", "text"), SCHEMA).status == "unparsed"


def test_repair_shows_the_answer_what_is_wrong_and_the_schema() -> None:
    request = Request((Message("user", "Ask."),), SCHEMA, shared=1)
    repair = repair_request(request, validated(Reply("ok", '{"b": 1}'), SCHEMA))
    assert [message.role for message in repair.messages] == ["user", "assistant", "user"]
    last = repair.messages[-1].text
    assert "'a' is a required property" in last and SCHEMA in last
    assert repair.id("m") != request.id("m")


def test_schema_in_words_leaves_the_shared_messages() -> None:
    request = Request((Message("system", "S"), Message("user", "Ask.")), SCHEMA, shared=1)
    worded = in_words(request)
    assert worded.messages[0] == request.messages[0]
    assert worded.messages[1].text.startswith("Ask.\n\n") and SCHEMA in worded.messages[1].text


def test_no_schema() -> None:
    with pytest.raises(ValueError, match="no JSON Schema"):
        parse("{}", json.dumps({"type": "objekt"}))

"""Schemas from signatures and docstrings, and what a model is told of arguments that do not fit."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from exegete.agent.investigation.schemas import MOST_CHARACTERS, as_written, described, fitting
from exegete.tools.errors import ToolError

if TYPE_CHECKING:
    from exegete.agent.investigation.bench import Bench


def weigh(
    bench: Bench,
    latents: list[int],
    phrase: str,
    share: float = 0.5,
    by: Literal["words", "meaning"] = "words",
    texts: list[str] | None = None,
    deep: bool = False,
    most: int | None = None,
) -> None:
    """Weigh latents.

    Several lines that
    belong together.

    Args:
        latents: which.
        phrase: what is said,
            on two lines.
        share: of all.
        by: how.
        texts: to look at.
        deep: whether far.
        most: at most.

    Raises:
        ToolError: always.
    """


DESCRIPTION, SCHEMA = described(weigh)
GOOD = {"latents": [3], "phrase": "cat"}


def test_a_schema_is_what_signature_and_docstring_say() -> None:
    assert DESCRIPTION == "Weigh latents.\nSeveral lines that belong together."
    assert SCHEMA == {
        "type": "object",
        "properties": {
            "latents": {"type": "array", "items": {"type": "integer"}, "description": "which."},
            "phrase": {"type": "string", "description": "what is said, on two lines."},
            "share": {"type": "number", "description": "of all.", "default": 0.5},
            "by": {"type": "string", "enum": ["words", "meaning"], "description": "how.", "default": "words"},
            "texts": {"type": "array", "items": {"type": "string"}, "description": "to look at."},
            "deep": {"type": "boolean", "description": "whether far.", "default": False},
            "most": {"type": "integer", "description": "at most."},
        },
        "required": ["latents", "phrase"],
        "additionalProperties": False,
    }
    Draft202012Validator.check_schema(SCHEMA)


def test_each_provider_has_its_own_form() -> None:
    openai = as_written("openai", "weigh", DESCRIPTION, SCHEMA)
    assert openai["type"] == "function" and openai["function"]["parameters"] == SCHEMA
    anthropic = as_written("anthropic", "weigh", DESCRIPTION, SCHEMA)
    assert anthropic == {"name": "weigh", "description": DESCRIPTION, "input_schema": SCHEMA}
    plain = as_written("plain", "weigh", DESCRIPTION, SCHEMA)
    assert plain == openai["function"]
    json.dumps([openai, anthropic, plain], allow_nan=False)


def test_arguments_that_fit_come_back_as_python_wants_them() -> None:
    given = {"latents": [3.0, 4], "phrase": "cat", "share": 1, "texts": None, "most": None}
    found = fitting("weigh", given, SCHEMA)
    assert found == {"latents": [3, 4], "phrase": "cat", "share": 1.0}
    assert [type(one) for one in (*found["latents"], found["share"])] == [int, int, float]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"latents": [3]}, "'phrase' is missing (what is said, on two lines.)"),
        ({**GOOD, "latents": "3"}, "'latents' is \"3\"; expected a list, as [3, 17]"),
        ({**GOOD, "latents": 3}, "expected a list, as [3, 17]"),
        ({**GOOD, "latents": [3, "x"]}, "'latents[1]' is \"x\"; expected a whole number"),
        ({**GOOD, "latents": [2.5]}, "expected a whole number"),
        ({**GOOD, "latents": [True]}, "expected a whole number"),
        ({**GOOD, "latents": None}, "'latents' is null; expected a list"),
        ({**GOOD, "by": "sound"}, "'by' is \"sound\"; it is one of 'words', 'meaning'"),
        ({**GOOD, "phrases": "dog"}, "there is no argument 'phrases'; it takes latents, phrase, share (optional)"),
        ({**GOOD, "phrases": "dog"}, "Did you mean 'phrase'?"),
        ({**GOOD, "deep": "yes"}, "expected true or false"),
        ({**GOOD, "share": float("nan")}, "'share' holds NaN"),
        ({**GOOD, "most": 10**400}, "'most' holds NaN, infinity, a number beyond all bounds"),
        ({**GOOD, "texts": ["fine", "\ud83d"]}, "'texts' holds NaN, infinity, a number beyond all bounds or half a character"),
        ({**GOOD, "phrase": "x" * (MOST_CHARACTERS + 1)}, "at most 100,000 are taken"),
        ({}, "'latents' is missing (which.); 'phrase' is missing"),
        ('{"latents": [3', "the arguments are \"{\\\"latents\\\": [3\"; give an object, it takes latents, phrase"),
        (None, "the arguments are null"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_in_words(arguments: Any, words: str) -> None:
    with pytest.raises(ToolError) as told:
        fitting("weigh", arguments, SCHEMA)
    assert words in str(told.value) and str(told.value).startswith("weigh: ")


def test_an_author_must_describe_every_parameter() -> None:
    def silent(bench: Bench, x: int) -> None:
        """Say nothing of x."""

    def bare(bench: Bench) -> None: ...

    def invented(bench: Bench) -> None:
        """Describe what is not there.

        Args:
            y: none.
        """

    def strange(bench: Bench, x: dict[str, int]) -> None:
        """Take what no schema here can say.

        Args:
            x: a mapping.
        """

    for function, kind, words in (
        (silent, ValueError, "says nothing of 'x'"),
        (bare, ValueError, "no docstring"),
        (invented, ValueError, "no parameter 'y'"),
        (strange, TypeError, "a tool cannot take"),
    ):
        with pytest.raises(kind, match=words):
            described(function)

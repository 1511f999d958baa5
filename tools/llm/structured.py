"""Answers that fit a JSON Schema, or say that they do not.

1. The JSON in an answer is the whole text, or what stands in its one code fence, or the only object or array in the prose.
   Two candidates are none: nobody knows which was meant. Reasoning in `<think>` tags is not part of the answer.
2. NaN, infinities and repeated keys are not JSON.
3. What does not fit the schema gets the status "unparsed" and what was wrong as `detail`. `repair_request` asks once more,
   with the answer and what was wrong with it.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from jsonschema.exceptions import SchemaError, best_match  # type: ignore[import-untyped]

from exegete.tools.llm.contract import Message, Reply, Request

_FENCE = re.compile(r"```[\w-]*\s*\n(.*?)```", re.DOTALL)
_BROKEN = re.compile(r"\{\s*\"|\[\s*[\"{\[\d-]")
_MOST_CANDIDATES = 64
_WHY_CHARS = 300


class NotFitting(ValueError):
    """Text without JSON that fits; the message says why, for the model that wrote it."""


def validated(reply: Reply, schema: str | None) -> Reply:
    """Return `reply` with its JSON value in `parsed`, or as "unparsed". Only replies that are "ok" are looked at."""
    if schema is None or reply.status != "ok":
        return reply
    try:
        return replace(reply, parsed=parse(reply.text, schema))
    except NotFitting as error:
        return replace(reply, status="unparsed", parsed=None, detail=str(error))


def parse(text: str, schema: str) -> Any:
    """Return the JSON value in `text` that fits `schema`.

    Raises:
        NotFitting: there is none, more than one, or it does not fit.
        ValueError: `schema` is no JSON Schema.
    """
    bare = text.rpartition("</think>")[2].strip()
    value = _value(bare)
    if (complaint := _complaint(bare, schema)) is not None:
        raise NotFitting(complaint)
    return value


def repair_request(request: Request, reply: Reply) -> Request:
    """Return the request that shows the model its unusable answer and asks again."""
    from exegete.tools.prompting import line, render, spoken

    asked = render("repair", why=line(reply.detail), schema=line(request.schema or "")).messages[-1].text
    turns = (Message("assistant", spoken(reply.text)), Message("user", asked))
    return replace(request, messages=request.messages + turns)


def in_words(request: Request) -> Request:
    """Return `request` with its schema asked for in the last message, for servers that cannot hold a model to it."""
    from exegete.tools.prompting import line, render

    if request.schema is None:
        return request
    *before, last = request.messages
    asked = render("schema", schema=line(request.schema)).messages[-1].text
    return replace(request, messages=(*before, replace(last, text=f"{last.text}\n\n{asked}")))


@lru_cache(maxsize=256)
def schema_value(schema: str) -> dict[str, Any]:
    """Return a schema as a dictionary; it is shared, so leave it as it is. Raises ValueError where it is no JSON Schema."""
    value: dict[str, Any] = json.loads(schema)
    try:
        Draft202012Validator.check_schema(value)
    except SchemaError as error:
        raise ValueError(f"no JSON Schema: {error.message}") from error
    return value


@lru_cache(maxsize=256)
def _validator(schema: str) -> Draft202012Validator:
    return Draft202012Validator(schema_value(schema))


@lru_cache(maxsize=1_024)
def _complaint(text: str, schema: str) -> str | None:
    # Remembered, since holding an answer against a schema takes long and there are only 32 answers of five verdicts.
    error = best_match(_validator(schema).iter_errors(_value(text)))
    return None if error is None else f"at {error.json_path}: {error.message[:_WHY_CHARS]}"


def _value(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        candidates = _candidates(text)
        if len(candidates) == 1:
            return candidates[0]
        why = "there is no JSON in it" if not candidates else "there is more than one JSON value in it"
        raise NotFitting(f"{why} ({error})") from None


def _candidates(text: str) -> list[Any]:
    fenced = _FENCE.findall(text)
    if len(fenced) == 1:
        text = fenced[0]
    found: list[Any] = []
    at = 0
    for _ in range(_MOST_CANDIDATES):
        begin = min((i for i in (text.find("{", at), text.find("[", at)) if i >= 0), default=-1)
        if begin < 0:
            break
        try:
            value, at = _DECODER.raw_decode(text, begin)
            found.append(value)
        except (ValueError, RecursionError):
            if _BROKEN.match(text, begin):
                # What stands inside a broken value is a part of the answer, never the answer.
                return []
            at = begin + 1
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key is repeated")
    return value


_DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_object)

"""The JSON Schema of a tool, from its signature and docstring; and arguments held against it.

1. Every parameter after the first (the bench) is a property. Its type comes from the annotation: int, float, str, bool, a
   `Literal` of strings, lists of these, and `… | None`. It is required unless it has a default.
2. Its description is what `Args:` says of it; the tool's is what stands before `Args:`. A parameter that nothing describes
   is an error of the author, raised when the tool is registered.
3. An argument that is null counts as left out where the parameter has a default: models write it so.
4. What does not fit is said one line a mistake, with what was expected and what came, so that the next call can be right.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jsonschema import Draft202012Validator, ValidationError  # type: ignore[import-untyped]

from exegete.tools.errors import ToolError, nearest

Format = Literal["openai", "anthropic", "plain"]
Schema = dict[str, Any]

MOST_CHARACTERS = 100_000
"""Of the arguments of one call, as JSON."""
_LARGEST = 2**53
_MOST_COMPLAINTS = 5
_SHOWN = 60
_PLAIN = {int: "integer", float: "number", str: "string", bool: "boolean"}
_IN_WORDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "a text",
    "boolean": "true or false",
    "array": "a list",
    "object": "an object",
}
_SECTION = re.compile(r"(Args|Returns|Raises|Yields|Example|Examples|Note):\s*$")
_ARGUMENT = re.compile(r" {4}(\w+):\s*(.*)$")


def described(function: Callable[..., Any], skip: int = 1) -> tuple[str, Schema]:
    """Return the description of a tool and the JSON Schema of its arguments.

    Args:
        function: with a Google docstring.
        skip: so many parameters at the beginning are not the caller's (the bench).

    Raises:
        TypeError: an annotation is none of those above.
        ValueError: there is no docstring, a parameter is not described, or one is that the function has not.
    """
    description, told = _documented(inspect.getdoc(function) or "")
    parameters = list(inspect.signature(function).parameters.values())[skip:]
    _check_described(function, description, told, [one.name for one in parameters])
    types_ = _annotations(function, parameters)
    properties = {
        one.name: _type(types_[one.name]) | {"description": told[one.name]} | _default(one) for one in parameters
    }
    required = [one.name for one in parameters if one.default is inspect.Parameter.empty]
    return description, arguments_schema(properties, required)


def arguments_schema(properties: Mapping[str, Schema], required: list[str]) -> Schema:
    """Return the schema of an object with these properties and no others."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": required,
        "additionalProperties": False,
    }


def as_written(format: Format, name: str, description: str, parameters: Schema) -> Schema:
    """Return a tool as a provider takes it, or as a plain object of `name`, `description` and `parameters`."""
    if format == "anthropic":
        return {"name": name, "description": description, "input_schema": parameters}
    plain = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": plain} if format == "openai" else plain


def fitting(tool: str, arguments: Any, schema: Schema) -> dict[str, Any]:
    """Return arguments that fit `schema`: those that are null and optional left out, whole numbers as int.

    Raises:
        ToolError: they do not fit; every mistake is named.
    """
    if not isinstance(arguments, Mapping):
        raise ToolError(f"{tool}: the arguments are {_seen(arguments)}; give an object, {_takes(schema)}")
    given = {name: value for name, value in arguments.items() if value is not None or name in schema["required"]}
    _check_size(tool, given)
    wrong = sorted(Draft202012Validator(schema).iter_errors(given), key=lambda error: error.json_path)
    if wrong:
        mistakes = [mistake for error in wrong for mistake in _mistakes(error, given, schema)][:_MOST_COMPLAINTS]
        raise ToolError(f"{tool}: {'; '.join(mistakes)}")
    return {name: _numbers(value, schema["properties"][name]) for name, value in given.items()}


def _documented(docstring: str) -> tuple[str, dict[str, str]]:
    """Return what stands before the sections of a docstring, and what `Args:` says of each parameter."""
    before: list[str] = []
    told: dict[str, str] = {}
    section, name = "", ""
    for row in docstring.splitlines():
        if heading := _SECTION.match(row):
            section = heading[1]
        elif not section:
            before.append(row.strip())
        elif section == "Args" and (found := _ARGUMENT.match(row)):
            name = found[1]
            told[name] = found[2]
        elif section == "Args" and row.strip():
            told[name] = f"{told[name]} {row.strip()}"
    paragraphs = "\n".join(before).strip().split("\n\n")
    return "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs), told


def _check_described(function: Callable[..., Any], description: str, told: Mapping[str, str], names: list[str]) -> None:
    name = function.__name__
    if not description:
        raise ValueError(f"tool {name!r} has no docstring; a model would not know what it is for")
    if silent := [one for one in names if not told.get(one)]:
        raise ValueError(f"tool {name!r}: `Args:` says nothing of {', '.join(map(repr, silent))}")
    if unknown := [one for one in told if one not in names]:
        raise ValueError(f"tool {name!r} has no parameter {', '.join(map(repr, unknown))}, which `Args:` describes")


def _annotations(function: Callable[..., Any], parameters: list[inspect.Parameter]) -> dict[str, Any]:
    """Return the types of these parameters alone: that of the bench may be known to type checkers only."""
    holder = type("Holder", (), {"__annotations__": {one.name: one.annotation for one in parameters}})
    return typing.get_type_hints(holder, vars(sys.modules[function.__module__]))


def _type(annotation: Any) -> Schema:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _PLAIN:
        return {"type": _PLAIN[annotation]}
    if origin is Literal and all(isinstance(one, str) for one in inner):
        return {"type": "string", "enum": list(inner)}
    if origin is list:
        return {"type": "array", "items": _type(inner[0])}
    if origin in (typing.Union, types.UnionType):
        others = [one for one in inner if one is not type(None)]
        if len(others) == 1:
            return _type(others[0])
    raise TypeError(f"a tool cannot take {annotation!r}; it takes int, float, str, bool, Literal[…], list[…], … | None")


def _default(parameter: inspect.Parameter) -> Schema:
    empty = parameter.default is inspect.Parameter.empty or parameter.default is None
    return {} if empty else {"default": parameter.default}


def _check_size(tool: str, given: Mapping[str, Any]) -> None:
    if broken := [name for name, value in given.items() if not _ordinary(value)]:
        raise ToolError(f"{tool}: {broken[0]!r} holds NaN, infinity, a number beyond all bounds or half a character")
    length = len(json.dumps(given, default=str))
    if length > MOST_CHARACTERS:
        raise ToolError(
            f"{tool}: the arguments have {length:,} characters; at most {MOST_CHARACTERS:,} are taken: give fewer or "
            "shorter ones"
        )


def _ordinary(value: Any) -> bool:
    """Return whether numbers are finite, and whole ones exact wherever they are taken to; and texts have a UTF-8."""
    if isinstance(value, str):
        return not any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return abs(value) <= _LARGEST
    return all(map(_ordinary, value)) if isinstance(value, list | tuple) else True


def _mistakes(error: ValidationError, given: Mapping[str, Any], schema: Schema) -> list[str]:
    """Return what one error comes to in words, a phrase for each argument that it is about."""
    where = error.json_path.removeprefix("$").removeprefix(".")
    if error.validator == "required":
        return [
            f"{name!r} is missing ({schema['properties'][name]['description']})"
            for name in error.validator_value
            if name not in given and f"'{name}'" in error.message
        ]
    if error.validator == "additionalProperties":
        known = schema["properties"]
        return [
            f"there is no argument {name!r}; {_takes(schema)}.{nearest(name, known)}"
            for name in given
            if name not in known
        ]
    if error.validator == "enum":
        return [f"{where!r} is {_seen(error.instance)}; it is one of {', '.join(map(repr, error.validator_value))}"]
    return [f"{where!r} is {_seen(error.instance)}; expected {_expected(error.schema)}"]


def _expected(schema: Any) -> str:
    words = _IN_WORDS.get(schema.get("type"), "something else")
    inner = schema.get("items", {}).get("type")
    example = {"integer": ", as [3, 17]", "string": ', as ["one", "two"]', "number": ", as [0.5, 2]"}
    return words + example.get(inner, "")


def _takes(schema: Schema) -> str:
    names = ", ".join(
        f"{name}" if name in schema["required"] else f"{name} (optional)" for name in schema["properties"]
    )
    return f"it takes {names or 'no arguments'}"


def _seen(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _numbers(value: Any, schema: Schema) -> Any:
    """JSON Schema takes 3.0 for a whole number and 3 for any; Python does not."""
    if schema.get("type") == "array":
        return [_numbers(one, schema["items"]) for one in value]
    return {"integer": int, "number": float}.get(schema.get("type", ""), lambda same: same)(value)

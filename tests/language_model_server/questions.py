"""A question as both wire formats ask it, and the error that answers a bad one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class RequestError(Exception):
    """The provider answers with this status and message."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code


@dataclass(frozen=True, slots=True)
class Prefix:
    """A beginning of the prompt that the provider may cache."""

    digest: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of a model, whatever the wire format."""

    model: str
    instructions: str
    user: tuple[str, ...]
    """Texts of the user's messages."""
    digest: str
    """Of every message's role and text, and nothing else."""
    schema: Mapping[str, Any] | None
    max_tokens: int | None
    input_tokens: int
    prefixes: tuple[Prefix, ...] = ()
    """Ever longer beginnings: after each message (OpenAI), at each cache_control (Anthropic)."""
    tool: str | None = None
    """The tool that the answer must call."""
    top_logprobs: int | None = None
    """None where no log-probabilities were asked for."""
    offered: tuple[str, ...] = ()
    """Names of the tools that the model may call."""
    results: tuple[str, ...] = ()
    """What its calls have returned so far."""
    structured: bool = False
    turn: int = 0
    """Replies of the model that the conversation has so far."""
    temperature: bool = False


def tokens_of(text: str) -> int:
    """Return the number of tokens that the provider counts: a quarter of the characters, rounded up."""
    return (len(text) + 3) // 4


def digests_of(turns: Sequence[tuple[str, str]]) -> list[str]:
    """Return for each turn the digest of the roles and texts up to it."""
    state = hashlib.blake2b(digest_size=16)
    digests = []
    for role, text in turns:
        data = text.encode(errors="surrogatepass")
        state.update(f"{role} {len(data)}\n".encode() + data)
        digests.append(state.hexdigest())
    return digests


def digest_of(body: Mapping[str, Any]) -> str:
    """Return the digest of a whole request."""
    text = json.dumps(body, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def require(condition: bool, message: str, code: str | None = None) -> None:
    """Raise the error 400 with `message` unless `condition` holds."""
    if not condition:
        raise RequestError(400, message, code)


def check_objects(schema: Any, forbidden: frozenset[str], all_required: bool, path: str = "schema") -> None:
    """Check what providers ask of a strict JSON Schema.

    Raises:
        RequestError: an object leaves `additionalProperties` open, or a property optional where all are required, or a
            keyword of `forbidden` is used.
    """
    if isinstance(schema, list):
        for number, inner in enumerate(schema):
            check_objects(inner, forbidden, all_required, f"{path}[{number}]")
    if not isinstance(schema, dict):
        return
    bad = sorted(forbidden & schema.keys())
    require(not bad, f"Invalid schema: {path}: {', '.join(bad)} is not supported", "invalid_json_schema")
    if schema.get("type") == "object":
        closed = schema.get("additionalProperties") is False
        require(closed, f"Invalid schema: {path}: 'additionalProperties' must be false", "invalid_json_schema")
        optional = set(schema.get("properties", {})) - set(schema.get("required", []))
        require(not (all_required and optional), f"Invalid schema: {path}: missing in 'required': {sorted(optional)}")
    for name, inner in schema.items():
        if name in ("properties", "$defs"):
            for key, value in inner.items():
                check_objects(value, forbidden, all_required, f"{path}.{key}")
        elif name in ("items", "anyOf", "allOf"):
            check_objects(inner, forbidden, all_required, f"{path}.{name}")

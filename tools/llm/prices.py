"""What calls cost: a table in USD per million tokens that users can lay their own over, and the worst case of a request.

1. A call costs what its `usage` says, each kind of token at its price.
2. Before a call, its worst case is `max_tokens` of output and at most one token per byte of text (no byte-level vocabulary
   makes more), with an allowance per message and for what providers add themselves, at the dearest input price.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from exegete.tools.errors import UserError, nearest
from exegete.tools.llm.contract import Message, Request, Usage
from exegete.tools.llm.specs import Spec

_TOKENS_PER_MESSAGE = 16
_TOKENS_ADDED = 1_024
"""Chat templates, and the tool and schema instructions that providers put before a conversation."""


class Price(BaseModel):
    """USD per million tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: float = Field(ge=0, allow_inf_nan=False)
    output: float = Field(ge=0, allow_inf_nan=False)
    cached: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    cache_write: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    batch: float = Field(default=0.5, ge=0, le=1)
    max_input_tokens: int | None = Field(default=None, gt=0)

    def usd(self, usage: Usage, *, batch: bool = False) -> float:
        """Return what a call of this usage costs."""
        fresh = usage.input_tokens - usage.cached_input_tokens - usage.cache_write_tokens
        millions = (
            max(0, fresh) * self.input
            + usage.cached_input_tokens * (self.input if self.cached is None else self.cached)
            + usage.cache_write_tokens * (self.input if self.cache_write is None else self.cache_write)
            + usage.output_tokens * self.output
        )
        return millions * 1e-6 * (self.batch if batch else 1.0)

    def worst_usd(self, request: Request, *, batch: bool = False) -> float:
        """Return what `request` can cost at most.

        Raises:
            UserError: the prompt may be longer than the prices hold for.
        """
        tokens = most_input_tokens(request)
        if self.max_input_tokens is not None and tokens > self.max_input_tokens:
            raise UserError(
                f"a prompt of up to {tokens} tokens, but the price table knows this model up to {self.max_input_tokens}; "
                "give its price for long prompts in your price table"
            )
        dearest = max(self.input, self.cached or 0.0, self.cache_write or 0.0)
        return (tokens * dearest + request.max_tokens * self.output) * 1e-6 * (self.batch if batch else 1.0)


FREE = Price(input=0.0, output=0.0)


def most_input_tokens(request: Request) -> int:
    """Return the number of input tokens that `request` can have at most, whatever the tokenizer."""
    size = sum(map(_size, request.messages)) + sum(len(tool.encode()) + _TOKENS_PER_MESSAGE for tool in request.tools)
    # A schema can be sent natively and in words.
    return size + 2 * len((request.schema or "").encode()) + _TOKENS_ADDED


def _size(message: Message) -> int:
    parts = [message.text]
    # Arguments that are no JSON are sent inside a JSON text, where a character can take six.
    parts += [part for call in message.calls for part in (call.id, call.name, json.dumps(call.arguments_json))]
    parts += [part for result in message.results for part in (result.id, result.text)]
    turns = 1 + len(message.calls) + len(message.results)
    return sum(len(part.encode("utf-8", "replace")) for part in parts) + _TOKENS_PER_MESSAGE * turns


def most_tokens(request: Request) -> int:
    """Return the number of tokens, input and output together, that one sending of `request` can take at most."""
    return most_input_tokens(request) + request.max_tokens


@dataclass(frozen=True, slots=True)
class Prices:
    """Price tables: the user's own, and the one that ships with Exegete."""

    own: Mapping[str, Price]
    shipped: Mapping[str, Price]

    def find(self, spec: Spec) -> Price | None:
        """Return the price of a model, None where neither table has it. Calls to this machine are free unless priced."""
        plain = f"{spec.provider.removesuffix('-batch')}:{spec.model}"
        for name in (spec.name, plain):
            if name in self.own:
                return self.own[name]
        if spec.url is None and plain in self.shipped:
            return self.shipped[plain]
        return FREE if spec.local else None

    def require(self, spec: Spec) -> Price:
        """Return the price of a model.

        Raises:
            UserError: neither table has it; the message says how to give one.
        """
        price = self.find(spec)
        if price is None:
            near = nearest(spec.name, [*self.own, *self.shipped])
            raise UserError(
                f"{spec.name}: no price is known, so a budget cannot be kept; put "
                f'["{spec.name}"] input = …, output = … (USD per million tokens) into a price table, '
                f"or give --no-budget.{near}"
            )
        return price


def load_prices(file: Path | None = None, own: Mapping[str, Mapping[str, Any]] | None = None) -> Prices:
    """Return the shipped prices with those of `file` (TOML, as `prices.toml`) and then `own` laid over them.

    Raises:
        UserError: the file is missing or no TOML, or an entry is not a price.
    """
    entries: dict[str, Any] = {**(_read(file) if file else {}), **(own or {})}
    source = str(file) if file else "prices"
    return Prices({name: _price(source, name, entry) for name, entry in entries.items()}, _shipped())


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"price table {str(file)!r}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"price table {str(file)!r} is not TOML: {error}") from None


def _price(source: str, name: str, entry: Any) -> Price:
    try:
        return Price.model_validate(entry)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([name, *map(str, first["loc"])])
        raise UserError(f"{source}: {where} = {first.get('input')!r}: {first['msg']}") from None


@lru_cache(maxsize=1)
def _shipped() -> Mapping[str, Price]:
    table = tomllib.loads((files("exegete.tools.llm") / "prices.toml").read_text(encoding="utf-8"))
    return {name: Price.model_validate(entry) for name, entry in table.items()}

"""What a command on the live model found, for a person or a program."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from exegete.agent.sql import format_table
from exegete.tools.errors import UserError
from exegete.tools.rendering import visible, visible_json

if TYPE_CHECKING:
    from exegete.tools.estimates import Estimate

FORMATS = ("table", "json")


@dataclass(frozen=True)
class Table:
    """Rows to be shown under a line that says what they are."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Findings:
    """The answer to one command."""

    facts: Mapping[str, Any]
    """Everything, for JSON: what it came from, the parameters, the results."""
    lines: Sequence[str] = ()
    """For a person, before the tables."""
    tables: Sequence[Table] = field(default_factory=tuple)

    def render(self, format: str) -> str:
        """Return it as text. Raises UserError for an unknown format."""
        if format == "json":
            return visible_json(json.dumps(plain(self.facts), ensure_ascii=False, indent=1, allow_nan=False))
        if format != "table":
            raise UserError(f"{format!r} is no format; there are: {', '.join(FORMATS)}")
        parts = ["\n".join(visible(line) for line in self.lines)] if self.lines else []
        for table in self.tables:
            rows = [[visible(cell) if isinstance(cell, str) else cell for cell in row] for row in table.rows]
            parts.append(f"{visible(table.title)}\n{format_table(table.columns, rows)}")
        return "\n\n".join(part.rstrip("\n") for part in parts)


def plain(value: Any) -> Any:
    """Return `value` as JSON takes it: dataclasses and named tuples as objects, arrays as lists, NaN and infinity as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {entry.name: plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def figure(value: float | None, low: float | None = None, high: float | None = None, n: int | None = None) -> str:
    """Return `0.51 [0.48, 0.53] (n = 20)`, leaving out what is not known; an empty string for None."""
    if value is None:
        return ""
    interval = "" if low is None or high is None else f" [{low:.3g}, {high:.3g}]"
    return f"{value:.3g}{interval}{'' if n is None else f' (n = {n})'}"


def estimated(estimate: Estimate | None) -> str:
    """Return an estimate with its interval; an empty string for None."""
    return "" if estimate is None else figure(estimate.value, estimate.low, estimate.high)

"""What a request asks for, drawn at random: the schema, the query, and which phrases say it.

A plan holds every choice, so a minimal pair is a plan and the same plan with one choice replaced (`behaviours`).
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal

from exegete.tools.bundled import lexicon
from exegete.tools.bundled.lexicon import COLUMNS, Aggregate, Column, Direction, Operator

Intent = Literal["rows", "columns", "recorded", "distinct", "aggregate", "count", "top", "extreme"]

_WEIGHTS: dict[Intent, int] = {
    "rows": 3,
    "columns": 5,
    "recorded": 1,
    "distinct": 2,
    "aggregate": 5,
    "count": 3,
    "top": 2,
    "extreme": 2,
}
_EQUALITIES: tuple[Operator, ...] = ("=", "=", "!=")


@dataclass(frozen=True)
class Table:
    """A table of a schema; every one also has `id`, its first column."""

    name: str
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class Condition:
    """A WHERE clause, and how the request says it."""

    column: Column
    operator: Operator
    value: str
    form: int
    """Index into `CONDITIONS`; −1 for `PLACES`, which do not name the column."""
    wording: int
    """Index into the phrases of the operator."""


@dataclass(frozen=True)
class Ordering:
    """An ORDER BY clause; `form` is the index into the phrases of its direction."""

    column: Column
    direction: Direction
    form: int


@dataclass(frozen=True)
class Plan:
    """A schema, a query over one of its tables, and the phrases of the request."""

    tables: tuple[Table, ...]
    table: int
    intent: Intent
    opener: int
    form: int
    """Index into the phrases of the intent; for aggregates, into the words for the function."""
    columns: tuple[Column, ...] = ()
    aggregate: Aggregate | None = None
    group: Column | None = None
    group_form: int = 0
    condition: Condition | None = None
    ordering: Ordering | None = None
    limit: int | None = None
    limit_as_word: bool = False
    limit_form: int = 0


def draw_plan(random: Random, intent: Intent | None = None) -> Plan:
    """Draw a plan: of `intent`, or of one drawn by its weight."""
    tables = _draw_tables(random)
    table = random.randrange(len(tables))
    columns = tables[table].columns
    numbers = [column for column in columns if column.kind == "number"]
    chosen = intent or random.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
    forms = {
        "rows": lexicon.ROWS,
        "columns": lexicon.TARGETS,
        "recorded": lexicon.RECORDED,
        "distinct": lexicon.DISTINCT,
        "aggregate": lexicon.AGGREGATES["SUM"],
        "count": lexicon.COUNTS,
        "top": lexicon.TOPS["ASC"],
        "extreme": lexicon.EXTREMES["ASC"],
    }[chosen]
    targets = {"columns": random.choices((1, 2), (3, 2))[0], "recorded": 1, "distinct": 1}.get(chosen, 0)
    plan_columns = tuple(random.sample(columns, targets))
    if chosen in ("aggregate", "extreme"):
        plan_columns = (random.choice(numbers),)
    group = None
    if chosen in ("aggregate", "count") and random.random() < 0.4:
        group = random.choice([column for column in columns if column.kind == "text"])
    return Plan(
        tables=tables,
        table=table,
        intent=chosen,
        opener=random.randrange(len(lexicon.OPENERS)),
        form=random.randrange(len(forms)),
        columns=plan_columns,
        aggregate=random.choice(list(lexicon.AGGREGATES)) if chosen == "aggregate" else None,
        group=group,
        group_form=random.randrange(len(lexicon.GROUPS)),
        condition=_draw_condition(random, columns) if random.random() < 0.5 else None,
        ordering=_draw_ordering(random, chosen, columns, plan_columns, len(forms)),
        limit=_draw_limit(random, chosen),
        limit_as_word=random.random() < 0.5,
        limit_form=random.randrange(len(lexicon.LIMIT_PHRASES)),
    )


def draw_condition(random: Random, column: Column, operator: Operator | None = None) -> Condition:
    """Draw a condition on `column`: with `operator`, or any that its kind allows."""
    if column.kind == "text":
        equality: Operator = random.choice(_EQUALITIES) if operator is None else operator
        value = random.choice(lexicon.VALUES[column.family])
        place = column.name in ("city", "country") and random.random() < 0.6
        phrases = (lexicon.PLACES if place else lexicon.IDENTITIES)[equality]
        form = -1 if place else random.randrange(len(lexicon.CONDITIONS))
        return Condition(column, equality, value, form, random.randrange(len(phrases)))
    comparison: Operator = random.choice(list(lexicon.COMPARISONS)) if operator is None else operator
    value = str(random.choice(lexicon.YEARS if column.kind == "year" else lexicon.AMOUNTS))
    wording = random.randrange(len(lexicon.COMPARISONS[comparison]))
    return Condition(column, comparison, value, random.randrange(len(lexicon.CONDITIONS)), wording)


def _draw_tables(random: Random) -> tuple[Table, ...]:
    names = random.sample(list(lexicon.TABLES), random.choices((1, 2), (1, 2))[0])
    return tuple(_draw_table(random, name) for name in names)


def _draw_table(random: Random, name: str) -> Table:
    """Draw two to four columns, one of them a number and one a text, so that every intent has its column."""
    pool = [COLUMNS[column] for column in lexicon.TABLES[name]]
    kept = [
        random.choice([c for c in pool if c.kind == "number"]),
        random.choice([c for c in pool if c.kind == "text"]),
    ]
    kept += random.sample([c for c in pool if c not in kept], random.randint(1, 2))
    random.shuffle(kept)
    return Table(name, tuple(kept))


def _draw_condition(random: Random, columns: tuple[Column, ...]) -> Condition:
    return draw_condition(random, random.choice([column for column in columns if column.kind != "date"]))


def _draw_ordering(
    random: Random, intent: Intent, columns: tuple[Column, ...], targets: tuple[Column, ...], forms: int
) -> Ordering | None:
    direction: Direction = random.choice(("ASC", "DESC"))
    sortable = [column for column in columns if column.kind != "text"]
    if intent == "top":
        return Ordering(random.choice(sortable), direction, random.randrange(forms))
    if intent == "extreme":
        return Ordering(targets[0], direction, random.randrange(forms))
    if intent in ("rows", "columns") and random.random() < 0.4:
        return Ordering(random.choice(sortable), direction, random.randrange(len(lexicon.ORDERINGS[direction])))
    return None


def _draw_limit(random: Random, intent: Intent) -> int | None:
    always = intent in ("top", "extreme")
    allowed = intent in ("rows", "columns", "distinct", "recorded")
    if always or (allowed and random.random() < 0.25):
        return random.choice(list(lexicon.LIMITS))
    return None

"""A language of requests over table schemas and the SQL that answers them, with the rule behind every token.

    tables: orders(id, customer, total, city) customers(id, last_name, age)
    request: list the three largest total values of orders in Paris
    sql: SELECT total FROM orders WHERE city = 'Paris' ORDER BY total DESC LIMIT 3 ;

A document is written from a plan (`plans`): the schema, then the request, then the SQL. Each token carries the name of
the rule that wrote it, say `sql.order.direction=DESC`, and the indices of the tokens that determine it, its causes; a
token that the grammar draws at random has none.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Literal

from exegete.tools.bundled import lexicon
from exegete.tools.bundled.lexicon import Column
from exegete.tools.bundled.plans import Condition, Plan, draw_plan
from exegete.tools.seeds import derive_seed

Part = Literal["train", "held_out"]

HELD_OUT_SHARE = 10
"""One in so many pairs of schema and request is never trained on."""
_SPLIT_KEY = b"exegete bundled split"


@dataclass(frozen=True)
class Example:
    """A document and what is known about it. `tokens`, `rules` and `causes` run in parallel."""

    text: str
    tokens: tuple[str, ...]
    """Pieces, which join into the text; a leading space belongs to its word."""
    rules: tuple[str, ...]
    """What wrote each token, for example `request.order.cue=DESC`, `sql.column.copy`."""
    causes: tuple[tuple[int, ...], ...]
    """Indices of the earlier tokens that determine each token."""
    request: str
    schema: str
    sql: str

    @property
    def prompt(self) -> tuple[str, ...]:
        """The tokens up to and including `sql:`, after which the SQL begins."""
        return self.tokens[: self.rules.index("sql.header.colon") + 1]


def generate(seed: int, count: int, part: Part | None = None) -> Iterator[Example]:
    """Yield `count` documents, the one at each index depending on seed, index and `part` only.

    `part` keeps documents to those trained on or to those held out, which share no pair of schema and request.
    """
    for index in range(count):
        random = Random(derive_seed(seed, "bundled grammar", index))
        example = write(draw_plan(random))
        while part is not None and part_of(example) != part:
            example = write(draw_plan(random))
        yield example


def part_of(example: Example) -> Part:
    """Return the part that a document belongs to, decided by a keyed hash of its schema and request."""
    text = f"{example.schema}\n{example.request}".encode()
    hashed = hashlib.blake2b(text, key=_SPLIT_KEY, digest_size=8).digest()
    return "held_out" if int.from_bytes(hashed, "little") % HELD_OUT_SHARE == 0 else "train"


def write(plan: Plan) -> Example:
    """Write the document of a plan."""
    draft = _Draft()
    _write_schema(draft, plan)
    draft.add("\n", "line.end")
    request = len(draft.tokens)
    _write_request(draft, plan)
    draft.add("\n", "line.end")
    sql = len(draft.tokens)
    _write_sql(draft, plan)
    lines = [draft.tokens[: request - 1], draft.tokens[request : sql - 1], draft.tokens[sql:]]
    schema, asked, answer = ("".join(line).split(": ", 1)[1] for line in lines)
    causes = tuple(tuple(sorted(set(found))) for found in draft.causes)
    return Example("".join(draft.tokens), tuple(draft.tokens), tuple(draft.rules), causes, asked, schema, answer)


class _Draft:
    """A document being written, with the places of what later tokens refer to."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.rules: list[str] = []
        self.causes: list[list[int]] = []
        self.places: defaultdict[str, list[int]] = defaultdict(list)
        """What was mentioned → the tokens that did, for example `limit` → the index of ` three`."""

    def add(self, piece: str, rule: str, *causes: str, place: str | None = None) -> None:
        """Append a token, caused by the tokens at the places named `causes`; `<` is the token before."""
        before = {"<": [len(self.tokens) - 1]}
        self.causes.append([index for name in causes for index in before.get(name, self.places[name])])
        if place is not None:
            self.places[place].append(len(self.tokens))
        self.tokens.append(piece)
        self.rules.append(rule)

    def column(self, column: Column, rule: str, cause: str, place: str | None = None, space: str = " ") -> None:
        """Append the one or two pieces of a column that the tokens at `cause` mention."""
        self.add(space + column.pieces[0], rule, cause, place=place)
        for piece in column.pieces[1:]:
            self.add(piece, f"{rule}.second", "<", cause, place=place)

    def phrase(self, phrase: str, rule: str, place: str, slots: Mapping[str, Callable[[], None]]) -> None:
        """Append a phrase of the lexicon: fillers, cues (of `rule`, remembered as `place`) and slots."""
        for word in phrase.split():
            if word in slots:
                slots[word]()
            elif word.startswith("*"):
                self.add(f" {word[1:]}", rule, place=place)
            else:
                self.add("," if word == "," else f" {word}", "request.filler")


def _write_schema(draft: _Draft, plan: Plan) -> None:
    draft.add("tables", "schema.header")
    draft.add(":", "schema.header.colon", "<")
    for number, table in enumerate(plan.tables):
        chosen = number == plan.table
        draft.add(f" {table.name}", "schema.table", place="schema.table" if chosen else None)
        draft.add("(", "schema.open", "<")
        draft.add("id", "schema.id", "<")
        for column in table.columns:
            draft.add(",", "schema.comma")
            place = f"schema.{column.name}" if chosen else None
            draft.column(column, "schema.column", "", place)
        draft.add(")", "schema.close")


def _write_request(draft: _Draft, plan: Plan) -> None:
    draft.add("request", "request.header", "<")
    draft.add(":", "request.header.colon", "<")
    if plan.intent not in ("rows", "count"):
        draft.phrase(lexicon.OPENERS[plan.opener], "request.filler", "opener", {})
    _write_target(draft, plan)
    if plan.condition:
        _write_condition(draft, plan.condition)
    if plan.group:
        _write_group(draft, plan.group, plan.group_form)
    if plan.ordering and plan.intent not in ("top", "extreme"):
        ordering = plan.ordering
        phrase = lexicon.ORDERINGS[ordering.direction][ordering.form]
        slots = {"COLUMN": _mention(draft, ordering.column, "order.column")}
        draft.phrase(phrase, f"request.order.cue={ordering.direction}", "direction", slots)
    if plan.limit and plan.intent not in ("top", "extreme"):
        slots = {"NUMBER": _number(draft, plan)}
        draft.phrase(lexicon.LIMIT_PHRASES[plan.limit_form], "request.limit.cue", "limit.cue", slots)


def _write_target(draft: _Draft, plan: Plan) -> None:
    """Write what is asked for, and of which table."""
    name = plan.tables[plan.table].name

    def table() -> None:
        draft.add(f" {name}", "request.table", "schema.table", place="table")

    def columns() -> None:
        for number, column in enumerate(plan.columns):
            if number:
                draft.add(" and", "request.column.and", place="and")
            _mention(draft, column, f"column.{number}")()

    slots: dict[str, Callable[[], None]] = {"TABLE": table, "COLUMNS": columns, "COLUMN": columns}
    slots["NUMBER"] = _number(draft, plan)
    if plan.intent in ("rows", "count"):
        phrases, rule = (lexicon.ROWS, "rows") if plan.intent == "rows" else (lexicon.COUNTS, "count")
        draft.phrase(phrases[plan.form], f"request.{rule}.cue", "target", slots)
    elif plan.intent == "columns":
        draft.phrase(lexicon.TARGETS[plan.form], "request.filler", "target", slots)
    elif plan.intent in ("recorded", "distinct"):
        words = lexicon.DISTINCT if plan.intent == "distinct" else lexicon.RECORDED
        phrase = f"the *{words[plan.form]} COLUMN values of TABLE"
        draft.phrase(phrase, f"request.{plan.intent}.cue", "target", slots)
    elif plan.aggregate:
        phrase = f"the *{lexicon.AGGREGATES[plan.aggregate][plan.form]} COLUMN of TABLE"
        draft.phrase(phrase, f"request.aggregate.cue={plan.aggregate}", "target", slots)
    elif plan.ordering:
        direction = plan.ordering.direction
        phrase = (lexicon.TOPS if plan.intent == "top" else lexicon.EXTREMES)[direction][plan.ordering.form]
        slots["COLUMN"] = _mention(draft, plan.ordering.column, "order.column")
        draft.phrase(phrase, f"request.order.cue={direction}", "direction", slots)


def _mention(draft: _Draft, column: Column, place: str) -> Callable[[], None]:
    return lambda: draft.column(column, "request.column", f"schema.{column.name}", place)


def _number(draft: _Draft, plan: Plan) -> Callable[[], None]:
    limit = plan.limit or 0
    word = lexicon.LIMITS.get(limit, "") if plan.limit_as_word else str(limit)
    return lambda: draft.add(f" {word}", f"request.limit.number={limit}", place="limit")


def _write_condition(draft: _Draft, condition: Condition) -> None:
    operator, column = condition.operator, condition.column
    rule = f"request.operator.cue={operator}"

    def value() -> None:
        kind = "text" if column.kind == "text" else "number"
        draft.add(f" {condition.value}", f"request.value.{kind}", place="value")

    if condition.form < 0:
        draft.phrase(lexicon.PLACES[operator][condition.wording], rule, "operator", {"VALUE": value})
        # What a place is decides the column: a city or a country.
        draft.places["condition.column"] = draft.places["value"]
        draft.places["where"] = draft.places["operator"]
        return
    phrases = lexicon.IDENTITIES if column.kind == "text" else lexicon.COMPARISONS

    def words() -> None:
        for word in phrases[operator][condition.wording].split():
            draft.add(f" {word}", rule, place="operator")

    slots = {"COLUMN": _mention(draft, column, "condition.column"), "OPERATOR": words, "VALUE": value}
    draft.phrase(lexicon.CONDITIONS[condition.form], "request.where.cue", "where", slots)


def _write_group(draft: _Draft, group: Column, form: int) -> None:
    slots = {"COLUMN": _mention(draft, group, "group")}
    draft.phrase(lexicon.GROUPS[form], "request.group.cue", "group.cue", slots)


def _write_sql(draft: _Draft, plan: Plan) -> None:
    draft.add("sql", "sql.header", "<")
    draft.add(":", "sql.header.colon", "<")
    draft.add(" SELECT", "sql.select", "<")
    _write_selection(draft, plan)
    draft.add(" FROM", "sql.from", "<", "target", "column.0")
    draft.add(f" {plan.tables[plan.table].name}", "sql.table.copy", "<", "table")
    if plan.condition:
        _write_where(draft, plan.condition)
    if plan.group:
        draft.add(" GROUP", "sql.group", "group.cue")
        draft.add(" BY", "sql.group.by", "<")
        draft.column(plan.group, "sql.column.copy", "group")
    if plan.ordering:
        ordering = plan.ordering
        draft.add(" ORDER", "sql.order", "direction")
        draft.add(" BY", "sql.order.by", "<")
        draft.column(ordering.column, "sql.column.copy", "order.column")
        draft.add(f" {ordering.direction}", f"sql.order.direction={ordering.direction}", "direction")
    if plan.limit:
        draft.add(" LIMIT", "sql.limit", "limit.cue", "limit")
        draft.add(f" {plan.limit}", f"sql.limit.number={plan.limit}", "<", "limit")
    draft.add(" ;", "sql.end", "<")


def _write_selection(draft: _Draft, plan: Plan) -> None:
    """Write what stands between SELECT and FROM."""
    if plan.group:
        draft.column(plan.group, "sql.column.copy", "group")
        draft.add(",", "sql.comma", "group.cue")
    if plan.intent in ("rows", "top"):
        draft.add(" *", "sql.star", "target", "direction")
    elif plan.intent == "count":
        draft.add(" COUNT", "sql.aggregate=COUNT", "target")
        for piece, rule in (("(", "open"), ("*", "star"), (")", "close")):
            draft.add(piece, f"sql.count.{rule}", "<")
    elif plan.aggregate:
        draft.add(f" {plan.aggregate}", f"sql.aggregate={plan.aggregate}", "target")
        draft.add("(", "sql.aggregate.open", "<")
        draft.column(plan.columns[0], "sql.column.copy", "column.0", space="")
        draft.add(")", "sql.aggregate.close", "<")
    elif plan.intent == "extreme":
        draft.column(plan.columns[0], "sql.column.copy", "order.column")
    else:
        if plan.intent == "distinct":
            draft.add(" DISTINCT", "sql.distinct", "target")
        for number, column in enumerate(plan.columns):
            if number:
                draft.add(",", "sql.comma", "and")
            draft.column(column, "sql.column.copy", f"column.{number}")


def _write_where(draft: _Draft, condition: Condition) -> None:
    draft.add(" WHERE", "sql.where", "where")
    rule = "sql.column.of_value" if condition.form < 0 else "sql.column.copy"
    draft.column(condition.column, rule, "condition.column")
    # Text without a word for it is compared by `=`.
    draft.add(f" {condition.operator}", f"sql.operator={condition.operator}", "operator", "where")
    if condition.column.kind != "text":
        draft.add(f" {condition.value}", "sql.value.number", "value")
        return
    draft.add(" '", "sql.quote.open", "value")
    draft.add(condition.value, "sql.value.text", "value")
    draft.add("'", "sql.quote.close", "<")

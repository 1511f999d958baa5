"""What a model of the bundled language must do, each behaviour with minimal pairs that test it.

A pair is two prompts of equal length that differ in the cue alone, and the token that must follow each. For
`order.DESC`, say, the prompts end in `… ORDER BY total`, one request says `descending` where the other says
`ascending`, and the answers are ` DESC` and ` ASC`. Patching what a model computed on one into the other, and seeing
whether the answer follows, tests causal claims without a judge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random

from exegete.tools.bundled import lexicon
from exegete.tools.bundled.grammar import write
from exegete.tools.bundled.lexicon import Aggregate, Column, Direction, Operator
from exegete.tools.bundled.plans import Plan, draw_condition, draw_plan
from exegete.tools.seeds import derive_seed

_OPPOSITES: dict[Operator, Operator] = {">": "<", "<": ">", ">=": "<=", "<=": ">=", "=": "!=", "!=": "="}

PlanPair = tuple[Plan, Plan]


@dataclass(frozen=True)
class Pair:
    """Two prompts of equal length that differ in the cue alone, and the piece that follows each."""

    base: tuple[str, ...]
    variant: tuple[str, ...]
    base_answer: str
    variant_answer: str
    cues: tuple[int, ...]
    """Indices at which the prompts differ."""


@dataclass(frozen=True)
class Behaviour:
    """One thing that a model of the language must do."""

    name: str
    description: str
    draw: Callable[[Random], PlanPair | None]
    """Draws a plan and the same plan with the cue changed; None where the plan drawn has no room for it."""

    def pairs(self, seed: int, count: int) -> Iterator[Pair]:
        """Yield `count` minimal pairs, each depending on seed, behaviour and index only."""
        for index in range(count):
            random = Random(derive_seed(seed, "bundled behaviours", self.name, index))
            drawn = self.draw(random)
            while drawn is None:
                drawn = self.draw(random)
            yield _pair(*drawn)


def behaviours() -> list[Behaviour]:
    """Return every behaviour, in a fixed order."""
    found = [_order(direction) for direction in lexicon.ORDERINGS]
    found += [_aggregate(aggregate) for aggregate in lexicon.AGGREGATES]
    found.append(
        Behaviour("aggregate.COUNT", "writes COUNT when a request says to count rows, not to list them", _count)
    )
    found += [_operator(operator) for operator in lexicon.COMPARISONS]
    found += [_limit(number) for number in lexicon.LIMITS]
    found += [
        Behaviour("distinct", "writes DISTINCT when the request wants each value once", _distinct),
        Behaviour("table.copy", "copies the table that the request names, of the two in the schema", _table),
        Behaviour("column.copy", "copies the column that the request names", _column),
        Behaviour("group.column", "puts the column that the request groups by first", _group),
        Behaviour("value.text", "copies the text that the request compares with, between quotes", _text),
        Behaviour("value.number", "copies the number that the request compares with", _number),
        Behaviour("column.of_value", "knows whether a place that the request names is a city or a country", _place),
    ]
    return found


def _pair(base_plan: Plan, variant_plan: Plan) -> Pair:
    base, variant = write(base_plan), write(variant_plan)
    start = len(base.prompt)
    assert start == len(variant.prompt), f"{base.request!r} and {variant.request!r} differ in length"
    both = enumerate(zip(base.tokens[start:], variant.tokens[start:], strict=False), start)
    answer = next(index for index, (ours, theirs) in both if ours != theirs)
    prompts = base.tokens[:answer], variant.tokens[:answer]
    cues = tuple(index for index in range(answer) if prompts[0][index] != prompts[1][index])
    return Pair(*prompts, base.tokens[answer], variant.tokens[answer], cues)


def _order(direction: Direction) -> Behaviour:
    other: Direction = "DESC" if direction == "ASC" else "ASC"

    def draw(random: Random) -> PlanPair | None:
        plan = draw_plan(random)
        if plan.ordering is None:
            return None
        both = (replace(plan, ordering=replace(plan.ordering, direction=way)) for way in (direction, other))
        return next(both), next(both)

    way = {"ASC": "from low to high", "DESC": "from high to low"}[direction]
    return Behaviour(f"order.{direction}", f"writes {direction} when the request sorts {way}", draw)


def _aggregate(aggregate: Aggregate) -> Behaviour:
    def draw(random: Random) -> PlanPair:
        plan = draw_plan(random, "aggregate")
        other = random.choice([name for name in lexicon.AGGREGATES if name != aggregate])
        return replace(plan, aggregate=aggregate), replace(plan, aggregate=other)

    words = ", ".join(lexicon.AGGREGATES[aggregate])
    return Behaviour(f"aggregate.{aggregate}", f"writes {aggregate} when the request says one of: {words}", draw)


def _count(random: Random) -> PlanPair:
    plan = replace(draw_plan(random, "count"), form=0, group=None)
    return plan, replace(plan, intent="rows")


def _operator(operator: Operator) -> Behaviour:
    def draw(random: Random) -> PlanPair:
        plan = draw_plan(random)
        column = random.choice([column for column in plan.tables[plan.table].columns if column.kind == "number"])
        condition = draw_condition(random, column, operator)
        other = replace(condition, operator=_OPPOSITES[operator])
        return replace(plan, condition=condition), replace(plan, condition=other)

    words = ", ".join(lexicon.COMPARISONS[operator])
    return Behaviour(f"operator.{operator}", f"writes {operator} when the request says one of: {words}", draw)


def _limit(number: int) -> Behaviour:
    def draw(random: Random) -> PlanPair | None:
        plan = draw_plan(random)
        if plan.limit is None:
            return None
        other = random.choice([limit for limit in lexicon.LIMITS if limit != number])
        return replace(plan, limit=number), replace(plan, limit=other)

    word = lexicon.LIMITS[number]
    return Behaviour(f"limit.{number}", f"writes LIMIT {number} when the request wants {word} rows or {number}", draw)


def _distinct(random: Random) -> PlanPair:
    plan = draw_plan(random, "distinct")
    return plan, replace(plan, intent="recorded")


def _table(random: Random) -> PlanPair | None:
    plan = draw_plan(random, random.choice(("rows", "count")))
    if len(plan.tables) < 2:
        return None
    plan = replace(plan, condition=None, group=None, ordering=None)
    return plan, replace(plan, table=1 - plan.table)


def _column(random: Random) -> PlanPair | None:
    plan = draw_plan(random, "columns")
    other = _another(random, plan, plan.columns[0])
    if other is None:
        return None
    return replace(plan, columns=plan.columns[:1]), replace(plan, columns=(other,))


def _group(random: Random) -> PlanPair | None:
    plan = draw_plan(random, random.choice(("aggregate", "count")))
    other = _another(random, plan, plan.group) if plan.group else None
    return None if other is None or other.kind != "text" else (plan, replace(plan, group=other))


def _another(random: Random, plan: Plan, column: Column) -> Column | None:
    """Draw another column of the table with as many pieces and another first one, if there is any."""
    return random.choice(
        [
            other
            for other in plan.tables[plan.table].columns
            if len(other.pieces) == len(column.pieces) and other.pieces[0] != column.pieces[0]
        ]
        or [None]
    )


def _text(random: Random) -> PlanPair | None:
    plan = draw_plan(random)
    condition = plan.condition
    if condition is None or condition.column.kind != "text":
        return None
    values = [value for value in lexicon.VALUES[condition.column.family] if value != condition.value]
    return plan, replace(plan, condition=replace(condition, value=random.choice(values)))


def _number(random: Random) -> PlanPair | None:
    plan = draw_plan(random)
    condition = plan.condition
    if condition is None or condition.column.kind == "text":
        return None
    values = map(str, lexicon.YEARS if condition.column.kind == "year" else lexicon.AMOUNTS)
    value = random.choice([value for value in values if value != condition.value])
    return plan, replace(plan, condition=replace(condition, value=value))


def _place(random: Random) -> PlanPair | None:
    plan = draw_plan(random)
    condition = plan.condition
    if condition is None or condition.form >= 0:
        return None
    others = [c for c in plan.tables[plan.table].columns if c.name in ("city", "country") and c != condition.column]
    if not others:
        return None
    value = random.choice(lexicon.VALUES[others[0].family])
    return plan, replace(plan, condition=replace(condition, column=others[0], value=value))

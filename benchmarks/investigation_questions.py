"""The questions of `benchmarks.investigations`: every behaviour of the bundled grammar, and two kinds of null questions.

1. *behaviour*: prompts that end before the token in question, each with a minimal pair that lacks the cue.
2. *absent*: the subject does not do what is asked about: another token is asked for than the one it writes, or one that is
   never written there.
3. *unrelated*: the behaviour is there, but the suggested cause has nothing to do with it. A plan of the grammar and the same
   plan with one choice replaced that leaves the token in question alone: another table, a column that is not asked for,
   another number elsewhere. Prompt and variant have as many tokens.

Beside each stand fresh prompts, drawn with another seed and none of them asked about, to judge what is claimed.

    tables: books(id,author,price) request: list the price of books in descending order of price
    sql: SELECT price FROM books ORDER BY price            → ` DESC`
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

from exegete.agent.investigation.contract import Budget, Case, Metric, Question
from exegete.agent.investigation.questions import read_question
from exegete.tools.bundled import lexicon
from exegete.tools.bundled.behaviours import Behaviour, Pair, behaviours
from exegete.tools.bundled.grammar import write
from exegete.tools.bundled.lexicon import COLUMNS, Operator
from exegete.tools.bundled.plans import Plan, Table
from exegete.tools.seeds import derive_seed

Kind = Literal["behaviour", "absent", "unrelated"]
Change = Callable[[Random, Plan], Plan | None]
"""Replaces one choice of a plan; None where it has no room for that."""

SAID = Metric("log_probability")
"""Shown where the answer is likelier than not."""
PREFERRED = Metric("log_odds")


@dataclass(frozen=True)
class Asked:
    """One question of the suite."""

    name: str
    kind: Kind
    question: Question
    fresh: tuple[Case, ...]
    """Prompts of the same kind that no agent sees."""


@dataclass(frozen=True)
class Absent:
    """A behaviour that the subject does not have."""

    prompts: str
    """The behaviour whose prompts are taken."""
    says: str
    """What it is said to do."""
    answer: str | None = None
    """Token that it is asked about; None for the one that the variant calls for."""
    other: str | None = None
    metric: Metric = SAID
    variants: bool = True


@dataclass(frozen=True)
class Unrelated:
    """A behaviour and a cause that is none."""

    prompts: str
    suggested: str
    change: Change


def suite(seed: int, prompts: int, fresh: int, budget: Budget) -> list[Asked]:
    """Return all questions, in a fixed order, with as many prompts and fresh prompts each as the grammar has, at most."""
    known = {behaviour.name: behaviour for behaviour in behaviours()}

    def asked(kind: Kind, name: str, text: str, cases: Iterator[Case], metric: Metric, suggested: str) -> Asked:
        given, kept = _drawn(cases, prompts, fresh)
        return Asked(name, kind, read_question(text, given, metric, seed, budget, suggested), kept)

    found = []
    for behaviour in known.values():
        text, cue = f"The model {behaviour.description}. Why?", "the words in which each prompt and its variant differ"
        found.append(asked("behaviour", behaviour.name, text, _pairs(behaviour, seed), SAID, cue))
    for one in ABSENT:
        text, cases = f"Why does the model {one.says}?", _without(known[one.prompts], one, seed)
        found.append(asked("absent", f"{one.prompts}: {one.says}", text, cases, one.metric, ""))
    for cause in UNRELATED:
        behaviour = known[cause.prompts]
        text = f"The model {behaviour.description}. Is it because of {cause.suggested}?"
        cases = _changed(behaviour, cause.change, seed)
        found.append(asked("unrelated", f"{cause.prompts}: {cause.suggested}", text, cases, SAID, cause.suggested))
    return found


def _drawn(cases: Iterator[Case], prompts: int, fresh: int) -> tuple[list[Case], tuple[Case, ...]]:
    """Return cases of different prompts: those asked about, and others of which none is a prompt or variant of these."""
    found: dict[str, Case] = {}
    for _, case in zip(range(3 * (prompts + fresh)), cases, strict=False):
        found.setdefault(case.prompt, case)
        if len(found) == prompts + fresh:
            break
    different = list(found.values())
    most = min(prompts, len(different) * prompts // (prompts + fresh))
    given = different[:most]
    seen = {text for case in given for text in (case.prompt, case.variant)}
    return given, tuple(case for case in different[most:] if case.prompt not in seen)


def _pairs(behaviour: Behaviour, seed: int) -> Iterator[Case]:
    for pair in behaviour.pairs(derive_seed(seed, "investigations"), 1_000_000):
        yield _case(pair)


def _case(pair: Pair) -> Case:
    return Case("".join(pair.base), pair.base_answer, pair.variant_answer, "".join(pair.variant))


def _without(behaviour: Behaviour, absent: Absent, seed: int) -> Iterator[Case]:
    for case in _pairs(behaviour, seed):
        answer = absent.answer or case.other
        other = (absent.other or case.answer) if absent.metric.kind == "log_odds" else None
        yield Case(case.prompt, answer, other, case.variant if absent.variants else None)


def _changed(behaviour: Behaviour, change: Change, seed: int) -> Iterator[Case]:
    for index in range(1_000_000):
        random = Random(derive_seed(seed, "unrelated causes", behaviour.name, index))
        case = None
        while case is None:
            drawn = behaviour.draw(random)
            varied = change(random, drawn[0]) if drawn else None
            case = _unmoved(drawn[0], drawn[1], varied) if drawn and varied else None
        yield case


def _unmoved(base_plan: Plan, cued_plan: Plan, varied_plan: Plan) -> Case | None:
    """Return the case, None where what follows changes, or its place, or nothing before it does."""
    base, cued, varied = (write(plan).tokens for plan in (base_plan, cued_plan, varied_plan))
    start = len(write(base_plan).prompt)
    both = enumerate(zip(base[start:], cued[start:], strict=False), start)
    at = next(index for index, (ours, theirs) in both if ours != theirs)
    if len(write(varied_plan).prompt) != start or varied[at : at + 1] != base[at : at + 1] or varied[:at] == base[:at]:
        return None
    return Case("".join(base[:at]), base[at], cued[at], "".join(varied[:at]))


def _opener(random: Random, plan: Plan) -> Plan | None:
    """Another word for `list`, `show`, … ."""
    words = len(lexicon.OPENERS[plan.opener].split())
    others = [i for i, text in enumerate(lexicon.OPENERS) if len(text.split()) == words and i != plan.opener]
    return replace(plan, opener=random.choice(others)) if others and plan.intent not in ("rows", "count") else None


def _other_table(random: Random, plan: Plan) -> Plan | None:
    """Another name for the table of the schema that is not asked about."""
    return _renamed(random, plan, 1 - plan.table) if len(plan.tables) == 2 else None


def _named_table(random: Random, plan: Plan) -> Plan | None:
    """Another name for the table that is asked about."""
    return _renamed(random, plan, plan.table)


def _renamed(random: Random, plan: Plan, number: int) -> Plan | None:
    table = plan.tables[number]
    columns, used = {column.name for column in table.columns}, {one.name for one in plan.tables}
    fitting = [name for name, has in lexicon.TABLES.items() if name not in used and columns <= set(has)]
    return _with_table(plan, number, replace(table, name=random.choice(fitting))) if fitting else None


def _idle_column(random: Random, plan: Plan) -> Plan | None:
    """Another column in place of one that nothing asks for."""
    table = plan.tables[plan.table]
    asked = [
        *plan.columns,
        plan.group,
        plan.condition and plan.condition.column,
        plan.ordering and plan.ordering.column,
    ]
    idle = [column for column in table.columns if column not in asked]
    if not idle:
        return None
    old = random.choice(idle)
    pool = [COLUMNS[name] for name in lexicon.TABLES[table.name]]
    fitting = [new for new in pool if new not in table.columns and len(new.pieces) == len(old.pieces)]
    if not fitting:
        return None
    new = random.choice(fitting)
    columns = tuple(new if column == old else column for column in table.columns)
    return _with_table(plan, plan.table, replace(table, columns=columns))


def _with_table(plan: Plan, number: int, table: Table) -> Plan:
    return replace(plan, tables=tuple(table if i == number else one for i, one in enumerate(plan.tables)))


def _compared_value(random: Random, plan: Plan) -> Plan | None:
    """Another value in the condition."""
    condition = plan.condition
    if condition is None:
        return None
    numbers = lexicon.YEARS if condition.column.kind == "year" else lexicon.AMOUNTS
    texts = lexicon.VALUES.get(condition.column.family, ())
    values: Sequence[str] = texts if condition.column.kind == "text" else [str(number) for number in numbers]
    value = random.choice([value for value in values if value != condition.value])
    return replace(plan, condition=replace(condition, value=value))


def _comparison(random: Random, plan: Plan) -> Plan | None:
    """The opposite comparison in the condition."""
    opposites: dict[Operator, Operator] = {">": "<", "<": ">", ">=": "<=", "<=": ">="}
    condition = plan.condition
    if condition is None or condition.operator not in opposites:
        return None
    return replace(plan, condition=replace(condition, operator=opposites[condition.operator]))


def _direction(random: Random, plan: Plan) -> Plan | None:
    """The other order."""
    if plan.ordering is None:
        return None
    other: lexicon.Direction = "ASC" if plan.ordering.direction == "DESC" else "DESC"
    return replace(plan, ordering=replace(plan.ordering, direction=other))


def _function(random: Random, plan: Plan) -> Plan | None:
    """Another aggregate."""
    others = [name for name in lexicon.AGGREGATES if name != plan.aggregate]
    return replace(plan, aggregate=random.choice(others)) if plan.aggregate else None


ABSENT: tuple[Absent, ...] = (
    Absent("order.DESC", "write ASC here"),
    Absent("limit.3", "ask for another number of rows than the request does"),
    Absent("aggregate.MAX", "prefer another function to MAX here", metric=PREFERRED),
    Absent("operator.>", "prefer < to > here", metric=PREFERRED),
    Absent("order.ASC", "begin the limit here", answer=" LIMIT", variants=False),
    Absent("table.copy", "take the table that the request does not name"),
    Absent("distinct", "count here", answer=" COUNT", variants=False),
    Absent("column.copy", "write a column that the request does not name", variants=False),
    Absent("value.text", "prefer another text to the one asked for", metric=PREFERRED),
    Absent("order.DESC", "prefer MAX to MIN here", answer=" MAX", other=" MIN", metric=PREFERRED),
)

UNRELATED: tuple[Unrelated, ...] = (
    Unrelated("order.DESC", "the word that the request opens with", _opener),
    Unrelated("order.ASC", "the other table of the schema", _other_table),
    Unrelated("order.DESC", "a column of the schema that is not asked for", _idle_column),
    Unrelated("limit.3", "the order that the rows are sorted in", _direction),
    Unrelated("limit.5", "the value that the rows are compared with", _compared_value),
    Unrelated("aggregate.MAX", "the table that the request names", _named_table),
    Unrelated("aggregate.SUM", "whether the rows are to be above or below a number", _comparison),
    Unrelated("operator.>", "the number that is compared with", _compared_value),
    Unrelated("operator.=", "the word that the request opens with", _opener),
    Unrelated("group.column", "the function that is computed", _function),
)

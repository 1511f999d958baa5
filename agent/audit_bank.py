"""The bank of planted latents that evaluators are audited on: what they stand for, and the text that they fire on.

All of it comes from the bundled grammar, whose every token is known: the words of its lexicon (values of text columns, columns,
tables, cues of the request, words of SQL), bound to places where its rules put them, and pairs of unrelated senses.

No explainer or evaluator may know this file: it holds the answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from exegete.evaluators.audit_evidence import Pieces
from exegete.evaluators.audit_truths import Place, Sense, Truth
from exegete.tools.bundled import lexicon
from exegete.tools.bundled.grammar import Part, generate
from exegete.tools.bundled.lexicon import COLUMNS, TABLES, VALUES
from exegete.tools.seeds import derive_seed, generator
from exegete.tools.windows import Split

Kind = Literal["words", "placed", "two senses"]

MEANINGS = {
    "city": "Names of cities",
    "country": "Names of countries",
    "color": "Names of colours",
    "status": "States of an order or a case",
    "category": "Categories of products",
    "genre": "Genres of films, books or music",
    "department": "Departments of a company",
    "brand": "Names of brands",
    "language": "Names of languages",
    "person": "First names of people",
}
CUES: dict[str, tuple[str, ...]] = {
    "Words that ask for an average or a sum": ("average", "mean", "typical", "combined", "overall"),
    "Words for the smallest or the largest value": ("lowest", "smallest", "minimum", "highest", "largest", "maximum"),
    "Words for the direction of an order": ("ascending", "increasing", "descending", "decreasing"),
    "Words that compare numbers": ("over", "above", "under", "below", "greater", "smaller", "exactly"),
    "Words that limit how many rows are wanted": ("only", "just", "limit", "most"),
    "Words that open a condition": ("whose", "where", "with"),
    "Words for the two ends of a ranking": ("top", "bottom", "first", "last"),
    "Numbers written as words": tuple(lexicon.LIMITS.values()),
    "Aggregate functions of SQL": ("SUM", "AVG", "MIN", "MAX"),
    "Directions in SQL": ("ASC", "DESC"),
}
SQL_WORDS = ("Aggregate functions of SQL", "Directions in SQL")
QUOTED = Place('before(1): token is " \'"', "right after an opening quotation mark")
UNQUOTED = Place('not before(1): token is " \'"', "not right after a quotation mark")
SELECTED = Place('before(1): token in {" SELECT", " DISTINCT"}', "right after SELECT or DISTINCT")
SORTED = Place('before(1): token is " BY"', "right after BY in capitals")
COMPARED = Place('before(1): token is " WHERE"', "right after WHERE in capitals")
COMPUTED = Place('before(1): token is "("', "right after an opening bracket")
LISTED = Place('before(1): token is ","', "right after a comma")
FROM = Place('before(1): token is " FROM"', "right after FROM in capitals")
OF = Place('before(1): word in {"of", "from", "all"}', "right after of, from or all")
DECLARED = Place('before(1): token in {":", ")"}', "right after a colon or a closing bracket")
LIMITED = Place('before(1): token is " LIMIT"', "right after LIMIT in capitals")
OPERATED = Place('before(1): token in {" =", " !=", " >", " <", " >=", " <="}', "right after a sign that compares")

PAIRING_TOKENS = 20_000
"""On which it is measured how often senses fire."""
MOST_APART = 4.0
"""Ratio of the rates of the two senses of a pair."""

Rows = tuple[str, tuple[str, ...], Place, Place]


def truths(seed: int, count: int | None = None) -> list[tuple[Kind, Truth]]:
    """Return planted truths: `count` of them, of the three kinds in turn, or all there are.

    Args:
        seed: of the pairs of senses, and of the choice where `count` is less than all.
        count: how many.
    """
    words, placed = list(_words()), list(_placed())
    pairs = _pairs(words, placed, seed)
    kinds: dict[Kind, list[Truth]] = {"words": words, "placed": placed, "two senses": pairs}
    if count is None:
        return [(kind, truth) for kind, found in kinds.items() for truth in found]
    orders = {kind: generator(seed, "truths", kind).permutation(len(found)).tolist() for kind, found in kinds.items()}
    turns = [
        (kind, kinds[kind][orders[kind][turn]])
        for turn in range(max(map(len, kinds.values())))
        for kind in kinds
        if turn < len(kinds[kind])
    ]
    return turns[:count]


def live_truths(seed: int) -> dict[str, list[Truth]]:
    """Return truths for latents of the live subject: `written` has words that stand in the SQL of the language, `read`
    words that are frequent in its documents, `both` such that are both."""
    tables, columns = sorted(TABLES), _columns("number", "text")
    named = [
        *(
            Truth(f"tables {n}", (_sense("Names of tables", some, "Names of tables", tables),))
            for n, some in _parts(tables, 3, seed)
        ),
        *(
            Truth(f"columns {n}", (_sense("Names of columns", some, "Names of columns", columns),))
            for n, some in _parts(columns, 4, seed)
        ),
    ]
    lists = {truth.name: truth for truth in _words()}
    both = [*(lists[name] for name in SQL_WORDS), *named]
    written = [*(lists[family] for family in MEANINGS), *both]
    read = [*(truth for name, truth in lists.items() if name not in (*MEANINGS, *SQL_WORDS)), *both]
    return {"written": written, "read": read, "both": both}


def _parts(words: Sequence[str], count: int, seed: int) -> Iterator[tuple[int, tuple[str, ...]]]:
    order = generator(seed, "parts", count).permutation(len(words)).tolist()
    for number in range(count):
        yield number + 1, tuple(sorted(words[i] for i in order[number::count]))


def stream(split: Split, tokens: int, seed: int) -> Pieces:
    """Return documents one after the other, `tokens` tokens in all or just over; they are of this split alone."""
    pieces: list[str] = []
    for example in generate(derive_seed(seed, "audit", split), tokens):
        pieces += [*example.tokens, "\n"]
        if len(pieces) >= tokens:
            break
    return tuple(pieces)


def documents(split: Split, count: int, seed: int, *, whole: bool = False, part: Part | None = "held_out") -> list[str]:
    """Return texts of documents, cut somewhere in their SQL unless `whole`; of those that the subject was not trained on."""
    found = []
    for index, example in enumerate(generate(derive_seed(seed, "audit live", split), count, part)):
        rest = len(example.tokens) - len(example.prompt)
        cut = 0 if whole else min(rest, 4 + int(generator(seed, "cut", split, index).integers(5)))
        found.append("".join(example.tokens[: len(example.tokens) - cut]))
    return found


def _words() -> Iterator[Truth]:
    """Word lists, wherever the words stand."""
    for family, meaning in MEANINGS.items():
        yield Truth(family, (_value(family, meaning),))
    cues = sorted({word for words in CUES.values() for word in words})
    for meaning, listed in CUES.items():
        yield Truth(meaning, (_sense(meaning, listed, "Words that say how rows are chosen or ordered", cues),))
    openers = ("list", "show", "give", "find", "return", "fetch", "need")
    wider = ("request", "sql", "tables", *openers)
    yield Truth("openers", (_sense("Words that open a request", openers, "Words that begin a line", wider),))


def _placed() -> Iterator[Truth]:
    """Word lists that count in one place only."""
    for first, second in (
        ("city", "country"),
        ("color", "status"),
        ("category", "genre"),
        ("department", "brand"),
        ("language", "person"),
    ):
        words = (*VALUES[first], *VALUES[second])
        meaning = f"{MEANINGS[first]} and {MEANINGS[second][0].lower()}{MEANINGS[second][1:]}"
        for place, elsewhere in ((QUOTED, UNQUOTED), (UNQUOTED, QUOTED)):
            sense = _sense(meaning, words, "Values of text columns", _values(), place, elsewhere)
            yield Truth(f"{first} or {second} {place.phrase}", (sense,))
    for name, words, place, elsewhere in _column_rows():
        sense = _sense(
            f"Names of {name} columns", words, "Names of columns", _columns("number", "text"), place, elsewhere
        )
        yield Truth(f"{name} columns {place.phrase}", (sense,))
    tables = tuple(sorted(TABLES))
    for half, words in (("first", tables[:10]), ("second", tables[10:])):
        for place, elsewhere in ((FROM, DECLARED), (OF, FROM), (DECLARED, OF)):
            sense = _sense("Names of tables", words, "Names of tables", tables, place, elsewhere)
            yield Truth(f"{half} half of the tables {place.phrase}", (sense,))
    numbers = tuple(map(str, lexicon.LIMITS))
    amounts = tuple(map(str, lexicon.AMOUNTS))
    every = tuple(map(str, sorted({*lexicon.LIMITS, *lexicon.AMOUNTS, *lexicon.YEARS})))
    limited = _sense(
        "Small numbers",
        numbers,
        "Numbers",
        every,
        LIMITED,
        Place('not before(1): token is " LIMIT"', "not after LIMIT in capitals"),
    )
    yield Truth("limits", (limited,))
    compared = _sense(
        "Amounts",
        amounts,
        "Numbers",
        every,
        OPERATED,
        Place('not before(1): token in {" =", " !=", " >", " <", " >=", " <="}', "not after a sign that compares"),
    )
    yield Truth("amounts", (compared,))


def _column_rows() -> Iterator[Rows]:
    numbers, texts = _columns("number"), _columns("text")
    yield "number", numbers, SORTED, COMPUTED
    yield "number", numbers, COMPUTED, SORTED
    yield "number", numbers, COMPARED, SELECTED
    yield "text", texts, SELECTED, COMPARED
    yield "text", texts, COMPARED, SELECTED
    yield "number", numbers, LISTED, SELECTED
    yield "text", texts, LISTED, SELECTED


def _pairs(words: Sequence[Truth], placed: Sequence[Truth], seed: int) -> list[Truth]:
    """Pairs of senses that share no class of words, one of a list and one of a place, that fire about equally often.

    So neither sense is lost among the other's windows. Each sense is used once, in an order drawn by seed.
    """
    text = stream("explain", PAIRING_TOKENS, derive_seed(seed, "pairs"))
    rates = {truth.name: float(truth.predicate.matches(text).mean()) for truth in (*words, *placed)}
    free = list(placed)
    found: list[Truth] = []
    for number in generator(seed, "pairs").permutation(len(words)).tolist():
        one = words[number]
        fitting = [two for two in free if not {*one.senses[0].wider} & {*two.senses[0].wider}]
        two = min(fitting, key=lambda two: _apart(rates[one.name], rates[two.name]), default=None)
        if two is not None and _apart(rates[one.name], rates[two.name]) <= MOST_APART:
            free.remove(two)
            found.append(Truth(f"{one.name}; {two.name}", (one.senses[0], two.senses[0])))
    return found


def _apart(one: float, other: float) -> float:
    """Return the ratio of two rates, the larger by the smaller."""
    return max(one, other) / max(min(one, other), 1e-9)


def _sense(
    meaning: str,
    words: Sequence[str],
    wider_meaning: str,
    wider: Sequence[str],
    place: Place | None = None,
    elsewhere: Place | None = None,
) -> Sense:
    return Sense(meaning, tuple(words), wider_meaning, tuple(wider), place, elsewhere)


def _value(family: str, meaning: str) -> Sense:
    return _sense(meaning, VALUES[family], "Values of text columns", _values())


def _values() -> tuple[str, ...]:
    return tuple(value for family in VALUES.values() for value in family)


def _columns(*kinds: str) -> tuple[str, ...]:
    """Return the columns of these kinds whose name is one piece."""
    return tuple(sorted(c.name for c in COLUMNS.values() if c.kind in kinds and len(c.pieces) == 1))

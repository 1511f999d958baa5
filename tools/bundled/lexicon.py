"""The words of the bundled language: tables, columns, values, and the phrases that ask for each part of a query.

Phrases are words separated by spaces. A word in capitals is a slot, and `*` marks a cue: a word that decides a token
of the SQL. Phrases at the same place in the lists of two rivals (ASC and DESC, AVG and MAX, …) have the same length,
so that one can be put for the other and nothing else of a request changes (`behaviours`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["number", "year", "date", "text"]
Direction = Literal["ASC", "DESC"]
Operator = Literal["=", "!=", ">", "<", ">=", "<="]
Aggregate = Literal["SUM", "AVG", "MIN", "MAX"]


@dataclass(frozen=True)
class Column:
    """A column, for example `order_date`, a word of two pieces: `order`, `_date`."""

    pieces: tuple[str, ...]
    kind: Kind
    family: str = ""
    """Which `VALUES` a text column holds."""

    @property
    def name(self) -> str:
        """The name as schemas and SQL write it."""
        return "".join(self.pieces)


def _columns() -> dict[str, Column]:
    numbers = "total price age salary stock weight rating distance duration score pages budget capacity"
    pieces: list[tuple[tuple[str, ...], Kind, str]] = [((name,), "number", "") for name in numbers.split()]
    pieces += [(pair, "number", "") for pair in (("unit", "_price"), ("total", "_cost"), ("top", "_speed"))]
    pieces += [(name, "year", "") for name in (("year",), ("birth", "_year"), ("release", "_year"))]
    pieces += [((name, "_date"), "date", "") for name in ("order", "start", "due")]
    pieces += [((name,), "text", name) for name in VALUES if name != "person"]
    pieces += [((name,), "text", "person") for name in ["name", "customer", "author", "owner", "teacher"]]
    pieces += [(("first", "_name"), "text", "person"), (("last", "_name"), "text", "person")]
    return {"".join(parts): Column(parts, kind, family) for parts, kind, family in pieces}


VALUES: dict[str, tuple[str, ...]] = {
    "city": ("Paris", "Oslo", "Lima", "Cairo", "Tokyo", "Delhi"),
    "country": ("France", "Norway", "Peru", "Egypt", "Japan", "India"),
    "color": ("red", "blue", "green", "black", "white"),
    "status": ("open", "closed", "pending", "late"),
    "category": ("garden", "kitchen", "sport", "music", "toys"),
    "genre": ("drama", "comedy", "horror", "jazz"),
    "department": ("sales", "support", "legal", "research"),
    "brand": ("Acme", "Zenith", "Orion", "Nova"),
    "language": ("French", "Spanish", "Arabic", "Hindi"),
    "person": ("Anna", "Boris", "Chen", "Dina", "Emil", "Farah", "Grace", "Hugo"),
}

COLUMNS: dict[str, Column] = _columns()

TABLES: dict[str, tuple[str, ...]] = {
    "orders": ("customer", "total", "city", "status", "order_date", "due_date", "weight", "country"),
    "customers": ("first_name", "last_name", "age", "city", "country", "birth_year", "language"),
    "products": ("name", "price", "stock", "color", "category", "brand", "weight", "rating", "unit_price"),
    "employees": ("first_name", "last_name", "salary", "age", "department", "city", "start_date", "language"),
    "books": ("author", "pages", "price", "genre", "language", "release_year", "rating", "stock"),
    "films": ("name", "duration", "genre", "country", "release_year", "rating", "budget", "language"),
    "cars": ("owner", "color", "brand", "price", "year", "weight", "top_speed", "country"),
    "flights": ("city", "distance", "duration", "price", "status", "capacity", "start_date"),
    "hotels": ("name", "city", "country", "rating", "price", "capacity", "owner"),
    "students": ("first_name", "last_name", "age", "score", "city", "birth_year", "teacher", "country"),
    "courses": ("teacher", "capacity", "duration", "language", "price", "start_date", "category", "score"),
    "projects": ("name", "budget", "status", "owner", "department", "start_date", "due_date", "total_cost"),
    "invoices": ("customer", "total", "status", "due_date", "country", "total_cost", "year"),
    "players": ("first_name", "last_name", "score", "age", "country", "salary", "top_speed"),
    "songs": ("author", "duration", "genre", "language", "rating", "release_year", "score"),
    "machines": ("brand", "weight", "capacity", "price", "top_speed", "year", "color", "owner"),
    "shipments": ("customer", "city", "country", "weight", "distance", "status", "order_date", "total_cost"),
    "houses": ("owner", "city", "price", "year", "color", "capacity", "country", "rating"),
    "parts": ("name", "unit_price", "stock", "weight", "color", "brand", "category"),
    "tickets": ("owner", "status", "department", "price", "due_date", "score", "category"),
}

AMOUNTS = (10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 150, 200, 250, 300, 500, 1000)
YEARS = (1990, 1995, 2000, 2005, 2010, 2015, 2020)
LIMITS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine", 10: "ten"}

OPENERS = ("list", "show", "give me", "find", "return", "fetch", "what are", "I need")
ROWS = ("*list all TABLE", "*show all TABLE", "*list every row of TABLE", "*find all TABLE", "*return all TABLE")
COUNTS = (
    "*count all TABLE",
    "*count the TABLE",
    "*how *many TABLE are there",
    "the *number of TABLE",
    "the total *number of TABLE",
)
"""Asking for rows and for their count: `list all orders`, `count all orders`."""
TARGETS = ("the COLUMNS of TABLE", "the COLUMNS from TABLE", "the COLUMNS of all TABLE", "COLUMNS for TABLE")
RECORDED = ("recorded", "stored")
DISTINCT = ("different", "unique")
"""`the recorded city values of orders` asks for all, `the different city values of orders` for each once."""

AGGREGATES: dict[Aggregate, tuple[str, ...]] = {
    "SUM": ("total", "combined", "overall"),
    "AVG": ("average", "mean", "typical"),
    "MIN": ("lowest", "smallest", "minimum"),
    "MAX": ("highest", "largest", "maximum"),
}
GROUPS = ("*per COLUMN", "*for *each COLUMN", "*grouped *by COLUMN", "*by COLUMN")

COMPARISONS: dict[Operator, tuple[str, ...]] = {
    ">": ("over", "above", "more than", "greater than"),
    "<": ("under", "below", "less than", "smaller than"),
    ">=": ("at least", "no less than"),
    "<=": ("at most", "no more than"),
    "=": ("exactly", "equal to"),
    "!=": ("not", "other than"),
}
CONDITIONS = ("*where the COLUMN is OPERATOR VALUE", "*whose COLUMN is OPERATOR VALUE", "*with COLUMN OPERATOR VALUE")
IDENTITIES: dict[Operator, tuple[str, ...]] = {"=": ("",), "!=": ("not", "other than")}
"""How text is compared: `whose city is Paris`, `whose city is not Paris`."""
PLACES: dict[Operator, tuple[str, ...]] = {"=": ("*in VALUE",), "!=": ("*not *in VALUE", "*outside VALUE")}
"""Conditions that leave it to the value which column is meant: `orders in Paris`, `orders in France`."""

ORDERINGS: dict[Direction, tuple[str, ...]] = {
    "ASC": (
        "sorted by COLUMN *ascending",
        "in *ascending order of COLUMN",
        "in *increasing order of COLUMN",
        "ordered by COLUMN from *lowest to *highest",
        "*lowest COLUMN first",
        "*smallest COLUMN first",
    ),
    "DESC": (
        "sorted by COLUMN *descending",
        "in *descending order of COLUMN",
        "in *decreasing order of COLUMN",
        "ordered by COLUMN from *highest to *lowest",
        "*highest COLUMN first",
        "*largest COLUMN first",
    ),
}
TOPS: dict[Direction, tuple[str, ...]] = {
    "ASC": ("the *bottom NUMBER TABLE by COLUMN", "the *first NUMBER TABLE by COLUMN"),
    "DESC": ("the *top NUMBER TABLE by COLUMN", "the *last NUMBER TABLE by COLUMN"),
}
EXTREMES: dict[Direction, tuple[str, ...]] = {
    "ASC": ("the NUMBER *lowest COLUMN values of TABLE", "the NUMBER *smallest COLUMN values of TABLE"),
    "DESC": ("the NUMBER *highest COLUMN values of TABLE", "the NUMBER *largest COLUMN values of TABLE"),
}
LIMIT_PHRASES = (", *only NUMBER rows", ", *at *most NUMBER rows", ", *just NUMBER *results", ", *limit NUMBER")

SQL_WORDS = (
    *("SELECT", "DISTINCT", "COUNT", *AGGREGATES, "FROM", "WHERE"),
    *("GROUP", "ORDER", "BY", *ORDERINGS, "LIMIT", ";"),
)


def pieces() -> list[str]:
    """Return every piece of the language, sorted: about 350, a leading space belonging to its word."""
    found = {"tables", "request", "sql", ":", "\n", "(", ")", ",", "id", "*", "'", " '", " *", " and"}
    found |= {f" {word}" for word in (*SQL_WORDS, *TABLES, *COMPARISONS)}
    for column in COLUMNS.values():
        found |= {f" {column.pieces[0]}", *column.pieces[1:]}
        if column.kind == "number":  # stands behind the parenthesis of an aggregate
            found.add(column.pieces[0])
    for value in (value for family in VALUES.values() for value in family):
        found |= {f" {value}", value}
    found |= {f" {number}" for number in (*AMOUNTS, *YEARS, *LIMITS, *LIMITS.values())}
    phrases = [*OPENERS, *ROWS, *COUNTS, *TARGETS, *RECORDED, *DISTINCT, *GROUPS, *CONDITIONS, *LIMIT_PHRASES]
    phrases += ["the values of"]  # of RECORDED and DISTINCT
    for table in (AGGREGATES, COMPARISONS, IDENTITIES, PLACES, ORDERINGS, TOPS, EXTREMES):
        phrases += [phrase for rivals in table.values() for phrase in rivals]
    words = {word.lstrip("*") for phrase in phrases for word in phrase.split()}
    found |= {f" {word}" for word in words if word != "," and word not in SLOTS}
    return sorted(found)


SLOTS = frozenset({"TABLE", "COLUMN", "COLUMNS", "NUMBER", "VALUE", "OPERATOR"})

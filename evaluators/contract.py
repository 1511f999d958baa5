"""Items, verdicts and scores; what a judge and an evaluator do, and where they register."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from exegete.tools.errors import UserError, nearest
from exegete.tools.explainers import Explanation
from exegete.tools.windows import LatentEvidence, Window

Task = Literal["detection", "fuzzing"]
VerdictStatus = Literal[
    "ok", "unparsed", "wrong_length", "refused", "truncated", "filtered", "empty", "rejected", "error", "no_predicate"
]


@dataclass(frozen=True, slots=True)
class Item:
    """What a judge sees of a window: its tokens, and for fuzzing which of them are marked. Never the truth."""

    tokens: tuple[str, ...]
    marks: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's answer on one item. `applies` is None exactly where `status` is not "ok"."""

    applies: bool | None
    probability: float | None = None
    status: VerdictStatus = "ok"


@dataclass(frozen=True, slots=True)
class JudgedItem:
    """A verdict beside the truth: one row of the `verdicts` view."""

    window: Window
    marks: tuple[int, ...] | None
    truth: bool
    verdict: Verdict
    prompt: int
    """Items with the same number were judged in one prompt; the prompt is the unit of every interval (PROTOCOLS §13)."""


@dataclass(frozen=True, slots=True)
class Score:
    """One figure of one explanation, with its 95 % interval. `value` is None where the metric has no answer."""

    evaluator: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    """Judged items that the figure rests on."""
    failures: int
    """Items whose verdict failed; they are counted here and in no metric."""
    baseline: str | None = None
    """None for the explanation itself, else the floor it stands for: shuffled, sibling, constant, token_list."""
    status: str = "ok"
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluator returns: scores, and the verdicts that they rest on."""

    scores: tuple[Score, ...]
    verdicts: tuple[JudgedItem, ...]


class Judge(Protocol):
    """Says for each item of one prompt whether an explanation applies."""

    name: str

    async def judge(self, task: Task, explanation: Explanation, items: Sequence[Item], seed: int) -> list[Verdict]:
        """Return one verdict per item, in order. A failure is a verdict with a status, never an exception."""
        ...


class Evaluator(Protocol):
    """Scores an explanation on the windows of one split."""

    name: str

    @property
    def headline(self) -> str:
        """The metric that stands for the others where one figure is shown."""
        ...

    async def evaluate(self, explanation: Explanation, evidence: LatentEvidence, judge: Judge, seed: int) -> Evaluation:
        """Return scores with intervals and the verdicts behind them; `seed` is the latent's own."""
        ...


Maker = TypeVar("Maker", bound=Callable[..., Any])
_REGISTRIES: dict[str, dict[str, Callable[..., Any]]] = {"evaluator": {}, "judge": {}}
_BUILT_IN = (
    "exegete.evaluators.detection",
    "exegete.evaluators.embedding",
    "exegete.evaluators.fuzzing",
    "exegete.evaluators.model_judge",
    "exegete.evaluators.generation_scores",
    "exegete.evaluators.intervention",
    "exegete.evaluators.output",
    "exegete.evaluators.predicate_judge",
    "exegete.evaluators.simulation",
    "exegete.evaluators.surprisal",
)


def _register(kind: str, name: str) -> Callable[[Maker], Maker]:
    def register(maker: Maker) -> Maker:
        if name in _REGISTRIES[kind]:
            raise ValueError(f"a {kind} named {name!r} is registered already")
        _REGISTRIES[kind][name] = maker
        return maker

    return register


def _names(kind: str) -> list[str]:
    for module in _BUILT_IN:
        importlib.import_module(module)
    return sorted(_REGISTRIES[kind])


def _make(kind: str, name: str, options: Mapping[str, Any]) -> Any:
    known = _names(kind)
    if name not in known:
        raise UserError(f"no {kind} is named {name!r}; there are: {', '.join(known)}.{nearest(name, known)}")
    return _REGISTRIES[kind][name](**options)


def evaluator(name: str) -> Callable[[Maker], Maker]:
    """Register a class that makes an evaluator under `name`. Registering a name twice raises ValueError."""
    return _register("evaluator", name)


def judge(name: str) -> Callable[[Maker], Maker]:
    """Register a class that makes a judge under `name`. Registering a name twice raises ValueError."""
    return _register("judge", name)


def evaluator_names() -> list[str]:
    """Return the names of all registered evaluators, sorted."""
    return _names("evaluator")


def judge_names() -> list[str]:
    """Return the names of all registered judges, sorted."""
    return _names("judge")


def maker_of(kind: str, name: str) -> Callable[..., Any]:
    """Return the class or function registered as `name` among the "evaluator"s or "judge"s. Raises KeyError."""
    _names(kind)
    return _REGISTRIES[kind][name]


def make_evaluator(name: str, **options: Any) -> Evaluator:
    """Return the evaluator registered as `name`. Raises UserError where there is none."""
    made: Evaluator = _make("evaluator", name, options)
    return made


def make_judge(name: str, **options: Any) -> Judge:
    """Return the judge registered as `name`. Raises UserError where there is none."""
    made: Judge = _make("judge", name, options)
    return made

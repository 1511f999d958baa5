"""Which evaluators an audit runs, how they are made, on which planted latents, and what they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from exegete.evaluators import Evaluator, Judge, evaluator_names, make_evaluator
from exegete.evaluators.audit_metering import Meter, MeteredClient, MeteredScorer
from exegete.tools.embedders import Embedder
from exegete.tools.errors import UserError, nearest
from exegete.tools.llm import Client, PromptScorer

if TYPE_CHECKING:
    from exegete.agent.audit_live import Bench, Kind

LEAST: Mapping[str, int] = {"latents": 4, "items": 4, "live_latents": 2, "live_windows": 4}
MOST_LATENTS = 24
"""For evaluators that ask or run a model about every single window."""
ITEMS_SIMULATED, ITEMS_SURPRISING = 8, 15
"""Windows of either class, at most, where each is a call or several forward passes of its own."""
GENERATION: Mapping[str, Any] = {"requests": 2, "items_per_class": 10, "prompts": 8, "factors": (0.0, 1.0, 10.0)}


@dataclass(frozen=True)
class Wanted:
    """What is to be audited, and on how much."""

    evaluators: tuple[str, ...] = ()
    """All that there are where left empty."""
    latents: int = 36
    items: int = 20
    """Windows of either class that are judged for each latent."""
    live_latents: int = 14
    """Of each kind that is planted in the subject, at most."""
    live_windows: int = 40
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        """Raise UserError where an evaluator is unknown or a number is too small."""
        known = evaluator_names()
        for name in self.evaluators:
            if name not in known:
                raise UserError(f"no evaluator is named {name!r}; there are: {', '.join(known)}.{nearest(name, known)}")
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)}: an audit needs at least {least}")


@dataclass(frozen=True)
class Instruments:
    """What evaluators work with."""

    judge: Judge
    client: Client | None = None
    scorer: PromptScorer | None = None
    embedder: Embedder | None = None
    priced: bool = True
    """Whether the price of the client's calls is known (nothing, for a server of one's own)."""
    reference: Judge | None = None
    """Judges as `judge` would if it did not err; where given, expectations are known and coverage is measured."""
    error_rate: float = 0.0
    """Share of verdicts that `judge` flips, each by itself."""


@dataclass(frozen=True)
class Task:
    """One evaluator to be audited on one kind of latents."""

    name: str
    make: Callable[[Meter, Bench | None], Evaluator]
    kind: Kind | None = None
    """Of latents planted in the subject; None for those of the bank's text."""
    relabeled: Callable[[str], bool] = lambda metric: True
    """Metrics for which exchanging the text of windows means anything."""
    expects: Literal["reference", "itself", "nothing"] = "nothing"
    """Where expectations come from. Hard negatives have none: in more text, others would be the hardest."""
    needs: str = ""
    """What is missing, empty where nothing is."""
    most: int | None = None
    """Latents, at most."""


def tasks(wanted: Wanted, instruments: Instruments) -> list[Task]:
    """Return every evaluator that is wanted, with what it lacks."""
    names = wanted.evaluators or tuple(evaluator_names())
    return [task for name in evaluator_names() if name in names for task in _tasks(name, wanted, instruments)]


def _tasks(name: str, wanted: Wanted, given: Instruments) -> Iterator[Task]:
    """Yield the tasks of one evaluator; one that is not known here is made without options."""
    asks = "" if given.client else "a language model: --judge PROVIDER:MODEL"
    items: dict[str, Any] = {"items_per_class": wanted.items}
    if name in ("detection", "fuzzing"):
        for label, options in _VARIANTS[name].items():
            hard = "hard" in options.get("negatives", ())
            yield Task(label, _plain(name, {**items, **options}), expects="nothing" if hard else "reference")
    elif name == "simulation":
        yield Task(
            name,
            _asking(name, given, {"items_per_class": min(wanted.items, ITEMS_SIMULATED)}),
            needs=asks,
            most=MOST_LATENTS,
        )
    elif name == "embedding":
        missing = "" if given.embedder else "a sentence-transformers model: --embedder NAME or FOLDER"
        yield Task(
            name, _plain(name, items | {"embedder": given.embedder}), expects="itself", needs=missing, most=MOST_LATENTS
        )
    elif name == "surprisal":
        missing = "" if given.scorer else "a local language model: --scorer hf:PATH"
        few = {"items_per_class": min(wanted.items, ITEMS_SURPRISING)}
        yield Task(name, _scoring(given, few), expects="itself", needs=missing, most=MOST_LATENTS)
    elif name == "generation":
        make = _live(name, given, GENERATION)
        yield Task(name, make, "both", lambda metric: metric in ("responsiveness", "purity"), needs=asks)
    elif name in ("intervention", "output"):
        kinds: tuple[Kind, ...] = ("output", "input")
        for kind in kinds:
            options = _steering(wanted) if name == "intervention" else {}
            yield Task(name, _live(name, given, options), kind, lambda metric: False, needs=asks)
    else:
        yield Task(name, _plain(name, {}))


_VARIANTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "detection": {"detection": {}, "detection, hard negatives": {"negatives": ("hard",)}},
    "fuzzing": {"fuzzing": {}, "fuzzing, misplaced marks": {"negatives": "misplaced"}},
}


def _steering(wanted: Wanted) -> dict[str, Any]:
    from exegete.evaluators.effect_passages import Steering

    return {"steering": Steering(prompts=wanted.live_windows)}


def _plain(name: str, options: Mapping[str, Any]) -> Callable[[Meter, Bench | None], Evaluator]:
    return lambda meter, bench: make_evaluator(name, **options)


def _asking(name: str, given: Instruments, options: Mapping[str, Any]) -> Callable[[Meter, Bench | None], Evaluator]:
    def make(meter: Meter, bench: Bench | None) -> Evaluator:
        assert given.client is not None
        return make_evaluator(name, client=MeteredClient(given.client, meter), **options)

    return make


def _scoring(given: Instruments, options: Mapping[str, Any]) -> Callable[[Meter, Bench | None], Evaluator]:
    def make(meter: Meter, bench: Bench | None) -> Evaluator:
        assert given.scorer is not None
        return make_evaluator("surprisal", scorer=MeteredScorer(given.scorer, meter), **options)

    return make


def _live(name: str, given: Instruments, options: Mapping[str, Any]) -> Callable[[Meter, Bench | None], Evaluator]:
    def make(meter: Meter, bench: Bench | None) -> Evaluator:
        assert given.client is not None and bench is not None
        rates = {"rates": bench.rates} if name == "intervention" else {}
        client = MeteredClient(given.client, meter)
        return make_evaluator(name, model=bench.model, dictionary=bench.dictionary, client=client, **rates, **options)

    return make

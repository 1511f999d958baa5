"""An investigation as values: all of them are stored as JSON, and nothing here runs a model.

1. A `Question` is asked of prompts (`Case`). They are split by seed: an investigator sees and experiments on the search
   prompts; the held-out ones are for verifying alone.
2. Its behaviour becomes a `Metric`: a number for each prompt, larger where there is more of it, and a line above which it is shown.
3. Every experiment carries a `Prediction` of its headline figure, which is on the disk before the experiment begins.
4. What an experiment found is an `Outcome`: its `Headline` with interval and n, and beside it what its control did.
5. A `Claim` is a proposal. What it is worth is decided by code (`verifying`), which returns a `Verdict`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from exegete.tools.errors import UserError

Kind = Literal["lookup", "experiment", "note"]
"""A tool looks something up; or runs the model, for which a prediction is needed; or writes down what the investigator thinks."""

MetricKind = Literal["log_odds", "log_probability", "judged"]


@dataclass(frozen=True)
class Case:
    """One prompt, with what it is compared with."""

    prompt: str
    answer: str | None = None
    """The token that shows the behaviour; None where the metric names one for all."""
    other: str | None = None
    """The token that stands against it."""
    variant: str | None = None
    """The same prompt without the suggested cause, of as many tokens (a minimal pair)."""


@dataclass(frozen=True)
class Metric:
    """How the behaviour is measured on a prompt. Larger is more; it is shown where the number is above `shown`."""

    kind: MetricKind
    """Logit of the answer less that of the other token; natural logarithm of the answer's probability; share of sampled
    continuations of which a judge says that they meet `criterion`."""
    answer: str | None = None
    """For all cases that name none."""
    other: str | None = None
    criterion: str = ""
    """What a judge is asked, where the metric is `judged`."""
    tokens: int = 16
    """Of each sampled continuation."""
    samples: int = 4
    """Continuations of each prompt."""

    @property
    def shown(self) -> float:
        """The line above which a prompt shows the behaviour: the answer is the likelier of the two, or likelier than not."""
        return {"log_odds": 0.0, "log_probability": math.log(0.5), "judged": 0.5}[self.kind]

    @property
    def unit(self) -> str:
        """What its numbers are."""
        return {"log_odds": "logits", "log_probability": "nats", "judged": "share of continuations"}[self.kind]


@dataclass(frozen=True)
class Budget:
    """What an investigation may use; None is no limit."""

    steps: int = 40
    """Decisions of the investigator."""
    passes: int | None = 200_000
    """Prompts run through the model, a sampled token counting as one."""
    usd: float | None = None
    tokens: int | None = None
    """Of the language model that investigates and judges, input and output together."""

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"budget: {name} = {value!r}: expected a number above 0")


@dataclass(frozen=True)
class Question:
    """What is asked, and of what."""

    text: str
    cases: tuple[Case, ...]
    metric: Metric | None = None
    """None where the investigator is to propose one."""
    suggested: str = ""
    """The cause that the question suggests, in words."""
    seed: int = 0
    budget: Budget = field(default_factory=Budget)


@dataclass(frozen=True)
class Call:
    """One tool that the investigator wants used."""

    id: str
    """Unique within the investigation, the same again after a resume."""
    tool: str
    arguments: Mapping[str, Any]


ROUNDING = 1e-6
"""By which a figure may be beyond its prediction: how a prompt's logits are rounded depends on its batch."""


@dataclass(frozen=True)
class Prediction:
    """What an experiment's headline figure will be, by whom it is asked for."""

    hypothesis: str
    """Id of the hypothesis that it tests: `H1`, …"""
    because: str
    low: float | None = None
    high: float | None = None
    """The figure is predicted to lie between; None is unbounded. Not both may be None."""

    def holds(self, value: float | None) -> bool | None:
        """Return whether a figure lies where it was predicted, within `ROUNDING`; None where there is no figure."""
        if value is None or not math.isfinite(value):
            return None
        above = self.low is None or value >= self.low - ROUNDING
        return above and (self.high is None or value <= self.high + ROUNDING)


Standing = Literal["open", "supported", "not shown", "rejected"]
"""Of a hypothesis. `not shown`: it was tested, and what was found tells neither for it nor against it, as within a wide control."""


@dataclass(frozen=True)
class Hypothesis:
    """What may be so."""

    id: str
    statement: str
    status: Standing = "open"


@dataclass(frozen=True)
class Headline:
    """The one figure of an experiment that predictions are about."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    control: str = ""
    """What it stands beside, in words; empty where the tool has none."""
    control_value: float | None = None
    control_low: float | None = None
    control_high: float | None = None
    control_n: int = 0


@dataclass(frozen=True)
class Outcome:
    """What a tool returned."""

    text: str
    """Compact, for the investigator: a few lines, untrusted parts fenced."""
    headline: Headline | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Everything, as JSON: what `text` shortens, for the report and for SQL."""
    plots: tuple[Mapping[str, Any], ...] = ()
    """Series to be drawn, as JSON; intervals and `control` may be left out (`drawing` draws them):

    {"kind": "bars", "title": …, "unit": "logits", "bars": [{"label": …, "value": …, "low": …, "high": …, "control": false}, …]}
    {"kind": "curve", "title": …, "x": "strength", "y": "logits",
     "series": [{"label": …, "points": [[x, y], …], "low": [y, …], "high": [y, …], "control": false}, …]}
    {"kind": "tokens", "title": …, "unit": "logits", "tokens": [text, …], "values": [a number for each token, …]}
    """


@dataclass(frozen=True)
class Result:
    """What became of a call."""

    call: Call
    status: Literal["ok", "error", "refused"]
    """error: the tool could not do it; refused: it may not be done (sealed split, budget, no prediction)."""
    outcome: Outcome
    experiment: str = ""
    """`E1`, … where it was an experiment: the row that the report cites."""
    predicted: bool | None = None
    """Whether the headline was as predicted."""


@dataclass(frozen=True)
class Claim:
    """What the investigator wants to say."""

    statement: str
    kind: Literal["causal", "correlational"]
    latents: tuple[int, ...] = ()
    intervention: Literal["ablate", "interchange", "steer"] = "ablate"
    """Set the latents to zero; give them their activations on each case's variant; or turn them up to a fixed KL."""
    expects: Literal["falls", "rises"] = "falls"
    """What the intervention does to the metric."""
    flips: bool = False
    """Whether it also says that most prompts no longer show the behaviour (with `rises`: now show it)."""
    experiments: tuple[str, ...] = ()
    """Those that it rests on."""
    hypothesis: str = ""
    withdrawn: str = ""
    """Why it was taken back; empty where it stands. One that was is reported as such, and not verified."""


@dataclass(frozen=True)
class Verdict:
    """What checking a claim found, on held-out prompts."""

    claim: Claim
    status: Literal["verified", "failed", "unverified", "correlational", "withdrawn"]
    """unverified: it could not be checked (`why`); correlational: nothing causal was claimed; withdrawn: it was taken back."""
    why: str
    effect: Headline | None = None
    """Mean change of the metric, with an interval that holds for all claims of the report together, beside random latents."""
    flipped: Headline | None = None
    """Share of prompts whose behaviour is gone (or came), beside random latents."""
    direction: Headline | None = None
    """The effect beside random directions at the same KL, where the claim steers."""
    p: float | None = None
    p_adjusted: float | None = None
    """By Holm (1979), over the causal claims of the report."""


@dataclass(frozen=True)
class Decision:
    """What the investigator does next."""

    calls: tuple[Call, ...] = ()
    """Run at the same time where there are several."""
    hypotheses: tuple[Hypothesis, ...] = ()
    """New ones, and known ones with a new status."""
    claims: tuple[Claim, ...] = ()
    """All that it claims; the last decision's count."""
    answer: str = ""
    """The answer in words, where `done`."""
    done: bool = False
    again: str = ""
    """Why there is none now and it is to be asked for again later: the model could not be reached. Empty where it is one."""
    said: Sequence[Mapping[str, Any]] = ()
    """What it keeps for itself, for example a conversation: returned to it in `View.said`, until the next decision's."""


@dataclass(frozen=True)
class Left:
    """What an investigator may still use, beside its decisions; None is no limit."""

    passes: int | None = None
    """For its experiments: what is kept for verifying is not among them."""
    tokens: int | None = None
    usd: float | None = None


@dataclass(frozen=True)
class View:
    """What an investigator sees before it decides."""

    question: Question
    """With the search prompts alone."""
    metric: Metric
    hypotheses: tuple[Hypothesis, ...]
    results: tuple[Result, ...]
    """All so far, in order."""
    new: int
    """How many of the last results it has not seen."""
    said: tuple[Mapping[str, Any], ...]
    """What it kept in its last decision."""
    steps_left: int
    notes: tuple[str, ...] = ()
    """What the person who watches says (`--interactive`), not seen so far."""
    left: Left = Left()
    """The same again where the same decision is to be made after a resume."""


class Investigator(Protocol):
    """Decides what is done. Everything it is told is in the `View`; it keeps nothing between calls, so it can be resumed."""

    @property
    def name(self) -> str:
        """`recipe`, or the model's, for example `anthropic:MODEL`."""
        ...

    async def frame(self, question: Question) -> Metric:
        """Return how the behaviour is measured; `question.metric` where that is given.

        Raises:
            UserError: it cannot tell; the message says how to give a metric.
        """
        ...

    async def decide(self, view: View) -> Decision:
        """Return what is done next."""
        ...

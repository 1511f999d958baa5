"""What is written: one record a latent, with everything that a run found out about it.

Scores and judged items come from `exegete.evaluators`, which this layer may not import: the protocols here say what of
them is stored, and the evaluators' own classes satisfy them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from exegete.tools.explainers import Explanation
from exegete.tools.windows import Window

Outcome = Literal["labeled", "no_explanation", "failed", "dead", "rare", "dense"]
"""What became of a latent in a run. `failed`: an error that `LatentRecord.detail` quotes."""
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

RunStatus = Literal["running", "interrupted", "finished"]


class ScoreLike(Protocol):
    """One figure of one explanation, as `exegete.evaluators.contract.Score`."""

    @property
    def evaluator(self) -> str: ...  # noqa: D102
    @property
    def metric(self) -> str: ...  # noqa: D102
    @property
    def value(self) -> float | None: ...  # noqa: D102
    @property
    def low(self) -> float | None: ...  # noqa: D102
    @property
    def high(self) -> float | None: ...  # noqa: D102
    @property
    def n(self) -> int: ...  # noqa: D102
    @property
    def failures(self) -> int: ...  # noqa: D102
    @property
    def baseline(self) -> str | None: ...  # noqa: D102
    @property
    def status(self) -> str: ...  # noqa: D102
    @property
    def parameters(self) -> Mapping[str, Any]: ...  # noqa: D102


class VerdictLike(Protocol):
    """A judge's answer, as `exegete.evaluators.contract.Verdict`."""

    @property
    def applies(self) -> bool | None: ...  # noqa: D102
    @property
    def probability(self) -> float | None: ...  # noqa: D102
    @property
    def status(self) -> str: ...  # noqa: D102


class JudgedItemLike(Protocol):
    """A verdict beside the truth, as `exegete.evaluators.contract.JudgedItem`."""

    @property
    def window(self) -> Window: ...  # noqa: D102
    @property
    def marks(self) -> tuple[int, ...] | None: ...  # noqa: D102
    @property
    def truth(self) -> bool: ...  # noqa: D102
    @property
    def verdict(self) -> VerdictLike: ...  # noqa: D102
    @property
    def prompt(self) -> int: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class VerdictRecord:
    """One judged item of one explanation under one evaluator."""

    explanation_id: str
    evaluator: str
    item: JudgedItemLike
    baseline: str | None = None
    """None where the explanation itself was judged, else the floor that was judged in its place."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One explanation that was tried on the way up the cascade, and what it cost: a row of the `climbs` view."""

    step: int
    """Position on the way, from 0."""
    rung: str
    """The explainer, or what is drawn on the control subset: `best-of` at the cost of the climb, `best-of beside test-and-refine`
    for the tokens of that rung."""
    explanation_id: str | None
    """None where the explainer gave none."""
    refine: float | None
    """Mean balanced accuracy of detection and fuzzing on the refine split, by which a latent climbs."""
    refine_low: float | None
    refine_high: float | None
    refine_n: int
    """Judged items behind it."""
    calls: int
    """Calls to language models that writing and scoring it on the refine split took, whether paid now or before."""
    tokens: int
    usd: float
    decision: str
    """What followed: `good_enough`, `not_worth_it`, `climbs`, `plateau`, `rounds_used_up`, `top`, `no_score` or `control`."""
    test: float | None = None
    """The same figure on the test split, where the step is of the control subset; nothing is decided by it."""
    test_n: int = 0
    control: bool = False
    """Whether the latent climbed whatever its scores said, so that routing can be measured."""


@dataclass(frozen=True, slots=True)
class LatentRecord:
    """Everything a run found out about one latent; it is written whole or not at all."""

    dictionary: str
    """Fingerprint."""
    latent: int
    status: Outcome
    explanations: Sequence[tuple[Explanation, str]] = ()
    """Each with its id (`Explanation.id`)."""
    scores: Sequence[tuple[str, ScoreLike]] = ()
    """Each after the id of the explanation it belongs to; for a floor, of the explanation it stands beside."""
    verdicts: Sequence[VerdictRecord] = ()
    detail: str | None = None
    """Why it failed, or why there is no explanation; None otherwise."""
    missing_calls: int = 0
    """Calls to language models that failed for good: a resumed run asks them again (`Writer.forget_incomplete`)."""
    chosen: str | None = None
    """Id of the explanation that the run stands by; where left out, that of the only one there is."""
    steps: Sequence[StepRecord] = ()
    """The way up the cascade, where there is one."""


@dataclass(frozen=True, slots=True)
class DictionaryRecord:
    """A dictionary whose results the store holds."""

    dictionary: str
    """Fingerprint."""
    name: str
    """As the user gave it, for example `gpt2-small-res-jb/blocks.8.hook_resid_pre`."""
    latents: int
    subject: str | None = None
    hook_point: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def control_of(self) -> str | None:
        """Fingerprint of the dictionary whose random-weight control this is; None for all others.

        A control's evidence lies apart (`controls/`), and the views of results leave it out.
        """
        return self.provenance.get("control_of")


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run as the store knows it."""

    run: str
    dictionary: str
    status: RunStatus
    seed: int
    code_version: str
    config: Mapping[str, Any]

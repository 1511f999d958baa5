"""The investigator without a language model: a fixed protocol through the same tools, checks and report.

1. Is the behaviour there at all? The metric on the search prompts; where it is log-odds, also what the model really writes,
   since of two tokens that it never writes one is always the likelier. If not on most prompts, that is the answer.
2. Prompts and variants are compared, and the metric is attributed to latents.
3. The leaders of the attribution are taken out, each alone, then all together; given what they are on the variants, which
   also says how far the metric falls from prompts to variants: what the suggested cause is worth.
4. A minimal set is grown by attribution and pruned; where the suggested cause matters, so is one whose exchange with the
   variants' activations ends the behaviour.
5. The one set is taken out, its pairs are looked at and its leader is steered as a curve; the other is exchanged.
6. Hypotheses are supported where a figure's interval lies beyond its control's, and what lies beyond is claimed. Else they are not
   shown; rejected is only what an interval speaks against.

What is done next depends on the view alone, so that it can be resumed. Every prediction follows from earlier figures by a
rule (`recipe_predictions`), so that the share that holds says what those rules are worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from exegete.agent.investigation.contract import (
    Call,
    Claim,
    Decision,
    Hypothesis,
    Metric,
    Question,
    Standing,
    View,
)
from exegete.agent.investigation.recipe_answer import answered
from exegete.agent.investigation.recipe_figures import LEADERS, SHARE, Figures
from exegete.agent.investigation.recipe_predictions import alone, emptied, leading, paired, steered, together
from exegete.tools.errors import UserError

__all__ = ["Recipe"]

ALONE = ("first", "second", "third")
"""Leaders of the attribution that are taken out one by one."""
FLIPPED = 0.9
"""Share of prompts that a minimal set is predicted to flip."""
PAIRED = 12
"""Latents of the set whose pairs are looked at, at most."""
KL = 0.5
"""Nats that the leader is steered by; the tool takes weaker and stronger ones beside it."""

Latents = Sequence[int]


@dataclass(frozen=True)
class Recipe:
    """A `contract.Investigator` that follows the protocol of this module."""

    name: str = "recipe"

    async def frame(self, question: Question) -> Metric:
        """Return the question's metric; else log-odds or log-probability, as the prompts name tokens.

        Raises:
            UserError: neither the question nor its prompts say what to measure.
        """
        if question.metric is not None:
            return question.metric
        if all(case.answer and case.other for case in question.cases):
            return Metric("log_odds")
        if all(case.answer for case in question.cases):
            return Metric("log_probability")
        raise UserError(
            "the recipe cannot tell what to measure, since not every prompt names an answer; give --metric, or prompts as "
            '.jsonl with {"prompt": …, "answer": …}'
        )

    async def decide(self, view: View) -> Decision:
        """Return the next calls of the protocol, or after the last ones the claims and the answer."""
        found = Figures(view)
        if view.steps_left > 1:
            for stage in STAGES:
                if calls := tuple(call for call in stage(found) if call.id not in found.results):
                    return Decision(calls=calls, hypotheses=hypotheses(found))
        words = answered(found)
        return Decision(hypotheses=hypotheses(found), claims=claims(found), answer=words, done=True)


def shown(found: Figures) -> list[Call]:
    """Is the behaviour there? The lookup of the prompts, and what the model writes."""
    calls = [Call("prompts", "prompts", {"count": 1})]
    if found.view.metric.kind == "log_odds":
        count = len(found.view.question.cases)
        because = "The metric is about what the model writes, so the answer should be what it writes."
        calls.append(
            _experiment("written", "generate", "H1", because, 0.5, None, prompts=count, tokens=1, temperature=0.0)
        )
    return calls


def sought(found: Figures) -> list[Call]:
    """Which latents differ between prompts and variants, and which hold the metric up?"""
    if not found.present:
        return []
    because = (
        f"A latent that matters should be worth {SHARE:.0%} of the log-odds between the prompts and the metric's line."
    )
    calls = [_experiment("attribute", "attribute", "H3", because, *leading(found))]
    if found.variants:
        because = "If the suggested cause acts, some latents should be active differently without it."
        calls.append(_experiment("compare", "compare", "H2", because, 1.0, None))
    return calls


def taken_out(found: Figures) -> list[Call]:
    """The leaders of the attribution, each alone, and all with what they are on the variants."""
    if not found.present:
        return []
    because = "Its exact loss on the prompts that were attributed, with the interval that their spread leaves open."
    calls = [
        _experiment(f"ablate {name}", "ablate", "H3", because, *alone(found, latent), latents=[latent])
        for name, (latent, _) in zip(ALONE, found.leaders, strict=False)
    ]
    exchanged = [latent for latent, _ in found.leaders] or found.differing[:LEADERS]
    if found.variants and exchanged:
        because = f"If the suggested cause acts, {SHARE:.0%} of the margin at least should act through these latents."
        high = -SHARE * found.margin
        calls.append(_experiment("interchange", "interchange", "H2", because, None, high, latents=exchanged))
    return calls


def all_taken_out(found: Figures) -> list[Call]:
    """The leaders of the attribution together."""
    every = [latent for latent, _ in found.leaders]
    if not found.present or len(every) < 2:
        return []
    because = "At least half of what they do alone; at most twice their effects in log-odds, or what the variants do."
    ends = together(found, every, [f"ablate {name}" for name in ALONE])
    return [_experiment("ablate leaders", "ablate", "H3", because, *ends, latents=every)]


def reduced(found: Figures) -> list[Call]:
    """A small set without which the behaviour is gone, and one that carries what the suggested cause does."""
    if not found.present:
        return []
    candidates = {} if found.headline("attribute") else {"candidates": found.differing}
    if candidates and not found.differing:
        return []
    because = "What a few latents hold up in the attribution should go with a small set of them."
    calls = [_experiment("minimal set", "minimal_set", "H4", because, FLIPPED, None, **candidates)]
    if found.matters:
        because = "What the variants change should pass through a small set of latents."
        given = {"how": "interchange", **candidates}
        calls.append(_experiment("carriers", "minimal_set", "H6", because, FLIPPED, None, **given))
    return calls


def tested(found: Figures) -> list[Call]:
    """What the sets do: one taken out, in pairs, its leader steered; the other with what it is on the variants."""
    calls, own, carriers = [], list(found.set), list(found.carriers)
    beyond = "should bring the metric below its line, and no further than the variants do."
    if own:
        because = f"A set that is just large enough to flip most prompts {beyond}"
        calls.append(_experiment("ablate set", "ablate", "H4", because, *emptied(found), latents=own))
    if len(own) > 1:
        because = "Where each alone leaves the behaviour, a pair should do more than their sum: log-odds add."
        pairs = own[:PAIRED]
        calls.append(_experiment("pairs", "interactions", "H5", because, *paired(found, pairs), latents=pairs))
    if carriers and found.difference is not None:
        because = f"Latents that are just enough to carry the suggested cause {beyond}"
        calls.append(_experiment("exchange", "interchange", "H6", because, *emptied(found), latents=carriers))
    if own:
        leader = next((latent for latent, _ in found.leaders if latent in own), own[0])
        because = (
            f"Where it acts at the last token, a KL of {KL:g} should lower log-odds by about a logit: a third to three."
        )
        given: dict[str, Any] = {"latents": [leader], "kl": KL, "direction": "down"}
        ends = steered(found, KL, f"ablate {ALONE[0]}")
        calls.append(_experiment("steer", "steer", "H7", because, *ends, **given))
    return calls


STAGES = (shown, sought, taken_out, all_taken_out, reduced, tested)
"""In their order; each returns its calls, all at once, as far as what was found before tells them."""


def hypotheses(found: Figures) -> tuple[Hypothesis, ...]:
    """Return all hypotheses with where they stand."""
    stated = [
        ("H1", "The model shows the behaviour on most of these prompts.", _status(found.present, against=True)),
        ("H3", "Latents that attribution ranks highest hold the metric up.", _status(found.lead)),
        ("H4", "The behaviour is gone without a small set of latents.", _status(found.necessary)),
        ("H5", "Pairs of the set do more together than the sum of what they do alone.", _status(found.interact)),
        (
            "H7",
            "Turned down, the leading latent lowers the metric more than others at the same KL.",
            _status(found.steers),
        ),
    ]
    if found.variants:
        stated += [
            ("H2", "The suggested cause matters: without it the metric falls.", _status(found.matters, found.idle)),
            ("H6", "What differs between prompts and variants acts through a small set.", _status(found.carries)),
        ]
    return tuple(Hypothesis(id, text, status) for id, text, status in sorted(stated))


def claims(found: Figures) -> tuple[Claim, ...]:
    """Return what lies beyond its controls on the search prompts."""
    claimed: list[Claim] = []
    if found.present and found.necessary:
        claimed.append(
            Claim(
                f"Without {_named(found.set)} most prompts no longer show the behaviour.",
                "causal",
                found.set,
                "ablate",
                "falls",
                flips=True,
                experiments=found.cited("minimal set", "ablate set"),
                hypothesis="H4",
            )
        )
    if found.present and found.carries:
        claimed.append(
            Claim(
                f"What differs between prompts and variants acts through {_named(found.carriers)}.",
                "causal",
                found.carriers,
                "interchange",
                "falls",
                flips=True,
                experiments=found.cited("carriers", "exchange"),
                hypothesis="H6",
            )
        )
    return tuple(claimed)


def _status(holds: bool | None, against: bool = False) -> Standing:
    if holds is None:
        return "open"
    return "supported" if holds else "rejected" if against else "not shown"


def _named(latents: Latents) -> str:
    return f"latent{'s' if len(latents) > 1 else ''} {', '.join(map(str, latents))}"


def _experiment(
    id: str, tool: str, hypothesis: str, because: str, low: float | None, high: float | None, **arguments: Any
) -> Call:
    """Return the call of an experiment with its prediction."""
    ends = {name: end for name, end in (("low", low), ("high", high)) if end is not None}
    return Call(id, tool, {"hypothesis": hypothesis, "because": because, **ends, **arguments})

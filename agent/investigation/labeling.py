"""Labeling one latent now, with what the label is worth beside what other latents' labels are worth.

1. The latent's windows, and those of a few other latents, drawn by the seed (`evidence`): splits explain and refine.
2. The lexical explainer reads the explain split and writes words with a predicate, without a language model. Where the
   investigation has a judge, the one-shot explainer asks it as well.
3. Each label is scored on the refine split: mean balanced accuracy of detection and fuzzing, by running the predicate or by
   asking the judge (`exegete.evaluators.refine_score`). It says which; the two judges' figures do not compare.
4. The floor: labels that the same explainer wrote for the other latents, on this latent's windows, by the same judge.

The test split is not read: these figures choose among labels, and are none to report of a dictionary.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exegete.agent.awaiting import awaited
from exegete.agent.findings import figure
from exegete.agent.investigation.bench import Bench
from exegete.agent.investigation.contract import Headline, Outcome
from exegete.agent.investigation.evidence import firing_latents, gathered
from exegete.agent.investigation.fencing import fenced
from exegete.agent.investigation.toolbelt import tool
from exegete.tools.errors import ToolError
from exegete.tools.estimates import Estimate, estimate
from exegete.tools.evidence import restrict
from exegete.tools.explainers import Explainer, Explanation
from exegete.tools.explainers.contract import NotExplained
from exegete.tools.seeds import derive_seed, generator
from exegete.tools.windows import LatentEvidence

if TYPE_CHECKING:
    from exegete.evaluators.contract import Judge
    from exegete.evaluators.refine_score import Refined

LABEL_SECONDS = 300.0
"""For all questions to language models of one label."""
FLOORS = 8
"""Other latents whose labels are tried in place of a label that costs nothing …"""
FLOORS_ASKED = 3
"""… and of one that costs a call."""
LEAST_FIRING = 2
"""Firing windows of either split, at least."""


@dataclass(frozen=True)
class Label:
    """What one explainer wrote, and what it is worth."""

    explainer: str
    judged: str
    """How: by running the predicate, or by asking which model."""
    explanation: Explanation | None
    why_not: str
    """Why there is none."""
    score: Refined | None
    floors: tuple[float, ...]
    """Of other latents' labels on the same windows."""

    @property
    def floor(self) -> Estimate | None:
        """Mean of the floors; None where no other latent has a label."""
        return estimate(self.floors) if self.floors else None


@tool("lookup")
def label(bench: Bench, latent: int) -> Outcome:
    """Write a label for one latent now, and score it on windows that its explainer did not see, beside other latents' labels.

    Slow where a language model judges (about 40 calls). Use it where the store's label is missing or scores badly.

    Args:
        latent: its index.
    """
    [own] = bench.latents([latent])
    others = _others(bench, own)
    found = gathered(bench, [own, *others])
    evidence, peers = found.evidence[0], found.evidence[1:]
    _require_firing(evidence, found.source)
    labels = _labels(bench, evidence, peers)
    lines = [
        f"latent {own}, labeled now ({found.source}); scores are mean balanced accuracies of detection and fuzzing on the "
        "refine split, one half is chance; the test split was not read"
    ]
    lines += [line for one in labels for line in _lines(one)]
    facts = {"latent": own, "source": found.source, "others": others, "labels": [_facts(one) for one in labels]}
    return Outcome("\n".join(lines), _headline(labels), facts)


async def _in_time(work: Coroutine[Any, Any, Label]) -> Label:
    try:
        async with asyncio.timeout(LABEL_SECONDS):
            return await work
    except TimeoutError:
        raise ToolError(f"labeling took longer than {LABEL_SECONDS:g} s; try again later, or go on without") from None


def _labels(bench: Bench, own: LatentEvidence, peers: Sequence[LatentEvidence]) -> list[Label]:
    from exegete.evaluators.predicate_judge import PredicateJudge
    from exegete.tools.explainers.background import background
    from exegete.tools.explainers.lexical import LexicalExplainer

    seed = derive_seed(bench.seed, "label", own.latent)
    told = background([restrict(one, "explain") for one in peers], seed=bench.seed)
    how = "by running the predicate"
    # Not in the judge's loop: it counts words for a while, and others wait for their replies there.
    labels = [awaited(_labeled(LexicalExplainer(told), PredicateJudge(), how, own, peers, FLOORS, seed))]
    if bench.judge is not None:
        from exegete.evaluators.model_judge import ModelJudge
        from exegete.tools.explainers.one_shot import OneShotExplainer

        writer, how = OneShotExplainer(bench.judge), f"by {bench.judge.name}, which also wrote it"
        asked = _labeled(writer, ModelJudge(bench.judge), how, own, peers, FLOORS_ASKED, seed)
        labels.append(bench.ask(_in_time(asked)))
    return labels


async def _labeled(
    explainer: Explainer,
    judge: Judge,
    how: str,
    own: LatentEvidence,
    peers: Sequence[LatentEvidence],
    floors: int,
    seed: int,
) -> Label:
    from exegete.evaluators.refine_score import RefineScore

    explanation, why_not = await _explained(explainer, own, seed)
    if explanation is None:
        return Label(explainer.name, how, None, why_not, None, ())
    score = RefineScore(judge)
    judged = await score.judged(explanation, own, seed)
    reached: list[float] = []
    for peer in peers:
        if len(reached) == floors:
            break
        other, _ = await _explained(explainer, peer, derive_seed(seed, "floor", peer.latent))
        value = None if other is None else await score(other, own, seed)
        reached += [] if value is None else [value]
    return Label(explainer.name, how, explanation, "", judged, tuple(reached))


async def _explained(explainer: Explainer, own: LatentEvidence, seed: int) -> tuple[Explanation | None, str]:
    try:
        return await explainer.explain(restrict(own, "explain"), seed), "the windows show nothing that it can say"
    except NotExplained as failure:
        return None, str(failure)


def _others(bench: Bench, own: int) -> list[int]:
    """Return latents whose labels are the floor: twice as many as are wanted, since some have none."""
    firing = [latent for latent in firing_latents(bench).tolist() if latent != own]
    drawn = generator(bench.seed, "label floors", own).permutation(len(firing))[: 2 * FLOORS]
    return [firing[place] for place in drawn]


def _require_firing(evidence: LatentEvidence, source: str) -> None:
    for split in ("explain", "refine"):
        firing = sum(window.fires for window in evidence.windows if window.split == split)
        if firing < LEAST_FIRING:
            raise ToolError(
                f"latent {evidence.latent} fires in {firing} windows of the split {split} ({source}); that is too little to "
                "label it: look at activations on prompts of your own"
            )


def _lines(one: Label) -> list[str]:
    if one.explanation is None or one.score is None:
        return [f"{one.explainer}: no label ({fenced('error', one.why_not)})"]
    score, floor = one.score, one.floor
    predicate = f" {fenced('predicate', one.explanation.predicate)}" if one.explanation.predicate else ""
    value = figure(score.value, score.low, score.high, score.n) or "none, since the judge gave no verdicts"
    against = "none: no other latent has a label" if floor is None else figure(*floor[:3], floor.n)
    return [
        f"{one.explainer}: {fenced('label', one.explanation.text)}{predicate}",
        f"  score {value}, judged {one.judged}; other latents' labels on the same windows {against}",
    ]


def _facts(one: Label) -> dict[str, Any]:
    score = one.score
    return {
        "explainer": one.explainer,
        "judged": one.judged,
        "explanation": one.explanation,
        "why_not": one.why_not,
        "score": None if score is None else {"value": score.value, "low": score.low, "high": score.high, "n": score.n},
        "floors": one.floors,
        "floor": one.floor,
    }


def _headline(labels: Sequence[Label]) -> Headline | None:
    """Return the last label's score: that of the language model, where there is one."""
    scored = [one for one in labels if one.score is not None]
    if not scored or scored[-1].score is None:
        return None
    score, floor = scored[-1].score, scored[-1].floor
    return Headline(
        f"score of the {scored[-1].explainer} label",
        *(score.value, score.low, score.high, score.n),
        control="other latents' labels on the same windows",
        control_value=None if floor is None else floor.value,
        control_low=None if floor is None else floor.low,
        control_high=None if floor is None else floor.high,
        control_n=0 if floor is None else floor.n,
    )

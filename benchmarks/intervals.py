"""Measure how often intervals cover the truth, and what stopping early saves. Run `python -m benchmarks.intervals`.

A judge errs on each item at a set rate, so that the expectation of every metric is known. With probability `together` all
items of a prompt share their error. Everything runs through `judging.evaluate`, as in a labeling run:

- `coverage`: 100 firing and 100 other windows in prompts of five. For each rate and correlation, the share of latents whose
  95 % interval holds the expectation, and the mean width: with nothing known of the judge (`cautious`), and with the
  clustering pooled over a pilot of other latents (`pilot`). A percentile bootstrap over prompts stands beside them.
- `stopping`: explanations of true rate 0.95, 0.75 and 0.5 (30, 40 and 30 %) against a target of 0.75.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from exegete.evaluators.contract import Evaluation, Item, JudgedItem, Score, Task, Verdict
from exegete.evaluators.judging import Question, evaluate
from exegete.evaluators.scoring import pilot_clustering, scores
from exegete.evaluators.statistics import Floats
from exegete.evaluators.stopping import Stopping
from exegete.tools.explainers import Explanation
from exegete.tools.seeds import derive_seed, generator
from exegete.tools.windows import Window

NORMAL = NormalDist()
RATES = (0.0, 0.05, 0.1, 0.2)
TOGETHER = (0.0, 1 / 3, 1.0)
MIXTURE = (0.95, 0.95, 0.95, 0.75, 0.75, 0.75, 0.75, 0.5, 0.5, 0.5)
PARAMETERS = {"items_per_prompt": 5}
SAID = Explanation("fires on yes")
METRICS = ("balanced_accuracy", "tpr", "f1", "auprc", "auroc")
RESAMPLES = 400


class Noisy:
    """Sees whether the token is `yes`, through normal noise that lets it err at `rate`."""

    name = "noisy"

    def __init__(self, rate: float, together: float) -> None:
        self.distance = NORMAL.inv_cdf(1 - rate) if rate else 10.0
        self.together = together

    async def judge(self, task: Task, explanation: Explanation, items: Sequence[Item], seed: int) -> list[Verdict]:
        """Return verdicts with probabilities; the noise is drawn from the prompt's seed."""
        rng = generator(seed, "noise")
        noise = rng.standard_normal(len(items))
        if rng.random() < self.together:
            noise[:] = noise[0]
        signs = [1 if item.tokens == ("yes",) else -1 for item in items]
        return [
            Verdict(sign * (self.distance + z) > 0, NORMAL.cdf(sign * (self.distance + z)))
            for sign, z in zip(signs, noise.tolist(), strict=True)
        ]


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=1000, help="in each case")
    parser.add_argument("--pilot", type=int, default=50, help="latents of the pilot")
    parser.add_argument("--bootstrap", type=int, default=200, help="latents that are bootstrapped for comparison")
    parser.add_argument("--items", type=int, default=100, help="of each class")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    began = time.process_time()
    figures: dict[str, Any] = {"options": vars(chosen)}
    figures["coverage"] = [asyncio.run(coverage(rate, t, chosen)) for rate in RATES for t in TOGETHER]
    figures["stopping"] = [asyncio.run(stopping(t, chosen)) for t in TOGETHER]
    print(json.dumps(figures | {"cpu_s": round(time.process_time() - began, 1)}, indent=1))


async def coverage(rate: float, together: float, chosen: argparse.Namespace) -> dict[str, Any]:
    """Return coverage and mean width of each metric for a judge of error `rate`, correlated in `together` of the prompts."""
    judge = Noisy(rate, together)
    truth = expectations(rate)
    pilot = [await judged(judge, chosen, "pilot", n) for n in range(chosen.pilot)]
    known = pilot_clustering(evaluation.verdicts for evaluation in pilot)
    latents = [await judged(judge, chosen, "latent", n) for n in range(chosen.latents)]
    again = [scores("detection", latent.verdicts, {}, known) for latent in latents]
    return {
        "rate": rate,
        "together": round(together, 3),
        "icc": round(known.balanced, 3),
        "cautious": covered([latent.scores for latent in latents], truth),
        "pilot": covered(again, truth),
        "bootstrap": bootstrapped([latent.verdicts for latent in latents[: chosen.bootstrap]], truth, chosen.seed),
    }


async def judged(judge: Noisy, chosen: argparse.Namespace, *names: str | int, **options: Any) -> Evaluation:
    """Return the evaluation of one simulated latent."""
    seed = derive_seed(chosen.seed, str(judge.distance), str(judge.together), *names)
    questions = [question(n, truth) for truth in (True, False) for n in range(chosen.items)]
    return await evaluate("detection", SAID, questions, judge, seed, PARAMETERS, **options)


def question(number: int, truth: bool) -> Question:
    """Return a window of one token, which says whether it fires."""
    tokens = ("yes",) if truth else ("no",)
    return Question(Window(number, tokens, None, truth, "test", "firing" if truth else "random"), truth)


def expectations(rate: float) -> dict[str, float]:
    """Return each metric's value on endlessly many items of equal classes."""
    distance = Noisy(rate, 0.0).distance
    at = np.linspace(-15, 15, 6_001)
    recall, false = (np.array([1 - NORMAL.cdf(t - d) for t in at]) for d in (distance, -distance))
    precision = np.divide(recall, recall + false, out=np.ones_like(at), where=recall + false > 0)
    auprc = float(((precision[1:] + precision[:-1]) / 2 * -np.diff(recall)).sum())
    rates = dict.fromkeys(("balanced_accuracy", "tpr", "f1"), 1 - rate)
    return rates | {"auroc": NORMAL.cdf(distance * 2**0.5), "auprc": auprc}


def covered(latents: Sequence[Sequence[Score]], truth: dict[str, float]) -> dict[str, list[float]]:
    """Return for each metric [share of latents covered, mean width]."""
    return {name: share_and_width([limits_of(one, name) for one in latents], truth[name]) for name in METRICS}


def limits_of(found: Sequence[Score], metric: str) -> tuple[float, float]:
    """Return the interval of `metric`."""
    score = next(score for score in found if score.metric == metric)
    assert score.low is not None and score.high is not None
    return score.low, score.high


def share_and_width(limits: Sequence[tuple[float, float]], truth: float) -> list[float]:
    """Return [share of `limits` that hold `truth`, mean width]."""
    low, high = np.array(limits, dtype=np.float64).T
    inside = (low <= truth + 1e-9) & (truth - 1e-9 <= high)
    return [round(float(inside.mean()), 3), round(float((high - low).mean()), 3)]


def bootstrapped(latents: Sequence[Sequence[JudgedItem]], truth: dict[str, float], seed: int) -> dict[str, list[float]]:
    """Return what `covered` returns, of a percentile bootstrap over prompts of F1 and AUPRC."""
    limits: dict[str, list[tuple[float, float]]] = {"f1": [], "auprc": []}
    for number, verdicts in enumerate(latents):
        fires = np.array([item.truth for item in verdicts])
        probabilities = np.array([item.verdict.probability for item in verdicts], dtype=np.float64)
        prompts = np.array([item.prompt for item in verdicts])
        count = int(prompts.max()) + 1
        rng = generator(seed, "bootstrap", number)
        weights = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)[:, prompts].astype(np.float64)
        limits["f1"].append(quantiles(weighted_f1(fires, probabilities > 0.5, weights)))
        limits["auprc"].append(quantiles(weighted_auprc(fires, probabilities, weights)))
    return {name: share_and_width(found, truth[name]) for name, found in limits.items() if found}


def weighted_f1(truth: Any, said: Any, weights: Floats) -> Floats:
    """Return F1 of each row of `weights`."""
    hits = 2 * weights @ (truth & said)
    found: Floats = hits / np.maximum(hits + weights @ (truth != said), 1e-9)
    return found


def weighted_auprc(truth: Any, probabilities: Floats, weights: Floats) -> Floats:
    """Return average precision of each row of `weights`; probabilities are all different."""
    order = np.argsort(-probabilities)
    shown = weights[:, order]
    hits = np.cumsum(shown * truth[order], axis=1)
    precision = hits / np.maximum(np.cumsum(shown, axis=1), 1)
    found: Floats = (shown * truth[order] * precision).sum(axis=1) / hits[:, -1]
    return found


def quantiles(samples: Floats) -> tuple[float, float]:
    """Return the middle 95 % of `samples`."""
    low, high = np.nanquantile(samples, [0.025, 0.975])
    return float(low), float(high)


async def stopping(together: float, chosen: argparse.Namespace) -> dict[str, Any]:
    """Return the share of prompts saved, of latents covered at the stopping time, and of latents decided, by true rate."""
    judges = {rate: Noisy(1 - rate, together) for rate in MIXTURE}
    rates = [MIXTURE[n % len(MIXTURE)] for n in range(chosen.latents)]
    found = [
        (await judged(judges[rate], chosen, "stop", n, stopping=Stopping())).scores[0] for n, rate in enumerate(rates)
    ]
    asked = np.array([score.parameters["prompts_asked"] for score in found])
    planned = np.array([score.parameters["prompts_planned"] for score in found])
    of: Callable[[float], Any] = lambda rate: np.array(rates) == rate  # noqa: E731
    inside = [score.low - 1e-9 <= rate <= score.high + 1e-9 for score, rate in zip(found, rates, strict=True)]  # type: ignore[operator]
    return {
        "together": round(together, 3),
        "saved": round(float(1 - asked.sum() / planned.sum()), 3),
        "covers": round(float(np.mean(inside)), 4),
        "verdicts": {str(rate): round(float(asked[of(rate)].mean() * 5), 1) for rate in judges},
        "stopped": {
            str(rate): round(float(np.mean([s.parameters["stopped"] for s, r in zip(found, rates, strict=True) if r == rate])), 3)
            for rate in judges
        },
    }  # fmt: skip


if __name__ == "__main__":
    main()

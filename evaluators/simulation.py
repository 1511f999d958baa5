"""Simulation: can a reader of the explanation predict the activation on every token? (PROTOCOLS §5)

Source: Bills et al. 2023, "Language models can explain neurons in language models" (OpenAI), section 'simulate'.

1. The judge gets the explanation and one window as numbered tokens, and predicts a whole number from 0 to 10 for each.
   Keyed by the token's number, an answer cannot slip by one; one that leaves a token out has the wrong shape and fails.
2. Where the server gives log-probabilities, the prediction is the expectation over the eleven numbers among the
   alternatives of the answer's token, renormalised over those that are listed; else it is the number itself. A number
   that does not stand in a token of its own is taken as it is; the share of expectations is stored with the score.
   With a tokenizer that splits 10 in two, an alternative 1 may stand for either, and counts as 1.
3. `ev_correlation` is the Pearson correlation of true and predicted activations over all tokens of all windows
   concatenated. It is null, with a status, where one of the two is constant.
4. Its interval is a percentile bootstrap over windows; each is one prompt.

Windows are the firing and the silent ones that detection scores; the figure depends on their mixture, which is stored.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from exegete.evaluators.contract import Evaluation, Judge, Score, evaluator
from exegete.evaluators.ranking import scored_windows
from exegete.evaluators.requirements import required
from exegete.evaluators.statistics import UNDEFINED, Interval
from exegete.tools.explainers import Explanation
from exegete.tools.llm import Client, Reply, Request, TokenLogprob, schema_text
from exegete.tools.prompting import line, prompt_digest, render, window_line
from exegete.tools.seeds import generator
from exegete.tools.windows import Kind, LatentEvidence, Split, Window

Floats = NDArray[np.float64]

HIGHEST = 10
BOOTSTRAP_SAMPLES = 1_000
_LEVELS = frozenset(map(float, range(HIGHEST + 1)))
_ENTRY = re.compile(r'"(\d+)"\s*:\s*(\d+)')
_ONE_NUMBER = re.compile(r"\D*(\d+)\D*")


class Prediction(NamedTuple):
    """What the judge predicts for one window."""

    values: Floats
    """Shape (tokens,), from 0 to 10."""
    expectations: int
    """Tokens whose value is an expectation."""


@evaluator("simulation")
class Simulation:
    """Pearson correlation of true activations with those that a language model predicts from the explanation."""

    name = "simulation"
    headline = "ev_correlation"

    def __init__(
        self,
        client: Client | None = None,
        split: Split = "test",
        negatives: Sequence[Kind] = ("random",),
        items_per_class: int | None = None,
        max_tokens: int = 1_024,
        temperature: float | None = None,
    ) -> None:
        """Ask `client` about the windows of `split`, at most `items_per_class` firing and as many silent ones.

        Raises:
            UserError: there is no client.
        """
        self.client = required(self.name, "client", client, "a language model that simulates")
        self.split = split
        self.negatives = tuple(negatives)
        self.items_per_class = items_per_class
        self.max_tokens = max_tokens
        self.temperature = temperature

    async def evaluate(
        self, explanation: Explanation, evidence: LatentEvidence, judge: Judge | None, seed: int
    ) -> Evaluation:
        """Return `ev_correlation` of `explanation`; the client is asked, not the judge."""
        chosen = scored_windows(evidence, self.split, self.negatives, self.items_per_class)
        windows = [window for window in chosen.all if window.activations is not None]
        replies = await asyncio.gather(*(self.client.complete(self._request(explanation, one)) for one in windows))
        predictions = [predicted(reply, len(one.tokens)) for reply, one in zip(replies, windows, strict=True)]
        given = [
            (np.asarray(window.activations, dtype=np.float64), prediction)
            for window, prediction in zip(windows, predictions, strict=True)
            if prediction is not None
        ]
        interval, reason = correlation(
            [truth for truth, _ in given], [p.values for _, p in given], generator(seed, self.name, "bootstrap")
        )
        if not given:
            reason = _reason(chosen.all, replies)
        parameters = self._parameters(chosen.all, given)
        failures = len(windows) - len(given)
        score = Score(
            self.name, "ev_correlation", *interval, len(given), failures, status=reason, parameters=parameters
        )
        return Evaluation((score,), ())

    def _request(self, explanation: Explanation, window: Window) -> Request:
        tokens = [window_line([token]) for token in window.tokens]
        return render("simulation", explanation=line(explanation.text), tokens=tokens).request(
            schema_text(answer_schema(len(tokens))),
            max_tokens=max(self.max_tokens, 64 + 16 * len(tokens)),
            temperature=self.temperature,
            logprobs=True,
        )

    def _parameters(self, windows: Sequence[Window], given: Sequence[tuple[Floats, Prediction]]) -> Mapping[str, Any]:
        tokens = sum(len(truth) for truth, _ in given)
        return {
            "split": self.split,
            "negatives": self.negatives,
            "client": self.client.name,
            "prompt_digest": prompt_digest("simulation"),
            "temperature": self.temperature,
            "tokens": tokens,
            "firing_windows": sum(bool(truth.any()) for truth, _ in given),
            "windows_without_activations": sum(window.activations is None for window in windows),
            "expectation_share": sum(p.expectations for _, p in given) / tokens if tokens else None,
        }


def answer_schema(tokens: int) -> dict[str, Any]:
    """Return the JSON Schema of an answer on `tokens` tokens: an object from "1" … to whole numbers from 0 to 10."""
    names = [str(number) for number in range(1, tokens + 1)]
    value = {"type": "integer", "enum": list(range(HIGHEST + 1))}
    return {
        "type": "object",
        "properties": dict.fromkeys(names, value),
        "required": names,
        "additionalProperties": False,
    }


def predicted(reply: Reply, tokens: int) -> Prediction | None:
    """Return what a reply predicts for a window of `tokens` tokens; None where it does not answer for each of them."""
    answer = reply.parsed
    if reply.status != "ok" or not isinstance(answer, dict) or len(answer) != tokens:
        return None
    stated = [answer.get(str(number)) for number in range(1, tokens + 1)]
    if not all(_is_level(value) for value in stated):
        return None
    values = np.array(stated, dtype=np.float64)
    known = {number: value for number, stated, value in _expectations(reply) if stated == answer.get(str(number))}
    for number, expected in known.items():
        values[number - 1] = expected
    return Prediction(values, len(known))


def correlation(
    truths: Sequence[Floats], predictions: Sequence[Floats], rng: np.random.Generator
) -> tuple[Interval, str]:
    """Return Pearson's correlation over all tokens, its bootstrap interval over windows, and a status.

    Args:
        truths: true activations, one array of shape (tokens,) for each window.
        predictions: predicted ones, likewise.
        rng: of the bootstrap.
    """
    if not truths:
        return UNDEFINED, "no_items"
    x, y = np.concatenate(truths), np.concatenate(predictions)
    # By value, not by variance: the variance of equal floats need not be zero.
    if np.ptp(y) == 0:
        return UNDEFINED, "constant_prediction"
    if np.ptp(x) == 0:
        return UNDEFINED, "constant_truth"
    x, y = (x - x.mean()) / x.std(), (y - y.mean()) / y.std()
    starts = np.cumsum([0] + [len(truth) for truth in truths[:-1]])
    moments = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)
    sums = np.add.reduceat(moments, starts, axis=0)
    value = float(np.clip(_pearson(sums.sum(axis=0)[None])[0], -1.0, 1.0))
    draws = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=BOOTSTRAP_SAMPLES)
    samples = _pearson(draws.astype(np.float64) @ sums)
    low, high = np.quantile(samples[np.isfinite(samples)], [0.025, 0.975])
    return Interval(value, min(value, float(low)), max(value, float(high))), "ok"


def _pearson(sums: Floats) -> Floats:
    """Return the correlations from sums of 1, x, y, x², y², xy, shape (samples, 6); NaN where one is constant."""
    n, x, y, xx, yy, xy = sums.T
    spread = (n * xx - x * x) * (n * yy - y * y)
    # What is left of a constant sample is rounding.
    found: Floats = np.full(len(sums), math.nan)
    np.divide(n * xy - x * y, np.sqrt(np.maximum(spread, 0.0)), out=found, where=spread > 1e-12 * n**4)
    return found


def _is_level(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and float(value) in _LEVELS


def _expectations(reply: Reply) -> Iterator[tuple[int, int, float]]:
    """Yield (number of the token, stated value, expected value) for every answer in a token of the reply of its own."""
    if not reply.logprobs:
        return
    text = "".join(token.token for token in reply.logprobs)
    starts = np.cumsum([0] + [len(token.token) for token in reply.logprobs])
    for entry in _ENTRY.finditer(text):
        index = int(np.searchsorted(starts, entry.start(2), side="right")) - 1
        token = reply.logprobs[index]
        alone = _ONE_NUMBER.fullmatch(token.token)
        if entry.end(2) <= starts[index + 1] and alone and alone[1] == entry[2]:
            yield int(entry[1]), int(entry[2]), _expectation(token)


def _expectation(token: TokenLogprob) -> float:
    """Return the mean over the numbers from 0 to 10 among a token's alternatives, by their probabilities."""
    weights: dict[int, float] = {}
    for text, logprob in {**dict(token.top), token.token: token.logprob}.items():
        number = _ONE_NUMBER.fullmatch(text)
        if number and int(number[1]) <= HIGHEST:
            weights[int(number[1])] = weights.get(int(number[1]), 0.0) + math.exp(logprob)
    return sum(level * weight for level, weight in weights.items()) / sum(weights.values())


def _reason(windows: Sequence[Window], replies: Sequence[Reply]) -> str:
    if not windows:
        return "no_items"
    if not replies:
        return "no_activations"
    return "unparsed" if replies[0].status == "ok" else replies[0].status

"""Generation: four scores of an explanation by what a language model writes and rates under it (PROTOCOLS §9).

After Puri et al. 2025, "FADE: Why Bad Descriptions Happen to Good Features". A Gini here is 2·AUROC − 1 and *signed*: FADE
takes its absolute value, which hides explanations that say the opposite of what is true.

1. `clarity`: the client writes texts on which the latent should fire under the explanation, and texts on which it should
   not; the subject runs on them. The Gini of the latent's peak activation between the two sets.
2. `responsiveness`: the client rates windows of the scored split from 0 to 2. The Gini of the peak activation between
   windows rated 2 and windows rated 0. `purity`: the average precision of the peak activation for a rating of 2, on the
   same windows; its base rate, which a random ranking reaches, is stored with it.
3. `faithfulness`: the latent's activation is multiplied by each of a ladder of factors (0 ablates it, 1 leaves it) while
   the subject continues prompts; p(f) is the share of continuations rated 2. (p(f) − p(1)) / (1 − p(1)) at the best f,
   null where p(1) = 1. The best factor is found on prompts of the other splits and measured on the scored ones: the
   maximum of several noisy shares on the same prompts would be above zero for an explanation that says nothing.
   Its interval is a percentile bootstrap over prompts, without width where no continuation changes its rating.

A latent that never fires has no clarity beyond ties, and multiplying it changes nothing: see intervention for those.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exegete.evaluators.contract import Evaluation, Judge, Score, evaluator
from exegete.evaluators.effect_passages import select_prompts
from exegete.evaluators.ranking import auroc_interval, scored_windows
from exegete.evaluators.requirements import required
from exegete.evaluators.statistics import UNDEFINED, Interval, area
from exegete.evaluators.written import PER_PROMPT, Asking, Ratings, rate, write_texts
from exegete.tools.errors import UserError
from exegete.tools.explainers import Explanation
from exegete.tools.llm import Client
from exegete.tools.prompting import prompt_digest
from exegete.tools.seeds import derive_seed, generator
from exegete.tools.windows import Kind, LatentEvidence, Split, Window

if TYPE_CHECKING:
    from exegete.tools.dictionaries import Dictionary
    from exegete.tools.interventions import Tokens
    from exegete.tools.live_model import LiveModel

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]

BOOTSTRAP_SAMPLES = 1_000
SAMPLES_SHOWN = 3


@evaluator("generation")
class GenerationScores:
    """Clarity, responsiveness, purity and faithfulness: what a language model writes and rates under the explanation."""

    name = "generation"
    headline = "clarity"

    def __init__(
        self,
        model: LiveModel | None = None,
        dictionary: Dictionary | None = None,
        client: Client | None = None,
        split: Split = "test",
        negatives: Sequence[Kind] = ("random",),
        items_per_class: int | None = 25,
        requests: int = 3,
        factors: Sequence[float] = (0.0, 1.0, 3.0, 10.0, 30.0),
        prompts: int = 15,
        tokens: int = 8,
        max_tokens: int = 1_024,
        temperature: float | None = None,
    ) -> None:
        """Score on `split`.

        Args:
            model: the live model.
            dictionary: of the latents, attached to the model.
            client: writes and rates.
            split: of the windows and prompts that are scored.
            negatives: kinds of the silent windows.
            items_per_class: windows to be rated, at most, firing and silent ones each.
            requests: for texts; each asks for five of either kind.
            factors: of faithfulness; 1 among them.
            prompts: to be continued, at most; and as many of the other splits to find the factor on.
            tokens: length of a continuation.
            max_tokens: of an answer.
            temperature: of the client; None leaves the provider's default.

        Raises:
            UserError: model, dictionary or client are missing, or a number is out of range.
        """
        self.model = required(self.name, "model", model, "a live model")
        self.dictionary = required(self.name, "dictionary", dictionary, "the dictionary of the latents")
        given = required(self.name, "client", client, "a language model that writes and rates")
        self.asking = Asking(given, max_tokens, temperature)
        if 1.0 not in factors or len(factors) < 2 or not np.isfinite(factors).all():
            raise UserError(f"factors={tuple(factors)}; give finite ones, 1 (which changes nothing) and another")
        if min(requests, prompts, tokens) < 1:
            raise UserError(f"requests={requests}, prompts={prompts}, tokens={tokens}; give at least 1 each")
        self.split = split
        self.negatives = tuple(negatives)
        self.items_per_class = items_per_class
        self.requests = requests
        self.factors = tuple(map(float, factors))
        self.prompts = prompts
        self.tokens = tokens

    async def evaluate(
        self, explanation: Explanation, evidence: LatentEvidence, judge: Judge | None, seed: int
    ) -> Evaluation:
        """Return the four scores of `explanation`; the client is asked, not the judge."""
        self.model.require_latents(self.dictionary, [evidence.latent])
        own = derive_seed(seed, self.name)
        found = await asyncio.gather(
            self._clarity(explanation, evidence),
            self._ranking(explanation, evidence, own),
            self._faithfulness(explanation, evidence, own),
        )
        return Evaluation((found[0], *found[1], found[2]), ())

    async def _clarity(self, explanation: Explanation, evidence: LatentEvidence) -> Score:
        # Windows on which it does not fire: they show the style, and give nothing of the answer away.
        samples = [window.text for window in evidence.select("explain", kind="random")[:SAMPLES_SHOWN]]
        texts = await write_texts(self.asking, explanation, samples, self.requests)
        peaks = await asyncio.to_thread(self._peaks, evidence.latent, [*texts.firing, *texts.silent])
        truth = np.arange(len(peaks)) < len(texts.firing)
        usable = np.isfinite(peaks)
        interval = _gini(auroc_interval(truth[usable], peaks[usable]))
        failed = [status for status in texts.statuses if status != "ok"]
        status = "ok" if interval.value is not None else next(iter(failed), "error")
        parameters = self._parameters("write_texts") | {
            "requests": self.requests,
            "failed_requests": len(failed),
            "fired": int((peaks[usable] > 0).sum()),
        }
        failures = 2 * PER_PROMPT * self.requests - int(usable.sum())
        return self._score("clarity", interval, int(usable.sum()), failures, status, parameters)

    def _peaks(self, latent: int, texts: Sequence[str]) -> Floats:
        """Return the peak activation on each text, shape (text,), NaN where it has no token; long ones are cut."""
        from exegete.tools.text_activations import activations

        subject = self.model.subject
        begin = () if subject.bos is None else (subject.bos,)
        prompts = [(*begin, *tokens)[: subject.max_context] for tokens in subject.encode(list(texts))]
        peaks: Floats = np.full(len(texts), np.nan)
        readable = [index for index, tokens in enumerate(prompts) if len(tokens) > len(begin)]
        if readable:
            found = activations(self.model, self.dictionary, [prompts[index] for index in readable], [latent])
            for index, values in zip(readable, found, strict=True):
                spelled = [token not in subject.special_tokens for token in prompts[index]]
                peaks[index] = float(values[spelled, 0].max(initial=0.0))
        return peaks

    async def _ranking(self, explanation: Explanation, evidence: LatentEvidence, seed: int) -> list[Score]:
        chosen = scored_windows(evidence, self.split, self.negatives, self.items_per_class)
        windows = [window for window in chosen.all if window.activations is not None]
        ratings = await rate(self.asking, explanation, [window.tokens for window in windows], seed)
        truth, peaks, prompts = _clear(windows, ratings)
        status = "ok" if truth.any() and not truth.all() else _reason(ratings, "no_contrast")
        intervals = {
            "responsiveness": _gini(area("auroc", truth, peaks, prompts)),
            "purity": area("auprc", truth, peaks, prompts),
        }
        parameters = self._parameters("rating") | {
            "rated": {str(level): ratings.values.count(level) for level in (0, 1, 2)},
            "base_rate": float(truth.mean()) if len(truth) else None,
        }
        return [
            self._score(metric, interval, len(truth), ratings.failures, status, parameters)
            for metric, interval in intervals.items()
        ]

    async def _faithfulness(self, explanation: Explanation, evidence: LatentEvidence, seed: int) -> Score:
        prompts = select_prompts(self.model, evidence, self.split, self.prompts)
        parameters = self._parameters("rating") | {"factors": self.factors, "tokens": self.tokens}
        if not prompts.scored or not prompts.matching:
            missing = "no_items" if not prompts.scored else "no_matching_prompts"
            return self._score("faithfulness", UNDEFINED, 0, 0, missing, parameters)
        searched = await self._shown(explanation, evidence.latent, prompts.matching, self.factors, seed, "search")
        shares = {factor: _share(shown) for factor, shown in searched.items()}
        known = {factor: share for factor, share in shares.items() if share is not None}
        if 1.0 not in known:
            return self._score("faithfulness", UNDEFINED, 0, len(prompts.scored), "error", parameters)
        # Of equals the one that changes least.
        best = max(known, key=lambda factor: (known[factor], -abs(factor - 1.0)))
        measured = await self._shown(
            explanation, evidence.latent, prompts.scored, tuple({1.0: None, best: None}), seed, "score"
        )
        interval, n, status = faithfulness(measured[best], measured[1.0], generator(seed, "faithfulness"))
        parameters |= {"factor": best, "shares_on_other_splits": {str(f): share for f, share in shares.items()}}
        parameters |= {"share": _share(measured[best]), "share_unchanged": _share(measured[1.0])}
        return self._score("faithfulness", interval, n, len(prompts.scored) - n, status, parameters)

    async def _shown(
        self,
        explanation: Explanation,
        latent: int,
        prompts: Sequence[Tokens],
        factors: Sequence[float],
        seed: int,
        purpose: str,
    ) -> dict[float, list[bool | None]]:
        """Return for each factor whether each continuation clearly expresses the explanation; None where not known."""
        texts = await asyncio.to_thread(self._continued, latent, prompts, factors, seed)
        ratings = await rate(self.asking, explanation, [[text] for text in texts], derive_seed(seed, purpose))
        clear = [None if value is None else value == 2 for value in ratings.values]
        return {factor: clear[i * len(prompts) : (i + 1) * len(prompts)] for i, factor in enumerate(factors)}

    def _continued(self, latent: int, prompts: Sequence[Tokens], factors: Sequence[float], seed: int) -> list[str]:
        from exegete.tools.generation import generate
        from exegete.tools.interventions import scale
        from exegete.tools.live_model import Trial

        edits = [scale(self.dictionary.fingerprint, [latent], factor) for factor in factors]
        trials = [Trial(prompt, edit, draw) for edit in edits for draw, prompt in enumerate(prompts)]
        return [self.model.text(one.tokens) for one in generate(self.model, trials, self.tokens, seed=seed)]

    def _parameters(self, prompt: str) -> dict[str, Any]:
        return {
            "split": self.split,
            "client": self.asking.client.name,
            "prompt_digest": prompt_digest(prompt),
            "client_temperature": self.asking.temperature,
        }

    def _score(
        self, metric: str, interval: Interval, n: int, failures: int, status: str, parameters: Mapping[str, Any]
    ) -> Score:
        return Score(self.name, metric, *interval, n, failures, status=status, parameters=parameters)


def faithfulness(
    changed: Sequence[bool | None], unchanged: Sequence[bool | None], rng: np.random.Generator
) -> tuple[Interval, int, str]:
    """Return (p(f) − p(1)) / (1 − p(1)) with its bootstrap interval over prompts, how many prompts, and a status.

    Args:
        changed: for each prompt whether the continuation at factor f is rated 2; None where not known.
        unchanged: the same at factor 1.
        rng: of the bootstrap.
    """
    pairs = [(a, b) for a, b in zip(changed, unchanged, strict=True) if a is not None and b is not None]
    if not pairs:
        return UNDEFINED, 0, "error"
    shown = np.array(pairs, dtype=np.float64)
    after, before = shown.mean(axis=0)
    if before == 1:
        return UNDEFINED, len(pairs), "always_shown"
    value = float((after - before) / (1 - before))
    draws = rng.multinomial(len(pairs), np.full(len(pairs), 1 / len(pairs)), size=BOOTSTRAP_SAMPLES) / len(pairs)
    means = draws @ shown
    rest = 1 - means[:, 1]
    samples = (means[:, 0] - means[:, 1])[rest > 1e-9] / rest[rest > 1e-9]
    low, high = np.quantile(samples, [0.025, 0.975])
    return Interval(value, min(value, float(low)), max(value, float(high))), len(pairs), "ok"


def _clear(windows: Sequence[Window], ratings: Ratings) -> tuple[Bools, Floats, NDArray[np.int64]]:
    """Return, for the windows rated 2 or 0, whether it is 2, the peak activation, and the prompt; shapes (windows,)."""
    chosen = [index for index, value in enumerate(ratings.values) if value in (0, 2)]
    truth = np.array([ratings.values[index] == 2 for index in chosen], dtype=np.bool_)
    peaks = np.array([windows[index].peak for index in chosen], dtype=np.float64)
    return truth, peaks, np.array([ratings.prompts[index] for index in chosen], dtype=np.int64)


def _gini(area_under: Interval) -> Interval:
    return Interval(*(None if end is None else 2 * end - 1 for end in area_under))


def _share(shown: Sequence[bool | None]) -> float | None:
    known = [one for one in shown if one is not None]
    return sum(known) / len(known) if known else None


def _reason(ratings: Ratings, otherwise: str) -> str:
    """Return why there is no figure."""
    if not ratings.values:
        return "no_items"
    return otherwise if ratings.failures < len(ratings.values) else ratings.statuses[0]

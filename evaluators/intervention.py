"""Intervention: does the explanation say what happens to the output when the latent is turned up? (PROTOCOLS §8)

Source: Paulo et al. 2024, "Automatically Interpreting Millions of Features in Large Language Models", section
'intervention scoring'.

1. `effect_passages` continues each prompt of the scored split twice, clean and with the latent turned up, at a strength
   that was matched to a KL divergence on prompts of other splits. So it does for a random latent of the same firing rate
   and for a random direction, at the same KL.
2. With a client (forced choice) a language model is shown both continuations and the explanation, and says which is the
   steered one. The score is its `accuracy`; one half is chance.
   With a scorer (log-probability mode) it is `information`: the mean of log p(explanation | steered passage) −
   log p(explanation | clean passage), in nats.
3. The same explanation is scored on the passages of both controls: a figure that they reach too says that the model was
   pushed, not that the explanation is right. They stand beside it as `…_random_latent` and `…_random_direction`.

A latent or control that does not reach the KL has no figure and the status "unreachable".
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exegete.evaluators.contract import Evaluation, Judge, Score, evaluator
from exegete.evaluators.effect_passages import Arm, Passage, Prompts, Steering, arms, select_prompts
from exegete.evaluators.forced_choice import Shown, choose
from exegete.evaluators.requirements import required
from exegete.evaluators.statistics import UNDEFINED, Interval
from exegete.tools.errors import UserError
from exegete.tools.estimates import estimate
from exegete.tools.explainers import Explanation
from exegete.tools.llm import Client, PromptScorer
from exegete.tools.prompting import Rendered, line, prompt_digest, render, window_line
from exegete.tools.seeds import derive_seed
from exegete.tools.windows import LatentEvidence, Split

if TYPE_CHECKING:
    from exegete.tools.dictionaries import Dictionary
    from exegete.tools.live_model import LiveModel

_LATENTS_KEPT = 256


@evaluator("intervention")
class Intervention:
    """Whether the explanation tells what a model writes with the latent turned up from what it writes without."""

    name = "intervention"

    def __init__(
        self,
        model: LiveModel | None = None,
        dictionary: Dictionary | None = None,
        rates: Sequence[float] | NDArray[np.float64] | None = None,
        client: Client | None = None,
        scorer: PromptScorer | None = None,
        split: Split = "test",
        steering: Steering | None = None,
        max_tokens: int = 1_024,
        temperature: float | None = None,
    ) -> None:
        """Score on prompts of `split`, by forced choice of `client` or by log-probabilities of `scorer`.

        Args:
            model: the live model.
            dictionary: of the latents, attached to the model.
            rates: share of tokens on which each latent fires, shape (latent,), for the random latent.
            client: a language model that chooses.
            scorer: a local model that gives log-probabilities; instead of a client.
            split: of the scored prompts; strengths are matched on the others.
            steering: the settings.
            max_tokens: of the client's answer.
            temperature: of the client; None leaves the provider's default.

        Raises:
            UserError: model, dictionary or rates are missing, or there is not exactly one of client and scorer.
        """
        self.model = required(self.name, "model", model, "a live model")
        self.dictionary = required(self.name, "dictionary", dictionary, "the dictionary of the latents")
        self.rates = np.asarray(required(self.name, "rates", rates, "firing rates of all latents"), dtype=np.float64)
        if (client is None) == (scorer is None):
            raise UserError(
                "evaluator 'intervention' needs a language model: make it with client=… for forced choice, or with scorer=… "
                "for log-probabilities, not with both"
            )
        self.client = client
        self.scorer = scorer
        self.split = split
        self.steering = steering or Steering()
        self.max_tokens = max_tokens
        self.temperature = temperature
        # Floors ask about the same passages again.
        self._kept: OrderedDict[tuple[int, int, Prompts], list[Arm]] = OrderedDict()

    async def evaluate(
        self, explanation: Explanation, evidence: LatentEvidence, judge: Judge | None, seed: int
    ) -> Evaluation:
        """Return the score of `explanation` and of its two controls; the client or scorer is asked, not the judge."""
        prompts = select_prompts(self.model, evidence, self.split, self.steering.prompts)
        if not prompts.scored or not prompts.matching:
            missing = "no_items" if not prompts.scored else "no_matching_prompts"
            return Evaluation((Score(self.name, self.headline, *UNDEFINED, 0, 0, status=missing),), ())
        found = await asyncio.to_thread(self._arms, evidence.latent, prompts, seed)
        scores = await asyncio.gather(*(self._score(explanation, arm, prompts, seed) for arm in found))
        return Evaluation(tuple(scores), ())

    @property
    def headline(self) -> str:
        """What is measured: "accuracy" or "information"."""
        return "accuracy" if self.scorer is None else "information"

    def _arms(self, latent: int, prompts: Prompts, seed: int) -> list[Arm]:
        key = (latent, seed, prompts)
        found = self._kept.get(key)
        if found is None:
            found = arms(self.model, self.dictionary, latent, prompts, self.rates, self.steering, seed)
            self._kept[key] = found
            while len(self._kept) > _LATENTS_KEPT:
                self._kept.popitem(last=False)
        return found

    async def _score(self, explanation: Explanation, arm: Arm, prompts: Prompts, seed: int) -> Score:
        metric = self.headline if arm.kind == "latent" else f"{self.headline}_{arm.kind}"
        parameters = {**self._parameters(prompts), **_of_arm(arm, self.rates)}
        if arm.status != "ok":
            return Score(self.name, metric, *UNDEFINED, 0, 0, status=arm.status, parameters=parameters)
        if self.scorer is not None:
            return await self._information(explanation, arm, self.scorer, metric, parameters)
        assert self.client is not None
        choices = await choose(
            self.client,
            [(passage.steered, passage.clean) for passage in arm.passages],
            lambda index, first, second: _question(explanation, arm.passages[index], first, second),
            derive_seed(seed, self.name, arm.kind),
            max_tokens=self.max_tokens,
            temperature=self.temperature,
        )
        parameters |= {"alike": choices.statuses.count("alike"), "client_temperature": self.temperature}
        n, interval = len(choices.given), choices.accuracy()
        return Score(self.name, metric, *interval, n, choices.failures, status=choices.status, parameters=parameters)

    async def _information(
        self, explanation: Explanation, arm: Arm, scorer: PromptScorer, metric: str, parameters: Mapping[str, Any]
    ) -> Score:
        gains = np.array([await _gain(scorer, explanation, passage) for passage in arm.passages], dtype=np.float64)
        finite = gains[np.isfinite(gains)]
        failures = len(gains) - len(finite)
        interval = Interval(*estimate(finite)[:3]) if len(finite) else UNDEFINED
        status = "ok" if len(finite) else "error"
        return Score(self.name, metric, *interval, len(finite), failures, status=status, parameters=parameters)

    def _parameters(self, prompts: Prompts) -> dict[str, Any]:
        asked = self.client or self.scorer
        assert asked is not None
        return {
            "split": self.split,
            "client" if self.scorer is None else "scorer": asked.name,
            "prompt_digest": prompt_digest("effect_choice" if self.scorer is None else "effect_description"),
            "cut": prompts.cut,
            "matching_prompts": len(prompts.matching),
            "tokenised_again": prompts.tokenised_again,
            **dataclasses.asdict(self.steering),
        }


def _of_arm(arm: Arm, rates: NDArray[np.float64]) -> dict[str, Any]:
    """Return what is known of an arm: which latent, at which strength, with which KL."""
    facts: dict[str, Any] = {"kind": arm.kind, "latent": arm.latent}
    if arm.latent is not None:
        facts["rate"] = float(rates[arm.latent])
    if arm.matched is not None:
        facts |= {"strength": arm.matched.strength, "batches_used": arm.matched.batches}
        facts |= {"kl": arm.matched.kl, "kl_low": arm.matched.low, "kl_high": arm.matched.high}
    return facts


def _question(explanation: Explanation, passage: Passage, first: Shown, second: Shown) -> Rendered:
    assert isinstance(first, str) and isinstance(second, str)
    return render(
        "effect_choice",
        explanation=line(explanation.text),
        text=window_line([passage.prompt]),
        first=window_line([first]),
        second=window_line([second]),
    )


async def _gain(scorer: PromptScorer, explanation: Explanation, passage: Passage) -> float:
    """Return log p(explanation | steered passage) − log p(explanation | clean passage), in nats."""
    if passage.steered == passage.clean:
        return 0.0
    logprobs = []
    for written in (passage.steered, passage.clean):
        messages = render("effect_description", passage=window_line([passage.prompt, written])).messages
        prompt = "\n\n".join(message.text for message in messages)
        logprobs += await scorer.logprobs(prompt, [f" {explanation.text}"])
    return logprobs[0] - logprobs[1]

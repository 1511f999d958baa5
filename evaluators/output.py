"""Output: does the explanation match what the latent writes? (PROTOCOLS §10)

After Gur-Arieh et al. 2025, "Enhancing Automated Interpretability with Output-Centric Feature Descriptions", section
'output-based evaluation': there a model chooses among texts written with one of several latents turned up, here among the
tokens that they promote, which takes no generation.

1. The tokens that the latent promotes are the largest logits of its decoder direction through the final norm and the
   unembedding (`exegete.tools.lens`); so are those of other latents of the dictionary, drawn by seed.
2. In each question a language model is shown some tokens of this latent and as many of one other latent, both drawn from
   the top of their lists, and says which list the explanation is about.
3. The score is the accuracy; one half is chance. The latent's largest logit stands beside the one that random directions
   reach: below that the lens shows nothing, and the score says nothing of the explanation.

No text is read, so it tells an explanation of the output from one of the input only where these name different words.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from exegete.evaluators.contract import Evaluation, Judge, Score, evaluator
from exegete.evaluators.forced_choice import Shown, choose
from exegete.evaluators.requirements import required
from exegete.tools.errors import UserError
from exegete.tools.explainers import Explanation
from exegete.tools.llm import Client
from exegete.tools.prompting import Rendered, line, prompt_digest, render, window_line
from exegete.tools.seeds import derive_seed, generator
from exegete.tools.windows import LatentEvidence

if TYPE_CHECKING:
    from exegete.tools.dictionaries import Dictionary
    from exegete.tools.lens import DirectLens
    from exegete.tools.live_model import LiveModel


@evaluator("output")
class Output:
    """Accuracy of telling, by the explanation, the tokens that a latent promotes from those of other latents."""

    name = "output"
    headline = "accuracy"

    def __init__(
        self,
        model: LiveModel | None = None,
        dictionary: Dictionary | None = None,
        client: Client | None = None,
        questions: int = 20,
        shown: int = 10,
        top: int = 20,
        max_tokens: int = 1_024,
        temperature: float | None = None,
    ) -> None:
        """Ask `client` `questions` times, each about `shown` of the `top` tokens of the latent and of one other latent.

        Raises:
            UserError: model, dictionary or client are missing, a number is out of range, or there are too few latents.
        """
        self.model = required(self.name, "model", model, "a live model")
        self.dictionary = required(self.name, "dictionary", dictionary, "the dictionary of the latents")
        self.client = required(self.name, "client", client, "a language model that chooses")
        if questions < 1 or not 1 <= shown <= top:
            raise UserError(f"questions={questions}, shown={shown}, top={top}; give at least 1 each, and shown ≤ top")
        if self.dictionary.latents <= questions:
            raise UserError(
                f"{questions} questions need as many other latents, but dictionary {self.dictionary.name!r} has "
                f"{self.dictionary.latents} in all; ask fewer"
            )
        self.questions = questions
        self.shown = shown
        self.top = top
        self.max_tokens = max_tokens
        self.temperature = temperature

    async def evaluate(
        self, explanation: Explanation, evidence: LatentEvidence, judge: Judge | None, seed: int
    ) -> Evaluation:
        """Return the accuracy of `explanation`; the client is asked, not the judge, and no window is read.

        Raises:
            UserError: as `direct_lens`.
        """
        own, *others = await asyncio.to_thread(self._lenses, evidence.latent, seed)
        pairs = [self._pair(own, other, derive_seed(seed, self.name, index)) for index, other in enumerate(others)]
        choices = await choose(
            self.client,
            pairs,
            lambda index, first, second: _question(explanation, first, second),
            derive_seed(seed, self.name),
            max_tokens=self.max_tokens,
            temperature=self.temperature,
        )
        parameters = {**self._parameters(own), "alike": choices.statuses.count("alike")}
        n, interval = len(choices.given), choices.accuracy()
        score = Score(
            self.name, "accuracy", *interval, n, choices.failures, status=choices.status, parameters=parameters
        )
        return Evaluation((score,), ())

    def _lenses(self, latent: int, seed: int) -> list[DirectLens]:
        from exegete.tools.lens import direct_lens

        self.model.require_latents(self.dictionary, [latent])
        order = generator(seed, self.name, "others").permutation(self.dictionary.latents)
        others = [int(other) for other in order if other != latent][: self.questions]
        return direct_lens(self.model, self.dictionary, [latent, *others], self.top, seed=derive_seed(seed, "lens"))

    def _pair(self, own: DirectLens, other: DirectLens, seed: int) -> tuple[Shown, Shown]:
        rng = generator(seed, "shown")
        most = min(len(own.top), len(other.top))
        ranks = [sorted(rng.permutation(most)[: self.shown].tolist()) for _ in range(2)]
        mine, theirs = (
            tuple(lens.top[rank].piece for rank in chosen)
            for lens, chosen in zip((own, other), ranks, strict=True)
        )  # fmt: skip
        return mine, theirs

    def _parameters(self, own: DirectLens) -> dict[str, Any]:
        return {
            "client": self.client.name,
            "prompt_digest": prompt_digest("output_choice"),
            "questions": self.questions,
            "shown": self.shown,
            "top": self.top,
            "largest_logit": own.top[0].logit,
            "largest_logit_random_directions": own.floor,
            "client_temperature": self.temperature,
        }


def _question(explanation: Explanation, first: Shown, second: Shown) -> Rendered:
    return render("output_choice", explanation=line(explanation.text), first=_lines(first), second=_lines(second))


def _lines(pieces: Sequence[str]) -> list[str]:
    return [window_line([piece]) for piece in pieces]

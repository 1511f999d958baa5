"""What the tools of an investigation work with.

Held-out prompts are not here: no tool can see what `verifying` will judge on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from exegete.agent.awaiting import awaited
from exegete.agent.investigation.contract import Case, Metric
from exegete.agent.live import Live
from exegete.tools.errors import ToolError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from exegete.agent.investigation.measuring import Measurable
    from exegete.tools.embedders import Embedder
    from exegete.tools.interventions import Tokens
    from exegete.tools.llm import Client


@dataclass
class Bench:
    """The live model, the search prompts, and what else an instrument needs. Used from several threads at a time."""

    live: Live
    """Its model may be one that many investigations share."""
    cases: tuple[Case, ...]
    """The search prompts."""
    metric: Metric
    seed: int
    texts: tuple[str, ...] = ()
    """Other texts of the subject's kind: firing rates, means, and prompts to match strengths on are taken on them."""
    judge: Client | None = None
    """Judges `judged` metrics and labels latents; None where no language model is there."""
    open_embedder: Callable[[str], Embedder] | None = None
    controls: int = 20
    """Random sets of latents beside each experiment."""
    sealed: bool = False
    """Whether a labeling is what the investigator is asked for: then no tool shows windows of the test split."""
    query_s: float = 10.0
    """Seconds that SQL may take."""
    query_mb: int = 1_000
    """Megabytes that it may take."""
    loop: asyncio.AbstractEventLoop | None = None
    """Where the judge's connections live; None where it may be asked from any loop."""

    def ask(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Return what comes of asking the judge, in its own loop, from the thread of a tool."""
        if self.loop is None or not self.loop.is_running():
            return awaited(work)
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    @cached_property
    def measurable(self) -> Measurable:
        """The metric on the search prompts, as the instruments take it."""
        from exegete.agent.investigation.measuring import Measurable

        return Measurable(self.live, self.metric, self.cases, seed=self.seed, judge=self.judge, ask=self.ask)

    @cached_property
    def prompts(self) -> list[Tokens]:
        """Tokens of the search prompts."""
        return self.live.prompts([case.prompt for case in self.cases])

    @cached_property
    def rates(self) -> NDArray[np.float64]:
        """Firing rate of every latent, shape (latent,): the store's, else on `texts`, else on the prompts."""
        known = self.live.rates()
        if known is not None:
            return known
        from exegete.tools.controls import firing_rates

        model = self.live.model
        tokens = [model.tokens(text) for text in self.texts] or self.prompts
        return firing_rates(model, self.live.dictionary, tokens)

    def latents(self, latents: list[int]) -> list[int]:
        """Return the latents once each. Raises ToolError where there is none, or one that the dictionary has not."""
        count = self.live.dictionary.latents
        if not latents:
            raise ToolError("no latent is given; name at least one")
        for latent in latents:
            if not 0 <= latent < count:
                raise ToolError(f"there is no latent {latent}; the dictionary has 0 to {count - 1}")
        return list(dict.fromkeys(latents))

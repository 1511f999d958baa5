"""Continuations of different lengths, temperatures and seeds in one batch: each is what it is by itself."""

from __future__ import annotations

import asyncio

from exegete.tools.dictionaries import Dictionary
from exegete.tools.generation import Continuation, generate
from exegete.tools.interventions import Tokens, ablate
from exegete.tools.live_model import LiveModel, Trial
from exegete.tools.scheduling import Scheduler

SETTINGS = ((3, 0.0, 0), (9, 1.0, 1), (5, 1.0, 2), (9, 0.7, 1))
"""Tokens, temperature, seed."""


def test_they_share_a_batch_and_none_of_them_notices(
    model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]
) -> None:
    # The same trials in every call, so that only the settings tell them apart.
    trials = [Trial(prompts[0]), Trial(prompts[1], ablate(dictionary.fingerprint, (5, 7)))]

    async def everyone(scheduler: Scheduler) -> list[list[Continuation]]:
        calls = [scheduler.generate(trials, n, temperature=heat, seed=seed) for n, heat, seed in SETTINGS]
        return await asyncio.gather(*calls)

    with Scheduler(model, waiting_s=0.5) as scheduler:
        found = asyncio.run(everyone(scheduler))
        assert (scheduler.statistics.batches, scheduler.statistics.trials) == (1, 8)
    alone = [generate(model, trials, n, temperature=heat, seed=seed) for n, heat, seed in SETTINGS]
    assert [[(one.tokens, one.ended) for one in row] for row in found] == [
        [(one.tokens, one.ended) for one in row] for row in alone
    ]
    assert {len(one.tokens) + one.ended for one in found[0]} == {3}
    assert len({one.tokens for row in found for one in row}) > 4

"""An intervention beside random sets: what runs, and that what need not run changes no figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from exegete.agent.investigation.arms import Latents, active_on, beside_random
from exegete.agent.investigation.bench import Bench
from exegete.agent.investigation.contract import Metric
from exegete.agent.investigation.shared_model import Sharing
from exegete.tools.interventions import Intervention, ablate

HOLDS_IT_UP = 954
"""A latent that is active on most search prompts."""


def test_a_set_that_is_silent_on_a_prompt_is_not_run_there_and_changes_nothing(bench: Bench) -> None:
    name, own = bench.live.dictionary.fingerprint, bench.measurable
    _ = own.clean, bench.rates

    def make(latents: Latents, case: int) -> Intervention:
        return ablate(name, latents)

    def acts(sets: Sequence[Latents]) -> NDArray[np.bool_]:
        return active_on(bench, own.prompts, sets)

    with Sharing(bench.live) as sharing:
        own.live = sharing.live()
        every = beside_random(bench, own, [HOLDS_IT_UP], make, 6)
        ran = sharing.statistics.trials
        some = beside_random(bench, own, [HOLDS_IT_UP], make, 6, acts=acts)
        saved = 2 * ran - sharing.statistics.trials
    assert ran == 7 * 20 and every.sets == some.sets
    active = active_on(bench, own.prompts, [every.latents, *every.sets])
    assert saved == (~active).sum() > 20
    np.testing.assert_allclose(some.changed, every.changed, atol=1e-4)
    np.testing.assert_allclose(some.controls, every.controls, atol=1e-4)
    assert (some.controls[~active[1:]] == np.tile(own.clean, (6, 1))[~active[1:]]).all()


def test_what_is_silent_on_a_prompt_is_run_where_the_model_goes_on_writing(bench: Bench) -> None:
    silent = [int(latent) for latent in np.flatnonzero(bench.rates == 0)[:1]]
    assert not active_on(bench, bench.prompts, [tuple(silent)]).any()
    judged = replace(bench, metric=Metric("judged", criterion="It sorts from high to low."))
    assert active_on(judged, bench.prompts, [tuple(silent)]).all()

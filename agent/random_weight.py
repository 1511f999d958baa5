"""The random-weight control of a run (PROTOCOLS §12): whether it can be had, and which of its latents are labeled."""

from __future__ import annotations

import numpy as np

from exegete.agent.config import RunConfig
from exegete.evaluators.typing import INPUT_EVALUATORS, OUTPUT_EVALUATORS, deciding_evaluators, least_controls
from exegete.tools.errors import UserError
from exegete.tools.evidence import Evidence
from exegete.tools.seeds import generator


def control_latents(config: RunConfig, evidence: Evidence, like: Evidence) -> list[int]:
    """Return the latents of a random-weight control that are labeled, ascending: live ones that fire as often as those of `like`.

    Latents of the dictionary itself are drawn by the seed, and each takes the control's latent of the nearest firing rate (in
    its logarithm) that is left. Rare latents of either kind score higher, so a control with other rates would be no measure.

    Raises:
        UserError: too few of them are live for a bar.
    """
    live = evidence.live
    least = least_controls(len(deciding_evaluators(config.label.evaluators)))
    if len(live) < least:
        raise UserError(
            f"only {len(live)} of {len(evidence.latents):,} latents of the random-weight control are neither dead, rare nor "
            f"dense, and typing by it takes {least}: read more text, or set label.random_control = 0"
        )
    rng = generator(config.seed, "random control", evidence.dictionary)
    rates, left = np.log(evidence.densities()[live]), np.ones(len(live), dtype=np.bool_)
    own = like.densities()[like.live]
    wanted = np.resize(rng.permutation(np.log(own) if len(own) else rates), min(config.label.random_control, len(live)))
    chosen = []
    for rate in wanted:
        nearest_rate = int(np.where(left, np.abs(rates - rate), np.inf).argmin())
        left[nearest_rate] = False
        chosen.append(int(live[nearest_rate]))
    return sorted(chosen)


def check_control(config: RunConfig) -> None:
    """Raise UserError where the control that `config` asks for could not be made, or could decide nothing."""
    label, count = config.label, config.label.random_control
    if not count:
        return
    if config.subject is None or config.dictionary is None or config.corpus is None:
        raise UserError(
            f"label.random_control = {count} has a random-weight dictionary read the corpus: the configuration needs "
            "[subject], [dictionary] and [corpus]"
        )
    deciding = deciding_evaluators(label.evaluators)
    if not deciding:
        sides = ", ".join((*INPUT_EVALUATORS, *OUTPUT_EVALUATORS))
        raise UserError(f"label.random_control = {count} is for typing, which takes one of the evaluators {sides}")
    if count < least_controls(len(deciding)):
        raise UserError(
            f"label.random_control = {count} is too few for a bar that {' and '.join(deciding)} hold together: at least "
            f"{least_controls(len(deciding))}, better 100"
        )

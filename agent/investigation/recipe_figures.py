"""What the recipe reads off a view: its calls' figures by their ids, and whether each lies beyond its control.

A figure lies beyond its control where its 95 % interval lies wholly on the far side of the control's range.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exegete.agent.investigation.contract import Headline, Result, View

Floats = NDArray[np.float64]
Leader = tuple[int, float]
"""Latent, and by how much attribution estimates that it holds the metric up."""

LEADERS = 5
"""Of the attribution's ranking, at most."""
SHARE = 0.1
"""Of the margin between the metric and its line: what counts as an effect of the suggested cause."""


class Figures:
    """The results of a view, by the ids of the recipe's calls. What is None is not known."""

    def __init__(self, view: View) -> None:
        """Take the results of a view."""
        self.view = view
        self.results: Mapping[str, Result] = {result.call.id: result for result in view.results}

    def facts(self, id: str) -> Mapping[str, Any]:
        """Return the facts of a call that went well, else none."""
        result = self.results.get(id)
        return result.outcome.facts if result is not None and result.status == "ok" else {}

    def headline(self, id: str) -> Headline | None:
        """Return the headline of a call that went well, with a figure in it."""
        result = self.results.get(id)
        found = result.outcome.headline if result is not None and result.status == "ok" else None
        return found if found is not None and found.value is not None else None

    def cited(self, *ids: str) -> tuple[str, ...]:
        """Return the experiments of calls that went well, `E1`, …, in that order."""
        done = [self.results[id] for id in ids if self.headline(id) is not None]
        return tuple(dict.fromkeys(result.experiment for result in done if result.experiment))

    @property
    def variants(self) -> bool:
        """Whether a prompt has a variant."""
        return any(case.variant is not None for case in self.view.question.cases)

    @cached_property
    def present(self) -> bool | None:
        """Whether most prompts show the behaviour, and the answer is what the model mostly writes where that was looked at."""
        known = self.facts("prompts")
        if not known:
            return None
        written = self.headline("written")
        most = 2 * known["showing"] > known["prompts"]
        return bool(most and (written is None or above(written.value, 0.5)))

    @property
    def margin(self) -> float:
        """How far the mean of the metric lies above its line; at least a hundredth, so that it can be a bound."""
        mean = self.facts("prompts").get("mean")
        return max(0.01, (0.0 if mean is None else float(mean)) - self.view.metric.shown)

    @cached_property
    def leaders(self) -> tuple[Leader, ...]:
        """The first of the attribution's ranking that hold the metric up, by its estimate, the strongest first."""
        rows = self.facts("attribute").get("latents", ())
        estimates = [(int(row["latent"]), row["attribution"]["value"]) for row in rows]
        held = [(latent, float(value)) for latent, value in estimates if above(value, 0.0)]
        return tuple(sorted(held, key=lambda leader: -leader[1])[:LEADERS])

    def exact(self, latent: int) -> Mapping[str, Any] | None:
        """Return the exact loss of a latent of the attribution's ranking, taken out alone on the prompts that were attributed."""
        rows = self.facts("attribute").get("latents", ())
        found: Mapping[str, Any] = next((row for row in rows if int(row["latent"]) == latent), {})
        exact: Mapping[str, Any] | None = found.get("exact")
        return exact if exact is not None and exact.get("value") is not None else None

    def loss(self, latent: int) -> Mapping[str, Any]:
        """Return a leader's loss: the exact one, else by the attribution's estimate."""
        return self.exact(latent) or {"value": dict(self.leaders).get(latent, 0.0)}

    def changed(self, id: str) -> tuple[Floats, Floats] | None:
        """Return the metric on each prompt before and after what a call did, where it says so and all of it is known."""
        rows = self.facts(id).get("prompts", ())
        found = np.array([(row["clean"], row.get("changed")) for row in rows], dtype=np.float64)
        return (found[:, 0], found[:, 1]) if len(found) and np.isfinite(found).all() else None

    @property
    def differing(self) -> list[int]:
        """Latents that differ between prompts and variants, the clearest first."""
        found = self.headline("compare")
        rows = self.facts("compare").get("latents", ()) if found is not None and found.value else ()
        return [int(row["difference"]["latent"]) for row in rows]

    @property
    def set(self) -> tuple[int, ...]:
        """Without which the behaviour is gone; empty where there is none."""
        return tuple(int(latent) for latent in self.facts("minimal set").get("latents", ()))

    @property
    def carriers(self) -> tuple[int, ...]:
        """Those whose exchange with the variants' activations ends the behaviour; empty where there are none."""
        return tuple(int(latent) for latent in self.facts("carriers").get("latents", ()))

    @property
    def difference(self) -> Mapping[str, Any] | None:
        """From prompt to variant the metric changes by this (`value`, `low`, `high`, `n`)."""
        found = self.facts("interchange").get("difference")
        return found if found and found.get("value") is not None else None

    @property
    def matters(self) -> bool | None:
        """Whether the metric falls without the suggested cause: surely, and by a share of its margin."""
        found = self.difference
        if found is None:
            return None
        return below(found["high"], 0.0) and float(found["value"]) < -SHARE * self.margin

    @property
    def idle(self) -> bool:
        """Whether what the suggested cause does is surely less than that share."""
        found = self.difference
        return found is not None and above(found["low"], -SHARE * self.margin)

    @property
    def led(self) -> tuple[str, Headline | None]:
        """The call that took out all leaders, with what it found."""
        id = "ablate leaders" if len(self.leaders) > 1 else "ablate first"
        return id, self.headline(id)

    @property
    def lead(self) -> bool | None:
        """Whether the metric falls without the leaders, further than without random latents."""
        return falls(self.led[1])

    @property
    def necessary(self) -> bool | None:
        """Whether most search prompts flip without the set, and the metric falls, both beyond random sets."""
        return _ends(self.headline("minimal set"), self.headline("ablate set"))

    @property
    def carries(self) -> bool | None:
        """Whether most search prompts flip with the carriers as on the variants, and the metric falls, beyond random sets."""
        return False if self.matters is False else _ends(self.headline("carriers"), self.headline("exchange"))

    @property
    def interact(self) -> bool | None:
        """Whether the strongest pair of the set does more, or less, than the sum, beyond random pairs."""
        found = self.headline("pairs")
        return None if found is None else above(found.low, found.control_high) or below(found.high, found.control_low)

    @property
    def steers(self) -> bool | None:
        """Whether the leader, turned down, lowers the metric further than other latents do at the same KL."""
        return falls(self.headline("steer"))


def falls(found: Headline | None) -> bool | None:
    """Return whether a figure's interval lies below its control's range; None where there is no figure."""
    return None if found is None else below(found.high, found.control_low)


def _ends(flipped: Headline | None, changed: Headline | None) -> bool | None:
    """Return whether most prompts flip and the metric falls, both beyond their controls."""
    if flipped is None or changed is None:
        return None
    return above(flipped.value, 0.5) and above(flipped.low, flipped.control_high) and falls(changed) is True


def below(value: float | None, bound: float | None) -> bool:
    """Return whether both are known and the first is smaller."""
    return value is not None and bound is not None and value < bound


def above(value: float | None, bound: float | None) -> bool:
    """Return whether both are known and the first is larger."""
    return below(bound, value)

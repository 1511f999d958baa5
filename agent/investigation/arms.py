"""What an intervention does to the metric, prompt by prompt, beside the same done to random latents.

1. Each case's prompt runs with the intervention on the latents asked for, and with the same on random sets of as many
   latents that fire as often (`exegete.tools.ablation_sets.random_sets`), all in common batches. Where no latent of a set is
   active, taking it out changes nothing, and no pass is spent on it (`active_on`).
2. The effect is the mean over prompts of changed less clean, with Student's interval: the prompt is the unit.
3. Beside it stand the mean and the range, from the 2.5th to the 97.5th percentile, of the same mean over the random sets.
4. A prompt's behaviour is gone where its metric was above the metric's line and no longer is, and came where it was not.

Where a judge gave no verdict on a prompt it counts neither way, and is counted as missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from exegete.agent.findings import figure, plain
from exegete.agent.investigation.bench import Bench
from exegete.agent.investigation.contract import Headline, Outcome
from exegete.agent.investigation.fencing import fenced
from exegete.agent.investigation.measuring import Floats, Measurable
from exegete.tools.ablation_sets import random_sets
from exegete.tools.errors import ToolError
from exegete.tools.estimates import estimate
from exegete.tools.intervals import Figure, share
from exegete.tools.interventions import Intervention, Tokens
from exegete.tools.live_model import Trial
from exegete.tools.seeds import derive_seed
from exegete.tools.text_activations import activations

Latents = tuple[int, ...]
Make = Callable[[Latents, int], Intervention]
"""The intervention on a set of latents while the model reads the case of a number."""

Acts = Callable[[Sequence[Latents]], NDArray[np.bool_]]
"""Sets of latents → whether an intervention on each can change anything on each case, shape (set, case)."""

WORDS = {
    "log_odds": "log-odds of the answer",
    "log_probability": "log-probability of the answer",
    "judged": "share of continuations that meet the criterion",
}
"""What a metric measures."""
MATCHED = "random sets of as many latents that fire as often"

_SHOWN = 6
"""Prompts of which the investigator is told by name."""
_TAIL = 70
"""Characters of them."""
_RANGE = (0.025, 0.975)


@dataclass(frozen=True, eq=False)
class Arms:
    """The metric under an intervention, and under its controls, on the same cases."""

    measurable: Measurable
    latents: Latents
    interventions: tuple[Intervention, ...]
    """One for each case, in their order."""
    changed: Floats
    """Shape (case,); NaN where nothing is known."""
    sets: tuple[Latents, ...]
    controls: Floats
    """Shape (set, case)."""

    @cached_property
    def change(self) -> Floats:
        """Changed less clean, shape (case,); NaN where one of the two is unknown."""
        found: Floats = self.changed - self.measurable.clean
        return found

    @cached_property
    def control_changes(self) -> Floats:
        """Mean change under each random set, shape (set,); those without any known one are left out."""
        changes = self.controls - self.measurable.clean
        return np.array([row[np.isfinite(row)].mean() for row in changes if np.isfinite(row).any()])

    @property
    def missing(self) -> int:
        """Cases that are left out because a judge gave no verdict."""
        return int((~np.isfinite(self.change)).sum())

    def flips(self, to: Literal["gone", "came"] = "gone") -> Flips:
        """Return on which share of prompts the behaviour is gone (of those that show it), or came (of the others)."""
        clean, line = self.measurable.clean, self.measurable.metric.shown
        before = clean > line if to == "gone" else clean <= line
        asked = np.isfinite(clean) & before
        turned = (self.changed <= line) if to == "gone" else (self.changed > line)
        own = turned[asked & np.isfinite(self.changed)]
        rows = (self.controls <= line) if to == "gone" else (self.controls > line)
        known = np.isfinite(self.controls) & asked
        shares = [float(row[ok].mean()) for row, ok in zip(rows, known, strict=True) if ok.any()]
        return Flips(share(own) if len(own) else None, tuple(shares))


@dataclass(frozen=True)
class Flips:
    """Share of prompts whose behaviour changed sides."""

    figure: Figure | None
    """With Wilson's interval; None where no prompt could."""
    controls: tuple[float, ...]
    """The same share under each random set."""

    @property
    def high(self) -> float | None:
        """95th percentile over the random sets; None without any."""
        return float(np.quantile(self.controls, 0.95)) if self.controls else None

    def headline(self, name: str, control: str = MATCHED) -> Headline:
        """Return it as a headline, whose control's upper end is the 95th percentile."""
        value, low, high, n = (None, None, None, 0) if self.figure is None else astuple(self.figure)
        mean = float(np.mean(self.controls)) if self.controls else None
        least = min(self.controls, default=None)
        return Headline(name, value, low, high, n, control, mean, least, self.high, len(self.controls))


def beside_random(
    bench: Bench,
    measurable: Measurable,
    latents: Sequence[int],
    make: Make,
    count: int | None = None,
    *,
    acts: Acts | None = None,
) -> Arms:
    """Run an intervention on latents, and on `count` (by default the bench's number of) random sets of them.

    Args:
        bench: what it runs on.
        measurable: the metric on the cases.
        latents: the set that is asked about.
        make: the intervention on a set.
        count: random sets.
        acts: on which cases the intervention on each set can change anything; on all of them, where it is not given.

    Raises:
        ToolError: too few latents fire that are not in the set.
        UserError: as `LiveModel.run`.
    """
    sets = matched_sets(bench, latents, bench.controls if count is None else count)
    every = [tuple(latents), *sets]
    made = [[make(one, i) for i in range(len(measurable.prompts))] for one in every]
    places = np.argwhere(np.ones((len(every), len(measurable.prompts)), dtype=bool) if acts is None else acts(every))
    found = np.tile(measurable.clean, (len(every), 1))
    if len(places):
        trials = [(int(i), Trial(measurable.prompts[i], made[row][i])) for row, i in places]
        found[tuple(places.T)] = measurable.at(trials)
    return Arms(measurable, tuple(latents), tuple(made[0]), found[0], tuple(sets), found[1:])


def matched_sets(bench: Bench, latents: Sequence[int], count: int) -> list[Latents]:
    """Return different random sets of other latents that fire as often. Raises ToolError where too few fire."""
    sets = random_sets(latents, bench.rates, count, derive_seed(bench.seed, "controls"), distinct=True)
    if not sets and count:
        live = int((bench.rates > 0).sum())
        raise ToolError(
            f"{len(latents)} latents leave no random set of as many beside them: {live} latents fire at all; name fewer"
        )
    return sets


def effect_headline(arms: Arms, name: str, control: str = MATCHED) -> Headline:
    """Return the mean change of the metric, beside that under the random sets."""
    return headline_of(arms.change, name, arms.control_changes, control)


def headline_of(values: Floats, name: str, controls: Floats, control: str) -> Headline:
    """Return the mean of values, one for each prompt, beside the means of control arms, shape (arm,)."""
    known = values[np.isfinite(values)]
    value, low, high, _, n = estimate(known) if len(known) else (None, None, None, None, 0)
    if not len(controls):
        return Headline(name, value, low, high, n, control)
    least, most = np.quantile(controls, _RANGE)
    beside = (float(controls.mean()), float(least), float(most), len(controls))
    return Headline(name, value, low, high, n, control, *beside)


def report(
    arms: Arms,
    done: str,
    facts: Mapping[str, Any],
    *,
    to: Literal["gone", "came"] = "gone",
    control: str = MATCHED,
) -> Outcome:
    """Return the outcome of an experiment whose headline is the mean change of the metric.

    Args:
        arms: what was measured.
        done: what was done to the latents, in words.
        facts: to be stored beside what is measured.
        to: which change of sides is counted.
        control: what the random sets are, in words.
    """
    metric = arms.measurable.metric
    headline = effect_headline(arms, f"mean change of the {WORDS[metric.kind]}, {done}", control)
    flips = arms.flips(to)
    lines = [*told(headline, metric.unit), _flips_line(flips, to), *_prompt_lines(arms.measurable, arms.changed)]
    if arms.missing:
        lines.insert(1, f"{arms.missing} prompts are left out: the judge gave no verdict on them")
    stored = {
        **facts,
        "latents": list(arms.latents),
        "metric": metric,
        "missing": arms.missing,
        "prompts": by_prompt(arms.measurable, arms.changed),
        "interventions": as_json(arms.interventions),
        f"behaviour_{to}": flips.figure,
        "controls": control_rows(arms, flips),
    }
    bars = bars_of(headline, metric.unit, done)
    return Outcome("\n".join(line for line in lines if line), headline, plain(stored), (bars,))


def told(headline: Headline, unit: str) -> list[str]:
    """Return a headline in words, and its control in a second line."""
    value = figure(headline.value, headline.low, headline.high, headline.n) or "no figure"
    lines = [f"{headline.name}: {value} {unit}".rstrip()]
    if headline.control:
        beside = figure(headline.control_value, headline.control_low, headline.control_high, headline.control_n)
        lines.append(f"beside it, {headline.control}: {beside or 'none'}")
    return lines


def by_prompt(measurable: Measurable, changed: Floats) -> list[dict[str, Any]]:
    """Return what became of the metric on each prompt."""
    return [
        {"prompt": case.prompt, "clean": float(before), "changed": float(after)}
        for case, before, after in zip(measurable.cases, measurable.clean, changed, strict=True)
    ]


def as_json(interventions: Sequence[Intervention]) -> list[str]:
    """Return interventions as they are stored: one text where all are the same, else one for each prompt."""
    texts = [one.to_json() for one in interventions]
    return texts[:1] if len(set(texts)) == 1 else texts


def control_rows(arms: Arms, flips: Flips) -> list[dict[str, Any]]:
    """Return what each random set did."""
    shares = flips.controls or (None,) * len(arms.sets)
    return [
        {"latents": one, "change": float(change), "share": own}
        for one, change, own in zip(arms.sets, arms.control_changes, shares, strict=False)
    ]


def bars_of(headline: Headline, unit: str, label: str) -> dict[str, Any]:
    """Return the plot of a headline beside its control."""
    own = {"label": label, "value": headline.value, "low": headline.low, "high": headline.high, "control": False}
    beside = {
        "label": headline.control,
        "value": headline.control_value,
        "low": headline.control_low,
        "high": headline.control_high,
        "control": True,
    }
    bars = [own, beside] if headline.control_value is not None else [own]
    return {"kind": "bars", "title": headline.name, "unit": unit, "bars": bars}


def firing(bench: Bench, measurable: Measurable, latents: Sequence[int]) -> dict[int, float]:
    """Return on which share of the prompts each latent is active anywhere."""
    live = bench.live
    found = activations(live.model, live.dictionary, measurable.prompts, list(latents))
    active: NDArray[np.bool_] = np.stack([(values != 0).any(0) for values in found])
    return {latent: float(share) for latent, share in zip(latents, active.mean(0), strict=True)}


def active_on(bench: Bench, prompts: Sequence[Tokens], sets: Sequence[Latents]) -> NDArray[np.bool_]:
    """Return whether any latent of a set is active on a prompt, so that taking it out can change the metric, shape (set, prompt).

    Where the metric is judged any can: what is silent on a prompt may fire on what the model writes after it.
    """
    if bench.metric.kind == "judged":
        return np.ones((len(sets), len(prompts)), dtype=np.bool_)
    wanted = sorted({latent for one in sets for latent in one})
    place = {latent: i for i, latent in enumerate(wanted)}
    found = activations(bench.live.model, bench.live.dictionary, prompts, wanted)
    fires = np.stack([(values != 0).any(0) for values in found])
    return np.stack([fires[:, [place[latent] for latent in one]].any(1) for one in sets])


def named(latents: Sequence[int]) -> str:
    """Return latents in words, at most ten of them."""
    shown = ", ".join(map(str, latents[:10]))
    rest = len(latents) - 10
    return f"latent{'s' if len(latents) > 1 else ''} {shown}{f' and {rest} more' if rest > 0 else ''}"


def _flips_line(flips: Flips, to: str) -> str:
    if flips.figure is None:
        return "no prompt shows the behaviour clean" if to == "gone" else "every prompt shows the behaviour clean"
    own = flips.figure
    words = "no longer show the behaviour" if to == "gone" else "show the behaviour now that did not"
    beside = (
        "" if flips.high is None else f"; random sets: mean {np.mean(flips.controls):.2g}, 95 % below {flips.high:.2g}"
    )
    return f"share of prompts that {words}: {figure(own.value, own.low, own.high, own.n)}{beside}"


def _prompt_lines(measurable: Measurable, changed: Floats) -> list[str]:
    lines = [
        f"{fenced('prompt', case.prompt[-_TAIL:], number)} {before:.3g} → {after:.3g}"
        for number, (case, before, after) in enumerate(zip(measurable.cases, measurable.clean, changed, strict=True), 1)
    ]
    rest = len(lines) - _SHOWN
    return lines[:_SHOWN] + ([f"and {rest} more prompts"] if rest > 0 else [])

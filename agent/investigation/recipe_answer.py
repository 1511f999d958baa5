"""What the recipe answers: its figures in sentences, each beside its control, with the experiment that it comes from."""

from __future__ import annotations

from collections.abc import Sequence

from exegete.agent.findings import figure
from exegete.agent.investigation.contract import Headline
from exegete.agent.investigation.recipe_figures import SHARE, Figures, falls

WHO = "This is the fixed protocol (recipe): no language model chose an experiment or wrote a word of this."
FLATTERED = "It was chosen on these very prompts, which flatter it; what counts is the verdict on the held-out ones."


def answered(found: Figures) -> str:
    """Return the answer in words."""
    if found.present is None:
        return f"{WHO} The metric could not be taken on the prompts, so nothing was found out, and nothing is claimed."
    if not found.present:
        return f"{WHO} {_there(found)} The behaviour is not there on most of them: nothing is claimed."
    parts = [
        WHO,
        _there(found),
        _cause(found),
        _leaders(found),
        _set(found),
        _carried(found),
        _more(found),
        _hits(found),
    ]
    return "\n\n".join(part for part in parts if part)


def _there(found: Figures) -> str:
    facts, metric = found.facts("prompts"), found.view.metric
    said = (
        f"The metric is above its line, {metric.shown:.3g} {metric.unit}, on {facts['showing']} of {facts['prompts']} search "
        f"prompts (mean {figure(facts['mean'])})."
    )
    written = found.headline("written")
    if written is None:
        return said
    return (
        f"{said} The share of prompts after which the model writes the answer is {_beside(found, 'written', written)}."
    )


def _cause(found: Figures) -> str:
    known = found.difference
    if not found.variants:
        return "The prompts have no variants, so that no suggested cause was tested."
    if known is None:
        return "What the suggested cause does was not measured."
    named = f" ({found.view.question.suggested})" if found.view.question.suggested else ""
    value = figure(known["value"], known["low"], known["high"])
    change = f"Without the suggested cause{named} the metric changes by {value} (n = {known['n']}{_cite(found, 'interchange')})"
    if found.matters:
        return f"{change}: it matters."
    share = SHARE * found.margin
    if found.idle:
        return f"{change}. Surely it does not fall by {share:.3g}: the suggested cause does not matter here."
    return f"{change}. It is not sure that it falls, or falls by {share:.3g}: that the suggested cause matters is not shown."


def _leaders(found: Figures) -> str:
    id, known = found.led
    if known is None:
        return "Attribution found no latent that holds the metric up."
    held = ", ".join(str(latent) for latent, _ in found.leaders)
    verb = "lies" if found.lead else "does not lie"
    return (
        f"With the attribution's leaders at zero (latents {held}) the metric changes by {_beside(found, id, known)}; it {verb} "
        "beyond its control."
    )


def _set(found: Figures) -> str:
    flipped, changed = found.headline("minimal set"), found.headline("ablate set")
    if flipped is None:
        return "No small set of latents was found without which the behaviour is gone."
    listed = ", ".join(map(str, found.set))
    said = (
        f"With a set of {_many(found.set)} at zero ({listed}) the share of prompts that no longer show the behaviour is "
        f"{_beside(found, 'minimal set', flipped)}"
    )
    if changed is not None:
        said += f", and the metric changes by {_beside(found, 'ablate set', changed)}"
    verb = "is claimed to be necessary" if found.necessary else "is not claimed: it does not lie beyond its control"
    return f"{said}. The set {verb}. {FLATTERED}"


def _carried(found: Figures) -> str:
    flipped, changed = found.headline("carriers"), found.headline("exchange")
    if flipped is None or changed is None:
        return ""
    listed = ", ".join(map(str, found.carriers))
    return (
        f"With {_many(found.carriers)} as they are on the variants ({listed}) that share is "
        f"{_beside(found, 'carriers', flipped)}, and the metric changes by {_beside(found, 'exchange', changed)}: "
        f"{_passing(found, changed)}."
    )


def _passing(found: Figures, changed: Headline) -> str:
    """Return what the exchange says of the suggested cause."""
    if found.carries:
        return "what differs between prompts and variants acts through them"
    if falls(changed):
        return "part of what differs between prompts and variants acts through them, too little to end the behaviour, so nothing is claimed"
    return "that what differs between prompts and variants acts through them is not shown"


def _more(found: Figures) -> str:
    """What is told beside the claims: pairs and steering."""
    said = []
    if (pair := found.headline("pairs")) is not None:
        verb = "lies" if found.interact else "does not lie"
        said.append(
            f"The set's strongest interaction is {_beside(found, 'pairs', pair)}; it {verb} beyond its control."
        )
    if (steered := found.headline("steer")) is not None:
        verb = "lies" if found.steers else "does not lie"
        value = _beside(found, "steer", steered)
        said.append(f"With the leader turned down the metric changes by {value}; it {verb} beyond its control.")
    return " ".join(said)


def _hits(found: Figures) -> str:
    # An experiment that was asked for twice ran once.
    settled = {result.experiment: result.predicted for result in found.view.results if result.predicted is not None}
    if not settled:
        return ""
    return f"Of the predictions, all made by fixed rules, {sum(settled.values())} of {len(settled)} held."


def _beside(found: Figures, id: str, known: Headline) -> str:
    """Return a figure with its interval, and in brackets n, the experiment, and the control with its own."""
    value = figure(known.value, known.low, known.high)
    beside = figure(known.control_value, known.control_low, known.control_high)
    control = f"; {known.control}: {beside}, n = {known.control_n}" if beside else ""
    return f"{value} (n = {known.n}{_cite(found, id)}{control})"


def _many(latents: Sequence[int]) -> str:
    return f"{len(latents)} latent{'' if len(latents) == 1 else 's'}"


def _cite(found: Figures, id: str) -> str:
    cited = found.cited(id)
    return f"; {cited[0]}" if cited else ""

"""The tools of an agent that explains one latent (`explaining`): what it may look at, and what it may run on the live model.

1. `windows` shows what the explain split holds: firing windows by rank, and windows on which the latent verifiably is silent.
   The bench's evidence is sealed to all other splits, so no tool can show a window of refine or test (PROTOCOLS §1).
2. `activations` runs texts that the agent writes, and counts on how many the latent did as the agent said it would.
3. `card` and `steer` show what the latent does to the output: tokens that its direction favours, and what the model writes
   while it is turned up, beside a random latent that fires as often and a random direction, all at the same KL.
4. `finish` ends the work with an explanation; `hypothesis` and `update` are the investigation's own notes.

Strengths are whole numbers from 1 to 10 of the latent's peak in the explain split, as prompts show them (PROTOCOLS §2).

Source: Schwettmann et al. 2023, "FIND", and Shaham et al. 2024, "A Multimodal Automated Interpretability Agent": an agent that
runs its own inputs to explain a unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from exegete.agent.findings import figure, plain
from exegete.agent.investigation import looking, notes
from exegete.agent.investigation.bench import Bench
from exegete.agent.investigation.contract import Outcome
from exegete.agent.investigation.fencing import fenced_text, fenced_window, quoted
from exegete.agent.investigation.toolbelt import TOOLS, Tool, make_tool
from exegete.agent.live import Live
from exegete.tools.errors import ToolError
from exegete.tools.explainers.output_effects import prompt_texts
from exegete.tools.rendering import quantised
from exegete.tools.windows import FIRING_SHARE_OF_PEAK, LatentEvidence, Window

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from exegete.agent.experiments import Steering
    from exegete.tools.effects import TokenChange

MOST_WINDOWS = 12
MOST_TEXTS = 12
MOST_TOKENS = 40
"""That the model writes after each text."""
STEERED_TEXTS = 4
MATCHED_ON = 16
"""Windows of the explain split, cut where the latent fires, that strengths are matched on."""
TOKENS_MOVED = 6
STRONGEST = 8
"""Tokens of a text whose strength is written out, at most."""


@dataclass(frozen=True)
class RatedLive(Live):
    """A live model without a store: no labels, and firing rates as the evidence has them."""

    known: NDArray[np.float64] | None = None
    """Share of tokens on which each latent fires, shape (latent,)."""

    def rates(self) -> NDArray[np.float64] | None:
        """Return the rates of the evidence."""
        return self.known


@dataclass(kw_only=True)
class LatentBench(Bench):
    """What the tools work with: the live model, and one latent's evidence. There are no prompts and no metric to measure."""

    evidence: LatentEvidence
    """Of the explain split, sealed to all others."""

    @cached_property
    def peak(self) -> float:
        """The largest activation in the explain split; 0 where none is known."""
        return max((window.peak or 0.0 for window in self.evidence.select("explain")), default=0.0)


def windows(
    bench: LatentBench, which: Literal["top", "spread", "silent"] = "spread", count: int = 6, offset: int = 0
) -> Outcome:
    """Show further passages: where the unit fires, marked, with strengths; or where it is silent.

    Args:
        which: `top`, the strongest; `spread`, evenly over the ranks from the strongest to the weakest; or `silent`, passages
            in which it does not fire, those that look alike first.
        count: passages, 1 to 12.
        offset: leave out so many of the first.
    """
    if not 1 <= count <= MOST_WINDOWS or offset < 0:
        raise ToolError(
            f"count is {count} and offset {offset}; give 1 to {MOST_WINDOWS} windows, 0 or more to leave out"
        )
    there = bench.evidence.select("explain")
    ranked = _silent(there) if which == "silent" else _firing(there)
    left = ranked[offset:]
    picked = looking.spread(left, count) if which == "spread" else left[:count]
    named = "in which it is silent" if which == "silent" else "in which it fires"
    lines = [f"{len(picked)} of {len(ranked)} passages {named}"]
    lines += [_window_line(bench, window, number) for number, window in enumerate(picked, 1)]
    return Outcome("\n".join(lines), None, {"windows": [window.id for window in picked]})


def activations(bench: LatentBench, texts: list[str], expected: list[bool] | None = None) -> Outcome:
    """Run texts of your own on the live model and show where the unit fires in them, with strengths.

    Args:
        texts: 1 to 12; ⏎ is a line break.
        expected: for each text, whether you expect the unit to fire anywhere in it.
    """
    from exegete.tools.text_activations import activations as measured

    if not 1 <= len(texts) <= MOST_TEXTS:
        raise ToolError(f"{len(texts)} texts are given; give 1 to {MOST_TEXTS}")
    if expected is not None and len(expected) != len(texts):
        raise ToolError(f"{len(texts)} texts and {len(expected)} expectations are given; give one for each text")
    model = bench.live.model
    tokens = [model.tokens(text) for text in texts]
    found = measured(model, bench.live.dictionary, tokens, [bench.evidence.latent])
    shown = [_spelled(bench, own, values[:, 0]) for own, values in zip(tokens, found, strict=True)]
    fires = [bool((values > 0).any()) for _, values in shown]
    lines = [
        f"{_verdict(fired, None if expected is None else expected[at])} {_line(bench, *shown[at], at + 1)}"
        for at, fired in enumerate(fires)
    ]
    held = None if expected is None else sum(fired == said for fired, said in zip(fires, expected, strict=True))
    facts = {"texts": texts, "fires": fires, "expected": expected, "held": held}
    return Outcome("\n".join([f"it fires in {sum(fires)} of {len(texts)} texts", *lines]), None, facts)


def card(bench: LatentBench) -> Outcome:
    """Show which tokens the unit's direction promotes and demotes, how often it fires, and its nearest units."""
    return looking.card(bench, bench.evidence.latent)


def steer(bench: LatentBench, texts: list[str] | None = None, kl: float = 0.5, tokens: int = 10) -> Outcome:
    """Turn the unit up, by as much as changes the next token by a KL, and show what the model then writes.

    Beside it a random unit that fires as often and a random direction, at the same KL: any push changes something.

    Args:
        texts: to be continued, up to 4; passages cut where the unit fires where left out.
        kl: mean KL(clean || steered) of the next token, in nats.
        tokens: to write after each text, 1 to 40.
    """
    from exegete.agent.experiments import Request, steering

    if not 0 < kl <= 20 or not 1 <= tokens <= MOST_TOKENS:
        raise ToolError(
            f"kl is {kl:g} and tokens {tokens}; give a KL above 0, for example 0.5, and 1 to {MOST_TOKENS} tokens"
        )
    matched_on = prompt_texts(bench.evidence, MATCHED_ON, bench.seed)
    given = texts or matched_on[:STEERED_TEXTS]
    if not 1 <= len(given) <= STEERED_TEXTS:
        raise ToolError(f"{len(given)} texts are given; give 1 to {STEERED_TEXTS}")
    latent = bench.evidence.latent
    request = Request(given, [latent], matched_on, tokens=tokens, controls=1, top=TOKENS_MOVED, seed=bench.seed)
    facts = steering(bench.live, request, kl=kl, strength=None).facts
    arms: Sequence[Steering] = facts["arms"]
    lines = [f"turned up to KL {kl:g}, matched on {len(matched_on)} passages", *(_moved(arm) for arm in arms)]
    for number, text in enumerate(given, 1):
        lines.append(fenced_text("text", text[-200:], number))
        lines.append(f"  as it is: {fenced_text('written', facts['clean'][number - 1], number)}")
        lines += [
            f"  {arm.name}: {fenced_text('written', arm.written[number - 1], number)}" for arm in arms if arm.written
        ]
    return Outcome("\n".join(lines), None, plain(facts))


def finish(answer: str, predicate: str | None = None, nothing: bool = False) -> None:
    """End with the explanation.

    Args:
        answer: the explanation, one or two sentences of at most 50 words; where there is no pattern, why you think so.
        predicate: a test on tokens or words that says the same, where there is one.
        nothing: whether the unit has no pattern.
    """


def tools_of_latents() -> Mapping[str, Tool]:
    """Return the tools of an agent that explains a latent, by name."""
    own = [make_tool("lookup", one) for one in (windows, activations, card, steer)]
    return {one.name: one for one in [*own, *(TOOLS[note.__name__] for note in _NOTES), make_tool("note", finish)]}


_NOTES = (notes.hypothesis, notes.update)


def strengths(bench: LatentBench, tokens: Sequence[str], values: NDArray[np.float32]) -> str:
    """Return the marked tokens of a passage with their strengths: `" cat" 10, " sat" 3`; the strongest where they are many."""
    marks = _marked(values)
    kept = sorted(sorted(marks, key=lambda at: -values[at])[:STRONGEST])
    return ", ".join(f"{quoted(tokens[at])} {quantised(float(values[at]), bench.peak)}" for at in kept)


def _marked(values: NDArray[np.float32]) -> list[int]:
    peak = float(values.max(initial=0.0))
    found: list[int] = np.flatnonzero((values > 0) & (values >= FIRING_SHARE_OF_PEAK * peak)).tolist()
    return found


def _firing(there: Sequence[Window]) -> list[Window]:
    firing = [window for window in there if window.fires]
    return sorted(firing, key=lambda window: (-(window.peak or 0.0), window.id))


def _silent(there: Sequence[Window]) -> list[Window]:
    silent = [window for window in there if not window.fires]
    return sorted(silent, key=lambda window: window.kind != "hard")


def _window_line(bench: LatentBench, window: Window, number: int) -> str:
    if not window.fires:
        return fenced_window(window.tokens, (), number)
    if window.activations is None:
        return fenced_window(window.tokens, window.firing_positions(), number)
    return _line(bench, window.tokens, window.activations, number)


def _line(bench: LatentBench, tokens: Sequence[str], values: NDArray[np.float32], number: int) -> str:
    return f"{fenced_window(tokens, _marked(values), number)} {strengths(bench, tokens, values)}".rstrip()


def _spelled(
    bench: LatentBench, tokens: Sequence[int], values: NDArray[np.float32]
) -> tuple[tuple[str, ...], NDArray[np.float32]]:
    """Return the tokens that spell the text, without special ones, and the activations on them."""
    subject = bench.live.model.subject
    kept = [at for at, token in enumerate(tokens) if token not in subject.special_tokens]
    return tuple(subject.pieces[tokens[at]] for at in kept), values[kept]


def _verdict(fires: bool, expected: bool | None) -> str:
    told = "fires" if fires else "silent"
    return told if expected is None else f"{told}, {'as' if fires == expected else 'NOT as'} you expected:"


def _moved(arm: Steering) -> str:
    name = f"{arm.name} {arm.latents[0]}" if arm.latents else arm.name
    if arm.effect is None:
        reached = figure(arm.matched.kl) if arm.matched else ""
        return f"{name}: no strength reaches it (nearest {reached})"
    return f"{name}: likelier {_changes(arm.effect.risers)}; less likely {_changes(arm.effect.fallers)}"


def _changes(changes: Sequence[TokenChange]) -> str:
    return ", ".join(f"{quoted(one.text)} {one.logprob.value:+.2g}" for one in changes) or "nothing"


def tested(results: Sequence[Mapping[str, Any]]) -> tuple[int, int, int]:
    """Return how many texts were run, of how many it was said what to expect, and how many of these did so."""
    runs = [facts for facts in results if "fires" in facts]
    said = [facts for facts in runs if facts["expected"] is not None]
    return (
        sum(len(facts["texts"]) for facts in runs),
        sum(len(facts["texts"]) for facts in said),
        sum(facts["held"] for facts in said),
    )

"""Looking at latents: the card of one, windows on which it fires, and activations on given texts.

1. A card says what is known of a latent before any experiment: its label with held-out scores, intervals and floors, how
   often it fires, what its direction promotes (beside random directions), and its nearest latents (beside what a random
   direction has).
2. Windows come from the splits explain and refine; the test split is sealed (PROTOCOLS §1).
3. Activations are of given texts, beside how often each latent fires at all: a latent that fires everywhere says little.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from exegete.agent.findings import figure
from exegete.agent.investigation.bench import Bench
from exegete.agent.investigation.contract import Outcome
from exegete.agent.investigation.evidence import gathered
from exegete.agent.investigation.fencing import fenced, fenced_text, fenced_window, quoted
from exegete.agent.investigation.toolbelt import tool
from exegete.tools.errors import ToolError, UserError
from exegete.tools.seeds import derive_seed
from exegete.tools.store import connect
from exegete.tools.windows import SPLITS, Window

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from exegete.tools.lens import DirectLens
    from exegete.tools.text_activations import Active

LENS_TOKENS = 8
NEIGHBOURS = 5
RANDOM_DIRECTIONS = 20
MOST_WINDOWS = 20
MOST_TEXTS = 20
MOST_LATENTS = 20
TOKENS_SHOWN = 12
STRONGEST = 10
"""Latents of each text, where none is named."""


@tool("lookup")
def card(bench: Bench, latent: int) -> Outcome:
    """Show what is known of a latent: label with scores and floors, firing rate, tokens that it promotes, nearest latents.

    Labels describe where it fires, not what it does: for that, experiment.

    Args:
        latent: its index.
    """
    [own] = bench.latents([latent])
    known = _known(bench, own)
    rate = float(bench.rates[own])
    lens, no_lens = _lens(bench, own)
    near, no_near = _near(bench, own)
    label = bench.live.label(own)
    lines = [
        f"latent {own} of {bench.live.dictionary.name} at {bench.live.dictionary.hook_point_out}",
        f"fires on {rate:.3%} of tokens ({_rates_from(bench)})",
        f"label: {fenced('label', label)}" if label else "label: none in this investigation",
        *_score_lines(known),
        *(_lens_lines(lens) if lens else [f"no direct lens: {no_lens}"]),
        _near_line(bench, near) if near else f"no neighbours: {no_near}",
    ]
    facts = {"latent": own, "label": label, "rate": rate, "scores": known, "lens": lens, "neighbours": near}
    return Outcome("\n".join(lines), None, facts)


@tool("lookup")
def windows(
    bench: Bench,
    latent: int,
    count: int = 5,
    which: Literal["top", "spread"] = "top",
    split: str = "both",
    offset: int = 0,
) -> Outcome:
    """Show windows of text in which a latent fires, firing tokens inside << >>, activations behind.

    Top windows flatter a label: look at some that are spread over all strengths too.

    Args:
        latent: its index.
        count: windows, 1 to 20.
        which: `top`, the strongest; or `spread`, evenly over the ranks from the strongest to the weakest.
        split: `explain`, `refine`, or `both`; `test` is sealed.
        offset: leave out so many of the strongest.
    """
    [own] = bench.latents([latent])
    if not 1 <= count <= MOST_WINDOWS or offset < 0:
        raise ToolError(
            f"count is {count} and offset {offset}; give 1 to {MOST_WINDOWS} windows, and 0 or more to leave out"
        )
    if split not in ("both", *SPLITS):
        raise ToolError(f"there is no split {split!r}; there are: explain, refine, both")
    found = gathered(bench, [own])
    [evidence] = found.evidence
    # Whoever names the test split is refused by the evidence itself.
    chosen: tuple[Any, ...] = ("explain", "refine") if split == "both" else (split,)
    firing = [window for window in evidence.select(*chosen, kind="firing") if window.fires]
    ranked = sorted(firing, key=lambda window: (-(window.peak or 0.0), window.id))[offset:]
    picked = ranked[:count] if which == "top" else spread(ranked, count)
    head = f"latent {own}: {len(picked)} of {len(firing)} firing windows, {which} ({found.source}; the test split is sealed)"
    lines = [head, *(_window_line(number, window) for number, window in enumerate(picked, 1))]
    facts = {"latent": own, "source": found.source, "firing": len(firing), "windows": [_facts(one) for one in picked]}
    return Outcome("\n".join(lines), None, facts)


@tool("lookup")
def activations(
    bench: Bench,
    texts: list[str] | None = None,
    prompts: list[int] | None = None,
    variants: bool = False,
    latents: list[int] | None = None,
) -> Outcome:
    """Show where latents are active on texts, token by token; the strongest latents of each text where none is named.

    Give up to 20 texts: your own, or search prompts by their numbers.

    Args:
        texts: of your own, for example prompts with something changed; ⏎ is a line break.
        prompts: numbers of search prompts, from 0.
        variants: whether each of these prompts is followed by its variant without the suggested cause.
        latents: up to 20.
    """
    chosen = None if latents is None else bench.latents(latents)
    if chosen is not None and len(chosen) > MOST_LATENTS:
        raise ToolError(f"{len(chosen)} latents are given; give at most {MOST_LATENTS}")
    named = _texts(bench, texts or [], prompts or [], variants)
    tokens = [bench.live.model.tokens(text) for _, text in named]
    if chosen is None:
        return _strongest(bench, named, tokens)
    from exegete.tools.text_activations import activations as measured

    found = measured(bench.live.model, bench.live.dictionary, tokens, chosen)
    lines, facts = [_rates_line(bench, chosen)], []
    for number, ((name, text), own, values) in enumerate(zip(named, tokens, found, strict=True), 1):
        pieces = [bench.live.model.subject.pieces[token] for token in own]
        lines.append(f"{name}{fenced_text('text', text, number)}")
        lines += [f"  latent {latent}: {_active(pieces, values[:, place])}" for place, latent in enumerate(chosen)]
        facts.append({"name": name.strip(), "text": text, "tokens": pieces, "values": values})
    return Outcome("\n".join(lines), None, {"latents": chosen, "rates": bench.rates[chosen], "texts": facts})


def _texts(bench: Bench, texts: Sequence[str], prompts: Sequence[int], variants: bool) -> list[tuple[str, str]]:
    """Return what is named, each with its name: own texts have none."""
    found = [("", text) for text in texts]
    for number in prompts:
        if not 0 <= number < len(bench.cases):
            raise ToolError(f"there is no search prompt {number}; there are 0 to {len(bench.cases) - 1}")
        case = bench.cases[number]
        found.append((f"prompt {number} ", case.prompt))
        if variants and case.variant is None:
            raise ToolError(f"search prompt {number} has no variant; leave variants out")
        found += [(f"variant {number} ", case.variant)] if variants and case.variant is not None else []
    if not 1 <= len(found) <= MOST_TEXTS:
        raise ToolError(f"{len(found)} texts are given; give 1 to {MOST_TEXTS} in texts, or prompts by their numbers")
    return found


def _strongest(bench: Bench, named: Sequence[tuple[str, str]], tokens: Sequence[tuple[int, ...]]) -> Outcome:
    from exegete.tools.text_activations import top_latents

    found = top_latents(bench.live.model, bench.live.dictionary, tokens, STRONGEST)
    rates, pieces = bench.rates, bench.live.model.subject.pieces
    lines, facts = (
        [f"the {STRONGEST} strongest latents of each text, with how often each fires ({_rates_from(bench)})"],
        [],
    )
    for number, ((name, text), own, top) in enumerate(zip(named, tokens, found, strict=True), 1):
        lines.append(f"{name}{fenced_text('text', text, number)}")
        for one in top.text:
            told = fenced("label", label) if (label := bench.live.label(one.latent)) else ""
            at = f"{one.value:.3g} at {quoted(pieces[own[one.position]])} (token {one.position})"
            lines.append(f"  latent {one.latent}: {at}, fires on {rates[one.latent]:.2%} {told}".rstrip())
        facts.append({"name": name.strip(), "text": text, "strongest": [_fact(bench, one, rates) for one in top.text]})
    return Outcome("\n".join(lines), None, {"texts": facts})


def _fact(bench: Bench, one: Active, rates: NDArray[np.float64]) -> dict[str, Any]:
    return {**one._asdict(), "rate": float(rates[one.latent]), "label": bench.live.label(one.latent)}


def _rates_from(bench: Bench) -> str:
    if bench.live.rates() is not None:
        return "over the store's corpus"
    return f"over {len(bench.texts)} other texts" if bench.texts else "over the search prompts"


def _rates_line(bench: Bench, latents: Sequence[int]) -> str:
    told = ", ".join(f"{latent} on {bench.rates[latent]:.2%}" for latent in latents)
    return f"how often they fire at all ({_rates_from(bench)}): {told}"


def _active(pieces: Sequence[str], values: NDArray[np.float32]) -> str:
    """Return the tokens on which a latent is active, in order, the strongest of them where they are many."""
    active = np.flatnonzero(values)
    if not len(active):
        return "silent"
    kept = sorted(active[np.argsort(-np.abs(values[active]), kind="stable")][:TOKENS_SHOWN].tolist())
    shown = ", ".join(f"{quoted(pieces[at])} {values[at]:.3g} (token {at})" for at in kept)
    return shown + (f" and {len(active) - len(kept)} weaker" if len(active) > len(kept) else "")


def spread(ranked: Sequence[Window], count: int) -> list[Window]:
    """Return so many windows, evenly over the ranks; all of them where there are no more."""
    places = np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int)
    return [ranked[place] for place in places]


def _window_line(number: int, window: Window) -> str:
    marks = window.firing_positions()
    values = window.activations
    strong = [] if values is None else [f"{quoted(window.tokens[at])} {values[at]:.3g}" for at in marks]
    peak = "activations unknown" if values is None else f"peak {window.peak:.3g}"
    return f"{window.split}, {peak}: {fenced_window(window.tokens, marks, number)} {', '.join(strong)}".rstrip()


def _facts(window: Window) -> dict[str, Any]:
    return {
        "window": window.id,
        "split": window.split,
        "document": window.document,
        "peak": window.peak,
        "tokens": window.tokens,
        "activations": window.activations,
    }


def _known(bench: Bench, latent: int) -> list[dict[str, Any]]:
    """Return the balanced accuracies of the latent's best explanation, floors among them (`baseline`)."""
    if bench.live.store is None:
        return []
    query = """
        SELECT s.evaluator, s.value, s.low, s.high, s.n, s.failures, s.baseline,
               CASE s.evaluator WHEN 'detection' THEN b.detection_shuffled WHEN 'fuzzing' THEN b.fuzzing_shuffled END AS run_shuffled
        FROM best_explanations b JOIN scores s USING (dictionary, latent, explanation_id, run)
        WHERE dictionary = ? AND latent = ? AND metric = 'balanced_accuracy' ORDER BY evaluator, baseline NULLS FIRST
    """
    with connect(bench.live.store) as connection:
        cursor = connection.execute(query, [bench.live.dictionary.fingerprint, latent])
        names = [column[0] for column in cursor.description or ()]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def _score_lines(known: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for own in (row for row in known if row["baseline"] is None):
        floors = [
            f"{row['baseline']} {figure(row['value'], row['low'], row['high'], row['n']) or 'none'}"
            for row in known
            if row["baseline"] and row["evaluator"] == own["evaluator"]
        ]
        if not floors and own["run_shuffled"] is not None:
            floors = [f"shuffled {own['run_shuffled']:.3g}, the mean of the run"]
        score = figure(own["value"], own["low"], own["high"], own["n"]) or "no figure"
        failed = f", {own['failures']} failed" if own["failures"] else ""
        lines.append(
            f"{own['evaluator']} on held-out windows {score}{failed}; floors: {', '.join(floors) or 'none known'}"
        )
    return lines


def _lens(bench: Bench, latent: int) -> tuple[DirectLens | None, str]:
    from exegete.tools.lens import direct_lens

    try:
        [found] = direct_lens(bench.live.model, bench.live.dictionary, [latent], LENS_TOKENS, seed=bench.seed)
    except UserError as error:
        return None, str(error)
    return found, ""


def _lens_lines(lens: DirectLens) -> list[str]:
    up, down = (", ".join(f"{quoted(one.piece)} {one.logit:.3g}" for one in side) for side in (lens.top, lens.bottom))
    floor = f"a random direction's largest logit is below {lens.floor:.3g} in 95 of 100"
    return [f"its direction promotes {up} ({floor})", f"and demotes {down}"]


def _near(bench: Bench, latent: int) -> tuple[dict[str, Any], str]:
    from exegete.tools.neighbours import decoder_neighbours

    dictionary = bench.live.dictionary
    try:
        latents, cosines = decoder_neighbours(dictionary, [latent], min(NEIGHBOURS, dictionary.latents - 1))
    except UserError as error:
        return {}, str(error)
    near = [{"latent": int(one), "cosine": float(c)} for one, c in zip(latents[0], cosines[0], strict=True)]
    return {"nearest": near, "random": _random_cosine(bench)}, ""


def _random_cosine(bench: Bench) -> float:
    """Return the mean, over random directions, of the cosine with the latent that is nearest to each."""
    import torch

    from exegete.tools.controls import random_direction

    directions = bench.live.dictionary.decoder_directions()
    assert directions is not None
    width, device = directions.shape[1], directions.device
    drawn = [
        random_direction(width, derive_seed(bench.seed, "card", index), device=str(device))
        for index in range(RANDOM_DIRECTIONS)
    ]
    random = torch.stack(drawn).to(device).float()
    random /= random.norm(dim=1, keepdim=True)
    with torch.inference_mode():
        best = [
            (random @ torch.nn.functional.normalize(block.float(), dim=1).T).amax(1)
            for block in torch.split(directions, 32_768)
        ]
        return float(torch.stack(best).amax(0).mean())


def _near_line(bench: Bench, near: dict[str, Any]) -> str:
    told = [
        f"{one['latent']} ({one['cosine']:.2f})"
        + (f" {fenced('label', label)}" if (label := bench.live.label(one["latent"])) else "")
        for one in near["nearest"]
    ]
    floor = f"a random direction's nearest has {near['random']:.2f}, mean of {RANDOM_DIRECTIONS}"
    return f"nearest latents by decoder cosine: {', '.join(told)} ({floor})"

"""Experiments that compare prompts with others: compare, probe, directions.

What differs between two sets of texts goes with the difference, which does not make it the cause: these find candidates.
Only `directions` intervenes, by taking the direction that it finds out of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from exegete.agent.findings import figure, plain
from exegete.agent.investigation.arms import WORDS, bars_of, headline_of, told
from exegete.agent.investigation.bench import Bench
from exegete.agent.investigation.contract import Headline, Outcome
from exegete.agent.investigation.fencing import fenced
from exegete.agent.investigation.toolbelt import tool
from exegete.tools.comparing import ROUNDING, Comparison, Difference
from exegete.tools.comparing import compare as compared
from exegete.tools.controls import random_direction
from exegete.tools.cross_validation import PLAIN, Auc
from exegete.tools.direction_stability import DirectionSettings
from exegete.tools.directions import Direction, Sweep, nearest_latents, sweep
from exegete.tools.errors import ToolError
from exegete.tools.interventions import Tokens, project_out
from exegete.tools.live_model import Trial
from exegete.tools.probes import ProbeSettings
from exegete.tools.probes import probe as probed
from exegete.tools.seeds import derive_seed, generator
from exegete.tools.text_activations import pooled

Against = Literal["variants", "texts", "given"]

_PERMUTATIONS, _SHUFFLED_PERMUTATIONS, _SHUFFLES = 4_999, 999, 5
_FOLDS, _FEWEST = 5, 3


@tool("experiment")
def compare(
    bench: Bench,
    against: Against = "variants",
    given: list[str] | None = None,
    pooling: Literal["max", "mean"] = "max",
    top: int = 10,
) -> Outcome:
    """Find the latents that differ between the search prompts and other texts.

    Headline: how many latents differ; the chance of any false one among them is 5 %. Control: how many differ when the two
    sides are drawn at random from the same texts. What differs goes with the texts; whether it acts is for ablate or
    interchange to say.

    Args:
        against: each prompt's variant (in pairs), other texts of the subject's kind, or texts that you give.
        given: the texts, where against is given.
        pooling: a latent's largest activation over a text's tokens, or its mean.
        top: latents to list.
    """
    prompts, others, paired = _sides(bench, against, given)
    if top < 1:
        raise ToolError(f"top = {top}; give at least 1")
    live = bench.live
    first, second = (pooled(live.model, live.dictionary, side, pooling) for side in (prompts, others))
    found = _compared(bench, first, second, paired, _PERMUTATIONS)
    shuffled = [len(_compared(bench, *_mixed(bench, first, second, paired, i), paired, _SHUFFLED_PERMUTATIONS).discoveries)
                for i in range(_SHUFFLES)]  # fmt: skip
    discoveries = found.discoveries
    low, high = np.quantile(shuffled, (0.025, 0.975))
    headline = Headline(
        "latents that differ", float(len(discoveries)), None, None, found.n_first, "the same with sides drawn at random",
        float(np.mean(shuffled)), float(low), float(high), len(shuffled),
    )  # fmt: skip
    rows = discoveries or found.rows(3)
    lines = [
        *told(headline, "latents"),
        f"{found.n_first} prompts against {found.n_second} texts ({found.design}); {found.firing:,} latents fire on them, "
        f"{found.tested:,} could be found",
        "strongest first:" if discoveries else "none differs; the nearest are",
        *(_difference_line(bench, row) for row in rows[:top]),
    ]
    facts = {
        "against": against, "given": given, "pooling": pooling, "design": found.design, "fdr": found.fdr,
        "permutations": found.permutations, "texts": [found.n_first, found.n_second], "tested": found.tested,
        "firing": found.firing, "floor": found.floor, "shuffled": shuffled,
        "latents": [{"difference": row, "label": live.label(row.latent)} for row in rows[: max(top, 100)]],
    }  # fmt: skip
    return Outcome("\n".join(lines), headline, plain(facts), (_difference_bars(rows[:top]),))


@tool("experiment")
def probe(bench: Bench, k: int = 1, positive: list[str] | None = None, negative: list[str] | None = None) -> Outcome:
    """Say how well k latents tell two kinds of texts apart, beside a probe on the whole residual stream.

    Headline: AUC of a probe on k latents, on held-out folds. Control: the same with shuffled labels, whose upper end is the
    highest of these runs. A latent that tells the texts apart need not be used by the model.

    Args:
        k: latents that the probe may use.
        positive: texts of one kind; the search prompts where left out.
        negative: texts of the other kind; their variants where left out.
    """
    ours, theirs, groups = _kinds(bench, positive, negative)
    if k < 1:
        raise ToolError(f"k = {k}; a probe uses at least 1 latent")
    settings = ProbeSettings(
        ks=(k,), regimes=(PLAIN,), folds=_folds(ours, theirs), repeats=2, shuffles=_SHUFFLES, seed=bench.seed
    )
    labels = [1] * len(ours) + [0] * len(theirs)
    found = probed(bench.live.model, bench.live.dictionary, [*ours, *theirs], labels, groups=groups, settings=settings)
    (result,) = found.results
    name = f"AUC of a probe on {k} latent{'s' if k > 1 else ''}"
    headline = _auc_headline(name, result.latent, found.texts)
    lines = [
        *told(headline, ""),
        f"a probe on the residual stream: {_auc(result.dense)}; latents less that: "
        f"{figure(result.gain.value, result.gain.low, result.gain.high)}",
        *(
            f"latent {one.latent} in {one.share:.0%} of the fits, weight {one.weight:+.2g} {_label(bench, one.latent)}"
            for one in result.chosen[:6]
        ),
    ]
    facts = {"k": k, "positive": positive, "negative": negative, "probes": found}
    return Outcome("\n".join(lines), headline, plain(facts), (bars_of(headline, "AUC", f"{k} latents"),))


@tool("experiment")
def directions(
    bench: Bench,
    points: list[str] | None = None,
    positive: list[str] | None = None,
    negative: list[str] | None = None,
) -> Outcome:
    """Find where in the model two kinds of texts lie apart along one direction, and take that direction out.

    The direction is the difference of the two means at the last token. Headline: the mean over search prompts of the metric
    with it taken out at the best hook point, less the metric as it is. Control: random directions taken out there. Beside it:
    how well it tells held-out texts apart, with shuffled labels as the floor, and the latents nearest to it.

    Args:
        points: hook points to try; the residual stream after every layer where left out.
        positive: texts of one kind; the search prompts where left out.
        negative: texts of the other kind; their variants where left out.
    """
    ours, theirs, groups = _kinds(bench, positive, negative)
    tried = points or _residual_points(bench)
    settings = DirectionSettings(
        folds=_folds(ours, theirs), repeats=2, shuffles=_SHUFFLES, resamples=20, seed=bench.seed
    )
    found = sweep(bench.live.model, ours, theirs, tried, groups=groups, settings=settings)
    best = found.at(found.best)
    headline, change = _projected(bench, best)
    near = _near(bench, best)
    own = bench.measurable
    lines = [
        *told(headline, own.metric.unit),
        f"best hook point {best.hook_point}, chosen by inner folds; AUC there {_auc(found.best_auc)}, shuffled labels "
        f"{found.best_auc.floor:.2g}",
        *(f"{one.hook_point}: AUC {_auc(one.auc)}, cosine of halves {one.halves.mean:.2g} (floor {one.halves.floor:.2g})"
          for one in found.directions),
        *(f"near latent {one['latent']}: cosine {one['cosine']:+.2g} {_label(bench, one['latent'])}" for one in near["latents"][:5]),
    ]  # fmt: skip
    facts = {
        "points": tried, "positive": positive, "negative": negative, "best": found.best, "best_auc": found.best_auc,
        "choices": found.choices, "directions": found.directions, "near": near, "change_by_prompt": change,
        "interventions": [project_out(best.hook_point, best.vector).to_json()],
    }  # fmt: skip
    plots = (bars_of(headline, own.metric.unit, "the direction taken out"), _layers(found))
    return Outcome("\n".join(lines), headline, plain(facts), plots)


def _sides(bench: Bench, against: Against, given: Sequence[str] | None) -> tuple[list[Tokens], list[Tokens], bool]:
    """Return the prompts, what they are compared with, and whether in pairs. Raises ToolError."""
    if (given is not None) != (against == "given"):
        raise ToolError("give texts with against = given, and only then")
    own = bench.measurable
    if against == "variants":
        pairs = [(prompt, variant) for prompt, variant in zip(own.prompts, own.variants, strict=True) if variant]
        if len(pairs) < 2:
            raise ToolError("fewer than two prompts have a variant; compare against texts, or give some")
        return [one for one, _ in pairs], [other for _, other in pairs], True
    texts = list(bench.texts) if given is None else list(given)
    if not texts:
        raise ToolError("there are no other texts; give some with against = given")
    return own.prompts, [bench.live.model.tokens(text) for text in texts], False


def _compared(bench: Bench, first: Any, second: Any, paired: bool, permutations: int) -> Comparison:
    return compared(
        first, second, design="pairs" if paired else "texts", permutations=permutations, seed=bench.seed,
        rounding=ROUNDING[bench.live.model.subject.dtype],
    )  # fmt: skip


def _mixed(bench: Bench, first: Any, second: Any, paired: bool, index: int) -> tuple[Any, Any]:
    """Return the two sides with their texts drawn at random: of pairs, which one is on which side."""
    from scipy.sparse import vstack

    rng = generator(bench.seed, "sides", index)
    both, count = vstack([first, second], format="csr"), first.shape[0]
    if paired:
        swapped: NDArray[np.bool_] = rng.random(count) < 0.5
        rows = np.arange(count)
        return both[np.where(swapped, rows + count, rows)], both[np.where(swapped, rows, rows + count)]
    order = rng.permutation(both.shape[0])
    return both[order[:count]], both[order[count:]]


def _kinds(
    bench: Bench, positive: Sequence[str] | None, negative: Sequence[str] | None
) -> tuple[list[Tokens], list[Tokens], list[int] | None]:
    """Return texts of two kinds, and which belong together. Raises ToolError where there are too few."""
    if (positive is None) != (negative is None):
        raise ToolError("give texts of both kinds, positive and negative, or of none")
    if positive is None or negative is None:
        ours, theirs, _ = _sides(bench, "variants", None)
        groups: list[int] | None = [*range(len(ours)), *range(len(theirs))]
    else:
        tokens = bench.live.model.tokens
        ours, theirs, groups = [tokens(text) for text in positive], [tokens(text) for text in negative], None
    if min(len(set(ours)), len(set(theirs))) < _FEWEST:
        raise ToolError(f"{len(ours)} and {len(theirs)} texts; give at least {_FEWEST} different ones of each kind")
    return ours, theirs, groups


def _folds(ours: Sequence[Tokens], theirs: Sequence[Tokens]) -> int:
    return min(_FOLDS, len(set(ours)), len(set(theirs)))


def _residual_points(bench: Bench) -> list[str]:
    known = bench.live.model.subject.hook_points
    found = [point for point in known if point.startswith("blocks.") and point.endswith(".hook_resid_post")]
    return found or [bench.live.dictionary.hook_point]


def _projected(bench: Bench, best: Direction) -> tuple[Headline, list[float]]:
    """Return what taking the direction out does to the metric, beside random directions."""
    own, point = bench.measurable, best.hook_point
    seeds = [derive_seed(bench.seed, "directions", point, i) for i in range(bench.controls)]
    vectors = [random_direction(len(best.vector), seed).tolist() for seed in seeds]
    rows = [[Trial(prompt, project_out(point, one)) for prompt in own.prompts] for one in [best.vector, *vectors]]
    changes = own.table(rows) - own.clean
    random = np.array([row[np.isfinite(row)].mean() for row in changes[1:] if np.isfinite(row).any()])
    name = f"mean change of the {WORDS[own.metric.kind]}, the direction taken out at {point}"
    return headline_of(changes[0], name, random, "random directions taken out there"), changes[0].tolist()


def _near(bench: Bench, best: Direction) -> dict[str, Any]:
    dictionary = bench.live.dictionary
    if best.hook_point != dictionary.hook_point_out or dictionary.decoder_directions() is None:
        return {"latents": [], "floor": None}
    found: dict[str, Any] = plain(nearest_latents(dictionary, best, seed=bench.seed))
    return found


def _auc_headline(name: str, auc: Auc, n: int) -> Headline:
    return Headline(
        name, auc.value, auc.low, auc.high, n, "the same with shuffled labels", auc.floor, None, auc.floor_highest,
        _SHUFFLES,
    )  # fmt: skip


def _difference_line(bench: Bench, row: Difference) -> str:
    return (
        f"latent {row.latent}: {figure(row.effect, row.low, row.high)} sd, fires on {row.rate_first:.0%} and "
        f"{row.rate_second:.0%}, q {row.q:.2g} {_label(bench, row.latent)}"
    )


def _difference_bars(rows: Sequence[Difference]) -> dict[str, Any]:
    bars = [
        {"label": f"latent {row.latent}", "value": row.effect, "low": row.low, "high": row.high, "control": False}
        for row in rows
    ]
    return {"kind": "bars", "title": "difference between the two sides", "unit": "standard deviations", "bars": bars}


def _layers(found: Sweep) -> dict[str, Any]:
    """Return AUC by hook point, in the order given, beside its floor."""
    own = [one.auc for one in found.directions]
    points = [[i, auc.value] for i, auc in enumerate(own)]
    series = [
        {"label": "direction", "points": points, "low": [auc.low for auc in own], "high": [auc.high for auc in own],
         "control": False},
        {"label": "shuffled labels", "points": [[i, auc.floor] for i, auc in enumerate(own)], "control": True},
    ]  # fmt: skip
    return {"kind": "curve", "title": "AUC by hook point", "x": "hook point", "y": "AUC", "series": series}


def _auc(auc: Auc) -> str:
    return figure(auc.value, auc.low, auc.high)


def _label(bench: Bench, latent: int) -> str:
    label = bench.live.label(latent)
    return fenced("label", label) if label else "no label"

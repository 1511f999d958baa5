"""`exegete compare`, `probe` and `lens`: what latents say of texts, and what a latent writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from exegete.agent.findings import Findings, Table, figure
from exegete.agent.live import Live
from exegete.tools.comparing import Comparison, Difference, compare_prompts
from exegete.tools.cross_validation import Auc
from exegete.tools.errors import UserError
from exegete.tools.lens import ClampedLens, DirectLens, clamped_lens, direct_lens
from exegete.tools.probes import ProbeResult, ProbeSettings, probe

Records = Sequence[tuple[str, Mapping[str, Any]]]


def comparing(
    live: Live,
    first: Sequence[str],
    second: Sequence[str],
    *,
    names: tuple[str, str],
    paired: bool,
    method: str,
    fdr: float,
    permutations: int | None,
    pooling: str,
    top: int,
    seed: int,
) -> Findings:
    """Compare two sets of texts latent by latent.

    Raises:
        UserError: a text cannot be read by the subject, a set is too small, or an option is out of range.
    """
    _one_of("--method", method, ("maxt", "bh"))
    _one_of("--pooling", pooling, ("max", "mean"))
    found = compare_prompts(
        live.model,
        live.dictionary,
        *([live.model.tokens(text) for text in side] for side in (first, second)),
        pooling=pooling,  # type: ignore[arg-type]
        design="pairs" if paired else "texts",
        method=method,
        fdr=fdr,
        permutations=permutations,
        seed=seed,
    )
    discoveries = found.discoveries
    rows = discoveries or found.rows(min(top, 3))
    lines = [live.heading, *_comparison_lines(found, names, len(discoveries))]
    facts = {
        "command": "compare",
        "origin": live.origin,
        "parameters": {"first": names[0], "second": names[1], "pooling": pooling, "method": method, "design": found.design,
                       "fdr": fdr, "permutations": found.permutations, "exact": found.exact, "seed": seed},
        "texts": [found.n_first, found.n_second],
        "tested": found.tested,
        "firing": found.firing,
        "resolution": found.resolution,
        "floor": found.floor,
        "discoveries": len(discoveries),
        "latents": [{"difference": row, "label": live.label(row.latent)} for row in rows],
    }  # fmt: skip
    title = "latents that differ" if discoveries else "none differs; the nearest are"
    return Findings(facts, lines, [_difference_table(live, title, rows[:top])])


def _comparison_lines(found: Comparison, names: tuple[str, str], discoveries: int) -> list[str]:
    how = "family-wise, by the largest score of each arrangement" if found.method == "maxt" else "Benjamini–Hochberg"
    floor = "" if found.floor is None else f"; a score above {found.floor:.3g} is one in {1 / found.fdr:.0f} by chance"
    return [
        f"{names[0]} (n = {found.n_first}) against {names[1]} (n = {found.n_second}), {found.design}",
        f"{found.latents:,} latents, {found.firing:,} fire on these texts, {found.tested:,} could be found",
        f"{found.permutations:,} arrangements{', all there are' if found.exact else ''}, p at least {found.resolution:.2g}{floor}",
        f"{discoveries} differ at a false discovery rate of {found.fdr:g} ({how})",
    ]


def _difference_table(live: Live, title: str, rows: Sequence[Difference]) -> Table:
    cells = [
        (
            row.latent,
            figure(row.effect, row.low, row.high),
            row.auroc,
            row.rate_first,
            row.rate_second,
            row.q,
            live.label(row.latent),
        )
        for row in rows
    ]
    return Table(title, ("latent", "effect (sd)", "AUROC", "fires in first", "in second", "q", "label"), cells)


def looking(live: Live, latents: Sequence[int], prompts: Sequence[str], *, kl: float, top: int, seed: int) -> Findings:
    """Show what latents write: the tokens of their directions, and on prompts what clamping them changes.

    Raises:
        UserError: a latent is not there, there is one prompt only, or the dictionary does not write to the residual stream.
    """
    tokens = [live.model.tokens(text) for text in prompts]
    direct = direct_lens(live.model, live.dictionary, latents, top, seed=seed)
    clamped = [
        clamped_lens(live.model, live.dictionary, latent, tokens, kl, top, seed=seed)
        for latent in (latents if tokens else ())
    ]
    tables = [_direct_table(live, one) for one in direct] + [_clamped_table(one, kl) for one in clamped]
    facts = {
        "command": "lens",
        "origin": live.origin,
        "parameters": {"kl": kl, "prompts": len(prompts), "seed": seed},
        "direct": direct,
        "clamped": clamped,
    }
    return Findings(facts, [live.heading], tables)


def _direct_table(live: Live, found: DirectLens) -> Table:
    rows = [(high.piece, high.logit, low.piece, low.logit) for high, low in zip(found.top, found.bottom, strict=True)]
    what = "direction" if found.activation is None else f"decode at activation {found.activation:g}"
    title = (
        f"latent {found.latent}: {live.label(found.latent) or 'no label'}\n{what} through norm and unembedding; the highest "
        f"logit of random directions is below {found.floor:.3g} in 95 % of cases"
    )
    return Table(title, ("promoted", "logit", "suppressed", "logit"), rows)


def _clamped_table(found: ClampedLens, kl: float) -> Table:
    matched = found.matched
    if found.effect is None:
        reached = figure(matched.kl)
        return Table(f"latent {found.latent}: no clamp reaches KL {kl:g} (most: {reached})", ("token",), [])
    floor = (
        ""
        if found.floor is None
        else f"; the highest riser of random directions at that KL: {figure(found.floor.value)}"
    )
    title = (
        f"latent {found.latent} clamped to {figure(matched.strength)}: change of log-probability on {found.effect.n} other "
        f"prompts, KL {figure(found.effect.kl.value, found.effect.kl.low, found.effect.kl.high)}{floor}"
    )
    rows = [
        (kind, one.text, one.clean, one.changed, figure(one.logprob.value, one.logprob.low, one.logprob.high))
        for kind, tokens in (("rises", found.effect.risers), ("falls", found.effect.fallers))
        for one in tokens
    ]
    return Table(title, ("", "token", "clean", "changed", "log-probability"), rows)


def probing(
    live: Live, records: Records, *, ks: Sequence[int], pooling: str, folds: int, label_field: str, seed: int
) -> Findings:
    """Probe labelled texts with few latents, beside the residual stream.

    Raises:
        UserError: a record has no label 0 or 1, the classes are too small, or an option is out of range.
    """
    _one_of("--pooling", pooling, ("max", "mean"))
    labels = [_label(record, text, label_field) for text, record in records]
    settings = ProbeSettings(ks=tuple(ks), folds=folds, seed=seed)
    prompts = [live.model.tokens(text) for text, _ in records]
    groups = [str(record["group"]) if "group" in record else text for text, record in records]
    found = probe(live.model, live.dictionary, prompts, labels, groups=groups, pooling=pooling, settings=settings)  # type: ignore[arg-type]
    rows = [
        (one.regime, one.k, _auc(one.latent), one.latent.floor, _auc(one.dense), _auc(one.means), _gain(one))
        for one in found.results
    ]
    columns = ("regime", "k", "latents", "floor", "residual", "difference of means", "latents − residual")
    chosen = [
        (one.regime, one.k, latent.latent, latent.share, latent.weight, live.label(latent.latent))
        for one in found.results
        for latent in one.chosen[:5]
    ]
    lines = [live.heading, f"{found.texts} texts, {found.positives} of them positive, {found.groups} groups"]
    lines += [f"regime {one.regime} left out: {one.reason}" for one in found.skipped]
    facts = {"command": "probe", "origin": live.origin, "pooling": pooling, "probes": found}
    return Findings(
        facts,
        lines,
        [
            Table("AUC on held-out folds", columns, rows),
            Table("latents chosen", ("regime", "k", "latent", "share of fits", "weight", "label"), chosen),
        ],
    )


def _label(record: Mapping[str, Any], text: str, field: str) -> int:
    value = record.get(field)
    if value in (0, 1):
        return int(value)
    raise UserError(
        f'the text {text[:30]!r} has {field} = {value!r}; a probe needs lines like {{"text": …, "{field}": 0 or 1}}'
    )


def _auc(auc: Auc) -> str:
    return figure(auc.value, auc.low, auc.high)


def _gain(result: ProbeResult) -> str:
    return figure(result.gain.value, result.gain.low, result.gain.high)


def _one_of(option: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UserError(f"{option} {value!r} is not one of {', '.join(allowed)}")

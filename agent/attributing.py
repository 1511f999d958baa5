"""`exegete attribute`: which latents hold a token up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from exegete.agent.experiments import Request
from exegete.agent.findings import Findings, Table, estimated, figure
from exegete.agent.live import Live
from exegete.tools.attribution import Attribution, LogitDifference, LogProbability, attribute
from exegete.tools.interventions import Tokens


def attributing(live: Live, request: Request, *, answer: str, other: str | None, steps: int, groups: int) -> Findings:
    """Attribute the log-probability of a token, or its log-odds against another, to latents.

    Raises:
        UserError: a prompt or token is not there, or a number is out of range.
    """
    prompts = live.prompts(request.prompts)
    right = live.token(answer)
    metric = LogProbability(right) if other is None else LogitDifference(right, live.token(other))
    found = attribute(
        live.model, live.dictionary, prompts, metric, steps=steps, groups=groups, top=request.top, exact=request.top,
        seed=request.seed,
    )  # fmt: skip
    rows = [
        (
            one.latent,
            estimated(one.attribution),
            estimated(one.exact),
            _strongest(live, found, prompts, one.latent),
            live.label(one.latent),
        )
        for one in found.ranked
    ]
    what = f"log-probability of {answer!r}" if other is None else f"log-odds of {answer!r} against {other!r}"
    lines = [live.heading, f"{what}: {float(np.mean(found.clean)):.3g} (n = {len(prompts)})"]
    if found.floor is not None:
        lines.append(
            f"exact effects of {len(found.drawn)} other active latents drawn at random: 95 % below {found.floor:.3g}"
        )
    if found.agreement is not None:
        agreement = found.agreement
        interval = figure(agreement.value, agreement.low, agreement.high, agreement.n)
        lines.append(
            f"rank correlation of estimate and exact effect: {interval}; chance stays below {agreement.floor:.2g}"
        )
    share = found.error_share
    lines.append(f"share of the dictionary's error in all attributions: {figure(share.value, share.low, share.high)}")
    facts = {
        "command": "attribute",
        "origin": live.origin,
        "parameters": request.parameters() | {"answer": answer, "other": other, "steps": steps, "groups": groups},
        "prompts": list(request.prompts),
        "clean": found.clean,
        "latents": [
            {"latent": one.latent, "attribution": one.attribution, "exact": one.exact, "label": live.label(one.latent)}
            for one in found.ranked
        ],
        "random": found.drawn,
        "random_95": found.floor,
        "agreement": found.agreement,
        "latents_total": found.latents_total,
        "error_total": found.error_total,
        "error_share": found.error_share,
    }
    return Findings(
        facts, lines, [Table("latents", ("latent", "attribution", "exact effect", "mostly at", "label"), rows)]
    )


def _strongest(live: Live, found: Attribution, prompts: Sequence[Tokens], latent: int) -> str:
    """Return the token at which a latent is held most responsible."""
    entries = found.entries
    own = np.flatnonzero(entries.latent == latent)
    place = own[np.argmax(np.abs(entries.attribution[own]))]
    token = prompts[int(entries.prompt[place])][int(entries.position[place])]
    return live.model.subject.pieces[token]

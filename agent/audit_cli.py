"""The command `exegete audit`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from exegete.agent.audit_tasks import Wanted
    from exegete.agent.auditing import AuditReport

app = typer.Typer()
"""Its command is registered with the main application."""

OFFLINE = "predicate"


@app.command()
def audit(
    judge: Annotated[
        str,
        typer.Option(
            "--judge", help="`predicate` (offline), another registered judge, or a model: PROVIDER:MODEL[@URL]."
        ),
    ] = OFFLINE,
    evaluators: Annotated[
        str | None, typer.Option("--evaluators", help="Separated by commas; all that can be run.")
    ] = None,
    latents: Annotated[int, typer.Option("--latents", help="Planted latents in text.")] = 36,
    items: Annotated[
        int, typer.Option("--items", help="Firing windows that are judged for each, and as many others.")
    ] = 20,
    live_latents: Annotated[
        int, typer.Option("--live-latents", help="Of each kind that is planted in the subject, at most.")
    ] = 14,
    embedder: Annotated[
        str | None, typer.Option("--embedder", help="sentence-transformers model: name or folder.")
    ] = None,
    scorer: Annotated[str | None, typer.Option("--scorer", help="Local model for surprisal: hf:PATH.")] = None,
    max_usd: Annotated[float | None, typer.Option("--max-usd", help="Most that paid calls may cost.")] = None,
    no_budget: Annotated[bool, typer.Option("--no-budget", help="Let paid calls cost what they cost.")] = False,
    prices: Annotated[
        Path | None, typer.Option("--prices", help="Price table (TOML), laid over the shipped one.")
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write the AUROCs as .svg or .html.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="Of the models that run here: cpu, cuda, mps.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of every random choice.")] = 0,
) -> None:
    """Say what each evaluator, with your judge, can tell: true from corrupted explanations of planted latents."""
    from exegete.agent.audit_shown import check_plot, findings, write_plot
    from exegete.agent.audit_tasks import Wanted

    wanted = Wanted(_listed(evaluators), latents, items, live_latents, seed=seed, device=device)
    if plot is not None:
        check_plot(plot)
    options = {"max_usd": max_usd, "no_budget": no_budget, "prices": prices, "device": device}
    report = _audited(wanted, judge, embedder, scorer, options)
    found = findings(report)
    if json is not None:
        json.write_text(found.render("json"), encoding="utf-8")
    if plot is not None:
        write_plot(report, plot)
    typer.echo(found.render("table"))


def _listed(names: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (names or "").split(",") if name.strip())


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _audited(
    wanted: Wanted, judge: str, embedder: str | None, scorer: str | None, options: dict[str, Any]
) -> AuditReport:
    import asyncio

    from exegete.agent.audit_instruments import opened
    from exegete.agent.auditing import run_audit

    async def run() -> AuditReport:
        async with opened(judge, embedder, scorer, **options) as instruments:
            return await run_audit(wanted, instruments, _say)

    return asyncio.run(run())

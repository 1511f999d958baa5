"""The command line. Commands import what they need when they run, so that `exegete --help` answers at once."""

from __future__ import annotations

import errno
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from exegete.agent import ask_cli, audit_cli, instrument_cli, rerun_cli, search_cli, slices_cli, watch_cli
from exegete.tools.errors import ExegeteError, UserError
from exegete.tools.rendering import visible

if TYPE_CHECKING:
    from exegete.agent.config import RunConfig

app = typer.Typer(
    name="exegete",
    help="Write, test and keep natural-language explanations of the latents of sparse dictionaries.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
evidence_app = typer.Typer(help="Bring evidence in from elsewhere, or hand it on, as JSON lines.", no_args_is_help=True)
app.add_typer(evidence_app, name="evidence")

StoreOption = Annotated[Path, typer.Option("--store", help="Folder of the store.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="KEY=VALUE of the configuration, e.g. label.limit=100.")
]

ModelOption = Annotated[
    str | None,
    typer.Option(help="Language model that explains and judges: openai:MODEL, anthropic:MODEL, openai:MODEL@URL, …"),
]
BudgetOption = Annotated[float | None, typer.Option(help="What calls to language models may cost in all, in USD.")]
NoBudgetOption = Annotated[bool | None, typer.Option("--no-budget", help="Spend without a limit.")]
TokensOption = Annotated[
    int | None, typer.Option("--budget-tokens", help="What the calls may take in tokens, input and output together.")
]
HoursOption = Annotated[
    float | None, typer.Option(help="Stop taking latents after so many hours; the run can be taken up again.")
]
YesOption = Annotated[
    bool, typer.Option("--yes", help="Do not ask before going on, however much the plan says is to come.")
]
OnFinishOption = Annotated[
    str | None,
    typer.Option(
        "--on-finish",
        metavar="COMMAND",
        help="Shell command to run when it ends, however it ends; EXEGETE_STATUS, EXEGETE_EXIT, EXEGETE_STORE and "
        "EXEGETE_SUMMARY (a JSON file) tell it how.",
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Show no progress, only what is worth keeping.")]

CALLS_MISSING = 3
"""Exit status of a run that finished, but for calls that a language model did not answer."""
DEMO_STORE = Path("demo-store")
DEFAULT_STORE = Path("store")


class Format(StrEnum):
    """How rows are written."""

    table = "table"
    csv = "csv"
    json = "json"
    parquet = "parquet"


@app.command()
def demo(store: StoreOption = DEMO_STORE, assignments: SetOption = None) -> None:
    """Label the bundled dictionary end to end: no key, no network, no GPU. Run it again to go on or to see it again."""
    from exegete.agent.config import load_config

    bundled = {
        "subject.name": "bundled",
        "dictionary.path": "bundled:demo",
        "corpus.source": "bundled",
        "store": str(store),
    }
    _run(load_config(None, assignments or (), bundled))
    _say(_report(store, store / "report.html"))


@app.command()
def label(
    config: Annotated[
        Path | None, typer.Argument(help="TOML file; without one, the evidence in the store is labeled.")
    ] = None,
    store: Annotated[Path | None, typer.Option("--store", help="Folder of the store.")] = None,
    explainer: Annotated[str | None, typer.Option(help="Who writes the explanations.")] = None,
    judge: Annotated[str | None, typer.Option(help="Who judges them.")] = None,
    model: ModelOption = None,
    budget: BudgetOption = None,
    no_budget: NoBudgetOption = None,
    budget_tokens: TokensOption = None,
    hours: HoursOption = None,
    yes: YesOption = False,
    evaluators: Annotated[str | None, typer.Option(help="Scores to compute, separated by commas.")] = None,
    limit: Annotated[int | None, typer.Option(help="Label only this many latents, drawn by the seed.")] = None,
    workers: Annotated[
        str | None, typer.Option(help="Who does the activation pass: ray, ray:2 (local workers) or ray://HOST:PORT.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure a few latents, say what is to come, and label nothing.")
    ] = False,
    on_finish: OnFinishOption = None,
    quiet: QuietOption = False,
    assignments: SetOption = None,
) -> None:
    """Explain and score every latent of a dictionary. Repeating it on the same store goes on where it ended."""
    from exegete.agent.config import load_config

    overrides = {
        "store": str(store) if store else None,
        "label.explainer": explainer,
        "label.judge": judge,
        "models.explainer": model,
        "models.judge": model,
        **_money(budget, no_budget),
        "models.budget_tokens": budget_tokens,
        "label.hours": hours,
        "label.evaluators": [name.strip() for name in evaluators.split(",")] if evaluators else None,
        "label.limit": limit,
        "evidence.workers": workers,
    }
    settled = load_config(config, assignments or (), overrides)
    if dry_run:
        from exegete.agent.planning import plan

        _say("\n".join(plan(settled)))
    else:
        _run(settled, on_finish, quiet, yes)


@app.command()
def resume(
    store: StoreOption = DEFAULT_STORE,
    budget: BudgetOption = None,
    no_budget: NoBudgetOption = None,
    budget_tokens: TokensOption = None,
    hours: HoursOption = None,
    yes: YesOption = False,
    on_finish: OnFinishOption = None,
    quiet: QuietOption = False,
) -> None:
    """Go on with the newest run of a store, with the configuration it was begun with; `--budget` is for the whole run."""
    from exegete.agent.config import restored_config
    from exegete.agent.identity import takes_up
    from exegete.agent.inspection import newest_run

    run, dictionary, stored = newest_run(store)
    limits = {**_money(budget, no_budget), "models.budget_tokens": budget_tokens, "label.hours": hours}
    config = restored_config(stored, {"store": str(store), **limits})
    if not takes_up(config, run, dictionary):
        typer.echo(
            "the newest run was begun by another version of exegete, whose runs had other settings: this begins it anew, beside it",
            err=True,
        )
    _run(config, on_finish, quiet, yes)


@app.command()
def sql(
    query: Annotated[str, typer.Argument(help='A query on the views; `exegete sql "SHOW TABLES"` lists them.')],
    store: StoreOption = DEFAULT_STORE,
    format: Annotated[Format, typer.Option(help="How rows are written.")] = Format.table,
    output: Annotated[Path | None, typer.Option(help="Write to this file.")] = None,
) -> None:
    """Ask the results anything in SQL; works while a run goes on."""
    from exegete.agent.sql import run_sql

    _say(run_sql(store, query, format.value, output))


@app.command()
def show(
    latent: Annotated[int, typer.Argument(help="Number of the latent.")],
    store: StoreOption = DEFAULT_STORE,
    dictionary: Annotated[
        str | None, typer.Option(help="Fingerprint (or its start) or name, where the store has several.")
    ] = None,
) -> None:
    """Show the card of one latent: statistics, explanation, scores and marked windows."""
    from exegete.agent.card import card

    _say(card(store, latent, dictionary))


@app.command()
def report(
    store: StoreOption = DEFAULT_STORE,
    output: Annotated[
        Path | None, typer.Option(help="HTML file; `report.html` in the store where it is left out.")
    ] = None,
) -> None:
    """Write one self-contained HTML page: scores against floors, firing densities, best and worst latents."""
    _say(_report(store, output or store / "report.html"))


@app.command()
def doctor(
    live: Annotated[
        str | None, typer.Option("--live", help="Check this model with a handful of calls, e.g. anthropic:MODEL.")
    ] = None,
    max_usd: Annotated[float, typer.Option("--max-usd", help="What the calls of --live may cost.")] = 0.05,
    no_budget: Annotated[
        bool, typer.Option("--no-budget", help="Check a model whose price is not known, whatever it costs.")
    ] = False,
    prices: Annotated[
        Path | None, typer.Option("--prices", help="Price table (TOML) to lay over the shipped one.")
    ] = None,
) -> None:
    """Say what is installed, which device there is, and what is missing; or check a language model and its key."""
    if live is not None:
        from exegete.agent.doctor_live import examine
        from exegete.tools.llm import load_prices

        diagnosis = examine(live, max_usd=None if no_budget else max_usd, prices=load_prices(prices))
        _say("\n".join(diagnosis.lines()))
        raise typer.Exit(0 if diagnosis.usable else 2)
    from exegete.agent.doctor import findings

    lines, missing = findings()
    _say("\n".join(lines))
    if missing:
        raise typer.Exit(1)


app.registered_commands += instrument_cli.app.registered_commands
app.registered_commands += audit_cli.app.registered_commands
app.registered_commands += slices_cli.app.registered_commands
app.registered_commands += watch_cli.app.registered_commands
app.registered_commands += search_cli.app.registered_commands
app.registered_commands += rerun_cli.app.registered_commands
app.registered_commands += ask_cli.app.registered_commands


@evidence_app.command("import")
def import_evidence(
    file: Annotated[Path, typer.Argument(help="JSON lines, one latent a line; .gz and .zst are read as well.")],
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Bring evidence into a store; `exegete label --store` then needs neither model nor dictionary."""
    from exegete.tools.interchange import import_evidence

    for brought in import_evidence(file, store):
        _say(f"{visible(brought.name)}: {brought.latents:,} latents, {brought.windows:,} windows → {brought.folder}")


@evidence_app.command("export")
def export_evidence(
    file: Annotated[Path, typer.Argument(help="File to write.")],
    store: StoreOption = DEFAULT_STORE,
    dictionary: Annotated[
        str | None, typer.Option(help="Fingerprint (or its start) or name; all where it is left out.")
    ] = None,
) -> None:
    """Write the evidence of a store as JSON lines."""
    from exegete.tools.interchange import export_evidence

    _say(f"{export_evidence(store, file, dictionary):,} latents → {file}")


def _run(config: RunConfig, on_finish: str | None = None, quiet: bool = False, yes: bool = False) -> None:
    from exegete.agent.finishing import finishing

    with finishing(on_finish, Path(config.store), lambda line: typer.echo(visible(line), err=True)):
        _run_and_tell(config, quiet, yes)


def _run_and_tell(config: RunConfig, quiet: bool, yes: bool) -> None:
    from exegete.agent.final_report import time_and_money_lines
    from exegete.agent.inspection import calls_lines
    from exegete.agent.planning import asking
    from exegete.agent.progress import default_progress
    from exegete.agent.run import run
    from exegete.agent.summary import headline

    outcome = run(config, default_progress(quiet), asking(yes))
    store = shlex.quote(config.store)  # As it was given: the shorter name, in commands to copy.
    for dictionary, figures in outcome.figures.items():
        _say(f"\n{dictionary}")
        _say("\n".join(headline(figures)))
    for line in calls_lines(outcome.store, outcome.runs):
        _say(f"\n{line}")
    _say("\n".join(time_and_money_lines(outcome.store, outcome.runs)))
    for dictionary, latents in outcome.missing.items():
        if latents:
            _say(
                f"\n{latents:,} latents of {dictionary[:23]}… miss calls that the language model did not answer; "
                f"ask again: exegete resume --store {store}"
            )
    if not outcome.finished:
        _say(f"\nGo on: exegete resume --store {store}")
        raise typer.Exit(130)
    if any(outcome.missing.values()):
        raise typer.Exit(CALLS_MISSING)
    _say(f'\nAsk the results: exegete sql --store {store} "SELECT * FROM best_explanations LIMIT 10"')


def _money(budget: float | None, no_budget: bool | None) -> dict[str, Any]:
    """Return the options on money as configuration keys: each takes the place of what a file says of the other."""
    if budget is not None and no_budget:
        raise UserError(f"--budget {budget} and --no-budget: give one of them")
    if budget is not None:
        return {"models.budget_usd": budget, "models.no_budget": False}
    return {"models.no_budget": True} if no_budget else {}


def _report(store: Path, output: Path) -> str:
    from exegete.agent.report import write_report

    return f"report: {write_report(store, output)}"


def _say(text: Any) -> None:
    if text:
        typer.echo(text)


def main() -> None:
    """Run the command line: a `UserError` or a full disk is one line and status 2; a bug shows its traceback."""
    try:
        app()
    except ExegeteError as error:
        # One line, whatever a library's message that it quotes looks like.
        sys.stderr.write(f"exegete: {visible(' '.join(str(error).splitlines()))}\n")
        raise SystemExit(2) from None
    except BrokenPipeError:
        raise SystemExit(141) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        sys.stderr.write(f"exegete: no room left to write ({error}); free some space and run the same command again\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()

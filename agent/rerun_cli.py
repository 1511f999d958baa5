"""The command `exegete rerun`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from exegete.agent.instrument_cli import Config, Device, Dictionary, Dtype, Format, Shown, Subject

if TYPE_CHECKING:
    from exegete.agent.investigation.record import InvestigationRecord
    from exegete.agent.live import Wanted

app = typer.Typer()
"""Its command is registered with the main application."""


@app.command()
def rerun(
    experiment: Annotated[
        str, typer.Argument(metavar="INVESTIGATION/E3", help="As a report or the view `experiments` names it.")
    ],
    store: Annotated[
        Path | None, typer.Option("--store", help="Store that the investigation is kept in; `out` without one.")
    ] = None,
    config: Config = None,
    subject: Subject = None,
    dictionary: Dictionary = None,
    device: Device = None,
    dtype: Dtype = None,
    format: Format = Shown.table,
) -> None:
    """Do one experiment of an investigation again and hold it against what is stored; exit status 1 where it differs."""
    from exegete.agent.investigation.rerun import find, rerun_named
    from exegete.agent.live import open_live

    named = find(experiment, store)
    given = {"config": config, "subject": subject, "dictionary": dictionary, "device": device}
    given["dtype"] = dtype.value if dtype else None
    done = rerun_named(named, open_live(wanted(named.record, store, given)))
    typer.echo(done.findings().render(format.value))
    if not done.agrees:
        raise typer.Exit(1)


def wanted(record: InvestigationRecord, store: Path | None, given: dict[str, Any]) -> Wanted:
    """Return what to open: as the investigation opened it, but for what is `given`.

    An investigation with a store has its firing rates from there, so controls are drawn by them again: from `store`, or where
    that is None from where the store was.
    """
    from exegete.agent.live import Wanted

    opened = {name: value for name, value in record.opened.items() if name in Wanted.__dataclass_fields__}
    if given["config"] or given["subject"]:
        # Another file, or another subject with its dictionary, takes the place of all that said which they were.
        opened = {name: value for name, value in opened.items() if name not in ("config", "subject", "dictionary")}
    settled = opened | {name: value for name, value in given.items() if value is not None}
    paths = {name: Path(settled[name]) for name in ("config",) if settled.get(name)}
    was = record.origin.get("store")
    return Wanted(**{**settled, **paths, "store": None if was is None else store or Path(was)})

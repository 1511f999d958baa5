"""The commands `exegete status` and `exegete events`: a run, watched from another process."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()
"""Its commands are registered with the main application."""

DEFAULT_STORE = Path("store")
LOOK_EVERY_S = 5.0
FOLLOW_EVERY_S = 0.5

StoreOption = Annotated[Path, typer.Option("--store", help="Folder of the store.")]


class Told(StrEnum):
    """How a status is told."""

    text = "text"
    json = "json"


@app.command()
def status(
    store: StoreOption = DEFAULT_STORE,
    format: Annotated[Told, typer.Option(help="How it is told.")] = Told.text,
    watch: Annotated[
        bool, typer.Option("--watch", help="Tell it anew every five seconds while a run goes on.")
    ] = False,
) -> None:
    """Say how far the runs of a store are and what the newest one needs; works while one is going on."""
    from exegete.agent.inspection import status_json, status_lines

    if format is Told.json:
        typer.echo(status_json(store))
    elif watch:
        _watch(store)
    else:
        typer.echo("\n".join(status_lines(store)))


@app.command()
def events(
    store: StoreOption = DEFAULT_STORE,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is appended, until Ctrl-C.")] = False,
) -> None:
    """Show the event log of a store: stages, snapshots, failures, and how each process that wrote it ended."""
    from exegete.agent.events import follow as followed
    from exegete.agent.events import line_of, read_events
    from exegete.tools.store import Store

    folder = Store.open(store).folder
    found = followed(folder, lambda: time.sleep(FOLLOW_EVERY_S)) if follow else read_events(folder)
    for event in found:
        typer.echo(line_of(event))


def _watch(store: Path) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from exegete.agent.inspection import status_lines, writer_pid

    with Live(console=Console(), auto_refresh=False, vertical_overflow="visible") as live:
        while True:
            going = writer_pid(store) is not None
            live.update(Text("\n".join(status_lines(store))), refresh=True)
            if not going:
                return
            time.sleep(LOOK_EVERY_S)

"""A store whose journal is written to: what the tests of journals share, also in processes that are killed."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import exegete
from exegete.tools.llm import BatchJournal, Reply, Usage
from exegete.tools.store import Store
from exegete.tools.store.journal import StoreJournal

MODEL = "openai:model@http://127.0.0.1:9/v1"


def ok(text: str = "yes", usd: float = 0.25, **others: Any) -> Reply:
    return Reply("ok", text, model="model-1", usage=Usage(100, 40, 10, 5), usd=usd, seconds=1.5, **others)


@contextmanager
def journal_at(folder: Path) -> Iterator[StoreJournal]:
    with Store.create_or_open(folder).writer() as writer:
        yield writer.journal


def rows(folder: Path, query: str) -> list[tuple[Any, ...]]:
    with exegete.connect(folder) as connection:
        return connection.execute(query).fetchall()


def publish(folder: Path) -> None:
    with Store.open(folder).writer() as writer:
        writer.publish()


async def call(journal: BatchJournal, name: str, reply: Reply | None, worst_usd: float = 1.0) -> None:
    await journal.intend(name, MODEL, worst_usd)
    if reply is not None:
        await journal.answered(name, reply)


def child(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a process that runs `script` with this module as `t`; `sys.argv[1:]` are the arguments."""
    text = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import journaled_store as t"
    command = [sys.executable, "-c", f"{text}\n{textwrap.dedent(script)}", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

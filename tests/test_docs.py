"""The documentation, held against the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from exegete.agent.cli import app, evidence_app
from exegete.agent.reference import reference
from exegete.agent.sql import run_sql
from exegete.tools.store import Store

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_reference_page_is_what_the_code_says() -> None:
    written = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    assert written == reference(), "run: python -m exegete.agent.reference docs/reference.md"


def test_nothing_in_the_reference_is_without_a_meaning() -> None:
    empty = [line for line in reference().splitlines() if re.search(r"\|\s+\|$|\| None \|$", line)]
    assert not empty


@pytest.mark.parametrize("command", [c.callback.__name__ for c in app.registered_commands if c.callback])
def test_the_readme_shows_every_command(command: str) -> None:
    assert re.search(rf"exegete {command}\b", README)


@pytest.mark.parametrize("command", [c.name for c in evidence_app.registered_commands])
def test_the_readme_shows_the_evidence_commands(command: str) -> None:
    assert f"exegete evidence {command}" in README


def test_the_readmes_five_queries_run(tmp_path: Path) -> None:
    queries = re.findall(r'exegete sql --store \S+ "(SELECT .*?)"\n', README)
    assert len(queries) >= 5
    store = Store.create_or_open(tmp_path / "store")
    with store.writer() as writer:
        writer.publish()
    for query in queries:
        run_sql(store.folder, query)


def test_every_file_that_the_readme_links_is_there() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]

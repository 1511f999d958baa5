"""Text of a corpus or of a language model that tries to change a page or to command a terminal.

A page's structure – tags, attributes, comments – with hostile text everywhere is that with harmless text. What is printed
holds no character that a terminal acts on.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from exegete.agent import cli
from exegete.agent.card import card
from exegete.agent.findings import Findings, Table
from exegete.agent.inspection import status_lines
from exegete.agent.progress import Lines
from exegete.agent.report import write_report
from exegete.agent.sql import format_table, run_sql
from exegete.tools.errors import UserError
from exegete.tools.rendering import visible, visible_json

StoreMaker = Callable[..., str]

PIECES = 18
"""As many as the vocabulary of a synthetic store has."""
HOSTILE = (
    "</script><script>alert(1)</script>",
    "</title></style><style>*{display:none}</style>",
    "<img src=x onerror=alert(2)>",
    "\"><svg onload=alert(3)>",
    "' onmouseover='alert(4)",
    "</p></article></section></main></body></html>",
    "<!-- ",
    "--><![CDATA[ ]]>",
    "&lt;script&gt;&#60;b&#62;",
    "<meta http-equiv=refresh content='0;url=//evil'><base href=//evil>",
    "{{ 7*7 }}{% raw %}",
    "\x1b[31mred\x1b[0m\x1b]0;title\x07\x1b[2J\x1b[1;1H",
    "\x9b31m\x90q\x9d0;t\x9c\x08\x08\x7f\r\x0b\x0c\x00",
    "\u202egnp.exe\u2066x\u2069\u200b\ufeff\U000e0041",
    "[bold red]markup[/] [/] [link=file:///etc/passwd]x[/link]",
    "a\u2028b\u2029c\x85d\ne",
)  # fmt: skip
TOGETHER = tuple("".join(HOSTILE[at::4]) for at in range(4))
"""In four texts, where a store has to be made for each: all of them stay what they are beside others."""
ACTED_ON = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]")
"""What a terminal or a reader's eye acts on; line breaks and tabs are checked by counting lines."""


def store_of(make_store: StoreMaker, text: str, **options: Any) -> None:
    """Make a store with `text` wherever a corpus, a language model or a user puts text."""
    words = tuple(f"{text} {n}" for n in range(PIECES - 1)) + (text,)
    assert len(words) == PIECES
    make_store(**({"words": words, "said": text, "predicate": text, "model": text, "judge": text} | options))


class Structure(HTMLParser):
    """Tags with their attributes, comments and declarations, in order; no text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        # The dictionary's anchor is its fingerprint, which depends on its name here.
        self.seen.append((tag, [(name, "…" if name in ("id", "href") else value) for name, value in attrs]))

    def handle_endtag(self, tag: str) -> None:
        self.seen.append(f"/{tag}")

    def handle_comment(self, data: str) -> None:
        self.seen.append(("comment", data))

    def handle_decl(self, decl: str) -> None:
        self.seen.append(("declaration", decl))

    def unknown_decl(self, data: str) -> None:
        self.seen.append(("declaration", data))

    def handle_pi(self, data: str) -> None:
        self.seen.append(("instruction", data))


def page(tmp_path: Path, store: str) -> str:
    return write_report(tmp_path / store, tmp_path / f"{store}.html").read_text(encoding="utf-8")


def printed(store: Path) -> dict[str, str]:
    """Everything that is printed of a store, by what prints it."""
    query = "SELECT text, predicate, model FROM explanations"
    return {
        "card": card(store, 0, None),
        "status": "\n".join(status_lines(store)),
        "table": run_sql(store, query),
        "json": run_sql(store, query, "json"),
        "windows": run_sql(store, "SELECT * FROM examples LIMIT 5"),
        "names": run_sql(store, 'SELECT name AS "n\x1b[31m" FROM dictionaries'),
    }


def test_no_text_changes_a_page_or_commands_a_terminal(make_store: StoreMaker, tmp_path: Path) -> None:
    store_of(make_store, "harmless", name="toy harmless", store="tame", latents=5)
    tame = Structure(page(tmp_path, "tame")).seen
    assert len(tame) > 300 and "/script" not in tame
    for number, hostile in enumerate(TOGETHER):
        store = f"wild{number}"
        store_of(make_store, hostile, name=f"toy {hostile}", store=store, latents=5)
        source = page(tmp_path, store)
        assert Structure(source).seen == tame
        assert not ACTED_ON.search(source)
        shown = printed(tmp_path / store)
        assert not [what for what, text in shown.items() if ACTED_ON.search(text)]
        # JSON says exactly what is stored.
        assert {row["predicate"] for row in json.loads(shown["json"])} == {hostile}


def test_a_row_is_a_line_whatever_its_cells_hold() -> None:
    for hostile in HOSTILE:
        assert len(format_table(["a", hostile], [(hostile, 1), ([hostile], {"k": hostile})]).splitlines()) == 5


def test_csv_is_exact_in_a_file_and_harmless_on_a_terminal(
    make_store: StoreMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = "\x1b[31mred\x9b0m,\u202e"
    store_of(make_store, hostile, latents=5)
    query = "SELECT DISTINCT predicate FROM explanations"
    assert run_sql(tmp_path / "store", query, "csv") == f'predicate\n"{hostile}"\n'
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert run_sql(tmp_path / "store", query, "csv") == 'predicate\n"\\x1b[31mred\\x9b0m,\\u202e"\n'
    file = tmp_path / "out.csv"
    run_sql(tmp_path / "store", query, "csv", file)
    assert file.read_text(encoding="utf-8") == f'predicate\n"{hostile}"\n'


@pytest.mark.parametrize("hostile", HOSTILE)
def test_findings_progress_and_errors(
    hostile: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Findings({"label": hostile}, [hostile], [Table(hostile, ("a", hostile), [(1, hostile)])])
    assert json.loads(found.render("json")) == {"label": hostile}
    Lines().say(hostile)
    monkeypatch.setattr(cli, "app", lambda: (_ for _ in ()).throw(UserError(f"the server says: {hostile}")))
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 2
    for text in (found.render("table"), found.render("json"), said):
        assert not ACTED_ON.search(text)


def test_visible_text_by_hand() -> None:
    assert visible("a\x1b[0m\n\t\r\u202eé猫 ") == "a\\x1b[0m⏎→\\r\\u202eé猫 "
    assert visible_json('"\x7f\x9b\u202e\U000e0041é\n"') == '"\\u007f\\u009b\\u202e\\udb40\\udc41é\n"'

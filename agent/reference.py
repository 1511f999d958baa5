"""The reference page, written from the code itself: `python -m exegete.agent.reference docs/reference.md`.

A test holds the page against this, so a command, configuration field or view without documentation fails it.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import tempfile
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path

from exegete.agent.cli import app, evidence_app
from exegete.agent.config import RunConfig, dotted_keys
from exegete.evaluators import evaluator_names, judge_names
from exegete.evaluators.contract import maker_of
from exegete.tools.explainers import explainer_names
from exegete.tools.explainers.contract import maker_of as explainer_maker
from exegete.tools.store import Store, connect


def reference() -> str:
    """Return the reference page as Markdown: commands, configuration, explainers, judges, evaluators, prompts, views, macros."""
    parts = ["# Reference", "", "Written from the code by `python -m exegete.agent.reference docs/reference.md`."]
    for title, rows, columns in (
        ("Commands", _commands(), ("command", "what it does")),
        ("Configuration", _configuration(), ("key", "default", "meaning")),
        ("Explainers", _makers("explainer"), ("name", "what it does")),
        ("Judges", _makers("judge"), ("name", "what it does")),
        ("Evaluators", _makers("evaluator"), ("name", "what it does")),
        ("Prompts", _prompts(), ("file", "what it asks")),
        ("Instruments", _instruments(), ("in `exegete.tools`", "what it does")),
    ):
        found = list(rows)
        parts += ["", f"## {title}", "", *(_table(columns, found) if found else ["None so far."])]
    return "\n".join([*parts, "", "## Views", *_views(), "", "## Macros", "", *_macros()]) + "\n"


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    return [*lines, *(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)]


def _commands() -> Iterator[tuple[str, ...]]:
    for prefix, group in (("", app), ("evidence ", evidence_app)):
        for command in group.registered_commands:
            assert command.callback is not None
            name = command.name or command.callback.__name__
            yield f"`exegete {prefix}{name}`", _first_lines(command.callback)


def _configuration() -> Iterator[tuple[str, ...]]:
    defaults = dotted_defaults()
    for key, meaning in dotted_keys().items():
        yield f"`{key}`", f"`{defaults[key]}`" if key in defaults else "", " ".join(meaning.split())


def dotted_defaults() -> dict[str, object]:
    """Return every configuration key that has a default, as `section.key` → default."""
    example = {"subject": {"name": "?"}, "dictionary": {"path": "?"}, "corpus": {"source": "?"}}
    tree = RunConfig.model_validate(example).model_dump(mode="json")
    flat = {
        f"{section}.{key}": value
        for section, inner in tree.items()
        if isinstance(inner, dict)
        for key, value in inner.items()
    }
    flat |= {key: value for key, value in tree.items() if not isinstance(value, dict)}
    return {key: value for key, value in flat.items() if value != "?"}


def _makers(kind: str) -> Iterator[tuple[str, ...]]:
    names = {"explainer": explainer_names, "judge": judge_names, "evaluator": evaluator_names}[kind]()
    for name in names:
        yield f"`{name}`", _first_lines(explainer_maker(name) if kind == "explainer" else maker_of(kind, name))


def _prompts() -> Iterator[tuple[str, ...]]:
    for entry in sorted(files("exegete.prompts").iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".j2"):
            yield f"`{entry.name}`", entry.read_text(encoding="utf-8").split("#}")[0].removeprefix("{#").strip()


INSTRUMENTS = (
    *("live_model", "interventions", "generation", "strength", "controls", "effects", "steering_grid"),
    *("attribution", "exact_effects", "growing", "minimal_set", "random_masks", "interactions", "dormant_latents"),
    *("lens", "text_activations", "comparing", "probes", "directions", "neighbours", "cofiring"),
    *("dictionary_quality", "scheduling"),
)
"""Modules of `exegete.tools` for whoever experiments on a live model."""


def _instruments() -> Iterator[tuple[str, ...]]:
    for name in INSTRUMENTS:
        module = importlib.import_module(f"exegete.tools.{name}")
        for called, value in vars(module).items():
            own = getattr(value, "__module__", None) == module.__name__ and not called.startswith("_")
            if own and (inspect.isfunction(value) or called in ("LiveModel", "Scheduler")):
                yield f"`{name}.{called}`", _first_lines(value)


def _views() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        store = Store.create_or_open(Path(folder))
        with store.writer() as writer:
            writer.publish()
        with connect(folder) as connection:
            views = connection.execute(
                "SELECT view_name, comment FROM duckdb_views() WHERE NOT internal AND schema_name = 'main' ORDER BY 1"
            ).fetchall()
            for view, comment in views:
                columns = connection.execute(
                    "SELECT column_name, data_type, comment FROM duckdb_columns()"
                    " WHERE table_name = ? AND schema_name = 'main' ORDER BY column_index",
                    [view],
                ).fetchall()
                yield from ("", f"### `{view}`", "", f"{comment}", "")
                cells = ((f"`{name}`", kind, str(meaning)) for name, kind, meaning in columns)
                yield from _table(("column", "type", "meaning"), cells)


def _macros() -> list[str]:
    query = (
        "SELECT function_name, parameters, comment FROM duckdb_functions()"
        " WHERE NOT internal AND database_name = 'labels' ORDER BY function_name"
    )
    with tempfile.TemporaryDirectory() as folder:
        with Store.create_or_open(Path(folder)).writer() as writer:
            writer.publish()
        with connect(folder) as connection:
            found = connection.execute(query).fetchall()
    rows = [(f"`{name}({', '.join(parameters)})`", str(comment)) for name, parameters, comment in found]
    return _table(("macro", "what it does"), rows)


def _first_lines(documented: object) -> str:
    return " ".join((inspect.getdoc(documented) or "").split("\n\n")[0].split())


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")

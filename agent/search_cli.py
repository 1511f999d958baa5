"""The commands `exegete search` and `exegete embed`."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from exegete.tools.errors import UserError

if TYPE_CHECKING:
    import duckdb

    from exegete.tools.embedders import Embedder
    from exegete.tools.search import By, Found, Hit, OpenEmbedder

app = typer.Typer()
"""Its commands are registered with the main application."""


class Shown(StrEnum):
    """How hits are written."""

    table = "table"
    json = "json"


Store = Annotated[Path, typer.Option("--store", help="Folder of the store.")]
Device = Annotated[str, typer.Option("--device", help="Torch device of the embedding model.")]
STORE = Path("store")


@app.command()
def search(
    phrase: Annotated[str | None, typer.Argument(help="Words, or what is meant.")] = None,
    store: Store = STORE,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Explanations to show, at most.")] = 20,
    dictionary: Annotated[
        str | None, typer.Option("--dictionary", help="Only of this one: name, or fingerprint or its start.")
    ] = None,
    words: Annotated[bool, typer.Option("--words", help="By words alone; no model is loaded.")] = False,
    meaning: Annotated[bool, typer.Option("--meaning", help="By meaning alone.")] = False,
    like: Annotated[
        int | None, typer.Option("--like", help="In place of a phrase: a latent, whose nearest in meaning are shown.")
    ] = None,
    agree: Annotated[
        tuple[str, str] | None,
        typer.Option("--agree", help="In place of a phrase: two dictionaries, and how far their explanations agree."),
    ] = None,
    embedder: Annotated[
        str | None, typer.Option("--embedder", help="Embedding model, where the store has several or it was moved.")
    ] = None,
    device: Device = "cpu",
    format: Annotated[Shown, typer.Option("--format", help="How hits are written.")] = Shown.table,
) -> None:
    """Find explanations by words and by meaning, beside their scores and floors; works while a run goes on."""
    from exegete.agent.latent_cards import choose_dictionary
    from exegete.tools.search import nearest_to_latent
    from exegete.tools.search import search as find
    from exegete.tools.store import connect

    if [phrase, like, agree].count(None) != 2:
        raise UserError("exegete search: give a phrase, --like LATENT, or --agree DICTIONARY DICTIONARY")
    if words and meaning:
        raise UserError("--words and --meaning: give one of them, or neither for both")
    by: By = "words" if words else "meaning" if meaning else "both"
    with connect(store) as connection:
        chosen = None if dictionary is None else choose_dictionary(connection, dictionary)
        if agree is not None:
            typer.echo(_agreement(connection, agree, embedder, format))
            return
        if phrase is None:
            assert like is not None
            found = nearest_to_latent(connection, chosen or choose_dictionary(connection, None), like, limit=limit)
        else:
            model = None if embedder is None else _stored_name(embedder)
            found = find(
                connection, phrase, by=by, limit=limit, dictionary=chosen, model=model, open_embedder=_opener(device)
            )
        typer.echo(_as_json(found) if format is Shown.json else _as_table(connection, found))


@app.command()
def embed(
    store: Store = STORE,
    embedder: Annotated[
        str | None,
        typer.Option("--embedder", help="sentence-transformers model: name or folder; that of the newest run, if any."),
    ] = None,
    device: Device = "cpu",
) -> None:
    """Embed the explanations of a store that have no embedding yet, so that they are found by meaning."""
    from exegete.agent.embedding_run import EmbeddingRun
    from exegete.tools.store import Store as OpenStore

    model = embedder or _embedder_of_run(store)
    with (
        OpenStore.open(store).writer() as writer,
        EmbeddingRun(writer, model, lambda: _opener(device)(model)) as embedding,
    ):
        try:
            done = embedding.finish()
        finally:
            writer.publish()
    typer.echo(f"{done.texts:,} explanations embedded by {model}; every explanation of the store has an embedding")


def _agreement(
    connection: duckdb.DuckDBPyConnection, pair: tuple[str, str], embedder: str | None, format: Shown
) -> str:
    from exegete.agent.latent_cards import choose_dictionary
    from exegete.tools.agreement import explanation_agreement

    one, other = (choose_dictionary(connection, name) for name in pair)
    found = explanation_agreement(connection, one, other, model=None if embedder is None else _stored_name(embedder))
    figures = {
        "cosine of the nearest explanation": found.mean,
        "  of another latent's nearest": found.mean_floor,
        "  of what means nothing": found.mean_chance,
        "above that by": found.above,
    }
    if format is Shown.json:
        columns = (found.latents, found.nearest, found.cosine, found.floor, found.chance)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        latents = [dict(zip(("latent", "nearest", "cosine", "floor", "chance"), row, strict=True)) for row in rows]
        means = {name.strip(): figure._asdict() for name, figure in figures.items()}
        return json.dumps({"means": means, "model": found.model, "latents": latents}, indent=1)
    return "\n".join(
        f"{name:<33} {figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}] (n = {figure.n})"
        for name, figure in figures.items()
    )


def _embedder_of_run(store: Path) -> str:
    from exegete.agent.inspection import newest_config

    named = (newest_config(store).get("models") or {}).get("embedder")
    if not named:
        raise UserError(
            f"the newest run of {str(store)!r} names no embedding model; give one: "
            "--embedder sentence-transformers/all-MiniLM-L6-v2, or a local folder"
        )
    return str(named)


def _stored_name(embedder: str) -> str:
    from exegete.agent.embedding_run import name_of_embedder

    return name_of_embedder(embedder)


def _opener(device: str) -> OpenEmbedder:
    def opened(name: str) -> Embedder:
        from transformers.utils import logging

        from exegete.tools.embedders import SentenceEmbedder

        logging.disable_progress_bar()
        return SentenceEmbedder(name, device=device)

    return opened


def _as_json(found: Found) -> str:
    from exegete.tools.rendering import visible_json

    return visible_json(json.dumps(asdict(found), ensure_ascii=False, indent=1))


def _as_table(connection: duckdb.DuckDBPyConnection, found: Found) -> str:
    from exegete.agent.sql import format_table
    from exegete.tools.rendering import visible

    names = dict(connection.execute("SELECT dictionary, name FROM dictionaries").fetchall())
    columns = ["latent", "words", "cosine", "detection", "floor", "fuzzing", "floor", "explanation"]
    rows = [_row(hit) for hit in found.hits]
    if len(names) > 1:
        columns.insert(0, "dictionary")
        rows = [
            [names.get(hit.dictionary, hit.dictionary[:19]), *row] for hit, row in zip(found.hits, rows, strict=True)
        ]
    lines = [format_table(columns, rows).rstrip("\n")]
    if found.cosine_mean is not None:
        lines.append(
            f"cosine of an explanation at random: {found.cosine_mean:.2f} (mean of {found.embedded:,}; {found.model})"
        )
    return "\n".join([*lines, *filter(None, [found.note and visible(found.note)])])


def _row(hit: Hit) -> list[object]:
    cosine = None if hit.cosine is None else f"{hit.cosine:.2f}"
    detection = _score(hit.detection, hit.detection_low, hit.detection_high)
    fuzzing = _score(hit.fuzzing, hit.fuzzing_low, hit.fuzzing_high)
    floors = [None if floor is None else f"{floor:.2f}" for floor in (hit.detection_shuffled, hit.fuzzing_shuffled)]
    return [hit.latent, hit.word_rank, cosine, detection, floors[0], fuzzing, floors[1], hit.text]


def _score(value: float | None, low: float | None, high: float | None) -> str | None:
    if value is None:
        return None
    return f"{value:.2f}" + (f" [{low:.2f}, {high:.2f}]" if low is not None and high is not None else "")

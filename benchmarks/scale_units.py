"""Measure what one latent, one token and one call cost, as docs/scale.md multiplies them. Run `python -m benchmarks.scale_units`.

1. Over random text, with a random dictionary and a subject without layers (so that nothing but our side is measured), an
   activation pass in one slice and in `--slices` of them: bytes of the parts by kind, events, firings a second, events selected
   and latents merged a second, bytes of evidence.
2. Two runs of different size in the profile `night` with the scripted model of `benchmarks.night`: calls, and tokens of prompts, and
   bytes of the store by kind; per latent, from the difference of the two.

Tokens of a prompt: a quarter of its characters outside the windows, and `TOKENIZERS` for every token of the subject inside.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

TOKENIZERS = 1.2
"""Tokens of a judge's tokenizer to one of the subject's, taken to be so."""
_WINDOW = re.compile(r"<window \d+>(.*?)</window>", re.DOTALL)


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, default=1_000, help="of 256 tokens")
    parser.add_argument("--slices", type=int, default=8)
    parser.add_argument("--latents", type=int, nargs=2, default=[400, 1_200], help="of the two runs")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"contexts": chosen.contexts}
    for slices in (1, chosen.slices):
        with tempfile.TemporaryDirectory() as folder:
            figures[f"pass in {slices} slices"] = activation_pass(Path(folder), chosen.contexts, slices)
    figures["run"] = runs(*chosen.latents)
    print(json.dumps(figures, indent=1))


def activation_pass(folder: Path, contexts: int, slices: int) -> dict[str, Any]:
    """Return what a pass wrote and how fast each of its stages was."""
    from benchmarks.evidence import LATENTS
    from benchmarks.synthetic import random_corpus
    from exegete.tools.activations import finish_pass, prepare_pass
    from exegete.tools.merging import merge
    from exegete.tools.pass_settings import PassSettings
    from exegete.tools.selecting import select_firing

    subject, dictionary = _inputs()
    corpus, settings = random_corpus(contexts), PassSettings(slices=slices)
    working, found = folder / "pass", folder / "evidence"
    prepared = prepare_pass(subject, dictionary, corpus, working, settings)
    writing_s, firings = _written(prepared)
    events = sum(pq.read_metadata(piece.part / "events.parquet").num_rows for piece in prepared.slices)
    select_s = _timed(lambda: select_firing(working, LATENTS, settings))
    _timed(lambda: finish_pass(prepared))
    merge_s = _timed(lambda: merge(working, found, subject, dictionary, corpus, settings))
    per_slice = Counter({path.name: 0 for path in prepared.slices[0].part.iterdir()})
    for piece in prepared.slices:
        per_slice.update({path.name: path.stat().st_size for path in piece.part.iterdir()})
    return {
        "firings_per_latent": round(firings / LATENTS),
        "firings_counted_and_written_per_s": round(firings / writing_s),
        "events_per_latent": round(events / LATENTS),
        "bytes_per_event": round(per_slice["events.parquet"] / events, 1),
        "statistics_bytes_per_latent_and_slice": round(per_slice["statistics.npz"] / LATENTS / slices),
        "pool_bytes_per_latent": round(per_slice["pool.parquet"] / LATENTS),
        "events_selected_per_s": round(events / select_s),
        "latents_merged_per_s": round(LATENTS / merge_s),
        "selected_bytes_per_latent": round((working / "selected.parquet").stat().st_size / LATENTS),
        "evidence_bytes_per_latent": round(_size(found) / LATENTS),
    }


def _inputs() -> tuple[Any, Any]:
    """Return the subject and the dictionary of `benchmarks.evidence`."""
    from benchmarks.evidence import LATENTS, WIDTH, K, _Embedding
    from exegete.tools.dictionaries import PlainDictionary

    directions = torch.randn(LATENTS, WIDTH, generator=torch.Generator().manual_seed(1))
    dictionary = PlainDictionary(
        name="random",
        fingerprint="random",
        hook_point="embedding",
        encoder=directions.T.contiguous(),
        encoder_bias=torch.zeros(LATENTS),
        decoder=directions,
        decoder_bias=torch.zeros(WIDTH),
        activation="topk",
        k=K,
    )
    return _Embedding(50_257), dictionary


def _written(prepared: Any) -> tuple[float, int]:
    """Do all slices; return the seconds that went into counting and writing, and the firings."""
    from exegete.tools.activations import do_slice
    from exegete.tools.firing_events import Events
    from exegete.tools.parts import load_statistics
    from exegete.tools.slice_writing import SliceWriter

    spent, add = 0.0, SliceWriter.add

    def timed(writer: SliceWriter, events: Events) -> None:
        nonlocal spent
        begin = time.thread_time()
        add(writer, events)
        spent += time.thread_time() - begin

    SliceWriter.add = timed  # type: ignore[assignment,method-assign]
    try:
        for index in range(len(prepared.slices)):
            do_slice(prepared, index)
    finally:
        SliceWriter.add = add  # type: ignore[method-assign]
    latents = prepared.stream.dictionary.latents
    return spent, int(sum(load_statistics(piece.part, latents).firings.sum() for piece in prepared.slices))


def _timed(work: Callable[[], Any]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def runs(small: int, large: int) -> dict[str, Any]:
    """Return what a latent takes in the profile `night`, from two runs."""
    found = []
    for latents in (small, large):
        with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as pool:
            found.append(pool.apply(one_run, (Path(folder) / "store", latents)))
    begin, end = found
    return {key: round((end[key] - begin[key]) / (large - small), 2) for key in end}


def one_run(folder: Path, latents: int) -> dict[str, float]:
    """Return calls, tokens, processor seconds and bytes of one run."""
    from benchmarks import night
    from exegete.tools.llm import Reply, Request

    torch.set_num_threads(1)
    counted: Counter[str] = Counter()

    class Counting(night.ScriptedWire):
        """Counts what goes over it."""

        async def send(self, request: Request) -> Reply:
            """Return the reply."""
            reply = await super().send(request)
            text = "".join(message.text for message in request.messages) + (request.schema or "")
            counted.update(
                {"calls": 1, "input_tokens": prompt_tokens(text), "output_tokens": len(reply.text or "") // 4}
            )
            return reply

    night.ScriptedWire = Counting  # type: ignore[misc]
    night.make(folder, latents)
    took = night.night(folder, latents, ["label.floors=0"])
    sizes = Counter({"evidence": 0, "verdicts": 0, "calls": 0, "labels.duckdb": 0, "run.duckdb": 0, "other": 0})
    for path in folder.rglob("*"):
        if path.is_file():
            top = path.relative_to(folder).parts[0]
            sizes[top if top in sizes else "other"] += path.stat().st_size
    return {**counted, "processor_s": took["processor_s"], **{f"{name}_bytes": size for name, size in sizes.items()}}


def prompt_tokens(text: str) -> int:
    """Return about how many tokens a prompt is, where the windows' words are made-up ones of many letters."""
    windows: list[str] = _WINDOW.findall(text)
    inside = sum(map(len, windows))
    words = sum(len(window.replace("<<", "").replace(">>", "").split()) for window in windows)
    marks = sum(window.count("<<") + window.count(">>") for window in windows)
    return round((len(text) - inside) / 4 + TOKENIZERS * words + marks)


if __name__ == "__main__":
    main()

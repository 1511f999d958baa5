"""Eight investigations and a labeling run on one subject: one after another, and all at the same time. Run
`python -m benchmarks.investigation_concurrency`.

1. The investigations are driven by the investigator for language models, over the wire, by a server on loopback that answers by script,
   200 ms a reply (`benchmarks.investigation_scripts`); each ends with claims that are verified. The labeling run explains and scores
   latents by detection, fuzzing and intervention, with the test server's oracle as explainer and judge, 200 ms a reply as well. Its
   evidence is gathered beforehand.
2. *Alone*: each of the nine by itself, one after another, each with a `Sharing` (a scheduler) of its own.
3. *Together*: all nine over one `Sharing`, in one process.
4. Forward passes are counted at the model itself by a hook, so that those that no scheduler has seen (gradients, activations that an
   edit takes from other prompts) count as well.
5. What was found must be the same: claims, verdicts and explanations exactly, figures within `TOLERANCE`, since a prompt's logits
   depend on its batch by rounding.

The criterion: at most half of the forward batches, at most 0.6 of the wall time. What the ratios depend on:

- Batches: on how full they are alone. A scheduler fills a batch up to its number of tokens (`--batch-tokens`); calls that fill several
  batches by themselves take as many together as alone. Verifying is such a call: 199 random sets beside each claim, two fifths of the
  prompts' tokens that an investigation runs here.
- Wall time: on how long replies take, against how long the subject computes. On a CPU a full batch costs its tokens, shared or not; what
  is won is that one investigation computes while others wait. If everything overlapped, time would fall to that of the computation alone,
  which is shown as `computing` (processor time of the whole process while alone, divided by wall time). On a GPU a larger batch costs
  little more than a small one, so there is more to win.

Prints a table, and one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from language_model_server import Running, serving

from benchmarks.investigation_scripts import Scripted, scripts
from exegete.agent.config import RunConfig, load_config
from exegete.agent.investigation.contract import Budget, Headline
from exegete.agent.investigation.investigate import ainvestigate
from exegete.agent.investigation.record import InvestigationRecord
from exegete.agent.investigation.shared_model import Sharing
from exegete.agent.live import Live, Wanted, open_live
from exegete.agent.progress import Lines
from exegete.agent.run import run
from exegete.tools.bundled import write_corpus
from exegete.tools.live_model import LiveModel
from exegete.tools.store import connect

Row = dict[str, Any]

TOLERANCE = 2e-3
"""Absolute and relative, of every figure: a strength that is searched for may end on another side of a rounding error."""
BATCHES, WALL = 0.5, 0.6
LABELING = "labeling"
_JUDGE = "oracle"


@dataclass(frozen=True)
class Measured:
    """What a piece of work took, and what it found."""

    name: str
    seconds: float
    processor_s: float
    """Of the whole process, in all threads."""
    batches: int
    """Forward passes of the subject, each of one batch."""
    positions: int
    """In these batches, padding included."""
    scheduled: int
    """Batches that the scheduler ran; the others ran on the model directly. A continuation is one, of several forward passes."""
    found: Mapping[str, Any]
    """Name of an investigation, or `labeling` → what it came to."""


@dataclass(frozen=True)
class Work:
    """The nine pieces of work, and where they run."""

    live: Live
    server: Running
    scripted: Sequence[Scripted]
    evidence: Path
    """A store with the evidence that the labeling run is to use."""
    requests: Path
    """The corpus that it is of."""
    latents: int
    reply_s: float
    batch_tokens: int | None

    def prepared(self, folder: Path) -> None:
        """Make the server and a folder as they are at the beginning."""
        for one in self.scripted:
            self.server.behave(one.name, answer="scripted", replies=list(one.replies), seconds=self.reply_s)
        self.server.behave(_JUDGE, answer="oracle", otherwise="never", rate=0.05, seconds=self.reply_s)
        folder.mkdir()
        shutil.copytree(self.evidence, folder / "store")

    def sharing(self) -> Sharing:
        """Return a scheduler over the subject, with a live model of its own: what an earlier one has kept helps nobody."""
        model = LiveModel(self.live.model.subject, [self.live.dictionary], batch_tokens=self.live.model.batch_tokens)
        return Sharing(replace(self.live, model=model), batch_tokens=self.batch_tokens)

    async def investigated(self, one: Scripted, sharing: Sharing, folder: Path) -> InvestigationRecord:
        """Return what one investigation came to."""
        question = one.question
        found = await ainvestigate(
            question.text, question.cases, question.metric, self.server.spec("openai", one.name),
            suggested=question.suggested, seed=question.seed, budget=Budget(), no_budget=True, sharing=sharing, out=folder,
        )  # fmt: skip
        return found.record

    async def labeled(self, sharing: Sharing, folder: Path) -> Row:
        """Return what the labeling run wrote, as readers see it."""
        config = self.labeling(folder / "store")
        await asyncio.to_thread(run, config, Lines(io.StringIO(), every_s=1e9), None, sharing)
        return await asyncio.to_thread(tables, folder / "store")

    def labeling(self, store: Path, **changed: Any) -> RunConfig:
        """Return the configuration of the labeling run."""
        judge = self.server.spec("openai", _JUDGE)
        chosen = {
            "subject.name": "bundled", "dictionary.path": "bundled:demo", "corpus.source": str(self.requests),
            "store": str(store), "models.explainer": judge, "models.judge": judge, "models.no_budget": True,
            "label.explainer": "one-shot", "label.evaluators": ["detection", "fuzzing", "intervention"],
            "label.limit": self.latents, "label.floors": 0,
        }  # fmt: skip
        return load_config(None, (), {name: value for name, value in (chosen | changed).items() if value is not None})


def main() -> None:
    """Print a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--investigations", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=24, help="of each question, held-out ones among them")
    parser.add_argument("--latents", type=int, default=8, help="to label")
    parser.add_argument("--documents", type=int, default=1_500, help="of the corpus of the labeling run")
    parser.add_argument("--reply", type=float, default=0.2, help="seconds that a language model takes")
    parser.add_argument("--batch-tokens", type=int, help="of model and scheduler; their defaults, where left out")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="that torch computes with")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    os.environ.setdefault("EXEGETE_API_KEY", "none")
    torch.set_num_threads(chosen.threads)
    with tempfile.TemporaryDirectory() as folder, serving() as server:
        server.keep_bodies(False)
        asyncio.run(measure(chosen, server, Path(folder)))


async def measure(chosen: argparse.Namespace, server: Running, folder: Path) -> None:
    """Run both arms and print what they took."""
    work = await asyncio.to_thread(ready, chosen, server, folder)
    alone = [await alone_of(work, name, folder) for name in (*(one.name for one in work.scripted), LABELING)]
    together = await together_of(work, folder)
    for line in table([*alone, together]):
        print(line)
    print(json.dumps(summary(alone, together) | machine(chosen)))


def ready(chosen: argparse.Namespace, server: Running, folder: Path) -> Work:
    """Load the subject, write the scripts, and gather the evidence of the labeling run."""
    # A scheduler's batches are never larger than the model's.
    live = open_live(Wanted() if chosen.batch_tokens is None else Wanted(batch_tokens=chosen.batch_tokens))
    scripted = scripts(live, chosen.investigations, chosen.prompts, chosen.seed)
    requests, store = folder / "requests.jsonl", folder / "evidence"
    write_corpus(requests, chosen.seed, chosen.documents)
    work = Work(
        live, server, scripted, store, requests, chosen.latents, chosen.reply, chosen.batch_tokens
    )  # fmt: skip
    offline = {"models.explainer": None, "models.judge": None, "label.explainer": "lexical", "label.limit": 1}
    config = work.labeling(store, **offline, **{"label.evaluators": ["detection"]})
    run(config, Lines(io.StringIO(), every_s=1e9))
    return work


async def alone_of(work: Work, name: str, folder: Path) -> Measured:
    """Return what one piece of work took by itself."""
    place = folder / f"alone {name}"
    work.prepared(place)
    with work.sharing() as sharing, counted(work.live) as count:
        if name == LABELING:
            found: Any = await work.labeled(sharing, place)
        else:
            found = await work.investigated(next(one for one in work.scripted if one.name == name), sharing, place)
        return count.measured(name, sharing, {name: found})


async def together_of(work: Work, folder: Path) -> Measured:
    """Return what all of it took at the same time."""
    place = folder / "together"
    work.prepared(place)
    with work.sharing() as sharing, counted(work.live) as count:
        investigations = [work.investigated(one, sharing, place) for one in work.scripted]
        *records, labels = await asyncio.gather(*investigations, work.labeled(sharing, place))
        names = (*(one.name for one in work.scripted), LABELING)
        return count.measured("together", sharing, dict(zip(names, [*records, labels], strict=True)))


class Count:
    """Forward passes of a model, and time, since it was made."""

    def __init__(self) -> None:
        self.batches = self.positions = 0
        self._begun, self._processor = time.perf_counter(), time.process_time()

    def add(self, module: Any, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """Count one forward pass: a hook of torch."""
        tokens = named["input_ids"] if "input_ids" in named else given[0]
        self.batches += 1
        self.positions += tokens.numel()

    def measured(self, name: str, sharing: Sharing, found: Mapping[str, Any]) -> Measured:
        """Return what has been counted."""
        seconds, processor = time.perf_counter() - self._begun, time.process_time() - self._processor
        scheduled = sharing.statistics.batches
        return Measured(name, seconds, processor, self.batches, self.positions, scheduled, found)


@contextlib.contextmanager
def counted(live: Live) -> Iterator[Count]:
    """Count the forward passes of a subject, whoever makes them."""
    count = Count()
    model = live.model.subject.bridge.original_model
    hook = model.register_forward_pre_hook(count.add, with_kwargs=True)
    try:
        yield count
    finally:
        hook.remove()


def tables(store: Path) -> Row:
    """Return what readers see of the labels and scores, but for when and at what price."""
    columns = {
        "explanations": "latent, explainer, text",
        "scores": "latent, evaluator, metric, n, failures, status, value, low, high",
    }
    with connect(store) as connection:
        return {
            view: connection.execute(f"SELECT {names} FROM {view} ORDER BY ALL").fetchall()
            for view, names in columns.items()
        }


def summary(alone: Sequence[Measured], together: Measured) -> Row:
    """Return both arms, their ratios, and whether they found the same."""
    batches, seconds = sum(one.batches for one in alone), sum(one.seconds for one in alone)
    differ = [
        line
        for one in alone
        for name, found in one.found.items()
        for line in differences(name, found, together.found[name])
    ]
    ratios = {"batches": together.batches / batches, "wall": together.seconds / seconds}
    return {
        "batches": [batches, together.batches], "positions": [sum(one.positions for one in alone), together.positions],
        "seconds": [round(seconds, 2), round(together.seconds, 2)],
        "processor_s": [round(sum(one.processor_s for one in alone), 2), round(together.processor_s, 2)],
        "computing": round(sum(one.processor_s for one in alone) / seconds, 3),
        "ratios": {name: round(value, 3) for name, value in ratios.items()},
        "criterion_met": ratios["batches"] <= BATCHES and ratios["wall"] <= WALL and not differ,
        "same_results": not differ, "differences": differ[:20],
    }  # fmt: skip


def differences(name: str, one: Any, other: Any) -> list[str]:
    """Return in words where two results differ."""
    pairs = list(zip(plain(one), plain(other), strict=False))
    found = [f"{name}: {left} | {right}" for left, right in pairs if not alike(left, right)]
    return found + ([f"{name}: not as many rows"] if len(plain(one)) != len(plain(other)) else [])


def plain(found: Any) -> list[tuple[Any, ...]]:
    """Return what an investigation or a labeling run came to, as rows."""
    if not isinstance(found, InvestigationRecord):
        return [(view, *row) for view, rows in found.items() for row in rows]
    rows: list[tuple[Any, ...]] = [(found.status, found.answer, found.spent.steps)]
    rows += [(one.id, one.tool, one.status, one.predicted, *figures(one.headline)) for one in found.experiments]
    for one in found.verdicts:
        rows.append((one.claim.statement, one.status, one.p_adjusted, *figures(one.effect), *figures(one.flipped)))
    return rows


def figures(headline: Headline | None) -> tuple[Any, ...]:
    """Return the numbers of a headline."""
    if headline is None:
        return ()
    one = headline
    return (one.value, one.low, one.high, one.n, one.control_value, one.control_low, one.control_high, one.control_n)


def alike(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Return whether two rows are the same, but for rounding."""
    return len(one) == len(other) and all(_same(left, right) for left, right in zip(one, other, strict=True))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= TOLERANCE * max(1.0, abs(one)) or (math.isnan(one) and math.isnan(other))
    return bool(one == other)


def table(rows: Sequence[Measured]) -> Iterator[str]:
    """Yield a line for each piece of work."""
    yield f"{'':18} {'seconds':>8} {'processor':>10} {'batches':>8} {'scheduled':>10} {'tokens':>9} {'a batch':>8}"
    for one in rows:
        mean = one.positions / max(1, one.batches)
        yield f"{one.name:18} {one.seconds:8.2f} {one.processor_s:10.2f} {one.batches:8} {one.scheduled:10} {one.positions:9} {mean:8.0f}"


def machine(chosen: argparse.Namespace) -> Row:
    """Return where this ran and with what settings."""
    return {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__} | vars(chosen)


if __name__ == "__main__":
    main()

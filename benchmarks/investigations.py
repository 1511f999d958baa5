"""Does an investigator find what a behaviour rests on, and say nothing where there is nothing? `python -m benchmarks.investigations`.

Every question of `benchmarks.investigation_questions` is investigated as `exegete ask` does it; an agent gets the question, its
prompts and the metric. Subject and dictionary should be ones that nothing was developed on: another training seed
(`python -m exegete.tools.bundled.train_subject --seed 1`, then `train_dictionary --which tests`).

What was verified is then tried once more, by this benchmark, on fresh prompts: drawn with another seed, none of them asked about,
those that show the behaviour; beside 20 random sets of as many latents that fire as often.

1. A *behaviour* is a success if a verified claim names latents whose ablation flips at least 80 % of fresh prompts, and random
   sets on average at most 10 %. A prompt flips where the metric falls to its line or below.
2. On *absent* behaviours every verified causal claim is false. On *unrelated* causes a verified interchange is, since it says that
   what was changed acts; the behaviour itself is there, so other verified claims are held against fresh prompts as in 1.
3. A verified claim is *wrong*, on any question where the behaviour is there, if on fresh prompts the metric does not change as it
   says, further than under every random set, or if it says that most prompts flip and not most do.

One JSON line for each question, and a last one with the summary. With `--out` investigations are kept, and gone on with.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.investigation_questions import Asked, suite
from exegete.agent.investigation.contract import Budget, Case, Claim, Metric
from exegete.agent.investigation.investigate import ainvestigate
from exegete.agent.investigation.measuring import Measurable
from exegete.agent.investigation.record import InvestigationRecord
from exegete.agent.investigation.shared_model import Sharing
from exegete.agent.live import Live, Wanted, open_live
from exegete.tools.ablation_sets import ZERO, Ablation, random_sets
from exegete.tools.bundled import dictionary_path, sample_texts, subject_path
from exegete.tools.controls import firing_rates
from exegete.tools.intervals import share
from exegete.tools.seeds import derive_seed

CONTROLS, TEXTS, TEXTS_SEED = 20, 200, 9_000
FLIPPED, RANDOM = 0.8, 0.1

Row = dict[str, Any]


@dataclass(frozen=True)
class Judge:
    """What claims are held against fresh prompts with."""

    live: Live
    rates: NDArray[np.float64]
    seed: int

    def tried(self, metric: Metric, fresh: Sequence[Case], claim: Claim) -> Row | None:
        """Return what a claim's intervention does to fresh prompts; None for steering, or where no prompt is fit for it."""
        own = Measurable(self.live, metric, fresh, seed=self.seed)
        swapped = claim.intervention == "interchange"
        fit = [i for i, clean in enumerate(own.clean) if clean > metric.shown and not (swapped and not own.variants[i])]
        if claim.intervention == "steer" or not fit:
            return None
        own = own.part(fit)
        pairs = zip(own.prompts, own.variants, strict=True)
        ablation = Ablation(sources={prompt: variant for prompt, variant in pairs if variant}) if swapped else ZERO
        sets = [claim.latents, *random_sets(claim.latents, self.rates, CONTROLS, derive_seed(self.seed, "fresh"))]
        found = own.table([ablation.trials(self.live.dictionary, [one], own.prompts) for one in sets])
        changes = (found - own.clean).mean(1)
        flipped, random = share(found[0] <= metric.shown), (found[1:] <= metric.shown).mean(1)
        sign = 1 if claim.expects == "rises" else -1
        stands = bool(len(random) and sign * changes[0] > max(sign * changes[1:].max(), sign * changes[1:].min(), 0))
        return {
            "intervention": claim.intervention, "latents": list(claim.latents),
            "n": flipped.n, "flipped": round(flipped.value, 3), "low": round(flipped.low, 3),
            "random": round(float(random.mean()), 4) if len(random) else None, "change": round(float(changes[0]), 3),
            "stands": stands and (flipped.value > 0.5 or not claim.flips or claim.expects == "rises"),
        }  # fmt: skip


def main() -> None:
    """Print one JSON object for each question, and the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agent", default="recipe", help="recipe, or a language model: anthropic:MODEL")
    parser.add_argument("--subject", default=str(subject_path()))
    parser.add_argument("--dictionary", default=str(dictionary_path("tests")))
    parser.add_argument(
        "--prompts", type=int, nargs=2, default=(120, 100), help="asked about (60 %% for the search), fresh"
    )
    parser.add_argument("--only", nargs="*", default=[], help="questions whose kind or name begins with one of these")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and investigations")
    parser.add_argument("--steps", type=int, default=Budget.steps)
    parser.add_argument("--passes", type=int, default=Budget.passes)
    parser.add_argument("--usd", type=float, help="for each question")
    parser.add_argument("--out", type=Path, help="where investigations are kept; else they are deleted")
    parser.add_argument("--threads", type=int, default=1)
    asyncio.run(run(parser.parse_args()))


async def run(chosen: argparse.Namespace) -> None:
    """Investigate and judge every question that is chosen."""
    torch.set_num_threads(chosen.threads)
    wanted = Wanted(subject=chosen.subject, dictionary=chosen.dictionary, batch_tokens=8_192)
    live = open_live(wanted)
    texts = list(sample_texts(TEXTS_SEED, TEXTS))
    rates = firing_rates(live.model, live.dictionary, [live.model.tokens(text) for text in texts])
    judge = Judge(live, rates, chosen.seed)
    budget = Budget(chosen.steps, chosen.passes, chosen.usd)
    prompts, fresh = chosen.prompts
    questions = suite(chosen.seed, prompts, fresh, budget)
    rows = []
    with contextlib.ExitStack() as stack:
        sharing = stack.enter_context(Sharing(live))
        out = chosen.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for asked in questions:
            if not chosen.only or any(start in (asked.kind, asked.name[: len(start)]) for start in chosen.only):
                rows.append(await row(asked, judge, chosen.agent, sharing, wanted, texts, out))
                print(json.dumps(rows[-1]), flush=True)
    print(json.dumps(summary(rows) | {"agent": chosen.agent, "subject": live.heading}))


async def row(
    asked: Asked, judge: Judge, agent: str, sharing: Sharing, wanted: Wanted, texts: Sequence[str], out: Path
) -> Row:
    """Return what one investigation came to."""
    question, began = asked.question, time.perf_counter()
    found = await ainvestigate(
        question.text,
        question.cases,
        question.metric,
        agent,
        suggested=question.suggested,
        seed=question.seed,
        budget=question.budget,
        no_budget=question.budget.usd is None,
        wanted=wanted,
        texts=texts,
        sharing=sharing,
        out=out,
    )
    record, seconds = found.record, time.perf_counter() - began
    (held, settled), (met, of) = record.hits, record.hits_of_controls
    return {
        "question": asked.name, "kind": asked.kind, "status": record.status, **judged(asked, judge, record),
        "hits": held, "predictions": settled, "met by controls": met, "with controls": of,
        "experiments": len(record.experiments), "steps": record.spent.steps,
        "passes": record.spent.passes, "tokens": record.spent.tokens, "usd": record.spent.usd, "seconds": round(seconds, 1),
        "answer": record.answer,
    }  # fmt: skip


def judged(asked: Asked, judge: Judge, record: InvestigationRecord) -> Row:
    """Return what the verified claims of an investigation are worth."""
    standing = [verdict for verdict in record.verdicts if verdict.status != "withdrawn"]
    causal = [verdict for verdict in standing if verdict.claim.kind == "causal"]
    verified = [verdict.claim for verdict in causal if verdict.status == "verified"]
    numbers: Row = {"claims": len(causal), "verified": len(verified)}
    if asked.kind == "absent":
        return numbers | {"false": len(verified), "wrong": 0, "success": None, "tried": []}
    assert asked.question.metric is not None
    made = [judge.tried(asked.question.metric, asked.fresh, claim) for claim in verified]
    tried = [one for one in made if one is not None]
    ablations = [one for one in tried if one["intervention"] == "ablate"]
    reached = any(one["flipped"] >= FLIPPED and (one["random"] or 0) <= RANDOM for one in ablations)
    acting = sum(claim.intervention == "interchange" for claim in verified)
    return numbers | {
        "false": acting if asked.kind == "unrelated" else 0,
        "wrong": sum(not one["stands"] for one in tried),
        "success": reached,
        "tried": tried,
    }


def summary(rows: Sequence[Row]) -> Row:
    """Return shares with Wilson's interval, and what it took."""
    behaviours, unrelated = ([one for one in rows if one["kind"] == kind] for kind in ("behaviour", "unrelated"))
    nulls = [one for one in rows if one["kind"] != "behaviour"]
    held, settled = sum(one["hits"] for one in rows), sum(one["predictions"] for one in rows)
    met, of = sum(one["met by controls"] for one in rows), sum(one["with controls"] for one in rows)
    return {
        "behaviours": counted([bool(one["success"]) for one in behaviours]),
        "nulls with a false claim": counted([one["false"] > 0 for one in nulls]),
        "false claims": sum(one["false"] for one in nulls),
        "sets that flip fresh prompts, unrelated cause": counted([bool(one["success"]) for one in unrelated]),
        "verified": sum(one["verified"] for one in rows),
        "failed or unverified": sum(one["claims"] - one["verified"] for one in rows),
        "wrong on fresh prompts": sum(one["wrong"] for one in rows),
        "predictions that held": f"{held} of {settled}",
        "predictions that controls met": f"{met} of {of}",
        "passes": sum(one["passes"] for one in rows),
        "tokens": sum(one["tokens"] for one in rows),
        "usd": round(sum(one["usd"] for one in rows), 2),
        "minutes": round(sum(one["seconds"] for one in rows) / 60, 1),
    }


def counted(outcomes: Sequence[bool]) -> str:
    """Return a share with Wilson's interval, in words."""
    if not outcomes:
        return "none asked"
    found = share(np.array(outcomes))
    return f"{sum(outcomes)} of {found.n} ({found.value:.0%}, {found.low:.0%} to {found.high:.0%})"


if __name__ == "__main__":
    main()

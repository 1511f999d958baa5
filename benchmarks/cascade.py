"""Measure routing on published latents: score against calls. Run `python -m benchmarks.cascade [FILE.jsonl]`.

Two rungs: our lexical explainer with the predicate judge, which calls nobody, and the published one-shot explanations of
Llama-3-70B with its published verdicts, each counted as a call (`benchmarks.published_latents`). A latent's score is its balanced
accuracy on the published test windows: detection, fuzzing, or their mean, which is what the cascade of a run goes by.

1. What routes a latent is seen inside its explain windows. In each of five folds the lexical explainer learns from the other
   windows, and its predicate is judged on those left out: `tpr`, share of firing windows in which it holds; `marked`, share
   in which it holds at most of the marked tokens; `fpr`, share of other latents' explain windows, left out as well, in which it holds.
2. A signal orders latents by these, the one that should climb first. `cv score` takes the lowest (tpr + 1 − fpr) / 2, with no
   fit. The others are ridge fits of the gain of climbing (penalty 10 on standardised columns), each latent's from a fit on
   all others: a fit on a few folds depends on how they are drawn, by as much as half of the difference that is measured. No
   test window of a latent is in any signal of it; the fits see those of other latents, as a run's fit sees its control
   subset. All signals are reported, since the best of several flatters itself; `SHOWN`, whose curve is printed, says no
   more than the two parts of the cross-validated score. A dozen variants more were looked at on the same latents
   (logarithms, precision inside windows, marks a window, whether the explanation held up): none differed by more than noise.
3. The share of latents that the calls allow for climbs. Random routing at equal calls gives its expected score, oracle
   routing knows the gains. Intervals: percentile bootstrap over latents, paired; random routing is worked out anew on each
   resample, and the order is held fixed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.published_latents import DEFAULT_FILE, TASKS, Record, flat_latent, published, write_interchange
from exegete.evaluators import make_evaluator, make_judge
from exegete.evaluators.contract import Item, Task
from exegete.evaluators.predicate_judge import applies
from exegete.tools.evidence import Evidence, restrict
from exegete.tools.explainers import Explanation
from exegete.tools.explainers.background import Background, background
from exegete.tools.explainers.lexical import LexicalExplainer
from exegete.tools.interchange import import_evidence
from exegete.tools.predicates import parse
from exegete.tools.seeds import generator
from exegete.tools.store import Store
from exegete.tools.windows import LatentEvidence

Floats = NDArray[np.float64]
FOLDS = 5
PENALTY = 10.0
RESAMPLES = 10_000
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 0.9, 1.0)
ASKED = 0.65
SIGNALS: Mapping[str, tuple[str, ...]] = {
    "cv score": (),
    "fit: cv score": ("cv",),
    "fit: fpr": ("fpr",),
    "fit: tpr, fpr": ("tpr", "fpr"),
    "fit: tpr, marked, fpr": ("tpr", "marked", "fpr"),
    "fit: tpr, fpr, their squares and product": ("tpr", "fpr", "tpr2", "fpr2", "tpr fpr"),
    "fit: tpr, marked, fpr, words, strings": ("tpr", "marked", "fpr", "words", "strings"),
}
SHOWN = "fit: tpr, fpr"
"""Whose curve is printed: the two numbers that the cross-validated score is made of."""


def main(arguments: Sequence[str] | None = None, write: Callable[[str], Any] = print) -> int:
    """Run the benchmark from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=DEFAULT_FILE)
    parser.add_argument("--resamples", type=int, default=RESAMPLES)
    chosen = parser.parse_args(arguments)
    if not chosen.file.exists():
        write(json.dumps({"skipped": f"{chosen.file.name} is not there"}))
        return 0
    records = [json.loads(line) for line in chosen.file.read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        latents = evidence_of(records, Path(folder))
    columns, below = asyncio.run(measure(latents))
    result: dict[str, Any] = {"file": chosen.file.name, "latents": len(records), "calls": calls_of(records)}
    above = {task: np.array([published(record, task) for record in records]) for task in TASKS}
    scored: Mapping[str, Sequence[Task]] = {"detection": ["detection"], "fuzzing": ["fuzzing"], "mean": TASKS}
    for name, tasks in scored.items():
        cheap, dear = (np.mean([scores[task] for task in tasks], axis=0) for scores in (below, above))
        result[name] = figures(cheap, dear, columns, chosen.resamples)
    write(json.dumps(result, indent=1))
    write(table(result))
    return 0


def evidence_of(records: Sequence[Record], folder: Path) -> list[LatentEvidence]:
    """Import the records as a user would and return the latents' evidence in their order."""
    write_interchange(records, folder / "latents.jsonl")
    (imported,) = import_evidence(folder / "latents.jsonl", folder / "store")
    evidence = Evidence.open(Store.open(folder / "store").evidence_folder(imported.dictionary))
    found = {one.latent: one for one in evidence.read([flat_latent(record) for record in records], "score")}
    return [found[flat_latent(record)] for record in records]


def calls_of(records: Sequence[Record]) -> dict[str, float]:
    """Return the published verdicts a latent: the same for each, so that a share of calls is one of latents."""
    counts = {len(record["recall"]) + len(record["fuzz"]) for record in records}
    assert len(counts) == 1
    return {"a latent that climbs": counts.pop(), "a latent that does not": 0}


async def measure(latents: Sequence[LatentEvidence]) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Return the columns of the signals, and the lexical explainer's test scores by task; shapes (latents,)."""
    visible = [restrict(one, "explain") for one in latents]
    others = background(visible)
    parts = [_without(others, fold) for fold in range(FOLDS)]
    explainers = [LexicalExplainer(shown) for shown, _ in parts]
    folds = [await cross_validated(one, explainers, [held for _, held in parts]) for one in visible]
    found = [await LexicalExplainer(others).explain(one, 0) for one in visible]
    scores = [await _scores(one, explanation) for one, explanation in zip(latents, found, strict=True)]
    columns = {name: np.array([own[name] for own in folds]) for name in folds[0]}
    columns["words"] = np.log([_words(one) for one in visible])
    columns["strings"] = np.log1p([(one.predicate or "").count('"') / 2 if one else 0 for one in found])
    columns["cv"] = (columns["tpr"] + 1 - columns["fpr"]) / 2
    columns |= {"tpr2": columns["tpr"] ** 2, "fpr2": columns["fpr"] ** 2, "tpr fpr": columns["tpr"] * columns["fpr"]}
    return columns, {task: np.array([own[task] for own in scores]) for task in TASKS}


def _without(others: Background, fold: int) -> tuple[Background, Background]:
    kept = tuple(one for n, one in enumerate(others.windows) if n % FOLDS != fold)
    return Background(kept), Background(tuple(one for n, one in enumerate(others.windows) if n % FOLDS == fold))


async def cross_validated(
    evidence: LatentEvidence, explainers: Sequence[LexicalExplainer], held: Sequence[Background]
) -> dict[str, float]:
    """Return tpr, marked and fpr of the explanations that did not see the windows they are judged on."""
    hits, marked, false = [], [], []
    for fold, explainer in enumerate(explainers):
        shown = tuple(w for n, w in enumerate(evidence.windows) if n % FOLDS != fold)
        learned = await explainer.explain(LatentEvidence(evidence.latent, "live", shown), 0)
        predicate = parse(learned.predicate if learned and learned.predicate else "never")
        for window in evidence.windows[fold::FOLDS]:
            hits.append(applies(predicate, "detection", Item(window.tokens)))
            marked.append(applies(predicate, "fuzzing", Item(window.tokens, window.firing_positions())))
        false += [bool(predicate.matches(t).any()) for latent, t in held[fold].windows if latent != evidence.latent]
    return {"tpr": float(np.mean(hits)), "marked": float(np.mean(marked)), "fpr": float(np.mean(false))}


async def _scores(evidence: LatentEvidence, explanation: Explanation | None) -> dict[str, float]:
    """Return balanced accuracy on the test split by task; where nothing is said, what a constant answer gets."""
    if explanation is None:
        return dict.fromkeys(TASKS, 0.5)
    found: dict[str, float] = {}
    for task in TASKS:
        evaluation = await make_evaluator(task).evaluate(explanation, evidence, make_judge("predicate"), 0)
        value = next(score.value for score in evaluation.scores if score.metric == "balanced_accuracy")
        found[task] = 0.5 if value is None else value
    return found


def _words(evidence: LatentEvidence) -> int:
    return len({w.tokens[at].strip().lower() for w in evidence.windows for at in w.firing_positions()})


def figures(cheap: Floats, dear: Floats, columns: Mapping[str, Floats], resamples: int) -> dict[str, Any]:
    """Return what every signal gives at 65 % of the calls, and the curve of one, for scores of shape (latents,)."""
    priorities = {name: _priority(names, columns, dear - cheap) for name, names in SIGNALS.items()}
    return {
        "lexical alone": interval(lambda w: w @ cheap, len(cheap), resamples),
        "model alone": interval(lambda w: w @ dear, len(cheap), resamples),
        "at 65 %": {name: routed(cheap, dear, own, ASKED, resamples) for name, own in priorities.items()},
        "curve": {share: routed(cheap, dear, priorities[SHOWN], share, resamples) for share in SHARES},
    }


def _priority(names: Sequence[str], columns: Mapping[str, Floats], gain: Floats) -> Floats:
    if not names:
        return -columns["cv"]
    return cross_fitted(np.stack([columns[name] for name in names], axis=1), gain)


def cross_fitted(columns: Floats, gain: Floats) -> Floats:
    """Return by how much more than others each latent is expected to gain, from a ridge fit on all others.

    The mean gain of the others is left out: it falls with the latent's own gain, and would order latents the wrong way round.
    One frozen fit has one mean.

    Args:
        columns: shape (latents, columns); standardised over all latents, which needs no gain.
        gain: of climbing, shape (latents,).
    """
    standard = (columns - columns.mean(axis=0)) / np.maximum(columns.std(axis=0), 1e-9)
    expected = np.zeros(len(gain))
    for left in range(len(gain)):
        own, gained = np.delete(standard, left, axis=0), np.delete(gain, left)
        normal = own.T @ own + PENALTY * np.eye(own.shape[1])
        expected[left] = standard[left] @ np.linalg.solve(normal, own.T @ (gained - gained.mean()))
    return expected


def routed(cheap: Floats, dear: Floats, priority: Floats, share: float, resamples: int) -> dict[str, Any]:
    """Return the score where the `share` of highest `priority` climbs, and its differences with intervals."""
    gain, climbs = dear - cheap, first(priority, share)
    n = len(gain)
    return {
        "score": interval(lambda w: w @ (cheap + climbs * gain), n, resamples),
        "random": float((cheap + climbs.mean() * gain).mean()),
        "oracle": float((cheap + first(gain, share) * gain).mean()),
        "minus random": interval(lambda w: w @ (climbs * gain) - (w @ climbs) * (w @ gain), n, resamples),
        "minus model alone": interval(lambda w: w @ ((climbs - 1) * gain), n, resamples),
        "correlation with the gain": float(np.corrcoef(priority, gain)[0, 1]),
    }


def first(priority: Floats, share: float) -> Floats:
    """Return 1 for the share of latents of highest priority, the earlier of equals, else 0; shape (latents,)."""
    climbs = np.zeros(len(priority))
    climbs[np.argsort(-priority, kind="stable")[: round(share * len(priority))]] = 1.0
    return climbs


def interval(figure: Callable[[Floats], Floats], latents: int, resamples: int) -> list[float]:
    """Return [value, low, high] of a figure of weights over latents, shape (resamples, latents), by the bootstrap."""
    low, high = np.quantile(figure(_resampled(latents, resamples)), [0.025, 0.975]).tolist()
    return [round(float(one), 4) for one in (figure(np.full((1, latents), 1 / latents))[0], low, high)]


@cache
def _resampled(latents: int, resamples: int) -> Floats:
    drawn = generator(0, "cascade", "bootstrap").multinomial(latents, np.full(latents, 1 / latents), size=resamples)
    return drawn / latents


def table(result: Mapping[str, Any]) -> str:
    """Return the figures as text for people."""
    lines = [f"balanced accuracy over {result['latents']} latents of {result['file']} [95 % bootstrap interval]"]
    for name in ("detection", "fuzzing", "mean"):
        own = result[name]
        lines.append(f"\n{name}: lexical alone {_cell(own['lexical alone'])}, model alone {_cell(own['model alone'])}")
        lines.append(f"  at {ASKED:.0%} of the calls, {len(own['at 65 %'])} signals tried: score minus random routing")
        for signal, found in own["at 65 %"].items():
            lines.append(f"    {signal:42s} {_cell(found['minus random'], '+')}")
        lines.append(
            f"  by {SHOWN!r}:\n    calls  score                 random  oracle  minus random             minus model"
        )
        for share, found in own["curve"].items():
            lines.append(
                f"    {share:5.0%}  {_cell(found['score'])}  {found['random']:.3f}   {found['oracle']:.3f}  "
                f"{_cell(found['minus random'], '+')}  {_cell(found['minus model alone'], '+')}"
            )
    return "\n".join(lines)


def _cell(found: Sequence[float], sign: str = "") -> str:
    return f"{found[0]:{sign}.3f} [{found[1]:{sign}.3f}, {found[2]:{sign}.3f}]"


if __name__ == "__main__":
    sys.exit(main())

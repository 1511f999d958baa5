"""Label published latents from the examples their published explainer saw, and score on the published test windows.

    python -m benchmarks.published_latents [FILE.jsonl] [--resamples 2000]

Latents: OpenAI's TopK dictionaries on GPT-2 small, as explained and judged by Llama-3-70B in EleutherAI/delphi
(Apache-2.0). Per latent: 20 explain examples; detection and fuzzing sets of 50 activating windows and 20 others.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exegete.evaluators.contract import Item, Task
from exegete.evaluators.predicate_judge import PredicateJudge
from exegete.tools.explainers import Explainer, Explanation
from exegete.tools.explainers.background import background
from exegete.tools.explainers.lexical import LexicalExplainer
from exegete.tools.explainers.token_list import TokenListExplainer
from exegete.tools.seeds import derive_seed, generator
from exegete.tools.windows import LatentEvidence, Split, Window

DEFAULT_FILE = Path(__file__).resolve().parents[1] / "../shared/data/latents/delphi_gpt2s_oai128k_random.jsonl"
TASKS: tuple[Task, ...] = ("detection", "fuzzing")
_MARKED = re.compile(r"<<(.*?)>>(?!>)", re.DOTALL)
_WORD = re.compile(r"\s*\S+|\s+\Z")

Record = dict[str, Any]
Row = dict[str, Any]


def words(text: str) -> list[str]:
    """Cut text into words, each with the whitespace before it; joined they give the text back."""
    return _WORD.findall(text)


def tokens_and_marks(text: str) -> tuple[list[str], list[int]]:
    """Cut marked text into whitespace-prefixed words, each marked span one token; return tokens and marks."""
    tokens: list[str] = []
    marks: list[int] = []
    for number, part in enumerate(_MARKED.split(text)):
        if number % 2:
            marks.append(len(tokens))
            tokens.append(part)
        else:
            tokens.extend(words(part))
    return tokens, marks


def interchange(record: Record) -> Row:
    """Return one published record as one line of the interchange format."""
    windows = [_explain_row(example) for example in record["explainer_examples"]]
    for item in record["recall"]:
        windows.append(_test_row(words(item["text"]), item["activating"]))
    for item in record["fuzz"]:
        tokens, marks = tokens_and_marks(item["text"])
        correct = bool(item["correctly_marked"])
        windows.append(_test_row(tokens, correct) | {"marks": marks, "marks_correct": correct})
    return {
        "dictionary": f"openai-128k-gpt2-small-layer-{record['layer']}",
        "latent": int(record["feature"]),
        "explanation": record["explanation"],
        "windows": windows,
    }


def _explain_row(example: Row) -> Row:
    tokens, marks = tokens_and_marks(example["text"])
    activations = [0.0] * len(tokens)
    strengths = [max(float(value), 0.5) for _, value in example["acts"]]
    for number, mark in enumerate(marks):
        activations[mark] = strengths[min(number, len(strengths) - 1)] if strengths else 1.0
    return {"tokens": tokens, "activations": activations, "fires": True, "split": "explain", "kind": "firing"}


def _test_row(tokens: list[str], fires: bool) -> Row:
    kind = "firing" if fires else "random"
    return {"tokens": tokens, "activations": None, "fires": fires, "split": "test", "kind": kind}


def windows_of(record: Record) -> LatentEvidence:
    """Return one published record as evidence."""
    line = interchange(record)
    made = [
        Window(
            id=number,
            tokens=tuple(row["tokens"]),
            activations=None if row["activations"] is None else np.array(row["activations"], np.float32),
            fires=row["fires"],
            split=row["split"],
            kind=row["kind"],
            marks=tuple(row["marks"]) if "marks" in row else None,
            marks_correct=row.get("marks_correct"),
        )
        for number, row in enumerate(line["windows"])
    ]
    return LatentEvidence(line["latent"], "live", tuple(made), given_explanation=line["explanation"])


def sealed(evidence: LatentEvidence) -> LatentEvidence:
    """Return what an explainer may see of it."""
    hidden: frozenset[Split] = frozenset({"test"})
    windows = tuple(w for w in evidence.windows if w.split not in hidden)
    return LatentEvidence(evidence.latent, evidence.status, windows, sealed=hidden)


def items_of(evidence: LatentEvidence, task: Task) -> tuple[list[Item], list[bool]]:
    """Return the published items of one task and their truth."""
    chosen = [w for w in evidence.select("test") if (w.marks is not None) == (task == "fuzzing")]
    truth = [bool(w.fires if w.marks_correct is None else w.marks_correct) for w in chosen]
    return [Item(w.tokens, w.marks) for w in chosen], truth


def balanced_accuracy(truth: Sequence[bool], said: Sequence[bool]) -> float:
    """Return the mean of the true positive and the true negative rate."""
    right = np.equal(truth, said)
    held = np.array(truth, bool)
    return float((right[held].mean() + right[~held].mean()) / 2)


def score(explanation: Explanation | None, evidence: LatentEvidence, task: Task) -> float:
    """Return the balanced accuracy of one explanation; 0.5, what a constant answer gets, where there is none."""
    items, truth = items_of(evidence, task)
    verdicts = asyncio.run(PredicateJudge().judge(task, explanation or Explanation(""), items, 0))
    return balanced_accuracy(truth, [bool(v.applies) for v in verdicts]) if explanation else 0.5


def published(record: Record, task: Task) -> float:
    """Return the balanced accuracy of the published explanation and judge, from the published verdicts."""
    rows, key = (record["recall"], "activating") if task == "detection" else (record["fuzz"], "correctly_marked")
    known = [row for row in rows if row["scorer_says"] is not None]
    return balanced_accuracy([bool(row[key]) for row in known], [bool(row["scorer_says"]) for row in known])


def label(explainer: Explainer, evidence: Iterable[LatentEvidence]) -> list[Explanation | None]:
    """Return the explanation of each latent."""
    return [asyncio.run(explainer.explain(e, derive_seed(0, "published", n))) for n, e in enumerate(evidence)]


def bootstrap(values: Sequence[float], resamples: int) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean over latents."""
    array = np.array(values)
    drawn = generator(0, "bootstrap").integers(0, len(array), (resamples, len(array)))
    low, high = np.quantile(array[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)


def measure(records: Sequence[Record], resamples: int) -> Row:
    """Label and score every record; return the figures of the module's docstring."""
    evidence = [windows_of(record) for record in records]
    visible = [sealed(e) for e in evidence]
    others = background(visible)
    start = time.process_time()
    lexical = label(LexicalExplainer(others), visible)
    spent_ms = 1000 * (time.process_time() - start) / len(records)
    explained = {"lexical": lexical, "token_list": label(TokenListExplainer(), visible)}
    result: Row = {"latents": len(records), "abstained": sum(e is None for e in lexical), "ms_per_latent": spent_ms}
    for task in TASKS:
        values = {
            name: [score(x, e, task) for x, e in zip(made, evidence, strict=True)] for name, made in explained.items()
        }
        values["published_llama_3_70b"] = [published(record, task) for record in records]
        paired = [a - b for a, b in zip(values["lexical"], values["token_list"], strict=True)]
        result[task] = {name: _figure(v, resamples) for name, v in values.items()}
        result[task]["lexical_minus_token_list"] = _figure(paired, resamples)
    return result


def _figure(values: Sequence[float], resamples: int) -> Row:
    low, high = bootstrap(values, resamples)
    return {"mean": float(np.mean(values)), "low": low, "high": high, "n": len(values)}


def table(result: Row) -> str:
    """Return the figures as a table for people."""
    lines = [f"balanced accuracy, mean over {result['latents']} latents [95 % bootstrap interval]"]
    for name in result["detection"]:
        cells = [f"{f['mean']:.3f} [{f['low']:.3f}, {f['high']:.3f}]" for f in (result[task][name] for task in TASKS)]
        lines.append(f"{name:26s} detection {cells[0]}   fuzzing {cells[1]}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None, write: Callable[[str], Any] = print) -> int:
    """Run the benchmark from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file", nargs="?", type=Path, default=DEFAULT_FILE)
    parser.add_argument("--resamples", type=int, default=2000)
    options = parser.parse_args(arguments)
    if not options.file.exists():
        write(json.dumps({"skipped": f"{options.file.name} is not there"}))
        return 0
    with options.file.open(encoding="utf-8") as lines:
        result = measure([json.loads(line) for line in lines], options.resamples)
    write(json.dumps(result, indent=2))
    write(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

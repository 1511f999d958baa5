"""Label published latents from the examples their published explainer saw, and score on the published test windows.

    python -m benchmarks.published_latents [FILE.jsonl] [--resamples 2000]

Latents: OpenAI's TopK dictionaries on GPT-2 small, as explained and judged by Llama-3-70B in EleutherAI/delphi
(Apache-2.0). Per latent: 20 explain examples; detection and fuzzing sets of 50 activating windows and 20 others.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import exegete
from exegete.agent.config import load_config
from exegete.agent.run import run
from exegete.evaluators.contract import Task
from exegete.evaluators.statistics import mean_interval
from exegete.tools.interchange import import_evidence
from exegete.tools.seeds import generator

DEFAULT_FILE = Path(__file__).resolve().parents[1] / "../shared/data/latents/delphi_gpt2s_oai128k_random.jsonl"
LATENTS_A_LAYER = 2**17
TASKS: tuple[Task, ...] = ("detection", "fuzzing")
EXPLAINERS = ("lexical", "token_list")
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
        "dictionary": "openai-128k-gpt2-small",
        "latent": flat_latent(record),
        "explanation": record["explanation"],
        "windows": windows,
    }


def flat_latent(record: Record) -> int:
    """Return the latent's number where the dictionaries of all layers stand one after the other."""
    return int(record["layer"]) * LATENTS_A_LAYER + int(record["feature"])


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


def write_interchange(records: Sequence[Record], file: Path) -> None:
    """Write published records as a file that `exegete evidence import` takes."""
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(interchange(record)) + "\n" for record in records)


def published(record: Record, task: Task) -> float:
    """Return the balanced accuracy of the published explanation and judge, from the published verdicts."""
    rows, key = (record["recall"], "activating") if task == "detection" else (record["fuzz"], "correctly_marked")
    known = [row for row in rows if row["scorer_says"] is not None]
    truth, said = (np.array([row[name] for row in known], bool) for name in (key, "scorer_says"))
    return float((said[truth].mean() + (~said[~truth]).mean()) / 2)


def label(store: Path, explainer: str) -> float:
    """Label and score every latent of the store; return CPU milliseconds a latent, scoring and storing included."""
    config = load_config(None, [f"label.explainer={explainer}"], {"store": str(store)})
    began = time.process_time()
    outcome = run(config)
    latents = sum(sum(figures["outcomes"].values()) for figures in outcome.figures.values())
    return 1000 * (time.process_time() - began) / latents


def scores(store: Path, explainer: str, task: Task) -> dict[int, float]:
    """Return latent → balanced accuracy of the explanations of one explainer."""
    query = (
        "SELECT s.latent, s.value FROM scores s JOIN explanations e USING (explanation_id)"
        " WHERE s.metric = 'balanced_accuracy' AND s.baseline IS NULL AND e.explainer = ? AND s.evaluator = ?"
    )
    with exegete.connect(store) as connection:
        return dict(connection.execute(query, [explainer, task]).fetchall())


def measure(records: Sequence[Record], resamples: int, store: Path) -> Row:
    """Import, label and score every record as a user would; return the figures of the module's docstring.

    A latent that an explainer says nothing about counts as 0.5, what a constant answer gets.
    """
    write_interchange(records, store.with_suffix(".jsonl"))
    import_evidence(store.with_suffix(".jsonl"), store)
    result: Row = {"latents": len(records), "cpu_ms_per_latent": {name: label(store, name) for name in EXPLAINERS}}
    for task in TASKS:
        found = {name: scores(store, name, task) for name in EXPLAINERS}
        values = {name: [own.get(flat_latent(record), 0.5) for record in records] for name, own in found.items()}
        values["published_llama_3_70b"] = [published(record, task) for record in records]
        paired = [a - b for a, b in zip(values["lexical"], values["token_list"], strict=True)]
        result["abstained"] = len(records) - len(found["lexical"])
        result[task] = {name: _figure(v, resamples) for name, v in values.items()}
        result[task]["lexical_minus_token_list"] = _figure(paired, resamples)
    return result


def bootstrap(values: Sequence[float], resamples: int) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean over latents."""
    found = mean_interval(np.array(values), generator(0, "bootstrap"), resamples)
    assert found.low is not None and found.high is not None
    return found.low, found.high


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
    with options.file.open(encoding="utf-8") as lines, tempfile.TemporaryDirectory() as folder:
        result = measure([json.loads(line) for line in lines], options.resamples, Path(folder) / "store")
    write(json.dumps(result, indent=2))
    write(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The language, subject and dictionaries that ship with Exegete, small enough for two cores and known rule by rule.

`grammar`            requests over table schemas, the SQL that answers them, and the rule behind every token
`behaviours`         what a model of the language must do, each with minimal pairs that test it
`tokenizer`          the closed vocabulary as a Hugging Face tokenizer
`train_subject`      made `subject/`
`train_dictionary`   made `dictionary_demo/` and `dictionary_tests/`, and measured `figures.json`

Nothing that explains or scores latents may import from here: it would know the answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

__all__ = ["dictionary_path", "sample_texts", "subject_path", "write_corpus"]

_HERE = Path(__file__).parent


def subject_path() -> Path:
    """Return the folder of the bundled subject, which `exegete.tools.subject.load_subject` takes."""
    return _HERE / "subject"


def dictionary_path(which: Literal["demo", "tests"]) -> Path:
    """Return the folder of a bundled dictionary: `demo`'s, or that of the `tests`, trained with another seed."""
    return _HERE / f"dictionary_{which}"


def write_corpus(path: Path, seed: int, documents: int) -> None:
    """Write documents of the grammar as JSON lines, `{"text": "tables: …"}`, the same for the same seed.

    Requests that the subject never trained on are among them, in their natural share of a tenth.
    """
    with path.open("w", encoding="utf-8") as file:
        for text in sample_texts(seed, documents):
            file.write(json.dumps({"text": text}) + "\n")


def sample_texts(seed: int, count: int) -> Iterator[str]:
    """Yield documents of the grammar, the first `count` of those that `write_corpus` writes."""
    from exegete.tools.bundled.grammar import generate

    for example in generate(seed, count):
        yield example.text

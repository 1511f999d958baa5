"""What scripted models say in whole investigations on the wire, and files as users give them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from exegete.agent.investigation.contract import Case
from exegete.tools.bundled import sample_texts

from .conftest import cases_of

QUESTION = "Why does the model answer with DESC here?"
BELIEVED = 954
"""A latent that holds the behaviour up, as the tests of verifying show."""
ANSWER = f"Latent {BELIEVED} carries it."
ENOUGH, FEW, TEXTS = 50, 20, 20

Reply = Any
"""A text, or {"text" or "json": …, "calls": …}: see `language_model_server.behaviours`."""


_IDS = count(100)


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return written(name, arguments)


def written(name: str, arguments: Any) -> dict[str, Any]:
    """Return a call with arguments as they are; its id is the same whenever it is made: it goes into later requests."""
    return {"name": name, "arguments": arguments, "id": f"call_{next(_IDS)}"}


def ablate(latents: list[Any], hypothesis: str = "H1", **bounds: float) -> dict[str, Any]:
    return call("ablate", hypothesis=hypothesis, because="it fires on the word", latents=latents, **bounds)


def finish(answer: str) -> dict[str, Any]:
    return {"calls": [call("finish", answer=answer)]}


METRIC = {"json": {"kind": "log_odds", "answer": None, "other": None, "criterion": None}}
LOOK = [
    call("hypothesis", statement=f"Latent {BELIEVED} carries the direction."),
    call("hypothesis", statement=f"Latent {BELIEVED} has no part in it."),
    call("prompts", count=2),
    call("activations", prompts=[0]),
]
TRY = [
    ablate([BELIEVED], high=-0.1),
    ablate([3], "H2", low=-0.1, high=0.1),
    written("ablate", '{"latents": [954'),
    call("ablaet", latents=[3]),
    ablate(["seven"], high=0.0),
    ablate([10**6], high=0.0),
    call("ablate", latents=[3]),
    ablate([5], "H9", high=0.0),
]
AGAIN = [ablate([BELIEVED], high=-9.0), call("update", hypothesis="H1", status="supported")]
CLAIMS = [
    call("claim", statement="It carries it.", kind="causal", latents=[BELIEVED], experiments=["E1"], hypothesis="H1"),
    call("claim", statement="Latent 3 does too.", kind="causal", latents=[3]),
    call("claim", statement="So does latent 5.", kind="causal", latents=[5], experiments=["E7"]),
    *finish(ANSWER)["calls"],
]
SCRIPT: Sequence[Reply] = (
    METRIC,
    {"calls": LOOK, "text": "I look."},
    {"calls": TRY},
    {"text": "Let me think."},
    {"calls": AGAIN},
    {"calls": CLAIMS},
)
STEPS = 5
"""Replies of the script that are decisions."""


def prompts(count: int = ENOUGH) -> tuple[Case, ...]:
    """Return minimal pairs, by default enough for claims to be verified on those that are held out."""
    return cases_of("order.DESC", count)


def write_files(folder: Path, count: int = ENOUGH) -> Path:
    """Write prompts and other texts as users have them; return the folder."""
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(asdict(case))}\n" for case in prompts(count)))
    texts = (text.replace("\n", " ") for text in sample_texts(77, TEXTS))
    (folder / "texts.txt").write_text("".join(f"{text}\n" for text in texts))
    return folder


def timeless(report: str) -> str:
    """Return a report without times of day and durations."""
    return re.sub(r"\d+\.\d s\. Again", "… s. Again", re.sub(r"\d{4}-\d\d-\d\dT[\d:.+]+", "…", report))

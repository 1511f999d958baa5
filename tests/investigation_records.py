"""A made-up investigation with one claim of every verdict, and with texts of anyone's choice wherever a text can stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from exegete.agent.investigation.contract import Budget, Case, Claim, Headline, Hypothesis, Metric, Prediction, Verdict
from exegete.agent.investigation.record import ExperimentRecord, InvestigationRecord, Spent, write_record

DICTIONARY = "sha256:" + "ab" * 32

BARS = {
    "kind": "bars",
    "title": "Change of the metric",
    "unit": "logits",
    "bars": [
        {"label": "latents 17, 21", "value": -3.2, "low": -3.9, "high": -2.5, "control": False},
        {"label": "random latents", "value": -0.1, "low": -0.3, "high": 0.1, "control": True},
    ],
}
CURVE = {
    "kind": "curve",
    "title": "Steering latent 17",
    "x": "strength",
    "y": "logits",
    "series": [
        {"label": "latent 17", "points": [[0, 0], [1, 1.5], [2, 2.5]], "low": [0, 1, 2], "high": [0, 2, 3]},
        {"label": "random latent", "points": [[0, 0], [1, 0.1], [2, -0.1]], "control": True},
    ],
}
TOKENS = {
    "kind": "tokens",
    "title": "Attribution by token",
    "unit": "logits",
    "tokens": [" names", " in", " descending"],
    "values": [0.1, -0.4, 2.0],
}


def investigation(text: str = "", **changes: Any) -> InvestigationRecord:
    """Return a record of four experiments (three of four predictions held) and four claims; `text` ends every text in it."""
    made = InvestigationRecord(
        id="i-0001",
        question=f"Why does the model write DESC here?{text}",
        suggested=f"the word descending{text}",
        investigator="recipe",
        origin={
            "subject": f"toy-model{text}",
            "subject_fingerprint": "sha256:" + "cd" * 32,
            "dictionary": f"toy{text}",
            "fingerprint": DICTIONARY,
            "hook_point": "blocks.1.hook_resid_post",
            "store": None,
        },
        cases=tuple(Case(f"search {i}{text}", f" DESC{text}", f" ASC{text}", f"variant {i}{text}") for i in range(6)),
        held_out=tuple(Case(f"held out {i}{text}", " DESC", " ASC") for i in range(4)),
        metric=Metric("log_odds", f" DESC{text}"),
        seed=5,
        code_version="0.9.0",
        budget=Budget(steps=40, passes=20_000),
        spent=Spent(steps=6, passes=1_234, calls=0, tokens=0, usd=0.0),
        status="finished",
        answer=f"Latents 17 and 21 carry the word.{text}",
        started_at="2026-11-21T20:00:00+00:00",
        finished_at="2026-11-21T20:01:30+00:00",
        hypotheses=(
            Hypothesis("H1", f"Latents 17 and 21 carry it{text}", "supported"),
            Hypothesis("H2", f"Latent 5 alone carries it{text}", "rejected"),
            Hypothesis("H3", f"The position carries it{text}"),
        ),
        experiments=experiments(text),
        verdicts=verdicts(text),
        notes=(f"look at 21{text}",),
        lookups={"latent_card": 2, "sql": 1},
        labels={17: f"the word descending{text}", 21: f"order by{text}"},
    )
    return replace(made, **changes)


def experiments(text: str = "") -> tuple[ExperimentRecord, ...]:
    """Two hits, a miss, a hit, and one that failed: 3 of 4."""
    fallen = Headline(f"change{text}", -3.2, -3.9, -2.5, 6, f"random latents{text}", -0.1, -0.3, 0.1, 20)
    small = Headline("change", -0.2, -0.5, 0.1, 6, "random latents", -0.1, -0.3, 0.1, 20)
    return (
        _experiment("E1", "ablate", {"latents": [17, 21]}, f"because{text}", (None, -1.0), fallen, True, text, (BARS,)),
        _experiment("E2", "steer", {"latents": [17]}, f"because{text}", (0.5, None), small, False, text, (CURVE,)),
        _experiment("E3", "ablate", {"latents": [5], "note": text}, "b", (-0.5, 0.5), small, True, text, (TOKENS,)),
        _experiment("E4", "ablate", {"latents": [21]}, "b", (None, -1.0), fallen, True, text, ()),
        replace(
            _experiment("E5", "probe", {"word": f"x{text}"}, "b", (0.9, None), None, None, text, ()),
            status="error",
            text=f"no such word{text}",
        ),
    )


def _experiment(
    id: str,
    tool: str,
    arguments: Mapping[str, Any],
    because: str,
    bounds: tuple[float | None, float | None],
    headline: Headline | None,
    predicted: bool | None,
    text: str,
    plots: tuple[Mapping[str, Any], ...],
) -> ExperimentRecord:
    plots = tuple(_hostile(plot, text) for plot in plots)
    return ExperimentRecord(
        id=id,
        tool=tool,
        arguments=arguments,
        prediction=Prediction("H2" if arguments.get("latents") == [5] else "H1", because, *bounds),
        predicted_at="2026-11-21T20:00:10+00:00",
        finished_at="2026-11-21T20:00:12+00:00",
        status="ok",
        headline=headline,
        predicted=predicted,
        text=f"what {tool} found{text}",
        facts={"rows": [{"latent": 17, "said": text}], "mean": -3.2},
        plots=plots,
        passes=120,
        seconds=1.5,
    )


def _hostile(value: Any, text: str) -> Any:
    """Return a plot whose texts end with `text`, but for the one that says what kind it is."""
    if isinstance(value, Mapping):
        return {key: inner if key == "kind" else _hostile(inner, text) for key, inner in value.items()}
    if isinstance(value, list):
        return [_hostile(inner, text) for inner in value]
    return value + text if isinstance(value, str) else value


def verdicts(text: str = "") -> tuple[Verdict, ...]:
    """One of every status: verified, failed, unverified, correlational."""
    held = Headline("change", -3.1, -3.8, -2.4, 4, "random latents", -0.1, -0.4, 0.2, 20)
    nothing = Headline("change", -0.2, -0.6, 0.2, 4, "random latents", -0.1, -0.4, 0.2, 20)
    gone = Headline("flipped", 0.75, 0.3, 0.95, 4, "random latents", 0.0, 0.0, 0.49, 4)
    steered = Headline("change", -0.2, -0.6, 0.2, 4, "random directions", -0.3, -0.5, -0.1, 20)
    causal = Claim(f"17 and 21 cause it{text}", "causal", (17, 21), flips=True, experiments=("E1",), hypothesis="H1")
    return (
        Verdict(causal, "verified", f"its interval excludes the control's{text}", held, gone, None, 0.002, 0.004),
        Verdict(
            replace(causal, statement=f"5 causes it{text}", latents=(5,), intervention="steer", experiments=("E2", "E3")),
            "failed",
            "its interval holds the control's",
            nothing,
            None,
            steered,
            0.4,
            0.4,
        ),
        Verdict(replace(causal, statement=f"everything{text}", latents=(), experiments=("E99",)), "unverified", "no latent is named"),
        Verdict(Claim(f"17 fires on it{text}", "correlational", (17,)), "correlational", "no intervention is claimed"),
    )  # fmt: skip


def keep(record: InvestigationRecord, store: Path) -> Path:
    """Write the record where a store's investigations lie; return its path."""
    folder = store / "investigations" / record.id
    folder.mkdir(parents=True, exist_ok=True)
    return write_record(record, folder)

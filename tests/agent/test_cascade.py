"""The cascade inside a run: who climbs, what is recorded of it, and that nothing but a latent's own rows decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from planted_store import WORDS, tables
from scripted_wire import SPEC, ScriptedWire, scripted

import exegete
from exegete.agent.config import load_config
from exegete.agent.progress import Lines
from exegete.agent.run import Outcome, run
from exegete.agent.summary import headline
from exegete.tools.errors import UserError
from exegete.tools.interchange import import_evidence
from exegete.tools.seeds import generator

LATENTS, EASY = 24, 12
"""The first twelve fire on one word, the others on three."""
CONTROL = 12


def targets(latent: int) -> list[str]:
    return [f"word{latent}{letter}" for letter in ("x" if latent < EASY else "xyz")]


def line(latent: int, windows: int = 40) -> dict[str, Any]:
    rng, found = generator(0, "cascade", latent), []
    for split in ("explain", "refine", "test"):
        for number in range(windows):
            tokens = [f" {WORDS[i]}" for i in rng.integers(len(WORDS), size=12)]
            fires, at = number % 2 == 0, int(rng.integers(12))
            if fires:
                tokens[at] = f" {targets(latent)[number // 2 % len(targets(latent))]}"
            activations = [1.0 if fires and i == at else 0.0 for i in range(12)]
            kind = "firing" if fires else "random"
            found.append({"tokens": tokens, "activations": activations, "fires": fires, "split": split, "kind": kind})
    return {"dictionary": "planted", "latent": latent, "windows": found}


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("evidence") / "planted.jsonl"
    file.write_text("".join(json.dumps(line(latent)) + "\n" for latent in range(LATENTS)))
    return file


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> ScriptedWire:
    return scripted(monkeypatch)


def climb(evidence: Path, store: Path, rungs: list[str], *assignments: str) -> Outcome:
    if not store.exists():
        import_evidence(evidence, store)
    overrides = {
        "store": str(store),
        "models.explainer": SPEC,
        "models.judge": SPEC,
        "models.no_budget": True,
    }
    usual = ("label.floors=4", f"cascade.rungs={json.dumps(rungs)}", f"cascade.control={CONTROL}")
    return run(load_config(None, (*usual, *assignments), overrides), Lines(every_s=1e9))


def rows(store: Path, query: str) -> list[Any]:
    with exegete.connect(store) as connection:
        return connection.execute(query).fetchall()


def test_who_scores_well_stays_and_who_does_not_is_refined(wire: ScriptedWire, evidence: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    (figures,) = climb(evidence, store, ["one-shot", "refine"]).figures.values()
    ways = rows(
        store,
        "SELECT latent, list(rung ORDER BY step), list(decision ORDER BY step) FROM climbs WHERE NOT control GROUP BY 1 ORDER BY 1",
    )
    for latent, rungs, decisions in ways:
        if latent < EASY:
            assert (rungs, decisions) == (["one-shot"], ["good_enough"])
        else:
            assert rungs == ["one-shot", "refine"] and decisions == ["climbs", "good_enough"]
    texts = dict(rows(store, "SELECT latent, text FROM best_explanations"))
    assert {latent: set(text[:-1].replace(",", "").split()[4:]) for latent, text in texts.items()} == {
        latent: set(targets(latent)) for latent in range(LATENTS)
    }
    assert figures["evaluators"]["detection"]["balanced_accuracy"]["value"] == 1.0


def test_revisions_name_their_parent_and_only_the_chosen_one_is_scored_on_the_test_split(
    wire: ScriptedWire, evidence: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    climb(evidence, store, ["one-shot", "refine"])
    chains = rows(
        store,
        "SELECT e.latent, e.explainer, p.explainer, r.explanation_id = e.explanation_id,"
        " count(DISTINCT s.evaluator) FROM explanations e JOIN explanations p ON p.explanation_id = e.parent"
        " JOIN data.results r ON r.latent = e.latent LEFT JOIN scores s ON s.explanation_id = e.explanation_id AND s.baseline IS NULL"
        " GROUP BY ALL ORDER BY ALL",
    )
    assert chains == [(latent, "refine", "one-shot", True, 2) for latent in range(EASY, LATENTS)]
    scored = rows(store, "SELECT latent, count(DISTINCT explanation_id) FROM scores WHERE baseline IS NULL GROUP BY 1")
    assert sorted(scored) == [(latent, 1) for latent in range(LATENTS)]


def test_the_cheapest_rung_is_screened_without_a_call(wire: ScriptedWire, evidence: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    climb(evidence, store, ["lexical", "one-shot", "refine"], "cascade.control=20", "cascade.target=0.99")
    screened = rows(store, "SELECT DISTINCT calls, tokens, usd FROM climbs WHERE rung = 'lexical'")
    assert screened == [(0, 0, 0.0)]
    ((latents, slope),) = rows(
        store,
        "SELECT clustering->'screening'->>'latents', clustering->'screening'->>'slope' FROM data.pilots WHERE evaluator = 'cascade'",
    )
    assert int(latents) == 20 and float(slope) >= 0


def test_what_it_takes_to_judge_a_screened_parent_is_counted_once(
    wire: ScriptedWire, evidence: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    climb(evidence, store, ["lexical", "refine"], "cascade.control=16", "cascade.target=0.99", "cascade.rounds=1")
    steps = rows(
        store,
        "SELECT list(calls ORDER BY step) FROM climbs WHERE NOT control GROUP BY latent"
        " HAVING count(*) = 2 AND count(explanation_id) = 2",
    )
    assert steps
    for ((judged, revised),) in steps:
        assert judged > 0 and revised == 1 + judged  # The question itself, and as many judgements of the revision.


def test_the_control_subset_takes_every_rung_and_best_of_n_at_equal_cost(
    wire: ScriptedWire, evidence: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    climb(evidence, store, ["one-shot", "refine"], "cascade.rounds=1")
    found = rows(
        store,
        "SELECT latent, list(rung ORDER BY step), list(tokens ORDER BY step), list(test ORDER BY step), list(decision)"
        " FROM climbs WHERE control GROUP BY 1 ORDER BY 1",
    )
    assert len(found) == CONTROL
    for latent, rungs, tokens, tests, decisions in found:
        assert rungs == ["one-shot", "refine", "best-of"] and set(decisions) == {"control"}
        climbed = tokens[0] + tokens[1]
        # The last draw is the one that reaches the cost of the climb.
        assert climbed <= tokens[2] <= climbed + 2 * tokens[0]
        assert tests[0] == 1.0 if latent < EASY else tests[0] < 0.8 < tests[1]


@pytest.mark.parametrize("rungs", [["one-shot", "refine"], ["lexical", "one-shot", "refine"]])
def test_order_and_concurrency_change_no_table(
    rungs: list[str], monkeypatch: pytest.MonkeyPatch, evidence: Path, tmp_path: Path
) -> None:
    scripted(monkeypatch, error=0.15)
    found = []
    for name, concurrency in (("one", 1), ("two", 16)):
        climb(evidence, tmp_path / name, rungs, f"label.concurrency={concurrency}", "models.concurrency=8")
        found.append((tables(tmp_path / name), rows(tmp_path / name, "SELECT * FROM climbs ORDER BY ALL")))
    assert found[0] == found[1]


def test_a_run_taken_up_again_asks_nothing_twice_and_ends_in_the_same_tables(
    monkeypatch: pytest.MonkeyPatch, evidence: Path, tmp_path: Path
) -> None:
    wire = scripted(monkeypatch, error=0.1)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    climb(evidence, whole, ["one-shot", "refine"])
    wire.questions.clear()
    for tokens in (3_000, 20_000, 60_000):
        with pytest.raises(UserError, match="budget"):
            climb(evidence, parts, ["one-shot", "refine"], f"models.budget_tokens={tokens}")
    climb(evidence, parts, ["one-shot", "refine"])
    assert set(wire.questions.values()) == {1}
    query = "SELECT * FROM climbs ORDER BY ALL"
    assert (tables(whole), rows(whole, query)) == (tables(parts), rows(parts, query))


def test_what_is_worth_too_little_does_not_climb(wire: ScriptedWire, evidence: Path, tmp_path: Path) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text('["openai:scripted"]\ninput = 1.0\noutput = 1.0\n')
    store = tmp_path / "store"
    climb(evidence, store, ["one-shot", "refine"], f"models.prices={prices}", "cascade.worth_usd=0.0001")
    decisions = dict(rows(store, "SELECT decision, count(*) FROM climbs WHERE NOT control GROUP BY 1"))
    assert decisions == {"good_enough": EASY, "not_worth_it": LATENTS - EASY}


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (['cascade.rungs=["refine", "one-shot"]'], "comes last"),
        (['cascade.rungs=["one-shot", "one-shot"]'], "twice"),
        (['cascade.models={ two-shot = "openai:x" }'], "'two-shot' is none"),
        (['label.explainer="lexical"'], "leave it out"),
        (["cascade.worth_usd=1.0", "cascade.control=0"], "control"),
        (['label.evaluators=["detection"]'], "'fuzzing'"),
        (["cascade.options={ refine = { rounds = 3 } }"], "no option 'rounds'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_asked(
    assignments: list[str], message: str, wire: ScriptedWire, evidence: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        climb(evidence, tmp_path / "store", ["one-shot", "refine"], *assignments)
    assert not wire.asked


def test_the_summary_says_what_routing_and_each_rung_are_worth(
    monkeypatch: pytest.MonkeyPatch, evidence: Path, tmp_path: Path
) -> None:
    scripted(monkeypatch, error=0.05)
    (figures,) = climb(evidence, tmp_path / "store", ["one-shot", "refine"], "cascade.control=24").figures.values()
    found = figures["cascade"]
    assert sum(sum(counts.values()) for counts in found["stopped"].values()) == LATENTS
    own = found["measured"]
    # Half of the latents need a revision: the rule finds them, so it is as good as climbing always, and better than chance.
    assert own["routed"]["n"] == LATENTS
    assert own["routed"]["value"] == pytest.approx(own["climb always"]["value"], abs=0.01)
    assert own["routed - random at equal cost"]["low"] > 0
    assert own["cost of routed"]["value"] < own["cost of climb always"]["value"]
    assert own["gain of refine"]["low"] > 0 and own["best-of"]["value"] < own["climb always"]["value"]
    lines = "\n".join(headline(figures))
    assert "cascade: one-shot → refine, target 0.9" in lines and "refine adds" in lines and "flatter by" in lines


def test_routing_rests_on_nothing_of_the_test_split(
    monkeypatch: pytest.MonkeyPatch, evidence: Path, tmp_path: Path
) -> None:
    """Other verdicts on test windows change the scores, and neither who climbs nor what is frozen."""
    found = []
    for name, rate in (("kind", 0.0), ("harsh", 0.4)):
        wire = scripted(monkeypatch, error=0.1)
        lines = [json.loads(one) for one in evidence.read_text().splitlines()]
        if rate:
            # Every window of the test split ends in a word that makes the judge err in four of ten.
            for latent in lines:
                for window in latent["windows"]:
                    if window["split"] == "test":
                        window["tokens"][-1] += " (harsh)"
        wire.harsh = rate
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(one) + "\n" for one in lines))
        climb(file, tmp_path / name, ["one-shot", "refine"], "cascade.control=16", "cascade.worth_usd=1.0")
        decided = "SELECT latent, step, rung, refine, refine_low, refine_high, decision FROM climbs WHERE NOT control ORDER BY ALL"
        frozen = "SELECT clustering::VARCHAR FROM data.pilots WHERE evaluator = 'cascade'"
        scored = "SELECT avg(value) FROM scores WHERE evaluator = 'detection' AND metric = 'balanced_accuracy' AND baseline IS NULL"
        found.append([rows(tmp_path / name, query) for query in (decided, frozen, scored)])
    (kind, kind_frozen, ((kind_score,),)), (harsh, harsh_frozen, ((harsh_score,),)) = found
    assert harsh_score < kind_score - 0.1
    assert (kind, kind_frozen) == (harsh, harsh_frozen)

"""The commands on the live model, through the command line, on the bundled subject."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from exegete.agent import instrument_cli, readings
from exegete.agent.cli import app
from exegete.agent.findings import Findings, Table, figure, plain
from exegete.agent.live import Live, Wanted, open_live, read_texts
from exegete.agent.readings import probing
from exegete.tools.bundled.behaviours import behaviours
from exegete.tools.bundled.grammar import generate
from exegete.tools.effects import kl_divergences
from exegete.tools.errors import UserError
from exegete.tools.interventions import steer
from exegete.tools.live_model import Trial

DESC = (
    "tables: players(id, age, last_name, top_speed, country) films(id, genre, budget, name)\n"
    "request: list the last_name of players in descending order of age\n"
    "sql: SELECT last_name FROM players ORDER BY age"
)


@pytest.fixture(scope="module")
def live() -> Live:
    return open_live(Wanted())


@pytest.fixture(autouse=True)
def loaded_once(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instrument_cli, "open_model", lambda **_: live)


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def facts(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(invoke(*arguments, "--format", "json"))
    return found


@pytest.fixture(scope="module")
def leader(live: Live) -> int:
    """The latent that holds " DESC" up most, by its exact effect."""
    from exegete.tools.attribution import LogitDifference, attribute

    tokens = [live.model.subject.pieces.index(piece) for piece in (" DESC", " ASC")]
    found = attribute(live.model, live.dictionary, [live.model.tokens(DESC)], LogitDifference(*tokens))
    return max(found.ranked[:20], key=lambda one: one.exact.value if one.exact else -math.inf).latent


def test_attribute_ranks_what_ablate_confirms(leader: int) -> None:
    found = facts("attribute", DESC, "--answer", " DESC", "--other", " ASC", "--top", "6")
    assert leader in [row["latent"] for row in found["latents"]]
    exact = {row["latent"]: row["exact"]["value"] for row in found["latents"]}
    ablated = facts(
        "ablate",
        DESC,
        "--latent",
        str(leader),
        "--answer",
        " DESC",
        "--other",
        " ASC",
        "--tokens",
        "2",
        "--controls",
        "4",
    )
    assert ablated["log_odds"][0]["change"]["value"] == pytest.approx(-exact[leader], abs=1e-3)
    assert len(ablated["controls"]) == 4
    assert all(len(control["latents"]) == 1 for control in ablated["controls"])
    assert max(control["kl"]["value"] for control in ablated["controls"]) >= 0


def test_steer_reaches_the_kl_with_every_arm(leader: int) -> None:
    found = facts("steer", DESC, "--latent", str(leader), "--kl", "0.3", "--controls", "2", "--tokens", "3")
    arms = found["arms"]
    assert [arm["name"] for arm in arms] == ["steered", *["random latent"] * 2, *["random direction"] * 2]
    reached = [arm["effect"]["kl"]["value"] for arm in arms if arm["matched"]["status"] == "matched"]
    assert reached and all(0.27 <= kl <= 0.33 for kl in reached)
    assert found["origin"]["dictionary"] == "bundled:demo" and found["parameters"]["seed"] == 0


def test_a_given_strength_sets_the_kl_of_the_controls(leader: int) -> None:
    found = facts("steer", DESC, "--latent", str(leader), "--strength", "-6", "--controls", "1", "--tokens", "2")
    assert found["arms"][0]["strength"] == -6 and found["arms"][0]["matched"] is None
    assert found["parameters"]["target_kl"] == pytest.approx(found["arms"][0]["effect"]["kl"]["value"])
    none = facts("steer", DESC, "--latent", str(leader), "--strength", "0", "--controls", "1", "--tokens", "2")
    assert [arm["name"] for arm in none["arms"]] == ["steered"] and none["arms"][0]["written"] == none["clean"]


def test_controls_of_a_given_strength_match_its_kl_where_they_are_matched(
    live: Live, leader: int, tmp_path: Path
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": one.text[:-20]}) + "\n" for one in generate(9, 6)))
    found = facts(
        "steer",
        DESC,
        "--latent",
        str(leader),
        "--strength",
        "-6",
        "--texts",
        str(texts),
        "--controls",
        "1",
        "--tokens",
        "2",
    )
    target = found["parameters"]["target_kl"]
    assert target != pytest.approx(found["arms"][0]["effect"]["kl"]["value"], rel=0.01)
    change = steer(live.dictionary.fingerprint, [leader], -6.0)
    own = kl_divergences(live.model, [Trial(live.model.tokens(text), change) for text in read_texts(texts)])
    assert target == pytest.approx(sum(own) / len(own), rel=1e-3)
    reached = [arm["matched"]["kl"] for arm in found["arms"][1:] if arm["matched"]["status"] == "matched"]
    assert reached and all(0.9 * target <= kl <= 1.1 * target for kl in reached)


def test_tables_are_for_people(leader: int) -> None:
    shown = invoke("steer", DESC, "--latent", str(leader), "--controls", "1", "--tokens", "2")
    assert "random direction" in shown and "next token, steered" in shown and "⏎" not in shown.split("\n")[0]
    assert "log-odds of ' DESC' against ' ASC'" in invoke("attribute", DESC, "--answer", " DESC", "--other", " ASC")


@pytest.mark.parametrize("mode", ["mean", "resample"])
def test_ablation_from_other_texts(mode: str, leader: int, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": one.text}) + "\n" for one in generate(4, 20)))
    found = facts(
        "ablate",
        DESC,
        "--latent",
        str(leader),
        "--mode",
        mode,
        "--texts",
        str(texts),
        "--controls",
        "2",
        "--tokens",
        "2",
    )
    assert found["parameters"]["mode"] == mode and found["parameters"]["texts"] == 20
    with pytest.raises(UserError, match="--texts"):
        invoke("ablate", DESC, "--latent", str(leader), "--mode", mode)


def test_lens_shows_what_a_latent_writes(leader: int, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"text": one.text[:-12]}) + "\n" for one in generate(8, 6)))
    found = facts("lens", str(leader), "--prompts", str(file), "--top", "4", "--kl", "0.2")
    [direct], [clamped] = found["direct"], found["clamped"]
    assert direct["latent"] == clamped["latent"] == leader
    assert len(direct["top"]) == 4 and direct["top"][0]["logit"] > direct["bottom"][0]["logit"]
    assert clamped["matched"]["status"] in ("matched", "unreachable")
    shown = invoke("lens", str(leader), "3", "--top", "4")
    assert "random directions" in shown and "latent 3" in shown


def test_compare_finds_what_sets_texts_apart(tmp_path: Path) -> None:
    texts = [one.text for one in generate(5, 400)]
    sides = [one for one in texts if " ORDER BY " in one], [one for one in texts if " ORDER BY " not in one]
    files = tmp_path / "ordered.jsonl", tmp_path / "others.jsonl"
    for file, side in zip(files, sides, strict=True):
        file.write_text("".join(json.dumps({"text": one}) + "\n" for one in side[:40]))
    found = facts("compare", *map(str, files), "--permutations", "999")
    assert found["discoveries"] > 5 and found["texts"] == [40, 40]
    best = found["latents"][0]["difference"]
    assert best["q"] <= 0.05 and abs(best["auroc"] - 0.5) > 0.3
    assert "differ at a false discovery rate of 0.05" in invoke("compare", *map(str, files), "--permutations", "999")


@pytest.mark.slow
def test_probe_never_stands_without_its_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Findings] = []

    def once(*arguments: Any, **options: Any) -> Findings:
        made.extend([] if made else [probing(*arguments, **options)])
        return made[0]

    monkeypatch.setattr(readings, "probing", once)
    file = tmp_path / "labelled.jsonl"
    texts = [one.text for one in generate(6, 80)]
    file.write_text("".join(json.dumps({"text": one, "label": int(" WHERE " in one)}) + "\n" for one in texts))
    found = facts("probe", str(file), "--k", "1", "--folds", "2")["probes"]
    for result in found["results"]:
        assert result["dense"]["value"] > 0.5 and result["latent"]["floor"] < 0.8
        assert {"value", "low", "high"} <= result["gain"].keys()
    assert "residual" in invoke("probe", str(file), "--k", "1", "--folds", "2")  # The same findings, as a table.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["steer", DESC, "--latent", "9999"], "9999"),
        (["steer", DESC, "--latent", "-1"], "-1"),
        (["steer", "--latent", "1"], "no prompt"),
        (["steer", DESC], "--latent"),
        (["steer", "", "--latent", "1"], "empty"),
        (["steer", DESC * 20, "--latent", "1"], "shorten"),
        (["steer", DESC, "--latent", "1", "--strength", "nan"], "nan"),
        (["steer", DESC, "--latent", "1", "--strength", "1", "--kl", "1"], "either"),
        (["steer", DESC, "--latent", "1", "--kl", "-1"], "-1"),
        (["steer", DESC, "--latent", "1", "--tokens", "0"], "0"),
        (["steer", DESC, "--latent", "1", "--temperature", "-1"], "-1"),
        (["steer", DESC, "--latent", "1", "--prompts", "nowhere.txt"], "nowhere.txt"),
        (["ablate", DESC, "--latent", "1", "--mode", "zeroo"], "zeroo"),
        (["ablate", DESC, "--latent", "1", "--answer", " DESC"], "--other"),
        (["attribute", DESC, "--answer", " DESCENDANT"], "DESCENDANT"),
        (["lens", "4096"], "4096"),
        (["lens", "1", "--prompts", "nowhere.txt"], "nowhere.txt"),
        (["compare", "nowhere.txt", "nowhere.txt"], "nowhere.txt"),
        (["probe", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_input_is_quoted(arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        invoke(*arguments)


def test_a_label_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "labelled.jsonl"
    file.write_text('{"text": "a", "label": 2}\n')
    with pytest.raises(UserError, match="label = 2"):
        invoke("probe", str(file))


def test_findings_are_plain() -> None:
    found = Findings(
        {"a": math.nan, "b": (1, 2.5), "c": {3}}, ["x\x1b[31m"], [Table("t", ("a",), [("\x1b",), (None,)])]
    )
    assert json.loads(found.render("json")) == {"a": None, "b": [1, 2.5], "c": [3]}
    assert "\x1b" not in found.render("table")
    with pytest.raises(UserError, match="xml"):
        found.render("xml")
    assert plain(behaviours()[0].description).startswith("writes")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [((None,), ""), ((0.5,), "0.5"), ((0.5, 0.4, 0.6), "0.5 [0.4, 0.6]"), ((0.5, None, 0.6, 7), "0.5 (n = 7)")],
)
def test_figures(arguments: tuple[Any, ...], text: str) -> None:
    assert figure(*arguments) == text

"""A subject that is not the bundled one: stories260K, where its files are. The prompts of `examples/names.jsonl`, and the recipe."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from exegete.agent.investigation import verifying
from exegete.agent.investigation.contract import Case
from exegete.agent.investigation.investigate import investigate
from exegete.tools.live_model import LiveModel
from exegete.tools.subject import load_subject

ROOT = Path(__file__).parents[3]
STORIES = ROOT.parent / "shared/data/models/stories260K/hf"
NAMES = ROOT / "examples/names.jsonl"
POINT = "blocks.2.hook_resid_post"
WIDTH = 64

pytestmark = pytest.mark.skipif(not STORIES.exists(), reason="../shared/data/models/stories260K is absent")


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return [Case(**json.loads(line)) for line in NAMES.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def model() -> LiveModel:
    return LiveModel(load_subject(str(STORIES)))


@pytest.fixture
def axes(tmp_path: Path) -> Path:
    """A dictionary without any error: two latents for each axis of the residual stream, its positive and its negative part."""
    both = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)])
    weights = {"encoder": both.T.contiguous(), "encoder_bias": torch.zeros(2 * WIDTH), "decoder": both,
               "decoder_bias": torch.zeros(WIDTH)}  # fmt: skip
    folder = tmp_path / "axes"
    folder.mkdir()
    save_file(weights, folder / "dictionary.safetensors")
    (folder / "dictionary.json").write_text(json.dumps({"hook_point": POINT, "activation": "relu"}))
    return folder


def test_the_model_names_the_character_after_each_prompt(model: LiveModel, cases: list[Case]) -> None:
    assert 40 <= len(cases) <= 80 and len({case.prompt for case in cases}) == len(cases)
    for case in cases:
        tokens = model.tokens(case.prompt)
        logits = model.subject.logits(torch.tensor([tokens]))[0, -1]
        assert model.subject.pieces[int(logits.argmax())] == case.answer
        assert case.variant is not None and len(model.tokens(case.variant)) == len(tokens)
        assert case.other in (" he", " she", " He", " She")


def test_the_prompts_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "names.jsonl"
    monkeypatch.setattr("sys.argv", ["make_name_prompts.py", "--stories", "24", "--out", str(made)])
    runpy.run_path(str(ROOT / "examples/make_name_prompts.py"), run_name="__main__")
    again, kept = made.read_text(encoding="utf-8").splitlines(), NAMES.read_text(encoding="utf-8").splitlines()
    # The first stories of those behind the file; another processor may round one of them to another word.
    assert len(again) >= 3 and 2 * len(set(again) & set(kept)) > len(again)


@pytest.mark.slow
def test_the_recipe_ends_in_a_report(
    cases: list[Case], axes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "RANDOM_SETS", 39)
    short = sorted(cases, key=lambda case: len(case.prompt))[:16]
    found = investigate(
        "Why does the story name a character again?", short, out=tmp_path, subject=str(STORIES), dictionary=str(axes),
        controls=2,
    )  # fmt: skip
    assert found.finished and "no language model" in found.answer
    record = found.record
    shown = {one.id: one.headline for one in record.experiments}["E1"]
    assert shown is not None and shown.value == 1.0 and shown.n == 8
    [attributed] = [one for one in record.experiments if one.tool == "attribute"]
    assert attributed.facts["error_share"]["value"] == pytest.approx(0.0, abs=1e-5)
    text = found.report.read_text(encoding="utf-8")
    assert "stories260K" in text and "Why does the story name a character again?" in text

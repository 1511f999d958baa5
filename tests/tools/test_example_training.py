"""The training example runs offline, and what it saves loads and reconstructs."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared/data"


@pytest.mark.slow
def test_the_training_example_saves_a_dictionary_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text = DATA / "models/stories260K/hf", DATA / "text/tinystories_2MB.txt"
    if not (model.exists() and text.exists()):
        pytest.skip("../shared/data is absent")
    (tmp_path / "some.txt").write_bytes(text.read_bytes()[:100_000])
    options = {"--model": model, "--text": tmp_path / "some.txt", "--out": tmp_path / "out/dictionary"}
    numbers = {"--latents": 96, "--k": 8, "--tokens": 40_000, "--batch": 512}
    arguments = [str(part) for pair in {**options, **numbers}.items() for part in pair]
    monkeypatch.setattr("sys.argv", ["train_stories_dictionary.py", *arguments])
    runpy.run_path(str(ROOT / "examples/train_stories_dictionary.py"), run_name="__main__")
    figures = json.loads(capsys.readouterr().out)
    assert figures["hook_point"] == "blocks.2.hook_resid_post"
    assert figures["l0"] == pytest.approx(8, abs=0.01) and figures["fvu"] < 0.6 and figures["dead_share"] < 0.5
    assert {path.name for path in (tmp_path / "out/dictionary").iterdir()} == {"cfg.json", "sae_weights.safetensors"}

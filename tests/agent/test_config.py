from __future__ import annotations

from pathlib import Path

import pytest

from exegete.agent.config import RunConfig, dotted_keys, load_config, restored_config
from exegete.tools.errors import UserError


def test_file_then_assignments_then_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('seed = 3\n[label]\nlimit = 10\nexplainer = "token_list"\n')
    config = load_config(
        file, ["label.limit=20", "corpus.source=text.txt"], {"label.explainer": "lexical", "store": None}
    )
    assert (config.seed, config.label.limit, config.label.explainer) == (3, 20, "lexical")
    assert config.corpus is not None and config.corpus.source == "text.txt"
    assert config.store == RunConfig().store


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[label]\nexplaner = 'x'", "unknown key 'label.explaner'. Did you mean 'label.explainer'"),
        ("sead = 1", "unknown key 'sead'. Did you mean 'seed'"),
        ("[label]\nlimit = 0", "label.limit = 0"),
        ("[label]\nlimit = 'many'", "label.limit = 'many'"),
        ("[label", "is not TOML"),
    ],
)
def test_mistakes_are_quoted(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(UserError) as raised:
        load_config(file)
    assert message in str(raised.value)


def test_what_a_run_was_begun_with_is_restored_and_mistakes_are_quoted() -> None:
    stored = RunConfig().model_dump(mode="json", exclude={"store"})
    older = {"label": {key: value for key, value in stored["label"].items() if key != "stop_at"}, "seed": 3}
    found = restored_config(older, {"store": "here", "models.budget_usd": 2.0})
    assert (found.seed, found.store, found.models.budget_usd, found.label.stop_at) == (3, "here", 2.0, None)
    assert "models" not in older
    for overrides, message in (
        ({"models.budget_usd": -3.0}, "models.budget_usd = -3.0"),
        ({"models.budget_usd": float("inf")}, "models.budget_usd = inf"),
        ({"label.of_later": 1}, "unknown key 'label.of_later'"),
    ):
        with pytest.raises(UserError, match=message):
            restored_config(stored, overrides)


def test_a_missing_file_and_a_bad_assignment() -> None:
    with pytest.raises(UserError, match=r"no configuration file 'none\.toml'"):
        load_config(Path("none.toml"))
    with pytest.raises(UserError, match="expected key=value"):
        load_config(None, ["label.limit"])


def test_every_field_says_what_it_means() -> None:
    assert all(len(meaning) > 10 for meaning in dotted_keys().values()), dotted_keys()

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from exegete.agent.card import card
from exegete.tools.errors import UserError
from exegete.tools.rendering import visible

StoreMaker = Callable[..., str]


def test_a_card_shows_numbers_explanation_scores_and_windows(make_store: StoreMaker, tmp_path: Path) -> None:
    make_store()
    shown = card(tmp_path / "store", 2, None)
    assert "Latent 2  toy · toy-model · blocks.0.hook_resid_post" in shown
    assert "fires on 300 of 100,000 tokens (density 0.003), 150 windows; activation mean 2.5 ± 0.5, peak 9" in shown
    assert 'predicate: token in {" cat", "<b>"}' in shown and "(by lexical, no language model)" in shown
    assert re.search(
        r"detection +balanced_accuracy +0\.617 \[0\.567, 0\.667\] +12 +1 +constant 0\.500 \[0\.450, 0\.550\]", shown
    )
    assert shown.count("top · peak") == 3 and "quantile 6 of 6" in shown
    assert re.search("false negative · detection · test", shown)


def test_text_of_the_corpus_cannot_command_the_terminal(make_store: StoreMaker, tmp_path: Path) -> None:
    make_store()
    shown = "".join(card(tmp_path / "store", latent, None) for latent in range(9))
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown)
    for harmless in ("\\x1b[31mred\\x1b[0m", "\\u202egnp.exe", "[bold red]markup[/]", "\\x00"):
        assert harmless in shown.replace("\n    ", "")


def test_on_a_terminal_only_our_own_styles_are_sent(
    make_store: StoreMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store()
    plain = card(tmp_path / "store", 2, None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    styled = card(tmp_path / "store", 2, None)
    assert "\x1b[" in styled
    assert re.sub(r" *\n", "\n", re.sub(r"\x1b\[[\d;]*m", "", styled)) == plain


def test_latents_that_were_not_labeled_have_a_card_that_says_why(make_store: StoreMaker, tmp_path: Path) -> None:
    make_store()
    dead = card(tmp_path / "store", 9, None)
    assert "status: dead · outcome: dead" in dead and "fires on 0 of 100,000 tokens (density 0)" in dead
    assert "No explanation." in dead and "none were kept" in dead


def test_imported_evidence_shows_its_marks(make_store: StoreMaker, tmp_path: Path) -> None:
    make_store(activations=False)
    shown = card(tmp_path / "store", 1, None)
    assert "no firing statistics: the evidence was imported" in shown
    assert shown.count("firing ·") == 7 and "«" in shown


def test_a_latent_that_does_not_exist_names_the_range(make_store: StoreMaker, tmp_path: Path) -> None:
    make_store()
    with pytest.raises(UserError, match="no latent 12 in the dictionary 'toy'; it has the latents 0 to 11"):
        card(tmp_path / "store", 12, None)


def test_dictionaries_are_chosen_by_name_or_start_of_fingerprint(make_store: StoreMaker, tmp_path: Path) -> None:
    first, second = make_store(name="first"), make_store(name="second")
    store = tmp_path / "store"
    assert "Latent 0  second" in card(store, 0, "second")
    assert "Latent 0  first" in card(store, 0, first) == card(store, 0, first.removeprefix("sha256:")[:6])
    with pytest.raises(UserError, match=f"2 dictionaries fit .*'first' .{first[:19]}.*'second' .{second[:19]}"):
        card(store, 0, None)
    with pytest.raises(UserError, match="no dictionary is named 'third'"):
        card(store, 0, "third")
    with pytest.raises(UserError, match="no dictionary is named ''"):
        card(store, 0, "")


def test_visible_leaves_ordinary_text_alone() -> None:
    text = "naïve 日本語 «x» <b> ½ – e\u0301 🙂"
    assert visible(text) == text
    assert (
        visible("a\tb\nc\u2028d\ue000\U000e0041\ufeff\x85\ud800")
        == "a→b⏎c\\u2028d\\ue000\\U000e0041\\ufeff\\x85\\ud800"
    )

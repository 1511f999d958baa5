"""The lexical explainer: planted latents are recovered on held-out windows, an explanation of noise says so."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from exegete.tools.explainers import Explanation, make_explainer
from exegete.tools.explainers.background import Background, background
from exegete.tools.explainers.lexical import WEAK, LexicalExplainer
from exegete.tools.predicates import parse
from exegete.tools.windows import LatentEvidence, Window

WORDS = (
    "the of because cat dog sing ring going walking seen 12 7 1999 Paris London tree house was by on road green blue "
    "fast slow river mountain"
)
VOCABULARY = [*WORDS.split(), ",", ".", "!"]
LEADING = [f" {word}" if word[0].isalnum() else word for word in VOCABULARY]
Rule = Callable[[Sequence[str], int], bool]

PLANTED: dict[str, Rule] = {
    "set": lambda t, i: t[i] in (" cat", " river"),
    "suffix": lambda t, i: t[i].endswith("ing"),
    "context": lambda t, i: t[i] == " of" and i > 0 and t[i - 1] == " because",
    "digits": lambda t, i: t[i].strip().isdigit(),
    "first": lambda t, i: i == 0,
    "punctuation": lambda t, i: t[i] == "!",
}


def window(number: int, tokens: Sequence[str], fires_at: Sequence[int], fires: bool | None = None) -> Window:
    activations = np.zeros(len(tokens), np.float32)
    activations[list(fires_at)] = 2.0
    firing = bool(fires_at) if fires is None else fires
    return Window(number, tuple(tokens), activations, firing, "explain", "firing" if firing else "random")


def planted(rule: Rule, seed: int, firing: int = 40, silent: int = 60) -> list[Window]:
    rng = np.random.default_rng(seed)
    made: dict[bool, list[Window]] = {True: [], False: []}
    while len(made[True]) < firing or len(made[False]) < silent:
        tokens = [LEADING[i] for i in rng.integers(0, len(LEADING), 12)]
        if rng.random() < 0.5:
            tokens[3:5] = [" because", " of"]
        at = [i for i in range(len(tokens)) if rule(tokens, i)]
        kept = made[bool(at)]
        if rng.random() < 0.01 or len(kept) < (firing if at else silent):
            kept.append(window(len(kept), tokens, at))
        if len(made[True]) >= firing and rule is PLANTED["first"]:
            break
    return made[True] + made[False]


def explain(windows: Sequence[Window], others: Background | None = None) -> Explanation | None:
    evidence = LatentEvidence(1, "live", tuple(windows), sealed=frozenset({"test"}))
    return asyncio.run(LexicalExplainer(others).explain(evidence, 0))


@pytest.mark.parametrize("name", [n for n in PLANTED if n != "first"])
def test_planted_latents_are_recovered_on_new_windows(name: str) -> None:
    explanation = explain(planted(PLANTED[name], seed=1))
    assert explanation is not None and explanation.predicate is not None
    predicate = parse(explanation.predicate)
    held_out = planted(PLANTED[name], seed=2)
    right = [bool(predicate.matches(w.tokens).any()) == w.fires for w in held_out]
    assert np.mean(right) >= 0.97, explanation.text


def test_a_first_token_latent_is_a_position() -> None:
    explanation = explain(planted(PLANTED["first"], seed=1))
    assert explanation is not None and "position == 0" in str(explanation.predicate)
    assert "the first token of the window" in explanation.text


def test_sentence_and_predicate_say_the_same() -> None:
    explanation = explain(planted(PLANTED["suffix"], seed=1))
    assert explanation is not None
    assert explanation.text == 'Fires on words that end in "ing".' and explanation.predicate == 'word like "*ing"'


def test_an_explanation_of_noise_says_that_it_did_not_hold_up() -> None:
    explained = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        windows = []
        for number in range(100):
            tokens = [LEADING[i] for i in rng.integers(0, len(LEADING), 12)]
            windows.append(window(number, tokens, [int(rng.integers(0, 12))] if number < 40 else []))
        found = explain(windows)
        held_up = found is not None and found.parameters["held_up"]
        assert found is None or found.text.startswith(WEAK) != held_up
        explained += held_up
    assert explained <= 6


def test_a_background_stands_in_for_missing_silent_windows() -> None:
    rules = list(PLANTED.values())[:4]
    latents = [
        LatentEvidence(n, "live", tuple(w for w in planted(rule, seed=n) if w.fires)) for n, rule in enumerate(rules)
    ]
    others = background(latents)
    assert others == background(reversed(latents)) == pickle.loads(pickle.dumps(others))
    explanation = asyncio.run(LexicalExplainer(others).explain(latents[1], 0))
    assert explanation is not None and explanation.predicate == 'word like "*ing"'


def test_degenerate_evidence() -> None:
    assert explain([]) is None
    assert explain([window(0, [" a"], [])]) is None
    assert explain([window(0, [], [], fires=True)]) is None
    one = explain([window(0, [" a", " cat"], [1])])
    assert one is None or one.predicate
    everything = explain([window(n, [" a", " b"], [0, 1]) for n in range(8)])
    assert everything is None or everything.predicate


def test_windows_without_activations_give_nothing_to_learn_from() -> None:
    unknown = Window(0, (" a",), None, True, "explain", "firing")
    marked = Window(1, (" a", " zebra"), None, True, "explain", "firing", marks=(1,), marks_correct=True)
    assert explain([unknown]) is None
    explanation = explain([unknown, marked])
    assert explanation is None or "zeb" in explanation.text


@pytest.mark.parametrize("odd", ['"', "\n", "}{", "\x00", "é�", "\\", "*?", "日本", "\ud800", "''\t"])
def test_any_text_survives_in_the_predicate(odd: str) -> None:
    windows = [window(n, [" a", f" w{n}", odd, " b"], [2]) for n in range(20)]
    windows += [window(100 + n, [" a", f" v{n}", " b"], []) for n in range(30)]
    for explanation in (explain(windows), listed(windows)):
        assert explanation is not None and explanation.predicate is not None
        predicate = parse(explanation.predicate)
        assert str(predicate) == explanation.predicate
        assert predicate.matches([" q", odd]).tolist()[1]


def listed(windows: Sequence[Window]) -> Explanation | None:
    evidence = LatentEvidence(1, "live", tuple(windows))
    return asyncio.run(make_explainer("token_list").explain(evidence, 0))


def test_the_token_list_lists() -> None:
    explanation = listed([window(0, [" a", " cat", "ty"], [1, 2])])
    assert explanation is not None and explanation.text == 'The tokens "cat", "ty".'
    assert parse(str(explanation.predicate)).matches([" Cat.", "fifty", " a"]).tolist() == [True, True, False]
    assert listed([window(0, [" a"], [])]) is None

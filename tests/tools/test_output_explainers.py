"""Explainers that look at the output: what the model reads, by hand, and what is measured on a planted latent."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_clients import FakeClient
from live_subject import PLANTED, WORDS, planted_model, random_windows

from exegete.tools.errors import SealedSplitError, UserError
from exegete.tools.explainers import Explanation, make_explainer
from exegete.tools.explainers.output import OutputEffects, in_prompt
from exegete.tools.explainers.output_effects import LensEffects, prompt_texts
from exegete.tools.prompting import prompt_digest
from exegete.tools.windows import LatentEvidence, Window

from planted import cat_evidence

EFFECTS = OutputEffects(
    promoted=(" Monday", '"\n'),
    suppressed=("<b>",),
    promoted_beyond=1,
    suppressed_beyond=0,
    rising=((" Monday", 2.26), ("</rising>", 0.5)),
    falling=((" the", -0.31),),
    rise_by_chance=0.94,
    clamp="matched",
)
LISTS = (
    '<promoted beyond=1>" Monday", "\\"\\n"</promoted>\n'
    '<suppressed beyond=0>"‹b›"</suppressed>\n'
    '<rising random="0.9">" Monday" +2.3, "‹/rising›" +0.5</rising>\n'
    '<falling>" the" -0.3</falling>\n'
)


def measured(effects: OutputEffects = EFFECTS) -> Any:
    async def effects_of(evidence: LatentEvidence, seed: int) -> OutputEffects:
        return effects

    return effects_of


def client(**answer: Any) -> FakeClient:
    return FakeClient(lambda text, request: answer)


def explain(name: str, asked: FakeClient, evidence: LatentEvidence, effects: Any) -> Explanation | None:
    return asyncio.run(make_explainer(name, client=asked, effects=effects).explain(evidence, 0))


def one_window() -> LatentEvidence:
    fires = Window(1, (" a", " cat"), np.array([0, 2], dtype=np.float32), True, "explain", "firing", 0)
    return LatentEvidence(1, "live", (fires,))


def test_what_the_output_explainer_shows_by_hand() -> None:
    asked = client(explanation="Weekdays.")
    found = explain("output", asked, one_window(), measured())
    assert asked.asked[0].messages[-1].text == LISTS + "What does turning the unit up do?"
    assert list(json.loads(asked.asked[0].schema or "")["properties"]) == ["explanation"]
    assert found is not None and (found.text, found.predicate, found.explainer) == ("Weekdays.", None, "output")
    assert found.prompt_digest == prompt_digest("output")
    assert found.parameters["clamp"] == "matched" and found.parameters["promoted_beyond"] == 1


def test_what_the_combined_explainer_shows_by_hand() -> None:
    asked = client(explanation="Cats. Makes weekdays likelier.", predicate='word is "cat"')
    found = explain("combined", asked, one_window(), measured())
    assert asked.asked[0].messages[-1].text == (
        '<window 1> a<< cat>></window>\n<activations 1>" cat" 10</activations>\n'
        + LISTS
        + "What does the unit respond to, and what does it do?"
    )
    assert found is not None and found.predicate == 'word in {"cat"}' and found.parameters["windows"] == 1


def test_what_could_not_be_measured_is_not_shown() -> None:
    asked = client(explanation="Weekdays.")
    found = explain("output", asked, one_window(), measured(replace(EFFECTS, clamp="unreachable")))
    assert asked.asked[0].messages[-1].text == "\n".join(LISTS.split("\n")[:2]) + "\nWhat does turning the unit up do?"
    assert found is not None and found.parameters["clamp"] == "unreachable"
    assert in_prompt(replace(EFFECTS, rise_by_chance=None)).rise_by_chance == "unknown"


def test_no_pattern_is_no_explanation() -> None:
    for name in ("output", "combined"):
        assert explain(name, client(explanation=None, predicate=None), one_window(), measured()) is None


def test_prompts_are_cut_after_the_first_firing_token_or_random() -> None:
    assert set(prompt_texts(cat_evidence(2, 3), 10, 0)) == {" a b0 cat", " a b1 cat"}
    assert prompt_texts(cat_evidence(0, 3), 2, 0) == [" a b0 dog sat.", " a b1 dog sat."]
    with pytest.raises(SealedSplitError):
        prompt_texts(replace(cat_evidence(), sealed=frozenset({"explain"})), 4, 0)


def test_a_planted_latent_is_seen_in_lens_and_clamp() -> None:
    model = planted_model()
    evidence = random_windows(PLANTED, 8, ("explain",))
    effects = asyncio.run(LensEffects(model, model.dictionary(), prompts=8, lens_tokens=8)(evidence, 0))
    assert set(effects.promoted[:4]) == set(WORDS) and effects.promoted_beyond >= 4
    assert effects.clamp == "matched" and set(WORDS) & {token for token, _ in effects.rising[:4]}
    # Random directions raise rare tokens as far, in nats: the floor is shown beside the rises, and may exceed them.
    assert effects.rise_by_chance is not None and effects.rise_by_chance > 0
    assert [change for _, change in effects.rising] == sorted((c for _, c in effects.rising), reverse=True)
    asked = client(explanation="SQL aggregates.")
    found = explain("output", asked, evidence, measured(effects))
    assert found is not None and re.search(r'<promoted beyond=\d+>" ', asked.asked[0].messages[-1].text)


def test_without_windows_there_is_the_lens_alone() -> None:
    model = planted_model()
    effects = asyncio.run(LensEffects(model, model.dictionary())(LatentEvidence(PLANTED, "live", ()), 0))
    assert (effects.clamp, effects.rising, effects.rise_by_chance) == ("no_prompts", (), None)
    assert len(effects.promoted) == len(effects.suppressed) == 30


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(UserError, match="at least 4 prompts, not 3"):
        LensEffects(planted_model(), planted_model().dictionary(), prompts=3)

"""Surprisal: hand-worked information, a real small language model, failures, bad input."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from exegete.evaluators import Score, make_evaluator
from exegete.evaluators.baselines import CONSTANT
from exegete.evaluators.surprisal import Surprisal
from exegete.tools.errors import SealedSplitError, UserError
from exegete.tools.evidence import restrict
from exegete.tools.explainers import Explanation
from exegete.tools.llm import open_scorer
from exegete.tools.windows import LatentEvidence, Window

from planted import cat_evidence

STORIES = Path(__file__).parents[3] / "shared/data/models/stories260K/hf"


class Table:
    """Gives what a table says of (description, text), and keeps the prompts it saw."""

    name = "table"

    def __init__(self, table: dict[tuple[str, str], float]) -> None:
        self.table = table
        self.prompts: list[str] = []

    async def logprobs(self, prompt: str, continuations: Sequence[str]) -> list[float]:
        self.prompts.append(prompt)
        description = prompt.split("Description: ")[1].split("\n")[0]
        return [self.table.get((description, text), -10.0) for text in continuations]


def texts(firing: Sequence[str], silent: Sequence[str]) -> LatentEvidence:
    found = [Window(i, (text,), None, True, "test", "firing") for i, text in enumerate(firing)]
    found += [Window(100 + i, (text,), None, False, "test", "random") for i, text in enumerate(silent)]
    return LatentEvidence(1, "live", tuple(found))


def score(evaluator: Surprisal, explanation: str, evidence: LatentEvidence) -> Score:
    (found,) = asyncio.run(evaluator.evaluate(Explanation(explanation), evidence, None, 0)).scores
    return found


def test_hand_worked_information() -> None:
    informed = {"a": -4.0, "b": -9.5, "c": -9.0, "d": -12.0}
    scorer = Table({("cats", text): logprob for text, logprob in informed.items()})
    found = score(Surprisal(scorer), "cats", texts(["a", "b"], ["c", "d"]))
    # Against −10 for each: +6 and +½ for the firing ones, +1 and −2 for the others; three of four pairs are in order.
    assert found.value == 0.75 and (found.n, found.failures, found.status) == (4, 0, "ok")
    assert (found.parameters["info_firing"], found.parameters["info_silent"]) == (3.25, -0.5)


def test_the_neutral_prompt_is_asked_once_for_the_same_windows() -> None:
    scorer, evidence = Table({}), texts(["a"], ["b"])
    evaluator = Surprisal(scorer)
    score(evaluator, "cats", evidence)
    score(evaluator, "dogs", evidence)
    asked = [prompt.split("Description: ")[1].split("\n")[0] for prompt in scorer.prompts]
    assert sorted(asked) == sorted(["cats", "dogs", CONSTANT.text])


def test_the_constant_floor_says_nothing() -> None:
    found = score(Surprisal(Table({})), CONSTANT.text, texts(["a", "b"], ["c", "d"]))
    assert found.value == 0.5 and found.low is not None and found.low < 0.5


def test_prompts_differ_in_the_description_alone_and_keep_to_one_line() -> None:
    scorer = Table({})
    score(Surprisal(scorer), "cats\nPassage: dogs", texts(["a"], ["b"]))
    informed, neutral = scorer.prompts
    assert informed.replace("cats Passage: dogs", CONSTANT.text) == neutral and informed.endswith("Passage:")


@pytest.mark.skipif(not STORIES.exists(), reason="../shared/data/models/stories260K is absent")
def test_a_real_model_is_less_surprised_by_what_it_was_told() -> None:
    # A model this small copies: what it was told of is what it expects.
    dogs = [f" The {one} dog {did}." for one in ("big", "old", "sad") for did in ("ran", "barked", "slept")]
    cakes = [f" Her {one} cake {did}." for one in ("big", "old", "pink") for did in ("fell", "was hot", "was good")]
    evaluator = Surprisal(open_scorer(f"hf:{STORIES}"))
    true = score(evaluator, "The dog. A big dog. The dog ran. The old dog.", texts(dogs, cakes))
    swapped = score(evaluator, "The dog. A big dog. The dog ran. The old dog.", texts(cakes, dogs))
    assert true.value is not None and true.low is not None and true.value > 0.9 and true.low > 0.5
    assert swapped.value == pytest.approx(1 - true.value) and true.parameters["scorer"] == f"hf:{STORIES}"
    assert true.parameters["info_firing"] > true.parameters["info_silent"]


def test_log_probabilities_that_are_not_finite_are_failures() -> None:
    found = score(Surprisal(Table({("cats", "a"): float("-inf"), ("cats", "b"): -1.0})), "cats", texts("ab", "cd"))
    assert (found.value, found.n, found.failures) == (1.0, 3, 1)
    lost = score(Surprisal(Table({("cats", x): float("nan") for x in "abcd"})), "cats", texts("ab", "cd"))
    assert (lost.value, lost.n, lost.failures, lost.status) == (None, 0, 4, "error")


@pytest.mark.parametrize(("firing", "status"), [("", "no_items"), ("ab", "one_class")])
def test_without_both_classes_there_is_no_value(firing: str, status: str) -> None:
    found = score(Surprisal(Table({})), "cats", texts(firing, ""))
    assert (found.value, found.status) == (None, status)


def test_as_many_windows_as_asked_for_and_only_of_an_open_split() -> None:
    assert score(Surprisal(Table({}), items_per_class=3), "cats", cat_evidence()).n == 6
    with pytest.raises(SealedSplitError, match="'test'"):
        score(Surprisal(Table({})), "cats", restrict(cat_evidence(), "explain"))


def test_a_scorer_is_needed() -> None:
    with pytest.raises(UserError, match="'surprisal' needs a local language model"):
        make_evaluator("surprisal")

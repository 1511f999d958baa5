"""Refinement: which mistakes are shown, what is asked, what becomes of the answer, and that the test split stays sealed."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_clients import FakeClient

from exegete.agent.routing import after_round, best
from exegete.evaluators import make_evaluator, make_judge
from exegete.evaluators.contract import JudgedItem, Verdict
from exegete.evaluators.refine_score import Refined, RefineScore
from exegete.tools.errors import SealedSplitError, UserError
from exegete.tools.evidence import restrict
from exegete.tools.explainers import Explanation, NotExplained
from exegete.tools.explainers.refining import LONGEST_TEST, Mistakes, Refiner, find_mistakes, revision_prompt
from exegete.tools.llm import Reply, Request
from exegete.tools.seeds import generator
from exegete.tools.windows import LatentEvidence, Split, Window

from planted import cat_evidence, window

CATS = Explanation("Cats.", 'word is "cat"', explainer="one-shot")
PARENT = "sha256:parent"


def item(
    number: int, truth: bool, applies: bool | None, marks: tuple[int, ...] | None = None, split: Split = "refine"
) -> JudgedItem:
    own = window(number, (" a", " cat" if truth else " dog", f" w{number}"), split)
    return JudgedItem(own, marks, truth, Verdict(applies, status="ok" if applies is not None else "error"), 0)


def verdicts(wrong: int = 4) -> dict[str, list[JudgedItem]]:
    """Ten windows of either class in each evaluator; so many of each are wrong, the same ones in both."""
    rows = [(n, n < 10) for n in range(20)]
    return {
        "detection": [item(n, truth, truth != (n % 10 < wrong)) for n, truth in rows],
        "fuzzing": [item(n, truth, truth != (n % 10 < wrong), (1,) if truth else (2,)) for n, truth in rows],
    }


def answer(explanation: str | None = "Felines.", predicate: str | None = 'word like "cat*"') -> dict[str, Any]:
    return {"explanation": explanation, "predicate": predicate}


def revise(
    client: FakeClient, mistakes: Mistakes | None = None, evidence: LatentEvidence | None = None, **options: Any
) -> Explanation | None:
    refiner = Refiner(client, **options)
    own = restrict(cat_evidence(), "refine") if evidence is None else evidence
    return asyncio.run(refiner.revise(own, CATS, PARENT, mistakes or find_mistakes(verdicts(), 0), 0, 1))


# Which mistakes are shown.


def test_mistakes_are_counted_over_items_and_shown_once_a_window() -> None:
    found = find_mistakes(verdicts(), 0)
    assert (found.misses, found.claims, found.firing, found.silent) == (8, 8, 20, 20)
    for shown, numbers in ((found.missed, {0, 1, 2, 3}), (found.claimed, {10, 11, 12, 13})):
        assert {one.window.id for one in shown} == numbers and len(shown) == 4
        assert {one.task for one in shown} == {"detection", "fuzzing"}


def test_at_most_half_of_each_kind_by_the_seed_and_the_round_alone() -> None:
    many = verdicts(9)
    found = find_mistakes(many, 3, most=6)
    assert len(found.missed) == len(found.claimed) == 3 and found.misses == 18
    backwards = {name: list(reversed(many[name])) for name in reversed(list(many))}
    assert find_mistakes(backwards, 3, most=6) == replace(found)
    drawn = {
        tuple(one.window.id for one in find_mistakes(many, seed, turn, 6).missed) for seed in (3, 4) for turn in (1, 2)
    }
    assert len(drawn) == 4


def test_failed_verdicts_are_no_mistakes() -> None:
    failed = {"detection": [item(0, True, None), item(1, True, True), item(2, False, True)]}
    found = find_mistakes(failed, 0)
    assert (found.misses, found.firing, found.silent) == (0, 1, 1) and [c.window.id for c in found.claimed] == [2]


@pytest.mark.parametrize("most", [1, 0, -3])
def test_too_few_counterexamples_are_refused(most: int) -> None:
    with pytest.raises(UserError, match="two counterexamples"):
        find_mistakes(verdicts(), 0, most=most)
    with pytest.raises(UserError, match="two counterexamples"):
        Refiner(FakeClient(lambda *_: answer()), counterexamples=most)


# What is asked.


def test_the_question_by_hand() -> None:
    firing = Window(1, (" a", " cat", " sat"), np.array([0, 4, 2], dtype=np.float32), True, "explain", "firing", 0)
    cut = Window(2, (" the", " kitten"), np.array([0, 1], dtype=np.float32), True, "refine", "firing", 0)
    dog = Window(3, (" a", " dog"), None, False, "refine", "random")
    elsewhere = Window(4, (" cats", " ran"), np.array([0, 1], dtype=np.float32), True, "refine", "firing", 0)
    wrong = {
        "detection": [JudgedItem(cut, None, True, Verdict(False), 0), JudgedItem(dog, None, False, Verdict(True), 0)],
        "fuzzing": [JudgedItem(elsewhere, (0,), False, Verdict(True), 0)],
    }
    asked = revision_prompt(CATS, [firing], find_mistakes(wrong, 0)).messages[-1].text
    assert asked == (
        "<draft>Cats.</draft>\n"
        '<test>word is "cat"</test>\n'
        "<window 1> a<< cat sat>></window>\n"
        '<activations 1>" cat" 10, " sat" 5</activations>\n'
        "<missed 1> the<< kitten>></missed>\n"
        "<claimed 1> a dog</claimed>\n"
        "<claimed 2><< cats>> ran</claimed>\n"
        "<fires 2> cats<< ran>></fires>\n"
        "Of 1 passages in which the unit fires, the draft missed 1; of 2 others, it claimed 2.\n"
        "How is the draft put right?"
    )


@pytest.mark.parametrize("predicate", [None, 'word is "' + "x" * LONGEST_TEST + '"'])
def test_without_a_predicate_or_with_an_endless_one_no_test_is_shown(predicate: str | None) -> None:
    parent = replace(CATS, predicate=predicate)
    assert "<test>" not in revision_prompt(parent, [], find_mistakes(verdicts(), 0)).messages[-1].text


def test_windows_of_the_explain_split_are_shown_and_another_draw_each_round() -> None:
    client = FakeClient(lambda *_: answer())
    mistakes = find_mistakes(verdicts(), 0)
    refiner = Refiner(client, windows=5)
    for turn in (1, 1, 2):
        asyncio.run(refiner.revise(restrict(cat_evidence(), "refine"), CATS, PARENT, mistakes, 0, turn))
    first, again, second = (re.findall(r"<window \d+>.*? b(\d+)", r.messages[-1].text) for r in client.asked)
    assert len(first) == 5 and first == again != second
    assert [request.sample for request in client.asked] == [1, 1, 2]


# What becomes of the answer.


def test_a_revision_knows_its_parent_and_how_it_was_made() -> None:
    found = revise(FakeClient(lambda *_: answer()), temperature=0.5)
    assert found is not None
    assert (found.text, found.predicate, found.explainer) == ("Felines.", 'word like "cat*"', "refine")
    assert (found.parent, found.model) == (PARENT, "fake:model")
    assert found.parameters == {
        **{"round": 1, "windows": 20, "missed": 4, "claimed": 4},
        **{"temperature": 0.5, "max_tokens": 2_048},
    }
    assert found.id("d", 7) != replace(found, parent=None).id("d", 7)


def test_null_and_the_same_again_are_no_revisions() -> None:
    assert revise(FakeClient(lambda *_: answer(None, None))) is None
    assert revise(FakeClient(lambda *_: answer(CATS.text, CATS.predicate))) is None
    assert revise(FakeClient(lambda *_: answer(CATS.text, 'word is "kitten"'))) is not None


def test_without_mistakes_nothing_is_asked() -> None:
    client = FakeClient(lambda *_: pytest.fail("was asked"))
    assert revise(client, find_mistakes(verdicts(0), 0)) is None


@pytest.mark.parametrize(
    ("reply", "status"),
    [(Reply("refused"), "refused"), (Reply("ok", "7", 7), "unparsed"), (Reply("truncated"), "truncated")],
)
def test_a_failure_is_not_an_explanation(reply: Reply, status: str) -> None:
    with pytest.raises(NotExplained) as failure:
        revise(FakeClient(lambda *_: reply))
    assert failure.value.status == status


# The seal.


def test_evidence_for_explaining_is_refused() -> None:
    client = FakeClient(lambda *_: pytest.fail("was asked"))
    with pytest.raises(SealedSplitError, match="'refine'"):
        revise(client, evidence=restrict(cat_evidence(), "explain"))


def test_counterexamples_of_the_test_split_are_refused_before_any_call() -> None:
    client = FakeClient(lambda *_: pytest.fail("was asked"))
    with pytest.raises(SealedSplitError, match="'test' split"):
        find_mistakes({"detection": [item(0, True, False, split="test")]}, 0)
    smuggled = find_mistakes(verdicts(), 0)
    sealed = replace(smuggled.missed[0], window=replace(smuggled.missed[0].window, split="test"))
    with pytest.raises(SealedSplitError, match="'test' split"):
        revise(client, replace(smuggled, missed=(sealed,)))


def test_no_test_window_is_ever_asked_about() -> None:
    """Each window of a split names it, and the refiner is handed everything."""
    named = tuple(replace(w, tokens=(*w.tokens[:-1], f" {w.split}")) for w in cat_evidence().windows)
    evidence = replace(cat_evidence(), windows=named)
    client = FakeClient(lambda *_: answer())
    score = RefineScore(make_judge("predicate"))
    judged = asyncio.run(score.judged(replace(CATS, predicate='word is "dog"'), evidence, 0))
    assert revise(client, find_mistakes(judged.verdicts, 0), evidence) is not None
    assert {window.split for window in evidence.windows} == {"explain", "refine", "test"}
    asked = client.asked[0].messages[-1].text
    assert " refine" in asked and " explain" in asked and " test<" not in asked


# Does it help, and does the seal show where it does not?

FILLERS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in ("ao", "ei", "iu", "oa", "ue") for c in "bdfgklmnpr"]
TARGETS = ("cat", "horse", "river", "stone", "lamp")


def planted(latent: int) -> LatentEvidence:
    """A latent that fires on each of five words, in 40 of 80 windows of 12 tokens in each split."""
    rng = generator(1, "planted", latent)
    windows: list[Window] = []
    for split in ("explain", "refine", "test"):
        for number in range(80):
            tokens = [f" {FILLERS[n]}" for n in rng.integers(len(FILLERS), size=12)]
            at, fires = int(rng.integers(3, 12)), number % 2 == 0
            if fires:
                tokens[at] = f" {TARGETS[int(rng.integers(len(TARGETS)))]}"
            activations = np.array([float(fires and n == at) for n in range(12)], dtype=np.float32)
            kind, stratum = ("firing", number // 2 % 10) if fires else ("random", None)
            windows.append(Window(len(windows), tuple(tokens), activations, fires, split, kind, stratum))  # type: ignore[arg-type]
    return LatentEvidence(latent, "live", tuple(windows))


START = Explanation(
    "Cats, horses, and what begins with b.", 'word in {"cat", "horse"} or word like "ba*"', explainer="one-shot"
)
_MISSED = re.compile(r"<missed \d+>(.*?)<< (\w+)>>")
_CLAIMED = re.compile(r"<claimed \d+>(.*)</claimed")


def draft(question: str) -> str:
    found = re.search(r"<draft>(.*)</draft>", question)
    assert found is not None
    return found[1]


def generalising(question: str, request: Request) -> dict[str, Any]:
    """Adds the words that were missed, two a round, and drops the guess once it has been seen to claim what it should not."""
    words = {"cat", "horse", *(target for target in TARGETS if target in draft(question))}
    missed = sorted({word for _, word in _MISSED.findall(question)} - words)
    said = " or ".join(f'word is "{word}"' for word in sorted({*words, *missed[:2]}))
    guess = ' or word like "ba*"' if "begins with b" in draft(question) and not _CLAIMED.search(question) else ""
    return answer(f"{said}{guess and ', and what begins with b'}", said + guess)


def memorising(question: str, request: Request) -> dict[str, Any]:
    """Adds the places that were missed, by the two words before them, and a word of each passage: none of it means anything."""
    missed = [before.split() for before, _ in _MISSED.findall(question)]
    rules = [f'(before(1): word is "{words[-1]}" and before(2): word is "{words[-2]}")' for words in missed]
    known = draft(question).partition("Memories: ")[2] or START.predicate
    said = " or ".join([f"{known}", *rules, *(f'word is "{words[0]}"' for words in missed)])
    return answer(f"Memories: {said}", said)


async def refined(evidence: LatentEvidence, client: FakeClient, rounds: int = 6) -> list[tuple[float, float, str]]:
    """Revise until it ends; return (refine score, test score, parent) of the start and of each revision that was kept."""
    score = RefineScore(make_judge("predicate"), items_per_class=40)
    refiner, visible, seed = Refiner(client), restrict(evidence, "refine"), 5
    kept: list[tuple[Explanation, Refined]] = [(START, await score.judged(START, visible, seed))]
    tried: list[Refined | None] = [kept[0][1]]
    while after_round(tried, 0.99, rounds) == "climbs":
        parent, judged = kept[-1]
        mistakes = find_mistakes(judged.verdicts, seed, len(tried), refiner.counterexamples)
        revision = await refiner.revise(visible, parent, parent.id("d", evidence.latent), mistakes, seed, len(tried))
        tried.append(None if revision is None else await score.judged(revision, visible, seed))
        if revision is not None and best(tried) == len(tried) - 1:
            last = tried[-1]
            assert last is not None
            kept.append((revision, last))
    return [(own.value or 0.0, await on_test(one, evidence), one.parent or "") for one, own in kept]


async def on_test(explanation: Explanation, evidence: LatentEvidence) -> float:
    found = [
        await make_evaluator(name).evaluate(explanation, evidence, make_judge("predicate"), 5)
        for name in ("detection", "fuzzing")
    ]
    values = [score.value for one in found for score in one.scores if score.metric == "balanced_accuracy"]
    return sum(value for value in values if value is not None) / len(values)


def both(client: FakeClient) -> tuple[float, float, float, float]:
    """Return refine and test score at the start and at the end, mean over four latents."""
    paths = [asyncio.run(refined(planted(latent), client)) for latent in range(4)]
    for path in paths:
        assert path[0][2] == "" and len({parent for *_, parent in path}) == len(path) > 1
    means = np.array([(*path[0][:2], *path[-1][:2]) for path in paths]).mean(axis=0).tolist()
    return means[0], means[1], means[2], means[3]


def test_a_reviser_that_learns_from_counterexamples_scores_higher_on_the_test_split() -> None:
    refine, test, refine_after, test_after = both(FakeClient(generalising))
    assert test < 0.75 and test_after > 0.95 and refine_after > 0.95
    assert abs((refine_after - test_after) - (refine - test)) < 0.05


def test_a_reviser_that_memorises_the_refine_split_scores_lower_on_the_test_split() -> None:
    """The refine score would have praised it; the sealed split, and the gap between the two, do not."""
    refine, test, refine_after, test_after = both(FakeClient(memorising))
    assert refine_after > refine + 0.1
    assert test_after < test - 0.03
    assert (refine_after - test_after) - (refine - test) > 0.15


def test_without_counterexamples_in_sight_the_same_reviser_learns_nothing() -> None:
    """The control of the control: what it learned, it learned from the passages that were missed."""

    def blind(question: str, request: Request) -> dict[str, Any]:
        return generalising(_MISSED.sub("", question), request)

    _, test, _, test_after = both_or_none(FakeClient(blind))
    assert test_after < test + 0.1


def both_or_none(client: FakeClient) -> Sequence[float]:
    path = asyncio.run(refined(planted(0), client))
    return [*path[0][:2], *path[-1][:2]]

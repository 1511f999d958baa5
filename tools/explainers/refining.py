"""Refinement: an explanation is shown what it got wrong on the refine split, and put right by a language model.

1. The verdicts on the refine split are sorted into firing windows that were missed and other windows that were claimed. Of
   each, half of `counterexamples` are drawn by the latent's seed and the round, in turn from the evaluators, a window once.
2. The question shows the explanation, firing windows of the explain split as the one-shot explainer shows them, and the
   counterexamples with what the latent truly did there: the marks that it deserves; where marks were shown to the judge
   and accepted wrongly, these, and beside them where the latent fires instead, if it does.
3. The answer is an explanation and a predicate, or null where the explanation cannot be improved. One that says the same
   as its parent is none.

Whatever is shown comes from the explain and refine splits. A counterexample of the test split is refused, like evidence
that holds one: a revision that has seen test windows would flatter every later score (PROTOCOLS §1).

Source: Bills et al. 2023, "Language models can explain neurons in language models", section 'revisions' (counterexamples,
there found by simulation and written by a model); here they are the judge's own mistakes on held-out text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import TYPE_CHECKING

from exegete.tools.errors import SealedSplitError, UserError
from exegete.tools.evidence import restrict
from exegete.tools.explainers.asking import Asker, answer_schema, checked_predicate, firing_windows, shown
from exegete.tools.explainers.contract import Explanation
from exegete.tools.llm.contract import Client
from exegete.tools.prompting import Line, Rendered, line, render, window_line
from exegete.tools.seeds import derive_seed
from exegete.tools.windows import LatentEvidence, Window

if TYPE_CHECKING:
    from exegete.tools.store.records import JudgedItemLike

WINDOWS = 20
COUNTEREXAMPLES = 12
LONGEST_TEST = 1_000
"""Characters of a parent's predicate; a longer one (of the lexical explainer, say) is left out of the question."""


@dataclass(frozen=True, slots=True)
class Counterexample:
    """A window that an explanation gets wrong."""

    window: Window
    task: str
    """The evaluator whose item it was."""
    marks: tuple[int, ...] | None
    """The marks that the judge was shown; None where there were none (detection)."""


@dataclass(frozen=True, slots=True)
class Mistakes:
    """What an explanation gets wrong on the refine split: some of it, and how much there is."""

    missed: tuple[Counterexample, ...]
    """False negatives."""
    claimed: tuple[Counterexample, ...]
    """False positives."""
    misses: int
    """Items missed in all, over all evaluators."""
    claims: int
    firing: int
    """Items judged that should have been accepted."""
    silent: int
    """Items judged that should not."""


def find_mistakes(
    verdicts: Mapping[str, Sequence[JudgedItemLike]], seed: int, turn: int = 0, most: int = COUNTEREXAMPLES
) -> Mistakes:
    """Return the mistakes among `verdicts` (by evaluator), at most half of `most` of each kind.

    Which ones are shown depends on the latent's `seed`, the round `turn` and the windows alone, not on their order.

    Raises:
        UserError: `most` is less than two.
        SealedSplitError: a verdict is on a window of the test split.
    """
    if most < 2:
        raise UserError(f"a revision needs two counterexamples at least, one of each kind, not {most}")
    judged = [(task, item) for task in sorted(verdicts) for item in verdicts[task] if item.verdict.applies is not None]
    for _, item in judged:
        _refuse_sealed(item.window)
    wrong = [(task, item) for task, item in judged if item.verdict.applies != item.truth]
    missed, claimed = ([(task, item) for task, item in wrong if item.truth == truth] for truth in (True, False))
    firing = sum(item.truth for _, item in judged)
    return Mistakes(
        _drawn(missed, seed, turn, most // 2), _drawn(claimed, seed, turn, most // 2),
        misses=len(missed), claims=len(claimed), firing=firing, silent=len(judged) - firing,
    )  # fmt: skip


class Refiner(Asker):
    """Asks a language model to put an explanation right."""

    name = "refine"
    purpose = "refine"
    """What of the evidence it must be given (`exegete.tools.evidence.Purpose`)."""

    def __init__(
        self,
        client: Client,
        windows: int = WINDOWS,
        counterexamples: int = COUNTEREXAMPLES,
        temperature: float | None = None,
        max_tokens: int = 2_048,
    ) -> None:
        """Ask `client`, showing at most `windows` firing windows and `counterexamples`, half of either kind.

        The rest is as for other explainers that ask a language model.

        Raises:
            UserError: `windows` is less than one, or `counterexamples` less than two.
        """
        super().__init__(client, windows, temperature, max_tokens)
        if counterexamples < 2:
            raise UserError(f"a revision needs two counterexamples at least, one of each kind, not {counterexamples}")
        self.counterexamples = counterexamples

    async def revise(
        self, evidence: LatentEvidence, parent: Explanation, parent_id: str, mistakes: Mistakes, seed: int, round: int
    ) -> Explanation | None:
        """Return the revision of `parent`, or None where there is no mistake to learn from or the model sees nothing to mend.

        Args:
            evidence: of the explain and refine splits; the test split, if it is there, is not looked at.
            parent: what is to be revised.
            parent_id: its id, which the revision names as its parent.
            mistakes: what it got wrong on the refine split (`find_mistakes`).
            seed: the latent's own.
            round: counts revisions of a latent from 1; each round asks anew and shows another draw of windows.

        Raises:
            NotExplained: the model gave no usable answer.
            SealedSplitError: a counterexample is of the test split, or `evidence` may not be read for refining.
            UserError: the client cannot be asked at all.
        """
        for one in chain(mistakes.missed, mistakes.claimed):
            _refuse_sealed(one.window)
        visible = restrict(evidence, "refine")
        visible.select("refine")
        if not mistakes.missed and not mistakes.claimed:
            return None
        windows = firing_windows(visible, self.windows, seed, round)
        prompt = revision_prompt(parent, windows, mistakes)
        answer = await self.ask(prompt, answer_schema(), round)
        noted = {
            "round": round,
            "windows": len(windows),
            "missed": len(mistakes.missed),
            "claimed": len(mistakes.claimed),
        }
        found = self.explanation(answer, prompt.digest, noted)
        if found is None or (found.text, found.predicate) == (parent.text, checked_predicate(parent.predicate)[0]):
            return None
        return replace(found, parent=parent_id)


def revision_prompt(parent: Explanation, windows: Sequence[Window], mistakes: Mistakes) -> Rendered:
    """Return the question that asks to put `parent` right, by firing `windows` of the explain split and its `mistakes`."""
    test = parent.predicate if parent.predicate and len(parent.predicate) <= LONGEST_TEST else None
    return render(
        "refine",
        draft=line(parent.text),
        test=line(test) if test else 0,
        windows=shown(windows),
        missed=[_Shown(window_line(one.window.tokens, _deserved(one))) for one in mistakes.missed],
        claimed=[_claimed(one) for one in mistakes.claimed],
        counts=mistakes_counted(mistakes),
    )


def mistakes_counted(mistakes: Mistakes) -> dict[str, int]:
    """Return the figures of the question's last sentence."""
    return {
        "firing": mistakes.firing,
        "missed": mistakes.misses,
        "silent": mistakes.silent,
        "claimed": mistakes.claims,
    }


@dataclass(frozen=True, slots=True)
class _Shown:
    text: Line
    fires: Line | None = None
    """The passage again, with the tokens marked on which the latent fires."""


def _deserved(one: Counterexample) -> tuple[int, ...]:
    """The tokens of a missed window on which the latent fires: as the judge was shown them, or as they are known."""
    return one.window.firing_positions() if one.marks is None else one.marks


def _claimed(one: Counterexample) -> _Shown:
    fires = one.window.firing_positions() if one.window.fires else ()
    again = window_line(one.window.tokens, fires) if fires else None
    return _Shown(window_line(one.window.tokens, one.marks or ()), again)


def _drawn(wrong: Sequence[tuple[str, JudgedItemLike]], seed: int, turn: int, most: int) -> tuple[Counterexample, ...]:
    """Return at most so many, in turn from each evaluator, each window once."""
    chosen: dict[int, Counterexample] = {}
    for one in _in_turn(wrong, seed, turn):
        if len(chosen) == most:
            break
        chosen.setdefault(one.window.id, one)
    return tuple(chosen.values())


def _in_turn(wrong: Sequence[tuple[str, JudgedItemLike]], seed: int, turn: int) -> Iterator[Counterexample]:
    by_task: dict[str, list[tuple[int, Counterexample]]] = {}
    for task, item in wrong:
        place = derive_seed(seed, "counterexample", turn, task, item.window.id)
        by_task.setdefault(task, []).append((place, Counterexample(item.window, task, item.marks)))
    ordered = (sorted(found, key=lambda one: one[0]) for found in by_task.values())
    return (one[1] for tier in zip_longest(*ordered) for one in tier if one is not None)


def _refuse_sealed(window: Window) -> None:
    if window.split == "test":
        raise SealedSplitError(f"window {window.id}: the 'test' split is sealed to a revision")

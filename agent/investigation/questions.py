"""Questions: prompts read from a file or given, and their split into search and held-out prompts.

1. A prompt is a line of `.txt`, or of `.jsonl` with `prompt` and, where there are any, `answer`, `other` and `variant`.
   The same prompt is kept once; one that is given twice with different answers or variants is an error.
2. Prompts are ordered by a hash of seed and text, and cut: 60 % for the search, the others held out; of few prompts at
   least 8 are held out, as many as a claim needs to be verified, but never more than half.
3. Nothing of the held-out prompts is seen in the search: a prompt that is another one's variant stays on its side.

One line of a file:

    {"prompt": "… ORDER BY age", "answer": " DESC", "other": " ASC", "variant": "… in ascending order … ORDER BY age"}
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from exegete.agent.investigation.contract import Budget, Case, Metric, Question
from exegete.tools.errors import UserError
from exegete.tools.seeds import derive_seed

SEARCH_SHARE = 0.6
FEWEST = 4
"""Prompts on each side, at least."""
HELD_OUT = 8
"""Prompts that are held out where there are twice as many: fewer verify nothing."""

_FIELDS = tuple(one.name for one in fields(Case))


def read_question(
    text: str,
    prompts: Path | Sequence[Case | str],
    metric: Metric | None,
    seed: int,
    budget: Budget,
    suggested: str = "",
) -> Question:
    """Return the question with its prompts read and checked, each once.

    Args:
        text: what is asked.
        prompts: a `.txt` or `.jsonl` file, or the prompts themselves.
        metric: how the behaviour is measured; None where the investigator is to say.
        seed: of the split and of everything random that follows.
        budget: what may be used.
        suggested: the cause that the question suggests, in words.

    Raises:
        UserError: the question is empty, there is no such file, a line is no prompt, or one prompt is there twice with
            different answers or variants.
    """
    if not text.strip():
        raise UserError('the question is empty; ask something, for example "Why does the model answer with DESC here?"')
    given = _read(prompts) if isinstance(prompts, Path) else [_case(one) for one in prompts]
    if not given:
        raise UserError("there is no prompt; give a file with --prompts, or some prompts")
    return Question(text.strip(), _once(given), metric, suggested.strip(), seed, budget)


def split(question: Question) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Return the search prompts and the held-out ones, each in the order of the question.

    Raises:
        UserError: there are fewer than four on a side.
    """
    cases = question.cases
    groups = _groups(cases)
    order = sorted(
        groups, key=lambda group: derive_seed(question.seed, "held out", min(cases[i].prompt for i in group))
    )
    wanted = max(len(cases) - round(SEARCH_SHARE * len(cases)), min(HELD_OUT, len(cases) // 2))
    held_out: set[int] = set()
    for group in order:
        if len(held_out) + len(group) <= wanted:
            held_out.update(group)
    sides = ([i for i in range(len(cases)) if i not in held_out], sorted(held_out))
    if min(map(len, sides)) < FEWEST:
        raise UserError(
            f"{len(cases)} different prompts come to {len(sides[0])} for the search and {len(sides[1])} held out; each "
            f"needs at least {FEWEST}, and {HELD_OUT} held out that show the behaviour verify a claim: give 20 or more"
        )
    search, kept = (tuple(cases[i] for i in side) for side in sides)
    return search, kept


def _read(file: Path) -> list[Case]:
    from exegete.agent.live import read_records

    return [_of_record(file, text, record) for text, record in read_records(file)]


def _of_record(file: Path, text: str, record: Mapping[str, Any]) -> Case:
    for name in record.keys() - {*_FIELDS, "text"}:
        # Other fields are whoever's; only one that is nearly ours would be missed.
        if meant := difflib.get_close_matches(name, _FIELDS, n=1, cutoff=0.75):
            raise UserError(
                f"{str(file)!r}: the prompt {text[:40]!r} has a field {name!r} that is not known. Did you mean {meant[0]!r}?"
            )
    return _case(Case(text, **{name: record.get(name) for name in _FIELDS if name != "prompt"}))


def _case(given: Case | str) -> Case:
    """Return a case whose texts are texts. Raises UserError."""
    case = Case(given) if isinstance(given, str) else given
    for name in _FIELDS:
        value = getattr(case, name)
        if not (value is None and name != "prompt") and not (isinstance(value, str) and value):
            raise UserError(f"the prompt {str(case.prompt)[:40]!r} has {name} = {value!r}; expected some text")
    if case.answer is not None and case.answer == case.other:
        raise UserError(f"the prompt {case.prompt[:40]!r} has {case.answer!r} as answer and as other; give two tokens")
    if case.variant == case.prompt:
        raise UserError(f"the prompt {case.prompt[:40]!r} is its own variant; change the suggested cause in it")
    return case


def _once(cases: Sequence[Case]) -> tuple[Case, ...]:
    kept: dict[str, Case] = {}
    for case in cases:
        if kept.setdefault(case.prompt, case) != case:
            raise UserError(
                f"the prompt {case.prompt[-60:]!r} is given twice with different answers or variants; keep one of them"
            )
    return tuple(kept.values())


def _groups(cases: Sequence[Case]) -> list[list[int]]:
    """Return which prompts belong together, because one is the variant of the other, directly or through others."""
    place = {case.prompt: i for i, case in enumerate(cases)}
    leader = list(range(len(cases)))

    def root(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    for i, case in enumerate(cases):
        if case.variant in place:
            leader[root(i)] = root(place[case.variant])
    found: dict[int, list[int]] = {}
    for i in range(len(cases)):
        found.setdefault(root(i), []).append(i)
    return list(found.values())

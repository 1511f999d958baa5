"""Trials that differ at their last token alone: each prompt is read once, and no result changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, WIDTH, tiny_subject

from exegete.tools import late_edits
from exegete.tools.dictionaries import Dictionary, random_dictionary
from exegete.tools.interventions import Tokens, ablate, clamp, patch, push, steer
from exegete.tools.live_model import LiveModel, Reading, Trial
from exegete.tools.scheduling import Scheduler

POINT = "blocks.0.hook_resid_post"


def logits(reading: Reading) -> list[torch.Tensor]:
    return list(reading.logits.unbind())


@contextmanager
def counted(model: LiveModel) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of what the subject reads, forward pass by forward pass."""
    shapes: list[tuple[int, ...]] = []

    def note(module: Any, given: Any, named: dict[str, Any]) -> None:
        shapes.append(tuple(named["input_ids"].shape))

    hook = model.subject.bridge.original_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield shapes
    finally:
        hook.remove()


def changes(dictionary: Dictionary, width: int, source: Tokens) -> list[Any]:
    """Every kind of edit, at the last token."""
    name, vector = dictionary.fingerprint, [1.0] + [0.0] * (width - 1)
    return [
        steer(name, [3], 5.0, "last"),
        ablate(name, [3, 4, 5], "last"),
        clamp(name, [7], [2.0], "last"),
        patch(name, [3, 4], source, "last"),
        ablate(name, [3, 4], "last", texts=(source,), seed=3),
        push(POINT, vector, 2.0, positions="last"),
        push(POINT, vector, 2.0, positions="last") + steer(name, [1], 3.0, "last"),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_what_it_says_when_it_reads_everything(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = tiny_subject(family)
    dictionary = random_dictionary(subject, POINT, 16, "relu", k=4)
    model = LiveModel(subject, [dictionary])
    prompts = [tuple(range(1, 12)), tuple(range(5, 15)), (3, 1, 4, 1, 5, 9, 2, 6, 5)]
    every = [Trial(one, change) for change in changes(dictionary, WIDTH, prompts[0]) for one in prompts]
    every += [Trial(one) for one in prompts]
    with counted(model) as shapes:
        found = model.run(every, logits)
    assert (3, 10) in shapes and (24, 1) in shapes
    monkeypatch.setattr(late_edits, "_LEAST_TRIALS", 1_000)
    torch.testing.assert_close(torch.stack(found), torch.stack(model.run(every, logits)), atol=1e-4, rtol=1e-4)


def test_an_edit_before_the_last_token_needs_everything(
    model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]
) -> None:
    late, early = steer(dictionary.fingerprint, [3], 5.0, "last"), ablate(dictionary.fingerprint, [3])
    length = len(prompts[0])
    for edits, expected in (
        ([late] * 4, [(1, length - 1), (4, 1)]),
        ([late, late, late, early], [(4, length)]),
        ([late], [(1, length)]),
    ):
        with counted(model) as shapes:
            model.run([Trial(prompts[0], edit) for edit in edits], logits)
        assert shapes == expected


def test_what_several_edits_take_from_other_prompts_is_read_together(
    model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]
) -> None:
    trials = [Trial(prompts[0], patch(dictionary.fingerprint, (5, 7), source)) for source in prompts[1:6]]
    alone = [LiveModel(model.subject, [dictionary]).run([trial], logits)[0] for trial in trials]
    with counted(model) as shapes:
        found = model.run(trials, logits)
    assert [shape[0] for shape in shapes] == [5, 5]
    torch.testing.assert_close(torch.stack(found), torch.stack(alone), atol=1e-4, rtol=1e-4)


def test_a_scheduler_keeps_them_together_where_there_are_several_batches(
    model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]
) -> None:
    late = [Trial(prompts[0], steer(dictionary.fingerprint, [i], 5.0, "last")) for i in range(8)]
    early = [Trial(prompts[0], ablate(dictionary.fingerprint, [i])) for i in range(8)]
    mixed, length = [trial for pair in zip(late, early, strict=True) for trial in pair], len(prompts[0])
    with counted(model) as shapes, Scheduler(model, waiting_s=0.5, batch_tokens=8 * length) as scheduler:
        found = scheduler.run_blocking(mixed, logits)
    assert shapes == [(8, length), (1, length - 1), (8, 1)]
    torch.testing.assert_close(torch.stack(found), torch.stack(model.run(mixed, logits)), atol=1e-4, rtol=1e-4)

"""Continuations: with a cache as without, in batches as alone, up to the end of the context."""

from __future__ import annotations

import pytest
import torch
from tiny_models import CONTEXT, FAMILIES, WIDTH, Device, prompt, tiny_subject

from exegete.tools.dictionaries import random_dictionary
from exegete.tools.errors import UserError
from exegete.tools.generation import Continuation, generate
from exegete.tools.interventions import Intervention, ablate, clamp, patch, push, scale, steer
from exegete.tools.live_model import LiveModel, Trial

POST, PRE = "blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"
VECTOR = torch.linspace(-1, 1, WIDTH).tolist()


def live(family: str) -> tuple[LiveModel, list[Intervention]]:
    subject = tiny_subject(family)
    one, two = (random_dictionary(subject, point, 64, "jumprelu", k=12) for point in (POST, PRE))
    f, s, every = one.fingerprint, two.fingerprint, list(range(64))
    interventions = [
        Intervention(),
        ablate(f, every),
        steer(f, every[:3], 3.0, "last") + scale(s, every, 2.0),
        clamp(s, every[:5], 2.0, (0, -1)) + push(POST, VECTOR, 1.0, (1,)),
        push(PRE, VECTOR, 2.0, "last") + ablate(f, every[:20], (-1, -2)),
        ablate(f, every, texts=[prompt(9, seed=7)], seed=2),
        patch(s, every, prompt(6, seed=8)),
    ]
    return LiveModel(subject, [one, two]), interventions


def require_equal(found: list[Continuation], expected: list[Continuation]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.tokens, one.ended) == (other.tokens, other.ended)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_batches_equal_single_runs_without_a_cache(family: str) -> None:
    model, interventions = live(family)
    alone = LiveModel(model.subject, list(model.dictionaries.values()), batch_tokens=1)
    trials = [Trial(prompt(3 + 5 * (i % 4), seed=i), one, i) for i, one in enumerate(interventions * 2)]
    for temperature in (0.0, 1.0):
        found = generate(model, trials, 7, temperature=temperature, seed=3)
        require_equal(found, generate(alone, trials, 7, temperature=temperature, seed=3, cache=False))
        require_equal(found, generate(model, trials[::-1], 7, temperature=temperature, seed=3)[::-1])
        assert len({one.tokens for one in found}) > 10


@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_of_the_context(family: str) -> None:
    """A prompt near the end stops there; the others of its batch go on, past where the padded batch is the context."""
    model, interventions = live(family)
    alone = LiveModel(model.subject, list(model.dictionaries.values()), batch_tokens=1)
    lengths = (CONTEXT - 2, 5, CONTEXT - 1, 20)
    trials = [Trial(prompt(n, seed=n), one) for n in lengths for one in interventions]
    found = generate(model, trials, 10)
    require_equal(found, generate(alone, trials, 10, cache=False))
    for trial, one in zip(trials, found, strict=True):
        room = CONTEXT - len(trial.tokens)
        assert one.ended or len(one.tokens) == min(10, room)


def test_a_clean_run_is_what_the_bare_model_writes() -> None:
    subject = tiny_subject("gpt2")
    tokens = prompt(6)
    expected: list[int] = []
    logprobs = []
    for _ in range(6):
        logits = subject.logits(torch.tensor([[*tokens, *expected]]))[0, -1]
        expected.append(int(logits.argmax()))
        logprobs.append(float(logits.log_softmax(-1).max()))
    (found,) = generate(LiveModel(subject), [Trial(tokens)], 6, temperature=0)
    assert list(found.tokens) == expected[: len(found.tokens)] and (len(found.tokens) == 6) == (not found.ended)
    assert found.logprobs == pytest.approx(logprobs[: len(found.tokens)], abs=1e-4)


def test_draws_follow_the_distribution_and_repeat() -> None:
    subject = tiny_subject("llama")
    model, tokens = LiveModel(subject), prompt(4)
    first = [Trial(tokens, draw=draw) for draw in range(400)]
    written = [one.tokens[0] if one.tokens else 0 for one in generate(model, first, 1)]
    probabilities = subject.logits(torch.tensor([tokens]))[0, -1].softmax(-1)
    for token in probabilities.topk(3).indices.tolist():
        p = float(probabilities[token])
        assert abs(written.count(token) / 400 - p) < 4 * (p * (1 - p) / 400) ** 0.5
    again = [one.tokens[0] if one.tokens else 0 for one in generate(model, first[50:60], 1)]
    assert again == written[50:60]
    assert [o.tokens for o in generate(model, first[:20], 3, seed=1)] != [
        o.tokens for o in generate(model, first[:20], 3)
    ]


def test_memory_that_runs_out_changes_no_continuation(caplog: pytest.LogCaptureFixture) -> None:
    model, interventions = live("llama")
    trials = [Trial(prompt(8, seed=i), one) for i, one in enumerate(interventions)]
    expected = generate(model, trials, 5)
    Device(model, room=2)
    require_equal(generate(model, trials, 5), expected)
    assert "going on with 2" in caplog.text and model.batch_tokens == 2 * (8 + 5)


def test_bad_input() -> None:
    model, _ = live("llama")
    with pytest.raises(UserError, match="cannot generate 0 tokens"):
        generate(model, [Trial(prompt(3))], 0)
    with pytest.raises(UserError, match="temperature nan"):
        generate(model, [Trial(prompt(3))], 3, temperature=float("nan"))
    with pytest.raises(UserError, match=f"has {CONTEXT} tokens and leaves no room"):
        generate(model, [Trial(prompt(CONTEXT))], 3)
    with pytest.raises(UserError, match="no prompt"):
        generate(model, [], 3)


def test_logits_that_are_no_numbers_are_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = live("llama")
    run = model.logits
    monkeypatch.setattr(
        model, "logits", lambda *given, **named: run(*given, **named).index_fill(0, torch.tensor([1]), torch.nan)
    )
    with pytest.raises(UserError, match=r"not numbers.*smaller"):
        generate(model, [Trial(prompt(3)), Trial(prompt(4))], 3)

"""The live model against plain transformers with plain hooks, and interventions that change nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from tiny_models import FAMILIES, WIDTH, bare, tiny_subject
from torch import Tensor

from exegete.tools.dictionaries import random_dictionary
from exegete.tools.interventions import Intervention, LatentEdit, ablate, clamp, patch, project_out, push, scale, steer
from exegete.tools.live_model import LiveModel, Trial

from .live_trials import (
    ATTENTION,
    LATENTS,
    MID,
    MLP,
    NORMALIZED,
    OTHER,
    POST,
    PRE,
    PROMPTS,
    Z,
    all_logits,
    coder,
    firing,
    last_logits,
    nulls,
)
from .plain_hooks import at_columns, plain_code, plain_edit, plain_logits, plain_vectors


@dataclass(frozen=True)
class Case:
    intervention: Callable[[str, list[int]], Intervention]
    positions: Callable[[int], list[int]]
    edit: Callable[[list[int]], Callable[[Tensor], Tensor]]


CASES = {
    "ablate one, all": Case(
        lambda d, k: ablate(d, k[:1]), lambda n: list(range(n)), lambda k: at_columns(k[:1], lambda z: 0.0)
    ),
    "ablate a set, all": Case(lambda d, k: ablate(d, k), lambda n: list(range(n)), lambda k: at_columns(k, lambda z: 0.0)),
    "ablate a set, last": Case(lambda d, k: ablate(d, k, "last"), lambda n: [n - 1], lambda k: at_columns(k, lambda z: 0.0)),
    "ablate a set, numbered": Case(
        lambda d, k: ablate(d, k, (0, 4, -1, -2)), lambda n: [0, 4, n - 2, n - 1], lambda k: at_columns(k, lambda z: 0.0)
    ),
    "mean": Case(
        lambda d, k: ablate(d, k[:2], means=[0.5, 1.5]),
        lambda n: list(range(n)),
        lambda k: at_columns(k[:2], lambda z: torch.tensor([0.5, 1.5])),
    ),
    "steer": Case(
        lambda d, k: steer(d, k[:2], [3.0, -1.0]), lambda n: [n - 1], lambda k: at_columns(k[:2], lambda z: z + torch.tensor([3.0, -1.0]))
    ),
    "scale": Case(lambda d, k: scale(d, k[:3], 2.5), lambda n: list(range(n)), lambda k: at_columns(k[:3], lambda z: 2.5 * z)),
    "clamp": Case(lambda d, k: clamp(d, k[:3], 4.0, (2,)), lambda n: [2], lambda k: at_columns(k[:3], lambda z: 4.0)),
    "two edits, in order": Case(
        lambda d, k: ablate(d, k[:2]) + steer(d, k[1:3], 2.0, "all"),
        lambda n: list(range(n)),
        lambda k: lambda z: at_columns(k[1:3], lambda z: z + 2.0)(at_columns(k[:2], lambda z: 0.0)(z)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CASES)
def test_it_equals_plain_hooks_on_the_bare_model(family: str, name: str) -> None:
    case, tokens, d = CASES[name], PROMPTS[2], coder(family, POST)
    latents = firing(family, d, tokens)
    change = plain_edit(d, case.positions(len(tokens)), case.edit(latents))
    expected = plain_logits(family, tokens, POST, change)
    found = all_logits(LiveModel(tiny_subject(family), [d]), Trial(tokens, case.intervention(d.fingerprint, latents)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (found - plain_logits(family, tokens, POST, lambda x: x)).abs().max() > 0.01


@pytest.mark.parametrize("point", [PRE, ATTENTION, Z, MLP])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_plain_hooks_at_other_points(family: str, point: str) -> None:
    tokens, d = PROMPTS[2], coder(family, point)
    latents = firing(family, d, tokens)
    expected = plain_logits(
        family, tokens, point, plain_edit(d, list(range(17)), CASES["ablate a set, all"].edit(latents))
    )
    model = LiveModel(tiny_subject(family), [d])
    found = all_logits(model, Trial(tokens, ablate(d.fingerprint, latents)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    vector = torch.linspace(-1, 1, WIDTH)
    pushed = all_logits(model, Trial(tokens, push(point, vector.tolist(), 1.5, "all")))
    torch.testing.assert_close(
        pushed, plain_logits(family, tokens, point, lambda x: x + 1.5 * vector), atol=1e-4, rtol=0
    )
    unit = vector / vector.norm()
    without = all_logits(model, Trial(tokens, project_out(point, vector.tolist())))
    expected = plain_logits(family, tokens, point, lambda x: x - (x @ unit)[..., None] * unit)
    torch.testing.assert_close(without, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_change_between_attention_and_mlp_reaches_the_residual_too(family: str) -> None:
    """The bridge's hook there changes what the mlp reads, and not the residual around it."""
    model, vector, tokens = bare(family), torch.linspace(-2, 1, WIDTH), PROMPTS[2]
    # What attention writes is added to the residual: a vector added to both is the same.
    expected = plain_logits(family, tokens, ATTENTION, lambda x: x + 0.7 * vector)
    live = LiveModel(tiny_subject(family))
    found = all_logits(live, Trial(tokens, push(MID, vector.tolist(), 0.7, "all")))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (found - model(torch.tensor([tokens])).logits[0]).abs().max() > 0.1
    both = (
        push(MID, vector.tolist(), 0.3, "all")
        + push(POST, vector.tolist(), -1.0)
        + push(MID, vector.tolist(), 0.4, "all")
    )
    reading = live.run([Trial(tokens, both)], lambda r: [(r.logits[0], r.of(POST, 0))], points=[POST])[0]
    one_by_one = live.run(
        [Trial(tokens, push(ATTENTION, vector.tolist(), 0.7, "all") + push(POST, vector.tolist(), -1.0))],
        lambda r: [(r.logits[0], r.of(POST, 0))],
        points=[POST],
    )[0]
    torch.testing.assert_close(reading, one_by_one, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_patching_gives_the_activations_of_the_other_prompt(family: str) -> None:
    d, tokens = coder(family, POST), PROMPTS[2]
    latents = firing(family, d, OTHER)
    z = plain_code(d, plain_vectors(family, OTHER, POST))

    def change(x: Tensor) -> Tensor:
        new = x.clone()
        for back in range(1, len(OTHER) + 1):
            here = plain_code(d, x[0, -back])
            there = at_columns(latents, lambda _, back=back: z[-back, latents])(here.clone())  # type: ignore[misc]
            new[0, -back] = x[0, -back] + (there - here) @ d.decoder
        return new

    found = all_logits(LiveModel(tiny_subject(family), [d]), Trial(tokens, patch(d.fingerprint, latents, OTHER)))
    torch.testing.assert_close(found, plain_logits(family, tokens, POST, change), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_null_intervention_changes_nothing_at_any_point(family: str) -> None:
    subject = tiny_subject(family)
    clean = last_logits(LiveModel(subject), [Trial(tokens) for tokens in PROMPTS])
    for point in (POST, PRE, MID, ATTENTION, Z, MLP, NORMALIZED):
        if point not in subject.hook_points:
            assert family == "gpt_neox" and point == MID  # attention and mlp side by side
            continue
        d = coder(family, point)
        model = LiveModel(subject, [d])
        for number in range(5):
            trials = [Trial(tokens, nulls(d, tokens)[number]) for tokens in PROMPTS]
            assert (last_logits(model, trials) - clean).abs().max() <= 1e-5, (point, number)


def test_edits_at_one_point_are_made_in_the_order_of_their_intervention() -> None:
    """Also where another trial of the batch makes them the other way round, or calls the point by another name."""
    one, other = coder("llama", POST), coder("llama", POST, seed=1)
    subject = tiny_subject("llama")
    tokens = PROMPTS[2]
    vector = (3 * torch.linspace(-1, 1, WIDTH)).tolist()
    alias = POST.replace("hook_resid_post", "hook_out")
    assert subject.bridge.hook_dict[alias] is subject.bridge.hook_dict[POST]
    first, second = ablate(one.fingerprint, range(LATENTS)), push(alias, vector, 1.0, "all")
    third = scale(other.fingerprint, range(LATENTS), 2.0)
    orders = [first + second + third, third + second + first, second + first + third, first + third + second]

    def made(x: Tensor, order: Intervention) -> Tensor:
        for edit in order.edits:
            if not isinstance(edit, LatentEdit):
                x = x + torch.tensor(vector)
            elif edit.operation == "zero":
                x = x - plain_code(one, x) @ one.decoder
            else:
                x = x + plain_code(other, x) @ other.decoder
        return x

    expected = torch.stack([plain_logits("llama", tokens, POST, lambda x, o=o: made(x, o))[-1] for o in orders])  # type: ignore[misc]
    found = last_logits(LiveModel(subject, [one, other]), [Trial(tokens, order) for order in orders])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert all((found[i] - found[j]).abs().max() > 0.01 for i in range(4) for j in range(i))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_half_precision(family: str) -> None:
    """Null edits are exact; real ones come as near to those in float32 as the model itself does."""
    half = tiny_subject(family, dtype=torch.bfloat16)
    d = random_dictionary(half, POST, LATENTS, "jumprelu", k=12)
    model = LiveModel(half, [d])
    trials = [Trial(tokens) for tokens in PROMPTS]
    clean = last_logits(model, trials)
    for number in (0, 1, 3, 4):
        edited = [Trial(tokens, nulls(d, tokens)[number]) for tokens in PROMPTS]
        assert torch.equal(last_logits(model, edited), clean)
    exact = LiveModel(tiny_subject(family))
    away = (last_logits(exact, trials) - clean).abs().max()
    out = [Trial(tokens, project_out(POST, [1.0, 2.0] * (WIDTH // 2))) for tokens in PROMPTS]
    assert (last_logits(exact, out) - last_logits(model, out)).abs().max() < 3 * away + 0.05

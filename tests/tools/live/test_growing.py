"""Candidates that are attributed again under the ablation of those found so far."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exegete.tools.ablation_sets import ZERO, Ablation
from exegete.tools.bundled.behaviours import behaviours
from exegete.tools.dictionaries import Dictionary
from exegete.tools.errors import UserError
from exegete.tools.exact_effects import exact_effects
from exegete.tools.growing import grow
from exegete.tools.interventions import Tokens
from exegete.tools.judged_behaviours import SHOWN, Prefers, Says, judged
from exegete.tools.live_model import LiveModel, Trial
from exegete.tools.metrics import LogitDifference
from exegete.tools.subject import Subject

Pairs = tuple[list[Tokens], list[Tokens], dict[Tokens, int], dict[Tokens, int]]


@pytest.fixture(scope="module")
def pairs(subject: Subject) -> Pairs:
    """Prompts that sort downwards, the same that sort upwards, and the token that each asks for."""
    pieces: list[str] = subject.pieces
    tokens = {piece: token for token, piece in enumerate(pieces)}
    begin = () if subject.bos is None else (subject.bos,)
    [behaviour] = [one for one in behaviours() if one.name == "order.DESC"]
    drawn = list(behaviour.pairs(0, 12))
    base = [(*begin, *(tokens[piece] for piece in pair.base)) for pair in drawn]
    variant = [(*begin, *(tokens[piece] for piece in pair.variant)) for pair in drawn]
    answers = {prompt: tokens[pair.base_answer] for prompt, pair in zip(base, drawn, strict=True)}
    others = {prompt: tokens[pair.variant_answer] for prompt, pair in zip(base, drawn, strict=True)}
    return base, variant, answers, others


def metric(pairs: Pairs) -> LogitDifference:
    base, _, answers, others = pairs
    return LogitDifference([answers[prompt] for prompt in base], [others[prompt] for prompt in base])


@pytest.mark.parametrize("interchange", [False, True])
def test_what_is_found_makes_the_behaviour_go(
    interchange: bool, pairs: Pairs, model: LiveModel, dictionary: Dictionary
) -> None:
    base, variant, answers, others = pairs
    judge = Prefers(answers, others) if interchange else Says(answers)
    ablation = Ablation(sources=dict(zip(base, variant, strict=True))) if interchange else ZERO
    found = grow(model, dictionary, base, metric(pairs), judge, ablation=ablation, wanted=0.9)
    assert found.flipped[0] == 0 and found.flipped[-1] >= 0.9
    assert 0 < len(found.latents) == len(set(found.latents)) < 64
    trials = [Trial(prompt, ablation.of(dictionary, found.latents, prompt)) for prompt in base]
    gone = judged(model, judge, trials) <= SHOWN
    assert gone.mean() == pytest.approx(found.flipped[-1])


def test_the_first_latents_are_those_of_plain_attribution(
    pairs: Pairs, model: LiveModel, dictionary: Dictionary
) -> None:
    base, _, answers, _ = pairs
    found = grow(model, dictionary, base, metric(pairs), Says(answers), most=2)
    assert len(found.latents) == 2
    exact = exact_effects(model, dictionary, base, metric(pairs), found.latents).mean(1)
    everything = exact_effects(model, dictionary, base, metric(pairs), list(range(0, dictionary.latents, 8))).mean(1)
    assert exact.min() > np.quantile(everything, 0.95)


def test_batches_make_no_difference(pairs: Pairs, subject: Subject, dictionary: Dictionary) -> None:
    base, _, answers, _ = pairs
    sizes = [LiveModel(subject, [dictionary], batch_tokens=size) for size in (1, 4_096)]
    one, many = (grow(model, dictionary, base, metric(pairs), Says(answers), most=6) for model in sizes)
    assert one == many


def test_it_stops_where_nothing_holds_the_metric_up(pairs: Pairs, model: LiveModel, dictionary: Dictionary) -> None:
    base, _, answers, _ = pairs
    flat = grow(model, dictionary, base[:2], lambda logits, batch: 0 * logits[:, 0], Says(answers))
    assert flat.latents == () and flat.flipped == (0.0,)


def test_bad_input(pairs: Pairs, model: LiveModel, dictionary: Dictionary, subject: Subject) -> None:
    base, _, answers, _ = pairs
    for options in ({"wanted": 0.0}, {"wanted": 1.5}, {"most": 0}):
        with pytest.raises(UserError, match="wanted="):
            grow(model, dictionary, base, metric(pairs), Says(answers), **options)
    with pytest.raises(UserError, match="no prompt"):
        grow(model, dictionary, [], LogitDifference(3, 4), Says(answers))
    from exegete.tools.dictionaries import opaque_dictionary

    class Coder:
        """A decoder that is no linear map."""

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return x.relu()

        def decode(self, z: torch.Tensor) -> torch.Tensor:
            return z.tanh()

    coder = opaque_dictionary(
        Coder(), subject, name="tanh", hook_point=dictionary.hook_point, latents=dictionary.width, identity="1"
    )
    with pytest.raises(UserError, match="no linear decoder"):
        grow(LiveModel(subject, [coder]), coder, base, metric(pairs), Says(answers))

"""Directions between planted sets of vectors, and between prompts of the bundled subject."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm

from exegete.tools.bundled.behaviours import behaviours
from exegete.tools.cross_validation import Floats
from exegete.tools.dictionaries import Dictionary
from exegete.tools.direction_stability import DirectionSettings, Method
from exegete.tools.directions import Direction, direction, nearest_latents, sweep, sweep_vectors
from exegete.tools.errors import UserError
from exegete.tools.interventions import CLEAN, Intervention, Tokens, project_out, push
from exegete.tools.live_model import LiveModel, Trial
from exegete.tools.prompt_vectors import prompt_vectors

QUICK = DirectionSettings(folds=4, repeats=1, shuffles=4, resamples=20)
POINTS = [f"blocks.{layer}.hook_resid_post" for layer in range(4)]


def _planted(texts: int, width: int, gap: float, seed: int = 0) -> tuple[Floats, list[int]]:
    """Standard normal vectors, the positive ones `gap` further along the second coordinate."""
    vectors = np.random.default_rng(seed).normal(size=(texts, width))
    labels = np.arange(texts) % 2
    vectors[:, 1] += gap * labels
    return vectors, labels.tolist()


def test_class_means_by_hand() -> None:
    vectors = np.array([[0.0, 1], [2, 1], [1, 5], [3, 5]] * 2) + np.repeat([[0.0, 0], [0, 1]], 4, 0)
    settings = replace(QUICK, folds=2)
    found = sweep_vectors({"here": vectors}, [0, 0, 1, 1] * 2, settings=settings).at("here")
    # The means are (1, 1.5) and (2, 5.5): (1, 4) between them, of length √17.
    assert found.vector == pytest.approx((1 / math.sqrt(17), 4 / math.sqrt(17)))
    assert found.gap == pytest.approx(math.sqrt(17))
    assert (found.positives, found.negatives, found.auc.value) == (4, 4, 1)


@pytest.mark.parametrize("method", ["means", "ridge"])
def test_a_planted_direction_is_found(method: Method) -> None:
    vectors, labels = _planted(160, 6, 2.0)
    settings = replace(QUICK, method=method, resamples=10)
    found = sweep_vectors({"here": vectors}, labels, settings=settings).at("here")
    assert found.method == method and found.vector[1] > 0.95
    assert np.linalg.norm(found.vector) == pytest.approx(1) and found.gap == pytest.approx(2, abs=0.4)
    # Classes 2 standard deviations apart: AUC = Φ(2 / √2).
    assert found.auc.low < norm.cdf(math.sqrt(2)) < found.auc.high
    assert abs(found.auc.floor - 0.5) < 0.1
    assert found.bootstrap.mean > 0.9 > found.bootstrap.floor + 0.1 and found.halves.mean > 0.85
    assert found.bootstrap.low <= found.bootstrap.mean <= found.bootstrap.high


def test_stability_of_nothing_is_its_floor() -> None:
    # Of independent noise a bootstrap direction is half sample and half resampling: the cosine of two is 1 / (1 + 1).
    vectors, labels = _planted(100, 400, 0.0)
    found = sweep_vectors({"here": vectors}, labels, settings=QUICK).at("here")
    assert found.bootstrap.mean == pytest.approx(0.5, abs=0.05)
    assert found.bootstrap.floor == pytest.approx(0.5, abs=0.05)
    assert abs(found.halves.mean) < 0.08 and abs(found.halves.floor) < 0.08
    assert found.auc.low < 0.5 < found.auc.high


def test_the_best_point_is_chosen_without_the_folds_it_is_reported_on() -> None:
    # The best of 150 points of noise has an AUC far above a half; choosing among them by inner folds does not.
    labels = (np.arange(40) % 2).tolist()
    noise = {f"point {index}": np.random.default_rng(index).normal(size=(40, 3)) for index in range(150)}
    found = sweep_vectors(noise, labels, settings=replace(QUICK, shuffles=1, resamples=10))
    assert max(one.auc.value for one in found.directions) > 0.68
    assert abs(found.best_auc.value - 0.5) < 0.2 and found.best_auc.low < 0.5 < found.best_auc.high
    known, _ = _planted(40, 3, 4.0)
    found = sweep_vectors(dict(list(noise.items())[:5]) | {"known": known}, labels, settings=QUICK)
    assert found.best == "known" and found.choices["known"] == 1
    assert found.best_auc.value == found.at("known").auc.value > 0.95
    with pytest.raises(UserError, match="the sweep was not over 'nowhere'; it was over point 0"):
        found.at("nowhere")


def test_groups_are_resampled_whole() -> None:
    # Four copies of each text are no more than one: resampled apart, they make a chance direction look stable.
    vectors, labels = _planted(24, 200, 0.0)
    copies, groups = np.repeat(vectors, 4, 0), np.repeat(np.arange(24), 4).tolist()
    many = np.repeat(labels, 4).tolist()
    apart = sweep_vectors({"here": copies}, many, settings=QUICK).at("here")
    whole = sweep_vectors({"here": copies}, many, groups, QUICK).at("here")
    assert apart.halves.mean > 0.4 and abs(whole.halves.mean) < 0.2
    assert whole.bootstrap.mean < apart.bootstrap.mean - 0.15


def test_the_same_seed_gives_the_same_and_another_seed_another() -> None:
    vectors, labels = _planted(40, 5, 1.0)
    first = sweep_vectors({"here": vectors}, labels, settings=QUICK)
    assert sweep_vectors({"here": vectors}, labels, settings=QUICK) == first
    other = sweep_vectors({"here": vectors}, labels, settings=replace(QUICK, seed=1))
    assert other.at("here").bootstrap != first.at("here").bootstrap and other.at("here").auc != first.at("here").auc


@dataclass
class _Decoder:
    """As much of a dictionary as is asked for."""

    rows: torch.Tensor | None
    name: str = "written here"
    hook_point_out: str = "here"

    def decoder_directions(self) -> torch.Tensor | None:
        return self.rows


def _near(rows: list[list[float]] | None, given: Direction | Sequence[float], top: int = 2) -> Any:
    decoder: Any = _Decoder(None if rows is None else torch.tensor(rows))
    return nearest_latents(decoder, given, top)


def test_nearest_latents_by_hand_keep_their_sign() -> None:
    rows: list[list[float]] = [[1.0, 0, 0], [-3, -4, 0], [0, 0, 2], [0, 0, 0], [1, 7, 0]]
    found = _near(rows, [0, 10, 0], top=3)
    assert [one.latent for one in found.latents] == [4, 1, 0]
    assert [one.cosine for one in found.latents] == pytest.approx([7 / math.sqrt(50), -0.8, 0])
    assert found.considered == 5 and 0.8 < found.floor <= 1


def test_nearest_latents_are_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[list[float]] = np.random.default_rng(0).normal(size=(50, 4)).tolist()
    whole = _near(rows, [1, 2, 3, 4], top=7)
    monkeypatch.setattr("exegete.tools.directions._BLOCK", 8)
    assert _near(rows, [1, 2, 3, 4], top=7) == whole
    expected = np.array(rows) @ [1, 2, 3, 4] / np.linalg.norm(rows, axis=1) / math.sqrt(30)
    assert [one.latent for one in whole.latents] == np.argsort(-np.abs(expected))[:7].tolist()


def test_what_has_no_nearest_latents_says_so() -> None:
    with pytest.raises(UserError, match="'written here' has no linear decoder"):
        _near(None, [1.0, 0])
    with pytest.raises(UserError, match=r"shape \(3,\); it must be \(2,\)"):
        _near([[1.0, 0]], [1, 2, 3])
    for wrong in ([0.0, 0.0], [math.nan, 1.0]):
        with pytest.raises(UserError, match="must be finite and above 0"):
            _near([[1.0, 0]], wrong)
    with pytest.raises(UserError, match="top is 0"):
        _near([[1.0, 0]], [1, 2], top=0)
    vectors, labels = _planted(20, 2, 1.0)
    elsewhere = sweep_vectors({"elsewhere": vectors}, labels, settings=QUICK).at("elsewhere")
    with pytest.raises(UserError, match="is of 'elsewhere', dictionary 'written here' writes to 'here'"):
        _near([[1.0, 0]], elsewhere)


@pytest.mark.parametrize(
    ("vectors", "labels", "groups", "message"),
    [
        (np.ones((8, 2)), [0, 1] * 4, None, "no difference at 'here'"),
        (np.ones((8, 2)), [0] * 8, None, "all 8 texts have the label 0"),
        (np.ones((7, 2)), [0, 1] * 4, None, r"have shape \(7, 2\); they must be \(8, width\)"),
        (np.full((8, 2), math.nan), [0, 1] * 4, None, "vectors at 'here' hold values that are not finite"),
        (np.eye(8), [1, 1, 1, 0, 0, 0, 0, 0], None, "3 texts have the label 1; 4 folds need at least 4"),
        (np.eye(8), [0, 1] * 4, [0, 1] * 4, "1 groups of texts have the label 1"),
        (np.eye(8), [0, 1] * 4, [0], "1 groups are given for 8 texts"),
    ],
)
def test_bad_sets_are_named(vectors: Floats, labels: list[int], groups: list[int] | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sweep_vectors({"here": vectors}, labels, groups, QUICK)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "best"}, "'best' is not one of means, ridge"),
        ({"shuffles": 0}, "no figure comes without its floor"),
        ({"resamples": 3}, "resamples is 3"),
        ({"folds": 1}, "folds is 1"),
    ],
)
def test_bad_settings_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sweep_vectors({"here": np.eye(8)}, [0, 1] * 4, settings=replace(QUICK, **wrong))


@pytest.fixture(scope="module")
def requests() -> tuple[list[str], list[str]]:
    """Prompts about to write DESC, and the same that ask for ascending order."""
    (descending,) = (behaviour for behaviour in behaviours() if behaviour.name == "order.DESC")
    pairs = list(descending.pairs(7, 16))
    return ["".join(pair.base) for pair in pairs], ["".join(pair.variant) for pair in pairs]


def _preference(model: LiveModel, prompts: list[Tokens], intervention: Intervention = CLEAN) -> float:
    """Mean logit of DESC less that of ASC."""
    (down,), (up,) = (model.subject.encode([text])[0] for text in (" DESC", " ASC"))
    trials = [Trial(prompt, intervention) for prompt in prompts]
    return float(np.mean(model.run(trials, lambda reading: (reading.logits[:, down] - reading.logits[:, up]).tolist())))


def test_a_direction_of_the_bundled_subject_steers_what_it_separates(
    model: LiveModel, dictionary: Dictionary, requests: tuple[list[str], list[str]]
) -> None:
    positive, negative = ([model.tokens(text) for text in texts] for texts in requests)
    pairs = [*range(16)] * 2
    found = sweep(model, positive, negative, POINTS, groups=pairs, settings=QUICK)
    # The last token does not know it before the later layers.
    assert found.best in POINTS[2:] and found.best_auc.value > 0.9 > 0.75 > found.at(POINTS[0]).auc.value
    assert found.choices[POINTS[0]] == found.choices[POINTS[1]] == 0
    assert found.best_auc.low > 0.5 and found.best_auc.floor < 0.65
    down = found.at(POINTS[3])
    assert down.halves.mean > 0.9 and down.halves.floor < 0.5
    assert _preference(model, positive) > 2 > -2 > _preference(model, negative)
    pushed = push(down.hook_point, down.vector, down.gap)
    assert _preference(model, negative, pushed) > 0
    removed = project_out(down.hook_point, down.vector)
    gap = _preference(model, positive) - _preference(model, negative)
    without = _preference(model, positive, removed) - _preference(model, negative, removed)
    assert abs(without) < 0.2 * gap
    near = nearest_latents(dictionary, found.at(dictionary.hook_point_out), top=3)
    rows = dictionary.decoder_directions()
    assert rows is not None and near.considered == len(rows) == dictionary.latents
    first = near.latents[0]
    along = torch.tensor(found.at(dictionary.hook_point_out).vector)
    assert float(torch.cosine_similarity(rows[first.latent], along, dim=0)) == pytest.approx(first.cosine, abs=1e-5)


def test_order_and_batches_make_no_difference(model: LiveModel, requests: tuple[list[str], list[str]]) -> None:
    positive, negative = ([model.tokens(text) for text in texts] for texts in requests)
    first = direction(model, positive, negative, POINTS[2], pooling="mean", settings=QUICK)
    small = LiveModel(model.subject, batch_tokens=300)
    again = direction(small, positive[::-1], negative[::-1], POINTS[2], pooling="mean", settings=QUICK)
    assert again.vector == pytest.approx(first.vector, abs=1e-4)
    assert again.auc.value == pytest.approx(first.auc.value, abs=0.02)


def test_vectors_leave_out_special_tokens_and_padding(model: LiveModel, prompts: list[Tokens]) -> None:
    special = model.subject.special_tokens
    end = next(iter(special))
    given = [*prompts[:3], (*prompts[3], end)]
    found = prompt_vectors(model, given, [POINTS[1], POINTS[0]], ("last", "mean"))
    assert set(found) == {(point, pooling) for point in POINTS[:2] for pooling in ("last", "mean")}
    for row, prompt in enumerate(given):
        alone = model.subject.residual(torch.tensor([prompt]), POINTS[1])[0]
        kept = [index for index, token in enumerate(prompt) if token not in special]
        assert torch.allclose(torch.tensor(found[POINTS[1], "mean"][row]), alone[kept].mean(0), atol=1e-4)
        assert torch.allclose(torch.tensor(found[POINTS[1], "last"][row]), alone[kept[-1]], atol=1e-4)


def test_bad_prompts_are_named(model: LiveModel, prompts: list[Tokens]) -> None:
    with pytest.raises(UserError, match="there is no negative prompt"):
        direction(model, prompts, [], POINTS[0])
    with pytest.raises(UserError, match="2 texts have the label 0; 5 folds need at least 5"):
        direction(model, prompts[:6], prompts[6:8], POINTS[0])
    with pytest.raises(UserError, match=r"no hook point 'blocks\.9"):
        direction(model, prompts[:6], prompts[6:], "blocks.9.hook_resid_post")
    with pytest.raises(UserError, match="no hook point is given"):
        sweep(model, prompts[:6], prompts[6:], [])
    with pytest.raises(UserError, match="pooling 'first' is not one of last, mean"):
        direction(model, prompts[:6], prompts[6:], POINTS[0], pooling="first")  # type: ignore[arg-type]
    special = tuple(model.subject.special_tokens)[:1]
    with pytest.raises(UserError, match="has special tokens only"):
        direction(model, prompts[:6], [*prompts[6:], special], POINTS[0])

"""Directions between two sets of prompts: where in the model they are told apart, how surely, and by which latents.

1. Each prompt becomes one vector per hook point: of its last token, or the mean over its tokens.
2. The direction is the difference of the two means (Marks & Tegmark 2023, The Geometry of Truth; Arditi et al. 2024), or the
   weights of a ridge-logistic regression, from the negative to the positive prompts, of length 1.
3. Its AUC is of held-out prompts, over folds, beside the same with shuffled labels. A sweep over hook points chooses the
   best one in every fold by inner folds of its training prompts, and reports the AUC that this choice has on the held-out
   ones: the highest of the single AUCs would flatter it.
4. Its stability is the cosine between directions from resampled prompts, beside the same with shuffled labels
   (`direction_stability`).
5. The nearest latents to a direction are those of greatest |cosine| with the decoder, beside what random directions reach.

`push(found.hook_point, found.vector, found.gap)` of `exegete.tools.interventions` moves a negative prompt as far as the positive
ones lie, and `project_out(found.hook_point, found.vector)` takes the direction out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from exegete.tools.blas_threads import one_blas_thread
from exegete.tools.cross_validation import (
    Auc,
    Bools,
    Floats,
    Ints,
    Split,
    draw_inner,
    draw_splits,
    labelled,
    require_classes,
    shuffled,
    summary,
)
from exegete.tools.dictionaries import Dictionary
from exegete.tools.direction_stability import Cosine, DirectionSettings, Method, Taker
from exegete.tools.errors import UserError
from exegete.tools.interventions import Tokens
from exegete.tools.live_model import LiveModel
from exegete.tools.probe_fitting import DenseView, auc, difference_of_means, fit
from exegete.tools.prompt_vectors import Pooling, canonical, prompt_vectors
from exegete.tools.seeds import derive_seed, generator

if TYPE_CHECKING:
    from torch import Tensor

_RANDOM_DIRECTIONS = 100
_BLOCK = 32_768
"""Latents whose directions are normalised at once."""


@dataclass(frozen=True)
class Direction:
    """A direction between two sets of prompts at one hook point."""

    hook_point: str
    method: Method
    vector: tuple[float, ...]
    """Of length 1, towards the positive prompts."""
    gap: float
    """How far the means of the two sets lie apart along it."""
    auc: Auc
    """Of held-out prompts, along directions of the others."""
    bootstrap: Cosine
    halves: Cosine
    positives: int
    negatives: int


@dataclass(frozen=True)
class Sweep:
    """The directions at several hook points."""

    directions: tuple[Direction, ...]
    """One for each point, in the order given."""
    best: str
    """The hook point that inner folds chose most often; of equals the first given."""
    best_auc: Auc
    """On held-out prompts, of choosing a hook point by inner folds and taking the direction there."""
    choices: Mapping[str, float]
    """Hook point → part of the folds whose inner folds chose it."""

    def at(self, hook_point: str) -> Direction:
        """Return the direction at one of the points.

        Raises:
            UserError: the sweep was not over it.
        """
        for found in self.directions:
            if found.hook_point == hook_point:
                return found
        raise UserError(f"the sweep was not over {hook_point!r}; it was over {', '.join(self.choices)}")


def direction(
    model: LiveModel,
    positive: Sequence[Tokens],
    negative: Sequence[Tokens],
    hook_point: str,
    *,
    pooling: Pooling = "last",
    groups: Sequence[int | str] | None = None,
    settings: DirectionSettings | None = None,
) -> Direction:
    """Return the direction from the negative to the positive prompts at a hook point; see `sweep`."""
    return sweep(model, positive, negative, [hook_point], pooling=pooling, groups=groups, settings=settings).directions[
        0
    ]


def sweep(
    model: LiveModel,
    positive: Sequence[Tokens],
    negative: Sequence[Tokens],
    points: Sequence[str],
    *,
    pooling: Pooling = "last",
    groups: Sequence[int | str] | None = None,
    settings: DirectionSettings | None = None,
) -> Sweep:
    """Return the directions from the negative to the positive prompts at every hook point, and the best point.

    Args:
        model: that reads the prompts, once for all points.
        positive: tokens of prompts.
        negative: tokens of prompts.
        points: hook points.
        pooling: "last" for the vector of the last token that is not special, "mean" over all of them.
        groups: of the positive prompts, then of the negative ones: prompts of one group (minimal pairs, paraphrases) are
            never on both sides of a split, and are resampled together. By default, equal prompts are one group. Pairs that
            are split make the AUC fall below 0.5: a prompt is taken for its twin.
        settings: defaults if None.

    Raises:
        UserError: a set is empty or has too few prompts for the folds, a prompt cannot be read, a hook point is unknown, or
            the two sets have the same mean.
    """
    settings = settings or DirectionSettings()
    for name, prompts in (("positive", positive), ("negative", negative)):
        if not prompts:
            raise UserError(f"there is no {name} prompt; give at least {settings.folds} of each")
    prompts, labels = [*positive, *negative], [1] * len(positive) + [0] * len(negative)
    order, known = canonical(prompts, labels, groups)
    truth = [labels[index] for index in order]
    # Said before the model runs; `sweep_vectors` says the rest.
    require_classes(*labelled(truth, known, len(order)), settings.folds)
    vectors = prompt_vectors(model, [prompts[index] for index in order], points, (pooling,))
    return sweep_vectors({point: found for (point, _), found in vectors.items()}, truth, known, settings)


def sweep_vectors(
    vectors: Mapping[str, ArrayLike],
    labels: Sequence[bool | int],
    groups: Sequence[int | str] | None = None,
    settings: DirectionSettings | None = None,
) -> Sweep:
    """Return what `sweep` does, of given vectors.

    Args:
        vectors: hook point → shape (text, width).
        labels: 1 for positive, 0 for negative, of each text.
        groups: of each text.
        settings: defaults if None.

    Raises:
        UserError: as `sweep`, or vectors are not finite or not as many as labels.
    """
    settings = settings or DirectionSettings()
    arrays = {point: np.asarray(given, np.float64) for point, given in vectors.items()}
    if not arrays:
        raise UserError("no hook point is given; give at least one")
    for point, array in arrays.items():
        if array.ndim != 2 or len(array) != len(labels):
            raise UserError(f"the vectors at {point!r} have shape {array.shape}; they must be ({len(labels)}, width)")
        if not np.isfinite(array).all():
            raise UserError(f"the vectors at {point!r} hold values that are not finite")
    truth, numbers = labelled(labels, groups, len(labels))
    with one_blas_thread():
        return _Sweeper(arrays, truth, numbers, settings).sweep()


@dataclass(frozen=True)
class NearLatent:
    """A latent whose decoder direction is near."""

    latent: int
    cosine: float
    """Below zero where it points the other way."""


@dataclass(frozen=True)
class NearLatents:
    """The latents nearest to a direction."""

    latents: tuple[NearLatent, ...]
    """Of greatest |cosine|, first."""
    floor: float
    """95th percentile, over random directions, of the greatest |cosine| that one has with any latent."""
    considered: int
    """Latents that were looked at."""


def nearest_latents(
    dictionary: Dictionary, given: Direction | Sequence[float], top: int = 10, *, seed: int = 0
) -> NearLatents:
    """Return the latents whose decoder directions are nearest to a direction.

    Args:
        dictionary: with a linear decoder. It is gone through in blocks.
        given: a direction at the hook point that the dictionary writes to, or the plain vector, shape (width,).
        top: how many.
        seed: of the random directions of the floor.

    Raises:
        UserError: the decoder is not linear, the direction is of another hook point or width, zero or not finite, or `top` is
            below 1.
    """
    directions = dictionary.decoder_directions()
    if directions is None:
        raise UserError(
            f"dictionary {dictionary.name!r} has no linear decoder, so its latents have no directions to compare with; "
            f"compare the two sets of prompts by their activations"
        )
    if isinstance(given, Direction) and given.hook_point != dictionary.hook_point_out:
        raise UserError(
            f"the direction is of {given.hook_point!r}, dictionary {dictionary.name!r} writes to "
            f"{dictionary.hook_point_out!r}; take the direction there"
        )
    if top < 1:
        raise UserError(f"top is {top}; ask for at least 1 latent")
    vector = np.asarray(given.vector if isinstance(given, Direction) else given, np.float64)
    if vector.shape != (directions.shape[1],):
        raise UserError(f"the direction has shape {vector.shape}; it must be ({directions.shape[1]},)")
    length = float(np.linalg.norm(vector))
    if not np.isfinite(length) or length == 0:
        raise UserError(f"the direction has length {length}; it must be finite and above 0")
    return _nearest(directions, vector / length, min(top, len(directions)), seed)


def _nearest(directions: Tensor, unit: Floats, top: int, seed: int) -> NearLatents:
    import torch

    random = generator(seed, "directions", "nearest").normal(size=(_RANDOM_DIRECTIONS, len(unit)))
    rows = np.concatenate([unit[None], random / np.linalg.norm(random, axis=1, keepdims=True)])
    wanted = torch.as_tensor(rows, dtype=torch.float32, device=directions.device)
    values, latents = wanted.new_zeros(0), torch.zeros(0, dtype=torch.long, device=directions.device)
    greatest = wanted.new_zeros(_RANDOM_DIRECTIONS)
    for start in range(0, len(directions), _BLOCK):
        # A latent that writes nothing is normalised to zero, and near nothing.
        block = torch.nn.functional.normalize(directions[start : start + _BLOCK].detach().float(), dim=1)
        cosines = block @ wanted.T
        greatest = torch.maximum(greatest, cosines[:, 1:].abs().amax(0))
        values = torch.cat([values, cosines[:, 0]])
        latents = torch.cat([latents, torch.arange(start, start + len(block), device=block.device)])
        kept = values.abs().sort(descending=True, stable=True).indices[:top]
        values, latents = values[kept], latents[kept]
    near = tuple(map(NearLatent, latents.tolist(), values.tolist()))
    return NearLatents(near, float(greatest.quantile(0.95)), len(directions))


@dataclass(frozen=True)
class _Sweeper:
    vectors: Mapping[str, Floats]
    labels: Bools
    groups: Ints
    settings: DirectionSettings

    def sweep(self) -> Sweep:
        # Directions first: that the two sets have no direction at all is the clearer error.
        taken = {
            point: Taker.of(array, self.labels, self.groups, self.settings) for point, array in self.vectors.items()
        }
        aucs, inner, floors, floors_inner = self._judged()
        counts = int(self.labels.sum()), int((~self.labels).sum())
        directions = []
        for index, (point, found) in enumerate(taken.items()):
            held_out = summary(aucs[..., index], floors[..., index], *counts)
            vector, gap = _unit(found.vector(), self.vectors[point], self.labels, point)
            bootstrap, halves = found.stability(point)
            directions.append(Direction(point, self.settings.method, vector, gap, held_out, bootstrap, halves, *counts))
        best_auc = summary(_chosen(aucs, inner), _chosen(floors, floors_inner), *counts)
        points = list(self.vectors)
        chosen = Counter(inner.argmax(-1).reshape(-1).tolist())
        best = max(range(len(points)), key=lambda index: (chosen[index], -index))
        choices = {point: chosen[index] / chosen.total() for index, point in enumerate(points)}
        return Sweep(tuple(directions), points[best], best_auc, choices)

    def _judged(self) -> tuple[Floats, Floats, Floats, Floats]:
        """Return AUCs of held-out texts and mean AUCs of inner folds, shape (repeat, fold, point), and both shuffled."""
        settings = self.settings
        seeds = [derive_seed(settings.seed, "directions", repeat) for repeat in range(settings.repeats)]
        splits = [draw_splits(self.labels, self.groups, settings.folds, seed) for seed in seeds]
        runs = np.array([self._run(self.labels, drawn, index) for index, drawn in enumerate(splits)])
        floors = []
        for index in range(settings.shuffles):
            drawn = splits[index % len(splits)]
            rng = generator(settings.seed, "directions", "shuffle", index)
            labels = shuffled(self.labels, self.groups, [split.test for split in drawn], rng)
            floors.append(self._run(labels, drawn, settings.repeats + index))
        shuffles = np.array(floors)
        return runs[..., 0], runs[..., 1], shuffles[..., 0], shuffles[..., 1]

    def _run(self, labels: Bools, splits: Sequence[Split], run: int) -> list[list[tuple[float, float]]]:
        found = []
        for index, split in enumerate(splits):
            seed = derive_seed(self.settings.seed, "directions", "inner", run, index)
            inner = draw_inner(labels, self.groups, split.train, seed)
            found.append([self._fold(vectors, labels, split, inner) for vectors in self.vectors.values()])
        return found

    def _fold(self, vectors: Floats, labels: Bools, split: Split, inner: Sequence[Split]) -> tuple[float, float]:
        if self.settings.method == "ridge":
            probe = fit([DenseView(vectors)], labels, split.train, inner)
            return auc(labels[split.test], probe.scores(split.test)), probe.inner_auc
        inside = [_auc_of_means(vectors, labels, part) for part in inner]
        return _auc_of_means(vectors, labels, split), float(np.mean(inside))


def _auc_of_means(vectors: Floats, labels: Bools, split: Split) -> float:
    along = difference_of_means(vectors[split.train], labels[split.train])
    return auc(labels[split.test], vectors[split.test] @ along)


def _chosen(aucs: Floats, inner: Floats) -> Floats:
    """Return the AUC at the point that inner folds prefer, shape (run, fold, point) → (run, fold)."""
    found: Floats = np.take_along_axis(aucs, inner.argmax(-1)[..., None], -1)[..., 0]
    return found


def _unit(raw: Floats, vectors: Floats, labels: Bools, point: str) -> tuple[tuple[float, ...], float]:
    length = float(np.linalg.norm(raw))
    if length == 0:
        raise UserError(
            f"the two sets of prompts have no difference at {point!r}; choose another hook point or pooling"
        )
    unit = raw / length
    return tuple(unit.tolist()), float(difference_of_means(vectors, labels) @ unit)

"""How an effect depends on where and how strongly a model is steered, and on the context: one table.

1. A *line* is something to steer with at a hook point: a latent of a dictionary, or a direction. `direction_lines` gives one
   for each hook point, for a sweep over layers.
2. Each line is steered with each strength on each context, in common batches; or, with `target_kls`, its strength is first
   matched to each KL on prompts of its own, so that layers of different scale can be compared.
3. A cell holds the mean over contexts with interval, standard deviation and n, and each context's value: an effect that
   is large in the mean and goes the other way on some contexts is common (Tan et al. 2024, "Analysing the
   Generalisation and Reliability of Steering Vectors").
4. Beside it stand the same figures for a random direction of equal length at that hook point (or at equal KL), and for the
   clean model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from exegete.tools.controls import random_direction
from exegete.tools.dictionaries import Dictionary
from exegete.tools.effects import kl_divergences
from exegete.tools.errors import UserError
from exegete.tools.estimates import Estimate, estimate
from exegete.tools.interventions import Positions, Tokens, push, steer
from exegete.tools.live_model import LiveModel, Trial
from exegete.tools.seeds import derive_seed
from exegete.tools.strength import Make, Matched, match_strengths

GridMeasure = Callable[[LiveModel, Sequence[Trial]], Sequence[float]]
"""One number for each trial, for example `kl_divergences`. It is called once, with all trials of the grid."""


@dataclass(frozen=True)
class Line:
    """What one row of the grid steers with."""

    name: str
    hook_point: str
    make: Make
    control: Make
    """A random direction of the same length at the same hook point."""


@dataclass(frozen=True)
class Cell:
    """One line at one strength, over all contexts."""

    line: str
    hook_point: str
    strength: float | None
    """None where the target KL cannot be reached."""
    target_kl: float | None
    matched: Matched | None
    """How the strength was found; None where it was given."""
    effect: Estimate | None
    """Over contexts; None where the target KL cannot be reached, as for `control`."""
    values: tuple[float, ...]
    """Of each context, in order."""
    control_strength: float | None
    control: Estimate | None


@dataclass(frozen=True)
class Grid:
    """Cells by line, then strength, and the clean model on the same contexts."""

    cells: tuple[Cell, ...]
    clean: Estimate


def latent_line(
    dictionary: Dictionary, latent: int, *, name: str | None = None, positions: Positions = "last", seed: int = 0
) -> Line:
    """Return the line that adds to a latent's activation, with a random direction as long as the latent's decoder row.

    Raises:
        UserError: the dictionary has no such latent, or no linear decoder, so that its control has no length.
    """
    if not 0 <= latent < dictionary.latents:
        raise UserError(f"dictionary {dictionary.name!r} has no latent {latent}; it has 0 to {dictionary.latents - 1}")
    directions = dictionary.decoder_directions()
    if directions is None:
        raise UserError(
            f"dictionary {dictionary.name!r} has no linear decoder, so a latent has no length to give a random direction; "
            "make a Line with a control of your own"
        )
    point = dictionary.hook_point_out
    wanted = name or f"latent {latent} at {point}"
    return Line(
        wanted,
        point,
        lambda strength: steer(dictionary.fingerprint, [latent], strength, positions),
        _random(point, directions.shape[-1], float(directions[latent].norm()), seed, wanted, positions),
    )


def direction_line(
    hook_point: str,
    vector: Sequence[float],
    *,
    name: str | None = None,
    positions: Positions = "last",
    seed: int = 0,
) -> Line:
    """Return the line that adds a vector at a hook point, with a random direction as long.

    Raises:
        UserError: the vector is zero, or not finite.
    """
    length = float(torch.tensor(vector, dtype=torch.float64).norm())
    wanted = name or f"direction at {hook_point}"
    push(hook_point, vector, 1.0)
    return Line(
        wanted,
        hook_point,
        lambda strength: push(hook_point, vector, strength, positions),
        _random(hook_point, len(vector), length, seed, wanted, positions),
    )


def direction_lines(
    vectors: Mapping[str, Sequence[float]], *, positions: Positions = "last", seed: int = 0
) -> list[Line]:
    """Return one line for each hook point and the vector to add there: a sweep over layers.

    Raises:
        UserError: as `direction_line`.
    """
    return [direction_line(point, vector, positions=positions, seed=seed) for point, vector in vectors.items()]


def steering_grid(
    model: LiveModel,
    lines: Sequence[Line],
    contexts: Sequence[Tokens],
    *,
    strengths: Sequence[float] = (),
    target_kls: Sequence[float] = (),
    matching: Sequence[Tokens] = (),
    measure: GridMeasure = kl_divergences,
    tolerance: float = 0.1,
) -> Grid:
    """Return the effect of every line at every strength (or target KL), over contexts.

    Args:
        model: the live model.
        lines: names must differ.
        contexts: prompts; the unit of all intervals.
        strengths: in the units of each line; or
        target_kls: mean next-token KL in nats, one column each.
        matching: prompts on which strengths are matched to them, others than `contexts`.
        measure: of each trial; KL of the next token by default.
        tolerance: of the matching, relative.

    Raises:
        UserError: there is no line or context, two lines share a name, not exactly one of `strengths` and `target_kls` is
            given, `matching` is missing or shares a prompt with `contexts`, or as `LiveModel.run`.
    """
    _check(lines, contexts, strengths, target_kls, matching)
    found = _given(lines, strengths)
    for target in target_kls:
        makes = [make for line in lines for make in (line.make, line.control)]
        matched = match_strengths(model, makes, matching, target_kl=target, tolerance=tolerance)
        found += [
            _Column(line, target, own, control)
            for line, own, control in zip(lines, matched[::2], matched[1::2], strict=True)
        ]
    found.sort(key=lambda column: list(lines).index(column.line))
    return _measured(model, found, contexts, measure)


@dataclass(frozen=True)
class _Column:
    """What is to be measured for one cell: a strength, or two matched ones."""

    line: Line
    target_kl: float | None
    own: Matched | float
    other: Matched | float

    def trials(self, contexts: Sequence[Tokens]) -> list[Trial]:
        makes = ((self.line.make, self.own), (self.line.control, self.other))
        changes = [make(strength) for make, given in makes if (strength := _strength(given)) is not None]
        return [Trial(tokens, change) for change in changes for tokens in contexts]


def _strength(given: Matched | float) -> float | None:
    return given.strength if isinstance(given, Matched) else given


def _given(lines: Sequence[Line], strengths: Sequence[float]) -> list[_Column]:
    return [_Column(line, None, float(strength), float(strength)) for line in lines for strength in strengths]


def _measured(model: LiveModel, columns: Sequence[_Column], contexts: Sequence[Tokens], measure: GridMeasure) -> Grid:
    trials = [Trial(tokens) for tokens in contexts]
    parts = [column.trials(contexts) for column in columns]
    every = [*trials, *(trial for part in parts for trial in part)]
    values = list(map(float, measure(model, every)))
    if len(values) != len(every):
        raise UserError(f"the measure gives {len(values)} numbers for {len(every)} trials; give one for each")
    rows = iter([tuple(values[at : at + len(trials)]) for at in range(0, len(values), len(trials))])
    clean = estimate(next(rows))
    return Grid(tuple(_cell(column, partial(next, rows)) for column in columns), clean)


def _cell(column: _Column, row: Callable[[], tuple[float, ...]]) -> Cell:
    own, other = _strength(column.own), _strength(column.other)
    values = () if own is None else row()
    control = () if other is None else row()
    return Cell(
        column.line.name,
        column.line.hook_point,
        own,
        column.target_kl,
        column.own if isinstance(column.own, Matched) else None,
        estimate(values) if values else None,
        values,
        other,
        estimate(control) if control else None,
    )


def _random(hook_point: str, width: int, length: float, seed: int, name: str, positions: Positions) -> Make:
    vector = (length * random_direction(width, derive_seed(seed, "steering grid", name), dtype="float64")).tolist()
    return lambda strength: push(hook_point, vector, strength, positions)


def _check(
    lines: Sequence[Line],
    contexts: Sequence[Tokens],
    strengths: Sequence[float],
    target_kls: Sequence[float],
    matching: Sequence[Tokens],
) -> None:
    if not lines or not contexts:
        raise UserError(
            f"a grid of {len(lines)} lines and {len(contexts)} contexts is empty; give at least one of each"
        )
    names = [line.name for line in lines]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two lines are named {doubled[0]!r}; name each differently")
    if bool(strengths) == bool(target_kls):
        raise UserError("a grid takes strengths or target_kls; give one of the two")
    if target_kls and not matching:
        raise UserError("target_kls are matched on prompts of their own; give some as matching")
    if target_kls and (shared := set(map(tuple, matching)) & set(map(tuple, contexts))):
        raise UserError(
            f"{len(shared)} prompts are in both matching and contexts; match strengths on prompts that are not measured"
        )

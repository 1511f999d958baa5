from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from exegete.tools.controls import random_direction
from exegete.tools.dictionaries import Dictionary
from exegete.tools.effects import kl_divergences
from exegete.tools.errors import UserError
from exegete.tools.interventions import Intervention, Tokens, VectorEdit, push, steer
from exegete.tools.live_model import LiveModel, Trial
from exegete.tools.steering_grid import direction_line, direction_lines, latent_line, steering_grid


def strengths_of(model: LiveModel, trials: Sequence[Trial]) -> list[float]:
    """A measure that needs no model: strength × first component × the context's last token."""
    return [_pushed(trial.intervention) * trial.tokens[-1] for trial in trials]


def _pushed(intervention: Intervention) -> float:
    edits = [edit for edit in intervention.edits if isinstance(edit, VectorEdit)]
    return sum(edit.strength * edit.vector[0] for edit in edits)


def test_cells_hold_mean_dispersion_and_every_context(model: LiveModel) -> None:
    lines = direction_lines({"blocks.0.hook_resid_post": [2.0, 0.0], "blocks.1.hook_resid_post": [0.5, 0.0]})
    grid = steering_grid(model, lines, [(1,), (2,), (3,)], strengths=[1.0, -3.0], measure=strengths_of)
    assert grid.clean.value == 0.0
    assert [(cell.hook_point[7], cell.strength) for cell in grid.cells] == [("0", 1), ("0", -3), ("1", 1), ("1", -3)]
    assert [cell.values for cell in grid.cells] == [(2, 4, 6), (-6, -12, -18), (0.5, 1, 1.5), (-1.5, -3, -4.5)]
    effect = grid.cells[1].effect
    # Student's quantile with two degrees of freedom is 4.303: half a width of 4.303 · 6 / √3.
    assert effect == pytest.approx((-12.0, -12 - 14.906, -12 + 14.906, 6.0, 3), abs=1e-2)
    assert all(cell.matched is None and cell.target_kl is None for cell in grid.cells)
    control = grid.cells[0].control
    assert control is not None and 0 < abs(control.value) <= 4.0 and control.value != pytest.approx(4.0)


def test_the_grid_is_what_single_runs_give(model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]) -> None:
    vector = random_direction(dictionary.width, 9).tolist()
    lines = [
        latent_line(dictionary, 40),
        direction_line("blocks.0.hook_resid_post", vector, name="early", positions="all"),
    ]
    grid = steering_grid(model, lines, prompts[:3], strengths=[10.0])
    changes = [steer(dictionary.fingerprint, [40], 10.0), push("blocks.0.hook_resid_post", vector, 10.0, "all")]
    for cell, change in zip(grid.cells, changes, strict=True):
        alone = kl_divergences(model, [Trial(tokens, change) for tokens in prompts[:3]])
        assert cell.values == pytest.approx(alone, rel=1e-3, abs=1e-6) and cell.effect is not None
        assert cell.control is not None and cell.control.value > 0
    assert grid.clean.value == 0.0


def test_a_control_is_as_long_as_what_it_stands_beside(dictionary: Dictionary) -> None:
    directions = dictionary.decoder_directions()
    assert directions is not None
    (edit,) = latent_line(dictionary, 40).control(3.0).edits
    assert isinstance(edit, VectorEdit) and edit.strength == 3.0
    assert sum(x * x for x in edit.vector) == pytest.approx(float(directions[40].norm()) ** 2, rel=1e-5)
    (other,) = latent_line(dictionary, 41).control(3.0).edits
    assert isinstance(other, VectorEdit) and other.vector != edit.vector


def test_strengths_may_be_matched_to_kl_on_prompts_of_their_own(
    model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]
) -> None:
    line = direction_line("blocks.0.hook_resid_post", random_direction(dictionary.width, 2).tolist())
    grid = steering_grid(model, [line], prompts[:3], target_kls=[0.5, 400.0], matching=prompts[3:6])
    reached, missed = grid.cells
    assert reached.matched is not None and reached.matched.kl == pytest.approx(0.5, rel=0.1)
    assert reached.strength == reached.matched.strength and reached.target_kl == 0.5
    assert reached.effect is not None and reached.control is not None and reached.control_strength != reached.strength
    assert missed.matched is not None and missed.matched.status == "unreachable"
    assert (missed.strength, missed.effect, missed.values) == (None, None, ())


def test_bad_grids_are_refused(model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]) -> None:
    line = direction_line("blocks.0.hook_resid_post", [1.0] * dictionary.width)
    right: dict[str, Any] = {"lines": [line], "contexts": prompts[:2], "strengths": [1.0]}
    wrongs: list[tuple[str, dict[str, Any]]] = [
        ("0 lines", {"lines": []}),
        ("0 contexts", {"contexts": []}),
        ("two lines are named", {"lines": [line, line]}),
        ("strengths or target_kls", {"strengths": []}),
        ("strengths or target_kls", {"target_kls": [0.5]}),
        ("give some as matching", {"strengths": [], "target_kls": [0.5]}),
        ("1 prompts are in both", {"strengths": [], "target_kls": [0.5], "matching": prompts[1:3]}),
        ("nan", {"strengths": [float("nan")]}),
        ("gives 1 numbers", {"measure": lambda model, trials: [0.0]}),
    ]
    for message, wrong in wrongs:
        with pytest.raises(UserError, match=message):
            steering_grid(model, **(right | wrong))
    with pytest.raises(UserError, match="no latent -1"):
        latent_line(dictionary, -1)
    with pytest.raises(UserError, match="zero"):
        direction_line("blocks.0.hook_resid_post", [0.0, 0.0])

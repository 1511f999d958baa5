"""Interventions as values: written and read back they are the same, equal ones have one id, and nonsense is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exegete.tools.errors import UserError
from exegete.tools.interventions import (
    CLEAN,
    OPERATIONS,
    Edit,
    Intervention,
    LatentEdit,
    VectorEdit,
    ablate,
    clamp,
    patch,
    project_out,
    push,
    scale,
    steer,
)

POSITIONS = st.one_of(st.sampled_from(["all", "last"]), st.lists(st.integers(-99, 99), max_size=4).map(tuple))
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.lists(st.integers(0, 10**6), min_size=1, max_size=5).map(tuple)


@st.composite
def latent_edits(draw: Callable[[Any], Any]) -> LatentEdit:
    operation = draw(st.sampled_from(OPERATIONS))
    latents = draw(st.lists(st.integers(0, 10**7), min_size=1, max_size=5, unique=True).map(tuple))
    valued = operation in ("add", "scale", "clamp", "mean")
    values = draw(st.lists(NUMBERS, min_size=len(latents), max_size=len(latents)).map(tuple)) if valued else ()
    most = {"resample": 3, "patch": 1}.get(operation, 0)
    sources = draw(st.lists(TEXT, min_size=min(1, most), max_size=most).map(tuple))
    dictionary = draw(st.text(min_size=1))
    return LatentEdit(dictionary, latents, operation, values, draw(POSITIONS), sources, draw(st.integers(0, 2**63)))


VECTOR_EDITS = st.builds(
    VectorEdit,
    st.text(min_size=1),
    st.lists(NUMBERS, min_size=1, max_size=5).filter(any).map(tuple),
    NUMBERS,
    POSITIONS,
    st.booleans(),
)
INTERVENTIONS = st.lists(st.one_of(latent_edits(), VECTOR_EDITS), max_size=4).map(lambda e: Intervention(tuple(e)))


@given(INTERVENTIONS)
def test_it_is_read_back_as_it_was_written(one: Intervention) -> None:
    again = Intervention.from_json(one.to_json())
    assert again == one and again.id == one.id and again.to_json() == one.to_json() and hash(again) == hash(one)


@given(INTERVENTIONS, INTERVENTIONS)
def test_equal_means_equal_ids(one: Intervention, other: Intervention) -> None:
    assert (one == other) == (one.id == other.id)
    assert (one + other).edits == one.edits + other.edits


def loose(value: Any) -> Any:
    """Return what the annotations do not allow and notebooks give all the same."""
    return value


@pytest.mark.parametrize(
    ("one", "same"),
    [
        (steer("d", [1, 2], 3), steer("d", loose(np.array([1, 2])), loose(np.array([3.0, 3.0])))),
        (steer("d", [1], 1.5), steer("d", torch.tensor([1]), torch.tensor(1.5))),  # type: ignore[arg-type]
        (scale("d", [1], 0), scale("d", [1], -0.0)),
        (clamp("d", range(3), 1, loose([0, -1])), clamp("d", (0, 1, 2), [1, 1.0, loose(np.float32(1))], (0, -1))),
        (ablate("d", [1], texts=[[1, 2]]), ablate("d", [1], texts=torch.tensor([[1, 2]]))),  # type: ignore[arg-type]
        (push("h", [1, 2], 2), push("h", np.array([1.0, 2.0]), np.float64(2.0))),  # type: ignore[arg-type]
        (
            Intervention((LatentEdit("d", (1,), "add", (1,)),)),
            Intervention([LatentEdit("d", [1], "add", [True])]),  # type: ignore[arg-type]
        ),
    ],
)
def test_numbers_and_lists_of_any_kind_make_one_intervention(one: Intervention, same: Intervention) -> None:
    assert one == same and one.id == same.id and hash(one) == hash(same)


def test_what_is_written_and_what_an_id_is() -> None:
    one = ablate("sha256:ab", [7, 3], (0, -1), means=[1, 0.5]) + project_out("blocks.1.hook_resid_post", [0.0, 2.0])
    assert json.loads(one.to_json()) == [
        {
            "dictionary": "sha256:ab",
            "latents": [7, 3],
            "operation": "mean",
            "positions": [0, -1],
            "seed": 0,
            "sources": [],
            "values": [1.0, 0.5],
        },
        {
            "hook_point": "blocks.1.hook_resid_post",
            "positions": "all",
            "project_out": True,
            "strength": 1.0,
            "vector": [0.0, 2.0],
        },
    ]
    assert one.id.startswith("sha256:") and len(one.id) == 71
    assert not CLEAN and one and CLEAN + one == one and CLEAN.to_json() == "[]"


GOOD = json.loads(steer("d", [1], 1.0).to_json())[0]
PUSHED = json.loads(push("h", [1.0], 1.0).to_json())[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no intervention"),
        ("[{", "is no intervention"),
        ("{}", "not a list"),
        ('""', "not a list"),
        ("[3]", "not an object"),
        ("[[]]", "not an object"),
        ("[" * 100_000, "is no intervention"),
        (None, "is no intervention"),
        (json.dumps([{"latents": [1]}]), "is no intervention"),
        (json.dumps([GOOD | {"colour": 1}]), "colour"),
        (json.dumps([GOOD | {"operation": "exalt"}]), "operation 'exalt' is not one of add, scale"),
        (json.dumps([GOOD | {"operation": ["add"]}]), "is not one of"),
        (json.dumps([GOOD | {"latents": []}]), "no latent is given"),
        (json.dumps([GOOD | {"latents": "1"}]), "latents: 1 must be whole numbers"),
        (json.dumps([GOOD | {"latents": [1.0]}]), "must be whole numbers"),
        (json.dumps([GOOD | {"latents": 1}]), "latents are 1; give a list"),
        (json.dumps([GOOD | {"values": ["3"]}]), "must be numbers"),
        (json.dumps([GOOD | {"values": [None]}]), "must be numbers"),
        (json.dumps([GOOD | {"values": [10**400]}]), "must be numbers"),
        (json.dumps([GOOD | {"values": [float("nan")]}]), "must be a finite number"),
        (json.dumps([GOOD | {"positions": "first"}]), "positions are 'first'; give"),
        (json.dumps([GOOD | {"positions": [0.5]}]), "positions"),
        (json.dumps([GOOD | {"positions": None}]), "positions"),
        (json.dumps([GOOD | {"dictionary": 3}]), "dictionary is 3"),
        (json.dumps([GOOD | {"sources": [[1]]}]), "takes no activations from other texts"),
        (json.dumps([PUSHED | {"vector": "ab"}]), "must be numbers"),
        (json.dumps([PUSHED | {"strength": None}]), "must be numbers"),
        (json.dumps([PUSHED | {"project_out": "yes"}]), "project_out is 'yes'"),
    ],
)
def test_broken_json_is_one_clear_line(text: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Intervention.from_json(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: steer("d", [1, 2], [1.0]), "add of 2 latents takes 2 values, not 1"),
        (lambda: steer("d", [1, 2], [1.0, 2.0, 3.0]), "takes 2 values, not 3"),
        (lambda: ablate("d", [1, 2], means=[1.0]), "mean of 2 latents takes 2 values, not 1"),
        (lambda: ablate("d", [1], means=[1.0], texts=[[1]]), "means or texts, not both"),
        (lambda: ablate("d", [1], texts=[]), "resample needs a text"),
        (lambda: ablate("d", [1], texts=[[1], []]), "resample needs a text"),
        (lambda: patch("d", [1], []), "patch needs a text"),
        (lambda: ablate("d", []), "no latent is given"),
        (lambda: ablate("d", [3, 3]), "a latent is given twice"),
        (lambda: scale("d", [1], float("nan")), "scale is nan"),
        (lambda: clamp("d", [1], float("-inf")), "clamp is -inf"),
        (lambda: push("h", [0.0, 0.0], 1.0), "the vector is zero"),
        (lambda: push("h", [1.0, float("nan")], 1.0), "vector is nan"),
        (lambda: push("h", [1.0], float("inf")), "strength is inf"),
        (lambda: LatentEdit("d", (1,), "patch", (), "all", ((1,), (2,))), "patch takes activations from one prompt"),
        (lambda: LatentEdit("d", (1,), "zero", (1.0,)), "zero of 1 latents takes 0 values"),
        (lambda: Intervention(("steer",)), "are no edits"),  # type: ignore[arg-type]
        (lambda: Intervention(3), "edits are 3; give a list"),  # type: ignore[arg-type]
    ],
)
def test_nonsense_is_refused(make: Callable[[], Edit | Intervention], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()

"""What is done to a model while it runs, as a value: it can be stored beside its result and done again.

An `Intervention` is a list of edits, possibly of several dictionaries and layers. A `LatentEdit` changes the code z of a
dictionary to z', and the model goes on with

    x + (decode(z') − decode(z))

so that the dictionary's error stays, whatever its decoder. A `VectorEdit` adds a vector, or takes a direction out. Where a
dictionary has several edits they apply in order; edits of a later layer see what those of an earlier one have done.

Steering is `add`; ablation is `zero`, `mean` or `resample`; `exegete.tools.live_model` runs them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from exegete.tools.errors import UserError
from exegete.tools.seeds import digest

Operation = Literal["add", "scale", "clamp", "zero", "mean", "resample", "patch"]
OPERATIONS: tuple[Operation, ...] = ("add", "scale", "clamp", "zero", "mean", "resample", "patch")
_WITH_VALUES = ("add", "scale", "clamp", "mean")
_WITH_SOURCES = ("resample", "patch")

Positions = Literal["all", "last"] | tuple[int, ...]
"""Where: at "all" tokens; from the prompt's "last" token on; or at these tokens of the prompt, negative from its end.

"all" and "last" hold for generated tokens too, numbered positions do not.
"""

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class LatentEdit:
    """One operation on some latents of one dictionary."""

    dictionary: str
    """Fingerprint."""
    latents: tuple[int, ...]
    operation: Operation
    """`add` to the activation, `scale` it by a factor, `clamp` it to a value, set it to `zero` or to its `mean` over a
    corpus, `resample` it from other texts (all latents of the edit from the same token), `patch` it from another prompt
    (positions counted from the ends of both)."""
    values: tuple[float, ...] = ()
    """One for each latent, in units of its activation; for `scale`, factors; none for the other operations."""
    positions: Positions = "all"
    sources: tuple[Tokens, ...] = ()
    """`resample`: the texts to draw from; `patch`: the one prompt. Empty otherwise."""
    seed: int = 0
    """Of the draws of `resample`."""

    def __post_init__(self) -> None:
        _require(self.operation in OPERATIONS, f"operation {self.operation!r} is not one of {', '.join(OPERATIONS)}")
        _require(bool(self.latents), f"{self.operation}: no latent is given")
        _require(len(set(self.latents)) == len(self.latents), f"{self.operation}: a latent is given twice")
        wanted = len(self.latents) if self.operation in _WITH_VALUES else 0
        given = len(self.values)
        _require(given == wanted, f"{self.operation} of {len(self.latents)} latents takes {wanted} values, not {given}")
        _require_finite(self.operation, self.values)
        if self.operation in _WITH_SOURCES:
            _require(
                bool(self.sources) and all(self.sources), f"{self.operation} needs a text to take activations from"
            )
            _require(self.operation != "patch" or len(self.sources) == 1, "patch takes activations from one prompt")


@dataclass(frozen=True)
class VectorEdit:
    """Add `strength · vector` at a hook point, or, with `project_out`, take that direction out of what is there."""

    hook_point: str
    vector: tuple[float, ...]
    strength: float = 1.0
    positions: Positions = "all"
    project_out: bool = False

    def __post_init__(self) -> None:
        _require_finite("strength", [self.strength])
        _require_finite("vector", self.vector)
        _require(any(self.vector), "the vector is zero and has no direction")


Edit = LatentEdit | VectorEdit


@dataclass(frozen=True)
class Intervention:
    """Edits that are made together. `Intervention()` changes nothing."""

    edits: tuple[Edit, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.edits)

    def __add__(self, other: Intervention) -> Intervention:
        return Intervention(self.edits + other.edits)

    @property
    def id(self) -> str:
        """`sha256:…` over everything that it says."""
        return digest(self.to_json())

    def to_json(self) -> str:
        """Return it as JSON, the same text for the same intervention."""
        return json.dumps([asdict(edit) for edit in self.edits], sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Intervention:
        """Return the intervention that `to_json` wrote.

        Raises:
            UserError: the text is not one.
        """
        try:
            return Intervention(tuple(_edit(facts) for facts in json.loads(text)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{text[:80]!r} is no intervention ({error}); write it with Intervention.to_json()"
            ) from error


CLEAN = Intervention()
"""Nothing is changed."""


def steer(
    dictionary: str, latents: Sequence[int], strength: float | Sequence[float], positions: Positions = "last"
) -> Intervention:
    """Return the intervention that adds `strength`, in units of activation, to each latent."""
    values = _each(strength, latents)
    return Intervention((LatentEdit(dictionary, tuple(latents), "add", values, positions),))


def scale(
    dictionary: str, latents: Sequence[int], factor: float | Sequence[float], positions: Positions = "all"
) -> Intervention:
    """Return the intervention that multiplies each latent's activation by `factor`."""
    return Intervention((LatentEdit(dictionary, tuple(latents), "scale", _each(factor, latents), positions),))


def clamp(
    dictionary: str, latents: Sequence[int], value: float | Sequence[float], positions: Positions = "all"
) -> Intervention:
    """Return the intervention that sets each latent's activation to `value`, also where it does not fire."""
    return Intervention((LatentEdit(dictionary, tuple(latents), "clamp", _each(value, latents), positions),))


def ablate(
    dictionary: str,
    latents: Sequence[int],
    positions: Positions = "all",
    *,
    means: Sequence[float] | None = None,
    texts: Sequence[Sequence[int]] | None = None,
    seed: int = 0,
) -> Intervention:
    """Return the intervention that takes latents out: to zero, to their `means`, or to draws from `texts`.

    Args:
        dictionary: fingerprint.
        latents: whose activations.
        positions: where.
        means: mean activation of each latent over a corpus.
        texts: tokens of other texts; at each position all latents take their activations at one token drawn from them.
        seed: of these draws.
    """
    _require(means is None or texts is None, "ablate takes means or texts, not both")
    edit = LatentEdit(dictionary, tuple(latents), "zero", (), positions)
    if means is not None:
        edit = LatentEdit(dictionary, tuple(latents), "mean", tuple(map(float, means)), positions)
    if texts is not None:
        sources = tuple(tuple(text) for text in texts)
        edit = LatentEdit(dictionary, tuple(latents), "resample", (), positions, sources, seed)
    return Intervention((edit,))


def patch(dictionary: str, latents: Sequence[int], source: Sequence[int], positions: Positions = "all") -> Intervention:
    """Return the intervention that gives latents the activations that they have on the tokens of another prompt.

    Positions are matched from the ends of both prompts; where the other prompt is shorter, what it lacks stays as it is.
    """
    return Intervention((LatentEdit(dictionary, tuple(latents), "patch", (), positions, (tuple(source),)),))


def push(hook_point: str, vector: Sequence[float], strength: float, positions: Positions = "last") -> Intervention:
    """Return the intervention that adds `strength · vector` at a hook point."""
    return Intervention((VectorEdit(hook_point, tuple(map(float, vector)), float(strength), positions),))


def project_out(hook_point: str, vector: Sequence[float], positions: Positions = "all") -> Intervention:
    """Return the intervention that removes the component along `vector` (directional ablation, Arditi et al. 2024)."""
    return Intervention((VectorEdit(hook_point, tuple(map(float, vector)), 1.0, positions, True),))


def _each(value: float | Sequence[float], latents: Sequence[int]) -> tuple[float, ...]:
    if isinstance(value, (int, float)):
        return (float(value),) * len(latents)
    return tuple(map(float, value))


def _edit(facts: Mapping[str, Any]) -> Edit:
    positions = facts["positions"]
    named = dict(facts) | {"positions": positions if isinstance(positions, str) else tuple(positions)}
    if "vector" in named:
        return VectorEdit(**named | {"vector": tuple(named["vector"])})
    lists = {"latents": tuple(named["latents"]), "values": tuple(named["values"])}
    return LatentEdit(**named | lists | {"sources": tuple(tuple(source) for source in named["sources"])})


def _require_finite(what: str, values: Sequence[float]) -> None:
    wrong = [value for value in values if not math.isfinite(value)]
    _require(not wrong, f"{what} is {wrong[0] if wrong else None}; it must be a finite number")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)

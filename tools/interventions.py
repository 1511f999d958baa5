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
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
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
        _set(self, dictionary=_text("dictionary", self.dictionary), latents=_integers("latents", self.latents))
        _set(self, values=_numbers("values", self.values), positions=_positions(self.positions))
        _set(self, sources=tuple(_integers("tokens", source) for source in _listed("sources", self.sources)))
        _set(self, seed=_integers("seed", [self.seed])[0])
        _require(self.operation in OPERATIONS, f"operation {self.operation!r} is not one of {', '.join(OPERATIONS)}")
        _require(bool(self.latents), f"{self.operation}: no latent is given")
        _require(len(set(self.latents)) == len(self.latents), f"{self.operation}: a latent is given twice")
        wanted = len(self.latents) if self.operation in _WITH_VALUES else 0
        given = len(self.values)
        _require(given == wanted, f"{self.operation} of {len(self.latents)} latents takes {wanted} values, not {given}")
        _require_finite(self.operation, self.values)
        if self.operation not in _WITH_SOURCES:
            _require(not self.sources, f"{self.operation} takes no activations from other texts")
            return
        _require(bool(self.sources) and all(self.sources), f"{self.operation} needs a text to take activations from")
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
        _set(self, hook_point=_text("hook_point", self.hook_point), vector=_numbers("vector", self.vector))
        _set(self, strength=_numbers("strength", [self.strength])[0], positions=_positions(self.positions))
        _require(isinstance(self.project_out, bool), f"project_out is {self.project_out!r}, not true or false")
        _require_finite("strength", [self.strength])
        _require_finite("vector", self.vector)
        _require(any(self.vector), "the vector is zero and has no direction")


Edit = LatentEdit | VectorEdit


@dataclass(frozen=True)
class Intervention:
    """Edits that are made together. `Intervention()` changes nothing."""

    edits: tuple[Edit, ...] = ()

    def __post_init__(self) -> None:
        _set(self, edits=_listed("edits", self.edits))
        wrong = [edit for edit in self.edits if not isinstance(edit, LatentEdit | VectorEdit)]
        _require(
            not wrong, f"{str(wrong)[:60]} are no edits; make them with steer, scale, clamp, ablate, patch or push"
        )

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
            edits = json.loads(text)
            if not isinstance(edits, list):
                raise TypeError("not a list of edits")
            return Intervention(tuple(_edit(facts) for facts in edits))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{str(text)[:80]!r} is no intervention ({error}); write it with Intervention.to_json()"
            ) from error


def steer(
    dictionary: str, latents: Sequence[int], strength: float | Sequence[float], positions: Positions = "last"
) -> Intervention:
    """Return the intervention that adds `strength`, in units of activation, to each latent."""
    return Intervention((LatentEdit(dictionary, tuple(latents), "add", tuple(_each(strength, latents)), positions),))


def scale(
    dictionary: str, latents: Sequence[int], factor: float | Sequence[float], positions: Positions = "all"
) -> Intervention:
    """Return the intervention that multiplies each latent's activation by `factor`."""
    return Intervention((LatentEdit(dictionary, tuple(latents), "scale", tuple(_each(factor, latents)), positions),))


def clamp(
    dictionary: str, latents: Sequence[int], value: float | Sequence[float], positions: Positions = "all"
) -> Intervention:
    """Return the intervention that sets each latent's activation to `value`, also where it does not fire."""
    return Intervention((LatentEdit(dictionary, tuple(latents), "clamp", tuple(_each(value, latents)), positions),))


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
        edit = LatentEdit(dictionary, tuple(latents), "mean", tuple(means), positions)
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
    return Intervention((VectorEdit(hook_point, tuple(vector), strength, positions),))


def project_out(hook_point: str, vector: Sequence[float], positions: Positions = "all") -> Intervention:
    """Return the intervention that removes the component along `vector` (directional ablation, Arditi et al. 2024)."""
    return Intervention((VectorEdit(hook_point, tuple(vector), 1.0, positions, True),))


def _each(value: float | Sequence[float], latents: Sequence[int]) -> Sequence[float]:
    single = isinstance(value, Real) or getattr(value, "ndim", None) == 0
    return (value,) * len(latents) if single else value  # type: ignore[return-value]


def _edit(facts: Mapping[str, Any]) -> Edit:
    if not isinstance(facts, dict):
        raise TypeError("an edit is not an object")
    return VectorEdit(**facts) if "vector" in facts else LatentEdit(**facts)


# Equal edits must have equal ids, whatever kind of numbers and lists they were made from.


def _set(edit: Any, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(edit, name, value)


def _text(what: str, value: str) -> str:
    _require(isinstance(value, str) and bool(value), f"{what} is {value!r}; it must be a name")
    return value


def _listed(what: str, values: Iterable[Any]) -> tuple[Any, ...]:
    try:
        return tuple(values)
    except TypeError as error:
        raise UserError(f"{what} are {values!r}; give a list") from error


def _integers(what: str, values: Iterable[int]) -> tuple[int, ...]:
    try:
        return tuple(int(operator.index(value)) for value in _listed(what, values))
    except TypeError as error:
        raise UserError(f"{what}: {str(values)[:60]} must be whole numbers") from error


def _numbers(what: str, values: Iterable[float]) -> tuple[float, ...]:
    try:
        # `+ 0.0` makes of −0 a 0, which it equals.
        return tuple(math.fsum([value]) + 0.0 for value in _listed(what, values))
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{what}: {str(values)[:60]} must be numbers") from error


def _positions(positions: Positions) -> Positions:
    if isinstance(positions, str):
        _require(positions in ("all", "last"), f'positions are {positions!r}; give "all", "last" or numbers')
        return positions
    return _integers("positions", positions)


def _require_finite(what: str, values: Sequence[float]) -> None:
    wrong = [value for value in values if not math.isfinite(value)]
    _require(not wrong, f"{what} is {wrong[0] if wrong else None}; it must be a finite number")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


CLEAN = Intervention()
"""Nothing is changed."""

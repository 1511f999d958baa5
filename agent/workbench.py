"""From names in a configuration to instruments: the explainer, the judge and the evaluators of a run.

An instrument says by the names of its parameters what it is made with, and whoever writes a new one gets the same:

    client       the language model `models.explainer` (for explainers) or `models.judge` (for judges and evaluators)
    scorer       the local model `models.scorer`; where `client` is there as well, the judge is asked if there is one
    embedder     the embedding model `models.embedder`
    model        the live subject, with the dictionary attached
    dictionary   the dictionary of the latents
    rates        share of tokens on which each latent fires, shape (latent,)
    effects      what a latent does to the output, measured on the live subject
    explainer    another explainer, by its name among the options
    score        how good an explanation is on the refine split, by the judge
    background   what text is like apart from the latent (the lexical explainer's)
    stopping     when to ask no more about a latent (`label.stop_at`)
    clustering   how the judge's errors cluster: left out here, and set once the pilot has shown it

All other parameters are options: `label.explainer_options`, `label.judge_options`, `label.evaluator_options.NAME`,
`cascade.options.RUNG`.
"""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import TypeAdapter, ValidationError

from exegete.agent.climbing import Cascade
from exegete.agent.config import RunConfig
from exegete.agent.graph import Workbench
from exegete.agent.models import Models, check_models
from exegete.agent.ordering import Latents
from exegete.agent.random_weight import check_control
from exegete.agent.routing import Rule
from exegete.agent.rungs import REFINE, TEST_AND_REFINE, top_writer
from exegete.evaluators import Judge, evaluator_names, judge_names
from exegete.evaluators.contract import maker_of
from exegete.tools.errors import UserError, nearest
from exegete.tools.evidence import Evidence
from exegete.tools.explainers import Explainer, explainer_names
from exegete.tools.explainers.contract import maker_of as explainer_maker
from exegete.tools.explainers.refining import Refiner
from exegete.tools.seeds import generator

if TYPE_CHECKING:
    from exegete.agent.gathering import Inputs
    from exegete.tools.live_model import LiveModel

BACKGROUND_LATENTS = 256
"""Latents whose explain windows tell the lexical explainer what text is like apart from the latent it explains."""

Kind = Literal["explainer", "judge", "evaluator"]
_NAMES: Mapping[Kind, Callable[[], list[str]]] = {
    "explainer": explainer_names,
    "judge": judge_names,
    "evaluator": evaluator_names,
}
_SUPPLIED = (
    *("client", "scorer", "embedder", "model", "dictionary", "rates", "effects", "explainer", "score", "background"),
    *("stopping", "clustering"),
)
_NIGHT: Mapping[str, Mapping[str, Any]] = {"detection": {"items_per_class": 10}, "fuzzing": {"items_per_class": 10}}
"""Options of the profile `night`."""
_PREDICATES = ("lexical",)
"""Explainers that always give a predicate, and make no call."""
_NAMED = ("embedder", "explainer")
"""Supplied, but by a name that may be an option."""


def check_workbench(config: RunConfig) -> None:
    """Look whether the instruments that `config` names can be made: after hours it is too late. Nothing is loaded or sent.

    Raises:
        UserError: no instrument has such a name or option, something that it is made with is not configured, or a model
            cannot be asked (`check_models`).
    """
    label = config.label
    _check(config, "explainer", label.explainer, label.explainer_options)
    _check(config, "judge", label.judge, label.judge_options)
    for name in label.evaluators:
        _check(config, "evaluator", name, label.evaluator_options.get(name, {}))
    _check_cascade(config)
    for name in label.evaluator_options:
        _maker("evaluator", name)
    check_control(config)
    _check_asked(config)
    check_models(config.models, config.cascade.models.values())


def open_workbench(
    config: RunConfig, inputs: Inputs | None, evidence: Evidence, latents: Latents, models: Models
) -> Workbench:
    """Return the instruments for the `latents` of one dictionary, ascending.

    Raises:
        UserError: an instrument cannot be made: a model cannot be loaded, or the evidence lacks what it needs.
    """
    label = config.label
    supplies = _Supplies(config, inputs, evidence, latents, models)
    judge = supplies.make("judge", label.judge, label.judge_options)
    cascade = supplies.cascade(judge) if config.cascade.rungs else None
    night = label.profile == "night"
    return Workbench(
        dictionary=evidence.dictionary,
        explainer=cast(Explainer, cascade.writers[label.explainer])
        if cascade
        else supplies.make("explainer", label.explainer, label.explainer_options),
        judge=judge,
        evaluators=supplies.evaluators(_NIGHT if night else {}),
        seed=config.seed,
        cascade=cascade,
        thorough=supplies.evaluators({}) if night else (),
    )


@dataclass
class _Supplies:
    """What instruments are made with, each made when it is first needed."""

    config: RunConfig
    inputs: Inputs | None
    evidence: Evidence
    latents: Latents
    models: Models

    def evaluators(self, profile: Mapping[str, Mapping[str, Any]]) -> list[Any]:
        """Return the evaluators, with the options of a profile where the configuration has none of its own."""
        label = self.config.label
        return [
            self.make("evaluator", name, {**profile.get(name, {}), **label.evaluator_options.get(name, {})})
            for name in label.evaluators
        ]

    def cascade(self, judge: Judge) -> Cascade:
        """Return the rungs of the configured cascade, before its control subset has shown anything."""
        from exegete.evaluators.refine_score import RefineScore

        cascade = self.config.cascade
        screened = _screened(self.config)
        predicate = self.make("judge", "predicate", {}) if screened else None
        return Cascade(
            rule=Rule(cascade.target, cascade.worth_usd, cascade.rungs),
            writers={name: self.make("explainer", name, _rung_options(self.config, name)) for name in cascade.rungs},
            score=RefineScore(judge, cascade.items_per_class),
            screen=RefineScore(predicate, cascade.items_per_class) if predicate is not None else None,
            screened=screened,
            rounds=cascade.rounds,
            patience=cascade.patience,
            rival=self._rival() if TEST_AND_REFINE in cascade.rungs else None,
        )

    def _rival(self) -> Any:
        """Return who draws best-of-N beside the agent: the explainer below it, or the usual one, with the agent's model."""
        name = _rival_of(self.config)
        client = self.models.client(_asked_by(self.config, "explainer", TEST_AND_REFINE) or "")
        return self.make("explainer", name, _rung_options(self.config, name), client)

    def make(self, kind: Kind, name: str, options: Mapping[str, Any], client: Any = None) -> Any:
        """Return an instrument, made with what its parameters ask for; `client` in place of its own language model."""
        maker = _maker(kind, name)
        given = _checked_options(kind, name, maker, options)
        for parameter in _supplied(self.config, maker):
            own = client if parameter == "client" else None
            value = own or self._supply(kind, name, parameter, given.get(parameter))
            if value is not None:
                given[parameter] = value
        return maker(**given)

    def _supply(self, kind: Kind, name: str, parameter: str, chosen: str | None) -> Any:
        if parameter == "client":
            return self.models.client(_asked_by(self.config, kind, name) or "")
        if parameter == "embedder":
            return self.models.embedder(chosen)
        if parameter == "explainer":
            return self.make("explainer", chosen or _inner(self.config), {})
        return getattr(self, f"_{parameter}")()

    def _scorer(self) -> Any:
        return self.models.scorer()

    def _model(self) -> LiveModel:
        return self._live

    def _dictionary(self) -> Any:
        assert self.inputs is not None
        return self.inputs.dictionary

    def _rates(self) -> Any:
        return self.evidence.densities()

    def _effects(self) -> Any:
        from exegete.tools.explainers.output_effects import LensEffects

        return LensEffects(self._live, self._dictionary())

    def _score(self) -> Any:
        from exegete.evaluators.refine_score import RefineScore

        return RefineScore(self.make("judge", self.config.label.judge, self.config.label.judge_options))

    def _background(self) -> Any:
        from exegete.tools.explainers.background import background

        drawn = generator(self.config.seed, "background", self.evidence.dictionary).permutation(len(self.latents))
        others = self.evidence.read(self.latents[drawn[:BACKGROUND_LATENTS]].tolist(), "explain")
        return background(others)

    def _stopping(self) -> Any:
        from exegete.evaluators.stopping import Stopping

        return None if self.config.label.stop_at is None else Stopping(target=self.config.label.stop_at)

    def _clustering(self) -> None:
        """Leave what is expected of the judge to the evaluator."""

    @cached_property
    def _live(self) -> LiveModel:
        from exegete.tools.live_model import LiveModel

        assert self.inputs is not None
        return self.inputs.model or LiveModel(self.inputs.subject, [self.inputs.dictionary])


def _asked_by(config: RunConfig, kind: Kind, name: str) -> str | None:
    """Return the language model that an instrument asks."""
    models = config.models
    return config.cascade.models.get(name, models.explainer) if kind == "explainer" else models.judge


def _rung_options(config: RunConfig, name: str) -> Mapping[str, Any]:
    own = config.label.explainer_options if name == config.label.explainer else {}
    return {**own, **config.cascade.options.get(name, {})}


def _screened(config: RunConfig) -> frozenset[str]:
    """Return the rungs that are weighed by running predicates: those whose explainer makes no call, if a model judges."""
    if not config.cascade.screen or config.label.judge == "predicate" or not config.cascade.control:
        return frozenset()
    return frozenset(name for name in config.cascade.rungs if name in _PREDICATES)


def _check_cascade(config: RunConfig) -> None:
    label, cascade = config.label, config.cascade
    if not cascade.rungs:
        return
    if label.explainer != top_writer(cascade.rungs):
        raise UserError(
            f"label.explainer = {label.explainer!r} beside cascade.rungs = {list(cascade.rungs)}: leave it out, the rungs explain"
        )
    if TEST_AND_REFINE in cascade.rungs and cascade.control:
        _check(config, "explainer", _rival_of(config), _rung_options(config, _rival_of(config)))
    for name in cascade.rungs:
        _check(config, "explainer", name, _rung_options(config, name))
        if name in cascade.models and "client" not in _supplied(config, _maker("explainer", name)):
            raise UserError(
                f"cascade.models names {cascade.models[name]!r} for the rung {name!r}, which asks no language model"
            )
    lacking = [name for name in ("detection", "fuzzing") if name not in label.evaluators]
    if cascade.control and lacking:
        raise UserError(
            f"cascade.control = {cascade.control} measures the routing by detection and fuzzing on the test split: add {lacking[0]!r} "
            "to label.evaluators, or set cascade.control = 0"
        )
    if cascade.worth_usd is not None and not cascade.control:
        raise UserError(
            f"cascade.worth_usd = {cascade.worth_usd} needs to know what a rung gains: set cascade.control to 10 or more"
        )


def _check(config: RunConfig, kind: Kind, name: str, options: Mapping[str, Any]) -> None:
    maker = _maker(kind, name)
    given = _checked_options(kind, name, maker, options)
    for parameter in _supplied(config, maker):
        _require(config, kind, name, parameter, given.get(parameter))
    if getattr(maker, "calls_tools", False):
        from exegete.agent.investigation.language_models import require_live

        require_live(_asked_by(config, kind, name) or "", f"explainer {name!r}")


def _check_asked(config: RunConfig) -> None:
    """Raise UserError where a language model is named that nothing would ask: the offline path must not pass for it."""
    label, models = config.label, config.models
    asked = set()
    for name in config.cascade.rungs or (label.explainer,):
        if {"client", "explainer"} & set(_supplied(config, _maker("explainer", name))):
            asked.add(_asked_by(config, "explainer", name))
    judging: list[tuple[Kind, str]] = [("judge", label.judge), *(("evaluator", name) for name in label.evaluators)]
    if any("client" in _supplied(config, _maker(kind, name)) for kind, name in judging):
        asked.add(models.judge)
    for role, spec, used, way in (
        ("explainer", models.explainer, label.explainer, _inner(config)),
        ("judge", models.judge, label.judge, "model"),
    ):
        if spec is not None and spec not in asked:
            raise UserError(
                f"models.{role} = {spec!r} would be asked nothing, since the {role} is {used!r}: give --{role} {way}, or leave "
                f"label.{role} out of the configuration"
            )


def _maker(kind: Kind, name: str) -> Callable[..., Any]:
    known = _NAMES[kind]()
    if kind == "explainer" and name == REFINE:
        return Refiner
    if kind == "explainer" and name == TEST_AND_REFINE:
        from exegete.agent.investigation.explaining import AgentExplainer

        return AgentExplainer
    if name not in known:
        raise UserError(f"no {kind} is named {name!r}; there are: {', '.join(known)}.{nearest(name, known)}")
    return explainer_maker(name) if kind == "explainer" else maker_of(kind, name)


def _supplied(config: RunConfig, maker: Callable[..., Any]) -> list[str]:
    """Return the parameters of `maker` that are supplied, without those that another one stands in for."""
    parameters = inspect.signature(maker).parameters
    names = [name for name in parameters if name in _SUPPLIED]
    if "client" in names and "scorer" in names:
        names.remove("client" if config.models.judge is None and config.models.scorer is not None else "scorer")
    return names


def _require(config: RunConfig, kind: Kind, name: str, parameter: str, chosen: str | None) -> None:
    """Raise UserError where what an instrument is made with is not configured."""
    models = config.models
    if parameter == "client" and _asked_by(config, kind, name) is None:
        field = "explainer" if kind == "explainer" else "judge"
        raise UserError(f"{kind} {name!r} asks a language model: name one, --model SPEC or models.{field} = SPEC")
    if parameter == "scorer" and models.scorer is None:
        raise UserError(f"{kind} {name!r} needs a local model that gives log-probabilities: models.scorer = 'hf:PATH'")
    if parameter == "embedder" and not (chosen or models.embedder):
        raise UserError(f"{kind} {name!r} needs an embedding model: models.embedder = NAME or FOLDER")
    if parameter in ("model", "effects") and config.subject is None:
        raise UserError(
            f"{kind} {name!r} runs the subject: the configuration needs [subject], [dictionary] and [corpus]"
        )
    if parameter == "explainer":
        inner = chosen or _inner(config)
        if not hasattr(_maker("explainer", inner), "candidate"):
            raise UserError(f"explainer {name!r} needs another that asks a language model, not {inner!r}")
        _check(config, "explainer", inner, {})


def _rival_of(config: RunConfig) -> str:
    """Return the explainer whose draws the agent is compared with."""
    name = top_writer(config.cascade.rungs)
    draws = name != TEST_AND_REFINE and hasattr(_maker("explainer", name), "candidate")
    return name if draws else _inner(config)


def _inner(config: RunConfig) -> str:
    return "combined" if config.subject is not None else "one-shot"


def _checked_options(kind: Kind, name: str, maker: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(maker).parameters
    known = [one for one in parameters if one not in _SUPPLIED or one in _NAMED]
    checked: dict[str, Any] = {}
    for option, value in options.items():
        if option not in known:
            there = f"there are: {', '.join(known)}.{nearest(option, known)}" if known else "it has none"
            raise UserError(f"{kind} {name!r} has no option {option!r}; {there}")
        checked[option] = value if option in _NAMED else _fitting(kind, name, maker, option, value)
    return checked


def _fitting(kind: Kind, name: str, maker: Callable[..., Any], option: str, value: Any) -> Any:
    """Return `value` as the type of the option; raises UserError where it has another."""
    annotation = inspect.signature(maker).parameters[option].annotation
    holder = type("Holder", (), {"__annotations__": {option: annotation}})
    wanted = typing.get_type_hints(holder, vars(sys.modules[maker.__module__]))[option]
    try:
        return TypeAdapter(wanted).validate_python(value)
    except ValidationError as error:
        raise UserError(f"{kind} {name!r}: option {option} = {value!r}: {error.errors()[0]['msg']}") from None

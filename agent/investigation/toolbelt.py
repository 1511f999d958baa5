"""The tools of an investigator: functions with a schema, calls that are checked, results that are compact.

1. `@tool(kind)` registers a function `name(bench, …) -> Outcome` under its name; its schema comes from its signature and
   docstring (`schemas`). An experiment's schema also asks for a prediction of its headline figure.
2. `Toolbelt.checked` holds a call against its schema; `Toolbelt.run` runs it. What the investigator can mend comes back as
   a result of status `error`, what may not be done as `refused`, both in words and fenced, since they may quote a corpus.
   Anything else is a bug and crashes.
3. A result's text is cut for the model (`fencing.cut`); its facts are complete, plain JSON, without NaN.

A toolbelt has no state of its own, so calls may come from several threads at a time.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, get_args

from exegete.agent.findings import plain
from exegete.agent.investigation.bench import Bench
from exegete.agent.investigation.contract import Call, Headline, Kind, Outcome, Prediction, Result
from exegete.agent.investigation.fencing import as_meant, cut, fenced, fenced_text
from exegete.agent.investigation.schemas import Format, Schema, arguments_schema, as_written, described, fitting
from exegete.tools.errors import ExegeteError, SealedSplitError, ToolError, nearest

TEXT_CHARACTERS = 6_000
"""Of a result that the model is shown, at most."""
PREDICTION: dict[str, Schema] = {
    "hypothesis": {"type": "string", "description": "Id of the hypothesis that this experiment tests, for example H1."},
    "because": {"type": "string", "description": "Why the headline figure will lie where you predict it."},
    "low": {"type": "number", "description": "The headline figure will be at least this. Give low, high or both."},
    "high": {"type": "number", "description": "The headline figure will be at most this. Give low, high or both."},
}
"""What the schema of every experiment has beside its own arguments."""

_REST = "ask for less at a time (fewer latents, texts or rows, or an offset)"
_REST_OF_EXPERIMENT = "the rest is kept with the experiment: recall it by its id"
_BUILT_IN = ("lookups", "looking", "labeling", "notes", "experiments")
"""Modules of this package whose tools are always there."""

F = TypeVar("F", bound=Callable[..., Any])


class Refused(ToolError):
    """The call may not be made as it is."""


@dataclass(frozen=True)
class Tool:
    """A function that the investigator can call."""

    name: str
    kind: Kind
    function: Callable[..., Any]
    """Takes the bench and the arguments; None is what a note returns."""
    description: str
    parameters: Schema = field(repr=False)
    """JSON Schema of the arguments, for an experiment those of the prediction among them."""


TOOLS: dict[str, Tool] = {}
"""All registered tools; complete once `every_tool` was called."""


def tool(kind: Kind) -> Callable[[F], F]:
    """Register a function as a tool under its own name.

    Raises:
        ValueError: the name is taken, a parameter is not described, or an experiment has one of a prediction's names.
        TypeError: a parameter has a type that no schema can say.
    """

    def register(function: F) -> F:
        made = make_tool(kind, function)
        if made.name in TOOLS:
            raise ValueError(f"a tool named {made.name!r} is registered already")
        TOOLS[made.name] = made
        return function

    return register


def make_tool(kind: Kind, function: Callable[..., Any]) -> Tool:
    """Return a function as a tool, without registering it; raises as `tool`."""
    if kind not in get_args(Kind):
        raise ValueError(f"{kind!r} is no kind of tool; there are: {', '.join(get_args(Kind))}")
    description, parameters = described(function, skip=0 if kind == "note" else 1)
    if kind == "experiment":
        parameters = _predicted(function.__name__, parameters)
    return Tool(function.__name__, kind, function, description, parameters)


def every_tool() -> dict[str, Tool]:
    """Import all tools that Exegete has and return `TOOLS`."""
    for module in _BUILT_IN:
        importlib.import_module(f"exegete.agent.investigation.{module}")
    return TOOLS


class Toolbelt:
    """Runs the calls of one investigation."""

    def __init__(
        self,
        bench: Bench,
        tools: Mapping[str, Tool] = TOOLS,
        *,
        recall: Callable[[str], Outcome | None] | None = None,
        most: int = TEXT_CHARACTERS,
    ) -> None:
        """Take what tools work on.

        Args:
            bench: of the investigation.
            tools: by name; all that Exegete has where left out.
            recall: returns what the experiment with an id found, None where there is none; without it nothing is recalled.
            most: characters of a result's text.
        """
        self.bench = bench
        self.tools: dict[str, Tool] = dict(every_tool() if tools is TOOLS else tools)
        if recall is not None:
            self.tools["recall"] = _recalling(recall, most)
        self._most = most

    def schemas(self, format: Format) -> list[Schema]:
        """Return every tool as a provider takes it: lookups, experiments, notes, each kind by name."""
        order = list(get_args(Kind))
        listed = sorted(self.tools.values(), key=lambda one: (order.index(one.kind), one.name))
        return [as_written(format, one.name, one.description, one.parameters) for one in listed]

    def checked(self, call: Call) -> tuple[Tool, dict[str, Any], Prediction | None]:
        """Return the tool of a call, its arguments without the prediction, and the prediction of an experiment.

        Arguments that were left out have their defaults, so that what means the same is the same, and texts have line
        breaks where ⏎ stands for them: so they were shown.

        Raises:
            ToolError: there is no such tool, an argument is wrong or missing, or so is the prediction (`Refused`).
        """
        if call.tool not in self.tools:
            known = ", ".join(sorted(self.tools))
            raise ToolError(f"there is no tool {call.tool!r}; there are: {known}.{nearest(call.tool, self.tools)}")
        chosen = self.tools[call.tool]
        prediction = None
        arguments: Any = call.arguments
        if chosen.kind == "experiment" and isinstance(arguments, Mapping):
            prediction = _prediction(chosen.name, arguments)
        fit = _defaults(chosen.parameters) | fitting(chosen.name, arguments, chosen.parameters)
        return chosen, {name: _meant(fit[name]) for name in fit if not _of_prediction(chosen, name)}, prediction

    def run(self, call: Call) -> Result:
        """Run a call and return what became of it. Never raises an `ExegeteError`."""
        try:
            chosen, arguments, _ = self.checked(call)
            if chosen.kind == "note":
                raise Refused(f"{chosen.name} is a note, and nothing to run; it belongs into the decision itself")
            found = chosen.function(self.bench, **arguments)
        except (SealedSplitError, Refused) as error:
            return Result(call, "refused", _said(error, self._most))
        except ExegeteError as error:
            return Result(call, "error", _said(error, self._most))
        return Result(call, "ok", self._compact(chosen, found))

    def _compact(self, chosen: Tool, found: Outcome) -> Outcome:
        rest = _REST_OF_EXPERIMENT if chosen.kind == "experiment" and "recall" in self.tools else _REST
        return replace(
            found,
            text=cut(found.text, self._most, rest),
            headline=None if found.headline is None else _finite(found.headline),
            facts=plain(found.facts),
            plots=tuple(plain(list(found.plots))),
        )


def _predicted(name: str, parameters: Schema) -> Schema:
    """Add the prediction to the schema of an experiment."""
    own: dict[str, Schema] = parameters["properties"]
    if taken := own.keys() & PREDICTION.keys():
        raise ValueError(f"experiment {name!r} has a parameter {sorted(taken)[0]!r}, which is the prediction's")
    # First, so that a model writes what it expects before it writes what is to be done.
    return arguments_schema({**PREDICTION, **own}, ["hypothesis", "because", *parameters["required"]])


def _prediction(name: str, arguments: Mapping[str, Any]) -> Prediction:
    """Return the prediction among the arguments of an experiment. Raises Refused where there is none."""
    given = {key: arguments.get(key) for key in PREDICTION}
    properties = {key: value for key, value in PREDICTION.items() if given[key] is not None}
    missing = [key for key in ("hypothesis", "because") if not str(given[key] or "").strip()]
    if given["low"] is None and given["high"] is None:
        missing.append("low or high")
    if missing:
        raise Refused(
            f"{name} is an experiment, and {', '.join(missing)} is missing: say before it runs where its headline figure "
            "will lie and why (hypothesis, because, and low, high or both)"
        )
    fit = fitting(name, {key: given[key] for key in properties}, arguments_schema(properties, []))
    prediction = Prediction(**fit)
    if prediction.low is not None and prediction.high is not None and prediction.low > prediction.high:
        raise Refused(f"{name}: the prediction has low = {prediction.low:g} above high = {prediction.high:g}")
    return prediction


def _defaults(parameters: Schema) -> dict[str, Any]:
    properties: dict[str, Schema] = parameters["properties"]
    return {name: one["default"] for name, one in properties.items() if "default" in one}


def _meant(value: Any) -> Any:
    if isinstance(value, str):
        return as_meant(value)
    return [_meant(one) for one in value] if isinstance(value, list) else value


def _of_prediction(chosen: Tool, name: str) -> bool:
    return chosen.kind == "experiment" and name in PREDICTION


def _said(error: ExegeteError, most: int) -> Outcome:
    # It may quote rows of a corpus, for example a text that is no number.
    return Outcome(cut(fenced("error", str(error)), most, "the rest of the message says no more"))


def _finite(headline: Headline) -> Headline:
    """JSON has no NaN: a figure that is none is null."""
    broken: dict[str, Any] = {
        name: None
        for name in headline.__dataclass_fields__
        if isinstance(value := getattr(headline, name), float) and not math.isfinite(value)
    }
    return replace(headline, **broken)


def _recalling(find: Callable[[str], Outcome | None], most: int) -> Tool:
    """Return the tool that shows again what an experiment found."""

    def recall(bench: Bench, experiment: str, offset: int = 0) -> Outcome:
        """Show again what an experiment of this investigation found, with all its figures.

        Args:
            experiment: its id, for example E3.
            offset: begin at this character of the figures, where they are too long to be shown at once.
        """
        found = find(experiment)
        if found is None:
            raise ToolError(f"there is no experiment {experiment!r} that has ended; see the ids in the results so far")
        whole = json.dumps(plain(found.facts), ensure_ascii=False)
        if not 0 <= offset <= len(whole):
            raise ToolError(f"offset is {offset}; the figures of {experiment} have {len(whole):,} characters")
        end = offset + most // 2
        head = "" if offset else f"{found.text}\n"
        more = f"\n[{len(whole) - end:,} characters more: offset = {end}]" if end < len(whole) else ""
        return replace(found, text=f"{head}{fenced_text('figures', whole[offset:end])}{more}")

    return make_tool("lookup", recall)

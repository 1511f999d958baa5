"""What an explanation is, what an explainer does, and where explainers register."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from exegete.tools.errors import ExegeteError, UserError, nearest
from exegete.tools.seeds import digest
from exegete.tools.windows import LatentEvidence


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a latent responds to, in words and (optionally) as an executable predicate over tokens that says the same."""

    text: str
    predicate: str | None = None
    """Source text in the grammar of `exegete.tools.predicates`; parsed, never evaluated as Python."""
    explainer: str = "given"
    model: str | None = None
    prompt_digest: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    parent: str | None = None
    """Id of the explanation that this one refines."""

    def id(self, dictionary: str, latent: int) -> str:
        """Return the content-addressed id of this explanation for one latent: `sha256:…`."""
        made_with = json.dumps([self.explainer, self.model, self.prompt_digest, dict(self.parameters)], sort_keys=True)
        return digest(dictionary, str(latent), self.text, self.predicate or "", made_with, self.parent or "")


class NotExplained(ExegeteError):
    """The language model that was asked gave no explanation: refused, cut short, unparsed, … `status` says which."""

    def __init__(self, status: str, detail: str = "") -> None:
        super().__init__(f"{status}: {detail}" if detail else status)
        self.status = status


class Explainer(Protocol):
    """Writes the explanation of one latent."""

    name: str

    async def explain(self, evidence: LatentEvidence, seed: int) -> Explanation | None:
        """Return an explanation of what `evidence` shows, or None where it shows nothing that can be said.

        `evidence` holds only the splits an explainer may see; `seed` is the latent's own.

        Raises:
            NotExplained: a language model was asked and failed to answer: that says nothing about the evidence.
        """
        ...


Maker = TypeVar("Maker", bound=Callable[..., Explainer])
_MAKERS: dict[str, Callable[..., Explainer]] = {}
_BUILT_IN = (
    "exegete.tools.explainers.best_of",
    "exegete.tools.explainers.clusters",
    "exegete.tools.explainers.contrastive",
    "exegete.tools.explainers.given",
    "exegete.tools.explainers.lexical",
    "exegete.tools.explainers.one_shot",
    "exegete.tools.explainers.output",
)


def explainer(name: str) -> Callable[[Maker], Maker]:
    """Register a class or function that makes an explainer under `name`. Registering a name twice raises ValueError."""

    def register(maker: Maker) -> Maker:
        if name in _MAKERS:
            raise ValueError(f"an explainer named {name!r} is registered already")
        _MAKERS[name] = maker
        return maker

    return register


def explainer_names() -> list[str]:
    """Return the names of all registered explainers, sorted."""
    for module in _BUILT_IN:
        importlib.import_module(module)
    return sorted(_MAKERS)


def maker_of(name: str) -> Callable[..., Explainer]:
    """Return the class or function registered as `name`. Raises KeyError where there is none."""
    explainer_names()
    return _MAKERS[name]


def make_explainer(name: str, **options: Any) -> Explainer:
    """Return the explainer registered as `name`, made with `options`.

    Raises:
        UserError: there is none of that name.
    """
    known = explainer_names()
    if name not in _MAKERS:
        raise UserError(f"no explainer is named {name!r}; there are: {', '.join(known)}.{nearest(name, known)}")
    return _MAKERS[name](**options)

"""What the explainers that ask a language model share: windows into a prompt, the prompt to the client, its reply back.

1. Firing windows of the explain split are taken evenly from the quantiles of the peak, the strongest first (PROTOCOLS
   §1, §2), each with its marks and whole activations 1–10 of the strongest token shown.
2. The answer is an explanation and a predicate, by JSON Schema; either may be null. No explanation means that the model
   sees no pattern.
3. A predicate that does not parse is dropped, and the explanation's parameters say why; none is ever evaluated.

Source: Bills et al. 2023, "Language models can explain neurons in language models"; Paulo et al. 2024, section
'explanation', for quantile windows and marks.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exegete.tools.errors import UserError
from exegete.tools.explainers.contract import Explanation, NotExplained
from exegete.tools.llm.contract import Client, schema_text
from exegete.tools.predicates import PredicateError, parse
from exegete.tools.prompting import Line, Rendered, window_line
from exegete.tools.rendering import quantised
from exegete.tools.seeds import generator
from exegete.tools.windows import LatentEvidence, Window

WINDOWS = 40
_SHOWN_AS = str.maketrans({"‹": "<", "›": ">", "ˋ": "`", "⏎": "\\n", "→": "\\t"})
"""A model that has seen `‹br›⏎` in a prompt means `<br>\\n`; in a predicate that makes a difference."""


class Asker:
    """Asks a language model for an explanation and reads its answer."""

    name: str

    def __init__(
        self, client: Client, windows: int = WINDOWS, temperature: float | None = None, max_tokens: int = 2_048
    ) -> None:
        """Ask `client`.

        Args:
            client: the language model.
            windows: firing windows to show, at most.
            temperature: None leaves the provider's default.
            max_tokens: of an answer, reasoning included.

        Raises:
            UserError: `windows` is less than one.
        """
        if windows < 1:
            raise UserError(f"an explainer needs at least one window to look at, not {windows}")
        self.client = client
        self.windows = windows
        self._options = {"temperature": temperature, "max_tokens": max_tokens}

    async def ask(self, prompt: Rendered, schema: str, sample: int) -> dict[str, Any]:
        """Return the parsed answer to `prompt`.

        Raises:
            NotExplained: there is none.
        """
        reply = await self.client.complete(prompt.request(schema=schema, sample=sample, **self._options))
        if reply.status != "ok":
            raise NotExplained(reply.status, reply.detail)
        if not isinstance(reply.parsed, dict):
            raise NotExplained("unparsed", reply.text[:200])
        return reply.parsed

    def explanation(
        self, answer: Mapping[str, Any], prompt_digest: str, parameters: Mapping[str, Any]
    ) -> Explanation | None:
        """Return what the model answered as an explanation, None where it sees no pattern."""
        text = answer.get("explanation")
        if text is None:
            return None
        if not isinstance(text, str) or not text.strip():
            raise NotExplained("empty" if isinstance(text, str) else "unparsed", "no explanation in the answer")
        predicate, dropped = checked_predicate(answer.get("predicate"))
        noted = {**parameters, **self._options, **({"predicate_dropped": dropped} if dropped else {})}
        return Explanation(" ".join(text.split()), predicate, self.name, self.client.name, prompt_digest, noted)


class ModelExplainer(Asker, ABC):
    """Asks a language model once for an explanation, or several times for different ones."""

    async def explain(self, evidence: LatentEvidence, seed: int) -> Explanation | None:
        """Return the explanation, or None where nothing fires or the model sees no pattern.

        Raises:
            NotExplained: the model gave no usable answer.
            UserError: the client cannot be asked at all.
        """
        return await self.candidate(evidence, seed, 0)

    @abstractmethod
    async def candidate(self, evidence: LatentEvidence, seed: int, sample: int) -> Explanation | None:
        """Return the explanation number `sample` of several, each asked for anew; raises as `explain`."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A firing window in a prompt."""

    text: Line
    activations: Line | None
    """For example `" cat" 10, " sat" 3`; None where only firing is known."""


def firing_windows(evidence: LatentEvidence, count: int, seed: int, sample: int = 0) -> list[Window]:
    """Return at most `count` firing windows of the explain split, as many of each quantile, the strongest quantile first.

    Where there are more, sample 0 takes the first of each quantile and every other one a different draw. Windows of
    highest peak are used where no uniform sample was kept (imports).

    Raises:
        SealedSplitError: `evidence` may not be read for explaining.
    """
    firing = [w for w in evidence.select("explain") if w.fires and (w.activations is not None or w.firing_positions())]
    firing = [w for w in firing if w.stratum is not None] or firing
    if sample:
        firing = [firing[i] for i in generator(seed, "windows shown", sample).permutation(len(firing))]
    strata: dict[int, list[Window]] = defaultdict(list)
    for window in firing:
        strata[window.stratum or 0].append(window)
    in_turn = [(turn, -stratum, window) for stratum, own in strata.items() for turn, window in enumerate(own)]
    kept = sorted(in_turn, key=lambda one: one[:2])[:count]
    return [window for _, _, window in sorted(kept, key=lambda one: (one[1], one[0]))]


def shown(windows: Sequence[Window]) -> list[Shown]:
    """Return firing windows as a prompt shows them; activations are in tenths of the largest one among them."""
    peak = max((w.peak or 0.0 for w in windows), default=0.0)
    return [_shown(w, w.firing_positions(), peak) for w in windows]


def _shown(window: Window, positions: Sequence[int], peak: float) -> Shown:
    text = window_line(window.tokens, positions)
    if window.activations is None:
        return Shown(text, None)
    values = window.activations.tolist()
    listed = [f"{json.dumps(window.tokens[i], ensure_ascii=False)} {quantised(values[i], peak)}" for i in positions]
    return Shown(text, window_line([", ".join(listed)]))


def answer_schema(predicate: bool = True, **more: Mapping[str, Any]) -> str:
    """Return the JSON Schema of an answer: `explanation` and (if asked for) `predicate`, strings or null, and `more`."""
    text = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    properties = {**more, "explanation": text, **({"predicate": text} if predicate else {})}
    return schema_text(
        {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    )


def checked_predicate(source: Any) -> tuple[str | None, str | None]:
    """Return the canonical source of a predicate that a model wrote, or None and why it was dropped."""
    if source is None or (isinstance(source, str) and not source.strip()):
        return None, None
    if not isinstance(source, str):
        return None, f"a predicate is text, not {type(source).__name__}"
    try:
        return str(parse(source.translate(_SHOWN_AS))), None
    except PredicateError as error:
        return None, str(error)

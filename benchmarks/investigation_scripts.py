"""What a scripted language model says in the investigations of `benchmarks.investigation_concurrency`.

1. Each investigation is of a behaviour of the bundled grammar, with minimal pairs as prompts.
2. The latents that the script names are those that the product's own `attribute` ranks first on the question's prompts; that is
   worked out before anything is measured. A language model would have read them off the same tool.
3. A script is twelve replies: it looks, compares and attributes; ablates, exchanges and steers, some of it at the same time, each
   experiment with a prediction; settles its hypotheses, claims and ends. What it tries in the middle differs from one investigation to
   the next.

    reply 4: ablate(latents=[954], hypothesis="H1", …), ablate(latents=[12], hypothesis="H2", …), interchange(latents=[954, 12], …)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.investigation_questions import suite
from exegete.agent.investigation.bench import Bench
from exegete.agent.investigation.contract import Budget, Call, Question
from exegete.agent.investigation.toolbelt import Toolbelt, every_tool
from exegete.agent.live import Live
from exegete.tools.bundled import sample_texts

BEHAVIOURS = (
    *("order.DESC", "order.ASC", "aggregate.MAX", "aggregate.COUNT"),
    *("operator.>", "limit.3", "distinct", "column.copy"),
)
"""One for each investigation, of those that the bundled grammar has."""
TEXTS_SEED, TEXTS = 9_100, 40

Reply = dict[str, Any]


@dataclass(frozen=True)
class Scripted:
    """One investigation, and what the model says in it."""

    name: str
    """Of the behaviour."""
    question: Question
    replies: tuple[Reply, ...]


def scripts(live: Live, count: int, prompts: int, seed: int) -> list[Scripted]:
    """Return `count` scripted investigations, each of a behaviour of its own with `prompts` prompts.

    Raises:
        KeyError: the grammar has no such behaviour.
    """
    known = {asked.name: asked.question for asked in suite(seed, prompts, 1, Budget()) if asked.kind == "behaviour"}
    found = []
    for number, name in enumerate(BEHAVIOURS[:count]):
        question = known[name]
        latents = _leaders(live, question)
        found.append(Scripted(name, question, tuple(script(question, latents, number))))
    return found


def _leaders(live: Live, question: Question) -> list[int]:
    """Return the latents that attribution ranks first, with the metric on all prompts of the question."""
    assert question.metric is not None
    texts = tuple(sample_texts(TEXTS_SEED, TEXTS))
    bench = Bench(live, question.cases, question.metric, question.seed, texts=texts)
    arguments = {"top": 4, "prompts": 8, "groups": 8, "hypothesis": "H1", "because": "a look beforehand", "low": 0.0}
    result = Toolbelt(bench, every_tool()).run(Call("0", "attribute", arguments))
    if result.status != "ok":
        raise ValueError(f"{question.text}: {result.outcome.text}")
    return [int(row["latent"]) for row in result.outcome.facts["latents"]]


def script(question: Question, latents: Sequence[int], number: int) -> list[Reply]:
    """Return what the model says, in order."""
    first, second, third = latents[:3]
    pair = [first, second]
    source = question.cases[0].variant or question.cases[0].prompt
    looking = [
        _call("hypothesis", statement="A few latents that fire on the words in question carry it."),
        _call("hypothesis", statement=f"Latent {third} has no part in it."),
        _call("prompts", count=4),
        _call("activations", prompts=[0, 1]),
    ]
    return [
        _says("I look at the prompts.", *looking),
        _says(
            "What goes with it, and what carries it?",
            _tries("compare", low=1.0, top=6),
            _tries("attribute", low=0.0, top=6, prompts=12),
        ),
        _says("What are they?", *(_call("card", latent=one) for one in (first, second))),
        _says(
            "Each alone, and both given what they are on the variants.",
            _tries("ablate", latents=[first], high=0.0),
            _tries("ablate", latents=[second], high=0.0),
            _tries("interchange", latents=pair, high=0.0),
        ),
        _says("And this one?", _tries("ablate", latents=[third], hypothesis="H2", low=-0.2, high=0.2)),
        _says("Where are they on?", _call("activations", prompts=[2, 3, 4], latents=pair, variants=True)),
        _says("Together, at the last token alone.", _tries("ablate", latents=pair, high=0.0, positions="last")),
        *_middle(number, pair, source),
        _says("Together.", _tries("ablate", latents=pair, high=0.0)),
        _says(
            "That settles it.",
            _call("update", hypothesis="H1", status="supported"),
            _call("claim", statement=f"Latents {first} and {second} hold it up.", kind="causal", latents=pair,
                  experiments=["E3"], hypothesis="H1"),
            _call("claim", statement="The difference between prompt and variant acts through them.", kind="causal",
                  latents=pair, intervention="interchange", experiments=["E5"], hypothesis="H1"),
        ),
        _says("", _call("finish", answer=f"Latents {first} and {second} carry it; see the claims.")),
    ]  # fmt: skip


def _middle(number: int, pair: list[int], source: str) -> list[Reply]:
    """Return two steps that differ from one investigation to the next."""
    kinds = (
        _tries("lens", latents=pair[:1], low=0.0),
        _tries("patch", latents=pair, source=source, high=0.0),
        _tries("steer", latents=pair[:1], low=0.0),
        _tries("generate", latents=pair, tokens=12, prompts=8, low=0.0),
        _tries("interactions", latents=pair, low=-1.0),
    )
    return [_says("I try something else.", kinds[(number + shift) % len(kinds)]) for shift in (0, 2)]


def _says(text: str, *calls: Reply) -> Reply:
    return {"text": text, "calls": list(calls)}


def _call(name: str, **arguments: Any) -> Reply:
    return {"name": name, "arguments": arguments}


def _tries(name: str, hypothesis: str = "H1", **arguments: Any) -> Reply:
    return _call(name, hypothesis=hypothesis, because="it is what the hypothesis says", **arguments)

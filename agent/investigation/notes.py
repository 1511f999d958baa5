"""What the investigator writes down: tools that are described here and run by nobody.

A model writes hypotheses and claims as calls, since it can. Whoever drives the model takes them out of its answer and makes
a `Decision` of them; they are never handed to `Toolbelt.run`.
"""

from __future__ import annotations

from typing import Literal

from exegete.agent.investigation.toolbelt import tool


@tool("note")
def hypothesis(statement: str) -> None:
    """Write down a hypothesis that an experiment can show to be false. It gets an id, H1, H2, …, which predictions name.

    Args:
        statement: what may be so, of which latents, on which prompts.
    """


@tool("note")
def update(hypothesis: str, status: Literal["open", "supported", "not shown", "rejected"]) -> None:
    """Say where a hypothesis stands after what was found.

    Args:
        hypothesis: its id, for example H1.
        status: `supported` or `rejected` by an experiment whose prediction was recorded before; `not shown` where one was made
            that tells neither for it nor against it; `open` otherwise.
    """


@tool("note")
def claim(
    statement: str,
    kind: Literal["causal", "correlational"],
    latents: list[int] | None = None,
    intervention: Literal["ablate", "interchange", "steer"] = "ablate",
    expects: Literal["falls", "rises"] = "falls",
    flips: bool = False,
    experiments: list[str] | None = None,
    hypothesis: str = "",
) -> None:
    """Propose a sentence of the report. Code checks it on held-out prompts that no tool shows, beside random latents.

    Args:
        statement: one sentence that names what was found, no more than the check can bear out.
        kind: `causal` is checked by the intervention; `correlational` is reported as such and not checked.
        latents: those that are intervened on; needed where it is causal.
        intervention: set the latents to zero (`ablate`), give them their activations on each prompt's variant
            (`interchange`), or turn them up to a fixed KL (`steer`).
        expects: what the intervention does to the metric.
        flips: whether you also claim that most prompts no longer show the behaviour (with `rises`, that they now show it).
        experiments: ids of those that it rests on, for example ["E2", "E5"].
        hypothesis: id of the hypothesis that it comes from.
    """


@tool("note")
def withdraw(claim: int, why: str) -> None:
    """Take a claim back, for example since a later experiment speaks against it. The report lists it as withdrawn, with the reason.

    It is not checked then, and not counted among the claims that are adjusted for. Claimed again in the same words, it stands again.

    Args:
        claim: its number, as it was written down, from 1.
        why: what speaks against it, with the experiment that shows it.
    """


@tool("note")
def finish(answer: str) -> None:
    """End the investigation; the claims written down so far are then checked and reported.

    Args:
        answer: the answer to the question, in a few sentences, with what was not found out.
    """

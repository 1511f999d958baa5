"""The rungs of a cascade that are more than an explainer."""

from __future__ import annotations

from collections.abc import Sequence

REFINE = "refine"
"""Revises what stands by its mistakes, in rounds: `exegete.tools.explainers.refining`."""
TEST_AND_REFINE = "test-and-refine"
"""The dearest, and the last: an agent that runs texts of its own, `exegete.agent.investigation.explaining`."""


def top_writer(rungs: Sequence[str]) -> str:
    """Return the highest rung that explains by itself in one go, else `test-and-refine`; empty where there is neither."""
    writers = [name for name in rungs if name != REFINE]
    return next(iter([name for name in reversed(writers) if name != TEST_AND_REFINE] or writers), "")


def out_of_place(rungs: Sequence[str]) -> str:
    """Return what is wrong with the order of rungs, empty where nothing is."""
    if TEST_AND_REFINE in rungs[:-1]:
        return f"{TEST_AND_REFINE} is the dearest, and comes last"
    others = [name for name in rungs if name != TEST_AND_REFINE]
    if REFINE in others and (others[-1] != REFINE or len(others) < 2):
        return f"{REFINE} revises what is below it, and comes last, but for {TEST_AND_REFINE}"
    return ""

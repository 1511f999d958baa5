"""The investigation's graph, checkpointed: what happens after what. `inquiry` says what each node does.

    frame → approve → think → predict → experiment → update → listen ─→ think …
                        └───────────── the search is over ──────┴─→ verify → report

1. After every node a checkpoint is on the disk (`checkpoints.sqlite` in the investigation's folder), which holds two plain values: the
   number of decisions, and whether the search is over. What was decided and found is in the ledger.
2. `investigate` goes on from the newest checkpoint. A node that was interrupted runs again and finds in the ledger what it had done.
3. Where a person watches, `approve` and `listen` interrupt the graph until there is an answer.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command

from exegete.agent.investigation.inquiry import Inquiry, Person, State
from exegete.agent.investigation.ledger_file import told

CHECKPOINTS = "checkpoints.sqlite"
_NODES_PER_STEP = 5


async def investigated(inquiry: Inquiry, person: Person | None = None) -> None:
    """Take an investigation from where it is to its report.

    Args:
        inquiry: what it works with; `interactive` where there is a `person`.
        person: who is asked.

    Raises:
        Interrupted: it was asked to stop; the same call goes on.
        UserError: the investigator cannot go on until something is mended, a file is damaged, or the disk is full; the same call
            goes on.
    """
    steps = inquiry.ledger.begun().budget.steps
    config: Any = {
        "configurable": {"thread_id": f"round {inquiry.ledger.round}"},
        "recursion_limit": _NODES_PER_STEP * (steps + 1) + 10,
    }
    async with _checkpoints(inquiry) as saver:
        graph = investigation_graph(inquiry).compile(checkpointer=saver)
        found = await graph.aget_state(config)
        given: Any = None if found.values else {"step": 0, "done": False}
        while found.next or given is not None:
            state = await graph.ainvoke(given, config, durability="sync")
            asked = state.get("__interrupt__")
            if not asked:
                return
            given = Command(resume=_answer(inquiry, person, asked[0].value))


def investigation_graph(inquiry: Inquiry) -> StateGraph[State]:
    """Return the graph of an investigation, to be compiled with a checkpointer."""
    graph: StateGraph[State] = StateGraph(State)
    for name in ("frame", "approve", "think", "predict", "experiment", "update", "listen", "verify", "report"):
        graph.add_node(name, getattr(inquiry, name))
    graph.add_edge(START, "frame")
    graph.add_edge("frame", "approve")
    graph.add_edge("approve", "think")
    graph.add_conditional_edges("think", lambda state: "verify" if state["done"] else "predict", ["verify", "predict"])
    graph.add_edge("predict", "experiment")
    graph.add_edge("experiment", "update")
    graph.add_edge("update", "listen")
    graph.add_conditional_edges("listen", lambda state: "verify" if state["done"] else "think", ["verify", "think"])
    graph.add_edge("verify", "report")
    graph.add_edge("report", END)
    return graph


def _answer(inquiry: Inquiry, person: Person | None, asked: str) -> dict[str, Any]:
    assert person is not None, "a graph that interrupts has somebody to ask"
    ledger = inquiry.ledger
    if asked == "metric":
        proposed = ledger.proposed
        assert proposed is not None
        return asdict(person.metric(inquiry.question, proposed))
    return asdict(person.between(ledger.steps + 1, [one.result for one in ledger.calls(ledger.steps)]))


@asynccontextmanager
async def _checkpoints(inquiry: Inquiry) -> AsyncIterator[AsyncSqliteSaver]:
    path = inquiry.ledger.folder / CHECKPOINTS
    try:
        async with AsyncSqliteSaver.from_conn_string(str(path)) as saver:
            yield saver
    except sqlite3.Error as error:
        raise told(path, error) from error

"""Where a run spends its time: stacks of all its threads, looked at some fifty times a second, by the part of the code they are in.

A thread that waits (for a lock, the event loop's selector, a queue) is not counted. A library counts for the part that called it.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EVERY_S = 0.02
_WAITING = ("threading.py", "selectors.py", "queue.py", "concurrent/futures/thread.py", "concurrent/futures/_base.py")
PARTS = (
    ("publishing", ("store/publishing.py", "store/publisher.py", "store/compaction.py")),
    ("journal", ("store/journal", "store/exported_calls.py", "store/call_rows.py")),
    ("store", ("tools/store/",)),
    ("evidence", ("tools/evidence.py", "tools/windows.py")),
    ("prompts", ("tools/prompting.py", "tools/rendering.py", "evaluators/model_judge.py", "tools/explainers/")),
    ("client", ("tools/llm/",)),
    ("scores", ("evaluators/",)),
    ("scripted model", ("benchmarks/night.py",)),
    ("graph", ("langgraph", "langchain", "agent/graph.py", "agent/climbing.py")),
    ("engine", ("agent/",)),
    ("event loop", ("asyncio/",)),
)
"""In this order: the first part that a frame belongs to, from the innermost frame outwards."""


@contextmanager
def sampled() -> Iterator[Counter[str]]:
    """Return part → samples, complete when the context is left."""
    found: Counter[str] = Counter()
    over = threading.Event()
    thread = threading.Thread(target=_sample, args=(found, over), name="sampling", daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def shares(found: Counter[str]) -> dict[str, float]:
    """Return part → share of the samples, the largest first."""
    total = sum(found.values())
    return {part: round(count / total, 3) for part, count in found.most_common()} if total else {}


def _sample(found: Counter[str], over: threading.Event) -> None:
    own = threading.get_ident()
    while not over.wait(EVERY_S):
        for thread, frame in sys._current_frames().items():
            if thread != own and not frame.f_code.co_filename.endswith(_WAITING):
                found[_part(frame)] += 1


def _part(frame: FrameType | None) -> str:
    while frame is not None:
        file = frame.f_code.co_filename
        for part, places in PARTS:
            if any(place in file for place in places):
                return part
        frame = frame.f_back
    return "other"

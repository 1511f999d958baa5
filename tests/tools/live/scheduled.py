"""What the tests of the scheduler share: readings, a gate before every forward pass, and waiting for other threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from exegete.tools.live_model import LiveModel, Reading

POINT = "blocks.1.hook_resid_post"


class Gate:
    """Every forward pass waits for it to open."""

    def __init__(self, model: LiveModel) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        self._logits = model.logits

    def logits(self, *arguments: Any, **named: Any) -> Tensor:
        self.reached.set()
        assert self.open.wait(30)
        return self._logits(*arguments, **named)


def logits(reading: Reading) -> list[Tensor]:
    return [row.clone() for row in reading.logits]


def close(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return all(torch.allclose(a, b, atol=1e-4, rtol=0) for a, b in zip(found, wanted, strict=True))


def until(condition: Callable[[], bool]) -> None:
    """Wait for another thread to get there."""
    for _ in range(30_000):
        if condition():
            return
        threading.Event().wait(0.001)
    raise AssertionError("it never happened")

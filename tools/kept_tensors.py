"""Tensors that are kept for the next time, the last used ones as long as there is room."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor


class KeptTensors:
    """Keeps tensors of up to `room` numbers together, and always the last one. Safe from several threads."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._numbers = 0
        self._kept: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def missing(self, keys: Iterable[Hashable]) -> list[Any]:
        """Return those of `keys` under which nothing is kept, each once."""
        with self._lock:
            return [key for key in dict.fromkeys(keys) if key not in self._kept]

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Return what is kept under `key`, or what `make` returns, which is kept from now on."""
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return found
        made = normal(make())  # Unlocked: it may wait for the model, which another thread holds.
        with self._lock:
            self._numbers += made.numel() - (self._kept[key].numel() if key in self._kept else 0)
            self._kept[key] = made
            while len(self._kept) > 1 and self._numbers > self._room:
                _, oldest = self._kept.popitem(last=False)
                self._numbers -= oldest.numel()
        return made


def normal(found: Tensor) -> Tensor:
    """Return a copy that can take part in a gradient, as an inference tensor cannot, and that is no view of more."""
    with torch.inference_mode(False):
        return found.clone()

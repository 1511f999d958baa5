"""Many small fits, each on one thread of the linear algebra libraries: with several they spend their time waiting."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_lock = threading.Lock()
_holders = 0
_limits: Any = None


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Hold the process's BLAS libraries to one thread until the last of all concurrent callers leaves."""
    global _holders, _limits
    from threadpoolctl import threadpool_limits

    with _lock:
        if _holders == 0:
            _limits = threadpool_limits(1, user_api="blas")
        _holders += 1
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if _holders == 0:
                _limits.restore_original_limits()

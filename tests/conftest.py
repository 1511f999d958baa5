"""How the tests share a machine.

1. Every process computes with one thread: the models of the tests are small, threads would only wait for each other.
2. `-n auto` starts one worker more than there are cores: many tests wait, for servers, deadlines and processes of their own.
3. Files with slow tests come first, so that no worker is left with one of them while the others have ended.
"""

from __future__ import annotations

import os

import pytest

# Torch reads it when it is imported; processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    return len(os.sched_getaffinity(0)) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)

"""Hooks on a subject that change what they claim to change.

Three traps lie in the bridge's hook points:

1. Hooks on some names do nothing: `require_effective` tries each before it is used.
2. Several names may be one point (`hook_resid_post`, `hook_out`), so levels, not names, say which hooks to remove.
3. `hook_resid_mid` is the entry of the second norm. A change there reaches the layer's second branch, but not the
   residual that goes around it. What was changed is therefore added to the layer's output as well, before any other
   hook there. Where a layer's output is not that sum, the point is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from exegete.tools.errors import UserError, nearest
from exegete.tools.subject import Subject

Change = Callable[[Tensor], Tensor | None]

_LEVELS = itertools.count(1_000)
"""What hooks are removed by: each has its own. The bridge itself counts from 0."""


@contextmanager
def hooked(subject: Subject, hook_point: str, change: Change) -> Iterator[None]:
    """Hand `change` the vectors at a hook point, shape (trial, position, width); what it returns replaces them."""
    around = _goes_around(subject, hook_point)
    if around is None:
        with _hook(subject, hook_point, change):
            yield
        return
    waiting: list[Tensor] = []

    def branch(vectors: Tensor) -> Tensor | None:
        changed = change(vectors)
        waiting[:] = [] if changed is None else [changed - vectors]
        return changed

    def skip(vectors: Tensor) -> Tensor | None:
        return vectors + waiting.pop() if waiting else None

    with ExitStack() as hooks:
        hooks.enter_context(_hook(subject, hook_point, branch))
        hooks.enter_context(_hook(subject, around, skip, first=True))
        yield


def require_effective(subject: Subject, hook_point: str, run: Callable[[], Tensor]) -> None:
    """Raise UserError unless a change at `hook_point` changes, and as it should, what `run` returns (logits)."""
    subject.width(hook_point)
    clean = run()
    with hooked(subject, hook_point, _disturbed):
        changed = run()
    other = [point for point in subject.hook_points if point != hook_point]
    if torch.equal(clean, changed):
        raise UserError(
            f"a change at {hook_point!r} does not reach the output of {subject.name!r}.{nearest(hook_point, other)}"
        )
    if _goes_around(subject, hook_point):
        with _hook(subject, hook_point, lambda x: x.copy_(_disturbed(x))):
            expected = run()  # The residual is the very tensor that the branch is given.
        if float((changed - expected).abs().max()) > 0.01 * float((clean - expected).abs().max()):
            raise UserError(
                f"a change at {hook_point!r} of {subject.name!r} would reach only a part of the layer; "
                f"change {hook_point.replace('_mid', '_post')!r} or {hook_point.replace('_mid', '_pre')!r}"
            )


def _disturbed(vectors: Tensor) -> Tensor:
    return vectors + (1 + vectors.abs()) * torch.arange(vectors.shape[-1], device=vectors.device).remainder(3)


def comes_before(subject: Subject, first: str, second: str, run: Callable[[], Tensor]) -> bool:
    """Return whether `run` comes to one hook point before the other."""
    seen: list[str] = []
    with hooked(subject, first, lambda _: seen.append(first)), hooked(subject, second, lambda _: seen.append(second)):
        run()
    return seen == [first, second]


def _goes_around(subject: Subject, hook_point: str) -> str | None:
    """Return the output of the layer whose residual goes around this point, None where a hook reaches all of it."""
    block, _, name = hook_point.rpartition(".")
    own = f"{block}.{name}" == subject.points[hook_point].name
    return f"{block}.hook_resid_post" if name == "hook_resid_mid" and not own else None


@contextmanager
def _hook(subject: Subject, hook_point: str, change: Change, *, first: bool = False) -> Iterator[None]:
    point = subject.points[hook_point]
    level = next(_LEVELS)

    def hook(vectors: Tensor, hook: Any) -> Tensor | None:
        changed = change(vectors.reshape(*vectors.shape[:2], -1))
        return None if changed is None else changed.reshape(vectors.shape)

    point.add_hook(hook, level=level, prepend=first)
    try:
        yield
    finally:
        point.remove_hooks(dir="fwd", level=level)

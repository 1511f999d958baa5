"""What a run tells the world while it works: its progress on a display, its vital signs, its event log.

`watched` makes one `Watch` for as long as a process writes a store. It is a `Progress` itself, so that whatever takes one is
watched without knowing it: each stage goes to the display, into the vital signs and into the log. A thread of its own beats
every half minute, also where the run waits for answers, and writes the vital signs down. How the run ended is the last event.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exegete.agent.events import EventLog
from exegete.agent.progress import Advance, Display, Progress
from exegete.agent.vitals import StageVitals, Vitals

if TYPE_CHECKING:
    from exegete.agent.config import RunConfig
    from exegete.tools.store import LatentRecord

BEAT_S = 30.0
SCORED = ("labeling", "floors")
"""Stages whose records are the run's results."""
log = logging.getLogger(__name__)
_MENDING = (
    ("does not take the key", "key"),
    ("no permission", "permission"),
    ("payment or quota", "quota"),
    ("no such model", "model"),
    ("free some space", "disk"),
)
"""What our own messages say → the reason; a provider's words, which may quote a prompt, are not kept."""


class Watch:
    """The progress of one process that writes a store; `watched` makes it."""

    def __init__(self, display: Progress, vitals: Vitals, log: EventLog, clock: Callable[[], float] = time.monotonic):
        """Show on `display`, count in `vitals`, write to `log`."""
        self.vitals = vitals
        """The vital signs, for whoever does the work to tell."""
        self._display = display
        self._log = log
        self._clock = clock
        self._run: str | None = None
        self._failed_before: Counter[str] = Counter()
        self._ended: tuple[str, dict[str, Any]] | None = None
        if isinstance(display, Display):
            display.watch(vitals)

    def say(self, line: str) -> None:
        """Show one line that is worth keeping."""
        self._display.say(line)

    @contextmanager
    def stage(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
        """Watch a stage of `total` units, of which `done` were finished earlier."""
        self.vitals.stage_begun(name, total, unit, done)
        self._log.write("stage_begun", self._run, stage=name, done=done, total=total, unit=unit)
        complete = False
        try:
            with self._display.stage(name, total, unit, done=done) as advance:

                def both(count: int) -> None:
                    self.vitals.advanced(count)
                    advance(count)

                yield both
                complete = True
        finally:
            self._stage_ended(self.vitals.stage_ended(), complete)

    def run_begun(
        self, run: str, dictionary: str, latents: int, config: RunConfig, headlines: Mapping[str, str]
    ) -> None:
        """A run over so many latents of a dictionary begins; `headlines`: evaluator → metric that is shown of it."""
        self._run = run
        self.vitals.run_begun(run, headlines)
        models = config.models
        named = (models.explainer, models.judge, models.scorer, models.embedder, *config.cascade.models.values())
        self._log.write(
            "run_begun",
            run,
            dictionary=dictionary,
            latents=latents,
            explainer=config.label.explainer,
            judge=config.label.judge,
            models=list(dict.fromkeys(filter(None, named))),
            budget_usd=config.models.budget_usd,
        )

    def recorded(self, records: Sequence[LatentRecord]) -> None:
        """Records of latents, or of their floors, are in the store; those of a pilot, which come again, do not count."""
        stage = self.vitals.stage()
        if stage is not None and stage.name in SCORED:
            self.vitals.records(records)

    def published(self, seconds: float) -> None:
        """A snapshot has been published, which took so long."""
        self._log.write("published", self._run, seconds=round(seconds, 3))

    def beat(self) -> None:
        """Write the vital signs down, and show that the run lives."""
        self._note()
        if isinstance(self._display, Display):
            self._display.beat()

    def finished(self, missing: Mapping[str, int]) -> None:
        """Everything has been done; `missing`: dictionary → latents about which calls failed for good."""
        self._ended = "finished", {"missing": {name: count for name, count in missing.items() if count}}

    def interrupted(self, reason: str = "signal") -> None:
        """The run was asked to stop and has drained."""
        self._ended = "interrupted", {"reason": reason}

    def ended(self, error: BaseException | None) -> None:
        """Write down how it ended: as was told before, or as `error` says."""
        if error is None:
            event, fields = self._ended or ("finished", {"missing": {}})
        else:
            event, fields = how_it_ended(error)
        self._note()
        self._log.write(event, self._run, **fields)

    def _note(self) -> None:
        """Write the vital signs down, and what calls have failed since this was last told."""
        snapshot = self.vitals.snapshot()
        failed = Counter(snapshot.calls.failed)
        if new := failed - self._failed_before:
            self._log.write("calls_failed", self._run, failed=dict(sorted(new.items())))
        self._failed_before = failed
        self._log.write("progress", self._run, vitals=asdict(snapshot))

    def _stage_ended(self, stage: StageVitals | None, complete: bool) -> None:
        if stage is not None:
            counts = {"done": stage.done, "total": stage.total, "unit": stage.unit}
            seconds = round(stage.elapsed_s, 3)
            self._log.write("stage_ended", self._run, stage=stage.name, **counts, seconds=seconds, complete=complete)


@contextmanager
def watched(folder: Path, display: Progress, every_s: float = BEAT_S) -> Iterator[Watch]:
    """Watch a process that writes the store in `folder` for as long as the context is open.

    How it ended is what `Watch.finished` or `Watch.interrupted` were told, or the exception that leaves the context.
    """
    events = EventLog(folder, said=display.say)
    watch = Watch(display, Vitals(), events)
    events.write("begun", pid=os.getpid(), version=version("exegete"))
    over = threading.Event()
    beating = threading.Thread(target=_beat, args=(watch, over, every_s), name="exegete-watch", daemon=True)
    beating.start()
    error: BaseException | None = None
    try:
        yield watch
    except BaseException as raised:
        error = raised
        raise
    finally:
        over.set()
        beating.join()
        watch.ended(error)
        events.close()


def how_it_ended(error: BaseException) -> tuple[str, dict[str, Any]]:
    """Return the event, with its fields, that an exception which ends a run stands for."""
    from exegete.agent.gathering import Interrupted
    from exegete.tools.errors import UserError

    if isinstance(error, (KeyboardInterrupt, Interrupted)):
        return "interrupted", {"reason": "signal"}
    if isinstance(error, UserError):
        reason, told = reason_of(error)
        return "halted", {"reason": reason, "told": told}
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return "failed", {"reason": "disk" if full else "error", "error": type(error).__name__}


def reason_of(error: BaseException) -> tuple[str, str]:
    """Return why a run halted and what can be told of it.

    `budget` (told in our own words), `key`, `permission`, `quota`, `model`, `disk`, or `other`.
    """
    from exegete.tools.llm import BudgetUsedUp

    if isinstance(error, BudgetUsedUp) or isinstance(error.__cause__, BudgetUsedUp):
        return "budget", str(error)
    said = str(error)
    return next((reason for words, reason in _MENDING if words in said), "other"), ""


def _beat(watch: Watch, over: threading.Event, every_s: float) -> None:
    while not over.wait(every_s):
        try:
            watch.beat()
        except Exception:  # A display that cannot be written to any more must not take the log along.
            log.exception("the progress of the run could not be shown")

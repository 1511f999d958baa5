"""Publishing in the background, no more often than it can be afforded."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from exegete.tools.errors import UserError

SHARE = 0.1
"""Of the time that publishing may take."""

log = logging.getLogger(__name__)


class Publisher:
    """Publishes in a thread of its own, one snapshot at a time; safe to call from several threads."""

    def __init__(self, publish: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        """Publish by calling `publish`; `clock` in seconds."""
        self._publish = publish
        self._clock = clock
        self._lock = threading.Lock()
        self._busy = threading.Lock()
        self._thread: threading.Thread | None = None
        self._ended = clock()
        self._took_s = 0.0
        self._bug: BaseException | None = None

    def soon(self, every_s: float) -> bool:
        """Begin a publishing where the last one ended long enough ago; return whether it was begun.

        That is `every_s`, or as long that publishing takes a tenth of the time, whichever is longer. Never while one is under way.
        """
        with self._lock:
            pause = max(every_s, self._took_s * (1 / SHARE - 1))
            if self._bug is not None or self._is_under_way() or self._clock() - self._ended < pause:
                return False
            self._thread = threading.Thread(target=self._run, name="publishing", daemon=True)
            self._thread.start()
            return True

    def now(self) -> None:
        """Publish once none is under way. Raises what that does, or what one in the background has raised that is no UserError."""
        self.close()
        with self._lock:
            bug, self._bug = self._bug, None
        if bug is not None:
            raise bug
        self._timed()

    def close(self) -> None:
        """Wait until no publishing is under way."""
        if self._thread is not None:
            self._thread.join()

    def _is_under_way(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._timed()
        except UserError as error:
            log.warning("not published this time: %s", error)
        except BaseException as error:
            self._bug = error

    def _timed(self) -> None:
        with self._busy:
            begun = self._clock()
            try:
                self._publish()
            finally:
                self._ended = self._clock()
                self._took_s = self._ended - begun

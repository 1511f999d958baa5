"""How batches are gathered, watched and retried."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exegete.tools.errors import UserError


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What a batch client may do. Raises UserError where a value is not positive."""

    max_requests: int | None = None
    """In one batch; the provider's limit where left out, or where it is lower."""
    max_bytes: int | None = None
    """Of one batch's file; likewise."""
    linger_s: float = 5.0
    """What is gathered is sent when no new call came for so long."""
    gather_s: float = 300.0
    """…and so long after its first call at the latest."""
    poll_s: float = 5.0
    """Between the first looks at a batch; each wait is half as long again as the one before."""
    poll_max_s: float = 60.0
    settle_s: float = 60.0
    """A batch that is not in the provider's list so long after its answer was lost was not made."""
    submissions: int = 3
    """Into so many batches a call is put, until it counts as failed."""
    full_s: float = 300.0
    """Wait before a batch is sent again that the provider's queue had no room for."""
    outage_s: float = 3_600.0
    """So long the provider may say nothing about a batch until calls in it count as failed; the batch is not given up."""
    transfer_s: float = 1_800.0
    """For sending or fetching one file."""
    forsake: bool = False
    """Ask again what was in batches of which the provider says that it does not have them."""
    scratch: Path | None = None
    """Folder for files on their way, as large as the batches in flight; the system's temporary one where left out."""

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
                raise UserError(f"batch limits: {name} = {value!r}: expected a number above 0")

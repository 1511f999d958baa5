"""Evidence from elsewhere: the JSONL interchange format, in and out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Imported:
    """One dictionary that a file brought."""

    dictionary: str
    """Fingerprint: a digest of the name."""
    name: str
    """The `dictionary` of the file's lines."""
    folder: Path
    latents: int
    windows: int


def import_evidence(file: Path, store: Path, seed: int = 0) -> list[Imported]:
    """Read `file` and write one folder of evidence per dictionary into the store; register them and publish.

    Raises:
        UserError: a line is wrong (file, line and mistake are named); nothing was written.
    """
    raise NotImplementedError


def export_evidence(store: Path, file: Path, dictionary: str | None = None) -> int:
    """Write the evidence of one dictionary (fingerprint, a prefix of it, or name; all where None); return the lines written.

    Raises:
        UserError: no such dictionary, or no evidence.
    """
    raise NotImplementedError

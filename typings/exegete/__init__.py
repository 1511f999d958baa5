"""Exegete: explanations of sparse-dictionary latents, written, tested and kept in DuckDB.

The four folders of the repository are `exegete.prompts ← tools ← evaluators ← agent`; imports run that way only.
`exegete.connect(store)` opens a store's published results for reading.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exegete.tools.store import connect as connect

__all__ = ["__version__", "connect"]


def __getattr__(name: str) -> Any:
    """Resolve the public names on first use, so that `import exegete` stays instant."""
    if name == "connect":
        from exegete.tools.store import connect

        return connect
    if name == "__version__":
        from importlib.metadata import version

        return version("exegete")
    raise AttributeError(f"module 'exegete' has no attribute {name!r}")

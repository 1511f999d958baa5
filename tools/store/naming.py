"""What things in a store are called: names are digests of what they are of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from exegete.tools.seeds import digest


def id_of_run(config: Mapping[str, Any], seed: int, dictionary: str) -> str:
    """Return the id of a run: a digest of what its results depend on."""
    return digest(json_text(config), str(seed), dictionary)


def evidence_path(dictionary: str, control: bool = False) -> str:
    """Return where evidence of a dictionary lies within its store: `evidence/` and 16 hex digits of the fingerprint.

    That of a random-weight control lies in `controls/`: what labels, lists or exports all evidence does not meet it.
    """
    return f"{'controls' if control else 'evidence'}/{dictionary.removeprefix('sha256:')[:16]}"


def json_text(value: Mapping[str, Any]) -> str:
    """Return JSON that is the same for equal mappings, in whatever order they are."""
    return json.dumps(dict(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)

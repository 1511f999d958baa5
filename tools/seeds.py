"""Every random choice derives from one seed and the names of what it is for.

`derive_seed(seed, "evidence", "pool")` is a 64-bit number that depends on nothing else: not on order, process or platform.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(seed: int, *names: str | int) -> int:
    """Return the 64-bit seed for the purpose that `names` spell out, for example `derive_seed(0, "floors", latent)`."""
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """Return a NumPy generator seeded by `derive_seed(seed, *names)`."""
    return np.random.Generator(np.random.PCG64(derive_seed(seed, *names)))


def digest(*parts: str | bytes) -> str:
    """Return `sha256:` and 64 hex digits over the parts, each prefixed with its length so that no two lists collide."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return f"sha256:{state.hexdigest()}"

"""Windows for tests: a latent that fires on ` cat`."""

from __future__ import annotations

import numpy as np

from exegete.tools.windows import Kind, LatentEvidence, Split, Window


def window(
    identity: int, tokens: tuple[str, ...], split: Split = "test", kind: Kind | None = None, stratum: int | None = None
) -> Window:
    activations = np.array([1.0 if token == " cat" else 0.0 for token in tokens], dtype=np.float32)
    fires = bool(activations.any())
    return Window(identity, tokens, activations, fires, split, kind or ("firing" if fires else "random"), stratum)


def cat_evidence(firing: int = 20, silent: int = 20) -> LatentEvidence:
    """Windows whose ` cat` stands at position 2 of five tokens, and as many without one, in each split."""
    windows: list[Window] = []
    for split in ("explain", "refine", "test"):
        for i in range(firing):
            windows.append(window(len(windows), (" a", f" b{i}", " cat", " sat", "."), split, stratum=i % 10))
        for i in range(silent):
            windows.append(window(len(windows), (" a", f" b{i}", " dog", " sat", "."), split))
    return LatentEvidence(7, "live", tuple(windows))

"""The nearest latents of each latent: by decoder cosine, or by co-firing where there is no linear decoder.

Cosines are taken in blocks of so many rows and columns, of which the best are kept: a million latents need no matrix of
a million by a million. For co-firing with counts see `exegete.tools.cofiring`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from exegete.tools.errors import UserError
from exegete.tools.hard_negatives import PoolFirings
from exegete.tools.sampling import F32, I64

if TYPE_CHECKING:
    from torch import Tensor

    from exegete.tools.dictionaries import Dictionary

NEIGHBOURS = pa.schema(
    [("latent", pa.int32()), ("rank", pa.int16()), ("neighbour", pa.int32()), ("cosine", pa.float32())]
)
"""`rank`: 0 nearest. `cosine`: of decoder directions, or of the firing patterns on windows of the pool."""

_ROWS, _COLUMNS = 1_024, 32_768
_COFIRING_WINDOWS = 1_024


def nearest_latents(dictionary: Dictionary, firings: PoolFirings, count: int) -> tuple[I64, F32, str]:
    """Return for each latent its `count` nearest, their cosines, and what they were taken from.

    Returns:
        Latents, nearest first, shape (latent, neighbour); cosines of the same shape; "decoder" or "cofiring".
    """
    directions = dictionary.decoder_directions()
    source = "cofiring" if directions is None else "decoder"
    if directions is None:
        directions = _firing_patterns(firings)
    neighbours, cosines = nearest(directions, min(count, dictionary.latents - 1))
    return neighbours, cosines, source


def decoder_neighbours(dictionary: Dictionary, latents: Sequence[int], count: int) -> tuple[I64, F32]:
    """Return the `count` other latents of highest decoder cosine to each of `latents`, nearest first, and the cosines.

    Returns:
        Latents and cosines, both of shape (latent asked for, neighbour).

    Raises:
        UserError: there is no such latent or neighbour, or the decoder is no linear map.
    """
    directions = dictionary.decoder_directions()
    if directions is None:
        raise UserError(
            f"dictionary {dictionary.name!r} has no decoder directions, since its decoder is no linear map; ask for "
            "neighbours by co-firing"
        )
    if wrong := [latent for latent in latents if not 0 <= latent < dictionary.latents]:
        raise UserError(
            f"dictionary {dictionary.name!r} has no latent {wrong[0]}; it has 0 to {dictionary.latents - 1}"
        )
    if not len(latents) or not 1 <= count < dictionary.latents:
        raise UserError(
            f"{count} neighbours of {len(latents)} latents are asked for; give at least one latent, and 1 to "
            f"{dictionary.latents - 1} neighbours"
        )
    return nearest(directions, count, latents)


def nearest(vectors: Tensor, count: int, chosen: Sequence[int] | None = None) -> tuple[I64, F32]:
    """Return the `count` other rows of highest cosine to each row of `vectors` (row, width), and these cosines.

    `chosen`: only for these rows.
    """
    import torch

    with torch.inference_mode():
        unit = torch.nn.functional.normalize(vectors.float(), dim=1)
        rows = torch.arange(len(unit)) if chosen is None else torch.tensor(list(chosen))
        found = [_nearest_of(unit, part, count) for part in torch.split(rows.to(unit.device), _ROWS)]
        latents = torch.cat([indices for indices, _ in found]).cpu().numpy()
        cosines = torch.cat([values for _, values in found]).cpu().numpy()
    return latents, cosines


def _nearest_of(unit: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    import torch

    own_vectors = unit[rows]
    values = unit.new_zeros((len(rows), 0))
    indices = rows.new_zeros((len(rows), 0))
    for low in range(0, len(unit), _COLUMNS):
        cosines = own_vectors @ unit[low : low + _COLUMNS].T
        own = (rows >= low) & (rows < low + cosines.shape[1])
        cosines[own.nonzero().squeeze(1), rows[own] - low] = -torch.inf
        best = cosines.topk(min(count, cosines.shape[1]), dim=1)
        values = torch.cat([values, best.values], 1)
        indices = torch.cat([indices, best.indices + low], 1)
        values, order = values.topk(min(count, values.shape[1]), dim=1)
        indices = indices.gather(1, order)
    return indices, values


def _firing_patterns(firings: PoolFirings) -> Tensor:
    """Return on which windows of the pool's explain split each latent fires, shape (latent, window), 0 or 1."""
    import torch

    windows = min(_COFIRING_WINDOWS, int(firings.bounds[1]))
    patterns = np.zeros((firings.latents, max(windows, 1)), np.float32)
    latents, index = np.divmod(firings.keys, max(firings.size, 1))
    shown = index < windows
    patterns[latents[shown], index[shown]] = 1
    return torch.from_numpy(patterns)


def neighbours_table(neighbours: I64, cosines: F32) -> pa.Table:
    """Return rows of NEIGHBOURS."""
    latents, count = neighbours.shape
    return pa.table(
        [
            pa.array(np.repeat(np.arange(latents, dtype=np.int32), count)),
            pa.array(np.tile(np.arange(count, dtype=np.int16), latents)),
            pa.array(neighbours.reshape(-1).astype(np.int32)),
            pa.array(cosines.reshape(-1)),
        ],
        schema=NEIGHBOURS,
    )

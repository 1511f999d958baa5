"""A batch of contexts through a dictionary: codes counted, reconstructions beside what they are to be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from exegete.tools.codes import blocks
from exegete.tools.dictionaries import Dictionary
from exegete.tools.errors import UserError
from exegete.tools.live_model import Batch, Reading


@dataclass(frozen=True)
class Coded:
    """A batch through the dictionary: the counted tokens of all its contexts in one row. Positions as in `Reading`."""

    counted: Tensor
    """Shape (context, position)."""
    x: Tensor
    """Shape (token, width)."""
    target: Tensor
    """Shape (token, width out), and so is `reconstruction`; both in float32 or more."""
    reconstruction: Tensor
    active: Tensor
    """Latents in each token, shape (token,)."""
    fired: Tensor
    """Shape (latent,)."""

    def by_context(self, values: Tensor) -> Tensor:
        """Return sums over each context, shape (token,) → (context,), in float64."""
        sums = torch.zeros(len(self.counted), dtype=torch.float64, device=values.device)
        return sums.index_add(0, self.counted.nonzero()[:, 0], values.double())

    def each(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield inputs, errors and targets of each context."""
        counts = self.counted.sum(1).tolist()
        error = self.target - self.reconstruction
        yield from zip(*(torch.split(values, counts) for values in (self.x, error, self.target)), strict=True)


def code(dictionary: Dictionary, reading: Reading, counted: Tensor) -> Coded:
    """Code the `counted` tokens of a batch, shape (context, position), whose vectors at both hook points were read.

    Raises:
        UserError: vectors or reconstructions are not finite.
    """
    into, out = reading.vectors[dictionary.hook_point], reading.vectors[dictionary.hook_point_out]
    fired = torch.zeros(dictionary.latents, dtype=torch.bool, device=into.device)
    active, decoded = [], [out[:0, 0].float()]
    for z, reconstruction in _parts(dictionary, into, counted, reading.batch):
        active.append((z != 0).sum(1))
        fired |= (z != 0).any(0)
        decoded.append(reconstruction.float())
    counts = torch.cat(active) if active else torch.zeros(0, dtype=torch.long, device=into.device)
    coded = Coded(counted, into[counted], out[counted].float(), torch.cat(decoded), counts, fired)
    _require_finite(coded, dictionary)
    return coded


def _parts(dictionary: Dictionary, into: Tensor, counted: Tensor, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield code and reconstruction at the counted tokens, in their order, in parts that are small enough to hold."""
    if dictionary.conditioned:
        yield from _codes_by_context(dictionary, into, counted, batch)
        return
    for x in blocks(into[counted], dictionary):
        z = dictionary.encode(x)
        yield z, dictionary.decode(z, x)


def _codes_by_context(
    dictionary: Dictionary, into: Tensor, counted: Tensor, batch: Batch
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield code and reconstruction at the counted tokens of each context, which is coded as a whole."""
    for row, length in enumerate(batch.lengths):
        context = into[row : row + 1, -length:]
        z = dictionary.encode(context)
        shown = counted[row, -length:]
        yield z[0][shown], dictionary.decode(z, context)[0][shown]


def distances(coded: Coded, mean: Tensor) -> dict[str, Tensor]:
    """Return sums over each context, shape (context,)."""
    squared = (coded.target - coded.reconstruction).double().square().sum(1)
    variance = (coded.target - mean).square().sum(1)
    cosine = torch.nn.functional.cosine_similarity(coded.reconstruction, coded.target, dim=1)
    columns = {
        "tokens": torch.ones_like(squared),
        "l0": coded.active,
        "squared_error": squared,
        "variance": variance,
        "fvu_per_token": squared / variance,
        "cosine": cosine,
    }
    return {name: coded.by_context(values) for name, values in columns.items()}


def loss(logits: Tensor, tokens: Tensor, predicted: Tensor) -> Tensor:
    """Return the summed cross-entropy of the `predicted` tokens, shape (context, position − 1) → (context,)."""
    each = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return (each.view(predicted.shape).double() * predicted).sum(1)


def _require_finite(coded: Coded, dictionary: Dictionary) -> None:
    for what, values in (("vectors", coded.target), ("reconstruction", coded.reconstruction)):
        if not bool(values.isfinite().all()):
            raise UserError(
                f"the {what} of dictionary {dictionary.name!r} at {dictionary.hook_point_out!r} are not all finite; load "
                'subject and dictionary with dtype = "float32"'
            )

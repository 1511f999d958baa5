"""Activations of chosen latents, without ever holding the dense code of a whole batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from exegete.tools.dictionaries import Dictionary, PlainDictionary

_ENTRIES = 2**26
"""Of a dense code that are held at once: a quarter of a gigabyte in float32."""


def codes(dictionary: Dictionary, x: Tensor, latents: Tensor) -> Tensor:
    """Return the activations of `latents` on vectors, shape (token, width) → (token, latent).

    For a `conditioned` dictionary `x` is one context, shape (position, width).
    """
    if isinstance(dictionary, PlainDictionary) and dictionary.activation != "topk":
        return _columns(dictionary, x, latents)
    if dictionary.conditioned:
        return dictionary.encode(x[None])[0][:, latents]
    found = [dictionary.encode(part)[:, latents] for part in blocks(x, dictionary)]
    return torch.cat(found) if found else x.new_zeros((0, len(latents)))


def blocks(x: Tensor, dictionary: Dictionary) -> Iterator[Tensor]:
    """Yield `x`, shape (token, width), in parts whose dense code is small enough to hold."""
    size = max(1, _ENTRIES // dictionary.latents)
    yield from (x[start : start + size] for start in range(0, len(x), size))


def _columns(dictionary: PlainDictionary, x: Tensor, latents: Tensor) -> Tensor:
    x = x.to(dictionary.encoder.dtype)
    if dictionary.input_shift is not None:
        x = x - dictionary.input_shift
    active = torch.addmm(dictionary.encoder_bias[latents], x, dictionary.encoder[:, latents]).relu()
    if dictionary.threshold is None:
        return active
    return active * (active > dictionary.threshold[latents])

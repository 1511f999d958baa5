"""Sparse dictionaries: what one is, the fast path for plain ones, and the wrapper for everything else.

A dictionary turns a vector at one hook point of a subject into a code over latents, and back. Three forms meet one
Protocol, `Dictionary`:

- `PlainDictionary`: ReLU, JumpReLU or TopK over one affine map. Its parameters are public, so that the activation pass
  can multiply in blocks of latents and select sparsely instead of holding the dense code.
- `OpaqueDictionary`: any object with `encode` and `decode`. Codes may be signed, their number of actives may vary,
  `decode` may be non-linear.
- whatever else has these attributes.

`load_dictionary` in `exegete.tools.dictionary_loaders` reads them from disk or a registry.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from exegete.tools.errors import UserError
from exegete.tools.seeds import digest, generator

if TYPE_CHECKING:
    from exegete.tools.subject import Subject

Activation = Literal["relu", "jumprelu", "topk"]


@runtime_checkable
class Dictionary(Protocol):
    """A sparse coder at one hook point of one subject."""

    name: str
    fingerprint: str
    """`sha256:…` over weights, configuration, hook point, the subject's tokenizer and its revision."""
    hook_point: str
    hook_point_out: str
    """Where `decode` writes: the hook point itself, or for a transcoder the one it predicts."""
    width: int
    """Length of the vectors that `encode` takes."""
    latents: int
    device: str
    dtype: str
    conditioned: bool
    """Whether a code depends on more than its own vector. Then `encode` must be given whole contexts, shape (context,
    position, width), and `decode` the input that the code is of."""

    def decoder_directions(self) -> Tensor | None:
        """Return what each latent writes, shape (latent, width out), or None where `decode` is not a linear map."""
        ...

    def encode(self, x: Tensor) -> Tensor:
        """Return the dense code of `x`, shape (…, width) → (…, latent). Values may be negative."""
        ...

    def decode(self, z: Tensor, given: Tensor | None = None) -> Tensor:
        """Return the reconstruction, shape (…, latent) → (…, width out). `given`: the input; needed where `conditioned`."""
        ...


class SparseCode(NamedTuple):
    """The nonzero entries of a code, sorted by row, then latent. Each has shape (entries,)."""

    rows: Tensor
    latents: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False)
class PlainDictionary:
    """`activation((x − input_shift) @ encoder + encoder_bias)`, decoded by `z @ decoder + decoder_bias`.

    TopK keeps the `k` largest pre-activations and of these the positive ones; JumpReLU those above `threshold` (and 0).
    """

    name: str
    fingerprint: str
    hook_point: str
    encoder: Tensor
    """Shape (width, latent)."""
    encoder_bias: Tensor
    """Shape (latent,)."""
    decoder: Tensor
    """Shape (latent, width out)."""
    decoder_bias: Tensor
    """Shape (width out,)."""
    activation: Activation
    k: int | None = None
    """Latents that TopK keeps per token; None otherwise."""
    threshold: Tensor | None = None
    """Shape (latent,), for JumpReLU; None otherwise."""
    input_shift: Tensor | None = None
    """Shape (width,), subtracted from the input first; None where nothing is."""
    output: str | None = None
    """Hook point that `decode` writes to, where it is not `hook_point` (transcoders)."""
    conditioned: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.activation == "topk" and not (self.k and 0 < self.k <= self.latents):
            raise UserError(f"dictionary {self.name!r}: TopK needs k between 1 and {self.latents} latents, not {self.k!r}")
        if self.activation == "jumprelu" and self.threshold is None:
            raise UserError(f"dictionary {self.name!r}: JumpReLU needs a threshold for each latent")

    @property
    def hook_point_out(self) -> str:
        """Where `decode` writes."""
        return self.output or self.hook_point

    @property
    def width(self) -> int:
        """Length of the vectors that `encode` takes."""
        return self.encoder.shape[0]

    @property
    def latents(self) -> int:
        """Number of latents."""
        return self.encoder.shape[1]

    @property
    def device(self) -> str:
        """The device that holds the weights."""
        return str(self.encoder.device)

    @property
    def dtype(self) -> str:
        """The weights' number format, for example "float32"."""
        return str(self.encoder.dtype).removeprefix("torch.")

    def to(self, device: str | None = None, dtype: str | None = None) -> PlainDictionary:
        """Return the same dictionary on another device or in another number format; the fingerprint stays."""
        wanted = getattr(torch, dtype) if dtype else None
        moved = {
            name: value.to(device=device, dtype=wanted)
            for name in ("encoder", "encoder_bias", "decoder", "decoder_bias", "threshold", "input_shift")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)

    def decoder_directions(self) -> Tensor:
        """Return the decoder, shape (latent, width out)."""
        return self.decoder

    def preactivations(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the pre-activations of the latents `start` … `stop`, shape (…, width) → (…, stop − start)."""
        x = x.to(self.encoder.dtype)
        if self.input_shift is not None:
            x = x - self.input_shift
        stop = self.latents if stop is None else stop
        if x.dim() == 2:
            return torch.addmm(self.encoder_bias[start:stop], x, self.encoder[:, start:stop])
        return x @ self.encoder[:, start:stop] + self.encoder_bias[start:stop]

    def activate(self, preactivations: Tensor, start: int = 0) -> Tensor:
        """Return the dense activations of pre-activations whose first latent is `start`; TopK needs all latents."""
        if self.activation == "relu":
            return preactivations.relu()
        if self.activation == "jumprelu":
            assert self.threshold is not None
            threshold = self.threshold[start : start + preactivations.shape[-1]]
            return preactivations.relu() * (preactivations > threshold)
        if preactivations.shape[-1] != self.latents:
            raise ValueError(f"TopK chooses among all {self.latents} latents, not {preactivations.shape[-1]}")
        assert self.k is not None
        values, latents = preactivations.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(preactivations).scatter_(-1, latents, values.relu())

    def encode(self, x: Tensor) -> Tensor:
        """Return the dense code, shape (…, width) → (…, latent)."""
        return self.activate(self.preactivations(x))

    def encode_sparse(self, x: Tensor) -> SparseCode:
        """Return the nonzero entries of the code of `x`, shape (row, width)."""
        preactivations = self.preactivations(x)
        if self.activation != "topk":
            active = preactivations > 0
            if self.threshold is not None:
                active &= preactivations > self.threshold
            rows, latents = active.nonzero(as_tuple=True)
            return SparseCode(rows, latents, preactivations[rows, latents])
        assert self.k is not None
        values, chosen = preactivations.topk(self.k, dim=-1, sorted=False)
        chosen, order = chosen.sort(dim=-1)
        values = values.gather(-1, order)
        rows, columns = (values > 0).nonzero(as_tuple=True)
        return SparseCode(rows, chosen[rows, columns], values[rows, columns])

    def decode(self, z: Tensor, given: Tensor | None = None) -> Tensor:
        """Return `z @ decoder + decoder_bias`, shape (…, latent) → (…, width out)."""
        return z.to(self.decoder.dtype) @ self.decoder + self.decoder_bias


@dataclass(frozen=True, eq=False)
class OpaqueDictionary:
    """Any coder, by its two functions. The activation pass calls `encode` and looks at what is not zero."""

    name: str
    fingerprint: str
    hook_point: str
    width: int
    latents: int
    device: str
    dtype: str
    encoder: Callable[[Tensor], Tensor]
    """Shape (…, width) → (…, latent)."""
    decoder: Callable[[Tensor, Tensor | None], Tensor]
    """Shape (…, latent) and the input → (…, width out)."""
    directions: Tensor | None = None
    """What each latent writes, shape (latent, width out), where `decoder` is linear."""
    output: str | None = None
    """Hook point that `decode` writes to, where it is not `hook_point` (transcoders)."""
    conditioned: bool = False

    @property
    def hook_point_out(self) -> str:
        """Where `decode` writes."""
        return self.output or self.hook_point

    def decoder_directions(self) -> Tensor | None:
        """Return what each latent writes, shape (latent, width out), or None where `decode` is not linear."""
        return self.directions

    def encode(self, x: Tensor) -> Tensor:
        """Return the dense code, shape (…, width) → (…, latent)."""
        with torch.inference_mode():
            return self.encoder(x.to(getattr(torch, self.dtype)))

    def decode(self, z: Tensor, given: Tensor | None = None) -> Tensor:
        """Return the reconstruction, shape (…, latent) → (…, width out)."""
        if self.conditioned and given is None:
            raise ValueError(f"dictionary {self.name!r} decodes relative to its input: pass it as `given`")
        with torch.inference_mode():
            return self.decoder(z.to(getattr(torch, self.dtype)), given)


def random_dictionary(
    subject: Subject, hook_point: str, latents: int, activation: Activation, k: int = 32, seed: int = 0, sample: Tensor | None = None
) -> PlainDictionary:
    """Return a dictionary of random directions that fires about `k` latents a token: a control, and for benchmarks."""
    raise NotImplementedError

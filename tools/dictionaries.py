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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from exegete.tools.errors import UserError
from exegete.tools.seeds import digest, generator
from exegete.tools.weights import weights_digest

if TYPE_CHECKING:
    from exegete.tools.subject import Subject

Activation = Literal["relu", "jumprelu", "topk"]


@runtime_checkable
class Dictionary(Protocol):
    """A sparse coder at one hook point of one subject."""

    @property
    def name(self) -> str:
        """What the user called it."""
        ...

    @property
    def fingerprint(self) -> str:
        """`sha256:…` over weights, configuration, hook point, and the subject with its tokenizer and revision."""
        ...

    @property
    def hook_point(self) -> str:
        """Where it reads."""
        ...

    @property
    def hook_point_out(self) -> str:
        """Where `decode` writes: the hook point itself, or for a transcoder the one it predicts."""
        ...

    @property
    def width(self) -> int:
        """Length of the vectors that `encode` takes."""
        ...

    @property
    def latents(self) -> int:
        """Number of latents."""
        ...

    @property
    def device(self) -> str:
        """The device that holds the weights."""
        ...

    @property
    def dtype(self) -> str:
        """The weights' number format, for example "float32"."""
        ...

    @property
    def conditioned(self) -> bool:
        """Whether a code depends on more than its own vector.

        Then `encode` must be given whole contexts, shape (context, position, width), and `decode` the input that the
        code is of.
        """
        ...

    def decoder_directions(self) -> Tensor | None:
        """Return what each latent writes, shape (latent, width out), or None where `decode` is not a linear map."""
        ...

    def encode(self, x: Tensor) -> Tensor:
        """Return the dense code of `x`, shape (…, width) → (…, latent). Values may be negative."""
        ...

    def decode(self, z: Tensor, given: Tensor | None = None) -> Tensor:
        """Return the reconstruction, shape (…, latent) → (…, width out).

        `given` is the input that `z` is of, shape (…, width); needed where `conditioned`.
        """
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
    """A token's code depends on its own vector alone."""

    def __post_init__(self) -> None:
        if self.activation == "topk" and not (self.k and 0 < self.k <= self.latents):
            raise UserError(
                f"dictionary {self.name!r}: TopK needs k between 1 and {self.latents} latents, not {self.k!r}"
            )
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
        with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
            return self.encoder(x.to(getattr(torch, self.dtype)))

    def decode(self, z: Tensor, given: Tensor | None = None) -> Tensor:
        """Return the reconstruction, shape (…, latent) → (…, width out)."""
        if self.conditioned and given is None:
            raise ValueError(f"dictionary {self.name!r} decodes relative to its input: pass it as `given`")
        with torch.set_grad_enabled(torch.is_grad_enabled() and z.requires_grad):
            return self.decoder(z.to(getattr(torch, self.dtype)), given)


def opaque_dictionary(
    coder: Any,
    subject: Subject,
    *,
    name: str,
    hook_point: str,
    latents: int,
    identity: str | None = None,
    directions: Tensor | None = None,
    conditioned: bool = False,
) -> OpaqueDictionary:
    """Wrap any object with `encode(x)` and `decode(z)`, which takes the input as a second argument if `conditioned`.

    `identity` stands for its weights in the fingerprint; a torch module's are read, and need none.

    Raises:
        UserError: there is no `identity` and no weights to read, or the subject lacks the hook point.
    """
    weights = dict(coder.state_dict()) if hasattr(coder, "state_dict") else {}
    if not weights and identity is None:
        raise UserError(f"dictionary {name!r} has no weights to tell it by; pass identity=, for example its version")
    width = subject.width(hook_point)
    facts = {"name": name, "latents": latents, "identity": identity, "class": type(coder).__qualname__}
    return OpaqueDictionary(
        name=name,
        fingerprint=dictionary_fingerprint(weights, facts, hook_point, subject),
        hook_point=hook_point,
        width=width,
        latents=latents,
        device=subject.device,
        dtype=subject.dtype,
        encoder=coder.encode,
        decoder=coder.decode if conditioned else lambda z, given: coder.decode(z),
        directions=directions,
        conditioned=conditioned,
    )


def dictionary_fingerprint(
    weights: Mapping[str, Tensor], configuration: Mapping[str, Any], hook_point: str, subject: Subject
) -> str:
    """Return `sha256:…` over weights, configuration, hook point, and the subject with its tokenizer."""
    facts = json.dumps(configuration, sort_keys=True, default=str)
    return digest(weights_digest(weights), facts, hook_point, subject.fingerprint, subject.tokenizer_digest)


def random_dictionary(
    subject: Subject, hook_point: str, latents: int, activation: Activation, k: int = 32, seed: int = 0
) -> PlainDictionary:
    """Return a dictionary of random directions: the control that says nothing, and for benchmarks.

    About `k` latents fire on a token (exactly as many for TopK). Their rates are unequal as a trained dictionary's are:
    log-normal around `k / latents`, set by the mean and covariance of the subject's own vectors on random tokens, so
    that directions of large variance do not fire always and the others never.

    Raises:
        UserError: the subject lacks the hook point, or TopK is to keep more than all latents.
    """
    rng = generator(seed, "random_dictionary", hook_point, latents)
    width = subject.width(hook_point)
    x = _vectors_on_random_tokens(subject, hook_point, rng)
    shift = x.mean(0)
    directions = torch.from_numpy(rng.standard_normal((latents, width), dtype=np.float32))
    directions /= directions.norm(dim=-1, keepdim=True)
    covariance = (x - shift).T @ (x - shift) / len(x)
    spread = ((directions @ covariance) * directions).sum(-1).clamp_min(1e-12).sqrt()
    wanted = torch.from_numpy(rng.lognormal(-0.5, 1.0, latents)).float() * k / latents
    # Pre-activations are close to standard normal after the division by `spread`: the tail above this is as wanted.
    threshold = -torch.special.ndtri(wanted.clamp(1e-7, 0.5))
    facts = {"random": seed, "latents": latents, "activation": activation, "k": k, "width": width}
    return PlainDictionary(
        name=f"random-{activation}-{latents}-seed{seed}",
        fingerprint=dictionary_fingerprint({"directions": directions}, facts, hook_point, subject),
        hook_point=hook_point,
        encoder=(directions / spread[:, None]).T.contiguous(),
        encoder_bias={"jumprelu": 0 * threshold, "relu": -threshold, "topk": threshold.median() - threshold}[
            activation
        ],
        decoder=directions,
        decoder_bias=shift,
        activation=activation,
        k=k if activation == "topk" else None,
        threshold=threshold if activation == "jumprelu" else None,
        input_shift=shift,
    ).to(subject.device, subject.dtype)


def _vectors_on_random_tokens(subject: Subject, hook_point: str, rng: np.random.Generator) -> Tensor:
    """Return vectors at the hook point, shape (32 contexts of up to 128 tokens, width), in float32 on the CPU."""
    length = min(128, subject.max_context)
    tokens = rng.integers(0, len(subject.pieces), (32, length))
    tokens %= int(subject.bridge.cfg.d_vocab)
    return subject.residual(torch.from_numpy(tokens), hook_point).flatten(0, 1).float().cpu().clone()
